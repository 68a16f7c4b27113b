//! `make sim`: what the daemon's rules are worth on large sites, by simulation.
//!
//! Writes `report.json`, `report.csv` and plots to `target/sim`, the same ones in every run. Fails
//! if ours is further behind newest or nearest than it may be.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use godwit_tests::place;
use godwit_tests::sim::asking::Policy;
use godwit_tests::sim::report::{Row, report};

/// Sites of each size: small ones see few migrations, so there are more of them.
const SITES: [(usize, u64); 4] = [(10, 40), (100, 6), (1000, 2), (10_000, 1)];

#[derive(Parser)]
struct Arguments {
    /// Nodes of the largest site.
    #[arg(long, default_value_t = 10_000)]
    nodes_max: usize,
    /// Where the files go.
    #[arg(long, default_value_os_t = place::workspace().join("target/sim"))]
    output: PathBuf,
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    // Now: an error after ten minutes would lose what was computed.
    fs::create_dir_all(&arguments.output)?;
    let sites = SITES.into_iter().filter(|(nodes, _)| *nodes <= arguments.nodes_max);
    let report = report(&sites.collect::<Vec<_>>(), &Policy::ALL, tell)?;
    fs::write(arguments.output.join("report.json"), serde_json::to_string_pretty(&report)?)?;
    fs::write(arguments.output.join("report.csv"), report.csv()?)?;
    for (name, svg) in report.plots() {
        fs::write(arguments.output.join(name), svg)?;
    }
    let mut holds = true;
    for one in &report.comparisons {
        let percent = |share: f64| format!("{:+.1}%", share * 100.0);
        println!(
            "{:>6} nodes, {:<8}: ours takes {} of the better of newest and nearest, {} if these ask 8{}",
            one.nodes,
            one.mobility,
            percent(one.behind_one),
            one.behind_many.map(percent).unwrap_or_default(),
            if one.holds { "" } else { ": too much" },
        );
        holds &= one.holds;
    }
    println!("report: {}", arguments.output.join("report.json").display());
    Ok(if holds { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn tell(row: &Row) {
    println!(
        "{:>6} {:<8} {:<9} {:>6} migrations, total {:.2} s (mean {:.2}, p95 {:.1}), downtime {:.0} ms, \
         {:.1}% from the source, {:.1} asked, {:.2} GB kept",
        row.nodes,
        row.mobility,
        row.policy,
        row.migrations,
        row.total_median_s,
        row.total_mean_s,
        row.total_p95_s,
        row.downtime_median_ms,
        row.source_share * 100.0,
        row.asked,
        row.cache_mean_bytes / 1e9,
    );
}
