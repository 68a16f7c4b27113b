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
//! 4. its size and times are then what they were before step 1.
//!
//! A later capture takes content and attributes of a recorded file as they were, without opening
//! it, while device, inode, size and times are equal.
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
//! the change time too, as do renaming and removing a name, and the attributes are read after step
//! 1.
//!
//! The price: a file that is open for writing is read in every capture, also while the container is
//! frozen.
//!
//! When the clock is set back, a new change time may equal an old one. Then nothing recorded before
//! is used.

use std::collections::HashMap;
use std::ffi::{CStr, CString, OsStr};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use godwit_protos::Digest;
use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat, readlinkat};
use nix::sys::stat::{FileStat, Mode, fstat, fstatat};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::{Whence, lseek};
use serde_bytes::ByteBuf;

use super::object::{Attributes, Content, Directory, Entry, Node, Piece, Tree};
use super::{ContentError, Sink, chunks, on};
use godwit_disk::inode::{self, Flags};
use godwit_disk::sys::may_have_writer;

/// Directories below each other that are followed.
pub const DEPTH_MAX: usize = 200;

/// A change time younger than this may hide a second change: file systems read a clock that
/// advances every 10 ms or more often. Twice that, so that [`CLOCK_SET_MIN`] is covered too.
const CLOCK_TICK: Duration = Duration::from_millis(20);

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

/// What a capture knows from the one before, so that it need not read what did not change.
#[derive(Debug, Default)]
pub struct Unchanged {
    files: HashMap<(u64, u64), Seen>,
    /// [`clock_offset`] when the oldest of them was recorded.
    clock: i128,
}

#[derive(Debug, Clone)]
struct Seen {
    marks: Marks,
    content: Content,
    attributes: Attributes,
}

/// What changes when a file does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Marks {
    size: i64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Marks {
    fn of(stat: &FileStat) -> Self {
        Self {
            size: stat.st_size,
            modified: (stat.st_mtime, stat.st_mtime_nsec),
            changed: (stat.st_ctime, stat.st_ctime_nsec),
        }
    }

    /// Whether a change that begins now is sure to get another change time.
    fn are_past(&self) -> bool {
        let seconds = u64::try_from(self.changed.0).unwrap_or(0);
        let changed = Duration::new(seconds, u32::try_from(self.changed.1).unwrap_or(0));
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        changed + CLOCK_TICK < now
    }
}

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
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let directory =
        nix::fcntl::open(root, flags, Mode::empty()).map_err(on("open directory", root))?;
    let stat = fstat(&directory).map_err(on("stat", root))?;
    let clock = clock_offset();
    if was_set(unchanged.clock, clock) {
        *unchanged = Unchanged { files: HashMap::new(), clock };
    }
    let mut reader = Reader {
        sink,
        known: std::mem::take(&mut unchanged.files),
        seen: HashMap::new(),
        linked: HashMap::new(),
        trusts_times: keeps_times(&directory, root)?,
        bytes: 0,
        flags: 0,
        has_projects: false,
        path: root.to_owned(),
        names: Vec::new(),
    };
    let flags = reader.flags(&directory)?;
    if flags.bits & inode::FIXED.bits() != 0 {
        let (path, flags) = (root.to_owned(), inode::names(flags.bits & inode::FIXED.bits()));
        return Err(ContentError::FixedRoot { path, flags });
    }
    let attributes = reader.attributes(&directory, c".", &stat, flags)?;
    let root = reader.directory(directory)?;
    let (bytes, seen) = (reader.bytes, std::mem::take(&mut reader.seen));
    let (flags, has_projects) = (reader.flags, reader.has_projects);
    let tree = super::put_object(sink, &Tree { attributes, root, bytes, flags, has_projects })?;
    unchanged.files = if was_set(clock, clock_offset()) { HashMap::new() } else { seen };
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

struct Reader<'a> {
    sink: &'a mut dyn Sink,
    known: HashMap<(u64, u64), Seen>,
    seen: HashMap<(u64, u64), Seen>,
    /// Of everything with several names, the path of the first and what links note of it.
    linked: HashMap<(u64, u64), (Vec<ByteBuf>, Option<Digest>)>,
    trusts_times: bool,
    bytes: u64,
    /// Flags that were found, and whether a project ID was.
    flags: u32,
    has_projects: bool,
    /// Where we are, for messages.
    path: PathBuf,
    /// Where we are, as components below the root.
    names: Vec<ByteBuf>,
}

