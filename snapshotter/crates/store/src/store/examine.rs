//! Looking for damage: every object is read and hashed, in the order in which they lie on the disk.
//! Nothing is changed; [`Store::verify`] of what is found quarantines it.

use godwit_protos::Digest;
use redb::ReadableTable as _;

use super::encoding;
use super::index::{self, Location};
use super::{LOOKUPS_MAX, Mismatch, Store, StoreError, pack};

/// An object that is not what its name says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Damaged {
    /// The object.
    pub digest: Digest,
    /// Number of its pack.
    pub pack: u32,
    /// Offset of its record in the pack, in bytes.
    pub offset: u32,
    /// What was found.
    pub why: Mismatch,
}

/// What was read, and what of it is damaged.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Examined {
    /// Objects that were read.
    pub objects: u64,
    /// Bytes of their records.
    pub bytes: u64,
    /// Those that are not what their names say.
    pub damaged: Vec<Damaged>,
}

impl Store {
    /// Reads and hashes every object that was there when the call began.
    ///
    /// The store may be used meanwhile: what was removed is skipped, what was moved is read
    /// where it is now. Errors: the disk's; damage is none.
    pub fn examine(&self) -> Result<Examined, StoreError> {
        let mut examined = Examined::default();
        let mut places = Vec::new();
        for entry in self.inner.index.objects()?.iter()? {
            let (digest, entry) = entry?;
            let digest = Digest::from_bytes(*digest.value());
            match Location::from_bytes(entry.value()) {
                Some(at) => places.push((at.pack, at.offset, digest)),
                None => {
                    let why = Mismatch::Entry;
                    examined.damaged.push(Damaged { digest, pack: 0, offset: 0, why });
                }
            }
        }
        places.sort_unstable();
        for (_, _, digest) in places {
            let Some((at, found)) = self.examine_one(&digest)? else { continue };
            examined.objects += 1;
            examined.bytes += at.record_len() as u64;
            if let Some(why) = found {
                let Location { pack, offset, .. } = at;
                examined.damaged.push(Damaged { digest, pack, offset, why });
            }
        }
        Ok(examined)
    }

    /// Where the object lies and what is wrong with it; `None` if it is not there any more.
    fn examine_one(
        &self,
        digest: &Digest,
    ) -> Result<Option<(Location, Option<Mismatch>)>, StoreError> {
        let mut before = None;
        for _ in 0..LOOKUPS_MAX {
            let Some(Ok(at)) = index::lookup(&self.inner.index.objects()?, digest)? else { break };
            let record = self.inner.packs.read(at.pack, at.offset, at.record_len())?;
            let parsed = record.as_deref().ok_or(Mismatch::Gone);
            let wrong = match parsed.and_then(|record| pack::parse_record(record, digest, &at)) {
                // Still the same place: it has not been moved, it is damaged.
                Err(why) if before == Some(at) => Some(why),
                Err(_) => {
                    before = Some(at);
                    continue;
                }
                Ok(stored) => match encoding::decode(at.encoding, stored, at.size as usize) {
                    None => Some(Mismatch::Compression),
                    Some(bytes) => (Digest::of(&bytes) != *digest).then_some(Mismatch::Content),
                },
            };
            return Ok(Some((at, wrong)));
        }
        Ok(None)
    }
}
