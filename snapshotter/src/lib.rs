//! The node's daemon: what a node holds, which peers it asks, and how a container moves.
//!
//! One process per node. From the disk up:
//!
//! - [`store`]: chunks by digest in packs, snapshots by subject, leases, sweep.
//! - [`content`]: how a file tree or a memory image becomes objects of the store, and back.
//! - [`volumes`]: writable volumes by identity, read-only ones by digest.
//! - [`snapshots`]: containerd's snapshotter service over overlayfs; [`containerd`]: our client of
//!   containerd.
//! - [`layers`]: layers of images from neighbours, while containerd pulls.
//! - [`mirror`]: a read-only registry for this node's containerd.
//! - [`peer`]: what daemons ask each other, and fetching from several of them at once.
//! - [`directory`]: who holds what, asked of the neighbours or of etcd.
//! - [`migrate`]: the procedure itself, both sides; [`ownership`]: who may run a container, and the
//!   journal of it.
//! - [`policy`]: when to capture, where to put copies, what to give up, which peers to ask: pure
//!   rules.
//! - [`check`]: whether all of it is what it should be.
//! - [`api`]: the sockets for shims, for `godwit` and for peers; [`daemon`]: all of it put
//!   together; [`config`]: the daemon's file.

pub mod api;
#[cfg(test)]
mod arrows;
pub mod capture;
pub mod check;
pub mod config;
pub mod containerd;
pub mod daemon;
pub mod directory;
pub mod error;
pub mod host;
pub mod layers;
pub mod migrate;
pub mod mirror;
pub mod node;
pub mod ownership;
pub mod peer;
pub mod retention;
pub mod snapshots;
pub mod supervise;
pub mod volumes;

// Crates of their own, under the names of modules.
pub use godwit_policy as policy;
pub use godwit_store::{content, store};
