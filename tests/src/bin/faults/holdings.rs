//! What a node holds, and what a run left there.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::Result;
use godwit_tests::Node;

use crate::site::Site;

/// Deadline for leftovers to vanish: the daemon gives up an abandoned restore after 75 s.
pub(crate) const VANISH_MAX: Duration = Duration::from_secs(100);
const PAUSE: Duration = Duration::from_millis(300);

/// One thing a line. Not among them: the contents of the store and of image layers, which outlive
/// containers by design; FIFOs, which are ctr's; directories that the snapshotter makes in advance.
const LIST: &str = r#"
ps -e -o args= | grep -v -e '^ps ' -e '^sh -e' -e '^grep ' -e '^sed ' -e '^\[' -e 'json watch' | sed 's/ *$//; s/^/process /'
sed 's/^[^ ]* //; s/ .*//; s/^/mount /' /proc/mounts
find /sys/fs/cgroup -mindepth 2 -type d | sed 's/^/group /'
find /run/containerd -mindepth 1 -path /run/containerd/fifo -prune -o -print | sed 's/^/file /'
find /run/godwit /run/godwit-volumes /run/runc /run/netns -mindepth 1 2> /dev/null | sed 's/^/file /'
find /var/lib/godwit -mindepth 1 \( -path '*/store/*' -o -path '*/snapshots/*' -o -path '*/content/*' \) -prune -o -print | sed 's/^/file /'
losetup -n -O BACK-FILE | grep RUN | sed 's/^/loop device /'
nft list tables | sed 's/^/packets /'
ip -o link | sed 's/^[0-9]*: //; s/[:@].*//; s/^/link /'
ctr containers ls -q | sed 's/^/container /'
ctr tasks ls -q | sed 's/^/task /'
ctr leases ls -q | sed 's/^/lease /'
ctr snapshots --snapshotter godwit ls | grep -v Committed | sed 's/ .*//; s/^/snapshot /'
godwit --output json volume ls | tr '{' '\n' | sed -n 's/.*"id":"\([^"]*\)".*/volume \1/p'
godwit --output json status | sed -n 's/.*"leftovers":\[\([^]]*\)\].*/\1/p' | tr ',' '\n' | grep . | sed 's/^/reported /'
true
"#;

/// Directories that are made when they are first needed, stay, and are empty unless something else
/// is listed.
const ONCE: [&str; 10] = [
    "mount /run/netns",
    "file /run/containerd/s",
    "file /run/containerd/runc",
    "file /run/containerd/runc/default",
    "file /run/containerd/io.containerd.runtime.v2.task/default",
    "file /run/godwit-volumes/default",
    "file /var/lib/godwit/dump",
    "file /var/lib/godwit/fences/default",
    "file /var/lib/godwit/peers.json",
    "file /var/lib/godwit/stage",
];

/// What each node holds.
pub(crate) struct Holdings {
    nodes: Vec<BTreeSet<String>>,
}

impl Holdings {
    /// `name` is the run's own: it distinguishes its loop devices from others of this machine.
    pub(crate) fn of(site: &Site, name: &str) -> Result<Self> {
        let nodes = site.nodes().iter().map(|node| list(node, name)).collect::<Result<_>>()?;
        Ok(Self { nodes })
    }

    /// Waits until the nodes hold the same again. Returns what still differs, in words.
    pub(crate) fn differences(&self, site: &Site, name: &str) -> Result<Vec<String>> {
        let begin = Instant::now();
        loop {
            let now = Self::of(site, name)?;
            let differences = self.compare(site, &now);
            if differences.is_empty() || begin.elapsed() > VANISH_MAX {
                return Ok(differences);
            }
            std::thread::sleep(PAUSE);
        }
    }

    fn compare(&self, site: &Site, now: &Self) -> Vec<String> {
        let mut differences = Vec::new();
        for (node, (before, after)) in site.nodes().iter().zip(self.nodes.iter().zip(&now.nodes)) {
            let (more, less) = (after.difference(before), before.difference(after));
            differences.extend(more.map(|line| format!("{} has {line}", node.name())));
            differences.extend(less.map(|line| format!("{} lost {line}", node.name())));
        }
        differences
    }
}

fn list(node: &Node, name: &str) -> Result<BTreeSet<String>> {
    let text = node.ok(&["sh", "-c", &LIST.replace("RUN", name)])?;
    let is_made_once = |line: &&str| {
        ONCE.contains(line) || (line.starts_with("group ") && line.ends_with("/default"))
    };
    Ok(text.lines().filter(|line| !is_made_once(line)).map(str::to_owned).collect())
}

/// What of a network namespace's packet rules is CRIU's, or drops packets. Tables without such
/// rules stay where CRIU has used iptables, and harm nothing.
pub(crate) fn packet_rules(node: &Node, network: &str) -> Result<Vec<String>> {
    let script = format!("ip netns exec {network} nft list ruleset | grep -e CRIU -e drop || true");
    Ok(node.sh(&script)?.lines().map(|line| line.trim().to_owned()).collect())
}
