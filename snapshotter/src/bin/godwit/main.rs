//! `godwit`: the command line. It asks this node's daemon over its control socket; run it as root.

mod arguments;
mod output;

use std::io::Write as _;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail};
use arguments::{
    Arguments, Command, Migrate, Mode, Output, Resolve, SnapshotCommand, VolumeCommand, VolumeKind,
    YesNo,
};
use clap::Parser as _;
use godwit_protos::control::{
    CheckRequest, Container, ControlClient, CreateSnapshotRequest, CreateVolumeRequest,
    DeleteSnapshotRequest, Empty, ExportVolumeRequest, ImportVolumeRequest, MigrateRequest,
    Ownership, PinSnapshotRequest, Progress, RemoveVolumeRequest, ResolveRequest,
    RestoreSnapshotRequest, Snapshot, StatusResponse, Verdict, VerifyVolumeRequest, Volume,
};
use godwit_protos::{FileSystem, SNAPSHOTTER};
use godwit_snapshotter::check;
use godwit_snapshotter::config::Config;
use godwit_snapshotter::migrate::plan::Plan;
use output::Out;
use serde_json::json;
use ttrpc::asynchronous::{Client, ClientStreamReceiver};
use ttrpc::context::{Context, with_duration};

/// Longest wait for an answer; a migration of a large container takes its time.
const PATIENCE: Duration = Duration::from_secs(3600);

/// Exit code when damage was found, and is left.
const DAMAGED: u8 = 3;

/// Exit code when it is not known yet where a container runs.
const UNDECIDED: u8 = 4;

/// A migration whose outcome is not known yet.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Undecided(String);

/// Damage was found and has been told.
#[derive(Debug, thiserror::Error)]
#[error("damage was found")]
struct DamageFound;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match run(Arguments::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // A reader that went away is no error of ours.
            let broken = error.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
            if broken == Some(std::io::ErrorKind::BrokenPipe) {
                return ExitCode::SUCCESS;
            }
            if error.is::<DamageFound>() {
                return ExitCode::from(DAMAGED);
            }
            eprintln!("godwit: {}", words(&error));
            if error.is::<Undecided>() {
                return ExitCode::from(UNDECIDED);
            }
            ExitCode::FAILURE
        }
    }
}

/// The chain of an error; of an RPC only what the daemon said.
fn words(error: &anyhow::Error) -> String {
    error
        .chain()
        .map(|cause| match cause.downcast_ref::<ttrpc::Error>() {
            Some(ttrpc::Error::RpcStatus(status)) => status.message().to_owned(),
            _ => cause.to_string(),
        })
        .collect::<Vec<_>>()
        .join(": ")
}

fn deadline() -> Context {
    with_duration(PATIENCE)
}

async fn run(arguments: Arguments) -> anyhow::Result<()> {
    let socket = arguments.socket.display();
    let client = Client::connect(&format!("unix://{socket}")).await;
    let out = Out { json: arguments.output == Output::Json };
    if let (Err(_), Command::Check(asked)) = (&client, &arguments.command) {
        let config = Config::read(&asked.config)?;
        return checked(&check::offline(&config, asked.repair)?, &out);
    }
    let client = client.with_context(|| {
        format!("no daemon at {socket}; is godwit-snapshotter running, and are you root?")
    })?;
    let client = ControlClient::new(client);
    match arguments.command {
        Command::Check(asked) => {
            let mut request = CheckRequest::new();
            request.repair = asked.repair;
            let json = client.check(deadline(), &request).await?.report_json;
            checked(&serde_json::from_str(&json).context("the report cannot be read")?, &out)
        }
        Command::Migrate(asked) => migrate(&client, &arguments.namespace, asked, &out).await,
        Command::Plan(asked) => plan(&client, &arguments.namespace, asked, &out).await,
        Command::Snapshot(command) => snapshot(&client, &arguments.namespace, command, &out).await,
        Command::Volume(command) => volume(&client, command, &out).await,
        Command::Resolve(asked) => resolve(&client, &arguments.namespace, asked).await,
        Command::Peers => peers(&client, &out).await,
        Command::Status => status(&client, &out).await,
        Command::Watch => {
            let mut events = client.watch(deadline(), &Empty::new()).await?;
            while let Some(event) = events.recv().await? {
                if event.step != "progress" {
                    out.event(&event)?;
                }
            }
            Ok(())
        }
        Command::Sweep => {
            let done = client.sweep(deadline(), &Empty::new()).await?;
            let (freed, kept) = (done.freed_bytes, done.kept_objects);
            out.object(
                &json!({"freed_bytes": freed, "kept_objects": kept}),
                &format!("freed {freed} bytes, {kept} objects kept"),
            )
        }
    }
}

