//! Containers that use nearly all that they may.

use anyhow::{Result, ensure};
use godwit_tests::command::wait_until;
use godwit_tests::images::Image;
use godwit_tests::workload::Container;

use crate::bed::{self, SOON, destination, source};
use crate::table::rows;

rows! {
    nearly_all_of_the_memory_limit_in_use: "nearly all of its memory limit in use", Moves,
        "limits are lifted for the restore, and are back before the first instruction"
        => near_the_memory_limit();
}

/// Method: what is left of the limit is less than CRIU needs of its own.
fn near_the_memory_limit() -> Result<()> {
    const LIMIT: &str = "67108864";
    let name = "near-memory";
    let hold = ["memhog", "--resident-mib", "57", "--dirty-mib-per-s", "0"];
    let container = Container::new(name, Image::Memhog);
    container.options(&["--memory-limit", LIMIT]).command(&hold).start(source())?;
    let init = bed::init(source(), name)?;
    let resident = format!("awk '/VmRSS/ {{print $2}}' /proc/{init}/status");
    let is_filled = || Ok(source().sh(&resident)?.trim().parse().unwrap_or(0) > 57 << 10);
    wait_until("its memory is filled", SOON, is_filled)?;
    bed::moved(name)?;
    let limit = destination().sh(&format!(
        "cd /sys/fs/cgroup; cat memory/default/{name}/memory.limit_in_bytes 2> /dev/null ||
         cat default/{name}/memory.max"
    ))?;
    ensure!(limit.trim() == LIMIT, "its limit is {limit}");
    bed::remove(destination(), name)
}
