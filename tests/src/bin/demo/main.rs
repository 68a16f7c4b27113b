//! The demo: a running redis moves between two nodes twice, without and with the help of
//! neighbours.
//!
//! ```text
//!   edge-c   neighbour   runs redis first, and keeps a snapshot of it when it leaves
//!      │ 1. move, all links fast
//!   edge-a   source      10% of the data changes here, then its link becomes slow
//!      │ 2. move, measured, while a client writes
//!   edge-b   destination holds nothing, not even the image
//!   edge-d   neighbour   holds nothing either
//! ```
//!
//! Each mode is an *arm* ([`arm`]): everything is built again, with the same bytes, so that both
//! start from the same state; the digests that show it are printed and compared. What is checked:
//! every key and value after each move, the volumes, and in the end that redis, started over from
//! nothing but its append-only file, has every value again ([`state`]). The results are a table and
//! `target/demo/report.json` ([`report`]).
//!
//! Exit code 0 means that both arms were verified, that they started alike, and that cooperation
//! paid off: at most [`report::SHARE_MAX`] of the bytes from the source, in less time.

mod arm;
mod report;
mod state;

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, ensure};
use clap::{Parser, ValueEnum};
use godwit_tests::place;

use crate::arm::Mode;

/// Rate of the source's link in the measured move, in Mbit/s.
const SOURCE_MBIT: u32 = 100;
/// Rate of every other link, in Mbit/s.
const LINK_MBIT: u32 = 1000;
/// Values in the memory of redis, in MiB. Nothing compresses them.
const DATA_MIB: u32 = 192;
/// Content of the read-only volume, in MiB.
const READ_ONLY_MIB: u32 = 64;
/// Part of the keys that changes at the source before the measured move, in percent.
const CHANGED_PERCENT: u32 = 10;
/// What the client writes while redis moves, in KiB/s.
const LOAD_KIB_PER_S: u32 = 1024;

/// Migrates a running redis between test nodes, and shows what it costs with and without
/// neighbours.
#[derive(Clone, Debug, Parser)]
#[command(name = "demo")]
pub(crate) struct Settings {
    /// Rate of the source's link in the measured move, in Mbit/s.
    #[arg(long, default_value_t = SOURCE_MBIT, value_parser = clap::value_parser!(u32).range(1..))]
    source_mbit: u32,
    /// Rate of the links between the others, in Mbit/s.
    #[arg(long, default_value_t = LINK_MBIT, value_parser = clap::value_parser!(u32).range(1..))]
    link_mbit: u32,
    /// Values in the memory of redis, in MiB.
    #[arg(long, default_value_t = DATA_MIB, value_parser = clap::value_parser!(u32).range(1..4096))]
    data_mib: u32,
    /// Content of the read-only volume, in MiB.
    #[arg(long, default_value_t = READ_ONLY_MIB,
          value_parser = clap::value_parser!(u32).range(1..4096))]
    read_only_mib: u32,
    /// Part of the keys that changes before the measured move, in percent.
    #[arg(long, default_value_t = CHANGED_PERCENT,
          value_parser = clap::value_parser!(u32).range(..=100))]
    changed_percent: u32,
    /// What the client writes while redis moves, in KiB/s.
    #[arg(long, default_value_t = LOAD_KIB_PER_S, value_parser = clap::value_parser!(u32).range(1..))]
    load_kib_per_s: u32,
    /// Form of what goes to standard output.
    #[arg(long, value_enum, default_value_t = Output::Text)]
    output: Output,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    /// The story and a table.
    Text,
    /// The report; the story goes to standard error.
    Json,
}

/// Tells people what is going on.
#[derive(Clone, Copy)]
pub(crate) struct Story {
    begun: Instant,
    to_stderr: bool,
}

impl Story {
    /// A headline.
    fn title(self, text: &str) {
        self.line(&format!("\n{text}"));
    }

    /// What has just happened.
    pub(crate) fn tell(self, text: &str) {
        self.line(&format!("{:>6.1} s  {text}", self.begun.elapsed().as_secs_f64()));
    }

    fn line(self, text: &str) {
        if self.to_stderr {
            eprintln!("{text}");
        } else {
            println!("{text}");
        }
    }
}

fn main() -> ExitCode {
    match run(&Settings::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\ndemo: FAILED: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(settings: &Settings) -> Result<()> {
    let story = Story { begun: Instant::now(), to_stderr: settings.output == Output::Json };
    introduce(settings, story);
    story.title("traditional: the destination asks the source alone");
    let traditional = arm::run(settings, Mode::Traditional, story)?;
    story.title("cooperative: the destination asks its neighbours too");
    let cooperative = arm::run(settings, Mode::Cooperative, story)?;

    let path = place::target().join("demo/report.json");
    let text = report::write(&path, &traditional, &cooperative)?;
    if settings.output == Output::Json {
        println!("{text}");
    } else {
        println!("\n{}", report::table(&traditional, &cooperative));
    }
    story.tell(&format!("done; report: {}", path.display()));
    let wrong = report::shortcomings(&traditional, &cooperative);
    ensure!(wrong.is_empty(), "{}", wrong.join("; "));
    Ok(())
}

fn introduce(settings: &Settings, story: Story) {
    let Settings { source_mbit, link_mbit, data_mib, read_only_mib, .. } = settings;
    story.line(&format!(
        "Redis with {data_mib} MiB of incompressible values, an append-only file on a writable volume\n\
         and a read-only volume of {read_only_mib} MiB moves from {} to {}, while a client writes\n\
         {} KiB/s. The link of {} has {source_mbit} Mbit/s, all others {link_mbit} Mbit/s. Redis ran on {}\n\
         before and left a snapshot there; {}% of the data has changed since.",
        arm::SOURCE,
        arm::DESTINATION,
        settings.load_kib_per_s,
        arm::SOURCE,
        arm::NEIGHBOUR,
        settings.changed_percent,
    ));
}
