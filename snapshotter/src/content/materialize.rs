//! Making a directory equal to a [`Tree`], by touching only what differs from the tree it was equal to before.
//!
//! The directory is ours alone while this runs, but the tree may come from a hostile peer. Every step goes by
//! the file descriptor of the directory above and follows no symbolic link (`openat2(2)`, `RESOLVE_BENEATH`), names
//! were checked when the objects were decoded, and a hard link can only name a regular file of the same tree.
//!
//! On failure the directory is neither the old tree nor the new one: throw it away.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use godwit_protos::Digest;
use nix::errno::Errno;
use nix::fcntl::{
    AtFlags, FallocateFlags, OFlag, OpenHow, ResolveFlag, fallocate, openat, openat2,
};
use nix::sys::stat::{
    FchmodatFlags, Mode, SFlag, UtimensatFlags, fchmodat, fstatat, makedev, mkdirat, mknodat,
    utimensat,
};
use nix::sys::time::TimeSpec;
use nix::unistd::{
    Gid, Uid, UnlinkatFlags, fchownat, ftruncate, linkat, mkfifoat, symlinkat, unlinkat,
};

use super::object::{Attributes, Content, Entry, Kind, Node, ObjectError, Piece, Tree};
use super::{ContentError, Source, capture::DEPTH_MAX, on};

/// Makes the existing directory `target` equal to the tree `new`.
///
/// - `base` is the tree that `target` is equal to now; `None` stands for an empty directory.
/// - Errors: [`ContentError`]; the directory is then to be thrown away.
pub fn materialize<S: Source>(
    source: &S,
    new: &Digest,
    base: Option<&Digest>,
    target: &Path,
) -> Result<(), ContentError> {
    if base == Some(new) {
        return Ok(());
    }
    let tree: Tree = source.decode(new)?;
    let base = base.map(|base| source.decode::<Tree>(base)).transpose()?;
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let root = nix::fcntl::open(target, flags, Mode::empty()).map_err(on("open", target))?;
    let mut writer = Writer { source, root: &root, path: target.to_owned(), depth: 0 };
    writer.directory(&root, &tree.root, base.as_ref().map(|base| &base.root))?;
    writer.attributes(&root, OsStr::new("."), &tree.attributes)
}

struct Writer<'a, S> {
    source: &'a S,
    root: &'a OwnedFd,
    /// Where we are, for messages.
    path: PathBuf,
    depth: usize,
}

