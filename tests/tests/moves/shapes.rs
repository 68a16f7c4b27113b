//! Many mappings, threads, processes and files: every part of them is there after several moves.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use godwit_tests::Node;
use godwit_tests::command::wait_until;
use godwit_tests::workload;

use crate::bed::{self, destination, probe, source};
use crate::table::rows;

rows! {
    many_mappings_move:
        "20 000 mappings", Moves,
        "downtime grows with their number" => there_and_back("mappings", 20_000, &[]);
    many_threads_move:
        "500 threads", Moves,
        "downtime grows with their number" => there_and_back("threads", 500, &[]);
    many_processes_move:
        "60 processes with three threads each, which share pages by copy-on-write", Moves,
        "downtime grows with their number" => there_and_back("processes", 60, &["3", "500"]);
    many_files_move:
        "10 000 files in a volume, some of them written", Moves,
        "" => there_and_back("files", 10_000, &["/data"]);
}

/// Longest wait until all parts are there.
const WHOLE_TIME_MAX: Duration = Duration::from_secs(60);

/// Moves a probe of `count` parts there, back and there again, in both modes, with a consistent
/// snapshot in between.
fn there_and_back(kind: &str, count: usize, more: &[&str]) -> Result<()> {
    let number = count.to_string();
    let words = [&[kind, &number], more].concat();
    let mut container = probe(kind, &words);
    if kind == "files" {
        source().ok(&["godwit", "volume", "create", kind])?;
        container = container.volume(kind, "/data", "rw");
    }
    container.start(source())?;
    let right = format!("{kind} {count} wrong 0 beats ");
    all_beat(source(), kind, &right, 0)?;
    source().ok(&["godwit", "snapshot", "create", kind, "--consistent"])?;
    all_beat(source(), kind, &right, 0)?;
    let (mut at, mut next) = (source(), destination());
    for mode in ["cooperative", "traditional", "cooperative"] {
        let before = beats(at, kind, &right)?;
        workload::migrated(at, kind, at, next, &["--mode", mode])?;
        all_beat(next, kind, &right, before).with_context(|| format!("after a {mode} move"))?;
        (at, next) = (next, at);
    }
    bed::remove(at, kind)
}

/// How often all parts have beaten. Errors: one of them is wrong.
fn beats(at: &Node, name: &str, right: &str) -> Result<u64> {
    let line = bed::status(at, name)?;
    let count = line.strip_prefix(right).with_context(|| format!("the probe says {line:?}"))?;
    Ok(count.trim().parse()?)
}

/// Waits until all parts have beaten twice more than now, which is no less than `before`.
fn all_beat(at: &Node, name: &str, right: &str, before: u64) -> Result<()> {
    wait_until("the probe reports", WHOLE_TIME_MAX, || Ok(bed::status(at, name).is_ok()))?;
    let now = beats(at, name, right)?;
    ensure!(now >= before, "{now} beats after {before}");
    wait_until("all parts beat", WHOLE_TIME_MAX, || Ok(beats(at, name, right)? >= now + 2))
}
