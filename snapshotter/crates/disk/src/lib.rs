//! What the daemon's parts need of the disk.
//!
//! - [`database`]: opens and creates databases; commits that do not wait for the disk.
//! - [`step`]: crash points of the procedures on disk.
//! - [`trees`]: removes and walks file trees that containers made; [`leftovers`]: what could not be
//!   removed.
//! - [`inode`]: inode flags and project IDs; [`sys`]: system calls that no crate has.

pub mod database;
pub mod inode;
pub mod leftovers;
#[cfg(test)]
mod mounted;
pub mod step;
pub mod sys;
pub mod trees;
