//! Files that CRIU copies while the container is frozen: those of a tmpfs, and open files whose
//! last name was removed.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use nix::sys::statfs::{TMPFS_MAGIC, statfs};

use super::process::OpenFile;
use super::{Container, Findings};

/// From this size on the user is warned, in bytes.
const WARNED_BYTES: u64 = 32 << 20;

/// What is packed and unpacked of a tmpfs in a second, in bytes: a rough estimate. What did not
/// change since the last round is not sent, and nothing is compressed.
const TMPFS_BYTES_PER_S: u64 = 100 << 20;

/// Largest deleted file that CRIU copies, in bytes; the shim's `ghost-limit`.
const DELETED_BYTES_MAX: u64 = u32::MAX as u64;

const MIB: u64 = 1 << 20;

/// Warns of each tmpfs with so much content that it shows in the downtime.
pub(super) fn tmpfs(container: &Container, found: &mut Findings) {
    let root = format!("/proc/{}/root", container.init_pid);
    for mount in container.spec.mounts().iter().flatten() {
        if mount.typ().as_deref() != Some("tmpfs") {
            continue;
        }
        let inside = mount.destination();
        let path = Path::new(&root).join(inside.strip_prefix("/").unwrap_or(inside));
        let Ok(stat) = statfs(&path) else { continue };
        // Another mount may lie above it.
        if stat.filesystem_type() != TMPFS_MAGIC {
            continue;
        }
        let block = u64::try_from(stat.block_size()).unwrap_or(0);
        let bytes = stat.blocks().saturating_sub(stat.blocks_free()).saturating_mul(block);
        if bytes >= WARNED_BYTES {
            found.warning(
                format!("tmpfs {} holds {} MiB", inside.display(), bytes / MIB),
                format!(
                    "they are packed and unpacked while the container is frozen, which takes \
                     about {} ms; only changes are sent then",
                    bytes.saturating_mul(1000) / TMPFS_BYTES_PER_S
                ),
                "keep them on a volume to have them laid out beforehand",
            );
        }
    }
}

/// Refuses open files without a name that are larger than CRIU copies, and warns of large ones.
pub(super) fn deleted(container: &Container, found: &mut Findings) {
    let files = container.processes.iter().flat_map(|process| {
        process.files.iter().filter_map(move |file| Some((process, file, deleted_bytes(file)?)))
    });
    for (process, file, bytes) in files {
        let name = file.target.display();
        let what = format!("open file {name} of {} has {} MiB", process.named(), bytes / MIB);
        if bytes > DELETED_BYTES_MAX {
            found.obstacle(
                what,
                "CRIU copies a file without a name only up to 4 GiB",
                "have the process close it or keep its name",
            );
        } else if bytes >= WARNED_BYTES {
            found.warning(
                what,
                "it has no name, so it is copied while the container is frozen",
                "keep its name to have it copied beforehand",
            );
        }
    }
}

/// Bytes on disk of an open regular file without a name; `None` for any other. Memory files are
/// dumped as memory.
fn deleted_bytes(file: &OpenFile) -> Option<u64> {
    let target = file.target.to_string_lossy();
    if !target.ends_with(" (deleted)") || target.starts_with("/memfd:") {
        return None;
    }
    let metadata = fs::metadata(file.link()).ok()?;
    (metadata.is_file() && metadata.nlink() == 0).then(|| metadata.blocks().saturating_mul(512))
}

#[cfg(test)]
mod tests {
    use super::super::Process;
    use super::*;
    use std::fs::File;

    /// Method: this process, with a sparse and a full file without names.
    #[test]
    fn only_what_a_deleted_file_has_on_disk_counts() {
        let dir = tempfile::tempdir().unwrap();
        let open = |name: &str| {
            let file = File::create_new(dir.path().join(name)).unwrap();
            fs::remove_file(dir.path().join(name)).unwrap();
            file
        };
        let (sparse, full) = (open("sparse"), open("full"));
        sparse.set_len(DELETED_BYTES_MAX * 2).unwrap();
        nix::fcntl::fallocate(&full, nix::fcntl::FallocateFlags::empty(), 0, 40 << 20).unwrap();
        let container = Container {
            spec: oci_spec::runtime::Spec::default(),
            init_pid: std::process::id(),
            volumes: Vec::new(),
            execs: Vec::new(),
            processes: Process::read_all(&[std::process::id()]),
        };
        let mut found = Findings::default();
        deleted(&container, &mut found);
        let of = |name: &str| found.warnings.iter().filter(|text| text.contains(name)).count();
        assert_eq!((of("/full (deleted)"), of("/sparse (deleted)")), (1, 0), "{found:?}");
        assert_eq!(found.obstacles, [""; 0]);
    }
}
