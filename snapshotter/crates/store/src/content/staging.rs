//! Memory images at the destination: from objects to CRIU's image directory.
//!
//! 1. Before the stop the last version is written as images (`base`), while the container still
//!    runs ([`stage_base`]).
//! 2. After it each pages file of `base` is turned into that of the cut, in place
//!    ([`stage_images`]): pages that have another place in the file now are moved ([`Layout`]),
//!    pages that changed are written. CRIU restores from the result as from images of its own.
//!
//! Where more pages would have to move than that is worth ([`moves_max`]), the images of the cut
//! hold only the pages that differ and refer to `base` as their *parent*, as CRIU's incremental
//! dumps do (criu.org, "Incremental dumps"). That needs no dirty tracking in the kernel, but CRIU
//! then maps every private mapping twice.
//!
//! On failure both directories are to be thrown away. A pages file that something else refers to is
//! never changed.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use criu_wrapper::mend::{self, Host, Mended};
use criu_wrapper::pagemap::{
    Form, PAGEMAP_BYTES_MAX, PRESENT, PagemapFile, PagemapWriter, PagesPatch, Run, link_parent,
};
use godwit_protos::Digest;
use rayon::prelude::*;

use super::alias::Aliases;
use super::materialize::materialize;
use super::object::{
    Kind, Map, Memory, Node, ObjectError, PAGE_BYTES, PAGES_PER_BLOCK, Pages, Tree,
};
use super::{ContentError, Source, on};

/// Pages of a process that are always moved rather than left to a parent image: 32 MiB.
const MOVED_PAGES: u64 = if cfg!(test) { 64 } else { 8192 };

/// Pages more for each mapping: moving them takes no longer than CRIU's mapping it twice.
const MOVED_PAGES_PER_MAPPING: u64 = 8;

/// Bytes of a `vma_entry` in `mm-ID.img`, about.
const MAPPING_ENTRY_BYTES: u64 = 64;

/// Pages with their numbers in the address space, in the order of a pages file, which is ascending.
type Numbered = Vec<(u64, Digest)>;

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

/// Every page of a map.
fn pages_of<S: Source>(source: &S, map: &Map) -> Result<Numbered, ContentError> {
    let mut all = Vec::new();
    for (number, block) in map.numbers.iter().zip(&map.blocks) {
        let block: Pages = source.decode(block)?;
        let first = number * PAGES_PER_BLOCK as u64;
        let pages = block.slots.iter().map(|slot| first + u64::from(*slot));
        all.extend(pages.zip(block.pages));
    }
    Ok(all)
}

/// Number of the pages file in `base` for the page map at `index`.
fn base_pages_id(index: usize) -> u32 {
    u32::try_from(index + 1).unwrap_or(u32::MAX)
}

/// Writes every page of `memory` into the empty directory `base`, in the form of a parent image.
pub fn stage_base<S>(source: &S, memory: &Digest, base: &Path) -> Result<(), ContentError>
where
    S: Source + Sync,
{
    let memory: Memory = source.decode(memory)?;
    memory.maps.par_iter().enumerate().try_for_each(|(index, map)| {
        let aliases = memory.aliases(index);
        let pages_id = base_pages_id(index);
        let mut writer = PagemapWriter::create(base, &map.name, pages_id, Form::Narrow)?;
        for (page, digest) in pages_of(source, map)? {
            let bytes = page_of(source, &digest, &aliases)?;
            writer.present(page * PAGE_BYTES as u64, PRESENT, &bytes)?;
        }
        writer.finish()?;
        Ok(())
    })
}

