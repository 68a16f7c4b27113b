//! A container's limits while it is restored.
//!
//! The runtime sets the limits of the specification before CRIU begins, and puts CRIU under them. A
//! restore needs more than the container does: CRIU's own memory and processes count, and so does
//! what it reads. A container near its limit would be killed before it runs.
//!
//! 1. At `pre-restore`, before CRIU makes a task, the shim notes every limit and lifts it
//!    ([`Raised`]).
//! 2. When all tasks are complete and held, it puts them back ([`Raised::put_back`]): before the
//!    claim, so that a container which does not fit is refused while its source can still run it.
//! 3. CRIU's memory counts until CRIU ends. If only that stands in the way, the limit is put back
//!    larger by as much, and exactly once CRIU has ended ([`Raised::put_back_exactly`]).
//!
//! A limit of version 2 is not set below what is used, since the kernel would kill a task for it;
//! it reclaims first, by `memory.high`. One of version 1 cannot be set below.
//!
//! Limits of groups above the container's, a pod's for example, are not the container's to lift.

use std::io;
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use crate::cgroup::Cgroup;

/// What CRIU and its script use beside the memory of their own that `/proc` tells: page tables and
/// what else the kernel keeps for them.
const KERNEL_BYTES_OF_CRIU: u64 = 4 << 20;

/// Limits of version 1: controller, file, no limit. A limit that another may not exceed comes
/// later.
const FILES_V1: [(&str, &str, &str); 6] = [
    ("memory", "memory.memsw.limit_in_bytes", "-1"),
    ("memory", MEMORY_V1, "-1"),
    ("memory", "memory.kmem.limit_in_bytes", "-1"),
    ("memory", "memory.kmem.tcp.limit_in_bytes", "-1"),
    ("pids", "pids.max", "max"),
    ("cpu", "cpu.cfs_quota_us", "-1"),
];
/// The same of version 2.
const FILES_V2: [(&str, &str, &str); 5] = [
    ("memory", HIGH_V2, "max"),
    ("memory", "memory.swap.max", "max"),
    ("memory", MEMORY_V2, "max"),
    ("pids", "pids.max", "max"),
    ("cpu", "cpu.max", "max"),
];
const MEMORY_V1: &str = "memory.limit_in_bytes";
const MEMORY_V2: &str = "memory.max";
const HIGH_V2: &str = "memory.high";

/// Why a limit cannot be put back.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LimitError {
    #[error(
        "its tasks need {usage} bytes of memory here, and its limit ({file}) is {limit}: raise the limit"
    )]
    Exceeded { file: &'static str, usage: u64, limit: u64 },
    #[error("cannot put its limit {value} back into {path}: {source}")]
    Io { path: PathBuf, value: String, source: io::Error },
}

impl LimitError {
    /// Whether the kernel refused with this.
    fn is(&self, errno: Errno) -> bool {
        matches!(self, Self::Io { source, .. } if source.raw_os_error() == Some(errno as i32))
    }
}

/// One limit as the runtime had set it.
#[derive(Debug)]
struct Limit {
    path: PathBuf,
    value: String,
}

/// The limits of a container that is being restored, lifted.
#[derive(Debug)]
pub(crate) struct Raised {
    cgroup: Cgroup,
    criu: u32,
    limits: Vec<Limit>,
    /// The memory limit that was put back too large, and what cannot be smaller than it.
    inexact: Vec<Limit>,
}

impl Raised {
    /// Lifts the limits of the groups that `script`, a child of CRIU, is in.
    ///
    /// Errors: the process is gone; the groups are this shim's own, or no groups at all.
    pub(crate) fn raise(script: u32) -> io::Result<Self> {
        let cgroup = Cgroup::of(script)?;
        let ours = Cgroup::of(std::process::id())?;
        if ["memory", "pids"].iter().any(|name| cgroup.dir(name) == ours.dir(name)) {
            return Err(io::Error::other("CRIU runs in the shim's own control group"));
        }
        let mut limits = Vec::new();
        for (path, unlimited) in files(&cgroup) {
            // A controller or a file that this kernel lacks limits nothing.
            let Ok(value) = std::fs::read_to_string(&path) else { continue };
            let value = value.trim().to_owned();
            if is_unlimited(&value) || std::fs::write(&path, unlimited).is_err() {
                continue;
            }
            limits.push(Limit { path, value });
        }
        Ok(Self { cgroup, criu: parent_of(script).unwrap_or(script), limits, inexact: Vec::new() })
    }

