//! `containerd-shim-godwit-v1`: a containerd runtime shim over an OCI runtime (runc), which can
//! also checkpoint, restore, and hand a running container over to another node.
//!
//! ```text
//! containerd --start--> shim --spawns--> server --ttrpc--> TaskService --> Container --> runc
//!                                          |                                  |          CRIU
//! node's daemon ---------ttrpc-------------+--> OwnService (freeze, dump)     +--> daemon
//!                                                                   (volumes, acquire, claim)
//! ```
//!
//! One server per container, or per pod. Read next: [`server`] for the process, [`container`] for
//! what orders operations and events, [`launch`] for the ways into a running container, [`handoff`]
//! and [`hold`] for the instant at which a migrated container may run, [`dump`] for the way out.

mod bootstrap;
mod cgroup;
mod container;
mod criu;
mod daemon;
mod detached;
mod dump;
mod error;
mod exec;
mod fifo;
mod freeze;
mod handoff;
mod hold;
mod idmap;
mod info;
mod launch;
mod leftovers;
mod limits;
mod log;
mod logs;
mod mptcp;
mod newest;
mod oom;
mod options;
mod own_service;
mod packing;
mod process;
mod publisher;
mod reap;
mod rerun;
mod rootfs;
mod runc;
mod server;
mod spec;
mod stats;
mod stdio;
mod sys;
mod task;
mod time_namespace;
mod volumes;

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use containerd_shim::Flags;

/// The name users select the runtime by.
const RUNTIME_NAME: &str = "io.containerd.runc.godwit.v1";
/// Threads that run the shim's tasks: it waits, mostly.
const WORKER_THREADS: usize = 2;
/// Threads for calls that block (writing log files).
const BLOCKING_THREADS_MAX: usize = 4;

fn main() -> ExitCode {
    if packing::is_gzip() {
        return packing::gzip_main();
    }
    if hold::is_script() {
        return hold::script_main();
    }
    if time_namespace::is_launcher() {
        return time_namespace::launcher_main();
    }
    if idmap::is_holder() {
        return idmap::holder_main();
    }
    let args: Vec<_> = std::env::args_os().collect();
    if rerun::is_child(&args) {
        return rerun::child_main(&args);
    }
    let flags = match containerd_shim::parse(args.get(1..).unwrap_or_default()) {
        Ok(flags) => flags,
        Err(error) => return failed(&error),
    };
    if flags.version {
        println!("{RUNTIME_NAME} {}", env!("CARGO_PKG_VERSION"));
        return ExitCode::SUCCESS;
    }
    if flags.info {
        return info::main();
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKER_THREADS)
        .max_blocking_threads(BLOCKING_THREADS_MAX)
        .thread_keep_alive(Duration::from_secs(1))
        .enable_all()
        .build();
    let outcome = match runtime {
        Ok(runtime) => runtime.block_on(run(&flags)),
        Err(error) => return failed(&error),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&error),
    }
}

async fn run(flags: &Flags) -> Result<(), server::ServeError> {
    match flags.action.as_str() {
        "start" => server::start(flags).await,
        "delete" => server::delete(flags).await,
        _ => {
            log::init(Path::new("."), flags.debug);
            let served = server::serve(flags).await;
            if let Err(error) = &served {
                tracing::error!("{}", error::chain(error));
            }
            served
        }
    }
}

fn failed(error: &dyn std::error::Error) -> ExitCode {
    eprintln!("{RUNTIME_NAME}: {}", error::chain(error));
    ExitCode::FAILURE
}
