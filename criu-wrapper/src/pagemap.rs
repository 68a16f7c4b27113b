//! Memory images: which pages of a process are where, and how one image directory refers to
//! another.
//!
//! ```text
//! pagemap-<pid>.img, pagemap-shmem-<id>.img
//!     magic: u32  magic: u32  (length: u32  message)*
//!     the first message is a head with the pages id, each other one stands for a run of pages
//! pages-<pages id>.img
//!     the present runs' pages, one after another
//! parent
//!     a symlink to the directory that has the runs marked as the parent's
//! ```
//!
//! Integers are little-endian, messages are CRIU's protobuf (its images/pagemap.proto), runs ascend
//! by address. CRIU writes the parent form when its kernel has soft-dirty bits; it *restores* it on
//! every kernel. So a child directory that holds only what changed since the parent was staged can
//! be made without CRIU's help ([`PagemapWriter`]). Not for huge pages of hugetlbfs: CRIU restores
//! those from the directory itself.
//!
//! Images come from another node. Every length is checked against a limit before it is allocated,
//! and what is read ascends, does not overlap and fits in the pages file; nothing else reaches a
//! caller.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Read as _, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use prost::Message as _;

use crate::image::{self, Broken, Kind};

/// Bytes in a page of the machines we run on.
pub const PAGE_BYTES: u64 = 4096;

/// Flag of a run: its pages are the parent directory's.
pub const IN_PARENT: u32 = 1;
/// Flag of a run: its pages may be brought in after the restore, by a lazy-pages daemon.
pub const LAZY: u32 = 2;
/// Flag of a run: its pages are in the pages file.
pub const PRESENT: u32 = 4;

/// Largest page map, in bytes: some four million runs.
pub const PAGEMAP_BYTES_MAX: u64 = 64 << 20;

/// Largest message, in bytes. CRIU's own have 40 at most.
const MESSAGE_BYTES_MAX: u32 = 256;

/// Most files in an image directory. A pod of a thousand processes has some ten thousand.
const FILES_MAX: usize = 100_000;

/// Bytes that are moved at once within a pages file.
const MOVE_BYTES: usize = 1 << 20;

const PARENT_LINK: &str = "parent";

#[derive(Clone, PartialEq, prost::Message)]
struct Head {
    #[prost(uint32, required, tag = "1")]
    pages_id: u32,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Entry {
    #[prost(uint64, required, tag = "1")]
    vaddr: u64,
    #[prost(uint32, required, tag = "2")]
    compat_nr_pages: u32,
    #[prost(bool, optional, tag = "3")]
    in_parent: Option<bool>,
    #[prost(uint32, optional, tag = "4")]
    flags: Option<u32>,
    #[prost(uint64, optional, tag = "5")]
    nr_pages: Option<u64>,
}

/// How page counts are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// 32 bits, field 2: CRIU before 4.2. Later ones read it too.
    Narrow,
    /// 64 bits, field 5: CRIU 4.2 and later.
    Wide,
}

/// Consecutive pages that are treated alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Address of the first page; for shared memory, offset in the segment. A multiple of
    /// [`PAGE_BYTES`].
    pub vaddr: u64,
    /// Number of pages, at least 1.
    pub pages: u64,
    /// [`IN_PARENT`], [`LAZY`], [`PRESENT`].
    pub flags: u32,
}

impl Run {
    /// Whether the pages are the parent directory's.
    pub fn in_parent(&self) -> bool {
        self.flags & IN_PARENT != 0
    }

    /// Whether the pages are in the pages file.
    pub fn is_present(&self) -> bool {
        self.flags & PRESENT != 0
    }

    /// Length in bytes.
    pub fn len_bytes(&self) -> u64 {
        self.pages * PAGE_BYTES
    }

    /// Address behind the last page.
    pub fn end(&self) -> u64 {
        self.vaddr + self.len_bytes()
    }
}

