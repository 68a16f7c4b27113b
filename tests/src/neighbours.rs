//! Neighbours that are of no use, each in its own way: what cooperation must not suffer from.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::Node;
use crate::command::wait_until;

const SOON: Duration = Duration::from_secs(20);

/// Rate of a link that is slow, in Mbit/s.
const SLOW_MBIT: u32 = 2;

/// Where a node keeps objects, and of what form a pack is (docs/formats.md, "The store").
const STORE: &str = "/var/lib/godwit/store";
const PACK_HEADER: usize = 24;
const RECORD_HEADER: usize = 44;

/// What is wrong with a neighbour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bad {
    /// It has nothing.
    Empty,
    /// Its daemon does not run: connections are refused.
    Dead,
    /// Its link is cut: nothing is answered at all.
    Unreachable,
    /// It has everything, behind a slow link.
    Slow,
    /// Every object that it holds has other bytes than its name says.
    Lying,
}

impl Bad {
    /// All kinds.
    pub const ALL: [Self; 5] =
        [Self::Empty, Self::Dead, Self::Unreachable, Self::Slow, Self::Lying];

    /// Its name in reports.
    pub fn word(self) -> String {
        format!("{self:?}").to_lowercase()
    }

    /// Makes a neighbour so.
    pub fn spoil(self, node: &Node) -> Result<()> {
        match self {
            Self::Empty => forget(node),
            Self::Dead => node.kill_daemon(),
            Self::Unreachable => node.cut_link(),
            Self::Slow => node.set_rate(Some(SLOW_MBIT)),
            Self::Lying => {
                // A daemon that runs has its index in memory, but reads every object from the disk.
                let packs = node.path(STORE).join("packs");
                for pack in fs::read_dir(&packs).with_context(|| packs.display().to_string())? {
                    falsify(&pack?.path())?;
                }
                Ok(())
            }
        }
    }

    /// Makes a neighbour good again, with a link of `mbit`. A liar forgets what it held.
    pub fn heal(self, node: &Node, mbit: u32) -> Result<()> {
        match self {
            Self::Empty => Ok(()),
            Self::Dead => start(node),
            Self::Unreachable => node.mend_link(),
            Self::Slow => node.set_rate(Some(mbit)),
            Self::Lying => forget(node),
        }
    }
}

/// Empties the store of a node on which no container of ours runs.
pub fn forget(node: &Node) -> Result<()> {
    node.stop_daemon()?;
    node.sh(&format!("rm -rf {STORE} /var/lib/godwit/peers.json"))?;
    start(node)
}

/// Starts the daemon and waits until containerd has found it again, which it tries less and less
/// often.
pub fn start(node: &Node) -> Result<()> {
    node.start_daemon()?;
    wait_until("containerd reaches the snapshotter", SOON, || {
        Ok(node.run(&["ctr", "snapshots", "--snapshotter", "godwit", "ls"])?.succeeded())
    })
}

/// Changes a byte of every record of a pack.
fn falsify(pack: &Path) -> Result<()> {
    let mut bytes = fs::read(pack)?;
    let mut at = PACK_HEADER;
    while let Some(length) = bytes.get(at..at + 4).and_then(|four| four.first_chunk()) {
        let length = u32::from_le_bytes(*length) as usize;
        // Of what is stored compressed the last byte: the frame still looks like one.
        let Some(last) = bytes.get_mut(at + RECORD_HEADER + length - 1) else { break };
        *last ^= 0x55;
        at += RECORD_HEADER + length;
    }
    Ok(fs::write(pack, bytes)?)
}
