//! Sweeping: mark from the snapshots, remove what was not marked, give the space back.
//!
//! 1. list snapshots and extra roots, and mark everything that hangs on them;
//! 2. take [`super::lease::Leases::exclusive`]: no lease is live and nothing has changed since
//!    before step 1;
//! 3. remove unmarked entries from the index, durably, together with the packs in which none is
//!    left;
//! 4. let leases be taken again; unlink the empty packs;
//! 5. copy what lives in packs that are less alive than [`Compaction`] asks for into the active
//!    pack, 6. commit the new places durably without the old packs, 7. unlink the old packs.
//!
//! On open: packs that the index does not name are deleted, which finishes steps 4 and 7; copies of
//! step 5 without step 6 lie behind what the index knows and are cut off, or are dead weight.
//!
//! Fails closed: if a snapshot, a root or anything but a leaf cannot be read, nothing is removed.
//! If in step 5 a record cannot be read, its pack stays as it is.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::Ordering;

use godwit_protos::Digest;
use redb::ReadableTable as _;

use super::index::{self, Location};
use super::{Inner, Mismatch, SnapshotId, Store, StoreError, pack};
use godwit_disk::step;

/// Records copied to another pack at once, in bytes.
const COPY_BYTES: usize = 4 << 20;

/// How much of a pack may be dead before what lives in it is copied elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compaction {
    /// Half: copying costs less than what it gives back.
    Usual,
    /// A tenth: space is short.
    Tight,
}

impl Compaction {
    fn live_percent_min(self) -> u64 {
        match self {
            Self::Usual => 50,
            Self::Tight => 90,
        }
    }
}

/// Kinds and digests of what an object refers to, from its kind and its bytes.
pub type Children<'a, E> = &'a dyn Fn(u8, &[u8]) -> Result<Vec<(u8, Digest)>, E>;

/// Kinds and digests of what is kept although no snapshot names it.
pub type Roots<'a, E> = &'a dyn Fn() -> Result<Vec<(u8, Digest)>, E>;

/// Why nothing was removed.
#[derive(Debug, thiserror::Error)]
pub enum SweepError<E: std::error::Error + 'static> {
    /// Someone is using the store. Try again later.
    #[error("the store is leased by {}", .0.join(", "))]
    Leased(Vec<String>),
    /// Someone began to use the store while it was being marked. Try again later.
    #[error("the store was used while it was being marked")]
    Disturbed,
    /// It is not known what else is kept.
    #[error("roots that no snapshot names")]
    Roots(#[source] E),
    /// A root or an inner object is not in the store, so that what hangs on it is unknown.
    #[error("object {0} is marked but missing")]
    Missing(Digest),
    /// An inner object is there but the caller cannot read it.
    #[error("children of object {digest}")]
    Children {
        /// The object.
        digest: Digest,
        /// What the caller said.
        #[source]
        source: E,
    },
    /// The store itself failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// What a sweep did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SweepReport {
    /// Objects still in the store.
    pub objects_kept: u64,
    /// Objects removed.
    pub objects_removed: u64,
    /// Packs given back whole, or after what lived in them was copied.
    pub packs_removed: u64,
    /// Packs that should have been rewritten but hold something unreadable.
    pub packs_unreadable: u64,
    /// Bytes of the packs that were removed, less the bytes that were copied.
    pub bytes_freed: u64,
}

/// Reached objects. Of leaves, by far the most, only a prefix is kept: a collision keeps an object
/// that could go.
#[derive(Default)]
struct Marks {
    inner: HashSet<Digest>,
    leaves: HashSet<u64>,
}

impl Marks {
    fn has(&self, digest: &Digest) -> bool {
        self.leaves.contains(&prefix(digest)) || self.inner.contains(digest)
    }
}