impl Reader<'_> {
    fn directory(&mut self, directory: OwnedFd) -> Result<Digest, ContentError> {
        if self.names.len() >= DEPTH_MAX {
            return Err(ContentError::TooDeep(self.path.clone()));
        }
        let mut names = Vec::<CString>::new();
        let listing = directory.try_clone().map_err(on("open", &self.path))?;
        for entry in Dir::from_fd(listing).map_err(on("list", &self.path))?.iter() {
            let entry = entry.map_err(on("list", &self.path))?;
            if ![c".", c".."].contains(&entry.file_name()) {
                names.push(entry.file_name().to_owned());
            }
        }
        names.sort_unstable();
        let mut entries = Vec::with_capacity(names.len());
        for name in names {
            let component = OsStr::from_bytes(name.to_bytes());
            self.path.push(component);
            self.names.push(ByteBuf::from(name.to_bytes()));
            let entry = self.entry(&directory, &name);
            self.path.pop();
            self.names.pop();
            match entry {
                Ok(entry) => entries.push(entry),
                // The container removed it after we had listed it.
                Err(ContentError::File { source, .. })
                    if [Errno::ENOENT, Errno::ENOTDIR, Errno::ELOOP]
                        .iter()
                        .any(|errno| source.raw_os_error() == Some(*errno as i32)) => {}
                Err(error) => return Err(error),
            }
        }
        self.put_entries(entries)
    }

    /// Large directories are cut where a name's hash says so, so that an insertion moves no other
    /// cut.
    fn put_entries(&mut self, entries: Vec<Entry>) -> Result<Digest, ContentError> {
        if entries.len() <= chunks::LIST_MAX / 2 {
            return super::put_object(self.sink, &Directory::Entries(entries));
        }
        let cut = |entry: &Entry| Digest::of(&entry.name).as_bytes()[0] == 0;
        let mut parts = Vec::new();
        for part in chunks::cut_where(entries, cut) {
            parts.push(super::put_object(self.sink, &Directory::Entries(part))?);
        }
        super::put_object(self.sink, &Directory::Parts(parts))
    }

    fn entry(&mut self, parent: &OwnedFd, name: &CStr) -> Result<Entry, ContentError> {
        use nix::libc::{S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO, S_IFLNK, S_IFMT, S_IFREG, S_IFSOCK};
        let path = self.path.clone();
        let stat =
            fstatat(parent, name, AtFlags::AT_SYMLINK_NOFOLLOW).map_err(on("stat", &path))?;
        let device = (
            u32::try_from(nix::sys::stat::major(stat.st_rdev)).unwrap_or(u32::MAX),
            u32::try_from(nix::sys::stat::minor(stat.st_rdev)).unwrap_or(u32::MAX),
        );
        let entry_name = ByteBuf::from(name.to_bytes());
        let (kind, inode) = (stat.st_mode & S_IFMT, (stat.st_dev, stat.st_ino));
        let is_linked = kind != S_IFDIR && stat.st_nlink > 1;
        if is_linked && let Some((first, identity)) = self.linked.get(&inode) {
            let node = Node::HardLink(first.clone(), *identity);
            return Ok(Entry { name: entry_name, attributes: None, node });
        }
        if kind == S_IFREG
            && let Some((attributes, node)) = self.recorded(inode, &stat)
        {
            if is_linked {
                self.linked.insert(inode, (self.names.clone(), node.identity()));
            }
            return Ok(Entry { name: entry_name, attributes: Some(attributes), node });
        }
        let (mut flags, mut to_record) = (Flags::default(), None);
        let node = match kind {
            S_IFREG => {
                let FileRead { bytes, content, flags: found, recorded } =
                    self.file(parent, name, &stat)?;
                flags = found;
                to_record = recorded.map(|marks| (marks, content.clone()));
                Node::File(bytes, content)
            }
            S_IFDIR => {
                let how = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW;
                let directory = openat(parent, name, how | OFlag::O_CLOEXEC, Mode::empty())
                    .map_err(on("open directory", &path))?;
                flags = self.flags(&directory)?;
                Node::Directory(self.directory(directory)?)
            }
            S_IFLNK => {
                let target = readlinkat(parent, name).map_err(on("read link", &path))?;
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
        let attributes = self.attributes(parent, name, &stat, flags)?;
        if let Some((marks, content)) = to_record {
            self.seen.insert(inode, Seen { marks, content, attributes: attributes.clone() });
        }
        Ok(Entry { name: entry_name, attributes: Some(attributes), node })
    }

    /// Attributes and content of a file that was recorded and has not changed.
    fn recorded(&mut self, inode: (u64, u64), stat: &FileStat) -> Option<(Attributes, Node)> {
        let marks = Marks::of(stat);
        let seen = self.known.remove(&inode).filter(|seen| seen.marks == marks)?;
        let (attributes, content) = (seen.attributes.clone(), seen.content.clone());
        self.seen.insert(inode, seen);
        self.flags |= attributes.flags;
        self.has_projects |= attributes.project != 0;
        let bytes = u64::try_from(stat.st_size).unwrap_or(0);
        self.bytes += bytes;
        Some((attributes, Node::File(bytes, content)))
    }

    fn attributes(
        &self,
        parent: &OwnedFd,
        name: &CStr,
        stat: &FileStat,
        flags: Flags,
    ) -> Result<Attributes, ContentError> {
        // Through the descriptor, since links and devices cannot be opened; the last name is not
        // followed.
        let at = PathBuf::from(format!("/proc/self/fd/{}", parent.as_raw_fd()))
            .join(OsStr::from_bytes(name.to_bytes()));
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
    fn flags(&mut self, opened: &impl AsFd) -> Result<Flags, ContentError> {
        let found = inode::read(opened).map_err(on("read the flags of", &self.path))?;
        let found = found.map_err(|flag| ContentError::Flag { path: self.path.clone(), flag })?;
        self.flags |= found.bits;
        self.has_projects |= found.project != 0;
        Ok(found)
    }

    /// `listed` is what the name was when it was looked at: a container may have put a device in
    /// its place, which is not read.
    fn file(
        &mut self,
        parent: &OwnedFd,
        name: &CStr,
        listed: &FileStat,
    ) -> Result<FileRead, ContentError> {
        let path = self.path.clone();
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let file = openat(parent, name, flags, Mode::empty()).map_err(on("open", &path))?;
        let stat = fstat(&file).map_err(on("stat", &path))?;
        let inode = (stat.st_dev, stat.st_ino);
        if inode != (listed.st_dev, listed.st_ino) || stat.st_mode != listed.st_mode {
            return Err(on("read", &path)(Errno::ENOENT));
        }
        let (file, marks) = (File::from(file), Marks::of(&stat));
        // The order of these steps is the proof in the module's comment.
        let is_still = self.trusts_times
            && Marks::of(listed) == marks
            && marks.are_past()
            && !may_have_writer(&file);
        let flags = self.flags(&file)?;
        let pieces = self.pieces(&file, &path)?;
        let bytes = pieces.iter().map(|piece| piece.bytes).sum();
        self.bytes += bytes;
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

    use super::*;
    use crate::content::Source as _;
    use crate::content::fake::Objects;

    /// A directory on a file system whose times are trusted, with the file "a" that has been still
    /// for a while.
    fn still() -> tempfile::TempDir {
        let from = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        fs::write(from.path().join("a"), b"one").unwrap();
        thread::sleep(3 * CLOCK_TICK);
        from
    }

    fn reads(from: &Path, unchanged: &mut Unchanged) -> bool {
        let mut objects = Objects::default();
        capture(from, &mut objects, unchanged).unwrap();
        objects.0.contains_key(&Digest::of(b"one"))
    }

    /// Its times say nothing of a write that had begun before: none is made here, since the next
    /// reading must not depend on any mark.
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

    fn entry(from: &Path, unchanged: &mut Unchanged) -> Entry {
        let mut objects = Objects::default();
        let tree = capture(from, &mut objects, unchanged).unwrap().tree;
        let root = objects.decode::<Tree>(&tree).unwrap().root;
        objects.entries(&root).unwrap().remove(0)
    }

    #[test]
    fn a_recorded_file_is_not_opened_and_is_the_same() {
        use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
        let (from, mut unchanged) = (still(), Unchanged::default());
        let file = from.path().join("a");
        xattr::set(&file, "user.note", b"kept").unwrap();
        thread::sleep(3 * CLOCK_TICK);
        let first = entry(from.path(), &mut unchanged);
        let opened = Inotify::init(InitFlags::IN_NONBLOCK).unwrap();
        opened.add_watch(&file, AddWatchFlags::IN_OPEN).unwrap();
        assert_eq!(entry(from.path(), &mut unchanged), first);
        assert!(matches!(opened.read_events(), Err(Errno::EAGAIN)), "it was opened");
        assert_eq!(first.attributes.unwrap().xattrs.len(), 1);
        let unknown = entry(from.path(), &mut Unchanged::default());
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
            let first = entry(from.path(), &mut unchanged);
            change(&from.path().join("a"));
            let second = entry(from.path(), &mut unchanged);
            assert_ne!(second, first, "case {case}");
            assert_eq!(second, entry(from.path(), &mut Unchanged::default()), "case {case}");
        }
    }
}
