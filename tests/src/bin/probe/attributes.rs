//! Attributes that a process chose for itself: processors, timer slack, content of core files.

use std::fs;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::thread;

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::prctl::{get_timerslack, set_timerslack};
use nix::unistd::Pid;

use crate::{TICK, report};

/// File that says and decides which mappings a core file holds.
const CORE_FILTER: &str = "/proc/self/coredump_filter";

/// Chooses on two threads. The line: what they have at this moment.
pub(crate) fn attributes(_arguments: &[String]) -> io::Result<()> {
    let second_slack = Arc::new(AtomicI32::new(0));
    let seen = second_slack.clone();
    thread::spawn(move || -> io::Result<()> {
        set_timerslack(222_222)?;
        loop {
            seen.store(get_timerslack()?, Ordering::Relaxed);
            thread::sleep(TICK);
        }
    });
    let this = Pid::from_raw(0);
    let mut last = CpuSet::new();
    last.set(cpus(this)?.into_iter().max().unwrap_or(0))?;
    sched_setaffinity(this, &last)?;
    set_timerslack(111_111)?;
    fs::write(CORE_FILTER, "0x7")?;
    loop {
        let second = second_slack.swap(0, Ordering::Relaxed);
        if second != 0 {
            let filter = fs::read_to_string(CORE_FILTER)?;
            let (cpus, slack) = (cpus(this)?, get_timerslack()?);
            report(&format!("cpus {cpus:?} slack {slack} {second} core {}", filter.trim()))?;
        }
        thread::sleep(TICK);
    }
}

fn cpus(thread: Pid) -> io::Result<Vec<usize>> {
    let set = sched_getaffinity(thread)?;
    Ok((0..CpuSet::count()).filter(|cpu| set.is_set(*cpu).unwrap_or(false)).collect())
}
