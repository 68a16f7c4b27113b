//! Memory images: from a running process or CRIU's image directory to objects, and back.
//!
//! Pages are addressed by address space and address, not by their place in `pages-*.img`, where one
//! grown mapping shifts all that follow. Before the dump the pages are read from the running
//! processes: not a consistent picture, but nearly all of what the dump will hold, and the dump
//! decides.
//!
//! At the destination the last version before the stop becomes a *parent* image (`base`), written
//! while the container still runs. The images of the cut then hold only the pages that differ and
//! refer to the parent for the rest, as CRIU's own incremental dumps do (criu.org, "Incremental
//! dumps"); restoring them needs no dirty tracking in the kernel.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::path::Path;
use std::sync::Arc;

use criu_wrapper::live;
use criu_wrapper::mend::{self, Host, Mended};
use criu_wrapper::pagemap::{
    Form, ImageDirectory, PAGEMAP_BYTES_MAX, PRESENT, PagemapFile, PagemapWriter, link_parent,
};
use godwit_protos::Digest;
use rayon::prelude::*;

use super::alias::Aliases;
use super::capture::{Unchanged, capture};
use super::materialize::materialize;
use super::object::{
    Kind, Map, Memory, Node, ObjectError, PAGE_BYTES, PAGES_PER_BLOCK, Pages, Tree,
};
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

    fn page(&self, map: &str, page: u64) -> Option<Digest> {
        let (block, slot) = place(page);
        let block = self.maps.get(map)?.blocks.get(&block)?;
        let index = block.slots.binary_search(&slot).ok()?;
        Some(block.pages[index])
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
/// beside it.
///
/// Errors: [`ContentError::Images`] for images that are not as CRIU writes them, or the sink's.
pub fn capture_dump(
    images: &Path,
    sink: &mut dyn Sink,
    previous: &Previous,
) -> Result<Captured, ContentError> {
    let directory = ImageDirectory::open(images)?;
    let pagemaps = directory.pagemaps()?;
    let mut maps = Maps::new(sink, previous);
    let aside = images.with_extension("pages");
    fs::create_dir_all(&aside).map_err(on("make directory", &aside))?;
    for pagemap in pagemaps {
        let path = directory.pages_path(pagemap.pages_id);
        maps.begin(pagemap.name.clone(), previous.aliases(&pagemap.name).unwrap_or_default());
        let mut file = File::open(&path).map_err(on("open", &path))?;
        let mut buffer = vec![0; 1 << 20];
        for (run, offset) in pagemap.places() {
            if offset.is_none() {
                continue;
            }
            let (mut address, mut left) = (run.vaddr, run.len_bytes());
            while left > 0 {
                let take = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
                file.read_exact(&mut buffer[..take]).map_err(on("read", &path))?;
                maps.add(address, &buffer[..take])?;
                address += take as u64;
                left -= take as u64;
            }
        }
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
    /// Page numbers and contents of what is not stored yet: whole blocks but for the last.
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
        for (page, bytes) in (first..).zip(pages.chunks_exact(PAGE_BYTES)) {
            let ends_block =
                self.waiting.last().is_some_and(|last| place(*last).0 != place(page).0);
            if ends_block && self.bytes.len() >= BATCH_BYTES {
                self.store()?;
            }
            self.waiting.push(page);
            self.bytes.extend_from_slice(bytes);
        }
        Ok(())
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

    fn store(&mut self) -> Result<(), ContentError> {
        let aliases = &self.aliases;
        let hash = |page: &mut [u8]| {
            aliases.replace(page);
            Digest::of(page)
        };
        let digests: Vec<Digest> = self.bytes.par_chunks_mut(PAGE_BYTES).map(hash).collect();
        let contents = self.bytes.chunks_exact(PAGE_BYTES);
        let mut block = Pages { slots: Vec::new(), pages: Vec::new() };
        let mut number = None;
        for ((page, digest), content) in self.waiting.iter().zip(&digests).zip(contents) {
            let (at, slot) = place(*page);
            if let Some(before) = number.filter(|before| *before != at) {
                let full =
                    std::mem::replace(&mut block, Pages { slots: Vec::new(), pages: Vec::new() });
                self.numbers.push(before);
                self.blocks.push(put_object(self.sink, &full)?);
            }
            number = Some(at);
            if self.previous.page(&self.name, *page) != Some(*digest) {
                self.sink.put_hashed(*digest, content)?;
                self.changed += 1;
            }
            block.slots.push(slot);
            block.pages.push(*digest);
        }
        if let Some(number) = number {
            self.numbers.push(number);
            self.blocks.push(put_object(self.sink, &block)?);
        }
        self.pages += self.waiting.len() as u64;
        self.waiting.clear();
        self.bytes.clear();
        Ok(())
    }

    fn end(&mut self) -> Result<(), ContentError> {
        self.store()?;
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

/// A page as the process has it.
fn page_of<S: Source>(
    source: &S,
    page: &Digest,
    aliases: &Aliases,
) -> Result<Vec<u8>, ContentError> {
    let mut bytes = source.object(page)?.to_vec();
    aliases.replace(&mut bytes);
    Ok(bytes)
}

/// Writes every page of `memory` into the empty directory `base`, as a parent image.
pub fn stage_base<S: Source>(source: &S, memory: &Digest, base: &Path) -> Result<(), ContentError> {
    let memory: Memory = source.decode(memory)?;
    for ((index, map), pages_id) in memory.maps.iter().enumerate().zip(1..) {
        let aliases = memory.aliases(index);
        let mut writer = PagemapWriter::create(base, &map.name, pages_id, Form::Narrow)?;
        for (number, block) in map.numbers.iter().zip(&map.blocks) {
            let block: Pages = source.decode(block)?;
            for (slot, page) in block.slots.iter().zip(&block.pages) {
                let address =
                    (number * PAGES_PER_BLOCK as u64 + u64::from(*slot)) * PAGE_BYTES as u64;
                writer.present(address, PRESENT, &page_of(source, page, &aliases)?)?;
            }
        }
        writer.finish()?;
    }
    Ok(())
}

/// Writes the images of `memory` into the empty directory `images`, leaving out the pages that the
/// parent image `base_directory` beside it, made of `base`, has at the same address. The images are
/// mended for this host ([`mend`]): every restore of what a node has received or kept comes through
/// here, once.
///
/// Errors: [`ContentError`], also when a page that CRIU's page map announces is not part of
/// `memory`.
pub fn stage_images<S: Source>(
    source: &S,
    memory: &Digest,
    base: Option<&Digest>,
    base_directory: &Path,
    images: &Path,
) -> Result<(), ContentError> {
    let (root, base) = (*memory, Previous::load(source, base.copied())?);
    let memory: Memory = source.decode(&root)?;
    let tree = memory.images.ok_or(ContentError::Missing(root))?;
    check_images(source, &tree, &memory)?;
    materialize(source, &tree, None, images)?;
    let mended = mend_images(images)?;
    for name in &mended.whole {
        // CRIU looks here for the page map of the same process.
        let path = base_directory.join(format!("{name}.img"));
        match fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(on("remove", &path)(error));
            }
            _ => {}
        }
    }
    let all = Previous::load(source, Some(root))?;
    for (index, map) in memory.maps.iter().enumerate() {
        let aliases = memory.aliases(index);
        // Equal digests are equal pages only if they are turned back alike.
        let has_parent = !mended.whole.contains(&map.name)
            && base.aliases(&map.name).is_some_and(|before| *before == aliases);
        let path = images.join(format!("{}.img", map.name));
        let bytes = fs::read(&path).map_err(on("read", &path))?;
        let dumped = PagemapFile::parse(&map.name, &bytes)?;
        fs::remove_file(&path).map_err(on("replace", &path))?;
        let mut writer = PagemapWriter::create(images, &map.name, dumped.pages_id, dumped.form)?;
        for run in dumped.entries.iter().filter(|run| run.is_present()) {
            let first = run.vaddr / PAGE_BYTES as u64;
            for page in first..first + run.pages {
                let digest = all.page(&map.name, page).ok_or(ContentError::Missing(root))?;
                let address = page * PAGE_BYTES as u64;
                if has_parent && base.page(&map.name, page) == Some(digest) {
                    writer.in_parent(address, 1)?;
                } else {
                    let page = page_of(source, &digest, &aliases)?;
                    writer.present(address, run.flags, &page)?;
                }
            }
        }
        writer.finish()?;
    }
    if let Some(name) = base_directory.file_name().filter(|_| !base.maps.is_empty()) {
        // Relative, since CRIU follows it by the directory's descriptor from within the container's
        // root.
        link_parent(images, &Path::new("..").join(name))?;
    }
    Ok(())
}

/// Mends what CRIU would restore wrongly ([`mend`]).
fn mend_images(images: &Path) -> Result<Mended, ContentError> {
    let host = Host::here().map_err(on("read", Path::new("/proc")))?;
    let mended = mend::mend(images, &host)?;
    for error in &mended.unread {
        tracing::warn!(%error, "an image is restored as it is");
    }
    let Mended { timers, waits, reservations, whole, .. } = &mended;
    tracing::debug!(timers, waits, reservations, without_parent = whole.len(), "images mended");
    Ok(mended)
}

/// A peer's image directory holds what CRIU writes: regular files side by side, none of which
/// stands for pages that we did not check. Errors: [`ContentError::Object`] with the rule.
fn check_images<S: Source>(source: &S, tree: &Digest, memory: &Memory) -> Result<(), ContentError> {
    let broken = |rule| ContentError::Object {
        digest: *tree,
        source: ObjectError::Rule { kind: Kind::Tree, rule },
    };
    let root = source.decode::<Tree>(tree)?.root;
    for entry in source.entries(&root)? {
        let Node::File(bytes, _) = entry.node else {
            return Err(broken("an image directory holds regular files"));
        };
        let name = String::from_utf8_lossy(&entry.name);
        let name = name.strip_suffix(".img").unwrap_or(&name);
        if name.starts_with("pages-") || name == "parent" {
            return Err(broken("an image is neither pages nor a parent"));
        }
        if name.starts_with("pagemap-") {
            if !memory.maps.iter().any(|map| map.name == name) {
                return Err(broken("every page map has its pages"));
            }
            // Page maps are read as a whole. Others, such as the content of a tmpfs or of a deleted
            // file, are written to disk in chunks and may be of any size.
            if bytes > PAGEMAP_BYTES_MAX {
                return Err(broken("a page map is small"));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::content::alias::Area;
    use crate::content::fake::Objects;
    use crate::content::object::Object as _;
    use criu_wrapper::pagemap::LAZY;

    #[test]
    fn an_image_directory_of_a_hostile_peer_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        for hostile in ["pages-7.img", "parent", "pagemap-9.img"] {
            let from = dir.path().join(format!("from-{hostile}"));
            dump(&from, &[(1, 1)]);
            let mut objects = Objects::default();
            let honest = capture_dump(&from, &mut objects, &Previous::default()).unwrap();
            if hostile == "parent" {
                std::os::unix::fs::symlink("/etc", from.join(hostile)).unwrap();
            } else {
                fs::write(from.join(hostile), b"x").unwrap();
            }
            let tree = capture(&from, &mut objects, &mut Unchanged::default()).unwrap().tree;
            let mut memory: Memory = objects.decode(&honest.digest).unwrap();
            memory.images = Some(tree);
            let lie = objects.put(&memory.encode()).unwrap();
            let images = dir.path().join(format!("images-{hostile}"));
            fs::create_dir(&images).unwrap();
            let refused = stage_images(&objects, &lie, None, dir.path(), &images);
            assert!(matches!(refused, Err(ContentError::Object { .. })), "{hostile}");
            assert_eq!(fs::read_dir(&images).unwrap().count(), 0, "{hostile}");
        }
    }

    fn page(content: u8) -> Vec<u8> {
        vec![content; PAGE_BYTES]
    }

    /// A dump of one process with these pages.
    fn dump(directory: &Path, pages: &[(u64, u8)]) {
        fs::create_dir_all(directory).unwrap();
        let mut writer = PagemapWriter::create(directory, "pagemap-1", 1, Form::Wide).unwrap();
        for (number, content) in pages {
            writer.present(number * 4096, PRESENT | LAZY, &page(*content)).unwrap();
        }
        writer.finish().unwrap();
        fs::write(directory.join("core-1.img"), b"registers").unwrap();
    }

    /// What CRIU would read at each address: from the images, or from their parent.
    fn read(directory: &Path, page: u64) -> Option<Vec<u8>> {
        let images = ImageDirectory::open(directory).unwrap();
        let map = images.pagemap("pagemap-1").unwrap();
        for (run, offset) in map.places() {
            if (run.vaddr..run.end()).contains(&(page * 4096)) {
                let Some(offset) = offset else {
                    return read(&directory.join(images.parent().unwrap()), page);
                };
                let bytes = fs::read(images.pages_path(map.pages_id)).unwrap();
                let at = usize::try_from(offset + page * 4096 - run.vaddr).unwrap();
                return Some(bytes[at..at + PAGE_BYTES].to_vec());
            }
        }
        None
    }

    #[test]
    fn only_changed_pages_are_written_again_and_every_page_reads_as_dumped() {
        let dir = tempfile::tempdir().unwrap();
        let mut objects = Objects::default();
        let before: Vec<(u64, u8)> = (0..600).map(|n| (n * 2, 1)).collect();
        dump(&dir.path().join("one"), &before);
        let first =
            capture_dump(&dir.path().join("one"), &mut objects, &Previous::default()).unwrap();
        assert_eq!(first.changed_bytes, first.bytes);

        let mut after = before.clone();
        after[17].1 = 2;
        after.push((5000, 3));
        dump(&dir.path().join("two"), &after);
        let previous = Previous::load(&objects, Some(first.digest)).unwrap();
        let second = capture_dump(&dir.path().join("two"), &mut objects, &previous).unwrap();
        assert_eq!(second.changed_bytes, 2 * 4096);

        let (base, images) = (dir.path().join("base"), dir.path().join("images"));
        fs::create_dir(&base).unwrap();
        fs::create_dir(&images).unwrap();
        stage_base(&objects, &first.digest, &base).unwrap();
        stage_images(&objects, &second.digest, Some(&first.digest), &base, &images).unwrap();
        for (number, content) in &after {
            assert_eq!(read(&images, *number), Some(page(*content)), "page {number}");
        }
        let written = fs::metadata(images.join("pages-1.img")).unwrap().len();
        assert_eq!(written, 2 * 4096);
        assert_eq!(fs::read(images.join("core-1.img")).unwrap(), b"registers");
    }

    /// A version before without pages, whose process had its words of bytes `content` at offset 100
    /// of an area.
    fn with_area(content: u8) -> Previous {
        let start = u64::from_le_bytes([content; 8]) - 100;
        let aliases = Aliases::new(vec![Area { start, end: start + 4096, alias: 1 << 62 }]);
        let map = PreviousMap { blocks: HashMap::new(), aliases: Arc::new(aliases.unwrap()) };
        Previous { maps: HashMap::from([("pagemap-1".to_owned(), map)]) }
    }

    #[test]
    fn pages_that_differ_in_addresses_are_one_object_and_read_as_each_process_has_them() {
        let dir = tempfile::tempdir().unwrap();
        let mut objects = Objects::default();
        let mut capture = |name: &str, content: u8| {
            dump(&dir.path().join(name), &[(7, content), (8, 9)]);
            capture_dump(&dir.path().join(name), &mut objects, &with_area(content)).unwrap()
        };
        let (first, second) = (capture("one", 1), capture("two", 2));
        let pages = |captured: &Captured| {
            Previous::load(&objects, Some(captured.digest)).unwrap().page("pagemap-1", 7).unwrap()
        };
        assert_eq!(pages(&first), pages(&second));
        assert_ne!(objects.0[&pages(&first)], page(1));

        let (base, images) = (dir.path().join("base"), dir.path().join("images"));
        fs::create_dir(&base).unwrap();
        fs::create_dir(&images).unwrap();
        stage_base(&objects, &first.digest, &base).unwrap();
        assert_eq!(read(&base, 7), Some(page(1)));
        // Equal digests, but the parent's page is another process's.
        stage_images(&objects, &second.digest, Some(&first.digest), &base, &images).unwrap();
        assert_eq!((read(&images, 7), read(&images, 8)), (Some(page(2)), Some(page(9))));
        assert_eq!(fs::metadata(images.join("pages-1.img")).unwrap().len(), 2 * 4096);
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
