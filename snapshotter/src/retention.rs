//! What is kept, and what goes.
//!
//! [`record`] is the one way in for snapshots: it makes them durable and then applies the rules. A
//! snapshot that goes frees its space with the next sweep. When the store is beyond its budget, or
//! the disk is short, [`retire_if_full`] sweeps first, and gives up the least useful snapshots only
//! if that is not enough. Pins hold whatever happens; what a migration uses is leased, so a sweep
//! waits for it.

use std::sync::Arc;
use std::time::Duration;

use crate::config::{CacheMemory, mib};
use crate::content::object::Kind;
use crate::host::unix_ms;
use crate::node::Node;
use crate::policy::retain::{Kept, Reason, Removal, Rules, retain};
use crate::store::{Compaction, Snapshot, SnapshotId, StoreError};
use crate::supervise::on_thread;
use crate::volumes::VolumeError;

/// Rounds of giving up and measuring again, at most.
const ROUNDS_MAX: usize = 16;

/// Records snapshots durably and retires what the rules no longer keep. Returns their names.
///
/// Errors: the store's; what was recorded by then stays.
pub fn record(node: &Node, snapshots: &[Snapshot]) -> Result<Vec<SnapshotId>, StoreError> {
    node.store.sync()?;
    let ids = snapshots.iter().map(|one| node.store.record(one)).collect::<Result<Vec<_>, _>>()?;
    retire(node)?;
    Ok(ids)
}

/// Of snapshots that arise by themselves, those that this node keeps: none of memory if it is
/// configured so.
pub fn admitted(node: &Node, mut snapshots: Vec<Snapshot>) -> Vec<Snapshot> {
    if node.config.cache.memory == CacheMemory::Off {
        let plain = [Kind::Tree as u8, Kind::Image as u8];
        snapshots.retain(|one| plain.contains(&one.root_kind));
    }
    snapshots
}

/// Whether the disk has room for caching; not if that cannot be told.
pub fn has_room(node: &Node) -> bool {
    free_bytes(node).is_some_and(|free| free >= mib(node.config.cache.min_free_mib))
}

/// Bytes that are free on the disk of the store, if that can be told.
pub fn free_bytes(node: &Node) -> Option<u64> {
    let stat = nix::sys::statvfs::statvfs(&node.config.state_dir).ok()?;
    Some(stat.blocks_available() * stat.fragment_size())
}

/// Applies the rules of age and number.
fn retire(node: &Node) -> Result<(), StoreError> {
    let kept = kept(node, |_| 0)?;
    give_up(node, &retain(&kept, &node.config.cache.rules(), 0))
}

fn kept(node: &Node, bytes_freed: impl Fn(SnapshotId) -> u64) -> Result<Vec<Kept>, StoreError> {
    let (now, removed) = (unix_ms(), node.store.removed()?);
    let since =
        |then: i64| Duration::from_millis(u64::try_from(now.saturating_sub(then)).unwrap_or(0));
    let all = node.store.all_snapshots()?.into_iter();
    Ok(all
        .map(|(id, snapshot)| {
            let subject = snapshot.subject.to_string();
            let removed_for = removed.get(&subject).map(|at| since(*at));
            Kept {
                id,
                sequence: snapshot.sequence,
                age: snapshot.age(now),
                bytes_freed: bytes_freed(id),
                is_pinned: snapshot.is_pinned,
                is_leased: false,
                subject_exists: removed_for.is_none(),
                removed_for,
                last_used: None,
                subject,
            }
        })
        .collect())
}

fn give_up(node: &Node, removals: &[Removal]) -> Result<(), StoreError> {
    for Removal { id, reason } in removals {
        tracing::info!(%id, ?reason, "retired");
    }
    let ids: Vec<SnapshotId> = removals.iter().map(|removal| removal.id).collect();
    if ids.is_empty() { Ok(()) } else { node.store.remove_snapshots(&ids) }
}

/// What the store lacks for caching, although it gave up all that may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Lack {
    /// Room on the disk, whatever takes it.
    #[error(
        "the disk of the store has less free than `cache.min_free_mib`, and nothing in the store may be given up"
    )]
    Disk,
    /// Room in its budget.
    #[error("the store is beyond `cache.budget_mib`, and nothing in it may be given up")]
    Budget,
}

/// Retires what has expired, and the least useful snapshots if the store is beyond its budget or
/// the disk is short. Returns what is lacking still.
pub async fn retire_if_full(node: &Arc<Node>) -> Option<Lack> {
    let here = node.clone();
    let done = on_thread(move || {
        retire(&here)?;
        match excess(&here)? {
            None => Ok(None),
            Some(_) => make_room(&here),
        }
    });
    match done.await {
        Some(Ok(lack)) => lack,
        Some(Err(error)) => {
            tracing::warn!(error = crate::error::chain(&error), "cannot retire snapshots");
            None
        }
        None => None,
    }
}

/// Bytes that the store holds too many, and for what. A disk that does not tell its room costs
/// nothing.
fn excess(node: &Node) -> Result<Option<(u64, Lack)>, StoreError> {
    let cache = &node.config.cache;
    let over = node.store.usage()?.bytes.saturating_sub(mib(cache.budget_mib));
    let short = free_bytes(node).map_or(0, |free| mib(cache.min_free_mib).saturating_sub(free));
    Ok(worse(over, short))
}

fn worse(over_budget: u64, short_of_disk: u64) -> Option<(u64, Lack)> {
    match (over_budget, short_of_disk) {
        (0, 0) => None,
        (over, short) if short > over => Some((short, Lack::Disk)),
        (over, _) => Some((over, Lack::Budget)),
    }
}

/// Gives up snapshots until the store is within its budget, or nothing is left that may go.
///
/// Snapshots share chunks, so what their removal frees is measured again after each round. Returns
/// what is lacking still.
fn make_room(node: &Node) -> Result<Option<Lack>, VolumeError> {
    for _ in 0..ROUNDS_MAX {
        if let Err(error) = node.sweep(Compaction::Tight) {
            // Leased: users of the store come first.
            tracing::debug!(error = crate::error::chain(&error), "no room is made now");
            return Ok(None);
        }
        let Some((excess, lack)) = excess(node)? else { return Ok(None) };
        let bytes = node.exclusive_bytes()?;
        let kept = kept(node, |id| bytes.get(&id).copied().unwrap_or(0))?;
        let held: u64 = node.store.usage()?.bytes;
        let rules =
            Rules { budget_bytes: Some(held.saturating_sub(excess)), ..node.config.cache.rules() };
        let mut freed = 0;
        let goes: Vec<Removal> = retain(&kept, &rules, held)
            .into_iter()
            .filter(|removal| removal.reason == Reason::OverBudget)
            .take_while(|removal| {
                let is_needed = freed < excess;
                freed += bytes.get(&removal.id).copied().unwrap_or(0);
                is_needed
            })
            .collect();
        if goes.is_empty() {
            return Ok(Some(lack));
        }
        give_up(node, &goes)?;
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_not_called_a_store_beyond_its_budget() {
        assert_eq!(worse(0, 0), None);
        assert_eq!(worse(0, 7), Some((7, Lack::Disk)));
        assert_eq!(worse(3, 7), Some((7, Lack::Disk)));
        assert_eq!(worse(7, 3), Some((7, Lack::Budget)));
        assert!(Lack::Disk.to_string().starts_with("the disk "), "{}", Lack::Disk);
    }
}