fn prefix(digest: &Digest) -> u64 {
    digest.as_bytes().first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

/// What step 3 leaves to do for the later ones.
struct Census {
    compaction: Compaction,
    report: SweepReport,
    /// Bytes in records that live, by pack.
    live: BTreeMap<u32, u64>,
    /// Bytes of each pack that the index knows.
    ends: BTreeMap<u32, u32>,
    /// Packs below this number are complete, and no writer has anything pending in them.
    closed_below: u32,
    /// How often the index had been reopened.
    reopened: u64,
}

impl Census {
    fn live_in(&self, pack: u32) -> u64 {
        self.live.get(&pack).copied().unwrap_or(0)
    }

    fn is_worth_rewriting(&self, pack: u32) -> bool {
        self.ends.get(&pack).is_none_or(|end| {
            self.live_in(pack) * 100 < u64::from(*end) * self.compaction.live_percent_min()
        })
    }

    /// Numbers and lengths of the closed packs that are worth rewriting.
    fn worth_rewriting(&self) -> impl Iterator<Item = (u32, u32)> {
        let closed = self.ends.range(..self.closed_below);
        closed.filter(|(pack, _)| self.is_worth_rewriting(**pack)).map(|(pack, end)| (*pack, *end))
    }
}

/// A record that is to be, or was, copied to another pack.
struct Move {
    digest: Digest,
    from: Location,
    to: Location,
}

impl Store {
    /// Removes every object that hangs neither on a snapshot nor on one of `extra_roots`.
    ///
    /// - `extra_roots` is asked once it is known that no lease is live: a caller that names a root
    ///   and then lets go of its lease is either in the answer, or noticed in step 2.
    /// - `children` gives kinds and digests of what an object of some kind refers to; its bytes
    ///   have been verified.
    /// - `is_leaf` says of which kinds the objects refer to nothing; they are not read.
    /// - `compaction` says which packs are rewritten.
    /// - Errors: [`SweepError`]; nothing was removed, except that after a full disk in the last
    ///   steps the space of some dead objects is not given back yet.
    pub fn sweep<E: std::error::Error + 'static>(
        &self,
        children: Children<'_, E>,
        is_leaf: fn(u8) -> bool,
        extra_roots: Roots<'_, E>,
        compaction: Compaction,
    ) -> Result<SweepReport, SweepError<E>> {
        let inner = &*self.inner;
        inner.index.heal()?;
        let (generation, reopened) = (inner.leases.generation(), inner.index.generation());
        let leased = inner.leases.names();
        if !leased.is_empty() {
            return Err(SweepError::Leased(leased));
        }
        let mut roots = extra_roots().map_err(SweepError::Roots)?;
        roots.extend(self.all_snapshots()?.iter().map(|(_, one)| (one.root_kind, one.root)));
        let marks = self.mark(roots, children, is_leaf)?;
        let mut census = {
            let Some(_guard) = inner.leases.exclusive(generation) else {
                return Err(SweepError::Disturbed);
            };
            inner.remove_unmarked(&marks, compaction, reopened)?
        };
        inner.give_space_back(&mut census)?;
        Ok(census.report)
    }

    /// For each snapshot the bytes of the records that hang on it alone, which its removal frees.
    ///
    /// Errors: as of [`Self::sweep`], when something that is marked cannot be read.
    pub fn exclusive_bytes<E: std::error::Error + 'static>(
        &self,
        children: Children<'_, E>,
        is_leaf: fn(u8) -> bool,
        extra_roots: &[(u8, Digest)],
    ) -> Result<BTreeMap<SnapshotId, u64>, SweepError<E>> {
        let snapshots = self.all_snapshots()?;
        let others = self.mark(extra_roots.to_vec(), children, is_leaf)?;
        // By prefix, as marks are: the snapshot that it hangs on, or none if there are several.
        let mut owners: HashMap<u64, Option<SnapshotId>> = HashMap::new();
        for (id, snapshot) in &snapshots {
            let root = vec![(snapshot.root_kind, snapshot.root)];
            let marks = self.mark(root, children, is_leaf)?;
            for one in marks.inner.iter().map(prefix).chain(marks.leaves) {
                let owner = owners.entry(one).or_insert(Some(*id));
                if *owner != Some(*id) {
                    *owner = None;
                }
            }
        }
        let mut bytes: BTreeMap<SnapshotId, u64> =
            snapshots.iter().map(|(id, _)| (*id, 0)).collect();
        for entry in self.inner.index.objects()?.iter().map_err(StoreError::from)? {
            let (digest, entry) = entry.map_err(StoreError::from)?;
            let digest = Digest::from_bytes(*digest.value());
            let owner = owners.get(&prefix(&digest)).copied().flatten();
            let (Some(owner), Some(at)) = (owner, Location::from_bytes(entry.value())) else {
                continue;
            };
            if !others.has(&digest) {
                *bytes.entry(owner).or_default() += at.record_len() as u64;
            }
        }
        Ok(bytes)
    }

    fn mark<E: std::error::Error + 'static>(
        &self,
        mut todo: Vec<(u8, Digest)>,
        children: Children<'_, E>,
        is_leaf: fn(u8) -> bool,
    ) -> Result<Marks, SweepError<E>> {
        let mut marks = Marks::default();
        // An object may be reached as more than one kind; each has its own children.
        let mut visited = HashSet::new();
        while let Some((kind, digest)) = todo.pop() {
            if is_leaf(kind) {
                marks.leaves.insert(prefix(&digest));
                continue;
            }
            if !visited.insert((kind, digest)) {
                continue;
            }
            marks.inner.insert(digest);
            if !self.verify(&digest)? {
                return Err(SweepError::Missing(digest));
            }
            let bytes = self.get(&digest)?.ok_or(SweepError::Missing(digest))?;
            let below = children(kind, &bytes);
            todo.extend(below.map_err(|source| SweepError::Children { digest, source })?);
        }
        Ok(marks)
    }
}

