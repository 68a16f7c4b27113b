//! Memory images: from a running process or CRIU's image directory to objects.
//!
//! Pages are addressed by address space and address, not by their place in `pages-*.img`, where one
//! grown mapping shifts all that follow. Before the dump the pages are read from the running
//! processes: not a consistent picture, but nearly all of what the dump will hold, and the dump
//! decides. Its pages are hashed while CRIU writes them ([`DumpReader`]).
//!
//! Read next: [`super::staging`] for the way back.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use criu_wrapper::live;
use criu_wrapper::pagemap::{ImageDirectory, PagemapFile};
use godwit_protos::Digest;
use rayon::prelude::*;

use super::ahead::{Ahead, Hashed};
use super::alias::Aliases;
use super::capture::{Unchanged, capture};
use super::object::{Map, Memory, PAGE_BYTES, PAGES_PER_BLOCK, Pages};
use super::{ContentError, Sink, Source, on, put_object};

/// Bytes of pages that are hashed at once, on all processors.
const BATCH_BYTES: usize = 16 << 20;

/// A finished capture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Captured {
    /// The [`Memory`] object.
    pub digest: Digest,
    /// Bytes of its pages.
    pub bytes: u64,
    /// Bytes of pages that differ from the version before.
    pub changed_bytes: u64,
}

/// The pages of the version before, so that only what changed is stored.
#[derive(Debug, Default)]
pub struct Previous {
    maps: HashMap<String, PreviousMap>,
}

#[derive(Debug, Default)]
struct PreviousMap {
    blocks: HashMap<u64, Pages>,
    aliases: Arc<Aliases>,
}

impl Previous {
    /// Loads a version; `None` is no version.
    pub fn load<S: Source>(source: &S, memory: Option<Digest>) -> Result<Self, ContentError> {
        let Some(memory) = memory else { return Ok(Self::default()) };
        let memory: Memory = source.decode(&memory)?;
        let mut maps = HashMap::new();
        for (index, map) in memory.maps.iter().enumerate() {
            let mut blocks = HashMap::new();
            for (number, block) in map.numbers.iter().zip(&map.blocks) {
                blocks.insert(*number, source.decode::<Pages>(block)?);
            }
            let aliases = Arc::new(memory.aliases(index));
            maps.insert(map.name.clone(), PreviousMap { blocks, aliases });
        }
        Ok(Self { maps })
    }

    /// The aliases that the pages of a map were made with.
    fn aliases(&self, map: &str) -> Option<Arc<Aliases>> {
        self.maps.get(map).map(|map| map.aliases.clone())
    }

    /// The aliases of all maps, by name.
    fn all_aliases(&self) -> HashMap<String, Arc<Aliases>> {
        self.maps.iter().map(|(name, map)| (name.clone(), map.aliases.clone())).collect()
    }

    fn page(&self, map: &str, page: u64) -> Option<Digest> {
        let (block, slot) = place(page);
        let block = self.maps.get(map)?.blocks.get(&block)?;
        let index = block.slots.binary_search(&slot).ok()?;
        Some(block.pages[index])
    }
}

/// A dump that is being read while CRIU writes it.
#[derive(Debug)]
pub struct DumpReader {
    images: PathBuf,
    previous: Previous,
    ahead: Ahead,
}

impl DumpReader {
    /// Begins to read the dump into `images`, an empty directory, of the memory that was captured
    /// as `previous`.
    pub fn begin(images: &Path, previous: Previous) -> Self {
        let ahead = Ahead::begin(images, previous.all_aliases());
        Self { images: images.to_owned(), previous, ahead }
    }

    /// Reads the dump into `sink` once CRIU is done. Its pages files are moved out of the image
    /// directory, to one beside it.
    ///
    /// Errors: [`ContentError::Images`] for images that are not as CRIU writes them, or the sink's.
    pub fn finish(self, sink: &mut dyn Sink) -> Result<Captured, ContentError> {
        let Self { images, previous, ahead } = self;
        capture_dump(&images, sink, &previous, &ahead.finish())
    }
}

