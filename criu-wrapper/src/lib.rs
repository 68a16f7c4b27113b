//! CRIU seen from outside: what its logs say, which version it is, what its image directories hold,
//! which pages of a running process it would dump, and which parts of a process it leaves out.
//!
//! A leaf: it knows neither containerd nor Godwit's protocol, and starts CRIU only to ask for its
//! version (runc runs the dumps and restores), and tar as CRIU does ([`tmpfs`]). Read [`log`] for
//! the reason of a failure, [`version`] for what a CRIU can do, [`pagemap`] for memory images and
//! how a child directory refers to its parent, [`live`] for reading pages before any freeze,
//! [`mend`] for what CRIU would restore wrongly from its own images, [`waits`] and [`timers`] for
//! what a freeze disturbs, [`watches`] for paths of what is watched, [`supplement`] for what CRIU
//! leaves out of its images. [`held`] knows what works on a
//! restore and ends it; [`locks`] and [`leftovers`] remove what a CRIU that was killed leaves.

pub mod held;
mod image;
pub mod leftovers;
pub mod links;
pub mod live;
pub mod locks;
pub mod log;
pub mod mend;
pub mod pagemap;
pub mod supplement;
mod sys;
pub mod timers;
pub mod tmpfs;
pub mod version;
pub mod waits;
pub mod watches;
mod wire;
