//! Writing objects: collected in memory, appended to a pack in batches, named in the index by a
//! flush.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use godwit_protos::Digest;
use rayon::prelude::*;

use super::encoding::{Encoding, encode};
use super::index::{self, Location, ObjectsTable};
use super::lease::Token;
use super::{Inner, OBJECT_BYTES_MAX, StoreError, pack};

/// Records are appended to the pack in batches of this length, in bytes.
const SPILL_BYTES: usize = 1 << 20;

/// Objects that a writer holds back from the index before it flushes by itself: about 20 MiB of
/// memory.
const PENDING_MAX: usize = 1 << 18;

/// Writes objects under a lease. What was not flushed when it is dropped was never there.
pub struct Writer {
    store: Arc<Inner>,
    token: Arc<Token>,
    /// Records not yet in a pack, and which objects they are; offsets are into `records`.
    records: Vec<u8>,
    unspilled: Vec<(Digest, Location)>,
    /// Objects in a pack or in `records` that the index does not name yet.
    pending: HashMap<Digest, Option<Location>>,
    /// The index as of some moment, with the count of removals and of reopenings then.
    known: Option<(ObjectsTable, (u64, u64))>,
    is_cold: bool,
}

impl Writer {
    pub(super) fn new(store: Arc<Inner>, token: Arc<Token>) -> Self {
        Self {
            store,
            token,
            records: Vec::new(),
            unspilled: Vec::new(),
            pending: HashMap::new(),
            known: None,
            is_cold: false,
        }
    }

    /// Nothing is about to read what it writes: no copy of it is kept in memory.
    #[must_use]
    pub fn cold(mut self) -> Self {
        self.is_cold = true;
        self
    }

    /// Stores `bytes` (1 byte to 4 MiB) and returns their name. Costs a hash and a look-up if they
    /// are there already.
    pub fn put(&mut self, bytes: &[u8]) -> Result<Digest, StoreError> {
        let digest = Digest::of(bytes);
        self.put_hashed(digest, bytes)?;
        Ok(digest)
    }

    /// As [`Self::put`], when the caller has computed the digest of `bytes`. Returns whether the
    /// object is new.
    pub fn put_hashed(&mut self, digest: Digest, bytes: &[u8]) -> Result<bool, StoreError> {
        let size = checked_size(bytes.len())?;
        if self.has(&digest)? {
            return Ok(false);
        }
        let (encoding, stored) = encode(bytes);
        self.collect(digest, (encoding, &stored), size)?;
        Ok(true)
    }

    /// As [`Self::put_hashed`], of many at once: they are compressed on all processors. What is put
    /// at once should be a few MiB, as all of it is in memory twice.
    pub fn put_all(&mut self, objects: &[(Digest, &[u8])]) -> Result<(), StoreError> {
        let mut new = Vec::with_capacity(objects.len());
        for (digest, bytes) in objects {
            let size = checked_size(bytes.len())?;
            if !self.has(digest)? {
                new.push((*digest, *bytes, size));
            }
        }
        let encoded: Vec<_> = new.par_iter().map(|(_, bytes, _)| encode(bytes)).collect();
        for ((digest, _, size), (encoding, stored)) in new.iter().zip(encoded) {
            // The same bytes may be among them twice.
            if !self.pending.contains_key(digest) {
                self.collect(*digest, (encoding, &stored), *size)?;
            }
        }
        Ok(())
    }

    /// Stores an object that came in stored form. The caller has verified that it decodes to `size`
    /// bytes of that digest. Returns whether the object is new.
    pub fn put_stored(
        &mut self,
        digest: Digest,
        encoding: Encoding,
        stored: &[u8],
        size: usize,
    ) -> Result<bool, StoreError> {
        checked_size(stored.len())?;
        let size = checked_size(size)?;
        if self.has(&digest)? {
            return Ok(false);
        }
        self.collect(digest, (encoding, stored), size)?;
        Ok(true)
    }

