//! Open files, locks and mappings of kinds that CRIU cannot dump.
//!
//! The rules name what CRIU 4.2 dumps and take everything else as an obstacle (`dump_one_file` in
//! `criu/files.c`), so a kind of file that a newer kernel brings is found too. Sockets are in
//! [`super::sockets`].

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};

use nix::sys::stat::{major, minor};

use super::process::OpenFile;
use super::{Container, Findings, Process};

/// Anonymous inodes that CRIU dumps, by their links.
const ANONYMOUS: &[&str] =
    &["[eventfd]", "[eventpoll]", "inotify", "[fanotify]", "[signalfd]", "[timerfd]", "[pidfd]"];

/// A kind of file that CRIU does not dump.
struct Undumped {
    /// Part of its link.
    part: &'static str,
    name: &'static str,
    cure: &'static str,
}

const UNDUMPED: &[Undumped] = &[
    Undumped {
        part: "[io_uring]",
        name: "an io_uring",
        cure: "start it under a seccomp profile that answers io_uring_setup with ENOSYS",
    },
    Undumped {
        part: "secretmem",
        name: "memory of memfd_secret",
        cure: "start it without memfd_secret, by its own options or a seccomp profile",
    },
    Undumped {
        part: "[userfaultfd]",
        name: "a userfaultfd",
        cure: "start it without userfaultfd, by its own options or a seccomp profile",
    },
    Undumped {
        part: "bpf",
        name: "a BPF object",
        cure: "have it close the object, or load it from outside the container",
    },
    Undumped { part: "[perf_event]", name: "a perf event", cure: "end the profiler in it" },
    Undumped {
        part: "landlock",
        name: "a Landlock rule set",
        cure: "have it close the rule set once it has restricted itself",
    },
    Undumped {
        part: "seccomp notify",
        name: "a seccomp listener",
        cure: "end the supervisor in it",
    },
];

/// Devices whose open files CRIU dumps: those of memory such as `/dev/null`, terminals, tun and
/// autofs.
const MAJORS: &[u64] = &[1, 4, 5, 136, 137, 138, 139, 140, 141, 142, 143];
const MAJOR_MISC: u64 = 10;
const MINORS_MISC: &[u64] = &[200, 235];

/// Prefixes of the links of files on the kernel's own mounts of memory file systems, which CRIU
/// knows by other means. Devices are looked at by their numbers.
const MEMORY: &[&str] =
    &["/dev/", "/memfd:", "/SYSV", "/dev/zero (", "/[aio]", "/secretmem", "/anon_hugepage"];

/// Magic number of the file system of POSIX message queues.
const MESSAGE_QUEUES: u64 = 0x1980_0202;

/// Files that are no regular file, directory, pipe or socket.
pub(super) fn special(container: &Container, found: &mut Findings) {
    for process in container.inside() {
        for file in &process.files {
            let target = file.target.to_string_lossy();
            if let Some(kind) = target.strip_prefix("anon_inode:") {
                if !ANONYMOUS.contains(&kind) {
                    undumped(process, &format!("descriptor {}", file.number), kind, found);
                }
            } else if target.starts_with("/secretmem") {
                undumped(process, &format!("descriptor {}", file.number), &target, found);
            } else if target.starts_with("/dev/") {
                device(process, file, found);
            }
        }
    }
}

/// Mappings of such files, whose descriptors may be closed, and of huge pages.
pub(super) fn mappings(container: &Container, found: &mut Findings) {
    for process in container.inside() {
        for mapping in &process.mappings {
            if process.files.iter().any(|file| file.target.as_os_str() == mapping.path.as_str()) {
                // The descriptor has been found.
                continue;
            }
            let place = format!("mapped at {:x}", mapping.range.start);
            if let Some(kind) = mapping.path.strip_prefix("anon_inode:") {
                undumped(process, &place, kind, found);
            } else if mapping.path.starts_with("/secretmem") {
                undumped(process, &place, &mapping.path, found);
            } else if mapping.path.starts_with("/anon_hugepage") {
                found.obstacle(
                    format!("{} has huge pages {place}", process.named()),
                    "memory of hugetlbfs is not moved",
                    "start it without MAP_HUGETLB; transparent huge pages move",
                );
            }
        }
    }
}

