//! Fault runs of fixed seeds: a ledger migrates, a fault strikes, and every promise is kept.
//!
//! The runs are made by the program `faults`, which says more of each; `make faults` makes any
//! others.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Result, ensure};
use godwit_tests::{Invocation, need, place};

/// Runs of several kinds and phases that end within seconds.
const SEEDS: [u64; 15] = [1, 2, 5, 16, 17, 24, 31, 33, 40, 45, 53, 94, 100, 112, 152];

/// Longest time for all of them.
const TIME_MAX: Duration = Duration::from_secs(600);

#[test]
fn fault_runs_keep_every_promise() -> Result<()> {
    need::root()?;
    need::binaries(&["faults", "probe"])?;
    let mut seeds = String::new();
    for seed in SEEDS {
        write!(seeds, "{}{seed}", if seeds.is_empty() { "" } else { "," })?;
    }
    let program = place::binary("faults");
    let words = [program.as_os_str(), "--seeds".as_ref(), seeds.as_ref()];
    let done = Invocation::new(&words).timeout(TIME_MAX).run()?;
    println!("{}", done.stdout);
    ensure!(done.succeeded(), "{done}");
    Ok(())
}
