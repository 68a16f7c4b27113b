//! The daemon put together: what is opened, served and followed, in which order, and how it stops.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use godwit_protos::path;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;

use crate::api;
use crate::capture;
use crate::config::Config;
use crate::error::chain;
use crate::layers::Layers;
use crate::migrate;
use crate::migrate::destination::Sessions;
use crate::mirror;
use crate::node::Node;
use crate::peer::{PING_INTERVAL, SILENCE_MAX};
use crate::snapshots;
use crate::supervise::{Death, Deaths, Supervisor, on_thread};
use godwit_disk::database;

/// How long calls that are under way may take to end when the daemon stops; what is
/// frozen waits for it.
pub const STOP_MAX: Duration = Duration::from_secs(3);

/// How often databases that failed are looked at.
const HEAL_INTERVAL: Duration = Duration::from_secs(1);

/// Runs the daemon until a signal stops it.
///
/// Errors: what cannot be opened or served.
pub async fn run(config: Config) -> anyhow::Result<()> {
    run_with(config, Path::new(path::FENCES), |_| {}).await
}

/// The same, with fences below `fences`, and with what `also` starts.
async fn run_with(
    config: Config,
    fences: &Path,
    also: impl FnOnce(&Supervisor),
) -> anyhow::Result<()> {
    fs::create_dir_all(&config.state_dir)
        .with_context(|| format!("cannot make {}", config.state_dir.display()))?;
    let snapshots = snapshots::Snapshotter::open(&config.state_dir.join("snapshots"))
        .context("cannot open the snapshots")?;
    let snapshots = Arc::new(snapshots);
    let node = Node::open(config, fences)?;
    let (supervisor, deaths) = Supervisor::new();
    migrate::release::recover(&node, &supervisor)?;
    let sessions = Arc::new(Sessions::new(node.clone()));
    // Before anybody is answered: what is left of a restore must not run any more.
    migrate::orphans::end_all(&sessions, Path::new(path::HOLDS)).await;

    let run_dir = &node.config.run_dir;
    fs::create_dir_all(run_dir).with_context(|| format!("cannot make {}", run_dir.display()))?;
    fs::set_permissions(run_dir, fs::Permissions::from_mode(0o700))?;
    let snapshotter_socket = listen(&run_dir.join("snapshotter.sock"))?;
    tell_of_mptcp(&node.config)?;
    let mut control_server = serve_control(&sessions, &snapshots)?;
    control_server.start().await.context("cannot serve the control socket")?;

    let following = migrate::follow::containerd(node.clone(), supervisor.clone());
    supervisor.serve("containerd", following);
    supervisor.serve("sweeps", node.clone().sweep_regularly());
    supervisor.watch("databases", heal_databases(node.clone(), snapshots.clone()));
    supervisor.serve("captures", capture::run(sessions.clone(), supervisor.clone()));
    if let Some(address) = node.config.listen {
        let listener = TcpListener::bind(address)
            .await
            .with_context(|| format!("cannot listen on {address}"))?;
        supervisor.serve("peers", serve_peers(sessions.clone(), listener));
    }
    if let Some(address) = node.config.mirror.listen {
        let listener = TcpListener::bind(address)
            .await
            .with_context(|| format!("cannot serve the mirror on {address}"))?;
        supervisor.serve("mirror", mirror::serve(node.clone(), listener));
    }
    also(&supervisor);
    tracing::info!(node = %node.config.node, "ready");
    let (stopping, mut stopped) = tokio::sync::watch::channel(false);
    let publishing = supervisor.run("directory", node.clone().publish_until(stopped.clone()));
    let (tell_cause, cause) = tokio::sync::oneshot::channel();
    let stop = async move {
        let _ = tell_cause.send(until_stop(deaths).await);
        let _ = stopping.send(true);
    };
    let layers = node.config.layers.fetch && !node.config.peers.is_empty();
    let layers = layers.then(|| Layers::new(node.clone(), snapshots.clone()));
    let served = api::snapshots::serve(snapshotter_socket, snapshots, layers, stop)
        .context("cannot serve the snapshotter socket")?;
    let late = async {
        let _ = stopped.wait_for(|stopped| *stopped).await;
        tokio::time::sleep(STOP_MAX).await;
    };
    tokio::select! {
        served = served => served.context("cannot serve the snapshotter socket")?,
        () = late => tracing::warn!("calls are still under way; stopping nevertheless"),
    }
    let _ = tokio::time::timeout(STOP_MAX, control_server.shutdown()).await;
    // Nothing would thaw what stays frozen.
    migrate::release::take_offers_back(&node).await;
    let _ = tokio::time::timeout(STOP_MAX, publishing).await;
    tracing::info!("stopped");
    match cause.await {
        Ok(Err(death)) => Err(death.into()),
        Ok(Ok(())) | Err(_) => Ok(()),
    }
}

