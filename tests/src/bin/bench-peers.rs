//! `make bench-peers`: what neighbours cost that are of no use.
//!
//! A memhog has left snapshots at two neighbours, which are then spoilt in one way; it moves on to
//! a destination that holds nothing, in both modes, interleaved, all links alike. The promise is
//! that cooperation costs at most 1.05 times the traditional time and 50 ms, in total and in
//! downtime. Written to `target/bench/peers.json`.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use godwit_tests::command::wait_until;
use godwit_tests::images::{self, Image};
use godwit_tests::neighbours::{self, Bad};
use godwit_tests::workload::{self, memhog};
use godwit_tests::{Bed, BedOptions, place};
use serde_json::{Map, Value, json};

const NAME: &str = "hog";

#[derive(Parser)]
struct Arguments {
    /// Resident memory of the workload, in MiB.
    #[arg(long, default_value_t = 64)]
    resident_mib: usize,
    /// Rate at which it writes to its memory, in MiB/s.
    #[arg(long, default_value_t = 2)]
    dirty_mib_per_s: usize,
    /// Rate of all links, in Mbit/s.
    #[arg(long, default_value_t = 200)]
    link_mbit: u32,
    /// Migrations of each kind and mode.
    #[arg(long, default_value_t = 5)]
    runs: usize,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let options = BedOptions::nodes(4).rate_mbit(arguments.link_mbit).sibling_memory();
    let bed = Bed::start(&options)?;
    workload::networks(&bed, NAME, 0)?;
    images::import(bed.node(2), Image::Memhog, "godwit")?;
    let mut kinds = Map::new();
    for bad in Bad::ALL {
        let (mut traditional, mut cooperative) = (Vec::new(), Vec::new());
        for run in 1..=arguments.runs {
            for (mode, reports) in
                [("traditional", &mut traditional), ("cooperative", &mut cooperative)]
            {
                let report = measure(&bed, &arguments, bad, mode)?;
                eprintln!("{}, run {run}, {mode}: {} ms", bad.word(), report["total_ms"]);
                reports.push(report);
            }
        }
        kinds.insert(bad.word(), summary(&traditional, &cooperative)?);
    }
    let result = json!({"link_mbit": arguments.link_mbit, "runs": arguments.runs,
        "resident_mib": arguments.resident_mib, "dirty_mib_per_s": arguments.dirty_mib_per_s,
        "neighbours": kinds});
    let path = place::workspace().join("target/bench/peers.json");
    fs::create_dir_all(path.parent().context("a directory")?)?;
    fs::write(&path, serde_json::to_string_pretty(&result)?)?;
    println!("{}", serde_json::to_string_pretty(&result)?);
    Ok(())
}

fn measure(bed: &Bed, arguments: &Arguments, bad: Bad, mode: &str) -> Result<Value> {
    let [source, destination, one, two] = [0, 1, 2, 3].map(|index| bed.node(index));
    one.ok(&["godwit", "volume", "create", NAME])?;
    memhog(NAME, NAME, arguments.resident_mib, arguments.dirty_mib_per_s).start(one)?;
    workload::memhog_answers(bed, bed.container_address(2))?;
    workload::migrated(two, NAME, one, two, &[])?;
    workload::migrated(source, NAME, two, source, &[])?;
    for neighbour in [one, two] {
        wait_until("it has let go of the container", Duration::from_secs(20), || {
            Ok(!neighbour.ok(&["ctr", "containers", "ls", "-q"])?.contains(NAME))
        })?;
        bad.spoil(neighbour)?;
    }
    let report = workload::migrated(destination, NAME, source, destination, &["--mode", mode]);
    [one, two].into_iter().try_for_each(|neighbour| bad.heal(neighbour, arguments.link_mbit))?;
    destination.ok(&["ctr", "tasks", "rm", "-f", NAME])?;
    destination.ok(&["ctr", "containers", "rm", NAME])?;
    for node in bed.nodes() {
        // Also where it only was before.
        node.ok(&["godwit", "volume", "rm", NAME])?;
        neighbours::forget(node)?;
    }
    report
}

fn summary(traditional: &[Value], cooperative: &[Value]) -> Result<Value> {
    let mut summary = Map::new();
    for field in ["total_ms", "downtime_ms"] {
        let [before, after] =
            [traditional, cooperative].map(|reports| median(reports, field).context("no run"));
        let (before, after) = (before?, after?);
        summary.insert(
            field.to_owned(),
            json!({"traditional": before, "cooperative": after, "ratio": after / before,
                "is_within_promise": after <= before * 1.05 + 50.0}),
        );
    }
    Ok(summary.into())
}

fn median(reports: &[Value], field: &str) -> Option<f64> {
    let mut values: Vec<f64> = reports.iter().filter_map(|report| report[field].as_f64()).collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}
