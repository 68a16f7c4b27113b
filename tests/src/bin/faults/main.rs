//! Fault runs: a ledger migrates between test nodes while a fault strikes, and what came of it is
//! judged.
//!
//! ```text
//!  seed ─► Cell: workload, mode, phase, fault (and perhaps a second one)            cell
//!   1. what the nodes hold is written down                                          holdings
//!   2. a ledger starts at the source; a migration to the destination begins         run
//!   3. at the phase's own event the fault strikes; later its cause is mended        phase, strike
//!   4. until it runs at one node again, or ended as the fault allows: settle        settle
//!   5. the witness's history, the files and the network are judged                  judge
//!   6. container and volumes are removed; the nodes must hold what they held        holdings
//! ```
//!
//! A run follows from its seed: consecutive seeds go through all faults in all phases, and what
//! else a run draws follows from its own seed. Each run prints its cell, its outcome and the
//! command that repeats it; logs of a run that broke a promise are kept in `target/faults/SEED`,
//! and a fresh bed is made for the next. `target/faults/report.json` counts the outcomes
//! ([`report`]). Exit code 0 means that no run broke a promise.

mod cell;
mod holdings;
mod judge;
mod phase;
mod process;
mod report;
mod run;
mod settle;
mod site;
mod strike;

use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::Parser;

use cell::Cell;
use report::Report;
use run::Outcome;
use site::Site;

/// Runs after which a bed is replaced, so that what runs leave in stores does not fill its disks.
const RUNS_PER_BED: u32 = 40;

/// Migrates a ledger under faults and judges what came of it.
#[derive(Parser)]
#[command(name = "faults")]
struct Arguments {
    /// Seed of the first run; each further run has the next.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// How many runs.
    #[arg(long, default_value_t = 1)]
    runs: u64,
    /// These seeds instead, separated by commas.
    #[arg(long, value_delimiter = ',')]
    seeds: Vec<u64>,
    /// Print the cells of the runs and make none.
    #[arg(long)]
    list: bool,
    /// End with the first run that breaks a promise.
    #[arg(long)]
    fail_fast: bool,
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    let range = arguments.seed..arguments.seed.saturating_add(arguments.runs);
    let seeds = if arguments.seeds.is_empty() { range.collect() } else { arguments.seeds.clone() };
    if arguments.list {
        seeds.iter().for_each(|&seed| println!("{}", Cell::draw(seed)));
        return Ok(ExitCode::SUCCESS);
    }
    let mut report = Report::default();
    let mut site = None;
    let mut used = 0;
    for seed in seeds {
        let cell = Cell::draw(seed);
        println!("{cell}\n    again: make faults SEED={seed} RUNS=1");
        if used == RUNS_PER_BED {
            site = None;
        }
        let here = match site.take() {
            Some(site) => site,
            None => {
                used = 0;
                Site::start().context("start the nodes")?
            }
        };
        used += 1;
        let outcome = run::run(&here, &cell).unwrap_or_else(|error| Outcome::broken(&error));
        println!("    {outcome}");
        let is_clean = report.count(&cell, &outcome);
        report.write()?;
        if is_clean {
            site = Some(here);
        } else {
            println!("    logs: {}", here.keep_logs(seed)?);
            if arguments.fail_fast {
                break;
            }
        }
    }
    println!("{report}");
    Ok(if report.is_clean() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