/// Writes the images of `memory` into the empty directory `images`, with the help of what
/// [`stage_base`] made of `base` in `base_directory` beside it; afterwards that serves only as
/// parent of these images. They are mended for this host ([`mend`]): every restore of what a node
/// has received or kept comes through here, once.
///
/// Errors: [`ContentError`], also when a page that CRIU's page map announces is not part of
/// `memory`.
pub fn stage_images<S: Source + Sync>(
    source: &S,
    memory: &Digest,
    base: Option<&Digest>,
    base_directory: &Path,
    images: &Path,
) -> Result<(), ContentError> {
    let root = *memory;
    let base = base.map(|base| source.decode::<Memory>(base)).transpose()?;
    let base = Base { source, memory: base, directory: base_directory };
    let memory: Memory = source.decode(&root)?;
    let tree = memory.images.ok_or(ContentError::Missing(root))?;
    check_images(source, &tree, &memory)?;
    materialize(source, &tree, None, images)?;
    let mended = mend_images(images)?;
    // Each map has files of its own.
    let stage = |(index, map): (usize, &Map)| -> Result<bool, ContentError> {
        let path = images.join(format!("{}.img", map.name));
        let bytes = fs::read(&path).map_err(on("read", &path))?;
        let mut dumped = PagemapFile::parse(&map.name, &bytes)?;
        dumped.entries.retain(Run::is_present);
        fs::remove_file(&path).map_err(on("replace", &path))?;
        let pages = announced(&dumped, pages_of(source, map)?);
        let pages = pages.ok_or(ContentError::Missing(root))?;
        let aliases = &memory.aliases(index);
        let staged = StagedMap { source, aliases, dumped: &dumped, pages, images };
        let before = base.map(&map.name, aliases)?;
        let is_whole = mended.whole.contains(&map.name);
        let moves_max = if is_whole { u64::MAX } else { moves_max(images, &map.name) };
        if staged.patch(before.as_ref(), moves_max)? {
            base.forget(&map.name)?;
        } else if let Some(parent) = before.filter(|_| !is_whole) {
            staged.write(&parent.pages)?;
            return Ok(true);
        } else {
            staged.write(&[])?;
            base.forget(&map.name)?;
        }
        Ok(false)
    };
    let maps = memory.maps.par_iter().enumerate();
    let needs_parent = maps.map(stage).try_reduce(|| false, |one, other| Ok(one || other))?;
    if let Some(name) = base_directory.file_name().filter(|_| needs_parent) {
        // Relative, since CRIU follows it by the directory's descriptor from within the container's
        // root.
        link_parent(images, &Path::new("..").join(name))?;
    }
    Ok(())
}

/// Most pages of the process of page map `name` that are worth moving.
fn moves_max(images: &Path, name: &str) -> u64 {
    let mappings = name.strip_prefix("pagemap-").and_then(|id| {
        let entries = fs::metadata(images.join(format!("mm-{id}.img"))).ok()?;
        Some(entries.len() / MAPPING_ENTRY_BYTES)
    });
    // Shared memory has no mappings of its own.
    mappings.unwrap_or(0).saturating_mul(MOVED_PAGES_PER_MAPPING).saturating_add(MOVED_PAGES)
}

/// The version before, as it is staged.
struct Base<'a, S> {
    source: &'a S,
    memory: Option<Memory>,
    directory: &'a Path,
}

/// A page map of the version before.
struct BaseMap {
    pages: Numbered,
    file: PathBuf,
}

impl<S: Source> Base<'_, S> {
    /// The page map `name` if it is staged as a whole and was made with the same aliases: equal
    /// digests are equal pages only if they are turned back alike.
    fn map(&self, name: &str, aliases: &Aliases) -> Result<Option<BaseMap>, ContentError> {
        let Some(memory) = &self.memory else { return Ok(None) };
        let Some(index) = memory.maps.iter().position(|map| map.name == name) else {
            return Ok(None);
        };
        if memory.aliases(index) != *aliases {
            return Ok(None);
        }
        let file = self.directory.join(format!("pages-{}.img", base_pages_id(index)));
        let pages = pages_of(self.source, &memory.maps[index])?;
        let len = (pages.len() * PAGE_BYTES) as u64;
        let has_pages =
            fs::symlink_metadata(&file).is_ok_and(|found| found.is_file() && found.len() == len);
        let is_staged = has_pages && self.directory.join(format!("{name}.img")).is_file();
        Ok(is_staged.then_some(BaseMap { pages, file }))
    }

    /// Takes a page map out of the parent image. CRIU looks for one of the same name, and would map
    /// everything twice if it found it.
    fn forget(&self, name: &str) -> Result<(), ContentError> {
        let path = self.directory.join(format!("{name}.img"));
        match fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(on("remove", &path)(error)),
            _ => Ok(()),
        }
    }
}

