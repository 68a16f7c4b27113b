//! Attributes of processes and threads.

use anyhow::Result;

use godwit_tests::workload;

use crate::bed::{self, destination, probe, source};
use crate::table::rows;

rows! {
    attributes_of_threads_move: "processor affinity, timer slack, I/O priority and core file filter",
        Moves, "a processor that the destination lacks is a warning in its log" => keeps_attributes();
    a_program_that_starts_others_all_the_time_moves: "a process in vfork(2) or posix_spawn(3), as shells, Java and Go start programs",
        Moves, "" => spawns();
}

/// Method: there and back, so that the freeze meets it at several instants.
fn spawns() -> Result<()> {
    let name = "spawns";
    bed::start(&probe(name, &["spawns"]))?;
    let beats = |line: &str| line.strip_prefix("beats ")?.parse::<u64>().ok();
    bed::status_becomes(source(), name, |line| beats(line) > Some(10))?;
    for turn in 0..6 {
        let (from, to) =
            if turn % 2 == 0 { (source(), destination()) } else { (destination(), source()) };
        let before = beats(&bed::status(from, name)?);
        workload::migrated(from, name, from, to, &[])?;
        bed::status_becomes(to, name, |line| beats(line) > before.map(|beats| beats + 50))?;
    }
    bed::remove(source(), name)
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