/// Why images cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The operating system refused.
    #[error("{doing} {path}")]
    Io {
        /// What was tried, as a verb.
        doing: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// An image is of another kind than its name says, or breaks a rule.
    #[error("{name}.img at offset {offset}: {rule}")]
    Malformed {
        /// Name without `.img`.
        name: String,
        /// Offset of the message, in bytes.
        offset: u64,
        /// What does not hold.
        rule: &'static str,
    },
    /// A pages file is shorter than its page map says.
    #[error("{path} has {found} bytes, its page map needs {needed}")]
    PagesShort {
        /// The pages file.
        path: PathBuf,
        /// Its length.
        found: u64,
        /// The length needed.
        needed: u64,
    },
    /// The directory holds something that CRIU does not write.
    #[error("{0} is not a regular file, or there are more than {FILES_MAX}")]
    Foreign(PathBuf),
}

impl ImageError {
    /// Adds the name of the image, without `.img`.
    pub(crate) fn broken(name: &str) -> impl Fn(Broken) -> Self {
        move |Broken { offset, rule }| Self::Malformed { name: name.to_owned(), offset, rule }
    }

    pub(crate) fn io(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { doing, path, source }
    }
}

/// One page map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PagemapFile {
    /// File name without `.img`: `pagemap-1`, `pagemap-shmem-3`.
    pub name: String,
    /// Which `pages-<id>.img` has the present runs.
    pub pages_id: u32,
    /// How counts are written.
    pub form: Form,
    /// The runs, ascending, not overlapping.
    pub entries: Vec<Run>,
}

impl PagemapFile {
    /// Parses the bytes of `<name>.img`.
    pub fn parse(name: &str, bytes: &[u8]) -> Result<Self, ImageError> {
        let malformed = |offset, rule| ImageError::broken(name)(Broken { offset, rule });
        let broken = ImageError::broken(name);
        let mut messages =
            image::messages(bytes, Kind::Pagemap, MESSAGE_BYTES_MAX).map_err(&broken)?;
        let head = messages.next().ok_or_else(|| malformed(8, "there is no head"))?;
        let head = head.map_err(&broken)?;
        let Ok(Head { pages_id }) = Head::decode(head.message) else {
            return Err(malformed(head.offset, "the head does not parse"));
        };
        let mut file =
            Self { name: name.to_owned(), pages_id, form: Form::Narrow, entries: Vec::new() };
        let mut floor = 0;
        for framed in messages {
            let image::Framed { offset: begin, message } = framed.map_err(&broken)?;
            let Ok(entry) = Entry::decode(message) else {
                return Err(malformed(begin, "an entry does not parse"));
            };
            if entry.nr_pages.is_some() {
                file.form = Form::Wide;
            }
            let run = entry.to_run(floor).map_err(|rule| malformed(begin, rule))?;
            floor = run.end();
            file.entries.push(run);
        }
        Ok(file)
    }

    /// The bytes of the file: for a page map of CRIU 2 or later the same that it was parsed from.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = image::empty(Kind::Pagemap);
        image::push(&mut bytes, &Head { pages_id: self.pages_id }.encode_to_vec());
        for run in &self.entries {
            image::push(&mut bytes, &Entry::from_run(run, self.form).encode_to_vec());
        }
        bytes
    }

    /// Runs, each with the offset of its first page in the pages file, in bytes, if it is present
    /// there.
    pub fn places(&self) -> impl Iterator<Item = (Run, Option<u64>)> {
        self.entries.iter().scan(0, |offset, run| {
            let here = run.is_present().then_some(*offset);
            if run.is_present() {
                *offset += run.len_bytes();
            }
            Some((*run, here))
        })
    }

    /// Length that the pages file must have, in bytes.
    pub fn pages_bytes(&self) -> u64 {
        self.entries.iter().filter(|run| run.is_present()).map(Run::len_bytes).sum()
    }
}

