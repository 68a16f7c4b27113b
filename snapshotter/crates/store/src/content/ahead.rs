//! Hashing the pages of a dump while CRIU still writes them.
//!
//! CRIU writes one address space after the other: it creates `pagemap-X.img`, then `pages-N.img`,
//! to which it appends. A page in the file does not change any more. A thread learns the names and
//! their order by inotify and follows the newest pages file, so that little is left to hash when
//! the dump is over.
//!
//! This is best effort. [`Hashed::of`] has digests only for the page map that they were made for;
//! the reader of the dump hashes what is missing, and finds and reports what is wrong.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use criu_wrapper::pagemap::PagemapFile;
use godwit_protos::Digest;
use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

use super::alias::Aliases;
use super::object::PAGE_BYTES;

/// How long the thread sleeps when there is nothing to hash.
const PAUSE: Duration = Duration::from_millis(3);

/// Bytes that are read at once.
const BATCH_BYTES: usize = 1 << 20;

/// The aliases of each page map, by its name; none for others.
pub(super) type AliasesByMap = HashMap<String, Arc<Aliases>>;

/// Digests of the pages of a dump, by the number of their pages file.
#[derive(Debug, Default)]
pub(super) struct Hashed {
    files: HashMap<u32, (String, Vec<Digest>)>,
}

impl Hashed {
    /// Digests of the first pages of `pagemap`, in the order of its pages file.
    pub(super) fn of(&self, pagemap: &PagemapFile) -> &[Digest] {
        match self.files.get(&pagemap.pages_id) {
            Some((name, digests)) if *name == pagemap.name => digests,
            _ => &[],
        }
    }
}

#[derive(Debug, Default)]
struct Progress {
    is_over: AtomicBool,
    pages: AtomicUsize,
}

/// A thread that hashes ahead. Dropping it ends the thread too.
#[derive(Debug)]
pub(super) struct Ahead {
    progress: Arc<Progress>,
    thread: Option<JoinHandle<Hashed>>,
}

impl Ahead {
    /// Follows the dump into the empty directory `images`, in which CRIU creates nothing before
    /// this returns.
    pub(super) fn begin(images: &Path, aliases: AliasesByMap) -> Self {
        let progress = Arc::new(Progress::default());
        let follow = Follow::new(images, aliases, progress.clone());
        let spawn = |follow: Follow| {
            thread::Builder::new().name("hash-dump".to_owned()).spawn(|| follow.run()).ok()
        };
        // Without a thread everything is hashed at the end.
        Self { progress, thread: follow.ok().and_then(spawn) }
    }

    /// Ends the thread once the dump is over.
    pub(super) fn finish(mut self) -> Hashed {
        self.progress.is_over.store(true, Ordering::Release);
        let hashed = self.thread.take().and_then(|thread| thread.join().ok()).unwrap_or_default();
        let pages = self.progress.pages.load(Ordering::Acquire);
        tracing::debug!(pages, "pages hashed while CRIU wrote the dump");
        hashed
    }

    /// Waits until `pages` pages are hashed.
    #[cfg(test)]
    pub(super) fn wait_for(&self, pages: usize) {
        let begun = std::time::Instant::now();
        while self.progress.pages.load(Ordering::Acquire) < pages {
            assert!(begun.elapsed() < Duration::from_secs(20), "not hashed");
            thread::sleep(PAUSE);
        }
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        self.progress.is_over.store(true, Ordering::Release);
    }
}

/// The pages file that is followed.
struct Growing {
    id: u32,
    map: String,
    file: File,
    digests: Vec<Digest>,
}

struct Follow {
    images: PathBuf,
    created: Inotify,
    aliases: AliasesByMap,
    /// The page map that was created last: the next pages file is its own.
    map: Option<String>,
    growing: Option<Growing>,
    hashed: Hashed,
    buffer: Vec<u8>,
    progress: Arc<Progress>,
}

impl Follow {
    fn new(images: &Path, aliases: AliasesByMap, progress: Arc<Progress>) -> io::Result<Self> {
        let created = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        created.add_watch(images, AddWatchFlags::IN_CREATE)?;
        Ok(Self {
            images: images.to_owned(),
            created,
            aliases,
            map: None,
            growing: None,
            hashed: Hashed::default(),
            buffer: vec![0; BATCH_BYTES],
            progress,
        })
    }

    fn is_over(&self) -> bool {
        self.progress.is_over.load(Ordering::Acquire)
    }

    fn run(mut self) -> Hashed {
        while !self.is_over() {
            match self.step() {
                Ok(true) => {}
                Ok(false) => thread::sleep(PAUSE),
                Err(_) => break,
            }
        }
        self.end_file();
        self.hashed
    }

