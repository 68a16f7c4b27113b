//! Timers and sleeps.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::timer::{Expiration, TimerSetTimeFlags};
use nix::sys::timerfd::{ClockId, TimerFd, TimerFlags};

use crate::report;

/// Interval of the timer that ticks.
const TICK: Duration = Duration::from_millis(20);
/// Interval of the timer that is never read.
const LONG: Duration = Duration::from_secs(900);
/// When this file appears the timer that is never read is asked for the time that it has left.
const ASK: &str = "/ask";

/// `probe timers`: three timerfds. The line is `ticks N fired N late_ms N`.
///
/// - *ticks*: of a periodic timer of 20 ms, which is read all the time.
/// - *fired*: how often a timer fired that was set to one absolute time. It may be once.
/// - *late_ms*: how far a periodic timer of 900 s, which has an unread tick, is from its phase. It
///   is 0 until the file `/ask` is there.
pub(crate) fn timers(_arguments: &[String]) -> io::Result<()> {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)?;
    let once = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK)?;
    once.set(Expiration::OneShot(now), TimerSetTimeFlags::TFD_TIMER_ABSTIME)?;
    let unread = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK)?;
    let begun = Instant::now();
    let soon = Duration::from_millis(1);
    unread.set(periodic(soon, LONG), TimerSetTimeFlags::empty())?;
    let ticking = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::empty())?;
    ticking.set(periodic(TICK, TICK), TimerSetTimeFlags::empty())?;
    let (mut fired, mut late) = (0_u64, 0);
    for ticks in 0_u64.. {
        fired += u64::from(once.wait().is_ok());
        if late == 0 && Path::new(ASK).exists() {
            let left = match unread.get()? {
                Some(Expiration::IntervalDelayed(left, _)) => Duration::from(left),
                _ => Duration::ZERO,
            };
            let right = soon + LONG;
            late = (begun.elapsed() + left).abs_diff(right).as_millis().max(1);
        }
        report(&format!("ticks {ticks} fired {fired} late_ms {late}"))?;
        ticking.wait()?;
    }
    Ok(())
}

fn periodic(first: Duration, interval: Duration) -> Expiration {
    Expiration::IntervalDelayed(first.into(), interval.into())
}

/// `probe alarm`: a timerfd that would wake a suspended machine; needs CAP_WAKE_ALARM.
pub(crate) fn alarm(_arguments: &[String]) -> io::Result<()> {
    let alarm = TimerFd::new(ClockId::CLOCK_BOOTTIME_ALARM, TimerFlags::empty())?;
    alarm.set(periodic(LONG, LONG), TimerSetTimeFlags::empty())?;
    report("armed")?;
    Ok(alarm.wait()?)
}
