//! What `/proc` says of one process, read once for all kinds.

use std::fs::{self, File};
use std::io::Read as _;
use std::ops::Range;
use std::path::PathBuf;

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
    status: String,
    /// Its open files.
    pub(in crate::migrate) files: Vec<OpenFile>,
    /// Its memory mappings.
    pub(in crate::migrate) mappings: Vec<Mapping>,
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
#[allow(dead_code, reason = "kinds look at some of it")]
pub(in crate::migrate) struct Mapping {
    /// Addresses.
    pub(in crate::migrate) range: Range<u64>,
    /// Such as `rw-s`.
    pub(in crate::migrate) permissions: String,
    /// Offset in the file, in bytes.
    pub(in crate::migrate) offset: u64,
    /// Inode of the file, 0 if it has none.
    pub(in crate::migrate) inode: u64,
    /// The file, or such as `[heap]`; may be empty.
    pub(in crate::migrate) path: String,
}

impl Process {
    /// Reads the processes `pids` up to the limits; those that have ended are left out.
    pub(in crate::migrate) fn read_all(pids: &[u32]) -> Vec<Self> {
        pids.iter().take(Limits::PROCESSES).filter_map(|pid| Self::read(*pid)).collect()
    }

    fn read(pid: u32) -> Option<Self> {
        let status = read(&format!("/proc/{pid}/status"))?;
        let maps = read(&format!("/proc/{pid}/maps")).unwrap_or_default();
        Some(Self {
            pid,
            status,
            files: files(pid),
            mappings: maps.lines().filter_map(Mapping::parse).collect(),
        })
    }

    /// A field of `/proc/PID/status` (proc_pid_status(5)), without blanks around it.
    pub(in crate::migrate) fn status(&self, field: &str) -> Option<&str> {
        field_of(&self.status, field)
    }

    /// Its number in the container: the last one of `NSpid`.
    pub(in crate::migrate) fn inner_pid(&self) -> u32 {
        let last = self.status("NSpid").and_then(|pids| pids.split_ascii_whitespace().last());
        last.and_then(|pid| pid.parse().ok()).unwrap_or(self.pid)
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
}

impl Mapping {
    /// `55d0-55d1 rw-p 00001000 fe:00 131 /bin/sh`.
    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.splitn(6, ' ');
        let mut next = || fields.next();
        let (begin, end) = next()?.split_once('-')?;
        let hexadecimal = |text: &str| u64::from_str_radix(text, 16).ok();
        Some(Self {
            range: hexadecimal(begin)?..hexadecimal(end)?,
            permissions: next()?.to_owned(),
            offset: hexadecimal(next()?)?,
            // The device is skipped.
            inode: next().and_then(|_| next())?.parse().ok()?,
            path: next().unwrap_or_default().trim_start().to_owned(),
        })
    }
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
        assert_eq!((mapping.range, mapping.offset), (0x7f00_a000..0x7f00_c000, 0x1000));
        assert_eq!((mapping.permissions.as_str(), mapping.inode), ("rw-s", 131));
        assert_eq!(mapping.path, "/data/a b (deleted)");
        assert_eq!(Mapping::parse("1000-2000 ---p 0 00:00 0 ").unwrap().path, "");
        assert!(Mapping::parse("nonsense").is_none());
    }

    #[test]
    fn a_process_is_read_once_and_an_ended_one_is_left_out() {
        let file = tempfile::tempfile().unwrap();
        let read = Process::read_all(&[std::process::id(), u32::MAX]);
        let [process] = &read[..] else { panic!("{} processes", read.len()) };
        assert_eq!(process.pid, std::process::id());
        assert!(process.named().starts_with(&format!("process {} (", process.inner_pid())));
        let number = file.as_raw_fd().cast_unsigned();
        let open = process.files.iter().find(|open| open.number == number).unwrap();
        assert_eq!(open.info("pos"), Some("0"));
        assert_eq!(fs::read_link(open.link()).unwrap(), open.target);
        assert!(process.mappings.iter().any(|mapping| mapping.path == "[stack]"));
    }
}