impl<S: Source> Writer<'_, S> {
    /// Makes the contents of `at` equal to directory `new`, which were equal to `base`.
    fn directory(
        &mut self,
        at: &OwnedFd,
        new: &Digest,
        base: Option<&Digest>,
    ) -> Result<(), ContentError> {
        if base == Some(new) {
            return Ok(());
        }
        if self.depth >= DEPTH_MAX {
            return Err(ContentError::TooDeep(self.path.clone()));
        }
        let entries = self.source.entries(new)?;
        let before = base.map(|base| self.source.entries(base)).transpose()?.unwrap_or_default();
        let find = |list: &[Entry], name: &[u8]| {
            list.binary_search_by(|entry| entry.name.as_slice().cmp(name)).ok()
        };
        for old in &before {
            if find(&entries, &old.name).is_none() {
                self.remove(at, OsStr::from_bytes(&old.name))?;
            }
        }
        for entry in &entries {
            let old = find(&before, &entry.name).map(|index| &before[index]);
            self.path.push(OsStr::from_bytes(&entry.name));
            let done = self.entry(at, entry, old);
            self.path.pop();
            done?;
        }
        Ok(())
    }

    fn entry(
        &mut self,
        at: &OwnedFd,
        new: &Entry,
        old: Option<&Entry>,
    ) -> Result<(), ContentError> {
        // A hard link that stays is not proof that its file stayed the same inode, but a file is only ever
        // patched in place, so it is.
        if old == Some(new) {
            return Ok(());
        }
        let name = OsStr::from_bytes(&new.name);
        let patched = match (&new.node, old.map(|old| &old.node)) {
            (Node::File(bytes, content), Some(Node::File(_, before))) => {
                self.file(at, name, *bytes, content, Some(before))?;
                true
            }
            (Node::Directory(new), Some(Node::Directory(before))) => {
                self.subdirectory(at, name, new, Some(before))?;
                true
            }
            (new, Some(before)) if new == before => true,
            _ => false,
        };
        if !patched {
            if old.is_some() {
                self.remove(at, name)?;
            }
            self.create(at, name, &new.node)?;
        }
        new.attributes.as_ref().map_or(Ok(()), |attributes| self.attributes(at, name, attributes))
    }

    fn create(&mut self, at: &OwnedFd, name: &OsStr, node: &Node) -> Result<(), ContentError> {
        let path = self.path.clone();
        let private = Mode::from_bits_truncate(0o600);
        match node {
            Node::File(bytes, content) => self.file(at, name, *bytes, content, None),
            Node::Directory(directory) => {
                mkdirat(at, name, Mode::from_bits_truncate(0o700))
                    .map_err(on("make directory", &path))?;
                self.subdirectory(at, name, directory, None)
            }
            Node::HardLink(target) => self.hard_link(at, name, target),
            Node::Symlink(target) => {
                symlinkat(OsStr::from_bytes(target), at, name).map_err(on("make link", &path))
            }
            Node::CharDevice(major, minor) => {
                let device = makedev(u64::from(*major), u64::from(*minor));
                mknodat(at, name, SFlag::S_IFCHR, private, device).map_err(on("make device", &path))
            }
            Node::BlockDevice(major, minor) => {
                let device = makedev(u64::from(*major), u64::from(*minor));
                mknodat(at, name, SFlag::S_IFBLK, private, device).map_err(on("make device", &path))
            }
            Node::Fifo => mkfifoat(at, name, private).map_err(on("make pipe", &path)),
            Node::Socket => {
                mknodat(at, name, SFlag::S_IFSOCK, private, 0).map_err(on("make socket", &path))
            }
        }
    }

    fn subdirectory(
        &mut self,
        at: &OwnedFd,
        name: &OsStr,
        new: &Digest,
        base: Option<&Digest>,
    ) -> Result<(), ContentError> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let directory =
            openat(at, name, flags, Mode::empty()).map_err(on("open directory", &self.path))?;
        self.depth += 1;
        let done = self.directory(&directory, new, base);
        self.depth -= 1;
        done
    }

    /// Writes the pieces that are not already where they belong, then sets the length.
    fn file(
        &self,
        at: &OwnedFd,
        name: &OsStr,
        bytes: u64,
        content: &Content,
        base: Option<&Content>,
    ) -> Result<(), ContentError> {
        let path = &self.path;
        if base == Some(content) {
            return Ok(());
        }
        let flags = OFlag::O_WRONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let create = OFlag::O_CREAT | OFlag::O_EXCL;
        let flags = if base.is_some() { flags } else { flags | create };
        let file =
            openat(at, name, flags, Mode::from_bits_truncate(0o600)).map_err(on("open", path))?;
        let file = File::from(file);
        let before = base.map(|base| self.source.pieces(base)).transpose()?;
        let mut pieces = self.source.pieces(content)?;
        let mut sum = 0u64;
        pieces.retain(|piece| {
            sum = sum.saturating_add(piece.bytes);
            sum <= bytes
        });
        write_pieces(self.source, (&file, path), 0, &pieces, before.as_deref())?;
        let length = i64::try_from(bytes).map_err(|_cause| on("size", path)(Errno::EFBIG))?;
        ftruncate(&file, length).map_err(on("set the length of", path))
    }

    fn hard_link(
        &self,
        at: &OwnedFd,
        name: &OsStr,
        target: &[serde_bytes::ByteBuf],
    ) -> Result<(), ContentError> {
        let Some((last, parents)) = target.split_last() else {
            return Err(on("link", &self.path)(Errno::EINVAL));
        };
        let parent: PathBuf = std::iter::once(OsStr::new("."))
            .chain(parents.iter().map(|name| OsStr::from_bytes(name)))
            .collect();
        let how = OpenHow::new()
            .flags(OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
        let parent = openat2(self.root, &parent, how).map_err(on("link", &self.path))?;
        let last = OsStr::from_bytes(last);
        let stat =
            fstatat(&parent, last, AtFlags::AT_SYMLINK_NOFOLLOW).map_err(on("link", &self.path))?;
        if stat.st_mode & nix::libc::S_IFMT != nix::libc::S_IFREG {
            return Err(on("link a non-regular file to", &self.path)(Errno::EINVAL));
        }
        linkat(&parent, last, at, name, AtFlags::empty()).map_err(on("link", &self.path))
    }

    fn remove(&self, at: &OwnedFd, name: &OsStr) -> Result<(), ContentError> {
        match unlinkat(at, name, UnlinkatFlags::NoRemoveDir) {
            Err(Errno::EISDIR) => {
                // The kernel resolves the descriptor; what is removed lies below it.
                let within = PathBuf::from(format!("/proc/self/fd/{}", at.as_raw_fd())).join(name);
                crate::trees::remove(&within)
                    .map_err(|error| on("remove", &self.path.join(name))(error.source))
            }
            done => done.map_err(on("remove", &self.path.join(name))),
        }
    }

    /// Owner first, since changing it clears set-user-id bits and capabilities; times last.
    fn attributes(
        &self,
        at: &OwnedFd,
        name: &OsStr,
        wanted: &Attributes,
    ) -> Result<(), ContentError> {
        let path = &self.path;
        let within = PathBuf::from(format!("/proc/self/fd/{}", at.as_raw_fd())).join(name);
        let stat = fstatat(at, name, AtFlags::AT_SYMLINK_NOFOLLOW).map_err(on("stat", path))?;
        let (uid, gid) = (Uid::from_raw(wanted.uid), Gid::from_raw(wanted.gid));
        fchownat(at, name, Some(uid), Some(gid), AtFlags::AT_SYMLINK_NOFOLLOW)
            .map_err(on("set the owner of", path))?;
        for key in xattr::list(&within).map_err(on("list attributes of", path))? {
            if !wanted.xattrs.iter().any(|(name, _)| name == key.as_bytes()) {
                xattr::remove(&within, &key).map_err(on("remove an attribute of", path))?;
            }
        }
        for (key, value) in &wanted.xattrs {
            xattr::set(&within, OsStr::from_bytes(key), value)
                .map_err(on("set an attribute of", path))?;
        }
        if stat.st_mode & nix::libc::S_IFMT != nix::libc::S_IFLNK {
            let mode = Mode::from_bits_truncate(wanted.mode);
            fchmodat(at, name, mode, FchmodatFlags::FollowSymlink)
                .map_err(on("set the mode of", path))?;
        }
        let (seconds, nanoseconds) = wanted.modified;
        let modified = TimeSpec::new(seconds, i64::from(nanoseconds.min(999_999_999)));
        utimensat(at, name, &TimeSpec::UTIME_OMIT, &modified, UtimensatFlags::NoFollowSymlink)
            .map_err(on("set the times of", path))
    }
}