/// Opens databases again that failed, and returns when that takes a new process: why.
///
/// containerd may have been answered with changes to its snapshots that the disk has not, so their
/// database is opened again as after a power cut, and only once the disk takes writes again: until
/// then what is there can be mounted and listed.
async fn heal_databases(node: Arc<Node>, snapshots: Arc<snapshots::Snapshotter>) -> String {
    let mut told = None;
    loop {
        tokio::time::sleep(HEAL_INTERVAL).await;
        let (node, snapshots) = (node.clone(), snapshots.clone());
        let look = move || {
            node.heal();
            let failure = snapshots.failure()?;
            let state = node.config.state_dir.join("snapshots");
            Some((failure, database::probe(&state).map_err(|error| error.to_string())))
        };
        let Some(Some((failure, probed))) = on_thread(look).await else { continue };
        let reason = format!("the database of containerd's snapshots failed: {failure}");
        match probed {
            Ok(()) => return format!("{reason}; it is opened again at the next start"),
            Err(error) if told.as_ref() != Some(&error) => {
                tracing::error!("{reason}; waiting for the disk: {error}");
                told = Some(error);
            }
            Err(_) => {}
        }
    }
}

/// Returns when a signal asks the daemon to stop. Errors: a background task died.
async fn until_stop(mut deaths: Deaths) -> Result<(), Death> {
    let (Ok(mut term), Ok(mut int)) =
        (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        return Err(deaths.next().await);
    };
    tokio::select! {
        _ = term.recv() => Ok(()),
        _ = int.recv() => Ok(()),
        death = deaths.next() => {
            tracing::error!("{death}; stopping");
            Err(death)
        }
    }
}

/// Tells shims whether containers of this node are to have MPTCP: they do not ask the daemon.
fn tell_of_mptcp(config: &Config) -> anyhow::Result<()> {
    let name = Path::new(path::NO_MPTCP).file_name().unwrap_or_default();
    let path = config.run_dir.join(name);
    let told = if config.mptcp {
        fs::remove_file(&path).or_else(|error| {
            if error.kind() == std::io::ErrorKind::NotFound { Ok(()) } else { Err(error) }
        })
    } else {
        fs::write(&path, "")
    };
    told.with_context(|| format!("cannot tell of the key mptcp in {}", path.display()))
}

/// A Unix socket that only root may open. A socket file that a killed daemon left is replaced; that
/// no other daemon runs on this state was made sure of before.
fn listen(path: &Path) -> anyhow::Result<UnixListener> {
    if let Err(error) = fs::remove_file(path)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        return Err(error).with_context(|| format!("cannot replace {}", path.display()));
    }
    let listener =
        UnixListener::bind(path).with_context(|| format!("cannot listen on {}", path.display()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

fn serve_control(
    sessions: &Arc<Sessions>,
    snapshots: &Arc<snapshots::Snapshotter>,
) -> anyhow::Result<ttrpc::asynchronous::Server> {
    let path = sessions.node.config.run_dir.join("control.sock");
    if path.exists() {
        fs::remove_file(&path).with_context(|| format!("cannot replace {}", path.display()))?;
    }
    let service = Arc::new(api::control::Service::new(sessions.clone(), snapshots.clone()));
    let server = ttrpc::asynchronous::Server::new()
        .bind(&format!("unix://{}", path.display()))
        .with_context(|| format!("cannot listen on {}", path.display()))?
        .register_service(godwit_protos::control::create_control(service));
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
    Ok(server)
}

async fn serve_peers(sessions: Arc<Sessions>, listener: TcpListener) {
    let served = Server::builder()
        .initial_stream_window_size(16 << 20)
        .initial_connection_window_size(16 << 20)
        .http2_keepalive_interval(Some(PING_INTERVAL))
        .http2_keepalive_timeout(Some(SILENCE_MAX - PING_INTERVAL))
        .add_service(api::peer::service(sessions))
        // Otherwise a short answer behind another one waits 40 ms for an acknowledgement (tcp(7),
        // TCP_NODELAY).
        .serve_with_incoming(TcpIncoming::from(listener).with_nodelay(Some(true)))
        .await;
    if let Err(error) = served {
        tracing::error!(error = chain(&error), "peers are no longer served");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Method: a daemon as any other, without a containerd, and with one task more.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_panic_of_a_background_task_ends_the_daemon_with_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("godwit.toml");
        let at = dir.path().display();
        let text = format!(
            "node = \"edge-a\"\nstate_dir = \"{at}/state\"\nrun_dir = \"{at}/run\"\n\
             containerd_socket = \"{at}/no-containerd.sock\"\n"
        );
        fs::write(&path, text).unwrap();
        let config = Config::read(&path).unwrap();
        let (begin, begun) = tokio::sync::oneshot::channel();
        let fences = dir.path().join("fences");
        let running = run_with(config, &fences, |supervisor| {
            supervisor.run("lookups", async {
                begun.await.unwrap();
                panic!("slot 7 is empty");
            });
        });
        tokio::pin!(running);
        let early = tokio::time::timeout(Duration::from_millis(200), &mut running).await;
        assert!(early.is_err(), "it ended although all tasks live: {early:?}");
        begin.send(()).unwrap();
        let ended = tokio::time::timeout(3 * STOP_MAX, running).await.expect("it ends");
        let reason = ended.expect_err("that is no success").to_string();
        assert_eq!(reason, "background task \"lookups\" panicked: slot 7 is empty");
    }
}