/// The pages that a page map announces; `None` if one of them is not among `pages`.
fn announced(dumped: &PagemapFile, pages: Numbered) -> Option<Numbered> {
    let numbers = dumped.entries.iter().flat_map(|run| {
        let first = run.vaddr / PAGE_BYTES as u64;
        first..first + run.pages
    });
    let mut all = pages.into_iter();
    numbers
        .map(|number| all.find(|(page, _)| *page >= number).filter(|(page, _)| *page == number))
        .collect()
}

/// Pages that stay together, by their places in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Move {
    from: u64,
    to: u64,
    pages: u64,
}

/// What turns one pages file into another.
///
/// The moves keep the order of pages. So those towards the front, done ascending, overwrite only
/// places whose pages have moved already or are of no use, and so do those towards the end, done
/// descending; neither sort overwrites what the other one needs. What is written comes last.
#[derive(Debug, Default)]
struct Layout {
    moves: Vec<Move>,
    /// Places, ascending.
    written: Vec<u64>,
}

impl Layout {
    fn of(before: &[(u64, Digest)], after: &[(u64, Digest)]) -> Self {
        let mut layout = Self::default();
        let mut before = (0_u64..).zip(before).peekable();
        for (to, page) in (0_u64..).zip(after) {
            while before.next_if(|(_, (earlier, _))| *earlier < page.0).is_some() {}
            match before.next_if(|(_, earlier)| *earlier == page) {
                Some((from, _)) if from == to => {}
                Some((from, _)) => layout.push(from, to),
                None => layout.written.push(to),
            }
        }
        layout
    }

    fn push(&mut self, from: u64, to: u64) {
        match self.moves.last_mut() {
            Some(last) if last.from + last.pages == from && last.to + last.pages == to => {
                last.pages += 1;
            }
            _ => self.moves.push(Move { from, to, pages: 1 }),
        }
    }

    /// How many pages move.
    fn moved(&self) -> u64 {
        self.moves.iter().map(|one| one.pages).sum()
    }

    /// The moves, in the order in which they are done.
    fn in_order(&self) -> impl Iterator<Item = &Move> {
        let to_front = self.moves.iter().filter(|one| one.to < one.from);
        to_front.chain(self.moves.iter().rev().filter(|one| one.to > one.from))
    }
}

/// A page map of the cut on its way to the image directory.
struct StagedMap<'a, S> {
    source: &'a S,
    aliases: &'a Aliases,
    dumped: &'a PagemapFile,
    /// What it announces.
    pages: Numbered,
    images: &'a Path,
}