fn undumped(process: &Process, place: &str, kind: &str, found: &mut Findings) {
    let known = UNDUMPED.iter().find(|undumped| kind.contains(undumped.part));
    let (name, cure) = match known {
        Some(undumped) => (undumped.name.to_owned(), undumped.cure),
        None => (format!("a file of the kind {kind}"), "have it close the file"),
    };
    let what = format!("{} holds {name} ({place})", process.named());
    found.obstacle(what, "CRIU cannot dump it", cure);
}

fn device(process: &Process, file: &OpenFile, found: &mut Findings) {
    let Ok(metadata) = fs::metadata(file.link()) else { return };
    let (kind, number) = (metadata.file_type(), metadata.rdev());
    let is_known = MAJORS.contains(&major(number))
        || (major(number) == MAJOR_MISC && MINORS_MISC.contains(&minor(number)));
    if kind.is_block_device() || (kind.is_char_device() && !is_known) {
        let (path, number) = (file.target.display(), file.number);
        found.obstacle(
            format!("{} has the device {path} open (descriptor {number})", process.named()),
            "the state of a device does not move",
            "have it close the device",
        );
    }
}

/// Files on mounts that no process of the container sees: POSIX message queues, and mounts that
/// were detached while a file was open.
pub(super) fn on_hidden_mounts(container: &Container, found: &mut Findings) {
    let mounts = container.processes.iter().flat_map(|process| process.mounts.iter());
    let mounts: HashSet<u64> = mounts.map(|mount| mount.id).collect();
    for process in container.inside() {
        for file in &process.files {
            let target = file.target.to_string_lossy();
            let mount = file.info("mnt_id").and_then(|id| id.parse::<u64>().ok());
            let is_memory = MEMORY.iter().any(|prefix| target.starts_with(prefix));
            if !target.starts_with('/')
                || is_memory
                || mount.is_none_or(|mount| mounts.contains(&mount))
            {
                continue;
            }
            let (name, number) = (process.named(), file.number);
            let magic = rustix::fs::statfs(file.link()).map(|file_system| file_system.f_type);
            if magic.is_ok_and(|magic| u64::try_from(magic) == Ok(MESSAGE_QUEUES)) {
                found.obstacle(
                    format!(
                        "{name} has the POSIX message queue {target} open (descriptor {number})"
                    ),
                    "CRIU cannot dump message queues",
                    "have it close the queue",
                );
            } else {
                found.obstacle(
                    format!("{name} has {target} open (descriptor {number}), on a mount that the container does not see"),
                    "CRIU cannot find the file",
                    "have it close the file",
                );
            }
        }
    }
}

/// Files that stand for a namespace of which no process of the container is a member.
pub(super) fn foreign_namespaces(container: &Container, found: &mut Findings) {
    let own = container.inside().flat_map(|process| process.namespaces.values());
    let own: HashSet<&str> = own.map(String::as_str).collect();
    for process in container.inside() {
        for file in &process.files {
            let target = file.target.to_string_lossy();
            let kind = target.split_once(":[").map(|(kind, _)| kind);
            let is_namespace = kind.is_some_and(|kind| process.namespaces.contains_key(kind));
            if is_namespace && !own.contains(&*target) {
                let (name, number) = (process.named(), file.number);
                found.obstacle(
                    format!("{name} holds the namespace {target} (descriptor {number})"),
                    "no process of the container is in it, so CRIU does not dump it",
                    "have it close the descriptor",
                );
            }
        }
    }
}

