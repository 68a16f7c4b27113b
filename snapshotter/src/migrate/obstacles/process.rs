//! What `/proc` says of one process, read once for all kinds.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

/// What is read of one container at most.
pub(super) struct Limits;

impl Limits {
    /// Processes.
    pub(super) const PROCESSES: usize = 4096;
    /// Open files of one process.
    pub(super) const FILES: usize = 4096;
    /// Bytes of one file below `/proc`: some 160 000 mappings.
    pub(super) const BYTES: u64 = 16 << 20;
}

/// A process of the container.
#[derive(Debug, Default)]
pub(in crate::migrate) struct Process {
    /// Its number in the daemon's process id namespace.
    pub(in crate::migrate) pid: u32,
    /// `/proc/PID/status`.
    pub(super) status: String,
    /// Its open files.
    pub(in crate::migrate) files: Vec<OpenFile>,
    /// Its memory mappings.
    pub(in crate::migrate) mappings: Vec<Mapping>,
    /// Its namespaces by their names below `/proc/PID/ns`: `net` is in `net:[4026531840]`.
    pub(in crate::migrate) namespaces: BTreeMap<String, String>,
    /// The mounts that it sees; processes of one mount namespace share the list.
    pub(in crate::migrate) mounts: Arc<Vec<Mount>>,
}

/// An open file of a process.
#[derive(Debug, Default)]
pub(in crate::migrate) struct OpenFile {
    /// The process that has it.
    pub(in crate::migrate) pid: u32,
    /// The descriptor.
    pub(in crate::migrate) number: u32,
    /// What `/proc/PID/fd/N` points to: a path inside the container, or such as `socket:[7]`.
    pub(in crate::migrate) target: PathBuf,
    /// `/proc/PID/fdinfo/N` (proc_pid_fdinfo(5)).
    pub(in crate::migrate) info: String,
}

/// A line of `/proc/PID/maps`.
#[derive(Debug, Default)]
pub(in crate::migrate) struct Mapping {
    /// Addresses.
    pub(in crate::migrate) range: Range<u64>,
    /// The file, or such as `[heap]`; may be empty.
    pub(in crate::migrate) path: String,
}

/// A line of `/proc/PID/mountinfo` (proc_pid_mountinfo(5)).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in crate::migrate) struct Mount {
    /// Its number, as `mnt_id` of a file tells it.
    pub(in crate::migrate) id: u64,
    /// The directory of its file system that is mounted; ends in `//deleted` once that is removed.
    pub(in crate::migrate) root: String,
    /// Where the process sees it.
    pub(in crate::migrate) point: PathBuf,
}

impl Process {
    /// Reads the processes `pids` up to the limits; those that have ended are left out.
    pub(in crate::migrate) fn read_all(pids: &[u32]) -> Vec<Self> {
        let mut seen = HashMap::new();
        let pids = pids.iter().take(Limits::PROCESSES);
        pids.filter_map(|pid| Self::read(*pid, &mut seen)).collect()
    }

    /// `seen` has the mounts by the link of the namespace.
    fn read(pid: u32, seen: &mut HashMap<String, Arc<Vec<Mount>>>) -> Option<Self> {
        let status = read(&format!("/proc/{pid}/status"))?;
        let maps = read(&format!("/proc/{pid}/maps")).unwrap_or_default();
        let namespaces = namespaces(pid);
        let mounts = seen.entry(namespaces.get("mnt").cloned().unwrap_or_default());
        let mounts = mounts.or_insert_with(|| Arc::new(mounts_of(pid))).clone();
        Some(Self {
            pid,
            status,
            files: files(pid),
            mappings: maps.lines().filter_map(Mapping::parse).collect(),
            namespaces,
            mounts,
        })
    }

    /// A field of `/proc/PID/status` (proc_pid_status(5)), without blanks around it.
    pub(in crate::migrate) fn status(&self, field: &str) -> Option<&str> {
        field_of(&self.status, field)
    }

    /// Its numbers in the process id namespaces from the daemon's inwards.
    pub(in crate::migrate) fn numbers(&self) -> Vec<u32> {
        let numbers = self.status("NSpid").unwrap_or_default().split_ascii_whitespace();
        numbers.filter_map(|number| number.parse().ok()).collect()
    }

    /// Its number in its own process id namespace.
    pub(in crate::migrate) fn inner_pid(&self) -> u32 {
        self.numbers().last().copied().unwrap_or(self.pid)
    }

    /// Its parent, by its number in the daemon's process id namespace; 0 for one outside of that.
    pub(in crate::migrate) fn parent(&self) -> u32 {
        self.status("PPid").and_then(|pid| pid.parse().ok()).unwrap_or(0)
    }

    /// Whether it has mapped this file of its own.
    pub(in crate::migrate) fn maps(&self, file: &OpenFile) -> bool {
        let target = file.target.as_os_str();
        self.mappings.iter().any(|mapping| target == mapping.path.as_str())
    }

    /// How messages name it: `process 7 (redis-server)`, by its number in the container.
    pub(in crate::migrate) fn named(&self) -> String {
        let printable = |c: char| if c.is_control() { '?' } else { c };
        let name: String = self.status("Name").unwrap_or("?").chars().map(printable).collect();
        format!("process {} ({name})", self.inner_pid())
    }
}

impl OpenFile {
    /// `/proc/PID/fd/N`, through which the file itself can be looked at.
    pub(in crate::migrate) fn link(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd/{}", self.pid, self.number))
    }

    /// A field of its `fdinfo`.
    pub(in crate::migrate) fn info(&self, field: &str) -> Option<&str> {
        field_of(&self.info, field)
    }

    /// Whether it is a socket.
    pub(in crate::migrate) fn is_socket(&self) -> bool {
        self.target.to_string_lossy().starts_with("socket:[")
    }