impl<S: Source> StagedMap<'_, S> {
    /// Makes the pages file out of the one before. Returns `false` and changes nothing if that
    /// cannot be had, or if more than `moves_max` pages would have to move.
    fn patch(&self, before: Option<&BaseMap>, moves_max: u64) -> Result<bool, ContentError> {
        let Some(before) = before else { return Ok(false) };
        let layout = Layout::of(&before.pages, &self.pages);
        if layout.moved() > moves_max {
            return Ok(false);
        }
        let pages = before.pages.len() as u64;
        let begun = PagesPatch::begin(&before.file, pages, self.images, self.dumped)?;
        let Some(mut patch) = begun else { return Ok(false) };
        for Move { from, to, pages } in layout.in_order() {
            patch.move_pages(*from, *to, *pages)?;
        }
        for place in layout.written {
            let (_, digest) = &self.pages[usize::try_from(place).unwrap_or(usize::MAX)];
            patch.write(place, &page_of(self.source, digest, self.aliases)?)?;
        }
        patch.finish()?;
        Ok(true)
    }

    /// Writes the pages that are not among `parent`, and refers to it for the others.
    fn write(&self, parent: &[(u64, Digest)]) -> Result<(), ContentError> {
        let PagemapFile { name, pages_id, form, entries } = self.dumped;
        let mut writer = PagemapWriter::create(self.images, name, *pages_id, *form)?;
        let flags = entries.iter().flat_map(|run| {
            std::iter::repeat_n(run.flags, usize::try_from(run.pages).unwrap_or(0))
        });
        let mut parent = parent.iter().peekable();
        for (page, flags) in self.pages.iter().zip(flags) {
            while parent.next_if(|earlier| earlier.0 < page.0).is_some() {}
            let address = page.0 * PAGE_BYTES as u64;
            if parent.next_if_eq(&page).is_some() {
                writer.in_parent(address, 1)?;
            } else {
                writer.present(address, flags, &page_of(self.source, &page.1, self.aliases)?)?;
            }
        }
        writer.finish()?;
        Ok(())
    }
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
    use crate::content::Sink as _;
    use crate::content::capture::{Unchanged, capture};
    use crate::content::fake::Objects;
    use crate::content::memory::tests::{digest_of, dumped, dumped_with_area, page};
    use crate::content::object::Object as _;
    use criu_wrapper::pagemap::ImageDirectory;
    use proptest::prelude::*;

    #[test]
    fn an_image_directory_of_a_hostile_peer_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        for hostile in ["pages-7.img", "parent", "pagemap-9.img"] {
            let from = dir.path().join(format!("from-{hostile}"));
            let mut objects = Objects::default();
            let honest = dumped(&from, &[(1, 1)], &mut objects, None);
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

    /// Two versions of a memory, of which the first is staged as base.
    struct Stage {
        dir: tempfile::TempDir,
        objects: Objects,
        first: Digest,
        second: Digest,
        after: Vec<(u64, u8)>,
    }

    impl Stage {
        fn new(before: &[(u64, u8)], after: &[(u64, u8)]) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let mut objects = Objects::default();
            let first = dumped(&dir.path().join("one"), before, &mut objects, None).digest;
            let second = dumped(&dir.path().join("two"), after, &mut objects, Some(first)).digest;
            for name in ["base", "images"] {
                fs::create_dir(dir.path().join(name)).unwrap();
            }
            stage_base(&objects, &first, &dir.path().join("base")).unwrap();
            Self { dir, objects, first, second, after: after.to_vec() }
        }

        fn at(&self, name: &str) -> PathBuf {
            self.dir.path().join(name)
        }

        fn stage(&self) -> Result<(), ContentError> {
            let (base, images) = (self.at("base"), self.at("images"));
            stage_images(&self.objects, &self.second, Some(&self.first), &base, &images)
        }

        /// Stages the second version and checks every page of it.
        fn staged(self) -> Self {
            self.stage().unwrap();
            for (number, content) in &self.after {
                assert_eq!(read(&self.at("images"), *number), Some(page(*content)), "{number}");
            }
            assert_eq!(fs::read(self.at("images/core-1.img")).unwrap(), b"registers");
            self
        }

        /// Whether CRIU reads from a parent, and how many pages the images have of their own.
        fn outcome(&self) -> (bool, u64) {
            let images = ImageDirectory::open(&self.at("images")).unwrap();
            let pages = fs::metadata(images.pages_path(1)).unwrap().len() / 4096;
            (images.parent().is_some(), pages)
        }
    }

    #[test]
    fn the_earlier_pages_file_becomes_that_of_the_cut() {
        let before: Vec<(u64, u8)> = (0..60).map(|n| (n * 2, (n % 5) as u8)).collect();
        let mut after = before.clone();
        after[17].1 = 9;
        after.push((500, 3));
        after.remove(50);
        after.insert(1, (1, 4));
        let stage = Stage::new(&before, &after).staged();
        assert_eq!(stage.outcome(), (false, 61));
        assert!(!stage.at("base/pages-1.img").exists() && !stage.at("base/pagemap-1.img").exists());
        let shorter = Stage::new(&before, &before[..10]).staged();
        assert_eq!(shorter.outcome(), (false, 10));
        let emptied = Stage::new(&before, &[]).staged();
        assert_eq!(emptied.outcome(), (false, 0));
        let filled = Stage::new(&[], &before).staged();
        assert_eq!(filled.outcome(), (false, 60));
    }

    #[test]
    fn more_pages_than_are_worth_moving_stay_in_the_parent() {
        let before: Vec<(u64, u8)> = (10..10 + MOVED_PAGES + 1).map(|n| (n, 1)).collect();
        let mut after = before.clone();
        after.insert(0, (2, 2));
        let stage = Stage::new(&before, &after).staged();
        assert_eq!(stage.outcome(), (true, 1));
        after[30].1 = 3;
        let fewer = Stage::new(&before, &after).staged();
        assert_eq!(fewer.outcome(), (false, MOVED_PAGES + 2));
    }

    #[test]
    fn mappings_make_moving_worthwhile() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(moves_max(dir.path(), "pagemap-7"), MOVED_PAGES);
        fs::write(dir.path().join("mm-7.img"), vec![0; 64 * 1000]).unwrap();
        assert_eq!(moves_max(dir.path(), "pagemap-7"), MOVED_PAGES + 8000);
        assert_eq!(moves_max(dir.path(), "pagemap-shmem-7"), MOVED_PAGES);
    }

    /// A pages file that has another name is read as parent, and its bytes stay.
    #[test]
    fn what_something_else_refers_to_is_not_changed() {
        let before: Vec<(u64, u8)> = (0..50).map(|n| (n, 1)).collect();
        let mut after = before.clone();
        after[3].1 = 2;
        let stage = Stage::new(&before, &after);
        fs::hard_link(stage.at("base/pages-1.img"), stage.at("other")).unwrap();
        let bytes = fs::read(stage.at("other")).unwrap();
        let stage = stage.staged();
        assert_eq!(stage.outcome(), (true, 1));
        assert_eq!(fs::read(stage.at("other")).unwrap(), bytes);
        assert_eq!(fs::read(stage.at("base/pages-1.img")).unwrap(), bytes);
    }

    /// Without a sound base every page is written, and no parent is referred to.
    #[test]
    fn a_base_that_is_missing_or_torn_is_not_used() {
        let before: Vec<(u64, u8)> = (0..50).map(|n| (n, 1)).collect();
        let mut after = before.clone();
        after[3].1 = 2;
        let damage: [fn(&Stage); 5] = [
            |stage| fs::remove_file(stage.at("base/pages-1.img")).unwrap(),
            |stage| fs::remove_file(stage.at("base/pagemap-1.img")).unwrap(),
            |stage| fs::remove_dir_all(stage.at("base")).unwrap(),
            |stage| {
                let pages = fs::File::options().write(true).open(stage.at("base/pages-1.img"));
                pages.unwrap().set_len(49 * 4096).unwrap();
            },
            |stage| {
                fs::rename(stage.at("base/pages-1.img"), stage.at("other")).unwrap();
                let linked = std::os::unix::fs::symlink("../other", stage.at("base/pages-1.img"));
                linked.unwrap();
            },
        ];
        for (case, damage) in damage.into_iter().enumerate() {
            let stage = Stage::new(&before, &after);
            damage(&stage);
            assert_eq!(stage.staged().outcome(), (false, 50), "case {case}");
        }
    }

    /// A page that is not there ends the staging; nothing of a restore can start from what is left.
    #[test]
    fn a_missing_page_is_an_error() {
        let before: Vec<(u64, u8)> = (0..50).map(|n| (n, 1)).collect();
        let mut stage = Stage::new(&before, &[(0, 1), (1, 2)]);
        stage.objects.0.remove(&Digest::of(&page(2)));
        assert!(matches!(stage.stage(), Err(ContentError::Missing(_))));
        assert!(!stage.at("images/pagemap-1.img").exists());
    }

    #[test]
    fn pages_that_differ_in_addresses_are_one_object_and_read_as_each_process_has_them() {
        let dir = tempfile::tempdir().unwrap();
        let mut objects = Objects::default();
        let mut capture = |name: &str, content: u8| {
            let pages = [(7, content), (8, 9)];
            dumped_with_area(&dir.path().join(name), &pages, &mut objects, content).digest
        };
        let (first, second) = (capture("one", 1), capture("two", 2));
        assert_eq!(digest_of(&objects, first, 7), digest_of(&objects, second, 7));
        assert_ne!(objects.0[&digest_of(&objects, first, 7)], page(1));

        let (base, images) = (dir.path().join("base"), dir.path().join("images"));
        fs::create_dir(&base).unwrap();
        fs::create_dir(&images).unwrap();
        stage_base(&objects, &first, &base).unwrap();
        assert_eq!(read(&base, 7), Some(page(1)));
        // Equal digests, but the parent's page is another process's.
        stage_images(&objects, &second, Some(&first), &base, &images).unwrap();
        assert_eq!((read(&images, 7), read(&images, 8)), (Some(page(2)), Some(page(9))));
        assert_eq!(fs::metadata(images.join("pages-1.img")).unwrap().len(), 2 * 4096);
        assert_eq!(ImageDirectory::open(&images).unwrap().parent(), None);
    }

    /// Numbers of pages, ascending, with a byte each.
    fn pages() -> impl Strategy<Value = Vec<(u64, u8)>> {
        let numbered = |all: std::collections::BTreeMap<u64, u8>| all.into_iter().collect();
        proptest::collection::btree_map(0..40_u64, 0..3_u8, 0..30).prop_map(numbered)
    }

    proptest! {
        /// Method: any two versions; the moves and writes are done on a list, in their order.
        #[test]
        fn moves_in_their_order_lose_nothing(before in pages(), after in pages()) {
            let digests = |pages: &[(u64, u8)]| -> Numbered {
                pages.iter().map(|(page, content)| (*page, Digest::of(&[*content]))).collect()
            };
            let (before, after) = (digests(&before), digests(&after));
            let layout = Layout::of(&before, &after);
            let mut file: Vec<Option<(u64, Digest)>> = before.iter().copied().map(Some).collect();
            file.resize(before.len().max(after.len()), None);
            let mut touched = 0;
            for one in layout.in_order() {
                let range = |from: u64| {
                    let from = usize::try_from(from).unwrap();
                    from..from + usize::try_from(one.pages).unwrap()
                };
                let moved = file[range(one.from)].to_vec();
                file[range(one.to)].copy_from_slice(&moved);
                touched += one.pages;
            }
            prop_assert_eq!(touched, layout.moved());
            for place in &layout.written {
                let place = usize::try_from(*place).unwrap();
                file[place] = Some(after[place]);
            }
            file.truncate(after.len());
            let expected: Vec<_> = after.iter().copied().map(Some).collect();
            prop_assert_eq!(file, expected);
            let kept = after.iter().filter(|page| before.contains(page)).count();
            prop_assert_eq!(layout.written.len(), after.len() - kept);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn any_version_is_staged_on_top_of_any_other(before in pages(), after in pages()) {
            let stage = Stage::new(&before, &after).staged();
            prop_assert_eq!(stage.outcome(), (false, after.len() as u64));
        }
    }
}