impl Inner {
    /// Step 3. Called with leases excluded.
    fn remove_unmarked(
        &self,
        marks: &Marks,
        compaction: Compaction,
        reopened: u64,
    ) -> Result<Census, StoreError> {
        let write = self.index.begin_write_of(reopened)?;
        let mut census = retain_marked(&write, marks, compaction)?;
        census.reopened = reopened;
        {
            let mut packs = write.open_table(index::PACKS)?;
            for entry in packs.iter()? {
                let (pack, end) = entry?;
                census.ends.insert(pack.value(), end.value());
            }
            // Leases are excluded, so no writer has anything pending in a pack that is closed by
            // now.
            if self.packs.active().is_some_and(|active| census.is_worth_rewriting(active)) {
                self.packs.close_active();
            }
            census.closed_below = self.packs.closed_below();
            for (pack, _) in census.worth_rewriting().filter(|(pack, _)| census.live_in(*pack) == 0)
            {
                packs.remove(pack)?;
            }
        }
        step::reach("before the unmarked are removed");
        self.index.commit_durable(write, &self.packs)?;
        self.removals.fetch_add(1, Ordering::Release);
        Ok(census)
    }

    /// Steps 4 to 7.
    fn give_space_back(&self, census: &mut Census) -> Result<(), StoreError> {
        let dead: Vec<(u32, u32)> = census.worth_rewriting().collect();
        let (empty, sparse): (Vec<_>, Vec<_>) =
            dead.into_iter().partition(|(pack, _)| census.live_in(*pack) == 0);
        for (pack, end) in empty {
            step::reach("before an empty pack is unlinked");
            self.packs.remove(pack)?;
            census.report.packs_removed += 1;
            census.report.bytes_freed += u64::from(end);
        }
        let mut moves = self.records_in(&sparse)?;
        for (pack, end) in sparse {
            let mut moves = moves.remove(&pack).unwrap_or_default();
            if !self.copy(&mut moves, census.reopened)? {
                census.report.packs_unreadable += 1;
                continue;
            }
            step::reach("before the copies are committed");
            self.commit_moves(pack, &moves, census.reopened)?;
            step::reach("before the old pack is unlinked");
            self.packs.remove(pack)?;
            let copied: u64 = moves.iter().map(|one| one.to.record_len() as u64).sum();
            census.report.packs_removed += 1;
            census.report.bytes_freed += u64::from(end).saturating_sub(copied);
        }
        Ok(())
    }

