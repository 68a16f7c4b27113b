//! Where chunks live: byte strings of up to 4 MiB, named by their SHA-256, and the snapshots that
//! keep them alive.
//!
//! ```text
//! STATE/store/index.redb        which object lies where; the snapshots      (index)
//! STATE/store/packs/<n>.pack    the bytes, append-only, 256 MiB each        (pack)
//! ```
//!
//! **Writing.** A [`Writer`] collects records and appends them to the active pack;
//! [`Writer::flush`] names them in the index in one transaction, which makes them visible;
//! [`Store::sync`] makes all of that durable:
//!
//! 1. take the index's write transaction, so that no flush slips in between;
//! 2. fsync the packs that were appended to, and their directory if a pack is new;
//! 3. commit the index with an fsync.
//!
//! A failure in 2 or 3, as on a full disk, takes the index back to the last step 3, and ends all
//! leases ([`index`]).
//!
//! On open: the index is as of the last step 3. Packs that it does not name are deleted, and what
//! follows the last byte that it knows in a pack is cut off: both belong to flushes that were not
//! synced. So after a crash an object may be gone, but never half there. A pack that is missing or
//! shorter than the index says is damage from outside: its lost objects are quarantined and the
//! loss is reported ([`Store::damage`]); nothing else is touched. Packs without an index, or with
//! one of another version, are not opened at all.
//!
//! **Reading.** A record says what it is, so a wrong pointer is noticed at once; content is hashed
//! by [`Store::verify`], and of all objects by [`Store::examine`]. What turns out damaged is
//! quarantined: it leaves the index, so that a neighbour's copy can be stored in its place.
//!
//! **Forgetting.** [`Store::sweep`] marks from the snapshots and removes the rest, but only while
//! no [`Lease`] is live ([`lease`]), and not at all if anything cannot be read ([`sweep`]).
//!
//! All of it is synchronous and may block on the disk.

mod encoding;
mod error;
mod examine;
mod index;
mod lease;
mod pack;
mod snapshots;
mod sweep;
#[cfg(test)]
mod tests;
mod writer;

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use godwit_protos::Digest;
use redb::{ReadableTable as _, ReadableTableMetadata as _};
use tokio::sync::watch;

use encoding::Decoder;
pub use encoding::{Encoding, decode};
pub use error::{Mismatch, OpenError, StoreError};
pub use examine::{Damaged, Examined};
use godwit_disk::leftovers::Leftovers;
use index::{Index, Location};
pub use lease::Lease;
use lease::Leases;
use pack::{Found, Packs};
pub use snapshots::{Snapshot, SnapshotId};
pub use sweep::{Children, Compaction, Roots, SweepError, SweepReport};
pub use writer::Writer;

/// Largest object, in bytes.
pub const OBJECT_BYTES_MAX: usize = 4 << 20;

const INDEX_FILE: &str = "index.redb";
const PACKS_DIR: &str = "packs";

/// Records further apart than this are read one by one, in bytes.
const READ_GAP_BYTES_MAX: u64 = 64 << 10;

/// Records are read together up to this span, in bytes.
const READ_SPAN_BYTES_MAX: u64 = 1 << 20;

/// How often a read looks again because a sweep has moved the object meanwhile.
const LOOKUPS_MAX: u32 = 8;

/// What an operator may set.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Length at which a pack is closed, in bytes: at least 16 MiB, or what tests like.
    pub pack_bytes_max: u32,
    /// Room that writing leaves on the disk, in bytes. An index that hits the end of the disk is
    /// reopened, which ends all leases.
    pub reserve_bytes: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self { pack_bytes_max: 256 << 20, reserve_bytes: 64 << 20 }
    }
}

/// An object in the form it is stored in, as a peer can be given it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// Form of `bytes`.
    pub encoding: Encoding,
    /// The stored form.
    pub bytes: Vec<u8>,
    /// Length of the object itself, in bytes.
    pub size: u32,
}

/// What the store holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Bytes of all packs, dead ones included.
    pub bytes: u64,
    /// Objects that can be asked for.
    pub objects: u64,
}

