//! What a node has of snapshots, volumes and mounts, by three witnesses: containerd, the daemon,
//! and the disk.

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use containerd_client::services::v1::snapshots::snapshots_client::SnapshotsClient;
use containerd_client::services::v1::snapshots::{
    CleanupRequest, Info, Kind, ListSnapshotsRequest, MountsRequest,
};
use containerd_client::types::Mount;
use godwit_tests::Node;
use godwit_tests::node::SNAPSHOTTER_SOCKET;
use serde_json::Value;

const STATE: &str = "/var/lib/godwit";
/// How often it is looked again when witnesses do not agree: containerd may have collected garbage
/// in between.
const LOOKS_MAX: usize = 4;

/// One thing a line.
pub(crate) type Held = BTreeSet<String>;

/// What the daemon knows, once it has cleaned up: every snapshot, and the paths that its mounts
/// name.
fn known(node: &Node) -> Result<Vec<(Info, Vec<String>)>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let channel = containerd_client::connect(node.path(SNAPSHOTTER_SOCKET)).await?;
        let mut client = SnapshotsClient::new(channel);
        client.cleanup(CleanupRequest::default()).await?;
        let mut listed = client.list(ListSnapshotsRequest::default()).await?.into_inner();
        let mut known = Vec::new();
        while let Some(some) = listed.message().await? {
            for info in some.info {
                let mut paths = Vec::new();
                if info.kind() != Kind::Committed {
                    let key = info.name.clone();
                    let request = MountsRequest { key, ..MountsRequest::default() };
                    let mounts = client.mounts(request).await?.into_inner().mounts;
                    paths.extend(mounts.iter().flat_map(paths_of));
                }
                known.push((info, paths));
            }
        }
        Ok(known)
    })
}

/// What a mount names on the disk: the tree that is bound, or those that are overlaid.
fn paths_of(mount: &Mount) -> Vec<String> {
    let options = mount.options.iter().filter_map(|option| option.split_once('='));
    let all = options.flat_map(|(_, value)| value.split(':')).chain([mount.source.as_str()]);
    all.filter(|path| path.starts_with('/')).map(str::to_owned).collect()
}

fn names(node: &Node, directory: &str) -> Result<BTreeSet<String>> {
    let entries = fs::read_dir(node.path(STATE).join(directory)).context(directory.to_owned())?;
    entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
}

/// The three agree, and the daemon finds nothing wrong with what it keeps. Returns how many
/// snapshots containerd does not know: of calls that were cut short; its garbage collection has
/// them removed.
///
/// Caller: no client works on snapshots or volumes meanwhile.
pub(crate) fn agrees(node: &Node) -> Result<usize> {
    let mut outcome = look(node);
    for _ in 0..LOOKS_MAX {
        if outcome.is_ok() {
            break;
        }
        std::thread::sleep(Duration::from_millis(500));
        outcome = look(node);
    }
    outcome
}

fn look(node: &Node) -> Result<usize> {
    let known = known(node)?;
    let mut directories = names(node, "snapshots/fs")?;
    // Those that were made in advance.
    directories.remove(".spare");
    ensure!(known.len() == directories.len(), "{} snapshots have {directories:?}", known.len());
    for (info, paths) in &known {
        for path in paths {
            ensure!(node.path(path).is_dir(), "{path} of {} is missing", info.name);
        }
    }
    let listed = node.ok(&["ctr", "snapshots", "--snapshotter", "godwit", "ls"])?;
    let listed: Vec<_> = listed.lines().skip(1).filter_map(|line| line.split(' ').next()).collect();
    for name in &listed {
        // containerd's own names are NAMESPACE/NUMBER/NAME.
        let is_known = known.iter().any(|(info, _)| info.name.splitn(3, '/').nth(2) == Some(name));
        ensure!(is_known, "containerd lists {name}, which the daemon does not know");
    }
    volumes_agree(node)?;
    let report: Value = serde_json::from_str(&node.ok(&["godwit", "--output", "json", "check"])?)?;
    ensure!(report["layers"] == known.len(), "{} snapshots: {report}", known.len());
    Ok(known.len() - listed.len())
}

/// The daemon lists the volumes that are on the disk, and nothing else lies there.
pub(crate) fn volumes_agree(node: &Node) -> Result<()> {
    let listed: Value =
        serde_json::from_str(&node.ok(&["godwit", "--output", "json", "volume", "ls"])?)?;
    let ids = listed.as_array().context("a list")?.iter().filter_map(|one| one["id"].as_str());
    let listed: BTreeSet<String> =
        ids.map(|id| id.trim_start_matches("sha256:").to_owned()).collect();
    let mut there: BTreeSet<String> = names(node, "content")?
        .iter()
        .map(|name| name.strip_suffix(".kept").unwrap_or(name).to_owned())
        .collect();
    for name in names(node, "volumes")? {
        let parts = names(node, &format!("volumes/{name}"))?;
        ensure!(parts == BTreeSet::from(["data".to_owned()]), "volume {name} has {parts:?}");
        there.insert(name);
    }
    ensure!(listed == there, "volumes {listed:?} are listed, {there:?} are there");
    let trash = names(node, "trash")?;
    ensure!(trash.is_empty(), "in the trash: {trash:?}");
    Ok(())
}

/// Has containerd collect garbage now. It looks at a snapshotter only if something of it was
/// removed.
pub(crate) fn collect_garbage(node: &Node) -> Result<()> {
    node.sh("ctr snapshots --snapshotter godwit prepare to-be-removed > /dev/null
         ctr snapshots --snapshotter godwit rm to-be-removed
         ctr content prune references")
        .map(drop)
}

/// Everything that the node holds of images, snapshots, volumes and containers.
pub(crate) fn held(node: &Node) -> Result<Held> {
    let mut held: Held =
        known(node)?.into_iter().map(|(info, _)| format!("snapshot {}", info.name)).collect();
    let text = node.sh(
        "ls /var/lib/godwit/snapshots/fs | sed 's/^/directory /'
         ctr snapshots --snapshotter godwit ls | sed 's/ .*//; s/^/listed /'
         cut -d' ' -f2 /proc/mounts | sed 's/^/mount /'
         cat /sys/block/loop*/loop/backing_file 2> /dev/null | grep volumes/steady-block/ | sed 's/^/loop /' || :
         ctr leases ls -q | sed 's/^/lease /'
         ctr content ls -q | sed 's/^/blob /'
         ctr containers ls -q | sed 's/^/container /'
         godwit volume ls | sed 's/^/volume /'
         ls /var/lib/godwit/volumes /var/lib/godwit/content /var/lib/godwit/trash | sed 's/^/file /'
         ls /run/godwit-volumes/* 2> /dev/null | sed 's/^/file /'",
    )?;
    held.extend(text.lines().map(str::to_owned));
    Ok(held)
}