    /// Makes the objects put so far visible to everyone, in one transaction.
    ///
    /// When it returns, every object that was put is in the store and stays there while the lease
    /// is live. It survives a crash once [`super::Store::sync`] has been called. Errors:
    /// [`StoreError::LeaseExpired`] if the lease has ended meanwhile, so that some may have been
    /// swept; [`StoreError::Full`]: calling again is safe.
    pub fn flush(&mut self) -> Result<(), StoreError> {
        self.spill()?;
        self.known = None;
        if self.pending.is_empty() {
            return Ok(());
        }
        let mut located: Vec<(&Digest, &Location)> = self
            .pending
            .iter()
            .filter_map(|(digest, at)| at.as_ref().map(|at| (digest, at)))
            .collect();
        // Ascending keys fill the tree's leaves one after another.
        located.sort_unstable_by_key(|(digest, _)| **digest);
        // The last record of each pack, which says how far the index knows it.
        let mut last: HashMap<u32, Location> = HashMap::new();
        let write = self.store.index.begin_write()?;
        // If the index was reopened meanwhile, what these objects refer to may be gone.
        self.store.leases.renew(&self.token)?;
        {
            let mut objects = write.open_table(index::OBJECTS)?;
            for (digest, at) in located {
                // Another writer may have been first: its copy is then dead weight, equally good.
                objects.insert(digest.as_bytes(), &at.to_bytes())?;
                let last = last.entry(at.pack).or_insert(*at);
                if at.offset > last.offset {
                    *last = *at;
                }
            }
            let mut packs = write.open_table(index::PACKS)?;
            for at in last.values() {
                index::extend_pack(&mut packs, at)?;
            }
        }
        index::commit_visible(write)?;
        self.pending.clear();
        Ok(())
    }

    /// Whether the object is in the store or will be with the next flush.
    fn has(&mut self, digest: &Digest) -> Result<bool, StoreError> {
        if self.pending.contains_key(digest) {
            return Ok(true);
        }
        let counts = (self.store.removals.load(Ordering::Acquire), self.store.index.generation());
        let objects = match self.known.take() {
            Some((objects, as_of)) if as_of == counts => objects,
            _ => self.store.index.objects()?,
        };
        let has = objects.get(digest.as_bytes())?.is_some();
        self.known = Some((objects, counts));
        Ok(has)
    }

    /// Adds an object's record to those that are to be appended.
    fn collect(
        &mut self,
        digest: Digest,
        (encoding, stored): (Encoding, &[u8]),
        size: u32,
    ) -> Result<(), StoreError> {
        let begin = self.records.len();
        pack::write_record(&mut self.records, &digest, encoding, stored, size);
        let at = Location {
            pack: 0,
            offset: as_u32(begin),
            stored_len: as_u32(stored.len()),
            size,
            encoding,
        };
        self.unspilled.push((digest, at));
        self.pending.insert(digest, None);
        if self.records.len() >= SPILL_BYTES {
            self.spill()?;
        }
        if self.pending.len() >= PENDING_MAX {
            self.flush()?;
        }
        Ok(())
    }

    /// Appends the collected records to the active pack. If that fails they are kept, and the next
    /// call tries again.
    fn spill(&mut self) -> Result<(), StoreError> {
        // Also with nothing to append: what was not stored because it was there already relies on
        // the lease.
        self.store.leases.renew(&self.token)?;
        if self.records.is_empty() {
            return Ok(());
        }
        self.store.ensure_room(self.records.len())?;
        let (pack, begin) = {
            let generation = self.store.index.generation();
            self.store.packs.append(&self.records, self.is_cold, generation)?
        };
        for (digest, at) in self.unspilled.drain(..) {
            let at = Location { pack, offset: begin + at.offset, ..at };
            self.pending.insert(digest, Some(at));
        }
        self.records.clear();
        Ok(())
    }
}

fn checked_size(len: usize) -> Result<u32, StoreError> {
    if len == 0 || len > OBJECT_BYTES_MAX {
        return Err(StoreError::ObjectSize(len));
    }
    Ok(as_u32(len))
}

/// Lengths here are bounded by a batch and an object.
fn as_u32(len: usize) -> u32 {
    u32::try_from(len).expect("a batch is shorter than 4 GiB")
}
