//! Test nodes: several containerd nodes on one machine, as real as namespaces make them.
//!
//! A [`Bed`] is a set of [`Node`]s on one switch. Each node has its own mount, network, UTS, IPC,
//! PID and cgroup namespaces, a Debian root of its own, its own containerd and
//! `godwit-snapshotter`, and an uplink whose speed can be set and which can be cut. What runs in
//! them is what users run: the binaries of this build, configured by the files under
//! `docs/deploy/`.
//!
//! ```text
//!  gwN-switch (netns)        gwN-edge-a (netns + mount, pid, ... namespaces)
//!  ┌───────────────┐         ┌────────────────────────────────────────────┐
//!  │ sw0 ── edge-a ┼── veth ─┼ uplink ── br0 ── container netns (veth)    │
//!  │  │            │  (TBF   │           containerd, godwit-snapshotter    │
//!  │  ├── edge-b ──┼── both  └────────────────────────────────────────────┘
//!  │  └── client ──┼── ways)   gwN-client (netns): load clients, by thread
//!  └───────────────┘
//! ```
//!
//! A bed takes a free number N and derives every name from it, so that several beds run side by
//! side, also those of other checkouts. It is torn down on drop, panic, exit, SIGINT and SIGTERM;
//! what a killed process leaves, the next bed or `make clean-nodes` removes ([`run`]).
//!
//! Read next: [`root`] for the Debian root, [`images`] for container images made without a
//! registry, [`node`] for what a test can do to a node, [`load`] for the clients that watch a
//! workload.

pub mod bed;
mod cgroups;
pub mod command;
pub mod criu;
pub mod deploy;
pub mod document;
pub mod images;
pub mod ledger;
pub mod load;
pub mod memhog;
mod mirror;
pub mod need;
pub mod neighbours;
pub mod network;
pub mod node;
mod oci;
pub mod pattern;
pub mod place;
pub mod preload;
pub mod random;
pub mod redis;
pub mod registry;
pub mod root;
pub mod run;
pub mod sim;
pub mod steps;
mod sys;
pub mod witness;
pub mod workload;

pub use bed::{Bed, BedOptions};
pub use command::{Background, Finished, Invocation};
pub use node::{Containerd, Node};
