//! Packs: the append-only files that hold the objects' bytes.
//!
//! ```text
//! pack    = header record*
//! header  = "GODWPACK"  version: u64  number: u64                                         24 bytes
//! record  = stored_len: u32  size: u32  encoding: u8  zero: [u8; 3]  digest: [u8; 32]     44 bytes
//!           stored: [u8; stored_len]
//! ```
//!
//! Integers are little-endian. A record says what it is, so a read notices when the index points at
//! something else, and an index could be made again from the packs alone. Bytes behind the last
//! record that the index knows are left over from a crash or from a writer that was dropped; they
//! are truncated on open or reclaimed when the pack is rewritten.
//!
//! Numbers are never used twice while the store is open: a reader may still hold the file of a
//! removed pack.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use godwit_protos::Digest;

use super::encoding::Encoding;
use super::error::{Mismatch, OpenError, StoreError};
use super::index::Location;
use godwit_disk::sys::{begin_writing, write_uncached};

/// Version of the packs' format and of the index's.
///
/// 1: as above.
pub(super) const VERSION: u64 = 1;

const MAGIC: &[u8; 8] = b"GODWPACK";

/// Length of a pack's header, in bytes.
pub(super) const HEADER_BYTES: u32 = 24;

/// Length of a record without its stored bytes.
pub(super) const RECORD_BYTES: usize = 44;

/// Bytes after which the kernel begins writing.
const WRITE_BEHIND_BYTES: u32 = 8 << 20;

/// Open files kept for readers.
const READERS_MAX: usize = 128;

/// Appends the record of `stored` to `out`.
pub(super) fn write_record(
    out: &mut Vec<u8>,
    digest: &Digest,
    encoding: Encoding,
    stored: &[u8],
    size: u32,
) {
    let stored_len = u32::try_from(stored.len()).expect("callers keep objects below 4 MiB");
    out.extend_from_slice(&stored_len.to_le_bytes());
    out.extend_from_slice(&size.to_le_bytes());
    out.extend_from_slice(&[encoding as u8, 0, 0, 0]);
    out.extend_from_slice(digest.as_bytes());
    out.extend_from_slice(stored);
}

/// The stored bytes of the record that `bytes` begins with, if it is the one that the index means.
pub(super) fn parse_record<'a>(
    bytes: &'a [u8],
    digest: &Digest,
    at: &Location,
) -> Result<&'a [u8], Mismatch> {
    let (header, stored) = bytes.split_at_checked(RECORD_BYTES).ok_or(Mismatch::Gone)?;
    let mut expected = Vec::with_capacity(RECORD_BYTES);
    expected.extend_from_slice(&at.stored_len.to_le_bytes());
    expected.extend_from_slice(&at.size.to_le_bytes());
    expected.extend_from_slice(&[at.encoding as u8, 0, 0, 0]);
    expected.extend_from_slice(digest.as_bytes());
    if header != expected {
        return Err(Mismatch::Header);
    }
    stored.get(..at.stored_len as usize).ok_or(Mismatch::Gone)
}

fn header_of(number: u32) -> [u8; HEADER_BYTES as usize] {
    let mut header = [0; HEADER_BYTES as usize];
    header[..8].copy_from_slice(MAGIC);
    header[8..16].copy_from_slice(&VERSION.to_le_bytes());
    header[16..].copy_from_slice(&u64::from(number).to_le_bytes());
    header
}

/// The directory of packs.
pub(super) struct Packs {
    dir: PathBuf,
    /// Length at which a pack is closed, in bytes.
    bytes_max: u32,
    appender: Mutex<Appender>,
    readers: Mutex<HashMap<u32, Arc<File>>>,
}

struct Appender {
    active: Option<Active>,
    next_number: u32,
    /// Packs with bytes that are perhaps not on the disk yet.
    dirty: BTreeMap<u32, Arc<File>>,
    is_dir_dirty: bool,
    /// The index's generation in which an fsync failed. The kernel may count lost pages as clean
    /// then: a second fsync proves nothing.
    sync_failed_in: Option<u64>,
}

impl Appender {
    /// Goes on in a new pack once the index has forgotten what a failed fsync may have lost. The
    /// rest of the old one is dead.
    fn recover(&mut self, generation: u64) {
        if self.sync_failed_in.is_some_and(|failed| failed < generation) {
            self.active = None;
            self.dirty.clear();
            self.is_dir_dirty = true;
            self.sync_failed_in = None;
        }
    }
}

struct Active {
    number: u32,
    file: Arc<File>,
    end: u32,
    /// How far the kernel was told to begin writing.
    begun: u32,
}

/// What opening found out about one pack that the index knows.
pub(super) enum Found {
    /// At least as long as the index says; a longer tail has been cut off.
    Whole,
    /// Its length in bytes, or `None` if there is no such file.
    Short(Option<u64>),
}

impl Packs {
    /// `next_number` must be larger than that of any pack the index has ever named.
    pub(super) fn new(dir: PathBuf, bytes_max: u32, next_number: u32) -> Self {
        let appender = Appender {
            active: None,
            next_number,
            dirty: BTreeMap::new(),
            is_dir_dirty: false,
            sync_failed_in: None,
        };
        Self { dir, bytes_max, appender: Mutex::new(appender), readers: Mutex::default() }
    }

