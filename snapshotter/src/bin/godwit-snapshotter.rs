//! `godwit-snapshotter`: the node's daemon.

use std::io::IsTerminal as _;
use std::path::PathBuf;

use anyhow::Context as _;
use clap::Parser;
use godwit_snapshotter::config::{self, Config};
use godwit_snapshotter::daemon::{self, STOP_MAX};

/// The node's daemon: snapshotter for containerd, store, peers and migrations.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Configuration file.
    #[arg(long, default_value = config::DEFAULT_PATH)]
    config: PathBuf,
}

/// What is logged unless `GODWIT_LOG` says otherwise. ttrpc calls it an error when a client hangs
/// up.
const LOG_FILTER: &str = "info,ttrpc=off";

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_env("GODWIT_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(LOG_FILTER));
    // Colours are for terminals: in a journal or a file they are noise.
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    let config = Config::read(&arguments.config)?;
    let runtime = tokio::runtime::Runtime::new().context("cannot start")?;
    let done = runtime.block_on(daemon::run(config));
    // A thread that writes to a peer which has gone is not waited for: everything on disk survives
    // a kill.
    runtime.shutdown_timeout(STOP_MAX);
    done
}
