//! What the simulation takes for granted, and where each figure comes from.
//!
//! *Measured*: a run on test nodes or of the tools themselves, named after the figure. *Assumed*:
//! it was never measured; the range is wide for that reason. Nothing here was chosen by its effect
//! on the comparison: this file is older than the first run that compares policies.

use std::time::Duration;

/// Bytes of a MiB.
pub const MIB: f64 = 1_048_576.0;

/// What a destination takes in at most, in bytes per second. Measured: `RATE_UNKNOWN` of
/// `policy/predict.rs`; 440 MiB in 17 s from a node at 1000 Mbit/s (README.md, `make demo`).
pub const INGEST: f64 = 30e6;

/// What an idle node sends at most, in bytes per second, whatever its link. Measured: zstd at 200
/// to 870 MB/s per core; the lower end.
pub const SERVE: f64 = 200e6;

/// CRIU's dump, and its restore: seconds, and seconds per byte of memory. Measured: `DUMP`,
/// `RESTORE` of `policy/predict.rs`.
pub const DUMP: (f64, f64) = (0.15, 0.7 / (1024.0 * MIB));
/// See [`DUMP`].
pub const RESTORE: (f64, f64) = (0.2, 0.85 / (1024.0 * MIB));

/// Seconds before the first round, and to stage one. Measured: `BEGIN`, `STAGE` of
/// `policy/predict.rs`.
pub const BEGIN: f64 = 0.3;
/// See [`BEGIN`].
pub const STAGE: f64 = 0.15;

/// Bytes per second at which a running container is captured. Measured: zstd at 200 to 870 MB/s per
/// core, hashing at 1.8 GB/s; about the middle.
pub const CAPTURE: f64 = 400e6;

/// Links, in bytes per second, and their share of all nodes. The rates are those that `make demo`
/// (100 and 1000 Mbit/s) and `make bench-peers` (200 Mbit/s) measure with. Assumed: the shares. Up
/// and down alike.
pub const LINKS: [(f64, f64); 3] = [(12.5e6, 0.3), (25e6, 0.3), (125e6, 0.4)];

/// Part of a link that other traffic takes, up to this; drawn again for every node and [`WEATHER`].
/// Assumed.
pub const BACKGROUND_MAX: f64 = 0.8;

/// Runnable tasks per processor besides ours: evenly spread below the first, and for this share of
/// nodes below the second. Drawn again for every node and [`WEATHER`]. Assumed.
pub const LOAD: (f64, f64) = (1.0, 8.0);
/// See [`LOAD`].
pub const LOADED_SHARE: f64 = 0.15;

/// How long background traffic and load of a node stay as they are. Assumed.
pub const WEATHER: Duration = Duration::from_secs(300);

/// What a node says of its load is wrong by up to this share, and what it measured of a rate
/// likewise. Measured: times of equal runs on virtual machines vary by 30%.
pub const NOISE: f64 = 0.3;

/// Share of nodes whose clock is wrong, and by how much at most. Assumed.
pub const WRONG_CLOCKS: (f64, Duration) = (0.02, Duration::from_secs(2 * 3600));

/// Distance between neighbouring nodes, in metres. Assumed: a node per quarter of a town.
pub const SPACING_M: f64 = 1000.0;

/// Round trip: seconds, and seconds per metre. Assumed: a switch or two, and a metropolitan network
/// that is no straight line.
pub const ROUND_TRIP: (f64, f64) = (0.5e-3, 0.2e-6);

/// Bytes on their way from one node to another at once. Measured against: two requests of 128 pages
/// of 4 KiB (`BATCH_OBJECTS` of `peer/queue.rs`).
pub const WINDOW: f64 = MIB;

