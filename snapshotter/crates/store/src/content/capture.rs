//! Reading a directory into a [`Tree`].
//!
//! The directory may belong to a running container that changes it meanwhile: every step goes by a
//! file descriptor of the directory above and follows no symbolic link, names that vanish are left
//! out, and a file may be torn. That is enough for pre-copy; at the cut the container is frozen and
//! the result is exact.
//!
//! # Unchanged files
//!
//! A capture *records* a file if all of this holds, in this order:
//! 1. its change time lies more than a clock tick in the past,
//! 2. the kernel counts no writer of it ([`godwit_disk::sys::may_have_writer`]),
//! 3. the file is read, and
//! 4. its size and times are then what they were in step 1.
//!
//! A later capture takes content and attributes of a recorded file as they were, without opening
//! it, while device, inode, size and times are equal. It compares them with one `stat` for each
//! file, on all processors, before it reads anything ([`super::known`]).
//!
//! This cannot miss a write. The file systems for which it is done (ext4, XFS, btrfs) set the
//! change time when a write begins, before they store any of its bytes; of a shared mapping, when a
//! store first makes a page writable. So times alone miss what had already begun: a direct or
//! asynchronous write in flight, or stores to a page that is writable already. But a request in
//! flight and a mapping both hold the file open for writing, even after the process has closed its
//! descriptor, and the kernel's count of writers includes them. Step 2 therefore proves that
//! nothing had begun. What begins later sets the change time to another value, because of step 1.
//! Step 4 proves that nothing began while the file was read. The count belongs to the inode: it
//! covers every process of the machine, in whatever container, loop devices, and files that are
//! open through an overlay.
//!
//! Nor can it miss a change of attributes: owner, mode, extended attributes, flags and project set
//! the change time too, as do renaming and removing a name, and the attributes are those of step 1
//! or are read after it.
//!
//! Everything else is recorded by step 1 alone. The target of a symbolic link and the number of a
//! device never change. The names in a directory change only by making, renaming and removing
//! entries, which sets the directory's times before it can be listed again.
//!
//! The price: a file that is open for writing is read in every capture, also while the container is
//! frozen.
//!
//! When the clock is set back, a new change time may equal an old one. Then nothing recorded before
//! is used.

use std::cell::OnceCell;
use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use godwit_protos::Digest;
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat, readlinkat};
use nix::sys::stat::{FileStat, Mode, fstat};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::{Whence, lseek};
use serde_bytes::ByteBuf;

pub use super::known::Unchanged;
use super::known::{
    DIRECTORY, Found, Inode, Listing, Look, Mark, Marks, Other, Remembered, Sums, inode_of, look,
};
use super::object::{Attributes, Content, Directory, Entry, Node, Piece, Tree};
use super::{ContentError, Sink, chunks, on};
use godwit_disk::inode::{self, Flags};
use godwit_disk::sys::may_have_writer;

/// Directories below each other that are followed.
pub const DEPTH_MAX: usize = 200;

/// The clock counts as set when it moved by more than this against the time since boot.
const CLOCK_SET_MIN: i128 = 5_000_000;

/// Extended attributes by which overlayfs ties an upper layer to this very host.
const OVERLAY_LOCAL: [&[u8]; 5] = [
    b"trusted.overlay.origin",
    b"trusted.overlay.impure",
    b"trusted.overlay.nlink",
    b"trusted.overlay.upper",
    b"trusted.overlay.uuid",
];

/// What was read of a file.
struct FileRead {
    bytes: u64,
    content: Content,
    flags: Flags,
    /// Its marks, if it may be recorded.
    recorded: Option<Marks>,
}

/// A finished capture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Captured {
    /// The [`Tree`] object; of a block volume, the [`super::object::Image`].
    pub tree: Digest,
    /// Sum of the sizes of the regular files, in bytes; of a block volume, of its chunks.
    pub bytes: u64,
}