/// Block number and slot of a page number.
fn place(page: u64) -> (u64, u8) {
    let per_block = PAGES_PER_BLOCK as u64;
    (page / per_block, u8::try_from(page % per_block).unwrap_or(u8::MAX))
}

/// Reads the memory of running processes into `sink`.
///
/// - `pids` may hold threads and processes that have ended.
/// - `images` is what is known of the image directory before the dump ([`super::tmpfs`]).
/// - Errors: [`ContentError::Process`] or the sink's; the processes are never stopped.
pub fn capture_live(
    pids: &[u32],
    sink: &mut dyn Sink,
    previous: &Previous,
    images: Option<Digest>,
) -> Result<Captured, ContentError> {
    let failed = |pid: u32| move |source| ContentError::Process { pid, source };
    let mut maps = Maps::new(sink, previous);
    let mut shared = BTreeMap::new();
    let first = pids.first().copied().unwrap_or(0);
    for pid in live::leaders(pids).map_err(failed(first))? {
        let Some(id) = live::ns_pid(pid).map_err(failed(pid))? else { continue };
        let name = format!("pagemap-{id}");
        let mappings = live::mappings(pid).map_err(failed(pid))?;
        // What differs in aliases is as different as what differs in content.
        let aliases = match previous.aliases(&name) {
            Some(aliases) => aliases,
            None => Arc::new(Aliases::of(&mappings)),
        };
        for mapping in mappings.into_iter().filter(live::Mapping::is_shared_memory) {
            shared.entry(mapping.inode).or_insert((pid, mapping));
        }
        maps.begin(name, aliases);
        maps.add_all(|visit| live::scan(pid, visit).map(drop).map_err(failed(pid)))?;
    }
    for (inode, (pid, mapping)) in shared {
        maps.begin(format!("pagemap-shmem-{inode}"), Arc::default());
        maps.add_all(|visit| live::scan_shared(pid, &mapping, visit).map_err(failed(pid)))?;
    }
    maps.finish(images)
}

/// Reads CRIU's image directory into `sink`. Its pages files are moved out of it, to the directory
/// beside it. Pages of which `hashed` has the digest are read only if they changed.
fn capture_dump(
    images: &Path,
    sink: &mut dyn Sink,
    previous: &Previous,
    hashed: &Hashed,
) -> Result<Captured, ContentError> {
    let directory = ImageDirectory::open(images)?;
    let pagemaps = directory.pagemaps()?;
    let mut maps = Maps::new(sink, previous);
    let aside = images.with_extension("pages");
    fs::create_dir_all(&aside).map_err(on("make directory", &aside))?;
    for pagemap in pagemaps {
        let path = directory.pages_path(pagemap.pages_id);
        maps.begin(pagemap.name.clone(), previous.aliases(&pagemap.name).unwrap_or_default());
        let file = File::open(&path).map_err(on("open", &path))?;
        maps.add_dumped(&pagemap, (&file, &path), hashed.of(&pagemap))?;
        maps.end()?;
        if let Some(name) = path.file_name() {
            fs::rename(&path, aside.join(name)).map_err(on("move", &path))?;
        }
    }
    let metadata = capture(images, maps.sink, &mut Unchanged::default())?;
    maps.finish(Some(metadata.tree))
}

/// Collects the pages of one address space after the other.
struct Maps<'a> {
    sink: &'a mut dyn Sink,
    previous: &'a Previous,
    done: Vec<(Map, Arc<Aliases>)>,
    name: String,
    aliases: Arc<Aliases>,
    numbers: Vec<u64>,
    blocks: Vec<Digest>,
    /// The block that is being filled, and its number once it has a page.
    block: Pages,
    number: Option<u64>,
    /// Page numbers and contents of what is not hashed yet.
    waiting: Vec<u64>,
    bytes: Vec<u8>,
    pages: u64,
    changed: u64,
}

impl<'a> Maps<'a> {
    fn new(sink: &'a mut dyn Sink, previous: &'a Previous) -> Self {
        Self {
            sink,
            previous,
            done: Vec::new(),
            name: String::new(),
            aliases: Arc::default(),
            numbers: Vec::new(),
            blocks: Vec::new(),
            block: Pages { slots: Vec::new(), pages: Vec::new() },
            number: None,
            waiting: Vec::new(),
            bytes: Vec::with_capacity(BATCH_BYTES + (1 << 20)),
            pages: 0,
            changed: 0,
        }
    }

