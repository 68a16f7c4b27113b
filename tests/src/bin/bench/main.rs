//! `make bench`: what cooperation is worth, in one run, as medians.
//!
//! A memhog of a set size first runs at a neighbour, moves to the source, and is measured on its
//! way to a destination that holds nothing: in both modes, interleaved, each time on fresh nodes.
//! The link of the source is slower than the others, as in the demo. Written to
//! `target/bench/migration.json`.
//!
//! With `--shapes` it measures the downtime of containers of many mappings, threads, processes or
//! files beside plain CRIU's instead (`shapes`).

use std::fs;

use anyhow::{Context, Result};
use clap::Parser;
use godwit_tests::images::{self, Image};
use godwit_tests::workload::{self, memhog};
use godwit_tests::{Bed, BedOptions, place};
use serde_json::{Value, json};

mod shapes;

/// Rate of the source's link and of the others, in Mbit/s.
const SOURCE_MBIT: u32 = 100;
const LINK_MBIT: u32 = 1000;

const NAME: &str = "hog";

#[derive(Parser)]
struct Arguments {
    /// Resident memory of the workload, in MiB; several sizes are measured one after the other.
    #[arg(long, value_delimiter = ',', default_values_t = [64, 256])]
    resident_mib: Vec<usize>,
    /// Rate at which it writes to its memory, in MiB/s.
    #[arg(long, default_value_t = 5)]
    dirty_mib_per_s: usize,
    /// Migrations per size and mode.
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// One small size, once: what continuous integration has time for.
    #[arg(long)]
    quick: bool,
    /// Downtime beside plain CRIU's, by shapes such as `mappings=60000`.
    #[arg(long, value_delimiter = ',', num_args = 0.., conflicts_with = "quick",
        default_missing_value = shapes::DEFAULT)]
    shapes: Option<Vec<shapes::Shape>>,
}

fn main() -> Result<()> {
    let mut arguments = Arguments::parse();
    if arguments.quick {
        (arguments.resident_mib, arguments.runs) = (vec![48], 1);
    }
    let (name, result) = match &arguments.shapes {
        Some(shapes) => ("shapes", shapes::measure(shapes, arguments.runs)?),
        None => ("migration", modes(&arguments)?),
    };
    let path = place::workspace().join(format!("target/bench/{name}.json"));
    fs::create_dir_all(path.parent().context("a directory")?)?;
    fs::write(&path, serde_json::to_string_pretty(&result)?)?;
    println!("{}", serde_json::to_string_pretty(&result)?);
    Ok(())
}

/// Both modes, by size.
fn modes(arguments: &Arguments) -> Result<Value> {
    let mut sizes = Vec::new();
    for resident in &arguments.resident_mib {
        let (mut traditional, mut cooperative) = (Vec::new(), Vec::new());
        for run in 1..=arguments.runs {
            for (mode, reports) in
                [("traditional", &mut traditional), ("cooperative", &mut cooperative)]
            {
                eprintln!("{resident} MiB, run {run}, {mode}");
                reports.push(measure(*resident, arguments.dirty_mib_per_s, mode)?);
            }
        }
        sizes.push(summary(*resident, &traditional, &cooperative));
    }
    Ok(json!({"source_mbit": SOURCE_MBIT, "link_mbit": LINK_MBIT, "runs": arguments.runs,
        "dirty_mib_per_s": arguments.dirty_mib_per_s, "sizes": sizes}))
}

fn measure(resident_mib: usize, dirty_mib_per_s: usize, mode: &str) -> Result<Value> {
    let bed = Bed::start(&BedOptions::nodes(3).rate_mbit(LINK_MBIT).sibling_memory())?;
    let (source, destination, neighbour) = (bed.node(0), bed.node(1), bed.node(2));
    images::import(neighbour, Image::Memhog, "godwit")?;
    let addresses = workload::networks(&bed, NAME, 0)?;
    neighbour.ok(&["godwit", "volume", "create", NAME])?;
    memhog(NAME, NAME, resident_mib, dirty_mib_per_s).start(neighbour)?;
    let began = workload::memhog_answers(&bed, addresses[2])?;
    workload::migrated(source, NAME, neighbour, source, &[])?;
    source.set_rate(Some(SOURCE_MBIT))?;
    let report = workload::migrated(destination, NAME, source, destination, &["--mode", mode])?;
    workload::memhog_is_whole(&bed, addresses[1], began.incarnation)?;
    Ok(report)
}

fn summary(resident_mib: usize, traditional: &[Value], cooperative: &[Value]) -> Value {
    let from_source = |report: &Value| report["wire_bytes_by_node"]["edge-a"].as_f64();
    let modes = |reports: &[Value]| {
        json!({
            "total_ms": median(reports, |report| report["total_ms"].as_f64()),
            "downtime_ms": median(reports, |report| report["downtime_ms"].as_f64()),
            "source_bytes": median(reports, from_source),
        })
    };
    let (traditional, cooperative) = (modes(traditional), modes(cooperative));
    let ratio = |field: &str| {
        cooperative[field].as_f64().zip(traditional[field].as_f64()).map(|(one, other)| one / other)
    };
    json!({
        "resident_mib": resident_mib,
        "total_ratio": ratio("total_ms"),
        "downtime_ratio": ratio("downtime_ms"),
        "source_bytes_ratio": ratio("source_bytes"),
        "traditional": traditional,
        "cooperative": cooperative,
    })
}

fn median(reports: &[Value], field: impl Fn(&Value) -> Option<f64>) -> Option<f64> {
    let mut values: Vec<f64> = reports.iter().filter_map(field).collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}
