//! Attributes of processes and threads.

use anyhow::Result;

use crate::bed::{self, destination, probe, source};
use crate::table::rows;

rows! {
    attributes_of_threads_move: "processor affinity, timer slack, I/O priority and core file filter",
        Moves, "a processor that the destination lacks is a warning in its log" => keeps_attributes();
}

fn keeps_attributes() -> Result<()> {
    let name = "attributes";
    bed::start(&probe(name, &["attributes"]))?;
    let chosen = |line: &str| line.ends_with("slack 111111 222222 core 00000007");
    let before = bed::status_becomes(source(), name, chosen)?;
    bed::moved(name)?;
    bed::forget_status(destination(), name)?;
    bed::status_becomes(destination(), name, |line| line == before)?;
    bed::remove(destination(), name)
}
