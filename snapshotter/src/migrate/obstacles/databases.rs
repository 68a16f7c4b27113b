//! Databases of a container that mind how their files move.
//!
//! A tree, and so the container's own files, is copied file by file, and each file gets another
//! inode number. SQLite compares the number with the one that it saw when it opened the database,
//! and with a rollback journal then refuses to write. A block volume keeps the numbers. With a
//! write-ahead log SQLite holds a lock on a file that it has mapped, and CRIU restores no lock on
//! such a file, whatever volume it is on. What is looked for is what is open now: a database that
//! is closed between two uses does not mind.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use super::process::OpenFile;
use super::{Container, Findings, Process};
use crate::migrate::describe::WritableVolume;

/// First bytes of a SQLite database, and the length of its header up to the version of its format
/// for writing (<https://sqlite.org/fileformat.html>, section 1.3).
const MAGIC: &[u8; 16] = b"SQLite format 3\0";
const HEADER_BYTES: usize = 19;

/// Warns of each SQLite database that a process has open on a volume where it minds, or among the
/// container's own files. Those of other mounts do not move.
pub(super) fn open(container: &Container, found: &mut Findings) {
    for text in warnings(&container.processes, &container.volumes) {
        found.warning(text.what, text.why, text.cure);
    }
}

/// A database that minds.
#[derive(Debug)]
struct Minds {
    what: String,
    why: &'static str,
    cure: &'static str,
}

fn warnings(processes: &[Process], volumes: &[WritableVolume]) -> Vec<Minds> {
    let mut found = BTreeMap::new();
    for process in processes {
        let root = root_mount(process.pid);
        for file in &process.files {
            // As the container has it: its root is another one.
            let path = &file.target;
            let holds = volumes.iter().filter(|volume| path.starts_with(&volume.destination));
            // Volumes may lie in each other.
            let volume = holds.max_by_key(|volume| volume.destination.as_os_str().len());
            // Before anything is asked of the file itself: it may be on a mount that does not
            // answer.
            if volume.is_none() && (root.is_none() || mount_of(file) != root) {
                continue;
            }
            let file_system = volume.and_then(|volume| volume.file_system);
            let (why, cure) = match (format_for_writing(&file.link()), file_system) {
                (Some(1), None) => (
                    "its files get new inode numbers, so with its rollback journal it will refuse to write \
                     after the move",
                    "keep it on a block volume (`godwit volume create --kind block`)",
                ),
                (Some(2), _) => (
                    "the lock of its write-ahead log is not restored",
                    "after the move open it in no other process while this one has it open, or this one may die",
                ),
                _ => continue,
            };
            let place = match volume {
                Some(volume) => format!("on volume {}", volume.id),
                None => "among the container's own files".to_owned(),
            };
            let what = format!("SQLite database {} is open {place}", path.display());
            found.insert(path.clone(), Minds { what, why, cure });
        }
    }
    found.into_values().collect()
}

/// The mount that an open file is on (proc_pid_fdinfo(5)).
fn mount_of(file: &OpenFile) -> Option<u64> {
    file.info("mnt_id")?.parse().ok()
}

/// The mount that is a process's root (proc_pid_mountinfo(5)): the last of those that lie on each
/// other.
fn root_mount(pid: u32) -> Option<u64> {
    let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).ok()?;
    let root = mounts.lines().rfind(|line| line.split(' ').nth(4) == Some("/"))?;
    root.split(' ').next()?.parse().ok()
}

/// The version of a SQLite database's format for writing: 1 with a rollback journal, 2 with a
/// write-ahead log.
fn format_for_writing(file: &Path) -> Option<u8> {
    // What is no regular file might block, or do something when it is opened.
    fs::metadata(file).ok().filter(fs::Metadata::is_file)?;
    let file = File::options().read(true).custom_flags(nix::libc::O_NONBLOCK).open(file).ok()?;
    let mut header = Vec::new();
    file.take(HEADER_BYTES as u64).read_to_end(&mut header).ok()?;
    header.strip_prefix(MAGIC).and_then(|rest| rest.get(2)).copied()
}

#[cfg(test)]
mod tests {
    use super::*;
    use godwit_protos::FileSystem;
    use std::os::fd::AsRawFd as _;
    use std::path::PathBuf;

    /// Method: this process has the files open, and its root is the container's.
    #[test]
    fn an_open_sqlite_database_that_minds_is_named_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let volume = |id: &str, file_system| WritableVolume {
            id: id.parse().unwrap(),
            path: PathBuf::from("/nowhere"),
            file_system,
            destination: dir.path().join(id),
        };
        let volumes = [volume("tree", None), volume("block", Some(FileSystem::Ext4))];
        let open = |name: &str, bytes: &[u8]| {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, bytes).unwrap();
            File::open(&path).unwrap()
        };
        let header = |version: u8| [&MAGIC[..], &[0x10, 0, version, version]].concat();
        let _open = [
            open("tree/rollback.db", &header(1)),
            open("tree/wal.db", &header(2)),
            open("tree/short.db", &MAGIC[..]),
            open("tree/text", b"SQLite"),
            open("block/rollback.db", &header(1)),
            open("block/wal.db", &header(2)),
        ];
        let shared = Path::new("/dev/shm");
        let elsewhere = tempfile::Builder::new().tempfile_in(shared).unwrap();
        fs::write(&elsewhere, header(1)).unwrap();
        let own = || Process::read_all(&[std::process::id()]);
        let found = warnings(&own(), &volumes);
        assert_eq!(found.len(), 3, "{found:#?}");
        let says = |minds: &Minds, what: &str, why: &str| {
            assert!(minds.what.contains(what) && minds.why.contains(why), "{minds:?}");
        };
        says(&found[0], "block/wal.db", "lock");
        says(&found[1], "tree/rollback.db", "refuse to write");
        says(&found[2], "tree/wal.db", "lock");
        assert!(warnings(&[], &volumes).is_empty());
        let open = File::open(dir.path()).unwrap();
        let processes = own();
        let number = open.as_raw_fd().cast_unsigned();
        let of = processes[0].files.iter().find(|file| file.number == number).unwrap();
        let is_on_root = mount_of(of).unwrap() == root_mount(std::process::id()).unwrap();
        let own = warnings(&processes, &volumes[1..]);
        assert_eq!(own.len(), if is_on_root { 3 } else { 1 }, "{own:#?}");
        if is_on_root {
            says(&own[1], "tree/rollback.db is open among the container's own files", "");
        }
    }
}
