//! A process without anything unusual: the way that every other row goes.

use anyhow::{Context, Result};
use godwit_tests::workload;

use crate::bed::{self, destination, probe, source};
use crate::table::rows;

rows! {
    an_idle_process_moves: "a process and its files", Moves, "" => goes_on();
    a_move_back_at_once: "a container that moves back as soon as `godwit migrate` has ended", Moves,
        "it ends once the source has let go" => bounces();
}

/// Method: twelve moves, each right after the one before, on a volume too.
fn bounces() -> Result<()> {
    let name = "bounces";
    source().ok(&["godwit", "volume", "create", name])?;
    bed::start(&probe(name, &["idle"]).volume(name, "/data", "rw"))?;
    let (mut at, mut next) = (source(), destination());
    for number in 1..=12 {
        workload::migrated(at, name, at, next, &[]).with_context(|| format!("move {number}"))?;
        (at, next) = (next, at);
    }
    bed::forget_status(at, name)?;
    bed::remove(at, name)
}

fn goes_on() -> Result<()> {
    let name = "idle";
    bed::start(&probe(name, &["idle"]))?;
    let beats = |line: &str| line.strip_prefix("beats ").and_then(|count| count.parse().ok());
    let before: u64 = beats(&bed::status(source(), name)?).unwrap_or(0);
    bed::moved(name)?;
    bed::status_becomes(destination(), name, |line| beats(line) > Some(before + 5))?;
    bed::remove(destination(), name)
}
