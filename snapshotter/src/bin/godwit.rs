//! `godwit`: the command line. It asks this node's daemon over its control socket; run it as root.

use std::io::{IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::{Args, Parser, Subcommand, ValueEnum};
use godwit_protos::FileSystem;
use godwit_protos::control::{
    CheckRequest, Container, ControlClient, CreateSnapshotRequest, CreateVolumeRequest,
    DeleteSnapshotRequest, Empty, ExportVolumeRequest, ImportVolumeRequest, MigrateRequest,
    PinSnapshotRequest, Progress, RemoveVolumeRequest, RestoreSnapshotRequest, Snapshot,
    VerifyVolumeRequest, Volume,
};
use godwit_snapshotter::check;
use godwit_snapshotter::config::{self, Config};
use godwit_snapshotter::migrate::plan::Plan;
use serde_json::json;
use ttrpc::asynchronous::{Client, ClientStreamReceiver};
use ttrpc::context::{Context, with_duration};

/// Longest wait for an answer; a migration of a large container takes its time.
const PATIENCE: Duration = Duration::from_secs(3600);

/// Moves running containers between nodes.
#[derive(Parser)]
#[command(name = "godwit", version)]
struct Arguments {
    /// The daemon's control socket.
    #[arg(long, global = true, default_value = godwit_protos::path::CONTROL_SOCKET)]
    socket: PathBuf,
    /// containerd's namespace.
    #[arg(short, long, global = true, default_value = "default")]
    namespace: String,
    /// Form of the output.
    #[arg(long, global = true, value_enum, default_value_t = Output::Text)]
    output: Output,
    #[command(subcommand)]
    command: Command,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people.
    Text,
    /// For programs; docs/protocol.md explains the fields.
    Json,
}

#[derive(Subcommand)]
enum Command {
    /// Move a running container from one node to another.
    Migrate(Migrate),
    /// Tell what a migration would cost and what stands in its way, before anything moves.
    Plan(Migrate),
    /// What is cached of containers and volumes on this node.
    #[command(subcommand)]
    Snapshot(SnapshotCommand),
    /// Volumes on this node.
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// The nodes that this node knows, and how they answer.
    Peers,
    /// This node: versions, what the store holds, who owns which container.
    Status,
    /// Follow every migration that this node takes part in.
    Watch,
    /// Free what no snapshot, volume or migration needs any more.
    Sweep,
    /// Read all that is kept here and tell what is damaged: exit code 0 if nothing is, 3 if something is.
    Check(Check),
}

#[derive(Args)]
struct Check {
    /// Take what is damaged out of the store, fetch it again from peers, and lay read-only volumes out again.
    #[arg(long)]
    repair: bool,
    /// The daemon's configuration, which says where the state is while no daemon runs.
    #[arg(long, default_value = config::DEFAULT_PATH)]
    config: PathBuf,
}

/// Exit code when damage was found, and is left.
const DAMAGED: u8 = 3;

/// Damage was found and has been told.
#[derive(Debug, thiserror::Error)]
#[error("damage was found")]
struct DamageFound;

#[derive(Args)]
struct Migrate {
    /// The container.
    name: String,
    /// Node that runs it.
    #[arg(long)]
    from: String,
    /// Node that is to run it.
    #[arg(long)]
    to: String,
    /// Whom the destination asks.
    #[arg(long, value_enum, default_value_t = Mode::Cooperative)]
    mode: Mode,
    /// Rounds of pre-copy at most; 0 lets the change between rounds decide.
    #[arg(long, default_value_t = 0)]
    max_rounds: u32,
    /// Whether the container's writable layer moves too.
    #[arg(long, value_enum, default_value_t = YesNo::Yes)]
    writable_layer: YesNo,
    /// Network namespace to join at the destination, if not the one of the same path.
    #[arg(long)]
    netns: Option<String>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Mode {
    /// Neighbours first, the source for the rest.
    Cooperative,
    /// The source alone.
    Traditional,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum YesNo {
    Yes,
    No,
}

#[derive(Subcommand)]
enum SnapshotCommand {
    /// List cached snapshots.
    #[command(alias = "ls")]
    List,
    /// Take a snapshot of a running container's memory, layer and volumes, without stopping it.
    Create {
        /// The container.
        name: String,
        /// Freeze the container meanwhile, and keep what is needed to start it on another node.
        #[arg(long)]
        consistent: bool,
    },
    /// Start a container on this node from a consistent snapshot, after its host died. What it did since is lost.
    Restore {
        /// The number of a snapshot of a whole container (`container|...`).
        id: String,
        /// Start it although a peer does not answer or still has it: there may be two of it then.
        #[arg(long)]
        although_it_may_run_elsewhere: bool,
        /// Network namespace to join, if not the one of the same path.
        #[arg(long)]
        netns: Option<String>,
    },
    /// Show one snapshot.
    Show {
        /// Its number.
        id: String,
    },
    /// Delete a cached snapshot.
    #[command(alias = "rm")]
    Delete {
        /// Its number.
        id: String,
    },
    /// Keep a snapshot until it is unpinned or deleted.
    Pin {
        /// Its number.
        id: String,
    },
    /// Let a snapshot be retired again.
    Unpin {
        /// Its number.
        id: String,
    },
}

#[derive(Subcommand)]
enum VolumeCommand {
    /// Make an empty writable volume.
    Create {
        /// Its id: letters, digits, '_', '.' and '-'.
        id: String,
        /// A directory, or a file with a file system of its own, in which files keep their inode numbers when they move.
        #[arg(long, value_enum, default_value_t = VolumeKind::Tree)]
        kind: VolumeKind,
        /// Size of a block volume, for example 512M or 10G; only what is written takes room on the disk.
        #[arg(long, value_parser = size, required_if_eq("kind", "block"))]
        size: Option<u64>,
        /// File system of a block volume: ext4 (the default) or xfs.
        #[arg(long)]
        fs: Option<FileSystem>,
    },
    /// Read a directory or a tar archive and print the digest by which it can be mounted read-only, here or anywhere.
    Import {
        /// The directory, or the archive: compressed or not.
        from: PathBuf,
    },
    /// Write a copy of a volume into a directory, which must be new or empty.
    Export {
        /// A volume id or sha256:...
        id: String,
        /// The directory.
        directory: PathBuf,
    },
    /// Check that read-only content is what its name says, or that the file system of a block volume is sound.
    Verify {
        /// sha256:..., or the id of a block volume that no container uses.
        id: String,
    },
    /// List volumes.
    #[command(alias = "list")]
    Ls,
    /// Remove a volume.
    Rm {
        /// A volume id or sha256:...
        id: String,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum VolumeKind {
    Tree,
    Block,
}

/// Bytes, or a number of them with K, M, G or T behind it for powers of 1024.
fn size(text: &str) -> Result<u64, String> {
    let end = text.find(|one: char| !one.is_ascii_digit()).unwrap_or(text.len());
    let (digits, unit) = text.split_at(end);
    let power = match unit {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err("a number, with K, M, G or T behind it".to_owned()),
    };
    let number: u64 = digits.parse().map_err(|error| format!("{error}"))?;
    number.checked_mul(1 << power).ok_or_else(|| "more than there can be".to_owned())
}

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
        Command::Peers => peers(&client, &out).await,
        Command::Status => status(&client, &out).await,
        Command::Watch => {
            let mut events = client.watch(deadline(), &Empty::new()).await?;
            while let Some(event) = events.recv().await? {
                out.event(&event)?;
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
    let bar = out.bar();
    while let Some(event) = events.recv().await? {
        match event.step.as_str() {
            "done" => {
                bar.finish_and_clear();
                return out.raw(&event.report_json, &event.text);
            }
            "failed" => {
                bar.finish_and_clear();
                bail!("{name}: {}", event.text);
            }
            "warning" => bar.suspend(|| eprintln!("godwit: warning: {}", event.text)),
            step => bar.set_message(format!("{step}: {}", event.text)),
        }
    }
    bail!("the daemon hung up; `godwit status` on both nodes tells who runs {name}")
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
        json!({"container": container, "state": one.state, "epoch": one.epoch, "peer": one.peer})
    });
    let ownership: Vec<_> = ownership.collect();
    let object = json!({"node": status.node, "version": status.version, "criu_version": status.criu_version,
        "listen": status.listen, "store_bytes": status.store_bytes, "objects": status.objects,
        "directory": status.directory, "ownership": ownership});
    if out.json {
        return out.object(&object, "");
    }
    let criu = if status.criu_version.is_empty() { "not installed" } else { &status.criu_version };
    let listen = if status.listen.is_empty() { "nowhere: no peers" } else { &status.listen };
    let (bytes, objects) = (status.store_bytes, status.objects);
    out.object(
        &object,
        &format!(
            "node {}, godwit {}, CRIU {criu}\nlistening on {listen}\nstore: {objects} objects, {bytes} bytes\ndirectory: {}",
            status.node, status.version, status.directory
        ),
    )?;
    out.table(&ownership, &["container", "state", "epoch", "peer"])
}

fn cell(value: &serde_json::Value) -> String {
    match value {
        serde_json::Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// Where results go: tables and sentences for people, JSON for programs.
struct Out {
    json: bool,
}

impl Out {
    fn raw(&self, json: &str, text: &str) -> anyhow::Result<()> {
        let text = if self.json { json } else { text };
        Ok(writeln!(std::io::stdout(), "{text}")?)
    }

    fn object(&self, object: &serde_json::Value, text: &str) -> anyhow::Result<()> {
        self.raw(&object.to_string(), text)
    }

    /// One object, a line for each field.
    fn fields(&self, object: &serde_json::Value) -> anyhow::Result<()> {
        let lines = object.as_object().into_iter().flatten();
        let lines = lines.map(|(key, value)| format!("{}: {}", key.replace('_', " "), cell(value)));
        self.object(object, &lines.collect::<Vec<_>>().join("\n"))
    }

    fn event(&self, event: &Progress) -> anyhow::Result<()> {
        let object = json!({"migration": event.migration, "step": event.step, "text": event.text});
        self.object(&object, &format!("{} {}: {}", event.migration, event.step, event.text))
    }

    fn table(&self, lines: &[serde_json::Value], columns: &[&str]) -> anyhow::Result<()> {
        if self.json {
            return self.raw(&serde_json::Value::from(lines).to_string(), "");
        }
        let rows: Vec<Vec<String>> = lines
            .iter()
            .map(|line| columns.iter().map(|key| cell(&line[*key])).collect())
            .collect();
        let head: Vec<String> =
            columns.iter().map(|key| key.to_uppercase().replace('_', " ")).collect();
        let widths: Vec<usize> = (0..columns.len())
            .map(|at| rows.iter().chain([&head]).map(|row| row[at].len()).max().unwrap_or(0))
            .collect();
        let mut stdout = std::io::stdout().lock();
        for row in std::iter::once(&head).chain(&rows) {
            let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
            writeln!(stdout, "{}", cells.collect::<Vec<_>>().join("  ").trim_end())?;
        }
        Ok(())
    }

    /// A line that shows what is going on, on a terminal; nothing elsewhere.
    fn bar(&self) -> indicatif::ProgressBar {
        if self.json || !std::io::stderr().is_terminal() {
            return indicatif::ProgressBar::hidden();
        }
        let bar = indicatif::ProgressBar::new_spinner();
        bar.enable_steady_tick(Duration::from_millis(100));
        bar
    }
}