/// POSIX locks on files that their holder has mapped: CRIU's restore closes such a file once, which
/// releases them.
pub(super) fn locks(container: &Container, found: &mut Findings) {
    for process in container.inside() {
        for file in &process.files {
            let is_mapped = process.maps(file);
            // `lock: 1: POSIX  ADVISORY  WRITE 7 fe:01:131 0 EOF`
            let mut locks = file.info.lines().filter_map(|line| line.strip_prefix("lock:"));
            if is_mapped && locks.any(|lock| lock.split_ascii_whitespace().nth(1) == Some("POSIX"))
            {
                let path = file.target.display();
                found.warning(
                    format!("{} holds a POSIX lock on {path}, which it has mapped", process.named()),
                    "the lock is not restored",
                    "let no other process use the file after the move until this one has started again",
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::process::Mapping;
    use super::*;
    use std::path::PathBuf;

    fn container(files: &[(&str, &str)], mapped: &[&str]) -> Container {
        let file = |(number, (target, info)): (u32, &(&str, &str))| OpenFile {
            pid: 1,
            number,
            target: PathBuf::from(target),
            info: (*info).to_owned(),
        };
        let mapping = |path: &&str| Mapping { range: 0x1000..0x2000, path: (*path).to_owned() };
        let process = Process {
            pid: u32::MAX,
            status: "Name:\tserver\nNSpid:\t812\t7\n".to_owned(),
            files: (0..).zip(files).map(file).collect(),
            mappings: mapped.iter().map(mapping).collect(),
            namespaces: [("net".to_owned(), "net:[1]".to_owned())].into(),
            ..Process::default()
        };
        Container { init_pid: u32::MAX, processes: vec![process], ..Container::default() }
    }

    fn obstacles(
        kind: fn(&Container, &mut Findings),
        files: &[(&str, &str)],
        mapped: &[&str],
    ) -> Vec<String> {
        let mut found = Findings::default();
        kind(&container(files, mapped), &mut found);
        [found.obstacles, found.warnings].concat()
    }

    #[test]
    fn what_criu_dumps_is_no_obstacle_and_everything_else_is() {
        let dumped =
            ["anon_inode:[eventfd]", "anon_inode:inotify", "/srv/a", "pipe:[3]", "net:[1]"];
        let dumped = dumped.map(|target| (target, ""));
        for kind in [special, on_hidden_mounts, foreign_namespaces, locks] {
            assert_eq!(obstacles(kind, &dumped, &["/lib/libc.so"]), [""; 0]);
        }
        let undumped = ["anon_inode:[io_uring]", "/secretmem (deleted)", "anon_inode:[what]"];
        let told = obstacles(special, &undumped.map(|target| (target, "")), &[]);
        assert_eq!(told.len(), 3, "{told:#?}");
        assert!(told[0].starts_with("process 7 (server) holds an io_uring (descriptor 0): "));
        assert!(told[1].contains("memfd_secret") && told[2].contains("of the kind [what]"));
        let told = obstacles(foreign_namespaces, &[("net:[2]", "")], &[]);
        assert!(told[0].contains("holds the namespace net:[2]"), "{told:?}");
        let told = obstacles(on_hidden_mounts, &[("/srv/a", "pos:\t0\nmnt_id:\t9\n")], &[]);
        assert!(told[0].contains("does not see"), "{told:?}");
    }

    #[test]
    fn a_mapping_is_found_although_its_descriptor_is_closed() {
        let mapped = ["anon_inode:[perf_event]", "/anon_hugepage (deleted)", ""];
        let told = obstacles(mappings, &[], &mapped);
        assert_eq!(told.len(), 2, "{told:#?}");
        assert!(
            told[0].contains("a perf event (mapped at 1000)") && told[1].contains("huge pages")
        );
    }

    #[test]
    fn a_posix_lock_is_warned_of_only_if_its_file_is_mapped() {
        let info =
            |kind: &str| format!("pos:\t0\nlock:\t1: {kind}  ADVISORY  WRITE 7 fe:01:131 0 EOF\n");
        let (posix, flock) = (info("POSIX"), info("FLOCK"));
        let told = obstacles(locks, &[("/data/lock.mdb", &posix)], &["/data/lock.mdb"]);
        assert!(told[0].contains("POSIX lock on /data/lock.mdb"), "{told:?}");
        assert_eq!(obstacles(locks, &[("/data/a", &posix)], &["/data/b"]), [""; 0]);
        assert_eq!(obstacles(locks, &[("/data/a", &flock)], &["/data/a"]), [""; 0]);
    }
}