impl Entry {
    /// Checked as CRIU does not: it trusts its images. `floor` is where the run before ends.
    fn to_run(&self, floor: u64) -> Result<Run, &'static str> {
        // As CRIU's init_compat_pagemap_entry.
        let mut flags = self.flags.unwrap_or(0);
        if self.in_parent == Some(true) {
            flags |= IN_PARENT;
        } else if self.flags.is_none() {
            flags = PRESENT;
        }
        if flags & IN_PARENT != 0 && flags & PRESENT != 0 {
            return Err("a run is both present and the parent's");
        }
        let pages = self.nr_pages.unwrap_or(u64::from(self.compat_nr_pages));
        if pages == 0 || !self.vaddr.is_multiple_of(PAGE_BYTES) {
            return Err("a run is empty or not aligned");
        }
        let end = pages.checked_mul(PAGE_BYTES).and_then(|len| self.vaddr.checked_add(len));
        // Offsets in the pages file are bounded by the sum of the runs, so by the last address.
        if end.is_none_or(|end| i64::try_from(end).is_err()) {
            return Err("a run leaves the address space");
        }
        if self.vaddr < floor {
            return Err("runs overlap or do not ascend");
        }
        Ok(Run { vaddr: self.vaddr, pages, flags })
    }

    fn from_run(run: &Run, form: Form) -> Self {
        let narrow = u32::try_from(run.pages).ok().filter(|_| form == Form::Narrow);
        Self {
            vaddr: run.vaddr,
            compat_nr_pages: narrow.unwrap_or(0),
            in_parent: None,
            flags: Some(run.flags),
            nr_pages: if narrow.is_some() { None } else { Some(run.pages) },
        }
    }
}

/// A directory of images.
pub struct ImageDirectory {
    path: PathBuf,
    /// Names of the regular files, sorted.
    files: BTreeSet<String>,
}

impl ImageDirectory {
    /// Lists the directory. A symlink `parent` may be in it; anything else must be a regular file.
    pub fn open(path: &Path) -> Result<Self, ImageError> {
        let mut files = BTreeSet::new();
        for entry in fs::read_dir(path).map_err(ImageError::io("list", path))? {
            let entry = entry.map_err(ImageError::io("list", path))?;
            let kind = entry.file_type().map_err(ImageError::io("stat", &entry.path()))?;
            let Ok(name) = entry.file_name().into_string() else {
                return Err(ImageError::Foreign(entry.path()));
            };
            if kind.is_symlink() && name == PARENT_LINK {
                continue;
            }
            if !kind.is_file() || files.len() >= FILES_MAX {
                return Err(ImageError::Foreign(entry.path()));
            }
            files.insert(name);
        }
        Ok(Self { path: path.to_owned(), files })
    }

    /// The directory's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Path of the pages file with this id.
    pub fn pages_path(&self, pages_id: u32) -> PathBuf {
        self.path.join(format!("pages-{pages_id}.img"))
    }

    /// Where the symlink `parent` points, if there is one.
    pub fn parent(&self) -> Option<PathBuf> {
        fs::read_link(self.path.join(PARENT_LINK)).ok()
    }

    /// Reads and checks all page maps, by name. Each pages file is long enough for its page map.
    pub fn pagemaps(&self) -> Result<Vec<PagemapFile>, ImageError> {
        let names = self.files.iter().filter_map(|name| pagemap_name(name));
        names.map(|name| self.pagemap(name)).collect()
    }

    /// Reads and checks one page map, by its name without `.img`.
    pub fn pagemap(&self, name: &str) -> Result<PagemapFile, ImageError> {
        let path = self.path.join(format!("{name}.img"));
        let file = File::open(&path).map_err(ImageError::io("open", &path))?;
        let mut bytes = Vec::new();
        let limited = file.take(PAGEMAP_BYTES_MAX + 1).read_to_end(&mut bytes);
        limited.map_err(ImageError::io("read", &path))?;
        if bytes.len() as u64 > PAGEMAP_BYTES_MAX {
            let rule = "the file is longer than 64 MiB";
            return Err(ImageError::Malformed {
                name: name.to_owned(),
                offset: PAGEMAP_BYTES_MAX,
                rule,
            });
        }
        let pagemap = PagemapFile::parse(name, &bytes)?;
        let needed = pagemap.pages_bytes();
        if needed > 0 {
            let path = self.pages_path(pagemap.pages_id);
            let found = fs::metadata(&path).map_err(ImageError::io("stat", &path))?.len();
            if found < needed {
                return Err(ImageError::PagesShort { path, found, needed });
            }
        }
        Ok(pagemap)
    }

