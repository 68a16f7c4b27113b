//! Timerfds of frozen processes.
//!
//! A periodic timerfd with an unread tick stands still until its owner reads it: only then does the
//! kernel count the intervals that have passed, and arm it for the next one. Until then /proc shows
//! no time left, so CRIU's image has neither the phase nor the count. `timerfd_gettime` makes the
//! kernel do the same without consuming the ticks. [`settle`] calls it on behalf of the processes,
//! which changes nothing that they can see.
//!
//! A timer whose interval is shorter than the time from [`settle`] to the dump has expired again by
//! then. [`crate::mend`] arms such a timer again, off phase by less than its interval.

use std::fs;
use std::io;
use std::time::{Duration, Instant};

use crate::sys;

/// How long [`settle`] looks for timers, since the processes are frozen meanwhile.
const SETTLE_TIME_MAX: Duration = Duration::from_millis(50);

/// A timerfd of a process.
struct TimerFd {
    pid: u32,
    fd: u32,
    is_overdue: bool,
}

/// Counts the ticks of every periodic timerfd that has expired, and arms it for the next one. Best
/// effort, for 50 ms at most. Returns how many timers there were.
///
/// `pids` may hold processes that have ended.
pub fn settle(pids: &[u32]) -> usize {
    let begun = Instant::now();
    let mut settled = 0;
    let timers = pids.iter().flat_map(|pid| timers_of(*pid));
    for timer in timers.take_while(|_| begun.elapsed() < SETTLE_TIME_MAX) {
        settled += usize::from(timer.is_overdue && settle_one(&timer).is_ok());
    }
    settled
}

fn settle_one(timer: &TimerFd) -> io::Result<()> {
    let process = sys::pidfd_open(timer.pid)?;
    sys::timerfd_gettime(&sys::pidfd_getfd(&process, timer.fd)?)
}

fn timers_of(pid: u32) -> impl Iterator<Item = TimerFd> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    entries.filter_map(move |entry| {
        if fs::read_link(entry.path()).ok()?.as_os_str() != "anon_inode:[timerfd]" {
            return None;
        }
        let fd = entry.file_name().to_str()?.parse().ok()?;
        let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}")).ok()?;
        Some(TimerFd { pid, fd, is_overdue: is_overdue(&info) })
    })
}

/// Whether a timerfd is periodic, has expired and has an unread tick, by its fdinfo (proc(5)).
fn is_overdue(info: &str) -> bool {
    let value = |key: &str| {
        info.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':')).map(str::trim)
    };
    value("it_value") == Some("(0, 0)")
        && value("it_interval") != Some("(0, 0)")
        && value("ticks") != Some("0")
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::timer::{Expiration, TimerSetTimeFlags};
    use nix::sys::timerfd::{ClockId, TimerFd as Timer, TimerFlags};

    #[test]
    fn an_expired_periodic_timer_is_armed_again_and_keeps_its_ticks() {
        let timer = Timer::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK).unwrap();
        let begin_and_every = Expiration::IntervalDelayed(
            Duration::from_nanos(1).into(),
            Duration::from_secs(900).into(),
        );
        timer.set(begin_and_every, TimerSetTimeFlags::empty()).unwrap();
        let overdue = || timers_of(std::process::id()).any(|timer| timer.is_overdue);
        while !overdue() {}
        assert_eq!(settle(&[std::process::id()]), 1);
        assert!(!overdue());
        // Its tick is still to be read: a read would fail with EAGAIN else.
        timer.wait().unwrap();
    }

    #[test]
    fn disarmed_and_fired_timers_are_left_alone() {
        let info = |ticks, value, interval| {
            is_overdue(&format!(
                "pos:\t0\nclockid: 1\nticks: {ticks}\nsettime flags: 00\nit_value: {value}\n\
                 it_interval: {interval}\n"
            ))
        };
        let (zero, some) = ("(0, 0)", "(0, 20000000)");
        assert!(info(1, zero, some));
        for (ticks, value, interval) in [(0, zero, some), (1, zero, zero), (1, some, some)] {
            assert!(!info(ticks, value, interval));
        }
    }
}