/// Writes the pieces of a file from `start` on that are not in their place already, as `before` tells what is there.
pub(super) fn write_pieces<S: Source>(
    source: &S,
    (file, path): (&File, &Path),
    start: u64,
    pieces: &[Piece],
    before: Option<&[Piece]>,
) -> Result<(), ContentError> {
    let placed = |pieces: &[Piece]| {
        let place = |offset: &mut u64, piece: &Piece| {
            let at = *offset;
            *offset = offset.saturating_add(piece.bytes);
            Some((at, *piece))
        };
        pieces.iter().scan(start, place).collect::<Vec<_>>()
    };
    let known: HashMap<u64, Piece> = placed(before.unwrap_or_default()).into_iter().collect();
    for (offset, piece) in placed(pieces) {
        if known.get(&offset) == Some(&piece) {
            continue;
        }
        match piece.chunk {
            Some(chunk) => {
                let data = source.object(&chunk)?;
                if data.len() as u64 != piece.bytes {
                    let rule = "a chunk is as long as its piece";
                    let source = ObjectError::Rule { kind: Kind::Chunk, rule };
                    return Err(ContentError::Object { digest: chunk, source });
                }
                file.write_all_at(&data, offset).map_err(on("write to", path))?;
            }
            None if before.is_some() => {
                punch(file, offset, piece.bytes).map_err(on("punch a hole in", path))?;
            }
            None => {}
        }
    }
    Ok(())
}