    /// Names of all files that are neither page maps nor pages, sorted: what describes everything
    /// but memory.
    pub fn other_files(&self) -> Vec<String> {
        let is_other = |name: &&String| pagemap_name(name).is_none() && !is_pages_name(name);
        self.files.iter().filter(is_other).cloned().collect()
    }
}

fn pagemap_name(file: &str) -> Option<&str> {
    file.strip_suffix(".img").filter(|name| name.starts_with("pagemap-"))
}

fn is_pages_name(file: &str) -> bool {
    file.starts_with("pages-") && file.ends_with(".img")
}

/// Writes one page map and its pages file; the runs must come ascending.
///
/// Neither is durable: a child directory is needed until the restore, and made again after a crash.
pub struct PagemapWriter {
    map: PagemapFile,
    map_path: PathBuf,
    pages: BufWriter<File>,
    pages_path: PathBuf,
}

impl PagemapWriter {
    /// Creates `pages-<pages_id>.img` in `dir`; `<name>.img` comes with [`Self::finish`]. Neither
    /// may be there.
    pub fn create(dir: &Path, name: &str, pages_id: u32, form: Form) -> Result<Self, ImageError> {
        let pages_path = dir.join(format!("pages-{pages_id}.img"));
        let file = create_private(&pages_path)?;
        let map = PagemapFile { name: name.to_owned(), pages_id, form, entries: Vec::new() };
        let map_path = dir.join(format!("{name}.img"));
        Ok(Self { map, map_path, pages: BufWriter::with_capacity(1 << 20, file), pages_path })
    }

    /// Says that `pages` pages at `vaddr` are the parent directory's. Its page map of the same name
    /// must have them.
    pub fn in_parent(&mut self, vaddr: u64, pages: u64) -> Result<(), ImageError> {
        self.push(Run { vaddr, pages, flags: IN_PARENT })
    }

    /// Stores pages; `bytes` is a multiple of [`PAGE_BYTES`] long. `flags` is [`PRESENT`], perhaps
    /// with [`LAZY`].
    pub fn present(&mut self, vaddr: u64, flags: u32, bytes: &[u8]) -> Result<(), ImageError> {
        let len = bytes.len() as u64;
        if !len.is_multiple_of(PAGE_BYTES) || flags & PRESENT == 0 {
            return Err(self.broken("pages are not whole"));
        }
        self.push(Run { vaddr, pages: len / PAGE_BYTES, flags })?;
        self.pages.write_all(bytes).map_err(ImageError::io("write", &self.pages_path))
    }

    /// Adds a run, as part of the one before where they meet.
    fn push(&mut self, run: Run) -> Result<(), ImageError> {
        let floor = self.map.entries.last().map_or(0, Run::end);
        let entry = Entry::from_run(&run, Form::Wide);
        let run = entry.to_run(floor).map_err(|rule| self.broken(rule))?;
        match self.map.entries.last_mut() {
            Some(last) if last.end() == run.vaddr && last.flags == run.flags => {
                last.pages += run.pages;
            }
            _ => self.map.entries.push(run),
        }
        Ok(())
    }

    fn broken(&self, rule: &'static str) -> ImageError {
        let offset = self.map.entries.len() as u64;
        ImageError::Malformed { name: self.map.name.clone(), offset, rule }
    }

    /// Writes the page map. Returns what it says.
    pub fn finish(mut self) -> Result<PagemapFile, ImageError> {
        self.pages.flush().map_err(ImageError::io("write", &self.pages_path))?;
        let mut file = create_private(&self.map_path)?;
        let written = file.write_all(&self.map.to_bytes());
        written.map_err(ImageError::io("write", &self.map_path))?;
        Ok(self.map)
    }
}

