//! The host that the daemon runs on: its load and its clock.

use std::time::{SystemTime, UNIX_EPOCH};

/// One minute's mean of runnable tasks per processor (proc(5), "loadavg").
pub fn load() -> f64 {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let tasks = text.split(' ').next().and_then(|first| first.parse::<f64>().ok()).unwrap_or(0.0);
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    tasks / f64::from(u32::try_from(processors).unwrap_or(1))
}

/// Names the time since the machine started: another one after each start (random(4), "boot_id").
/// Empty if it cannot be read.
pub fn boot_id() -> String {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    id.trim().to_owned()
}

/// Milliseconds since 1970 by this node's clock.
pub fn unix_ms() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_millis()).unwrap_or(i64::MAX)
}
