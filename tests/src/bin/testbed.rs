//! Test nodes by hand: make the root, start nodes and look around in them, remove leftovers.

use std::io::Write;
use std::os::unix::process::CommandExt;

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};
use godwit_tests::root::Root;
use godwit_tests::{Bed, BedOptions, node, run};

#[derive(Parser)]
#[command(about, version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make the Debian root of the nodes, if it is not there yet.
    Root,
    /// Start nodes and keep them until Ctrl-C.
    Up {
        /// How many.
        #[arg(default_value_t = 2)]
        nodes: u8,
        /// Rate of every link in Mbit/s; unlimited without it.
        #[arg(long)]
        rate: Option<u32>,
        /// Leave the daemon out.
        #[arg(long)]
        without_daemon: bool,
    },
    /// Run a command in a node that `up` keeps; a shell without one.
    Enter {
        /// The run's number, which `up` prints; needed where several runs have such a node.
        #[arg(long)]
        run: Option<u32>,
        /// The node's name, for example edge-a.
        node: String,
        /// The command and its arguments.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Remove what killed runs left.
    Clean,
}

fn main() -> Result<()> {
    match Arguments::parse().command {
        Command::Root => println!("{}", Root::open()?.path().display()),
        Command::Clean => {
            let removed = run::clean()?;
            println!("{} killed runs removed", removed.len());
        }
        Command::Enter { run, node, command } => {
            let words = node::enter(&node, run)?;
            let shell = vec!["bash".to_owned()];
            let command = if command.is_empty() { shell } else { command };
            let [program, prefix @ ..] = words.as_slice() else { bail!("nothing to run") };
            let error = std::process::Command::new(program)
                .args(prefix)
                .args(command)
                .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
                .exec();
            return Err(error).context("enter the node");
        }
        Command::Up { nodes, rate, without_daemon } => {
            let mut options = BedOptions::nodes(nodes);
            options.rate_mbit = rate;
            options.daemon = !without_daemon;
            let bed = Bed::start(&options)?;
            for node in bed.nodes() {
                let (name, address) = (node.name(), node.address());
                println!("{name} {address}: testbed enter --run {} {name}", bed.number());
            }
            println!("run {}, Ctrl-C ends it", bed.number());
            std::io::stdout().flush()?;
            loop {
                // The signal's thread tears down and ends the process.
                std::thread::park();
            }
        }
    }
    Ok(())
}