    /// Puts the limits back while every task is complete and held.
    ///
    /// Errors: [`LimitError::Exceeded`] when the tasks do not fit, and then the limit stays lifted.
    pub(crate) fn put_back(&mut self) -> Result<(), LimitError> {
        // The last lifted first: a limit on memory before one on memory and swap.
        while let Some(limit) = self.limits.pop() {
            let Some(file) = memory_file(&limit.path) else {
                match write(&limit.path, &limit.value) {
                    // A limit on memory and swap below the one on memory.
                    Err(error) if error.is(Errno::EINVAL) && !self.inexact.is_empty() => {
                        self.inexact.push(limit);
                    }
                    written => written?,
                }
                continue;
            };
            let bytes = limit.value.parse().unwrap_or(u64::MAX);
            if set_memory(&limit.path, bytes)? {
                continue;
            }
            let (usage, of_criu) = (self.memory_in_use(), memory_of(self.criu));
            let larger = bytes.saturating_add(of_criu);
            if !set_memory(&limit.path, larger)? {
                return Err(LimitError::Exceeded { file, usage, limit: bytes });
            }
            self.inexact.push(limit);
        }
        Ok(())
    }

    /// Makes the limits exact that CRIU's own memory stood in the way of; CRIU has ended.
    ///
    /// Errors: the kernel's; the limit is larger than it should be then.
    pub(crate) fn put_back_exactly(&mut self) -> Result<(), LimitError> {
        for limit in std::mem::take(&mut self.inexact) {
            let Some(file) = memory_file(&limit.path) else {
                write(&limit.path, &limit.value)?;
                continue;
            };
            let bytes = limit.value.parse().unwrap_or(u64::MAX);
            if !set_memory(&limit.path, bytes)? {
                let usage = self.memory_in_use();
                return Err(LimitError::Exceeded { file, usage, limit: bytes });
            }
        }
        Ok(())
    }

    /// Tasks that the kernel OOM-killed in the container's group.
    pub(crate) fn oom_kills(&self) -> u64 {
        self.cgroup.oom_kills()
    }

    fn memory_in_use(&self) -> u64 {
        let file = match self.cgroup {
            Cgroup::V1(_) => "memory.usage_in_bytes",
            Cgroup::V2(_) => "memory.current",
        };
        self.cgroup.dir("memory").and_then(|dir| number_in(&dir.join(file))).unwrap_or(0)
    }
}

/// Every file with a limit, and the word for none.
fn files(cgroup: &Cgroup) -> Vec<(PathBuf, &'static str)> {
    let (known, huge_file, unlimited) = match cgroup {
        Cgroup::V1(_) => (&FILES_V1[..], ".limit_in_bytes", "-1"),
        Cgroup::V2(_) => (&FILES_V2[..], ".max", "max"),
    };
    let mut files = Vec::new();
    for (controller, file, unlimited) in known {
        files.extend(cgroup.dir(controller).map(|dir| (dir.join(file), *unlimited)));
    }
    // One for each size of huge pages.
    let dir = cgroup.dir("hugetlb").map(std::fs::read_dir);
    for entry in dir.into_iter().flatten().flatten().flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with("hugetlb.") && name.ends_with(huge_file) {
            files.push((entry.path(), unlimited));
        }
    }
    files
}

/// The kernel's name of a memory limit that usage may stand in the way of.
fn memory_file(path: &Path) -> Option<&'static str> {
    [MEMORY_V1, MEMORY_V2].into_iter().find(|file| path.ends_with(file))
}

/// Version 1 has a number just below 2^63 for "none", as -1 it reads from the CPU's quota.
fn is_unlimited(value: &str) -> bool {
    const NONE_V1: u64 = 1 << 62;
    value == "-1" || value.starts_with("max") || value.parse().is_ok_and(|it: u64| it >= NONE_V1)
}

