//! Attributes of processes and threads that CRIU does not dump: processor affinity, timer slack,
//! priority of input and output, and which mappings a core file holds.
//!
//! Only what differs from a process that never asked for any is recorded, so that a container does
//! not become bound to the processors of the node that it comes from.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use super::{Supplement, SupplementError, is_gone, no_such, ns_id};
use crate::sys;

/// Timer slack of a process that never set any, in nanoseconds. Source: `init_task` of the kernel.
const TIMER_SLACK_NS: u64 = 50_000;

/// Core file filter of a process that never set any. Source: core(5).
const CORE_FILTER: u32 = 0x33;

/// Class of real-time input and output, which needs a privilege. Source: ioprio_set(2).
const IO_CLASS_REAL_TIME: u32 = 1;

/// Bits of an input and output priority below its class.
const IO_CLASS_SHIFT: u32 = 13;

/// A process.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Process {
    #[prost(uint32, tag = "1")]
    pid: u32,
    /// `/proc/PID/coredump_filter`.
    #[prost(uint32, tag = "2")]
    core_filter: u32,
}

/// A thread.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Thread {
    #[prost(uint32, tag = "1")]
    pid: u32,
    #[prost(uint32, tag = "2")]
    tid: u32,
    /// Processors that it may use, ascending; empty if it never chose.
    #[prost(uint32, repeated, tag = "3")]
    cpus: Vec<u32>,
    #[prost(uint64, optional, tag = "4")]
    timer_slack_ns: Option<u64>,
    #[prost(uint32, optional, tag = "5")]
    io_priority: Option<u32>,
}

/// Threads of a process, by their ids here; none if it has ended.
pub(super) fn ids(pid: u32) -> Result<Vec<u32>, SupplementError> {
    let path = PathBuf::from(format!("/proc/{pid}/task"));
    let listed = match fs::read_dir(&path) {
        Err(error) if is_gone(&error) => return Ok(Vec::new()),
        other => other.map_err(SupplementError::io(&path))?,
    };
    let mut ids = Vec::new();
    for entry in listed {
        let entry = entry.map_err(SupplementError::io(&path))?;
        ids.extend(entry.file_name().to_string_lossy().parse::<u32>().ok());
    }
    Ok(ids)
}

/// Records the process that is `id` in the container and `pid` here.
pub(super) fn record(
    id: u32,
    pid: u32,
    cpus: &CpuSet,
    supplement: &mut Supplement,
) -> Result<(), SupplementError> {
    // A zombie has no memory, so its filter reads as nothing.
    if let Some(core_filter) = read_core_filter(pid).filter(|filter| *filter != CORE_FILTER) {
        supplement.processes.push(Process { pid: id, core_filter });
    }
    for (tid, tid_here) in thread_ids(pid)? {
        let slack = read_slack(tid_here);
        let thread = Thread {
            pid: id,
            tid,
            cpus: chosen_cpus(tid_here, cpus),
            // 0 is what a thread with a real-time policy reads.
            timer_slack_ns: slack.filter(|slack| ![0, TIMER_SLACK_NS].contains(slack)),
            io_priority: sys::io_priority(tid_here).ok().filter(|value| *value != 0),
        };
        let is_usual = thread.cpus.is_empty()
            && thread.timer_slack_ns.is_none()
            && thread.io_priority.is_none();
        if !is_usual {
            supplement.threads.push(thread);
        }
    }
    Ok(())
}

/// Processors of a thread that does not use all of `available`.
fn chosen_cpus(tid: u32, available: &CpuSet) -> Vec<u32> {
    let Ok(set) = sched_getaffinity(Pid::from_raw(tid.cast_signed())) else { return Vec::new() };
    let holds = |set: &CpuSet, cpu: usize| set.is_set(cpu).unwrap_or(false);
    let all = 0..CpuSet::count();
    if all.clone().all(|cpu| holds(&set, cpu) || !holds(available, cpu)) {
        return Vec::new();
    }
    all.filter(|cpu| holds(&set, *cpu)).filter_map(|cpu| u32::try_from(cpu).ok()).collect()
}