    fn begin(&mut self, name: String, aliases: Arc<Aliases>) {
        self.name = name;
        self.aliases = aliases;
    }

    /// Adds whole pages from `address` on. Addresses ascend within a map.
    fn add(&mut self, address: u64, pages: &[u8]) -> Result<(), ContentError> {
        let first = address / PAGE_BYTES as u64;
        self.waiting.extend((first..).zip(pages.chunks_exact(PAGE_BYTES)).map(|(page, _)| page));
        self.bytes.extend_from_slice(pages);
        if self.bytes.len() >= BATCH_BYTES { self.store() } else { Ok(()) }
    }

    /// Adds what `scan` visits, and ends the map.
    fn add_all(
        &mut self,
        scan: impl FnOnce(&mut dyn FnMut(u64, &[u8])) -> Result<(), ContentError>,
    ) -> Result<(), ContentError> {
        let mut stored = Ok(());
        scan(&mut |address, pages| {
            if stored.is_ok() {
                stored = self.add(address, pages);
            }
        })?;
        stored?;
        self.end()
    }

    /// Adds the pages of a page map from its pages file; `hashed` are the digests of the first of
    /// them.
    fn add_dumped(
        &mut self,
        pagemap: &PagemapFile,
        (file, path): (&File, &Path),
        hashed: &[Digest],
    ) -> Result<(), ContentError> {
        let read = |buffer: &mut [u8], offset| {
            file.read_exact_at(buffer, offset).map_err(on("read", path))
        };
        let mut hashed = hashed.iter();
        let mut buffer = vec![0; 1 << 20];
        for (run, offset) in pagemap.places() {
            let Some(mut offset) = offset else { continue };
            let mut address = run.vaddr;
            while address < run.end() {
                let Some(digest) = hashed.next() else { break };
                let content = || {
                    let mut page = vec![0; PAGE_BYTES];
                    read(&mut page, offset)?;
                    self.aliases.replace(&mut page);
                    Ok::<_, ContentError>(page)
                };
                let page = address / PAGE_BYTES as u64;
                if self.previous.page(&self.name, page) != Some(*digest) {
                    self.sink.put_hashed(*digest, &content()?)?;
                    self.changed += 1;
                }
                self.place(page, *digest)?;
                (address, offset) = (address + PAGE_BYTES as u64, offset + PAGE_BYTES as u64);
            }
            while address < run.end() {
                let left = usize::try_from(run.end() - address).unwrap_or(usize::MAX);
                let take = left.min(buffer.len());
                read(&mut buffer[..take], offset)?;
                self.add(address, &buffer[..take])?;
                (address, offset) = (address + take as u64, offset + take as u64);
            }
        }
        Ok(())
    }

    /// Hashes what waits and stores what changed of it.
    fn store(&mut self) -> Result<(), ContentError> {
        let aliases = self.aliases.clone();
        let hash = |page: &mut [u8]| {
            aliases.replace(page);
            Digest::of(page)
        };
        let (waiting, mut bytes) =
            (std::mem::take(&mut self.waiting), std::mem::take(&mut self.bytes));
        let digests: Vec<Digest> = bytes.par_chunks_mut(PAGE_BYTES).map(hash).collect();
        for ((page, digest), content) in
            waiting.iter().zip(&digests).zip(bytes.chunks_exact(PAGE_BYTES))
        {
            if self.previous.page(&self.name, *page) != Some(*digest) {
                self.sink.put_hashed(*digest, content)?;
                self.changed += 1;
            }
            self.place(*page, *digest)?;
        }
        // Their room serves the next batch.
        bytes.clear();
        self.bytes = bytes;
        Ok(())
    }

    /// Adds a page to its block, and stores the block before if the page begins another one.
    fn place(&mut self, page: u64, digest: Digest) -> Result<(), ContentError> {
        let (number, slot) = place(page);
        if self.number != Some(number) {
            self.end_block()?;
            self.number = Some(number);
        }
        self.block.slots.push(slot);
        self.block.pages.push(digest);
        self.pages += 1;
        Ok(())
    }