    /// What lives in `packs`, by pack, in the order in which it lies there.
    fn records_in(&self, packs: &[(u32, u32)]) -> Result<BTreeMap<u32, Vec<Move>>, StoreError> {
        let mut moves: BTreeMap<u32, Vec<Move>> =
            packs.iter().map(|(pack, _)| (*pack, Vec::new())).collect();
        if moves.is_empty() {
            return Ok(moves);
        }
        for entry in self.index.objects()?.iter()? {
            let (digest, entry) = entry?;
            let Some(from) = Location::from_bytes(entry.value()) else { continue };
            if let Some(moves) = moves.get_mut(&from.pack) {
                moves.push(Move { digest: Digest::from_bytes(*digest.value()), from, to: from });
            }
        }
        for moves in moves.values_mut() {
            moves.sort_unstable_by_key(|one| one.from.offset);
        }
        Ok(moves)
    }

    /// Step 5: appends copies and notes where they are. `false` if a record cannot be read.
    fn copy(&self, moves: &mut [Move], reopened: u64) -> Result<bool, StoreError> {
        let mut rest = moves;
        while !rest.is_empty() {
            let mut records = Vec::new();
            let mut count = 0;
            while count < rest.len() && records.len() < COPY_BYTES {
                let Move { digest, from, to } = &mut rest[count];
                let record = self.packs.read(from.pack, from.offset, from.record_len())?;
                let record = record.unwrap_or_default();
                if pack::parse_record(&record, digest, from).is_err() {
                    return Ok(false);
                }
                to.offset = u32::try_from(records.len()).unwrap_or(u32::MAX);
                records.extend_from_slice(&record);
                count += 1;
            }
            self.ensure_room(records.len())?;
            let (pack, begin) = self.packs.append(&records, true, reopened)?;
            let (copied, others) = rest.split_at_mut(count);
            for Move { to, .. } in copied {
                (to.pack, to.offset) = (pack, begin + to.offset);
            }
            rest = others;
        }
        Ok(true)
    }

    /// Step 6.
    fn commit_moves(&self, old: u32, moves: &[Move], reopened: u64) -> Result<(), StoreError> {
        let write = self.index.begin_write_of(reopened)?;
        {
            let mut objects = write.open_table(index::OBJECTS)?;
            let mut packs = write.open_table(index::PACKS)?;
            for Move { digest, from, to } in moves {
                let current = objects.get(digest.as_bytes())?.map(|value| *value.value());
                // Quarantined or written again meanwhile: that is newer than the copy.
                if current == Some(from.to_bytes()) {
                    objects.insert(digest.as_bytes(), &to.to_bytes())?;
                }
                index::extend_pack(&mut packs, to)?;
            }
            packs.remove(old)?;
        }
        self.index.commit_durable(write, &self.packs)
    }
}

/// Removes unmarked entries and counts. Errors: an entry that cannot be read; `write` must then be
/// dropped.
fn retain_marked(
    write: &redb::WriteTransaction,
    marks: &Marks,
    compaction: Compaction,
) -> Result<Census, StoreError> {
    let (report, live, ends) = (SweepReport::default(), BTreeMap::new(), BTreeMap::new());
    let mut census = Census { compaction, report, live, ends, closed_below: 0, reopened: 0 };
    let Census { report, live, .. } = &mut census;
    let mut unreadable = None;
    write.open_table(index::OBJECTS)?.retain(|digest, entry| {
        let digest = Digest::from_bytes(*digest);
        let Some(at) = Location::from_bytes(entry) else {
            unreadable = Some(digest);
            return true;
        };
        let is_marked = marks.has(&digest);
        if is_marked {
            report.objects_kept += 1;
            *live.entry(at.pack).or_default() += at.record_len() as u64;
        } else {
            report.objects_removed += 1;
        }
        is_marked
    })?;
    match unreadable {
        None => Ok(census),
        Some(digest) => {
            Err(StoreError::Corrupt { digest, pack: 0, offset: 0, why: Mismatch::Entry })
        }
    }
}