/// Sets everything again. Errors: [`SupplementError::Damaged`] for a thread that is not there.
pub(super) fn apply(
    recorded: &[Process],
    threads: &[Thread],
    processes: &BTreeMap<u32, u32>,
    warnings: &mut BTreeSet<String>,
) -> Result<(), SupplementError> {
    let pid_of = |id: u32| processes.get(&id).copied().ok_or_else(|| no_such("process", id));
    for process in recorded {
        let path = format!("/proc/{}/coredump_filter", pid_of(process.pid)?);
        if let Err(error) = fs::write(path, format!("{:#x}", process.core_filter)) {
            warnings.insert(format!("core file filter of process {}: {error}", process.pid));
        }
    }
    if !threads.is_sorted_by_key(|thread| (thread.pid, thread.tid)) {
        return Err(SupplementError::Damaged("threads do not ascend".to_owned()));
    }
    let mut known: Option<(u32, BTreeMap<u32, u32>)> = None;
    for thread in threads {
        if known.as_ref().is_none_or(|(pid, _)| *pid != thread.pid) {
            known = Some((thread.pid, thread_ids(pid_of(thread.pid)?)?));
        }
        let here = known.as_ref().and_then(|(_, ids)| ids.get(&thread.tid).copied());
        thread.apply(here.ok_or_else(|| no_such("thread", thread.tid))?, warnings);
    }
    Ok(())
}

/// Threads of a process by their ids in the container.
fn thread_ids(pid: u32) -> Result<BTreeMap<u32, u32>, SupplementError> {
    let mut found = BTreeMap::new();
    for here in ids(pid)? {
        let directory = format!("/proc/{pid}/task/{here}");
        if let Some((id, false)) = ns_id(Path::new(&directory))? {
            found.insert(id, here);
        }
    }
    Ok(found)
}

impl Thread {
    /// Sets it on the thread that is `here` on this node. What cannot be set is a warning.
    fn apply(&self, here: u32, warnings: &mut BTreeSet<String>) {
        let name = format!("thread {} of process {}", self.tid, self.pid);
        if !self.cpus.is_empty()
            && let Err(errno) = set_cpus(here, &self.cpus)
        {
            let cpus = self.cpus.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
            let why = match errno {
                Errno::EINVAL => "this node or the container's limits here have none of them",
                other => other.desc(),
            };
            warnings.insert(format!(
                "{name} was bound to processors {cpus} and is not any more: {why}"
            ));
        }
        if let Some(slack) = self.timer_slack_ns
            && let Err(error) = fs::write(slack_path(here), slack.to_string())
        {
            warnings.insert(format!("timer slack of {name}: {error}"));
        }
        let Some(priority) = self.io_priority else { return };
        if priority >> IO_CLASS_SHIFT == IO_CLASS_REAL_TIME {
            warnings.insert(format!("{name} had a real-time I/O priority, which does not move"));
        } else if let Err(errno) = sys::set_io_priority(here, priority) {
            warnings.insert(format!("I/O priority of {name}: {}", errno.desc()));
        }
    }
}

fn set_cpus(tid: u32, cpus: &[u32]) -> Result<(), Errno> {
    let mut set = CpuSet::new();
    for cpu in cpus {
        // Beyond the largest set there is no processor to be bound to.
        let _ = set.set(usize::try_from(*cpu).unwrap_or(usize::MAX));
    }
    sched_setaffinity(Pid::from_raw(tid.cast_signed()), &set)
}

fn read_core_filter(pid: u32) -> Option<u32> {
    let text = fs::read_to_string(format!("/proc/{pid}/coredump_filter")).ok()?;
    u32::from_str_radix(text.trim(), 16).ok()
}

fn read_slack(tid: u32) -> Option<u64> {
    fs::read_to_string(slack_path(tid)).ok()?.trim().parse().ok()
}

/// The file exists for every thread, though only processes are listed (proc_pid_timerslack_ns(5)).
fn slack_path(tid: u32) -> PathBuf {
    PathBuf::from(format!("/proc/{tid}/timerslack_ns"))
}