/// A pack that was not whole when the store was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Damage {
    /// Number of the pack.
    pub pack: u32,
    /// Bytes that the index knows of.
    pub expected_bytes: u64,
    /// Bytes that are there; `None` if there is no such file.
    pub found_bytes: Option<u64>,
    /// Objects that were quarantined for it.
    pub objects_lost: u64,
}

/// The store. Cheap to clone; all clones are one store, which closes with the last.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Store({})", self.inner.dir.display())
    }
}

struct Inner {
    dir: PathBuf,
    options: Options,
    index: Index,
    packs: Packs,
    leases: Arc<Leases>,
    damage: Vec<Damage>,
    leftovers: Leftovers,
    /// Grows when objects leave the index; tells writers that what they have read is out of date.
    removals: AtomicU64,
    /// Tells followers that the snapshots are others than before.
    snapshots_changed: watch::Sender<()>,
}

impl Store {
    /// Opens the store in `dir`, or makes an empty one, and keeps it to this process until the last
    /// clone is dropped.
    ///
    /// What is done about leftovers and damage is said in the module's comment. Errors:
    /// [`OpenError`]; the directory is then as it was.
    pub fn open(dir: &Path, options: Options) -> Result<Self, OpenError> {
        let packs_dir = dir.join(PACKS_DIR);
        let failed = |source| StoreError::io("create", &packs_dir, source);
        fs::create_dir_all(&packs_dir).map_err(failed)?;
        let files = Packs::list(&packs_dir)?;
        let index_path = dir.join(INDEX_FILE);
        let is_new = fs::metadata(&index_path).map_or(true, |meta| meta.len() == 0);
        if is_new && !files.is_empty() {
            return Err(OpenError::IndexMissing(dir.to_owned()));
        }
        let index = Index::open(&index_path)?;
        let leases = Arc::new(Leases::new(index.generations()));
        let known = known_packs(&index)?;
        let newest = files.iter().chain(known.keys()).max().copied().unwrap_or(0);
        let packs = Packs::new(packs_dir, options.pack_bytes_max, newest.saturating_add(1));
        let damage = recover_packs(&index, &packs, &known)?;
        let leftovers = Leftovers::default();
        for leftover in files.iter().filter(|number| !known.contains_key(number)) {
            leftovers.remove(&packs.path(*leftover));
        }
        let inner = Inner {
            dir: dir.to_owned(),
            options,
            index,
            packs,
            leases,
            damage,
            leftovers,
            removals: AtomicU64::new(0),
            snapshots_changed: watch::Sender::new(()),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Packs that were not whole on open.
    pub fn damage(&self) -> &[Damage] {
        &self.inner.damage
    }

    /// Files of packs that nothing refers to and that could not be removed so far. Their numbers
    /// are not used again.
    pub fn leftovers(&self) -> &Leftovers {
        &self.inner.leftovers
    }

    /// Whether the store has the object.
    pub fn contains(&self, digest: &Digest) -> Result<bool, StoreError> {
        Ok(self.inner.index.objects()?.get(digest.as_bytes())?.is_some())
    }

    /// Those of `digests` that the store does not have, in their order.
    pub fn missing(&self, digests: &[Digest]) -> Result<Vec<Digest>, StoreError> {
        let objects = self.inner.index.objects()?;
        let mut missing = Vec::new();
        for digest in digests {
            if objects.get(digest.as_bytes())?.is_none() {
                missing.push(*digest);
            }
        }
        Ok(missing)
    }

    /// The object, or `None` if the store does not have it.
    ///
    /// Errors: [`StoreError::Corrupt`] if it cannot be restored; the store then has it no longer.
    /// The content is not hashed: see [`Self::verify`].
    pub fn get(&self, digest: &Digest) -> Result<Option<Vec<u8>>, StoreError> {
        let Some((at, stored)) = self.inner.read(digest)? else { return Ok(None) };
        match encoding::decode(at.encoding, &stored, at.size as usize) {
            Some(bytes) => Ok(Some(bytes)),
            None => Err(self.inner.quarantine(digest, &at, Mismatch::Compression)?),
        }
    }

    /// The object as it is stored, so that a peer can be given it without compressing it again.
    pub fn get_stored(&self, digest: &Digest) -> Result<Option<Stored>, StoreError> {
        let read = self.inner.read(digest)?;
        Ok(read.map(|(at, bytes)| Stored { encoding: at.encoding, bytes, size: at.size }))
    }

    /// Calls `visit` with each distinct object of `digests` that is there, in the order in which
    /// they lie on the disk, until it breaks.
    ///
    /// Returns the digests that are not there, including those that turned out damaged and are now
    /// quarantined.
    pub fn get_many(
        &self,
        digests: &[Digest],
        visit: &mut dyn FnMut(&Digest, &[u8]) -> ControlFlow<()>,
    ) -> Result<Vec<Digest>, StoreError> {
        let mut absent = Vec::new();
        let mut found = Vec::with_capacity(digests.len());
        {
            let objects = self.inner.index.objects()?;
            let mut seen = HashSet::with_capacity(digests.len());
            for digest in digests.iter().filter(|digest| seen.insert(**digest)) {
                match index::lookup(&objects, digest)? {
                    Some(Ok(at)) => found.push((at, *digest)),
                    _ => absent.push(*digest),
                }
            }
        }
        found.sort_unstable_by_key(|(at, _)| (at.pack, at.offset));
        let mut decoder = Decoder::new();
        for span in found.chunk_by({
            let mut begin = None;
            move |(one, _), (next, _)| is_near(&mut begin, one, next)
        }) {
            match self.visit_span(span, &mut decoder, visit, &mut absent)? {
                ControlFlow::Continue(()) => {}
                ControlFlow::Break(()) => break,
            }
        }
        Ok(absent)
    }

    /// Reads neighbouring records in one go.
    fn visit_span(
        &self,
        span: &[(Location, Digest)],
        decoder: &mut Decoder,
        visit: &mut dyn FnMut(&Digest, &[u8]) -> ControlFlow<()>,
        absent: &mut Vec<Digest>,
    ) -> Result<ControlFlow<()>, StoreError> {
        let [(first, _), ..] = span else { return Ok(ControlFlow::Continue(())) };
        let end = span.iter().map(|(at, _)| at.end()).max().unwrap_or(0);
        let len = usize::try_from(end - u64::from(first.offset)).unwrap_or(0);
        let bytes = self.inner.packs.read(first.pack, first.offset, len)?.unwrap_or_default();
        for (at, digest) in span {
            let record = bytes.get((at.offset - first.offset) as usize..).unwrap_or_default();
            let parsed = pack::parse_record(record, digest, at).ok();
            let object =
                parsed.and_then(|stored| decoder.decode(at.encoding, stored, at.size as usize));
            let flow = match object {
                Some(object) => visit(digest, object),
                // A sweep may have moved it; the slow way finds out, or quarantines it.
                None => match self.get(digest) {
                    Ok(Some(object)) => visit(digest, &object),
                    Ok(None) | Err(StoreError::Corrupt { .. }) => {
                        absent.push(*digest);
                        ControlFlow::Continue(())
                    }
                    Err(error) => return Err(error),
                },
            };
            if flow.is_break() {
                return Ok(flow);
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Hashes the object's content. `true` if it is what its name says, `false` if the store does
    /// not have it.
    ///
    /// Errors: [`StoreError::Corrupt`] if it is not; it is then quarantined.
    pub fn verify(&self, digest: &Digest) -> Result<bool, StoreError> {
        let Some((at, stored)) = self.inner.read(digest)? else { return Ok(false) };
        let object = encoding::decode(at.encoding, &stored, at.size as usize);
        match object.map(|bytes| Digest::of(&bytes) == *digest) {
            Some(true) => Ok(true),
            Some(false) => Err(self.inner.quarantine(digest, &at, Mismatch::Content)?),
            None => Err(self.inner.quarantine(digest, &at, Mismatch::Compression)?),
        }
    }

    /// Objects that were found damaged, since the store was made.
    pub fn quarantined(&self) -> Result<Vec<Digest>, StoreError> {
        let table = self.inner.index.begin_read()?.open_table(index::QUARANTINE)?;
        let mut digests = Vec::new();
        for entry in table.iter()? {
            digests.push(Digest::from_bytes(*entry?.0.value()));
        }
        Ok(digests)
    }

    /// Keeps everything from being swept until the lease is dropped, or for `ttl` after it was last
    /// renewed.
    ///
    /// `name` is for messages. Waits while a sweep removes objects.
    pub fn lease(&self, name: &str, ttl: Duration) -> Lease {
        // Else the first use of the store would reopen its index, which ends leases.
        if let Err(error) = self.inner.index.heal() {
            tracing::warn!(%error, "the store's index cannot be reopened yet");
        }
        self.inner.leases.take(name, ttl)
    }

    /// A writer of objects that `lease` protects until a snapshot does.
    pub fn writer(&self, lease: &Lease) -> Writer {
        Writer::new(Arc::clone(&self.inner), Arc::clone(&lease.token))
    }

    /// Why nothing can be stored, if the index failed and could not be reopened yet.
    pub fn failure(&self) -> Option<String> {
        self.inner.index.failure()
    }

    /// Reopens the index if it has failed, as the next use would. Errors: it cannot be reopened.
    pub fn heal(&self) -> Result<(), StoreError> {
        self.inner.index.heal()
    }

    /// Makes everything that was flushed before the call durable.
    pub fn sync(&self) -> Result<(), StoreError> {
        self.inner.sync()
    }

    /// What the store holds.
    pub fn usage(&self) -> Result<Usage, StoreError> {
        let read = self.inner.index.begin_read()?;
        let mut bytes = 0;
        for entry in read.open_table(index::PACKS)?.iter()? {
            bytes += u64::from(entry?.1.value());
        }
        Ok(Usage { bytes, objects: read.open_table(index::OBJECTS)?.len()? })
    }
}

/// Whether `next` is read together with its predecessor `one`; `begin` remembers where the span
/// began.
fn is_near(begin: &mut Option<u32>, one: &Location, next: &Location) -> bool {
    let first = *begin.get_or_insert(one.offset);
    let near = one.pack == next.pack
        && u64::from(next.offset).saturating_sub(one.end()) <= READ_GAP_BYTES_MAX
        && next.end() - u64::from(first) <= READ_SPAN_BYTES_MAX;
    if !near {
        *begin = None;
    }
    near
}

/// The packs that the index names, and how many bytes of each.
fn known_packs(index: &Index) -> Result<BTreeMap<u32, u32>, StoreError> {
    let table = index.begin_read()?.open_table(index::PACKS)?;
    let mut known = BTreeMap::new();
    for entry in table.iter()? {
        let (number, end) = entry?;
        known.insert(number.value(), end.value());
    }
    Ok(known)
}

/// Brings each known pack to the length the index knows, and quarantines what is lost. The newest
/// is resumed.
fn recover_packs(
    index: &Index,
    packs: &Packs,
    known: &BTreeMap<u32, u32>,
) -> Result<Vec<Damage>, OpenError> {
    let mut damage = Vec::new();
    for (number, end) in known {
        let Found::Short(found_bytes) = packs.recover(*number, *end)? else { continue };
        damage.push(Damage {
            pack: *number,
            expected_bytes: u64::from(*end),
            found_bytes,
            objects_lost: 0,
        });
    }
    if !damage.is_empty() {
        quarantine_lost(index, packs, &mut damage)?;
    }
    if let Some((number, end)) = known.last_key_value()
        && damage.iter().all(|damage| damage.pack != *number)
    {
        packs.resume(*number, *end)?;
    }
    Ok(damage)
}

fn quarantine_lost(index: &Index, packs: &Packs, damage: &mut [Damage]) -> Result<(), StoreError> {
    let write = index.begin_write()?;
    {
        let mut objects = write.open_table(index::OBJECTS)?;
        let mut quarantine = write.open_table(index::QUARANTINE)?;
        let is_lost = |entry: &[u8; 17]| {
            let at = Location::from_bytes(entry)?;
            damage.iter().position(|damage| {
                damage.pack == at.pack && damage.found_bytes.is_none_or(|bytes| at.end() > bytes)
            })
        };
        let mut lost = Vec::new();
        for entry in objects.extract_if(|_, value| is_lost(value).is_some())? {
            let (digest, value) = entry?;
            lost.push((*digest.value(), *value.value()));
        }
        for (digest, value) in lost {
            quarantine.insert(&digest, &value)?;
            if let Some(at) = Location::from_bytes(&value)
                && let Some(damage) = damage.iter_mut().find(|damage| damage.pack == at.pack)
            {
                damage.objects_lost += 1;
            }
        }
        // Its number stays known, so that it is reported again and never given to another pack.
    }
    index.commit_durable(write, packs)
}

impl Inner {
    /// Where the object lies, and its stored bytes.
    fn read(&self, digest: &Digest) -> Result<Option<(Location, Vec<u8>)>, StoreError> {
        let mut before = None;
        for _ in 0..LOOKUPS_MAX {
            let at = match index::lookup(&self.index.objects()?, digest)? {
                None => return Ok(None),
                Some(Ok(at)) => at,
                Some(Err(entry)) => return Err(self.quarantine_entry(digest, &entry)?),
            };
            let record = self.packs.read(at.pack, at.offset, at.record_len())?;
            let parsed = record.as_deref().ok_or(Mismatch::Gone);
            match parsed.and_then(|record| pack::parse_record(record, digest, &at)) {
                Ok(stored) => return Ok(Some((at, stored.to_vec()))),
                // Still the same place: it has not been moved, it is damaged.
                Err(why) if before == Some(at) => return Err(self.quarantine(digest, &at, why)?),
                Err(_) => before = Some(at),
            }
        }
        Ok(None)
    }

    /// Takes a damaged object out of the index. Returns the error to report.
    fn quarantine(
        &self,
        digest: &Digest,
        at: &Location,
        why: Mismatch,
    ) -> Result<StoreError, StoreError> {
        self.move_to_quarantine(digest, &at.to_bytes())?;
        Ok(StoreError::Corrupt { digest: *digest, pack: at.pack, offset: at.offset, why })
    }

    fn quarantine_entry(
        &self,
        digest: &Digest,
        entry: &[u8; 17],
    ) -> Result<StoreError, StoreError> {
        self.move_to_quarantine(digest, entry)?;
        Ok(StoreError::Corrupt { digest: *digest, pack: 0, offset: 0, why: Mismatch::Entry })
    }

    fn move_to_quarantine(&self, digest: &Digest, entry: &[u8; 17]) -> Result<(), StoreError> {
        let write = self.index.begin_write()?;
        {
            let mut objects = write.open_table(index::OBJECTS)?;
            let current = objects.get(digest.as_bytes())?.map(|value| *value.value());
            // A good copy may have been stored elsewhere meanwhile.
            if current.as_ref() == Some(entry) {
                objects.remove(digest.as_bytes())?;
                write.open_table(index::QUARANTINE)?.insert(digest.as_bytes(), entry)?;
            }
        }
        index::commit_visible(write)?;
        self.removals.fetch_add(1, Ordering::Release);
        Ok(())
    }

    fn sync(&self) -> Result<(), StoreError> {
        self.index.commit_durable(self.index.begin_write()?, &self.packs)
    }

    /// Errors: [`StoreError::Full`] if writing `bytes` would use up the reserve.
    fn ensure_room(&self, bytes: usize) -> Result<(), StoreError> {
        let failed = |errno: nix::Error| StoreError::io("measure", &self.dir, errno.into());
        let disk = nix::sys::statvfs::statvfs(&self.dir).map_err(failed)?;
        let available = disk.blocks_available().saturating_mul(disk.fragment_size());
        if available < self.options.reserve_bytes.saturating_add(bytes as u64) {
            return Err(StoreError::Full { path: self.dir.clone() });
        }
        let failed = |error| StoreError::io("keep room for", &self.dir.join(INDEX_FILE), error);
        self.index.ensure_room().map_err(failed)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // redb makes its last commit durable when it closes, so the packs must be on the disk
        // before; if they cannot be, that commit is given up.
        if let Err(error) = self.sync() {
            tracing::warn!(%error, dir = %self.dir.display(), "store closed without a sync");
        }
    }
}
