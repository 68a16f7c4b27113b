//! The cgroups of nodes: one per node and hierarchy, so that a node's whole tree can be found
//! again.
//!
//! A node lives in its own cgroup namespace with the hierarchies mounted afresh, as if it had the
//! machine to itself; from outside its groups are `godwit-N.NODE`. On hosts with version 1 (or both
//! versions) they lie below the group of this process, in each hierarchy. On hosts with version 2
//! alone they lie at the top, since a group with processes cannot give controllers to its children.
//!
//! The group also is the list of a node's processes: cleaning up needs no other record.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::command::wait_until;

/// Mounted cgroup hierarchy of the host.
#[derive(Debug, PartialEq, Eq)]
struct Hierarchy {
    mountpoint: PathBuf,
    /// Mount options of version 1, for example `cpu,cpuacct`; `None` is version 2.
    controllers: Option<String>,
    /// Group of this process, relative to the mount point; empty at its top.
    own: PathBuf,
}

/// The groups of one node.
#[derive(Clone, Debug)]
pub(crate) struct Groups {
    /// Directories that the node's first process enters: they become the top of its own view.
    pub(crate) tops: Vec<PathBuf>,
    /// Directories that every later process enters.
    pub(crate) entries: Vec<PathBuf>,
    /// What the node mounts: `NAME:TYPE:OPTIONS` each, for its init script.
    pub(crate) mounts: Vec<String>,
}

/// Name of the groups of a node; `prefix` of all groups of a run.
fn group_name(run: u32, node: &str) -> String {
    format!("{}{node}", group_prefix(run))
}

fn group_prefix(run: u32) -> String {
    format!("godwit-{run}.")
}

/// Makes the groups of a node.
pub(crate) fn create(run: u32, node: &str) -> Result<Groups> {
    let hierarchies = hierarchies()?;
    let only_v2 = hierarchies.iter().all(|hierarchy| hierarchy.controllers.is_none());
    let mut groups = Groups { tops: Vec::new(), entries: Vec::new(), mounts: Vec::new() };
    for hierarchy in &hierarchies {
        let base = if only_v2 { PathBuf::new() } else { hierarchy.own.clone() };
        let parent = hierarchy.mountpoint.join(base);
        let group = parent.join(group_name(run, node));
        fs::create_dir(&group).with_context(|| format!("create {}", group.display()))?;
        let name = hierarchy.mountpoint.file_name().unwrap_or_default().to_string_lossy();
        match &hierarchy.controllers {
            Some(controllers) => {
                prepare_v1(&parent, &group)?;
                groups.mounts.push(format!("{name}:cgroup:{controllers}"));
                groups.entries.push(group.clone());
            }
            None if only_v2 => {
                enable_all_controllers(&hierarchy.mountpoint)?;
                groups.mounts.push(".:cgroup2:rw".into());
                // Made by the init script, which moves its own process there.
                groups.entries.push(group.join("init"));
            }
            None => {
                groups.mounts.push(format!("{name}:cgroup2:rw"));
                groups.entries.push(group.clone());
            }
        }
        groups.tops.push(group);
    }
    Ok(groups)
}

impl Groups {
    /// Makes room for the node's containers once its process 1 runs; `outside` is its parent.
    ///
    /// A version 2 group gives controllers to its children only when it has no process itself. The
    /// init script has moved process 1 down; its parent, which is out of its sight, is moved here.
    pub(crate) fn settle(&self, outside: u32) -> Result<()> {
        for (top, entry) in self.tops.iter().zip(&self.entries).filter(|(top, entry)| top != entry)
        {
            fs::write(entry.join("cgroup.procs"), outside.to_string())
                .with_context(|| format!("enter {}", entry.display()))?;
            enable_all_controllers(top)?;
        }
        Ok(())
    }

    /// Thaws everything in the node's groups.
    pub(crate) fn thaw(&self) {
        for group in self.tops.iter().flat_map(|top| tree(top)) {
            let _ = fs::write(group.join("freezer.state"), "THAWED");
            let _ = fs::write(group.join("cgroup.freeze"), "0");
        }
    }

    /// Removes the groups that a node which has ended made in its own.
    pub(crate) fn empty(&self, timeout: Duration) -> Result<()> {
        wait_until("the cgroups of a node that crashed are removed", timeout, || {
            let mut are_left = false;
            for child in self.tops.iter().flat_map(|top| children(top)) {
                are_left = true;
                for group in tree(&child) {
                    let _ = fs::remove_dir(group);
                }
            }
            Ok(!are_left)
        })
    }
}

/// A fresh cpuset group has no CPUs and no memory, and processes cannot enter it until it has.
fn prepare_v1(parent: &Path, group: &Path) -> Result<()> {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        if let Ok(value) = fs::read_to_string(parent.join(file)) {
            fs::write(group.join(file), value)?;
            fs::write(group.join("cgroup.clone_children"), "1")?;
        }
    }
    Ok(())
}

fn enable_all_controllers(top: &Path) -> Result<()> {
    let available = fs::read_to_string(top.join("cgroup.controllers"))?;
    for controller in available.split_whitespace() {
        // One at a time: a controller that cannot be enabled must not take the others with it.
        let _ = fs::write(top.join("cgroup.subtree_control"), format!("+{controller}"));
    }
    Ok(())
}