    /// The same open file as a descriptor of ours (pidfd_getfd(2)), for what `/proc` does not tell.
    /// Keep it no longer than a look takes: while it is open, a close by the process closes
    /// nothing.
    ///
    /// Errors: the process has closed it, or has ended.
    pub(in crate::migrate) fn duplicate(&self) -> io::Result<OwnedFd> {
        let numbers = (i32::try_from(self.pid), i32::try_from(self.number));
        let (Ok(pid), Ok(number)) = numbers else { return Err(io::ErrorKind::NotFound.into()) };
        let pid = Pid::from_raw(pid).ok_or(io::ErrorKind::NotFound)?;
        let process = pidfd_open(pid, PidfdFlags::empty())?;
        Ok(pidfd_getfd(process, number, PidfdGetfdFlags::empty())?)
    }
}

impl Mapping {
    /// `55d0-55d1 rw-p 00001000 fe:00 131 /bin/sh`.
    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.splitn(6, ' ');
        let (begin, end) = fields.next()?.split_once('-')?;
        let hexadecimal = |text: &str| u64::from_str_radix(text, 16).ok();
        Some(Self {
            range: hexadecimal(begin)?..hexadecimal(end)?,
            // Permissions, offset, device and inode are skipped.
            path: fields.nth(4).unwrap_or_default().trim_start().to_owned(),
        })
    }
}

impl Mount {
    /// `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue`.
    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.split(' ');
        let id = fields.next()?.parse().ok()?;
        let root = unescaped(fields.nth(2)?);
        Some(Self { id, root, point: unescaped(fields.next()?).into() })
    }
}

/// Blanks and backslashes stand as `\040` in `mountinfo`.
fn unescaped(text: &str) -> String {
    let mut parts = text.split('\\');
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let byte = part.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match byte {
            Some(byte) => {
                plain.push(char::from(byte));
                plain.push_str(&part[3..]);
            }
            None => plain.push_str(part),
        }
    }
    plain
}

fn files(pid: u32) -> Vec<OpenFile> {
    let listed = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let numbers = listed.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let file = |number: u32| {
        let target = fs::read_link(format!("/proc/{pid}/fd/{number}")).ok()?;
        let info = read(&format!("/proc/{pid}/fdinfo/{number}")).unwrap_or_default();
        Some(OpenFile { pid, number, target, info })
    };
    numbers.take(Limits::FILES).filter_map(file).collect()
}

fn namespaces(pid: u32) -> BTreeMap<String, String> {
    let listed = fs::read_dir(format!("/proc/{pid}/ns")).into_iter().flatten().flatten();
    let namespace = |entry: fs::DirEntry| {
        let link = fs::read_link(entry.path()).ok()?;
        Some((entry.file_name().into_string().ok()?, link.into_os_string().into_string().ok()?))
    };
    listed.filter_map(namespace).collect()
}

fn mounts_of(pid: u32) -> Vec<Mount> {
    let mounts = read(&format!("/proc/{pid}/mountinfo")).unwrap_or_default();
    mounts.lines().filter_map(Mount::parse).collect()
}

fn field_of<'a>(text: &'a str, field: &str) -> Option<&'a str> {
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    Some(line.trim())
}

/// At most [`Limits::BYTES`] of a file that may not be valid UTF-8.
fn read(path: &str) -> Option<String> {
    let mut bytes = Vec::new();
    File::open(path).ok()?.take(Limits::BYTES).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd as _;

    #[test]
    fn a_line_of_maps_is_read_whole() {
        let line = "7f00a000-7f00c000 rw-s 00001000 fe:01 131                 /data/a b (deleted)";
        let mapping = Mapping::parse(line).unwrap();
        assert_eq!(mapping.range, 0x7f00_a000..0x7f00_c000);
        assert_eq!(mapping.path, "/data/a b (deleted)");
        assert_eq!(Mapping::parse("1000-2000 ---p 0 00:00 0 ").unwrap().path, "");
        assert!(Mapping::parse("nonsense").is_none());
    }

    #[test]
    fn a_line_of_mountinfo_is_read_with_its_blanks() {
        let line = r"36 35 98:0 /a\040b//deleted /mnt\0112 rw master:1 - ext3 /dev/root rw";
        let mount = Mount::parse(line).unwrap();
        let (root, point) = ("/a b//deleted".to_owned(), "/mnt\t2".into());
        assert_eq!(mount, Mount { id: 36, root, point });
        assert_eq!(unescaped(r"\9\\"), "9");
    }

    #[test]
    fn a_process_is_read_once_and_an_ended_one_is_left_out() {
        let file = tempfile::tempfile().unwrap();
        let read = Process::read_all(&[std::process::id(), u32::MAX]);
        let [process] = &read[..] else { panic!("{} processes", read.len()) };
        assert_eq!((process.pid, process.inner_pid()), (std::process::id(), std::process::id()));
        assert!(process.named().starts_with(&format!("process {} (", process.inner_pid())));
        let number = file.as_raw_fd().cast_unsigned();
        let open = process.files.iter().find(|open| open.number == number).unwrap();
        assert_eq!(open.info("pos"), Some("0"));
        assert_eq!(fs::read_link(open.link()).unwrap(), open.target);
        let same = File::from(open.duplicate().unwrap());
        let inode = |file: &File| std::os::unix::fs::MetadataExt::ino(&file.metadata().unwrap());
        assert_eq!(inode(&same), inode(&file));
        assert!(process.mappings.iter().any(|mapping| mapping.path == "[stack]"));
        assert!(process.namespaces["net"].starts_with("net:["));
        assert!(process.mounts.iter().any(|mount| mount.point == std::path::Path::new("/")));
    }
}