fn punch(file: &File, offset: u64, bytes: u64) -> Result<(), Errno> {
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let signed = |value: u64| i64::try_from(value).map_err(|_cause| Errno::EFBIG);
    fallocate(file, flags, signed(offset)?, signed(bytes)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::content::capture::{Unchanged, capture};
    use crate::content::fake::Objects;
    use proptest::prelude::*;
    use std::collections::HashSet;
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    fn take(root: &Path, objects: &mut Objects) -> Digest {
        capture(root, objects, &mut Unchanged::default(), &HashSet::new()).unwrap().tree
    }

    /// A tree with one of everything that a volume may hold.
    fn everything(root: &Path) {
        fs::create_dir_all(root.join("dir/sub")).unwrap();
        fs::write(root.join("dir/file"), b"content").unwrap();
        fs::write(root.join("empty"), b"").unwrap();
        fs::write(root.join("large"), vec![7; 3 << 20]).unwrap();
        fs::hard_link(root.join("dir/file"), root.join("zlink")).unwrap();
        std::os::unix::fs::symlink("../anywhere", root.join("dir/sym")).unwrap();
        fs::write(root.join(OsStr::from_bytes(b"odd\xff\n name")), b"odd").unwrap();
        let sparse = File::create(root.join("sparse")).unwrap();
        sparse.write_all_at(b"x", 5 << 20).unwrap();
        sparse.set_len(9 << 20).unwrap();
        mkfifoat(File::open(root).unwrap(), "pipe", Mode::from_bits_truncate(0o640)).unwrap();
        fs::set_permissions(root.join("dir/file"), fs::Permissions::from_mode(0o4751)).unwrap();
        xattr::set(root.join("empty"), "user.colour", b"blue").unwrap();
        std::os::unix::fs::chown(root.join("large"), Some(123), Some(456)).ok();
    }

    #[test]
    fn everything_a_volume_may_hold_comes_out_the_same() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        everything(from.path());
        let mut objects = Objects::default();
        let tree = take(from.path(), &mut objects);
        materialize(&objects, &tree, None, to.path()).unwrap();
        assert_eq!(take(to.path(), &mut objects), tree);
        let (file, link) = (to.path().join("dir/file"), to.path().join("zlink"));
        assert_eq!(fs::metadata(file).unwrap().ino(), fs::metadata(link).unwrap().ino());
        let sparse = fs::metadata(to.path().join("sparse")).unwrap();
        assert!(sparse.blocks() * 512 < 1 << 20, "holes stay holes");
    }

    #[test]
    fn a_patched_directory_equals_the_new_tree_and_keeps_inodes() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        everything(from.path());
        let mut objects = Objects::default();
        let before = take(from.path(), &mut objects);
        materialize(&objects, &before, None, to.path()).unwrap();
        let inode = fs::metadata(to.path().join("large")).unwrap().ino();

        let large = File::options().write(true).open(from.path().join("large")).unwrap();
        large.write_all_at(b"changed", 1 << 20).unwrap();
        fs::remove_dir_all(from.path().join("dir")).unwrap();
        fs::write(from.path().join("dir"), b"now a file").unwrap();
        fs::remove_file(from.path().join("pipe")).unwrap();
        fs::create_dir(from.path().join("pipe")).unwrap();
        fs::write(from.path().join("pipe/inner"), b"x").unwrap();
        let after = take(from.path(), &mut objects);
        materialize(&objects, &after, Some(&before), to.path()).unwrap();
        assert_eq!(take(to.path(), &mut objects), after);
        assert_eq!(fs::metadata(to.path().join("large")).unwrap().ino(), inode);
    }

    #[test]
    fn an_unchanged_file_is_not_read_again_and_a_changed_one_is() {
        let from = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        fs::write(from.path().join("a"), b"one").unwrap();
        std::thread::sleep(std::time::Duration::from_millis(60));
        let (mut objects, mut unchanged) = (Objects::default(), Unchanged::default());
        let none = HashSet::new();
        let first = capture(from.path(), &mut objects, &mut unchanged, &none).unwrap();
        let mut nothing = Objects::default();
        let again = capture(from.path(), &mut nothing, &mut unchanged, &none).unwrap();
        assert_eq!(first, again);
        assert!(!nothing.0.contains_key(&Digest::of(b"one")), "read again though unchanged");
        fs::write(from.path().join("a"), b"two").unwrap();
        let after = capture(from.path(), &mut objects, &mut unchanged, &none).unwrap();
        assert_ne!(first.tree, after.tree);
    }

    #[test]
    fn a_tree_of_a_hostile_peer_stays_below_its_root() {
        use crate::content::Sink as _;
        use crate::content::object::{Directory, Object as _};
        use serde_bytes::ByteBuf;
        let to = tempfile::tempdir().unwrap();
        let attributes =
            Attributes { mode: 0o755, uid: 0, gid: 0, modified: (0, 0), xattrs: Vec::new() };
        let name = |text: &str| ByteBuf::from(text.as_bytes());
        let mut objects = Objects::default();
        // "a" points out of the tree; "b" asks for a hard link through it.
        let entries = vec![
            Entry {
                name: name("a"),
                attributes: Some(attributes.clone()),
                node: Node::Symlink(name("/etc")),
            },
            Entry {
                name: name("b"),
                attributes: None,
                node: Node::HardLink(vec![name("a"), name("passwd")]),
            },
        ];
        let root = objects.put(&Directory::Entries(entries).encode()).unwrap();
        let tree = objects.put(&Tree { attributes, root, bytes: 0 }.encode()).unwrap();
        let error = materialize(&objects, &tree, None, to.path()).unwrap_err();
        assert!(matches!(error, ContentError::File { .. }), "{error}");
        assert!(!to.path().join("b").exists());
    }

    #[derive(Debug, Clone)]
    enum Change {
        Write(u8, u16, u8),
        Remove(u8),
        Link(u8, u8),
        Directory(u8),
    }

    fn change() -> impl Strategy<Value = Change> {
        prop_oneof![
            (0..6u8, any::<u16>(), any::<u8>()).prop_map(|(f, o, b)| Change::Write(f, o, b)),
            (0..6u8).prop_map(Change::Remove),
            (0..6u8, 0..6u8).prop_map(|(a, b)| Change::Link(a, b)),
            (0..6u8).prop_map(Change::Directory),
        ]
    }

    fn apply(root: &Path, change: &Change) {
        let at = |n: u8| root.join(["a", "b", "d/x", "d/y", "e", "d"][usize::from(n)]);
        match change {
            Change::Write(file, offset, byte) => {
                let options =
                    File::options().create(true).write(true).truncate(false).open(at(*file));
                if let Ok(file) = options {
                    file.write_all_at(&[*byte; 100], u64::from(*offset) * 16).unwrap();
                }
            }
            Change::Remove(file) => {
                let _ = fs::remove_file(at(*file)).or_else(|_| fs::remove_dir_all(at(*file)));
            }
            Change::Link(from, to) => drop(fs::hard_link(at(*from), at(*to))),
            Change::Directory(name) => drop(fs::create_dir(at(*name))),
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
        /// Method: any changes, any number of rounds; a patched directory is captured as the same tree.
        #[test]
        fn patching_equals_copying(rounds in proptest::collection::vec(proptest::collection::vec(change(), 0..8), 1..5)) {
            let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
            let mut objects = Objects::default();
            let mut base = None;
            for changes in rounds {
                changes.iter().for_each(|change| apply(from.path(), change));
                let tree = take(from.path(), &mut objects);
                materialize(&objects, &tree, base.as_ref(), to.path()).unwrap();
                prop_assert_eq!(take(to.path(), &mut objects), tree);
                base = Some(tree);
            }
        }
    }
}
