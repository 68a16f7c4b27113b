//! A workload for each thing that a process may hold: `probe KIND [ARGUMENTS]`.
//!
//! Each kind takes hold of one thing (a timer, a socket, an unusual mapping) and then reports its
//! state in `/status`, one line of words that the suite `moves` reads on the node that runs the
//! container. Every kind is a module; its head says what it holds and what the line means.

mod aio;
mod attributes;
mod bulk;
mod clocks;
mod files;
mod ledger;
mod memory;
mod names;
mod options;
mod sandbox;
mod shape;
mod sockets;
mod undumped;
mod watch;

use std::fs;
use std::io;
use std::process::{Command, ExitCode};
use std::thread;
use std::time::Duration;

/// Where the probe reports its state.
const STATUS: &str = "/status";

/// How long a kind sleeps between two reports.
const TICK: Duration = Duration::from_millis(20);

/// What a kind runs: it returns only on an error.
type Kind = fn(&[String]) -> io::Result<()>;

/// Every kind by its name.
const KINDS: &[(&str, Kind)] = &[
    ("aio-ring", aio::ring),
    ("alarm", clocks::alarm),
    ("attributes", attributes::attributes),
    ("ballast", memory::ballast),
    ("bulk", bulk::bulk),
    ("direct-writes", files::direct_writes),
    ("files", shape::files),
    ("idle", idle),
    ("ledger", ledger::ledger),
    ("ledger-child", ledger::child),
    ("mappings", shape::mappings),
    ("mptcp", sockets::mptcp),
    ("multicast", options::multicast),
    ("names", names::names),
    ("nested", sandbox::nested),
    ("options", options::options),
    ("nothing", nothing),
    ("processes", shape::processes),
    ("removed-names", files::removed_names),
    ("reservation", memory::reservation),
    ("spawns", spawns),
    ("threads", shape::threads),
    ("timers", clocks::timers),
    ("traces", sandbox::traces),
    ("undumped", undumped::hold),
    ("unix-client", sockets::unix_client),
    ("unix-server", sockets::unix_server),
    ("watch", watch::watch),
];

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let found = words.split_first().and_then(|(name, arguments)| {
        let (_, kind) = KINDS.iter().find(|(known, _)| known == name)?;
        Some((*kind, arguments))
    });
    let Some((kind, arguments)) = found else {
        let names: Vec<&str> = KINDS.iter().map(|(name, _)| *name).collect();
        eprintln!("usage: probe {} [ARGUMENTS]", names.join("|"));
        return ExitCode::FAILURE;
    };
    match kind(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("probe: {error}");
            let _ = report(&format!("failed {error}"));
            ExitCode::FAILURE
        }
    }
}

/// Replaces the line of [`STATUS`] as a whole: a reader never sees half of it.
fn report(line: &str) -> io::Result<()> {
    let unfinished = format!("{STATUS}.new");
    fs::write(&unfinished, line)?;
    fs::rename(unfinished, STATUS)
}

/// Ends at once.
fn nothing(_arguments: &[String]) -> io::Result<()> {
    Ok(())
}

/// Starts one program after the other, as shells and build tools do; two threads, so that at nearly
/// any instant one of them waits in vfork(2). The line is a count that grows.
fn spawns(_arguments: &[String]) -> io::Result<()> {
    let spawn = || Command::new("/proc/self/exe").arg("nothing").status();
    thread::spawn(move || while spawn().is_ok() {});
    for count in 0_u64.. {
        if !spawn()?.success() {
            return Err(io::Error::other("a program failed"));
        }
        report(&format!("beats {count}"))?;
    }
    Ok(())
}

/// Holds nothing: the line is a count that grows.
fn idle(_arguments: &[String]) -> io::Result<()> {
    for count in 0_u64.. {
        report(&format!("beats {count}"))?;
        thread::sleep(TICK);
    }
    Ok(())
}
