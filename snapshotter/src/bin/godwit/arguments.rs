//! What can be asked for.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use godwit_protos::FileSystem;
use godwit_snapshotter::config;

/// Moves running containers between nodes.
#[derive(Parser)]
#[command(name = "godwit", version)]
pub(crate) struct Arguments {
    /// The daemon's control socket.
    #[arg(long, global = true, default_value = godwit_protos::path::CONTROL_SOCKET)]
    pub(crate) socket: PathBuf,
    /// containerd's namespace.
    #[arg(short, long, global = true, default_value = "default")]
    pub(crate) namespace: String,
    /// Form of the output.
    #[arg(long, global = true, value_enum, default_value_t = Output::Text)]
    pub(crate) output: Output,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// For people.
    Text,
    /// For programs; docs/protocol.md explains the fields.
    Json,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Move a running container from one node to another.
    Migrate(Migrate),
    /// Print what a migration would cost and what stands in its way, without moving anything.
    Plan(Migrate),
    /// Manage the cached snapshots on this node.
    #[command(subcommand)]
    Snapshot(SnapshotCommand),
    /// Manage the volumes on this node.
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// Decide how a hand-off ended that `godwit status` shows as released or granted and that does
    /// not end by itself.
    Resolve(Resolve),
    /// List the other nodes, and how they respond.
    Peers,
    /// Show this node: versions, what the store holds, and which node owns which container.
    Status,
    /// Follow every migration that this node takes part in.
    Watch,
    /// Free what no snapshot, volume or migration needs any more.
    Sweep,
    /// Read all stored content and report damage: exit code 0 if there is none, 3 if there is.
    Check(Check),
}

#[derive(Args)]
pub(crate) struct Check {
    /// Quarantine damaged content, fetch it again from peers, and lay read-only volumes out again.
    #[arg(long)]
    pub(crate) repair: bool,
    /// The daemon's configuration, which says where the state is while no daemon runs.
    #[arg(long, default_value = config::DEFAULT_PATH)]
    pub(crate) config: PathBuf,
}

#[derive(Args)]
pub(crate) struct Resolve {
    /// The container, as it is called on this node.
    pub(crate) name: String,
    /// Its tasks ran at the destination: the source's copy is given up.
    #[arg(long, required_unless_present = "never_ran", conflicts_with = "never_ran")]
    pub(crate) ran: bool,
    /// Its tasks never ran at the destination: the source runs them again.
    #[arg(long)]
    pub(crate) never_ran: bool,
    /// Do not ask for a confirmation.
    #[arg(long)]
    pub(crate) yes: bool,
}

#[derive(Args)]
pub(crate) struct Migrate {
    /// The container.
    pub(crate) name: String,
    /// Node that runs it.
    #[arg(long)]
    pub(crate) from: String,
    /// Node that is to run it.
    #[arg(long)]
    pub(crate) to: String,
    /// Nodes that the destination fetches from.
    #[arg(long, value_enum, default_value_t = Mode::Cooperative)]
    pub(crate) mode: Mode,
    /// Rounds of pre-copy at most, up to 30; 0 lets the change between rounds decide.
    #[arg(long, default_value_t = 0)]
    pub(crate) max_rounds: u32,
    /// Whether the container's writable layer moves too.
    #[arg(long, value_enum, default_value_t = YesNo::Yes)]
    pub(crate) writable_layer: YesNo,
    /// Network namespace to join at the destination, if not the one of the same path.
    #[arg(long)]
    pub(crate) netns: Option<String>,
}

#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum Mode {
    /// Neighbours first, the source for the rest.
    Cooperative,
    /// The source alone.
    Traditional,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum YesNo {
    Yes,
    No,
}

#[derive(Subcommand)]
pub(crate) enum SnapshotCommand {
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
    /// Start a container on this node from a consistent snapshot, after its host died. What it did
    /// since is lost.
    Restore {
        /// The number of a snapshot of a whole container (`container|...`).
        id: String,
        /// Start it although a peer does not respond or has a stopped one: two of it may run then.
        /// It is never started while a peer says that it runs there.
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
pub(crate) enum VolumeCommand {
    /// Make an empty writable volume.
    Create {
        /// Its id: letters, digits, '_', '.' and '-'.
        id: String,
        /// A directory, or a file with a file system of its own, in which files keep their inode
        /// numbers when they move.
        #[arg(long, value_enum, default_value_t = VolumeKind::Tree)]
        kind: VolumeKind,
        /// Size of a block volume, for example 512M or 10G; only what is written takes room on the
        /// disk.
        #[arg(long, value_parser = size, required_if_eq("kind", "block"))]
        size: Option<u64>,
        /// File system of a block volume: ext4 (the default) or xfs.
        #[arg(long)]
        fs: Option<FileSystem>,
    },
    /// Read a directory or a tar archive and print the digest by which it can be mounted read-only,
    /// here or anywhere.
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
    /// Check that read-only content is what its name says, that the file system of a block volume
    /// is sound, or that all of a tree can be read.
    Verify {
        /// sha256:..., or the id of a volume; no container may use it if it is a block volume.
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
pub(crate) enum VolumeKind {
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
        _ => return Err("expected a number, with K, M, G or T behind it or without".to_owned()),
    };
    let number: u64 = digits.parse().map_err(|error| format!("{error}"))?;
    number.checked_mul(1 << power).ok_or_else(|| "larger than 2^64 - 1 bytes".to_owned())
}