/// Reads the directory at `root` into `sink`.
///
/// - `unchanged` is that of the capture before of the same directory, and is brought up to date.
/// - Errors: [`ContentError::File`] with the path, [`ContentError::TooDeep`], or the sink's.
pub fn capture(
    root: &Path,
    sink: &mut dyn Sink,
    unchanged: &mut Unchanged,
) -> Result<Captured, ContentError> {
    let directory =
        nix::fcntl::open(root, DIRECTORY, Mode::empty()).map_err(on("open directory", root))?;
    let stat = fstat(&directory).map_err(on("stat", root))?;
    let clock = clock_offset();
    if was_set(unchanged.clock, clock) {
        *unchanged = Unchanged { directories: HashMap::new(), clock };
    }
    let known = std::mem::take(&mut unchanged.directories);
    if !known.is_empty() {
        look(directory.try_clone().map_err(on("open", root))?, &known);
    }
    let mut reader = Reader {
        sink,
        known,
        remembered: HashMap::new(),
        linked: HashMap::new(),
        trusts_times: keeps_times(&directory, root)?,
        sums: Sums::default(),
        path: root.to_owned(),
        names: Vec::new(),
    };
    let flags = reader.flags(&directory)?;
    if flags.bits & inode::FIXED.bits() != 0 {
        let (path, flags) = (root.to_owned(), inode::names(flags.bits & inode::FIXED.bits()));
        return Err(ContentError::FixedRoot { path, flags });
    }
    let attributes = reader.attributes(&directory, b".", &stat, flags)?;
    let (inode, opened) = (inode_of(&stat), OnceCell::from(directory));
    let root = reader.directory(&At { above: None, name: b".", inode, opened })?;
    let Sums { bytes, mut flags, mut has_projects } = reader.sums;
    flags |= attributes.flags;
    has_projects |= attributes.project != 0;
    let remembered = std::mem::take(&mut reader.remembered);
    let tree = super::put_object(sink, &Tree { attributes, root, bytes, flags, has_projects })?;
    if !was_set(clock, clock_offset()) {
        unchanged.directories = remembered;
    }
    Ok(Captured { tree, bytes })
}

/// How far the clock that files get their times from is ahead of the time since boot, in
/// nanoseconds.
fn clock_offset() -> i128 {
    let read = |clock| clock_gettime(clock).map_or(0, |time| Duration::from(time).as_nanos());
    read(ClockId::CLOCK_REALTIME).cast_signed() - read(ClockId::CLOCK_BOOTTIME).cast_signed()
}

/// Whether the clock was set between two readings of [`clock_offset`].
fn was_set(before: i128, after: i128) -> bool {
    (before - after).abs() > CLOCK_SET_MIN
}

/// Whether the file system of `directory` updates a file's change time with every change.
fn keeps_times(directory: &OwnedFd, path: &Path) -> Result<bool, ContentError> {
    use nix::sys::statfs;
    let kind =
        statfs::fstatfs(directory).map_err(on("stat file system of", path))?.filesystem_type();
    // ext4's magic number is that of ext2 and ext3 too.
    Ok([statfs::EXT4_SUPER_MAGIC, statfs::XFS_SUPER_MAGIC, statfs::BTRFS_SUPER_MAGIC]
        .contains(&kind))
}

/// A directory of the tree. It is opened when it is needed.
struct At<'a> {
    above: Option<&'a At<'a>>,
    name: &'a [u8],
    inode: Inode,
    opened: OnceCell<OwnedFd>,
}

impl<'a> At<'a> {
    fn below(above: &'a Self, name: &'a [u8], inode: Inode) -> Self {
        Self { above: Some(above), name, inode, opened: OnceCell::new() }
    }

    /// Errors: `ENOENT` also if another directory has its name now.
    fn open(&self) -> Result<&OwnedFd, Errno> {
        if let Some(opened) = self.opened.get() {
            return Ok(opened);
        }
        let above = self.above.ok_or(Errno::ENOENT)?.open()?;
        let opened = openat(above, OsStr::from_bytes(self.name), DIRECTORY, Mode::empty())?;
        if inode_of(&fstat(&opened)?) != self.inode {
            return Err(Errno::ENOENT);
        }
        Ok(self.opened.get_or_init(|| opened))
    }
}

/// Whether the container removed what was to be read after we had listed it.
fn is_gone(error: &ContentError) -> bool {
    let gone = [Errno::ENOENT, Errno::ENOTDIR, Errno::ELOOP];
    matches!(error, ContentError::File { source, .. }
        if gone.iter().any(|errno| source.raw_os_error() == Some(*errno as i32)))
}

struct Reader<'a> {
    sink: &'a mut dyn Sink,
    /// The capture before, and what a look has found of it.
    known: HashMap<Inode, Remembered>,
    /// This capture, for the next.
    remembered: HashMap<Inode, Remembered>,
    /// Of everything with several names, the path of the first and what links note of it.
    linked: HashMap<Inode, (Vec<ByteBuf>, Option<Digest>)>,
    trusts_times: bool,
    /// Of the directories that were read.
    sums: Sums,
    /// Where we are, for messages.
    path: PathBuf,
    /// Where we are, as components below the root.
    names: Vec<ByteBuf>,
}

