//! A process without anything unusual: the way that every other row goes.

use anyhow::Result;

use crate::bed::{self, destination, probe, source};
use crate::table::rows;

rows! {
    an_idle_process_moves: "a process and its files", Moves, "" => goes_on();
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