fn checked(report: &check::Report, out: &Out) -> anyhow::Result<()> {
    out.raw(&serde_json::to_string(report)?, &report.to_string())?;
    if report.is_whole() { Ok(()) } else { Err(DamageFound.into()) }
}

fn container(namespace: &str, id: String) -> Container {
    let mut container = Container::new();
    container.namespace = namespace.to_owned();
    container.id = id;
    container
}

fn request(namespace: &str, asked: &Migrate) -> MigrateRequest {
    let mut request = MigrateRequest::new();
    request.container = Some(container(namespace, asked.name.clone())).into();
    request.from = asked.from.clone();
    request.to = asked.to.clone();
    request.mode = match asked.mode {
        Mode::Cooperative => "cooperative",
        Mode::Traditional => "traditional",
    }
    .to_owned();
    request.max_rounds = asked.max_rounds;
    request.without_writable_layer = asked.writable_layer == YesNo::No;
    request.netns = asked.netns.clone().unwrap_or_default();
    request
}

async fn plan(
    client: &ControlClient,
    namespace: &str,
    asked: Migrate,
    out: &Out,
) -> anyhow::Result<()> {
    let json = client.plan(deadline(), &request(namespace, &asked)).await?.plan_json;
    let plan: Plan = serde_json::from_str(&json).context("the daemon's plan cannot be read")?;
    out.raw(&json, plan.to_string().trim_end())?;
    if plan.obstacles.is_empty() {
        return Ok(());
    }
    bail!("{} cannot be moved: {}", asked.name, plan.obstacles.join("; "))
}

async fn migrate(
    client: &ControlClient,
    namespace: &str,
    asked: Migrate,
    out: &Out,
) -> anyhow::Result<()> {
    let request = request(namespace, &asked);
    let mut events = client.migrate(deadline(), &request).await?;
    follow(&mut events, &asked.name, out).await
}

/// Shows how something goes, to its end.
async fn follow(
    events: &mut ClientStreamReceiver<Progress>,
    name: &str,
    out: &Out,
) -> anyhow::Result<()> {
    let (bar, mut has_begun) = (out.bar(), false);
    loop {
        let event = tokio::select! {
            event = events.recv() => event,
            _ = tokio::signal::ctrl_c() => {
                bar.finish_and_clear();
                let text = format!(
                    "interrupted: the daemons go on with {name}; `godwit watch` on the destination shows the steps, \
                     and `godwit status` on both nodes who owns it"
                );
                return Err(Undecided(text).into());
            }
        };
        let event = match event {
            Ok(Some(event)) => event,
            // Whatever was refused was refused before the first event.
            Err(error) if !has_begun => return Err(error.into()),
            lost => {
                bar.finish_and_clear();
                let reason = lost.err().map(|error| format!(" ({error})")).unwrap_or_default();
                let text = format!(
                    "{name}: undecided: the daemon was lost{reason}, and may go on; `godwit status` on both nodes \
                     tells who runs it"
                );
                return Err(Undecided(text).into());
            }
        };
        has_begun = true;
        match event.step.as_str() {
            "progress" => bar.set_position(event.done_bytes),
            "done" => {
                bar.finish_and_clear();
                return out.raw(&event.report_json, &event.text);
            }
            "failed" => {
                bar.finish_and_clear();
                let text = format!("{name}: {}", event.text);
                return Err(if event.undecided {
                    Undecided(text).into()
                } else {
                    anyhow::anyhow!(text)
                });
            }
            "warning" => bar.suspend(|| eprintln!("godwit: warning: {}", event.text)),
            step => bar.set_message(format!("{step}: {}", event.text)),
        }
    }
}