/// Turns the pages file of an earlier version into that of a page map, in place.
///
/// CRIU reads a pages file from front to back, so pages that were added or removed give all later
/// ones another place. Moves come first, then what is written ([`Self::move_pages`]). As with
/// [`PagemapWriter`] nothing is durable.
pub struct PagesPatch<'a> {
    map: &'a PagemapFile,
    map_path: PathBuf,
    pages: File,
    pages_path: PathBuf,
    buffer: Vec<u8>,
}

impl<'a> PagesPatch<'a> {
    /// Takes the file `earlier` of `earlier_pages` pages over as the pages file of `map` in `dir`.
    /// `<name>.img` comes with [`Self::finish`]; neither may be there.
    ///
    /// Returns `None` and changes nothing if `earlier` is missing, has another length, or has
    /// another name (hard link) too: whatever refers to it would change with it.
    pub fn begin(
        earlier: &Path,
        earlier_pages: u64,
        dir: &Path,
        map: &'a PagemapFile,
    ) -> Result<Option<Self>, ImageError> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(libc::O_NOFOLLOW);
        let pages = match options.open(earlier) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened.map_err(ImageError::io("open", earlier))?,
        };
        let found = pages.metadata().map_err(ImageError::io("stat", earlier))?;
        let is_whole = earlier_pages.checked_mul(PAGE_BYTES) == Some(found.len());
        if !found.is_file() || found.nlink() != 1 || !is_whole {
            return Ok(None);
        }
        let pages_path = dir.join(format!("pages-{}.img", map.pages_id));
        // A link, since a rename would replace a file that is there.
        fs::hard_link(earlier, &pages_path).map_err(ImageError::io("create", &pages_path))?;
        fs::remove_file(earlier).map_err(ImageError::io("remove", earlier))?;
        let map_path = dir.join(format!("{}.img", map.name));
        Ok(Some(Self { map, map_path, pages, pages_path, buffer: Vec::new() }))
    }

    /// Moves `pages` pages from place `from` to place `to`, counted from the first page of the
    /// file. The two may overlap.
    ///
    /// Of several moves that keep the pages' order, those towards the front come first, ascending,
    /// and then those towards the end, descending: so none overwrites what another one still needs.
    pub fn move_pages(&mut self, from: u64, to: u64, pages: u64) -> Result<(), ImageError> {
        self.buffer.resize(MOVE_BYTES, 0);
        let (from, to, len) = (from * PAGE_BYTES, to * PAGE_BYTES, pages * PAGE_BYTES);
        let mut done = 0;
        while done < len {
            let take = (len - done).min(MOVE_BYTES as u64);
            // What is overwritten before it was read has to be behind us.
            let at = if to < from { done } else { len - done - take };
            let buffer = &mut self.buffer[..usize::try_from(take).unwrap_or(MOVE_BYTES)];
            let moved = self.pages.read_exact_at(buffer, from + at);
            let moved = moved.and_then(|()| self.pages.write_all_at(buffer, to + at));
            moved.map_err(ImageError::io("move pages of", &self.pages_path))?;
            done += take;
        }
        Ok(())
    }

    /// Writes the page at `place`, counted from the first page of the file.
    pub fn write(&self, place: u64, page: &[u8]) -> Result<(), ImageError> {
        let written = self.pages.write_all_at(page, place * PAGE_BYTES);
        written.map_err(ImageError::io("write", &self.pages_path))
    }

    /// Cuts the file to its length and writes the page map.
    pub fn finish(self) -> Result<(), ImageError> {
        let cut = self.pages.set_len(self.map.pages_bytes());
        cut.map_err(ImageError::io("set the length of", &self.pages_path))?;
        let mut file = create_private(&self.map_path)?;
        let written = file.write_all(&self.map.to_bytes());
        written.map_err(ImageError::io("write", &self.map_path))
    }
}