    fn end_block(&mut self) -> Result<(), ContentError> {
        let Some(number) = self.number.take() else { return Ok(()) };
        self.numbers.push(number);
        self.blocks.push(put_object(self.sink, &self.block)?);
        self.block.slots.clear();
        self.block.pages.clear();
        Ok(())
    }

    fn end(&mut self) -> Result<(), ContentError> {
        self.store()?;
        self.end_block()?;
        let map = Map {
            name: std::mem::take(&mut self.name),
            numbers: std::mem::take(&mut self.numbers),
            blocks: std::mem::take(&mut self.blocks),
        };
        self.done.push((map, std::mem::take(&mut self.aliases)));
        Ok(())
    }

    fn finish(mut self, images: Option<Digest>) -> Result<Captured, ContentError> {
        self.done.sort_by(|(one, _), (other, _)| one.name.cmp(&other.name));
        if let Some(same) = self.done.windows(2).find(|pair| pair[0].0.name == pair[1].0.name) {
            return Err(ContentError::SameNumbers(same[0].0.name.clone()));
        }
        let bytes = self.pages * PAGE_BYTES as u64;
        let areas = self.done.iter().map(|(_, aliases)| aliases.areas().to_vec()).collect();
        let maps = self.done.into_iter().map(|(map, _)| map).collect();
        let memory = Memory { images, maps, pages: self.pages, areas };
        let digest = put_object(self.sink, &memory)?;
        Ok(Captured { digest, bytes, changed_bytes: self.changed * PAGE_BYTES as u64 })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::content::alias::Area;
    use crate::content::fake::Objects;
    use criu_wrapper::pagemap::{Form, LAZY, PRESENT, PagemapWriter};

    pub(crate) fn page(content: u8) -> Vec<u8> {
        vec![content; PAGE_BYTES]
    }

    /// A dump of one process with pages of these numbers, each filled with one byte.
    pub(crate) fn dump(directory: &Path, pages: &[(u64, u8)]) {
        fs::create_dir_all(directory).unwrap();
        let mut writer = PagemapWriter::create(directory, "pagemap-1", 1, Form::Wide).unwrap();
        for (number, content) in pages {
            writer.present(number * 4096, PRESENT | LAZY, &page(*content)).unwrap();
        }
        writer.finish().unwrap();
        fs::write(directory.join("core-1.img"), b"registers").unwrap();
    }

    /// As [`dump`], with the files in CRIU's order.
    fn dump_as_criu(directory: &Path, pages: &[(u64, u8)]) {
        let whole = directory.with_extension("whole");
        dump(&whole, pages);
        fs::write(directory.join("pagemap-1.img"), b"").unwrap();
        for name in ["pages-1.img", "pagemap-1.img", "core-1.img"] {
            fs::copy(whole.join(name), directory.join(name)).unwrap();
        }
    }

    /// Dumps into `directory` and reads it. `before` is the version before.
    pub(crate) fn dumped(
        directory: &Path,
        pages: &[(u64, u8)],
        objects: &mut Objects,
        before: Option<Digest>,
    ) -> Captured {
        dump(directory, pages);
        let previous = Previous::load(objects, before).unwrap();
        capture_dump(directory, objects, &previous, &Hashed::default()).unwrap()
    }

    /// A version before without pages, whose process had its words of bytes `content` at offset 100
    /// of an area.
    pub(crate) fn with_area(content: u8) -> Previous {
        let start = u64::from_le_bytes([content; 8]) - 100;
        let aliases = Aliases::new(vec![Area { start, end: start + 4096, alias: 1 << 62 }]);
        let map = PreviousMap { blocks: HashMap::new(), aliases: Arc::new(aliases.unwrap()) };
        Previous { maps: HashMap::from([("pagemap-1".to_owned(), map)]) }
    }

    /// As [`dumped`] after [`with_area`].
    pub(crate) fn dumped_with_area(
        directory: &Path,
        pages: &[(u64, u8)],
        objects: &mut Objects,
        content: u8,
    ) -> Captured {
        dump(directory, pages);
        capture_dump(directory, objects, &with_area(content), &Hashed::default()).unwrap()
    }

    pub(crate) fn digest_of(objects: &Objects, memory: Digest, page: u64) -> Digest {
        Previous::load(objects, Some(memory)).unwrap().page("pagemap-1", page).unwrap()
    }

    #[test]
    fn only_what_changed_counts_as_changed() {
        let dir = tempfile::tempdir().unwrap();
        let mut objects = Objects::default();
        let mut pages: Vec<(u64, u8)> = (0..600).map(|n| (n * 2, 1)).collect();
        let first = dumped(&dir.path().join("one"), &pages, &mut objects, None);
        assert_eq!((first.bytes, first.changed_bytes), (600 * 4096, 600 * 4096));
        pages[17].1 = 2;
        pages.push((5000, 3));
        let second = dumped(&dir.path().join("two"), &pages, &mut objects, Some(first.digest));
        assert_eq!((second.bytes, second.changed_bytes), (601 * 4096, 2 * 4096));
    }

    #[test]
    fn a_dump_that_was_read_while_it_grew_is_the_same_as_one_read_at_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (dir.path().join("one"), dir.path().join("two"));
        let number = |n: u64| u8::try_from(n % 251).unwrap();
        let pages: Vec<(u64, u8)> = (0..700).map(|n| (n * 3, number(n))).collect();
        let mut at_end = Objects::default();
        let expected = dumped_with_area(&one, &pages, &mut at_end, 7);
        fs::create_dir(&two).unwrap();
        let reader = DumpReader::begin(&two, with_area(7));
        dump_as_criu(&two, &pages);
        reader.ahead.wait_for(700);
        let mut ahead = Objects::default();
        let found = reader.finish(&mut ahead).unwrap();
        assert_eq!(found.changed_bytes, expected.changed_bytes);
        // The other images have times of their own.
        let memory = |objects: &Objects, captured: &Captured| {
            let memory: Memory = objects.decode(&captured.digest).unwrap();
            (memory.maps, memory.pages, memory.areas)
        };
        assert_eq!(memory(&ahead, &found), memory(&at_end, &expected));
        let of_pages = |objects: &Objects| {
            let is_page = |object: &&Vec<u8>| object.len() == PAGE_BYTES;
            objects.0.values().filter(is_page).cloned().collect::<std::collections::BTreeSet<_>>()
        };
        assert_eq!(of_pages(&ahead), of_pages(&at_end));
    }