async fn snapshot(
    client: &ControlClient,
    namespace: &str,
    command: SnapshotCommand,
    out: &Out,
) -> anyhow::Result<()> {
    let mut pin = PinSnapshotRequest::new();
    let listed = match command {
        SnapshotCommand::List => client.list_snapshots(deadline(), &Empty::new()).await?,
        SnapshotCommand::Show { id } => {
            let listed = client.list_snapshots(deadline(), &Empty::new()).await?;
            let found = listed.snapshots.iter().find(|one| one.id == id);
            let found = found.with_context(|| format!("no snapshot {id} on this node"))?;
            return out.fields(&snapshot_line(found));
        }
        SnapshotCommand::Restore { id, although_it_may_run_elsewhere, netns } => {
            let mut request = RestoreSnapshotRequest::new();
            request.id.clone_from(&id);
            request.although_it_may_run_elsewhere = although_it_may_run_elsewhere;
            request.netns = netns.unwrap_or_default();
            let mut events = client.restore_snapshot(deadline(), &request).await?;
            return follow(&mut events, &format!("snapshot {id}"), out).await;
        }
        SnapshotCommand::Pin { id } => {
            (pin.id, pin.pinned) = (id, true);
            return Ok(client.pin_snapshot(deadline(), &pin).await.map(drop)?);
        }
        SnapshotCommand::Unpin { id } => {
            pin.id = id;
            return Ok(client.pin_snapshot(deadline(), &pin).await.map(drop)?);
        }
        SnapshotCommand::Create { name, consistent } => {
            let mut request = CreateSnapshotRequest::new();
            request.container = Some(container(namespace, name)).into();
            request.consistent = consistent;
            client.create_snapshot(deadline(), &request).await?
        }
        SnapshotCommand::Delete { id } => {
            let mut request = DeleteSnapshotRequest::new();
            request.id = id;
            client.delete_snapshot(deadline(), &request).await?;
            return Ok(());
        }
    };
    let columns = ["id", "subject", "sequence", "age_s", "size_bytes", "node", "pinned"];
    out.table(&listed.snapshots.iter().map(snapshot_line).collect::<Vec<_>>(), &columns)
}

fn snapshot_line(one: &Snapshot) -> serde_json::Value {
    json!({"id": one.id, "subject": one.subject, "sequence": one.sequence, "taken_at_unix_ms": one.taken_at_unix_ms,
        "age_s": one.age_ms / 1000, "manifest": one.manifest, "size_bytes": one.size_bytes, "node": one.node,
        "pinned": one.pinned})
}

async fn volume(client: &ControlClient, command: VolumeCommand, out: &Out) -> anyhow::Result<()> {
    let line = |one: &Volume| {
        let kind = if one.file_system.is_empty() { "tree" } else { "block" };
        json!({"id": one.id, "kind": kind, "file_system": one.file_system, "size_bytes": one.size_bytes,
            "read_only": one.read_only, "path": one.path})
    };
    match command {
        VolumeCommand::Create { id, kind, size, fs } => {
            let mut request = CreateVolumeRequest::new();
            request.id = id;
            match kind {
                VolumeKind::Tree if size.is_some() || fs.is_some() => {
                    bail!("--size and --fs are for --kind block");
                }
                VolumeKind::Tree => {}
                VolumeKind::Block => {
                    request.file_system = fs.unwrap_or(FileSystem::Ext4).to_string();
                    request.size_bytes = size.unwrap_or_default();
                }
            }
            let made = client.create_volume(deadline(), &request).await?;
            out.object(&line(&made), &made.id)
        }
        VolumeCommand::Import { from } => {
            let mut request = ImportVolumeRequest::new();
            let path = std::path::absolute(&from)?;
            request.path = path.to_string_lossy().into_owned();
            let made = client.import_volume(deadline(), &request).await?;
            out.object(&line(&made), &made.id)
        }
        VolumeCommand::Export { id, directory } => {
            let mut request = ExportVolumeRequest::new();
            request.id = id;
            let path = std::path::absolute(&directory)?;
            request.directory = path.to_string_lossy().into_owned();
            Ok(client.export_volume(deadline(), &request).await.map(drop)?)
        }
        VolumeCommand::Verify { id } => {
            let mut request = VerifyVolumeRequest::new();
            request.id = id;
            Ok(client.verify_volume(deadline(), &request).await.map(drop)?)
        }
        VolumeCommand::Ls => {
            let listed = client.list_volumes(deadline(), &Empty::new()).await?;
            let lines: Vec<_> = listed.volumes.iter().map(line).collect();
            out.table(&lines, &["id", "kind", "read_only", "path"])
        }
        VolumeCommand::Rm { id } => {
            let mut request = RemoveVolumeRequest::new();
            request.id = id;
            client.remove_volume(deadline(), &request).await?;
            Ok(())
        }
    }
}

