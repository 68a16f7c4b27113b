//! Containers that use nearly all that they may.

use anyhow::{Result, ensure};
use godwit_tests::Node;
use godwit_tests::command::wait_until;
use godwit_tests::images::Image;
use godwit_tests::workload::{self, Container};
use serde_json::json;

use crate::bed::{self, SOON, destination, source};
use crate::specification;
use crate::table::rows;

rows! {
    nearly_all_of_the_memory_limit_in_use: "nearly all of its memory limit in use", Moves,
        "limits are lifted for the restore, and are back before the first instruction"
        => near_the_memory_limit();
    all_of_the_pids_limit_in_use: "as many processes and threads as its limit allows", Moves,
        "likewise; CRIU's own processes do not count against it" => at_the_pids_limit();
}

/// Method: the limit has no room for one more, neither before the moves nor after them.
fn at_the_pids_limit() -> Result<()> {
    const LIMIT: &str = "24";
    let name = "near-pids";
    specification::run_probe(name, &["threads", LIMIT], |spec| {
        spec["linux"]["resources"]["pids"] = json!({"limit": LIMIT.parse::<i64>().unwrap_or(0)});
    })?;
    let beats = |line: &str| {
        line.strip_prefix(&format!("threads {LIMIT} wrong 0 beats "))?.parse::<u64>().ok()
    };
    let group = |at: &Node, file: &str| {
        let both = format!(
            "cd /sys/fs/cgroup; cat pids/default/{name}/{file} 2> /dev/null || cat default/{name}/{file}"
        );
        Ok::<_, anyhow::Error>(at.sh(&both)?.trim().to_owned())
    };
    for (from, to) in [(source(), destination()), (destination(), source())] {
        let before = bed::status_becomes(from, name, |line| beats(line) > Some(2))?;
        let used = group(from, "pids.current")?;
        ensure!(used == LIMIT, "{used} of {LIMIT} in use");
        workload::migrated(from, name, from, to, &[])?;
        let limit = group(to, "pids.max")?;
        ensure!(limit == LIMIT, "its limit is {limit}");
        bed::status_becomes(to, name, |line| beats(line) > beats(&before))?;
    }
    bed::remove(source(), name)
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