    /// Takes note of new files and hashes a batch. Returns whether there was any.
    fn step(&mut self) -> io::Result<bool> {
        let events = match self.created.read_events() {
            Err(Errno::EAGAIN) => Vec::new(),
            events => events?,
        };
        for event in events {
            if event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
                return Err(io::Error::other("names were lost"));
            }
            let name = event.name.as_deref().and_then(|name| name.to_str());
            let Some(name) = name.and_then(|name| name.strip_suffix(".img")) else { continue };
            if name.starts_with("pagemap-") {
                self.map = Some(name.to_owned());
            } else if let Some(id) = name.strip_prefix("pages-").and_then(|id| id.parse().ok()) {
                // CRIU has written the one before to its end.
                while !self.is_over() && self.hash()? {}
                self.end_file();
                let Some(map) = self.map.take() else { continue };
                let file = File::open(self.images.join(format!("pages-{id}.img")))?;
                self.growing = Some(Growing { id, map, file, digests: Vec::new() });
            }
        }
        self.hash()
    }

    /// Hashes the next whole pages of the file that is followed. Returns whether there were any.
    fn hash(&mut self) -> io::Result<bool> {
        let Some(growing) = &mut self.growing else { return Ok(false) };
        let done = growing.digests.len() * PAGE_BYTES;
        let len = usize::try_from(growing.file.metadata()?.len()).unwrap_or(usize::MAX);
        let take = len.saturating_sub(done).min(BATCH_BYTES) / PAGE_BYTES * PAGE_BYTES;
        let batch = &mut self.buffer[..take];
        growing.file.read_exact_at(batch, done as u64)?;
        let aliases = self.aliases.get(&growing.map).cloned().unwrap_or_default();
        // On this thread alone: CRIU needs a processor too.
        growing.digests.extend(batch.chunks_exact_mut(PAGE_BYTES).map(|page| {
            aliases.replace(page);
            Digest::of(page)
        }));
        self.progress.pages.fetch_add(take / PAGE_BYTES, Ordering::AcqRel);
        Ok(take > 0)
    }

    fn end_file(&mut self) {
        if let Some(Growing { id, map, digests, .. }) = self.growing.take() {
            self.hashed.files.insert(id, (map, digests));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use criu_wrapper::pagemap::Form;
    use std::fs;

    fn pagemap(name: &str, pages_id: u32) -> PagemapFile {
        PagemapFile { name: name.to_owned(), pages_id, form: Form::Wide, entries: Vec::new() }
    }

    fn append(path: &Path, content: u8) {
        let mut file = fs::File::options().append(true).create(true).open(path).unwrap();
        io::Write::write_all(&mut file, &[content; PAGE_BYTES]).unwrap();
    }

    /// Method: files grow while they are followed, and many come at once, as CRIU writes them.
    #[test]
    fn pages_are_hashed_as_they_come_and_only_for_their_own_page_map() {
        let dir = tempfile::tempdir().unwrap();
        let ahead = Ahead::begin(dir.path(), HashMap::new());
        let maps: Vec<PagemapFile> =
            (1..=50).map(|id| pagemap(&format!("pagemap-{}", 100 - id), id)).collect();
        for map in &maps {
            fs::write(dir.path().join(format!("{}.img", map.name)), b"").unwrap();
            let pages = dir.path().join(format!("pages-{}.img", map.pages_id));
            append(&pages, 1);
            if map.pages_id == 1 {
                ahead.wait_for(1);
            }
            fs::write(dir.path().join(format!("core-{}.img", map.pages_id)), b"").unwrap();
            append(&pages, u8::try_from(map.pages_id).unwrap());
        }
        ahead.wait_for(100);
        let hashed = ahead.finish();
        for map in &maps {
            let second = u8::try_from(map.pages_id).unwrap();
            let expected = [1, second].map(|content| Digest::of(&[content; PAGE_BYTES]));
            assert_eq!(hashed.of(map), expected, "{}", map.name);
        }
        assert!(hashed.of(&pagemap("pagemap-98", 1)).is_empty());
        assert!(hashed.of(&pagemap("pagemap-99", 2)).is_empty());
    }

    #[test]
    fn what_cannot_be_followed_is_left_to_the_reader() {
        let dir = tempfile::tempdir().unwrap();
        let (missing, images) = (dir.path().join("missing"), dir.path().join("images"));
        let hashed = Ahead::begin(&missing, HashMap::new()).finish();
        assert!(hashed.of(&pagemap("pagemap-1", 1)).is_empty());
        fs::create_dir(&images).unwrap();
        let ahead = Ahead::begin(&images, HashMap::new());
        // No page map before it.
        append(&images.join("pages-1.img"), 1);
        fs::write(images.join("pagemap-2.img"), b"").unwrap();
        append(&images.join("pages-2.img"), 2);
        ahead.wait_for(1);
        let hashed = ahead.finish();
        assert!(hashed.of(&pagemap("pagemap-1", 1)).is_empty());
        assert_eq!(hashed.of(&pagemap("pagemap-2", 2)), [Digest::of(&[2; PAGE_BYTES])]);
    }
}
