//! Timers that cannot be restored.

use std::path::Path;

use super::{Container, Findings};

/// Numbers of CLOCK_REALTIME_ALARM and CLOCK_BOOTTIME_ALARM, as fdinfo has them.
const ALARM_CLOCKS: [&str; 2] = ["8", "9"];

/// CRIU dumps such a timerfd and then refuses to restore it (`verify_timerfd` in its source).
pub(super) fn alarm_timers(container: &Container, found: &mut Findings) {
    for process in &container.processes {
        for file in &process.files {
            let is_timer = file.target == Path::new("anon_inode:[timerfd]");
            let clock = file.info("clockid").filter(|clock| ALARM_CLOCKS.contains(clock));
            if is_timer && clock.is_some() {
                found.obstacle(
                    format!(
                        "{} has a timerfd of an alarm clock ({})",
                        process.named(),
                        file.number
                    ),
                    "CRIU cannot restore timers that wake a suspended machine",
                    "have it use CLOCK_REALTIME or CLOCK_BOOTTIME",
                );
            }
        }
    }
}
