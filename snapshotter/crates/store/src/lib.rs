//! What a node keeps: objects and snapshots in a store, and how files, images and memory become
//! objects and files again.
//!
//! - [`store`]: chunks by digest in packs, snapshots by subject, leases, sweep.
//! - [`content`]: how a file tree or a memory image becomes objects of the store, and back.

pub mod content;
#[cfg(test)]
#[path = "../../disk/src/mounted.rs"]
mod mounted;
pub mod store;