/// Size of a subject in MiB, and bytes per second that are written to it, each from to, evenly
/// spread by logarithm. Memory and volume span the sizes that `make bench` and `make demo` move (16
/// MiB to 1 GiB, 1 to 10 MiB/s while it is busy); assumed: most are busy less of the time.
pub const MEMORY: ((f64, f64), (f64, f64)) = ((64.0, 1024.0), (0.02, 4.0));
/// See [`MEMORY`].
pub const VOLUME: ((f64, f64), (f64, f64)) = ((32.0, 512.0), (0.01, 1.0));
/// See [`MEMORY`].
pub const LAYER: ((f64, f64), (f64, f64)) = ((4.0, 64.0), (0.001, 0.05));

/// Share of a subject that is ever written again, from to. Measured: successive dumps have 65%
/// (java under load) to 99.9% of their pages in common. Neither the policies nor the model of
/// `policy/predict.rs` know of it.
pub const HOT: (f64, f64) = (0.01, 0.35);

/// Bytes of an object, and of a question for one. Measured: pages of 4 KiB; 32 bytes
/// (docs/adr/0004).
pub const OBJECT: f64 = 4096.0;
/// See [`OBJECT`].
pub const QUESTION: f64 = 32.0;

/// Bytes of a message to or from the directory, for each snapshot that it names. Measured: the
/// record of a snapshot is about 100 bytes (`store/snapshots.rs`), and a key as much.
pub const ENTRY: f64 = 200.0;

/// Periods of captures, the difference that makes one due, and the jitter. Assumed.
pub const PERIOD: (Duration, Duration) = (Duration::from_secs(300), Duration::from_secs(3600));
/// See [`PERIOD`].
pub const TARGET_BYTES: u64 = 64 << 20;
/// See [`PERIOD`].
pub const JITTER: f64 = 0.2;

/// Share of a processor, and bytes per second, that captures may take of a node; and its highest
/// load. Assumed.
pub const CPU_SHARE: f64 = 0.1;
/// See [`CPU_SHARE`].
pub const DISK: u64 = 20_000_000;
/// See [`CPU_SHARE`].
pub const LOAD_MAX: f64 = 2.0;

/// Neighbours that get a copy of each snapshot. Assumed.
pub const COPIES: usize = 2;

/// Snapshots kept of each subject: the default of `keep_last`. Nothing is expired within the
/// simulated time.
pub const KEEP_LAST: usize = 2;

/// Bytes of snapshots per node. Assumed: small enough to matter where a node sees a dozen
/// containers.
pub const BUDGET: u64 = 8 << 30;

/// How often a node retires snapshots. The daemon's own: it sweeps every ten minutes.
pub const SWEEP: Duration = Duration::from_secs(600);

/// Random waypoint: speed in metres per second, and pause in seconds, from to. Assumed: on foot to
/// by car.
pub const WAYPOINT_SPEED: (f64, f64) = (1.0, 12.0);
/// See [`WAYPOINT_SPEED`].
pub const WAYPOINT_PAUSE: (f64, f64) = (0.0, 600.0);
/// Random waypoint: how far the next point is at most, in metres. Assumed: errands, not journeys.
pub const WAYPOINT_RANGE: f64 = 6000.0;

/// Commuters: speed, stay at either end, and distance between the two ends at most. Assumed: a day
/// in fast motion.
pub const COMMUTER_SPEED: (f64, f64) = (4.0, 14.0);
/// See [`COMMUTER_SPEED`].
pub const COMMUTER_STAY: (f64, f64) = (600.0, 2400.0);
/// See [`COMMUTER_SPEED`].
pub const COMMUTER_RANGE: f64 = 8000.0;

/// A container follows its user when another node is nearer by this share. Assumed.
pub const FOLLOW: f64 = 0.2;

/// How often a user's place is looked at. Assumed.
pub const STEP: Duration = Duration::from_secs(10);

/// Simulated time, and how much of it fills the caches and is not counted.
pub const RUN: Duration = Duration::from_secs(2 * 3600);
/// See [`RUN`].
pub const WARM_UP: Duration = Duration::from_secs(1800);

/// Most neighbours that a policy asks for a subject, apart from those that ask one by definition.
pub const ASKED_MAX: usize = godwit_policy::choose::CHOSEN_MAX;