impl Reader<'_> {
    /// Does something with the entry `name` of the directory where we are.
    fn within<T>(&mut self, name: &[u8], read: impl FnOnce(&mut Self) -> T) -> T {
        self.path.push(OsStr::from_bytes(name));
        self.names.push(ByteBuf::from(name));
        let done = read(self);
        self.path.pop();
        self.names.pop();
        done
    }

    fn directory(&mut self, at: &At<'_>) -> Result<Digest, ContentError> {
        if self.names.len() >= DEPTH_MAX {
            return Err(ContentError::TooDeep(self.path.clone()));
        }
        let mut before = self.known.remove(&at.inode);
        let looked = before.as_mut().and_then(|before| before.look.take());
        match (before, looked) {
            (Some(before), Some(Look::Same)) => self.same(at, before),
            (before, Some(Look::Listed(listing))) => self.listed(at, before, listing),
            (before, _) => {
                let directory = at.open().map_err(on("open directory", &self.path))?;
                let listing = Listing::read(directory, &self.path, before.as_ref())?;
                self.listed(at, before, listing)
            }
        }
    }

    /// A directory with the entries that it had: only what is below its directories may differ.
    fn same(&mut self, at: &At<'_>, mut before: Remembered) -> Result<Digest, ContentError> {
        let (mut is_changed, mut gone) = (false, Vec::new());
        for index in 0..before.directories.len() {
            let place = before.directories[index];
            let (name, inode) = (before.entries[place].name.clone(), before.marks[place].inode);
            match self.within(&name, |here| here.directory(&At::below(at, &name, inode))) {
                Ok(digest) => {
                    let node = Node::Directory(digest);
                    is_changed |= before.entries[place].node != node;
                    before.entries[place].node = node;
                }
                Err(error) if is_gone(&error) => gone.push(place),
                Err(error) => return Err(error),
            }
        }
        if !is_changed && gone.is_empty() {
            let digest = before.digest;
            self.sums.add(before.sums);
            self.remembered.insert(at.inode, before);
            return Ok(digest);
        }
        let listed = before.listed.filter(|_| gone.is_empty());
        let all = before.entries.into_iter().zip(before.marks).enumerate();
        let (entries, marks) =
            all.filter(|(place, _)| !gone.contains(place)).map(|(_, entry)| entry).unzip();
        self.put(at.inode, listed, entries, marks)
    }

    fn listed(
        &mut self,
        at: &At<'_>,
        before: Option<Remembered>,
        listing: Listing,
    ) -> Result<Digest, ContentError> {
        let mut entries = Vec::with_capacity(listing.found.len());
        let mut marks = Vec::with_capacity(listing.found.len());
        let mut old = before
            .into_iter()
            .flat_map(|before| before.entries.into_iter().zip(before.marks))
            .enumerate();
        for found in listing.found {
            let read = match found {
                Found::Same(place) => {
                    #[expect(clippy::expect_used, reason = "our own invariant")]
                    let (_, (entry, mark)) =
                        old.find(|(at, _)| *at == place).expect("places ascend like names");
                    self.same_entry(at, entry, mark)
                }
                Found::Other(other) => self.within(&other.name, |here| here.entry(at, &other)),
            };
            match read {
                Ok((entry, mark)) => {
                    entries.push(entry);
                    marks.push(mark);
                }
                Err(error) if is_gone(&error) => {}
                Err(error) => return Err(error),
            }
        }
        self.put(at.inode, listing.listed, entries, marks)
    }

    fn put(
        &mut self,
        inode: Inode,
        listed: Option<Marks>,
        entries: Vec<Entry>,
        marks: Vec<Mark>,
    ) -> Result<Digest, ContentError> {
        let (digest, entries) = self.put_entries(entries)?;
        let directory = Remembered::new(digest, listed, entries, marks);
        self.sums.add(directory.sums);
        if self.trusts_times {
            self.remembered.insert(inode, directory);
        }
        Ok(digest)
    }

    /// Large directories are cut where a name's hash says so, so that an insertion moves no other
    /// cut. Returns the entries too.
    fn put_entries(&mut self, entries: Vec<Entry>) -> Result<(Digest, Vec<Entry>), ContentError> {
        let mut put = |entries| {
            let directory = Directory::Entries(entries);
            let digest = super::put_object(self.sink, &directory)?;
            let Directory::Entries(entries) = directory else { return Ok((digest, Vec::new())) };
            Ok((digest, entries))
        };
        if entries.len() <= chunks::LIST_MAX / 2 {
            return put(entries);
        }
        let cut = |entry: &Entry| Digest::of(&entry.name).as_bytes()[0] == 0;
        let (mut parts, mut all) = (Vec::new(), Vec::with_capacity(entries.len()));
        for part in chunks::cut_where(entries, cut) {
            let (digest, entries) = put(part)?;
            parts.push(digest);
            all.extend(entries);
        }
        Ok((super::put_object(self.sink, &Directory::Parts(parts))?, all))
    }

    /// An entry that is recorded and has not changed.
    fn same_entry(
        &mut self,
        at: &At<'_>,
        entry: Entry,
        mark: Mark,
    ) -> Result<(Entry, Mark), ContentError> {
        let Entry { name, attributes, mut node } = entry;
        if mark.is_linked {
            if let Some(link) = self.link(&name, mark.inode) {
                return Ok(link);
            }
            let path = self.names.iter().chain([&name]).cloned().collect();
            self.linked.insert(mark.inode, (path, node.identity()));
        } else if matches!(node, Node::Directory(_)) {
            let below = At::below(at, &name, mark.inode);
            node = Node::Directory(self.within(&name, |here| here.directory(&below))?);
        }
        Ok((Entry { name, attributes, node }, mark))
    }

    /// Another name of what was read already.
    fn link(&self, name: &[u8], inode: Inode) -> Option<(Entry, Mark)> {
        let (first, identity) = self.linked.get(&inode)?;
        let node = Node::HardLink(first.clone(), *identity);
        let entry = Entry { name: ByteBuf::from(name), attributes: None, node };
        Some((entry, Mark { inode, recorded: None, is_linked: true }))
    }

    fn entry(&mut self, at: &At<'_>, other: &Other) -> Result<(Entry, Mark), ContentError> {
        use nix::libc::{S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO, S_IFLNK, S_IFMT, S_IFREG, S_IFSOCK};
        let path = self.path.clone();
        let Other { name, stat, is_past } = other;
        let device = (
            u32::try_from(nix::sys::stat::major(stat.st_rdev)).unwrap_or(u32::MAX),
            u32::try_from(nix::sys::stat::minor(stat.st_rdev)).unwrap_or(u32::MAX),
        );
        let (kind, inode) = (stat.st_mode & S_IFMT, inode_of(stat));
        let is_linked = kind != S_IFDIR && stat.st_nlink > 1;
        if is_linked && let Some(link) = self.link(name, inode) {
            return Ok(link);
        }
        let parent = at.open().map_err(on("open the directory of", &path))?;
        let mut flags = Flags::default();
        let mut recorded = (self.trusts_times && *is_past).then_some(Marks::of(stat));
        let node = match kind {
            S_IFREG => {
                let read = self.file(parent, other)?;
                (flags, recorded) = (read.flags, read.recorded);
                Node::File(read.bytes, read.content)
            }
            S_IFDIR => {
                let below = At::below(at, name, inode);
                let directory = below.open().map_err(on("open directory", &path))?;
                flags = self.flags(directory)?;
                Node::Directory(self.directory(&below)?)
            }
            S_IFLNK => {
                let target =
                    readlinkat(parent, OsStr::from_bytes(name)).map_err(|errno| match errno {
                        // It is no link any more (readlink(2)).
                        Errno::EINVAL => on("read link", &path)(Errno::ENOENT),
                        errno => on("read link", &path)(errno),
                    })?;
                Node::Symlink(ByteBuf::from(target.as_bytes()))
            }
            S_IFCHR => Node::CharDevice(device.0, device.1),
            S_IFBLK => Node::BlockDevice(device.0, device.1),
            S_IFIFO => Node::Fifo,
            S_IFSOCK => Node::Socket,
            _ => return Err(on("name the type of", &path)(Errno::EINVAL)),
        };
        if is_linked {
            self.linked.insert(inode, (self.names.clone(), node.identity()));
        }
        let attributes = Some(self.attributes(parent, name, stat, flags)?);
        let entry = Entry { name: ByteBuf::from(&name[..]), attributes, node };
        Ok((entry, Mark { inode, recorded, is_linked }))
    }

    fn attributes(
        &self,
        parent: &OwnedFd,
        name: &[u8],
        stat: &FileStat,
        flags: Flags,
    ) -> Result<Attributes, ContentError> {
        // Through the descriptor, since links and devices cannot be opened; the last name is not
        // followed.
        let at = PathBuf::from(format!("/proc/self/fd/{}", parent.as_raw_fd()))
            .join(OsStr::from_bytes(name));
        let mut xattrs = Vec::new();
        for key in xattr::list(&at).map_err(on("list attributes of", &self.path))? {
            if OVERLAY_LOCAL.contains(&key.as_bytes()) {
                continue;
            }
            if let Some(value) =
                xattr::get(&at, &key).map_err(on("read attributes of", &self.path))?
            {
                xattrs.push((ByteBuf::from(key.as_bytes()), ByteBuf::from(value)));
            }
        }
        xattrs.sort_unstable();
        Ok(Attributes {
            mode: stat.st_mode & 0o7777,
            uid: stat.st_uid,
            gid: stat.st_gid,
            modified: (stat.st_mtime, u32::try_from(stat.st_mtime_nsec).unwrap_or(0)),
            xattrs,
            flags: flags.bits,
            project: flags.project,
        })
    }

    /// Flags and project of an open file or directory. Errors: [`ContentError::Flag`] for one that
    /// cannot move.
    fn flags(&self, opened: &impl AsFd) -> Result<Flags, ContentError> {
        let found = inode::read(opened).map_err(on("read the flags of", &self.path))?;
        found.map_err(|flag| ContentError::Flag { path: self.path.clone(), flag })
    }

    /// The name may be something else than when it was looked at: a container may have put a device
    /// in its place, which is not read.
    fn file(&mut self, parent: &OwnedFd, listed: &Other) -> Result<FileRead, ContentError> {
        let path = self.path.clone();
        let Other { name, stat: listed, is_past } = listed;
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let opened = openat(parent, OsStr::from_bytes(name), flags, Mode::empty());
        let file = opened.map_err(|errno| match errno {
            // It is a socket, or a device without a driver, by now (open(2)).
            Errno::ENXIO | Errno::ENODEV => on("open", &path)(Errno::ENOENT),
            errno => on("open", &path)(errno),
        })?;
        let stat = fstat(&file).map_err(on("stat", &path))?;
        if inode_of(&stat) != inode_of(listed) || stat.st_mode != listed.st_mode {
            return Err(on("read", &path)(Errno::ENOENT));
        }
        let (file, marks) = (File::from(file), Marks::of(listed));
        // The order of these steps is the proof in the module's comment; the first was the look.
        let is_still = self.trusts_times && *is_past && !may_have_writer(&file);
        let flags = self.flags(&file)?;
        let pieces = self.pieces(&file, &path)?;
        let bytes = pieces.iter().map(|piece| piece.bytes).sum();
        let content = chunks::put_pieces(self.sink, pieces)?;
        let is_still = is_still && Marks::of(&fstat(&file).map_err(on("stat", &path))?) == marks;
        Ok(FileRead { bytes, content, flags, recorded: is_still.then_some(marks) })
    }

    /// Data and holes as the file system tells them (`lseek(2)`, `SEEK_DATA`).
    fn pieces(&mut self, mut file: &File, path: &Path) -> Result<Vec<Piece>, ContentError> {
        let end = file.seek(SeekFrom::End(0)).map_err(on("seek in", path))?;
        let mut pieces = Vec::new();
        let mut at = 0;
        while at < end {
            let offset = i64::try_from(at).unwrap_or(i64::MAX);
            let data = match lseek(file.as_fd(), offset, Whence::SeekData) {
                Ok(data) => u64::try_from(data).unwrap_or(end).min(end),
                Err(Errno::ENXIO) => end,
                Err(errno) => return Err(on("seek data in", path)(errno)),
            };
            if data > at {
                pieces.push(Piece { bytes: data - at, chunk: None });
                at = data;
                continue;
            }
            let hole = lseek(file.as_fd(), offset, Whence::SeekHole)
                .map_err(on("seek a hole in", path))?;
            let hole = u64::try_from(hole).unwrap_or(end).min(end);
            file.seek(SeekFrom::Start(at)).map_err(on("seek in", path))?;
            let read = chunks::cut(file.take(hole - at), path, self.sink, &mut pieces)?;
            at += read;
            if at < hole {
                // Truncated while we read.
                break;
            }
        }
        Ok(pieces)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::thread;

    use proptest::prelude::*;

    use super::*;
    use crate::content::Source as _;
    use crate::content::fake::Objects;
    use crate::content::known::CLOCK_TICK;

    /// A directory on a file system whose times are trusted, with the file "a" that has been still
    /// for a while.
    fn still() -> tempfile::TempDir {
        let from = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        fs::write(from.path().join("a"), b"one").unwrap();
        wait_for_another_tick();
        from
    }

    fn reads(from: &Path, unchanged: &mut Unchanged) -> bool {
        let mut objects = Objects::default();
        capture(from, &mut objects, unchanged).unwrap();
        objects.0.contains_key(&Digest::of(b"one"))
    }

    /// Its times say nothing of a write that had begun before: none is made here, since the next
    /// reading must not depend on any mark.
    /// Method: a thread has one name be a file, a link and a socket in turn while captures run.
    #[test]
    fn a_name_that_becomes_something_else_is_left_out() {
        use std::sync::atomic::{AtomicBool, Ordering};
        let dir = tempfile::tempdir().unwrap();
        let [tree, spare] = ["tree", "spare"].map(|name| dir.path().join(name));
        std::fs::create_dir(&tree).unwrap();
        let is_over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    let put = || std::fs::rename(&spare, tree.join("name")).unwrap();
                    std::fs::write(&spare, "content").unwrap();
                    put();
                    std::os::unix::fs::symlink("nowhere", &spare).unwrap();
                    put();
                    drop(std::os::unix::net::UnixListener::bind(&spare).unwrap());
                    put();
                }
            });
            let captured = (0..3000).try_for_each(|_| {
                capture(&tree, &mut Objects::default(), &mut Unchanged::default()).map(drop)
            });
            is_over.store(true, Ordering::Relaxed);
            captured.unwrap();
        });
    }

    #[test]
    fn a_file_that_is_open_for_writing_is_read_in_every_capture() {
        let (from, mut unchanged) = (still(), Unchanged::default());
        let writer = File::options().write(true).open(from.path().join("a")).unwrap();
        assert!(reads(from.path(), &mut unchanged));
        assert!(reads(from.path(), &mut unchanged), "a write may have been in flight");
        drop(writer);
        assert!(reads(from.path(), &mut unchanged), "it was recorded while it had a writer");
        assert!(!reads(from.path(), &mut unchanged));
        let _reader = File::open(from.path().join("a")).unwrap();
        assert!(!reads(from.path(), &mut unchanged), "a reader changes nothing");
    }

    #[test]
    fn nothing_counts_as_unchanged_once_the_clock_was_set() {
        let (from, mut unchanged) = (still(), Unchanged::default());
        reads(from.path(), &mut unchanged);
        assert!(!reads(from.path(), &mut unchanged));
        unchanged.clock += 1_000_000_000;
        assert!(reads(from.path(), &mut unchanged), "a new time may equal the old one");
        assert!(!reads(from.path(), &mut unchanged));
    }

    #[test]
    fn a_file_that_changed_a_moment_ago_is_not_recorded() {
        let (from, mut unchanged) = (still(), Unchanged::default());
        fs::write(from.path().join("a"), b"one").unwrap();
        assert!(reads(from.path(), &mut unchanged));
        thread::sleep(3 * CLOCK_TICK);
        assert!(reads(from.path(), &mut unchanged), "another change may have had the same time");
        assert!(!reads(from.path(), &mut unchanged));
    }

    /// Digest of the tree, and what had to be stored.
    fn take(from: &Path, unchanged: &mut Unchanged) -> (Digest, Objects) {
        let mut objects = Objects::default();
        let captured = capture(from, &mut objects, unchanged).unwrap();
        (captured.tree, objects)
    }

    fn wait_for_another_tick() {
        thread::sleep(3 * CLOCK_TICK);
    }

    #[test]
    fn what_has_not_changed_is_not_stored_again_and_a_change_costs_its_path() {
        let (from, mut unchanged) = (still(), Unchanged::default());
        for directory in ["few", "many/deep"] {
            fs::create_dir_all(from.path().join(directory)).unwrap();
        }
        for n in 0..700 {
            fs::write(from.path().join(format!("many/{n}")), n.to_string()).unwrap();
        }
        std::os::unix::fs::symlink("there", from.path().join("few/link")).unwrap();
        wait_for_another_tick();
        let (first, all) = take(from.path(), &mut unchanged);
        let (second, again) = take(from.path(), &mut unchanged);
        assert_eq!(second, first);
        assert_eq!(again.0.keys().collect::<Vec<_>>(), [&first], "only the tree's own object");
        assert!(all.0.len() > 700);

        // The same length, and the directory's own times stay as they are.
        fs::write(from.path().join("many/500"), "xyz").unwrap();
        let (third, changed) = take(from.path(), &mut unchanged);
        assert_ne!(third, first);
        assert_eq!(third, take(from.path(), &mut Unchanged::default()).0);
        assert!(changed.0.contains_key(&Digest::of(b"xyz")));
        assert!(!changed.0.contains_key(&Digest::of(b"499")), "its neighbour was read");
        wait_for_another_tick();
        assert_eq!(take(from.path(), &mut unchanged).0, third);
        let (_, again) = take(from.path(), &mut unchanged);
        assert_eq!(again.0.len(), 1, "all is recorded again");
    }

    /// Below `unchanged` directories nothing is looked up by name, so each of these must be found
    /// by what it does to the marks.
    #[test]
    fn changes_of_names_below_recorded_directories_are_seen() {
        let changes: [fn(&Path); 7] = [
            |root| fs::rename(root.join("d/e"), root.join("d/f")).unwrap(),
            |root| fs::rename(root.join("d/x"), root.join("x")).unwrap(),
            |root| fs::remove_dir_all(root.join("d/e")).unwrap(),
            |root| fs::write(root.join("d/e/new"), "new").unwrap(),
            // The first name of a linked file comes to stand behind the other.
            |root| fs::rename(root.join("d"), root.join("z")).unwrap(),
            |root| fs::remove_file(root.join("d/linked")).unwrap(),
            |root| {
                let mode = std::os::unix::fs::PermissionsExt::from_mode(0o711);
                fs::set_permissions(root.join("d/e"), mode).unwrap();
            },
        ];
        for (case, change) in changes.into_iter().enumerate() {
            let (from, mut unchanged) = (still(), Unchanged::default());
            let root = from.path();
            fs::create_dir_all(root.join("d/e")).unwrap();
            for name in ["d/x", "d/e/y", "d/linked"] {
                fs::write(root.join(name), name).unwrap();
            }
            fs::hard_link(root.join("d/linked"), root.join("other")).unwrap();
            wait_for_another_tick();
            let first = take(root, &mut unchanged).0;
            assert_eq!(take(root, &mut unchanged).0, first, "case {case}");
            change(root);
            let second = take(root, &mut unchanged).0;
            assert_ne!(second, first, "case {case}");
            assert_eq!(second, take(root, &mut Unchanged::default()).0, "case {case}");
            assert_eq!(second, take(root, &mut unchanged).0, "case {case}");
        }
    }

    #[derive(Debug, Clone)]
    enum Change {
        Write(u8, u8),
        Remove(u8),
        Rename(u8, u8),
        Link(u8, u8),
        Symlink(u8, u8),
        Directory(u8),
        Mode(u8, u8),
        Note(u8, u8),
    }

    fn change() -> impl Strategy<Value = Change> {
        let (at, any) = (0..7u8, any::<u8>());
        prop_oneof![
            (at.clone(), any).prop_map(|(a, b)| Change::Write(a, b)),
            at.clone().prop_map(Change::Remove),
            (at.clone(), at.clone()).prop_map(|(a, b)| Change::Rename(a, b)),
            (at.clone(), at.clone()).prop_map(|(a, b)| Change::Link(a, b)),
            (at.clone(), any).prop_map(|(a, b)| Change::Symlink(a, b)),
            at.clone().prop_map(Change::Directory),
            (at.clone(), any).prop_map(|(a, b)| Change::Mode(a, b)),
            (at, any).prop_map(|(a, b)| Change::Note(a, b)),
        ]
    }

    /// Makes a change if it is possible.
    fn apply(root: &Path, change: &Change) {
        use std::os::unix::fs::{PermissionsExt as _, symlink};
        let at = |n: u8| root.join(["a", "b", "d", "d/x", "d/e", "d/e/y", "z"][usize::from(n)]);
        let _ = match change {
            Change::Write(file, byte) => fs::write(at(*file), [*byte; 5]),
            Change::Remove(file) => {
                fs::remove_file(at(*file)).or_else(|_| fs::remove_dir_all(at(*file)))
            }
            Change::Rename(from, to) => fs::rename(at(*from), at(*to)),
            Change::Link(from, to) => fs::hard_link(at(*from), at(*to)),
            Change::Symlink(file, byte) => symlink(byte.to_string(), at(*file)),
            Change::Directory(name) => fs::create_dir(at(*name)),
            Change::Mode(file, mode) => {
                let mode = fs::Permissions::from_mode(0o700 | u32::from(mode % 64));
                fs::set_permissions(at(*file), mode)
            }
            Change::Note(file, note) => xattr::set(at(*file), "user.note", &[*note]),
        };
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]
        /// Method: any changes between captures that remember each other; each is as one that
        /// remembers nothing. Half of the rounds begin before what changed can be recorded.
        #[test]
        fn remembering_changes_nothing(
            rounds in proptest::collection::vec(
                (proptest::collection::vec(change(), 0..6), any::<bool>()), 1..6)
        ) {
            let (from, mut unchanged) = (still(), Unchanged::default());
            for (changes, waits) in rounds {
                changes.iter().for_each(|change| apply(from.path(), change));
                if waits {
                    wait_for_another_tick();
                }
                let (tree, _) = take(from.path(), &mut unchanged);
                prop_assert_eq!(tree, take(from.path(), &mut Unchanged::default()).0);
            }
        }
    }

    /// The first entry. `objects` has what earlier captures stored.
    fn entry(from: &Path, unchanged: &mut Unchanged, objects: &mut Objects) -> Entry {
        let tree = capture(from, objects, unchanged).unwrap().tree;
        let root = objects.decode::<Tree>(&tree).unwrap().root;
        objects.entries(&root).unwrap().remove(0)
    }

    #[test]
    fn a_recorded_file_is_not_opened_and_is_the_same() {
        use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
        let (from, mut unchanged) = (still(), Unchanged::default());
        let mut objects = Objects::default();
        let file = from.path().join("a");
        xattr::set(&file, "user.note", b"kept").unwrap();
        thread::sleep(3 * CLOCK_TICK);
        let first = entry(from.path(), &mut unchanged, &mut objects);
        let opened = Inotify::init(InitFlags::IN_NONBLOCK).unwrap();
        opened.add_watch(&file, AddWatchFlags::IN_OPEN).unwrap();
        assert_eq!(entry(from.path(), &mut unchanged, &mut objects), first);
        assert!(matches!(opened.read_events(), Err(Errno::EAGAIN)), "it was opened");
        assert_eq!(first.attributes.unwrap().xattrs.len(), 1);
        let unknown = entry(from.path(), &mut Unchanged::default(), &mut objects);
        assert_eq!(unknown.node, first.node);
    }

    /// Each of these leaves size and modification time as they are.
    #[test]
    fn a_change_of_attributes_of_a_recorded_file_is_seen() {
        let changes: [fn(&Path); 5] = [
            |file| {
                let mode = std::os::unix::fs::PermissionsExt::from_mode(0o640);
                fs::set_permissions(file, mode).unwrap();
            },
            |file| std::os::unix::fs::chown(file, Some(7), Some(8)).unwrap(),
            |file| xattr::set(file, "user.note", b"new").unwrap(),
            |file| {
                let done = std::process::Command::new("chattr").arg("+A").arg(file).status();
                assert!(done.unwrap().success());
            },
            // Another file of the same size and times in its place.
            |file| {
                let (other, old) = (file.with_extension("new"), fs::metadata(file).unwrap());
                fs::write(&other, b"two").unwrap();
                let times = fs::FileTimes::new().set_modified(old.modified().unwrap());
                File::options().write(true).open(&other).unwrap().set_times(times).unwrap();
                fs::rename(other, file).unwrap();
            },
        ];
        for (case, change) in changes.into_iter().enumerate() {
            let (from, mut unchanged) = (still(), Unchanged::default());
            let mut objects = Objects::default();
            let first = entry(from.path(), &mut unchanged, &mut objects);
            change(&from.path().join("a"));
            let second = entry(from.path(), &mut unchanged, &mut objects);
            assert_ne!(second, first, "case {case}");
            assert_eq!(
                second,
                entry(from.path(), &mut Unchanged::default(), &mut objects),
                "case {case}"
            );
        }
    }
}
