//! The life of a shim process: started by containerd with `start`, it starts itself again as a
//! server that outlives containerd, and is started once more with `delete` when the server died.
//!
//! One socket serves containerd's Task API twice, as version 3 and, the messages being the same, as
//! version 2, together with the shim's own service. Its name follows from containerd's socket, the
//! namespace and the group, so a second container of a pod finds the server that is there.

use std::collections::HashMap;
use std::io::{self, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use containerd_shim::asynchronous::ExitSignal;
use containerd_shim::protos::api::DeleteResponse;
use containerd_shim::protos::protobuf::Message as _;
use containerd_shim::protos::shim::oci::Options;
use containerd_shim::protos::shim_async::create_task;
use containerd_shim::protos::ttrpc::r#async::transport::Listener;
use containerd_shim::protos::ttrpc::r#async::{Server, Service};
use containerd_shim::{Flags, StartOpts};
use godwit_protos::ContainerRef;
use godwit_protos::shim::create_shim;
use tokio::signal::unix::{SignalKind, signal};

use crate::bootstrap;
use crate::container::{Shared, read_pid, timestamp};
use crate::detached::Detached;
use crate::handoff;
use crate::leftovers;
use crate::options;
use crate::own_service::OwnService;
use crate::publisher::Publisher;
use crate::reap::Reaper;
use crate::rootfs;
use crate::runc::Runc;
use crate::spec::Spec;
use crate::task::{Containers, TaskService};
use crate::volumes;

/// containerd's ttrpc address, told to the server.
const TTRPC_ADDRESS: &str = "TTRPC_ADDRESS";
/// File with the server's address in the bundle it was started for.
const ADDRESS_FILE: &str = "address";
/// The Task API's two names.
const TASK_SERVICES: (&str, &str) = ("containerd.task.v3.Task", "containerd.task.v2.Task");
/// Exit status told for a container whose shim died with it.
const KILLED: u32 = 137;

/// Why the shim as a process fails. It is printed, and containerd repeats it to the user.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServeError {
    #[error(transparent)]
    Bootstrap(#[from] bootstrap::BootstrapError),
    #[error(transparent)]
    Spec(#[from] crate::spec::SpecError),
    #[error(transparent)]
    Options(#[from] options::OptionsError),
    #[error("starting the shim's server")]
    Spawn(#[from] containerd_shim::Error),
    #[error("{what}")]
    Io { what: String, source: io::Error },
    #[error("serving {0}")]
    Ttrpc(String, #[source] ttrpc::Error),
    #[error("encoding the answer")]
    Encode(#[from] protobuf::Error),
}

pub(crate) fn io_error(what: impl Into<String>) -> impl FnOnce(io::Error) -> ServeError {
    let what = what.into();
    move |source| ServeError::Io { what, source }
}

fn socket_path(address: &str) -> &Path {
    Path::new(address.strip_prefix("unix://").unwrap_or(address))
}

/// `start`: makes sure that a server runs for the container in the working directory, and prints
/// where.
pub(crate) async fn start(flags: &Flags) -> Result<(), ServeError> {
    let input = bootstrap::read_input()?;
    let ttrpc_address = std::env::var(TTRPC_ADDRESS).ok();
    let (mut start, dialect) = bootstrap::parse(&input, flags, ttrpc_address)?;
    let bundle = std::env::current_dir().map_err(io_error("working directory"))?;
    let group = Spec::load(&bundle)?.group().unwrap_or(&flags.id).to_owned();
    start.extensions = vec![understood(&start)?];
    let expected = start.socket_address(&group);
    let address = if UnixStream::connect(socket_path(&expected)).is_ok() {
        expected
    } else {
        containerd_shim::asynchronous::spawn(start, &group, Vec::new()).await?
    };
    std::fs::write(bundle.join(ADDRESS_FILE), &address).map_err(io_error("address file"))?;
    let answer = bootstrap::answer(&address, dialect)?;
    let mut stdout = io::stdout().lock();
    stdout.write_all(&answer).and_then(|()| stdout.flush()).map_err(io_error("answer"))
}

/// The runtime options in the one shape that spawning a server understands.
fn understood(
    start: &StartOpts,
) -> Result<containerd_shim::protos::protobuf::well_known_types::any::Any, ServeError> {
    let options = options::decode(start.extensions.first())?;
    Ok(containerd_shim::util::convert_to_any(Box::new(options))?)
}

/// `delete`: removes what a server that died left of its container, and prints its end.
pub(crate) async fn delete(flags: &Flags) -> Result<(), ServeError> {
    let here = std::env::current_dir().map_err(io_error("working directory"))?;
    let bundle = if flags.bundle.is_empty() { here } else { flags.bundle.clone().into() };
    let reaper = Arc::new(Reaper::default());
    reaper.start().map_err(io_error("signal handler"))?;
    // What containerd was told at creation is kept beside the specification.
    let options = match std::fs::read(bundle.join(OPTIONS_FILE)) {
        Ok(bytes) => Options::parse_from_bytes(&bytes)?,
        Err(_) => Options::new(),
    };
    let runc = Runc::new(&options, &flags.namespace, &flags.id, &bundle, Arc::clone(&reaper));
    let name = ContainerRef::new(&flags.namespace, &flags.id).ok();
    let mounted = name.as_ref().map(volumes::directory);
    if let Some(name) = &name {
        // First: what was restored and never ran must not run any more.
        handoff::end_orphan(name, &reaper).await;
        lift_locks(&bundle, name, &reaper).await;
    }
    // Processes that write to a frozen file system cannot end.
    let thawed = mounted.as_deref().map_or(Ok(()), volumes::thaw);
    let undone = rootfs::unmount_leftovers(&runc.state_dir(), &bundle.join("work"));
    if undone.is_ok()
        && let Err(error) = runc.delete(true).await
        && !error.is_gone()
    {
        eprintln!("removing {} from {}: {error}", flags.id, runc.binary());
    }
    // The root file system, and layers that were being mapped for it.
    if let Err(error) = undone.and_then(|()| rootfs::unmount(&bundle)) {
        eprintln!("{}", crate::error::chain(&error));
    }
    let released = mounted.as_deref().map_or(Ok(()), volumes::release);
    if let Err(error) = thawed.and(released) {
        eprintln!("{}", crate::error::chain(&error));
    }
    if let Ok(address) = std::fs::read_to_string(bundle.join(ADDRESS_FILE)) {
        let path = socket_path(&address);
        // A pod's other containers may still be served there.
        if UnixStream::connect(path).is_err() {
            let _ = std::fs::remove_file(path);
        }
    }
    let response = DeleteResponse {
        pid: read_pid(&bundle.join("init.pid")).unwrap_or(0),
        exit_status: KILLED,
        exited_at: Some(timestamp(SystemTime::now())).into(),
        ..Default::default()
    };
    let bytes = response.write_to_bytes()?;
    io::stdout().lock().write_all(&bytes).map_err(io_error("answer"))
}

/// Lifts packet locks in the network namespace that a container joined: its shim may have died
/// during a dump.
async fn lift_locks(bundle: &Path, name: &ContainerRef, reaper: &Arc<Reaper>) {
    if let Ok(spec) = Spec::load(bundle)
        && let Some(network) = spec.network()
    {
        leftovers::lift_locks(network, reaper, name).await;
    }
}

/// File in a bundle with the decoded runtime options, for [`delete`].
pub(crate) const OPTIONS_FILE: &str = "godwit-options";

/// Serves until the last container is gone and containerd says so.
pub(crate) async fn serve(flags: &Flags) -> Result<(), ServeError> {
    // Away from containerd's process group, so that a signal to it does not reach the shim.
    let _ = nix::unistd::setsid();
    nix::sys::prctl::set_child_subreaper(true).map_err(|e| io_error("subreaper")(e.into()))?;
    ignore_signals().map_err(io_error("signal handlers"))?;
    let reaper = Arc::new(Reaper::default());
    reaper.start().map_err(io_error("signal handler"))?;

    let Some(listener) = listen(socket_path(&flags.socket)).map_err(io_error(&flags.socket))?
    else {
        // Another server was faster; the client that started this one will find it.
        return close_stdout();
    };
    let ttrpc_address = std::env::var(TTRPC_ADDRESS)
        .ok()
        .filter(|address| !address.is_empty())
        .ok_or(bootstrap::BootstrapError::NoAddress)?;
    let publisher = Publisher::new(ttrpc_address, flags.namespace.clone());
    let shared = Arc::new(Shared { namespace: flags.namespace.clone(), reaper, publisher });
    let containers = Arc::new(Containers::new(shared));
    let exit = Arc::new(ExitSignal::default());
    let task = Arc::new(Detached(Arc::new(TaskService {
        containers: Arc::clone(&containers),
        exit: Arc::clone(&exit),
        address: flags.socket.clone(),
    })));
    let failed = |error| ServeError::Ttrpc(flags.socket.clone(), error);
    let listener = Listener::try_from(listener).map_err(io_error(&flags.socket))?;
    let mut server = Server::new()
        .add_listener(listener)
        .register_service(create_task(task.clone()))
        .register_service(as_version_2(create_task(task)))
        .register_service(create_shim(Arc::new(OwnService(containers))));
    server.start().await.map_err(failed)?;
    close_stdout()?;
    tracing::debug!("serving {}", flags.socket);
    exit.wait().await;
    // First the name, so that no client connects to a server that is going.
    let _ = std::fs::remove_file(socket_path(&flags.socket));
    let _ = server.shutdown().await;
    Ok(())
}

/// The service under the name it had before version 3; the messages are the same.
fn as_version_2(mut services: HashMap<String, Service>) -> HashMap<String, Service> {
    if let Some(service) = services.remove(TASK_SERVICES.0) {
        services.insert(TASK_SERVICES.1.to_owned(), service);
    }
    services
}

/// Listens on `path`, in place of a server that died. `None` when one answers there.
fn listen(path: &Path) -> io::Result<Option<UnixListener>> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            if UnixStream::connect(path).is_ok() {
                return Ok(None);
            }
            std::fs::remove_file(path)?;
            UnixListener::bind(path).map(Some)
        }
        bound => bound.map(Some),
    }
}

/// Tells the process that started the server that it serves: it waits for the end of our output.
fn close_stdout() -> Result<(), ServeError> {
    let null =
        std::fs::File::options().write(true).open("/dev/null").map_err(io_error("/dev/null"))?;
    nix::unistd::dup2_stdout(null).map_err(|e| io_error("standard output")(e.into()))
}

/// A shim ends when containerd says so, not by a signal to a process group.
fn ignore_signals() -> io::Result<()> {
    for kind in [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::pipe()] {
        let mut signals = signal(kind)?;
        tokio::spawn(async move { while signals.recv().await.is_some() {} });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_servers_socket_is_replaced_and_a_living_ones_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s/abc");
        let living = listen(&path).unwrap().unwrap();
        assert!(listen(&path).unwrap().is_none());
        drop(living);
        assert!(listen(&path).unwrap().is_some());
    }
}