    pub(super) fn path(&self, number: u32) -> PathBuf {
        self.dir.join(format!("{number}.pack"))
    }

    fn lock(&self) -> MutexGuard<'_, Appender> {
        // A panic while appending leaves at worst bytes behind `end`, which the next append
        // overwrites.
        self.appender.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Numbers of the files in the directory that are named like packs.
    pub(super) fn list(dir: &Path) -> Result<Vec<u32>, StoreError> {
        let failed = |source| StoreError::io("list", dir, source);
        let mut numbers = Vec::new();
        for entry in fs::read_dir(dir).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            let number = name.to_str().and_then(|name| name.strip_suffix(".pack"));
            numbers.extend(number.and_then(|digits| digits.parse::<u32>().ok()));
        }
        Ok(numbers)
    }

    /// Checks the pack `number`, of which the index knows `end` bytes, and cuts off what follows.
    pub(super) fn recover(&self, number: u32, end: u32) -> Result<Found, OpenError> {
        let path = self.path(number);
        let failed = |source| StoreError::io("open", &path, source);
        let file = match OpenOptions::new().read(true).write(true).open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Found::Short(None)),
            opened => opened.map_err(failed)?,
        };
        let len = file.metadata().map_err(failed)?.len();
        if len < u64::from(HEADER_BYTES) {
            return Ok(Found::Short(Some(len)));
        }
        let mut header = [0; HEADER_BYTES as usize];
        file.read_exact_at(&mut header, 0).map_err(failed)?;
        if header != header_of(number) {
            let version = header[8..16].try_into().map_or(0, u64::from_le_bytes);
            return Err(if header[..8] == *MAGIC && version != VERSION {
                OpenError::Version { path, found: version }
            } else {
                OpenError::ForeignPack(path)
            });
        }
        if len < u64::from(end) {
            return Ok(Found::Short(Some(len)));
        }
        file.set_len(u64::from(end)).map_err(failed)?;
        Ok(Found::Whole)
    }

    /// Goes on appending to pack `number` at `end`; to be called before the first append.
    pub(super) fn resume(&self, number: u32, end: u32) -> Result<(), StoreError> {
        let path = self.path(number);
        let opened = OpenOptions::new().read(true).write(true).open(&path);
        let file = Arc::new(opened.map_err(|source| StoreError::io("open", &path, source))?);
        self.lock().active = Some(Active { number, file, end, begun: end });
        Ok(())
    }

    /// Appends records, all of them to one pack. Returns the pack and where the first begins.
    ///
    /// The bytes are readable but not durable; they are nothing until the index names them. Cold
    /// ones are not kept in memory.
    ///
    /// `generation` is the index's.
    pub(super) fn append(
        &self,
        records: &[u8],
        are_cold: bool,
        generation: u64,
    ) -> Result<(u32, u32), StoreError> {
        let len = u32::try_from(records.len()).expect("callers append a few MiB at most");
        let mut appender = self.lock();
        appender.recover(generation);
        let has_room = |active: &Active| active.end.saturating_add(len) <= self.bytes_max;
        if !appender.active.as_ref().is_some_and(has_room) {
            self.begin_pack(&mut appender)?;
        }
        let Appender { active: Some(active), dirty, .. } = &mut *appender else {
            unreachable!("begin_pack has made one");
        };
        let begin = active.end;
        let (file, at) = (&active.file, u64::from(begin));
        let written = match are_cold {
            true => write_uncached(file, records, at),
            false => file.write_all_at(records, at),
        };
        if let Err(source) = written {
            return Err(StoreError::io("append to", &self.path(active.number), source));
        }
        active.end += len;
        if active.end - active.begun >= WRITE_BEHIND_BYTES {
            // Else `sync` finds all of it to be written yet.
            begin_writing(&active.file, active.begun..active.end);
            active.begun = active.end;
        }
        dirty.entry(active.number).or_insert_with(|| Arc::clone(&active.file));
        Ok((active.number, begin))
    }

    fn begin_pack(&self, appender: &mut Appender) -> Result<(), StoreError> {
        let number = appender.next_number;
        let path = self.path(number);
        let failed = |source| StoreError::io("create", &path, source);
        let mut options = OpenOptions::new();
        // 0600: objects hold the memory of containers.
        options.read(true).write(true).create_new(true).mode(0o600);
        let file = options.open(&path).map_err(failed)?;
        appender.next_number += 1;
        appender.is_dir_dirty = true;
        file.write_all_at(&header_of(number), 0).map_err(failed)?;
        let (file, end) = (Arc::new(file), HEADER_BYTES);
        appender.active = Some(Active { number, file, end, begun: end });
        Ok(())
    }

    /// Ends the active pack, so that it can be rewritten.
    pub(super) fn close_active(&self) {
        self.lock().active = None;
    }

    /// Nothing will ever be appended to packs with numbers below this.
    pub(super) fn closed_below(&self) -> u32 {
        let appender = self.lock();
        appender.active.as_ref().map_or(appender.next_number, |active| active.number)
    }

    /// Number of the pack that is being appended to.
    pub(super) fn active(&self) -> Option<u32> {
        self.lock().active.as_ref().map(|active| active.number)
    }

    /// Waits until all bytes appended before the call are on the disk, and the packs' names with
    /// them.
    ///
    /// Errors: after one failure every later call fails, since the kernel forgets what it has lost,
    /// until the index of a later `generation` has forgotten those bytes too.
    pub(super) fn sync(&self, generation: u64) -> Result<(), StoreError> {
        let (dirty, is_dir_dirty) = {
            let mut appender = self.lock();
            appender.recover(generation);
            if appender.sync_failed_in.is_some() {
                let source = io::Error::other("an earlier fsync has failed");
                return Err(StoreError::io("sync", &self.dir, source));
            }
            (std::mem::take(&mut appender.dirty), std::mem::take(&mut appender.is_dir_dirty))
        };
        let sync_all = || {
            for (number, file) in &dirty {
                let failed = |source| StoreError::io("sync", &self.path(*number), source);
                file.sync_all().map_err(failed)?;
            }
            if is_dir_dirty { self.sync_dir() } else { Ok(()) }
        };
        let synced = sync_all();
        if synced.is_err() {
            self.lock().sync_failed_in = Some(generation);
        }
        synced
    }

    /// As after an fsync that failed in the index's generation 0.
    #[cfg(test)]
    pub(super) fn break_sync(&self) {
        self.lock().sync_failed_in = Some(0);
    }

    fn sync_dir(&self) -> Result<(), StoreError> {
        let synced = File::open(&self.dir).and_then(|dir| dir.sync_all());
        synced.map_err(|source| StoreError::io("sync", &self.dir, source))
    }

    /// Reads `len` bytes, or as many as there are, at `offset` of pack `number`; `None` if it is
    /// not there.
    pub(super) fn read(
        &self,
        number: u32,
        offset: u32,
        len: usize,
    ) -> Result<Option<Vec<u8>>, StoreError> {
        let Some(file) = self.reader(number)? else { return Ok(None) };
        let mut bytes = vec![0; len];
        let mut filled = 0;
        while filled < len {
            match file.read_at(&mut bytes[filled..], u64::from(offset) + filled as u64) {
                Ok(0) => break,
                Ok(read) => filled += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(StoreError::io("read", &self.path(number), source)),
            }
        }
        bytes.truncate(filled);
        Ok(Some(bytes))
    }

    fn reader(&self, number: u32) -> Result<Option<Arc<File>>, StoreError> {
        let mut readers = self.readers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = readers.get(&number) {
            return Ok(Some(Arc::clone(file)));
        }
        let path = self.path(number);
        match File::open(&path) {
            Ok(file) => {
                if readers.len() >= READERS_MAX {
                    readers.clear();
                }
                let file = Arc::new(file);
                readers.insert(number, Arc::clone(&file));
                Ok(Some(file))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(StoreError::io("open", &path, source)),
        }
    }

    /// Removes a pack that the durable index no longer names. One that is gone already is fine.
    pub(super) fn remove(&self, number: u32) -> Result<(), StoreError> {
        self.readers.lock().unwrap_or_else(PoisonError::into_inner).remove(&number);
        self.lock().dirty.remove(&number);
        let path = self.path(number);
        match fs::remove_file(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => removed.map_err(|source| StoreError::io("remove", &path, source)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The format of version 1, byte by byte.
    #[test]
    fn a_pack_is_a_header_and_records() {
        assert_eq!(&header_of(0x0102), b"GODWPACK\x01\0\0\0\0\0\0\0\x02\x01\0\0\0\0\0\0");
        let digest = Digest::from_bytes([0xab; 32]);
        let mut record = Vec::new();
        write_record(&mut record, &digest, Encoding::Zstd, b"xyz", 0x0004_0001);
        let mut expected = b"\x03\0\0\0\x01\0\x04\0\x01\0\0\0".to_vec();
        expected.extend_from_slice(&[0xab; 32]);
        expected.extend_from_slice(b"xyz");
        assert_eq!(record, expected);
        assert_eq!(record.len(), RECORD_BYTES + 3);
    }

    #[test]
    fn a_record_that_differs_from_the_index_is_refused() {
        let digest = Digest::of(b"xyz");
        let mut record = Vec::new();
        write_record(&mut record, &digest, Encoding::Raw, b"xyz", 3);
        let at = Location { pack: 1, offset: 24, stored_len: 3, size: 3, encoding: Encoding::Raw };
        assert_eq!(parse_record(&record, &digest, &at), Ok(&b"xyz"[..]));
        assert_eq!(parse_record(&record[..46], &digest, &at), Err(Mismatch::Gone));
        assert_eq!(parse_record(&record[..20], &digest, &at), Err(Mismatch::Gone));
        for byte in 0..RECORD_BYTES {
            let mut other = record.clone();
            other[byte] ^= 1;
            assert_eq!(parse_record(&other, &digest, &at), Err(Mismatch::Header), "byte {byte}");
        }
    }
}