/// Shows what both nodes know and what could go wrong, asks, and ends the hand-off.
async fn resolve(client: &ControlClient, namespace: &str, asked: Resolve) -> anyhow::Result<()> {
    let mut request = ResolveRequest::new();
    request.container = Some(container(namespace, asked.name.clone())).into();
    let verdict = if asked.ran { Verdict::VERDICT_RAN } else { Verdict::VERDICT_NEVER_RAN };
    request.verdict = verdict.into();
    let known = client.resolve(deadline(), &request).await?;
    println!("{namespace}/{}, epoch {}", asked.name, known.epoch);
    println!("  this node says:  {}", known.here);
    println!("  {} says:  {}", known.peer, known.there);
    println!("then {}", known.risk);
    if !asked.yes {
        print!("type the container's name to go on: ");
        std::io::stdout().flush()?;
        let mut typed = String::new();
        std::io::stdin().read_line(&mut typed)?;
        if typed.trim() != asked.name {
            bail!("not confirmed; nothing was changed");
        }
    }
    request.is_confirmed = true;
    client.resolve(deadline(), &request).await?;
    println!("done");
    Ok(())
}

fn state_word(state: Ownership) -> &'static str {
    match state {
        Ownership::OWNERSHIP_UNSPECIFIED => "unknown",
        Ownership::OWNERSHIP_OWNER => "owner",
        Ownership::OWNERSHIP_OFFERED => "offered",
        Ownership::OWNERSHIP_RELEASED => "released",
        Ownership::OWNERSHIP_MOVED => "moved",
        Ownership::OWNERSHIP_CLAIMING => "claiming",
        Ownership::OWNERSHIP_GRANTED => "granted",
    }
}

async fn peers(client: &ControlClient, out: &Out) -> anyhow::Result<()> {
    let listed = client.list_peers(deadline(), &Empty::new()).await?;
    let line = |one: &godwit_protos::control::Peer| {
        let mib = one.throughput_bytes_per_second / f64::from(1 << 20);
        json!({"name": one.name, "address": one.address, "reachable": one.reachable,
            "round_trip_ms": (one.round_trip_ms * 100.0).round() / 100.0, "load": one.load,
            "throughput_mib_per_second": (mib * 10.0).round() / 10.0, "detail": one.detail})
    };
    let columns = [
        "name",
        "address",
        "reachable",
        "round_trip_ms",
        "load",
        "throughput_mib_per_second",
        "detail",
    ];
    out.table(&listed.peers.iter().map(line).collect::<Vec<_>>(), &columns)
}

async fn status(client: &ControlClient, out: &Out) -> anyhow::Result<()> {
    let status = client.status(deadline(), &Empty::new()).await?;
    let ownership = status.ownership.iter().map(|one| {
        let container = format!("{}/{}", one.container.namespace, one.container.id);
        let state = state_word(one.state.enum_value_or_default());
        json!({"container": container, "state": state, "epoch": one.epoch, "peer": one.peer})
    });
    let ownership: Vec<_> = ownership.collect();
    let object = json!({"node": status.node, "version": status.version, "criu_version": status.criu_version,
        "listen": status.listen, "store_bytes": status.store_bytes, "objects": status.objects,
        "directory": status.directory, "containerd_version": status.containerd_version,
        "snapshotter_is_registered": status.snapshotter_is_registered, "leftovers": status.leftovers,
        "failures": status.failures, "leases": status.leases, "ownership": ownership});
    if out.json {
        return out.object(&object, "");
    }
    let criu = if status.criu_version.is_empty() { "not installed" } else { &status.criu_version };
    let listen = if status.listen.is_empty() { "nowhere: no peers" } else { &status.listen };
    let (bytes, objects) = (status.store_bytes, status.objects);
    let lines = [
        format!("node {}, godwit {}, CRIU {criu}", status.node, status.version),
        containerd_line(&status),
        format!("listening on {listen}"),
        format!("store: {objects} objects, {bytes} bytes"),
        format!("directory: {}", status.directory),
    ];
    let leftovers = status.leftovers.iter().map(|leftover| format!("left over: {leftover}"));
    let failures = status.failures.iter().map(|failure| format!("FAILED: {failure}"));
    let leases = status.leases.iter().map(|lease| format!("in progress: {lease}"));
    let lines: Vec<_> = lines.into_iter().chain(failures).chain(leftovers).chain(leases).collect();
    out.object(&object, &lines.join("\n"))?;
    out.table(&ownership, &["container", "state", "epoch", "peer"])
}

fn containerd_line(status: &StatusResponse) -> String {
    let version = &status.containerd_version;
    match (version.as_str(), status.snapshotter_is_registered) {
        ("", _) => "containerd does not answer".to_owned(),
        (_, true) => format!("containerd {version} has the snapshotter {SNAPSHOTTER:?}"),
        (_, false) => format!(
            "containerd {version} has NO snapshotter {SNAPSHOTTER:?}: its configuration lacks Godwit's file, \
             or has the `imports` line below a table"
        ),
    }
}