/// Kills every process of a run, thawing what is frozen, and waits until none is left.
pub(crate) fn kill_all(run: u32, timeout: Duration) -> Result<()> {
    wait_until(&format!("processes of run {run} end"), timeout, || {
        let groups = groups_of(run)?;
        let mut alive = false;
        for group in groups.iter().flat_map(|group| tree(group)) {
            // A frozen process does not even die.
            let _ = fs::write(group.join("freezer.state"), "THAWED");
            let _ = fs::write(group.join("cgroup.freeze"), "0");
            let text = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
            for pid in text.lines().filter_map(|line| line.parse().ok()).filter(|&pid| pid > 0) {
                alive = true;
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
        Ok(!alive)
    })
}

/// Removes the groups of a run, which must have no processes any more.
pub(crate) fn remove_all(run: u32, timeout: Duration) -> Result<()> {
    wait_until(&format!("cgroups of run {run} are removed"), timeout, || {
        let groups = groups_of(run)?;
        for group in groups.iter().flat_map(|group| tree(group)) {
            // Busy for a moment after the last process: the caller's loop tries again.
            let _ = fs::remove_dir(group);
        }
        Ok(groups_of(run)?.is_empty())
    })
}

/// Directories of a run's groups, wherever the process that made them was.
pub(crate) fn groups_of(run: u32) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for hierarchy in hierarchies()? {
        find(&hierarchy.mountpoint, &group_prefix(run), &mut found);
    }
    Ok(found)
}

/// Directories that a process enters to belong to a node of any run.
pub(crate) fn groups_of_node(run: u32, node: &str) -> Result<Vec<PathBuf>> {
    let mut groups = groups_of(run)?;
    groups.retain(|group| group.ends_with(group_name(run, node)));
    let inner = |group: PathBuf| match group.join("init") {
        init if init.is_dir() => init,
        _ => group,
    };
    Ok(groups.into_iter().map(inner).collect())
}

fn find(directory: &Path, prefix: &str, found: &mut Vec<PathBuf>) {
    for child in children(directory) {
        let name = child.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with(prefix) { found.push(child) } else { find(&child, prefix, found) }
    }
}

/// `group` and all groups below it, children first.
fn tree(group: &Path) -> Vec<PathBuf> {
    let mut all: Vec<_> = children(group).iter().flat_map(|child| tree(child)).collect();
    all.push(group.to_path_buf());
    all
}

/// Groups may vanish while we look; what is gone has no children.
fn children(directory: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    let entries = entries.flatten();
    entries.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()).collect()
}

fn hierarchies() -> Result<Vec<Hierarchy>> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let own = match fs::read_to_string("/proc/self/cgroup") {
        Err(error) if error.kind() == ErrorKind::NotFound => String::new(),
        text => text?,
    };
    Ok(parse(&mounts, &own))
}

fn parse(mountinfo: &str, own: &str) -> Vec<Hierarchy> {
    let mut found: Vec<Hierarchy> = Vec::new();
    for line in mountinfo.lines() {
        let Some((left, right)) = line.split_once(" - ") else { continue };
        let left: Vec<&str> = left.split(' ').collect();
        let right: Vec<&str> = right.split(' ').collect();
        let (&[_, _, _, root, mountpoint, ..], &[kind, _, options, ..]) =
            (left.as_slice(), right.as_slice())
        else {
            continue;
        };
        let controllers = match kind {
            "cgroup" => Some(v1_options(options)),
            "cgroup2" => None,
            _ => continue,
        };
        let own = own_group(own, controllers.as_deref(), root);
        let hierarchy = Hierarchy { mountpoint: mountpoint.into(), controllers, own };
        // A hierarchy may be mounted twice; the first mount serves.
        if !found.iter().any(|other| other.controllers == hierarchy.controllers) {
            found.push(hierarchy);
        }
    }
    found
}

/// Options to mount a version 1 hierarchy again: its controllers or its name.
fn v1_options(options: &str) -> String {
    let ignored = ["rw", "ro", "xattr", "clone_children", "noprefix"];
    let kept = options.split(',').filter(|o| !ignored.contains(o) && !o.contains("agent="));
    let kept: Vec<&str> = kept.collect();
    let named = kept.iter().all(|option| option.starts_with("name="));
    if named { format!("none,{}", kept.join(",")) } else { kept.join(",") }
}

/// Group of this process below the mounted `root` of a hierarchy, from the text of
/// /proc/self/cgroup.
fn own_group(own: &str, controllers: Option<&str>, root: &str) -> PathBuf {
    let wanted = controllers.unwrap_or("").trim_start_matches("none,");
    let path = own.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?);
        (controllers == wanted).then_some(path)
    });
    let path = path.unwrap_or("/");
    let below = Path::new(path).strip_prefix(root).unwrap_or(Path::new(""));
    below.strip_prefix("/").unwrap_or(below).to_path_buf()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_versions_are_found_with_the_group_of_this_process() {
        let mounts = "\
30 25 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
31 30 0:27 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct
32 30 0:28 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,release_agent=/x,name=systemd
33 30 0:29 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate
34 30 0:27 / /elsewhere rw - cgroup cgroup rw,cpu,cpuacct
";
        let own = "4:cpu,cpuacct:/a/b\n1:name=systemd:/\n0::/user.slice\n";
        let found = parse(mounts, own);
        let summary: Vec<_> = found
            .iter()
            .map(|h| (h.mountpoint.to_str(), h.controllers.as_deref(), h.own.to_str()))
            .collect();
        assert_eq!(
            summary,
            [
                (Some("/sys/fs/cgroup/cpu,cpuacct"), Some("cpu,cpuacct"), Some("a/b")),
                (Some("/sys/fs/cgroup/systemd"), Some("none,name=systemd"), Some("")),
                (Some("/sys/fs/cgroup/unified"), None, Some("user.slice")),
            ]
        );
    }
}