/// Makes `child` refer to `parent`, a path relative to `child`: CRIU follows it at the restore.
pub fn link_parent(child: &Path, parent: &Path) -> Result<(), ImageError> {
    let link = child.join(PARENT_LINK);
    std::os::unix::fs::symlink(parent, &link).map_err(ImageError::io("link", &link))
}

fn create_private(path: &Path) -> Result<File, ImageError> {
    let mut options = OpenOptions::new();
    // 0600: memory holds secrets.
    options.write(true).create_new(true).mode(0o600);
    options.open(path).map_err(ImageError::io("create", path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// As CRIU 4.1.1 writes it.
    const NARROW: &[u8] = b"\x19\x43\x56\x54\x25\x40\x08\x56\
        \x02\0\0\0\x08\x01\
        \x09\0\0\0\x08\x80\x80\x80\x02\x10\x03\x20\x04\
        \x09\0\0\0\x08\x80\xe0\x80\x02\x10\x01\x20\x06";

    /// As CRIU 4.2 writes it.
    const WIDE: &[u8] = b"\x19\x43\x56\x54\x25\x40\x08\x56\
        \x02\0\0\0\x08\x07\
        \x0b\0\0\0\x08\x80\x80\x80\x02\x10\0\x20\x04\x28\x03\
        \x0b\0\0\0\x08\x80\xe0\x80\x02\x10\0\x20\x01\x28\x01";

    #[test]
    fn both_forms_parse_and_are_written_back_byte_for_byte() {
        let narrow = PagemapFile::parse("pagemap-1", NARROW).unwrap();
        assert_eq!((narrow.pages_id, narrow.form), (1, Form::Narrow));
        let first = Run { vaddr: 0x40_0000, pages: 3, flags: PRESENT };
        assert_eq!(
            narrow.entries,
            [first, Run { vaddr: 0x40_3000, pages: 1, flags: PRESENT | LAZY }]
        );
        assert_eq!(narrow.to_bytes(), NARROW);
        let wide = PagemapFile::parse("pagemap-1", WIDE).unwrap();
        assert_eq!((wide.pages_id, wide.form, wide.entries[0]), (7, Form::Wide, first));
        assert!(wide.entries[1].in_parent());
        assert_eq!(wide.to_bytes(), WIDE);
        let places: Vec<_> = wide.places().map(|(_, offset)| offset).collect();
        assert_eq!(places, [Some(0), None]);
        assert_eq!((narrow.pages_bytes(), wide.pages_bytes()), (4 * 4096, 3 * 4096));
    }

    fn with_entries(entries: &[Entry]) -> Vec<u8> {
        let mut bytes = NARROW[..14].to_vec();
        for entry in entries {
            let message = entry.encode_to_vec();
            bytes.extend_from_slice(&u32::try_from(message.len()).unwrap().to_le_bytes());
            bytes.extend_from_slice(&message);
        }
        bytes
    }

    #[test]
    fn what_breaks_a_rule_is_refused_with_its_place() {
        let entry = |vaddr, compat_nr_pages| Entry { vaddr, compat_nr_pages, ..Entry::default() };
        let huge = Entry { nr_pages: Some(u64::MAX), ..entry(0x1000, 0) };
        let torn = Entry { in_parent: Some(true), flags: Some(PRESENT), ..entry(0, 1) };
        let cases: [(&[Entry], &str); 7] = [
            (&[entry(0x1000, 0)], "empty"),
            (&[entry(0x1001, 1)], "aligned"),
            (&[entry(0x2000, 1), entry(0x1000, 1)], "ascend"),
            (&[entry(0x1000, 2), entry(0x2000, 1)], "overlap"),
            (&[huge], "address space"),
            (&[entry(u64::MAX - 4095, 1)], "address space"),
            (&[torn], "both"),
        ];
        for (entries, rule) in cases {
            let error = PagemapFile::parse("pagemap-1", &with_entries(entries)).unwrap_err();
            assert!(error.to_string().contains(rule), "{error}");
        }
        let mut long = NARROW[..14].to_vec();
        long.extend_from_slice(&[0xff; 4]);
        let error = PagemapFile::parse("pagemap-9", &long).unwrap_err();
        assert_eq!(error.to_string(), "pagemap-9.img at offset 14: a message is too long");
        for len in 0..NARROW.len() {
            let cut = PagemapFile::parse("pagemap-1", &NARROW[..len]);
            assert_eq!(cut.is_ok(), len == 14 || len == 27, "{len}");
        }
    }

    #[test]
    fn a_directory_tells_memory_from_the_rest_and_checks_lengths() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: &[u8]| fs::write(dir.path().join(name), bytes).unwrap();
        write("pagemap-1.img", NARROW);
        write("pages-1.img", &[1; 4 * 4096]);
        write("inventory.img", b"");
        write("core-1.img", b"");
        link_parent(dir.path(), Path::new("../staged")).unwrap();
        let images = ImageDirectory::open(dir.path()).unwrap();
        assert_eq!(images.other_files(), ["core-1.img", "inventory.img"]);
        assert_eq!(images.parent(), Some(PathBuf::from("../staged")));
        assert_eq!(images.pagemaps().unwrap().len(), 1);
        write("pages-1.img", &[1; 4 * 4096 - 1]);
        assert!(matches!(images.pagemaps(), Err(ImageError::PagesShort { needed: 16384, .. })));
        std::os::unix::fs::symlink("/etc/shadow", dir.path().join("fs-1.img")).unwrap();
        assert!(matches!(ImageDirectory::open(dir.path()), Err(ImageError::Foreign(_))));
    }

    #[test]
    fn a_writer_joins_neighbours_and_refuses_disorder() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = PagemapWriter::create(dir.path(), "pagemap-1", 5, Form::Wide).unwrap();
        writer.in_parent(0x1000, 1).unwrap();
        writer.in_parent(0x2000, 2).unwrap();
        writer.present(0x4000, PRESENT, &[1; 4096]).unwrap();
        writer.present(0x5000, PRESENT, &[2; 8192]).unwrap();
        writer.present(0x9000, PRESENT | LAZY, &[3; 4096]).unwrap();
        assert!(writer.present(0xa000, PRESENT, &[4; 4095]).is_err());
        assert!(writer.in_parent(0x9000, 1).is_err());
        let map = writer.finish().unwrap();
        assert_eq!(map.entries.len(), 3);
        let images = ImageDirectory::open(dir.path()).unwrap();
        assert_eq!(images.pagemaps().unwrap(), [map]);
        let pages = fs::read(images.pages_path(5)).unwrap();
        assert_eq!(pages, [[1; 4096], [2; 4096], [2; 4096], [3; 4096]].concat());
        assert!(PagemapWriter::create(dir.path(), "pagemap-2", 5, Form::Wide).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_parse_or_fail_without_panic(bytes: Vec<u8>) {
            let mut image = NARROW[..14].to_vec();
            image.extend_from_slice(&bytes);
            let _ = PagemapFile::parse("pagemap-1", &image);
        }

        #[test]
        fn runs_survive_in_both_forms(
            runs in proptest::collection::vec((1_u64..9, 0_u64..3, 0_usize..3), 0..20),
            wide: bool,
        ) {
            let mut floor = 0x1000;
            let entries: Vec<Run> = runs.iter().map(|(pages, gap, kind)| {
                let flags = [PRESENT, IN_PARENT, PRESENT | LAZY][*kind];
                let run = Run { vaddr: floor + gap * PAGE_BYTES, pages: *pages, flags };
                floor = run.end();
                run
            }).collect();
            let form = if wide && !entries.is_empty() { Form::Wide } else { Form::Narrow };
            let map = PagemapFile { name: "pagemap-1".to_owned(), pages_id: 1, form, entries };
            prop_assert_eq!(PagemapFile::parse("pagemap-1", &map.to_bytes()).unwrap(), map);
        }
    }
}