/// Sets a memory limit if what is used fits after the kernel has reclaimed what it can.
fn set_memory(path: &Path, bytes: u64) -> Result<bool, LimitError> {
    let text = bytes.to_string();
    if path.ends_with(MEMORY_V2) {
        // Its own value is put back after this one.
        write(&path.with_file_name(HIGH_V2), &text)?;
        if number_in(&path.with_file_name("memory.current")).is_some_and(|used| used > bytes) {
            write(&path.with_file_name(HIGH_V2), "max")?;
            return Ok(false);
        }
        write(path, &text)?;
        write(&path.with_file_name(HIGH_V2), "max")?;
        return Ok(true);
    }
    match write(path, &text) {
        Err(error) if error.is(Errno::EBUSY) => Ok(false),
        written => written.map(|()| true),
    }
}

fn write(path: &Path, value: &str) -> Result<(), LimitError> {
    let (path, value) = (path.to_owned(), value.to_owned());
    std::fs::write(&path, &value).map_err(|source| LimitError::Io { path, value, source })
}

fn number_in(path: &Path) -> Option<u64> {
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// A field of `/proc/PID/status` in its own unit.
fn status_field(pid: u32, field: &str) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(field))?;
    line.split_ascii_whitespace().next()?.parse().ok()
}

fn parent_of(pid: u32) -> Option<u32> {
    status_field(pid, "PPid:")?.try_into().ok()
}

/// What CRIU counts for in the container's group.
fn memory_of(criu: u32) -> u64 {
    let anonymous = status_field(criu, "RssAnon:").unwrap_or(0) << 10;
    anonymous + KERNEL_BYTES_OF_CRIU
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_v2(dir: &Path, limits: &[(&str, &str)]) -> Raised {
        let limits = limits
            .iter()
            .map(|(file, value)| Limit { path: dir.join(file), value: (*value).to_owned() })
            .collect();
        let cgroup = Cgroup::V2(dir.to_owned());
        Raised { cgroup, criu: std::process::id(), limits, inexact: Vec::new() }
    }

    fn set(dir: &Path, file: &str, value: &str) {
        std::fs::write(dir.join(file), value).unwrap();
    }

    fn get(dir: &Path, file: &str) -> String {
        std::fs::read_to_string(dir.join(file)).unwrap()
    }

    /// Method: plain files in place of the kernel's.
    #[test]
    fn limits_come_back_and_high_comes_back_after_max() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        set(dir, "memory.current", "1000");
        let limits =
            [(HIGH_V2, "1500"), (MEMORY_V2, "2000"), ("pids.max", "7"), ("cpu.max", "5 9")];
        of_v2(dir, &limits).put_back().unwrap();
        for (file, value) in limits {
            assert_eq!(get(dir, file), value);
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_with_the_limit_named() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        set(dir, "memory.current", "99000000000");
        let refused = of_v2(dir, &[(MEMORY_V2, "2000")]).put_back().unwrap_err().to_string();
        assert!(refused.contains("99000000000") && refused.contains("(memory.max) is 2000"));
        assert!(!dir.join(MEMORY_V2).exists(), "set below what is used");
    }

    #[test]
    fn what_only_criu_exceeds_is_exact_once_criu_has_ended() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        set(dir, "memory.current", "2000000");
        let mut raised = of_v2(dir, &[(MEMORY_V2, "1000000")]);
        raised.put_back().unwrap();
        assert!(get(dir, MEMORY_V2).parse::<u64>().unwrap() >= 5_000_000);
        set(dir, "memory.current", "900000");
        raised.put_back_exactly().unwrap();
        assert_eq!(get(dir, MEMORY_V2), "1000000");
    }

    #[test]
    fn words_for_no_limit() {
        for none in ["max", "max 100000", "-1", "9223372036854771712"] {
            assert!(is_unlimited(none), "{none}");
        }
        for limit in ["0", "67108864", "50000 100000"] {
            assert!(!is_unlimited(limit), "{limit}");
        }
    }
}