    #[test]
    fn a_dump_that_failed_is_an_error_and_its_reader_ends() {
        let dir = tempfile::tempdir().unwrap();
        let images = dir.path().join("images");
        fs::create_dir(&images).unwrap();
        let reader = DumpReader::begin(&images, Previous::default());
        dump_as_criu(&images, &(0..64).map(|n| (n, 1)).collect::<Vec<_>>());
        reader.ahead.wait_for(64);
        // Cut short behind what was hashed.
        let pages = fs::File::options().write(true).open(images.join("pages-1.img")).unwrap();
        pages.set_len(10 * 4096).unwrap();
        let mut objects = Objects::default();
        assert!(matches!(reader.finish(&mut objects), Err(ContentError::Images(_))));
        assert!(objects.0.is_empty());
        // The directory is removed under a reader that is never finished.
        let reader = DumpReader::begin(&images, Previous::default());
        fs::remove_dir_all(&images).unwrap();
        drop(reader);
    }

    #[test]
    fn a_running_process_is_read_without_being_stopped() {
        let mut objects = Objects::default();
        let marker: Vec<u8> = (0..PAGE_BYTES * 8).map(|n| (n / 7 % 251).to_le_bytes()[0]).collect();
        let captured =
            capture_live(&[std::process::id()], &mut objects, &Previous::default(), None).unwrap();
        assert!(captured.bytes > 0);
        // The allocation is not aligned to pages; whole pages within it are known by content.
        let start = PAGE_BYTES - marker.as_ptr() as usize % PAGE_BYTES;
        let inner = Digest::of(&marker[start..start + PAGE_BYTES]);
        assert!(objects.0.contains_key(&inner));
    }
}
