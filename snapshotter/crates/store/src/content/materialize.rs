//! Making a directory equal to a [`Tree`], by touching only what differs from the tree it was equal
//! to before.
//!
//! The directory is ours alone while this runs, but the tree may come from a hostile peer. Every
//! step goes by the file descriptor of the directory above and follows no symbolic link
//! (`openat2(2)`, `RESOLVE_BENEATH`), names were checked when the objects were decoded, and a hard
//! link can only name what is in the same tree and no directory.
//!
//! Flags that keep even root from changing a file ([`inode::GUARDS`]) are lifted from all of the
//! old tree first and set in all of the new one last. Both cost a walk of every directory, so a
//! tree says whether it has any.
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
use godwit_disk::inode::{self, Flags};

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
    let mut writer =
        Writer { source, root: &root, path: target.to_owned(), depth: 0, of: (*new, &tree) };
    // A new directory may have such flags from the one above it.
    inode::lift_guards(&root).map_err(on("lift the flags of", target))?;
    for (path, _) in base.as_ref().map_or(Ok(Vec::new()), |base| guarded(source, base))? {
        let opened = writer.opened(&path)?;
        inode::lift_guards(opened).map_err(on("lift the flags of", &target.join(path)))?;
    }
    writer.directory(&root, &tree.root, base.as_ref().map(|base| &base.root))?;
    writer.attributes(&root, OsStr::new("."), &tree.attributes, Before::Inherited)?;
    for (path, flags) in guarded(source, &tree)? {
        let opened = writer.opened(&path)?;
        inode::write(opened, flags).map_err(on("set the flags of", &target.join(path)))?;
    }
    Ok(())
}

/// Paths in a tree of what has flags that keep root from changing it, with all their flags.
fn guarded<S: Source>(source: &S, tree: &Tree) -> Result<Vec<(PathBuf, Flags)>, ContentError> {
    let all = Flags { bits: tree.flags, project: 0 };
    if all.guards() == 0 {
        return Ok(Vec::new());
    }
    let root = (PathBuf::from("."), tree.attributes.inode_flags());
    let mut found: Vec<_> =
        Some(root).filter(|(_, flags)| flags.guards() != 0).into_iter().collect();
    let mut pending = vec![(PathBuf::from("."), tree.root, 0)];
    while let Some((path, directory, depth)) = pending.pop() {
        if depth >= DEPTH_MAX {
            return Err(ContentError::TooDeep(path));
        }
        for entry in source.entries(&directory)? {
            let path = path.join(OsStr::from_bytes(&entry.name));
            let flags = entry.attributes.as_ref().map(Attributes::inode_flags).unwrap_or_default();
            if flags.guards() != 0 {
                found.push((path.clone(), flags));
            }
            if let Node::Directory(below) = entry.node {
                pending.push((path, below, depth + 1));
            }
        }
    }
    Ok(found)
}

/// What flags something has before its attributes are set.
#[derive(Clone, Copy)]
enum Before<'a> {
    /// Those of these attributes, less what was lifted.
    Known(&'a Attributes),
    /// It is new, and was made where nothing is inherited.
    None,
    /// It is new, and has what it inherited from the directory above.
    Inherited,
}

struct Writer<'a, S> {
    source: &'a S,
    root: &'a OwnedFd,
    /// Where we are, for messages.
    path: PathBuf,
    depth: usize,
    /// The tree that is laid out, and its name.
    of: (Digest, &'a Tree),
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
        let inherits = inode::has_any(at).map_err(on("read the flags of", &self.path))?;
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
            let done = self.entry(at, entry, old, inherits);
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
        inherits: bool,
    ) -> Result<(), ContentError> {
        // That also holds of a hard link: a file is patched in place and stays the same inode, and
        // of anything else the link has the identity.
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
        let Some(attributes) = &new.attributes else { return Ok(()) };
        let before = match old.and_then(|old| old.attributes.as_ref()).filter(|_| patched) {
            Some(before) => Before::Known(before),
            None if inherits => Before::Inherited,
            None => Before::None,
        };
        self.attributes(at, name, attributes, before)
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
            Node::HardLink(target, _) => self.hard_link(at, name, target),
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
        if stat.st_mode & nix::libc::S_IFMT == nix::libc::S_IFDIR {
            return Err(on("link a directory to", &self.path)(Errno::EINVAL));
        }
        linkat(&parent, last, at, name, AtFlags::empty()).map_err(on("link", &self.path))
    }

    fn remove(&self, at: &OwnedFd, name: &OsStr) -> Result<(), ContentError> {
        match unlinkat(at, name, UnlinkatFlags::NoRemoveDir) {
            Err(Errno::EISDIR) => {
                // The kernel resolves the descriptor; what is removed lies below it.
                let within = PathBuf::from(format!("/proc/self/fd/{}", at.as_raw_fd())).join(name);
                godwit_disk::trees::remove(&within)
                    .map_err(|error| on("remove", &self.path.join(name))(error.source))
            }
            done => done.map_err(on("remove", &self.path.join(name))),
        }
    }

    /// Opens a file or directory of the tree by its path.
    fn opened(&self, path: &Path) -> Result<OwnedFd, ContentError> {
        let how = OpenHow::new()
            .flags(OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
        openat2(self.root, path, how).map_err(on("open", &self.path.join(path)))
    }

    /// Sets project and flags, but for the flags that keep root from changing the file.
    fn flags(
        &self,
        at: &OwnedFd,
        name: &OsStr,
        wanted: &Attributes,
        before: Before<'_>,
    ) -> Result<(), ContentError> {
        let (digest, tree) = self.of;
        let flags = wanted.inode_flags();
        if flags.bits & !tree.flags != 0 || (flags.project != 0 && !tree.has_projects) {
            let source =
                ObjectError::Rule { kind: Kind::Tree, rule: "a tree has its entries' flags" };
            return Err(ContentError::Object { digest, source });
        }
        let is_set = match before {
            Before::Known(before) => before.inode_flags().unguarded() == flags.unguarded(),
            Before::None => flags.unguarded() == Flags::default(),
            Before::Inherited => false,
        };
        if is_set {
            return Ok(());
        }
        let path = &self.path;
        let how = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let opened = openat(at, name, how, Mode::empty()).map_err(on("open", path))?;
        inode::write(opened, flags.unguarded()).map_err(on("set the flags of", path))
    }

    /// Owner first, since changing it clears set-user-id bits and capabilities; times after all
    /// that changes them.
    fn attributes(
        &self,
        at: &OwnedFd,
        name: &OsStr,
        wanted: &Attributes,
        before: Before<'_>,
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
        let kind = stat.st_mode & nix::libc::S_IFMT;
        if [nix::libc::S_IFREG, nix::libc::S_IFDIR].contains(&kind) {
            self.flags(at, name, wanted, before)?;
        }
        if kind != nix::libc::S_IFLNK {
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

/// Writes the pieces of a file from `start` on that are not in their place already, as `before`
/// tells what is there.
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
    use rustix::fs::IFlags;
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    fn take(root: &Path, objects: &mut Objects) -> Digest {
        capture(root, objects, &mut Unchanged::default()).unwrap().tree
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
        let first = capture(from.path(), &mut objects, &mut unchanged).unwrap();
        let mut nothing = Objects::default();
        let again = capture(from.path(), &mut nothing, &mut unchanged).unwrap();
        assert_eq!(first, again);
        assert!(!nothing.0.contains_key(&Digest::of(b"one")), "read again though unchanged");
        fs::write(from.path().join("a"), b"two").unwrap();
        let after = capture(from.path(), &mut objects, &mut unchanged).unwrap();
        assert_ne!(first.tree, after.tree);
    }

    #[test]
    fn a_tree_of_a_hostile_peer_stays_below_its_root() {
        use crate::content::Sink as _;
        use crate::content::object::{Directory, Object as _};
        use serde_bytes::ByteBuf;
        let to = tempfile::tempdir().unwrap();
        let attributes = Attributes {
            mode: 0o755,
            uid: 0,
            gid: 0,
            modified: (0, 0),
            xattrs: Vec::new(),
            flags: 0,
            project: 0,
        };
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
                node: Node::HardLink(vec![name("a"), name("passwd")], None),
            },
        ];
        let root = objects.put(&Directory::Entries(entries).encode()).unwrap();
        let tree = Tree { attributes, root, bytes: 0, flags: 0, has_projects: false };
        let tree = objects.put(&tree.encode()).unwrap();
        let error = materialize(&objects, &tree, None, to.path()).unwrap_err();
        assert!(matches!(error, ContentError::File { .. }), "{error}");
        assert!(!to.path().join("b").exists());
    }

    /// A directory on a file system that has flags.
    fn scratch() -> tempfile::TempDir {
        tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap()
    }

    fn flag(path: &Path, bits: IFlags) {
        inode::write(File::open(path).unwrap(), Flags { bits: bits.bits(), project: 0 }).unwrap();
    }

    /// Method: rounds that set, keep and clear flags of what changes, of what stays, and of the
    /// directory above it.
    #[test]
    fn flags_are_kept_and_keep_nothing_from_being_patched_or_removed() {
        let (from, to) = (scratch(), scratch());
        let at = |name: &str| from.path().join(name);
        fs::create_dir_all(at("dir/sub")).unwrap();
        for name in ["dir/fixed", "dir/sub/log", "linked", "plain", "stays"] {
            fs::write(at(name), "one").unwrap();
        }
        fs::hard_link(at("linked"), at("zlinked")).unwrap();
        let mut objects = Objects::default();
        let mut base = None;
        let mut round = |base: &mut Option<Digest>| {
            let tree = take(from.path(), &mut objects);
            materialize(&objects, &tree, base.as_ref(), to.path()).unwrap();
            assert_eq!(take(to.path(), &mut objects), tree);
            *base = Some(tree);
        };
        flag(&at("dir/fixed"), IFlags::IMMUTABLE);
        flag(&at("dir/sub/log"), IFlags::APPEND | IFlags::NODUMP);
        flag(&at("dir/sub"), IFlags::APPEND);
        flag(&at("dir"), IFlags::IMMUTABLE);
        flag(&at("linked"), IFlags::IMMUTABLE);
        flag(&at("stays"), IFlags::NOATIME | IFlags::SYNC);
        flag(from.path(), IFlags::NOATIME | IFlags::PROJECT_INHERIT);
        round(&mut base);
        // The log grows, and another name of an immutable file comes, beside what does not change.
        let mut log = File::options().append(true).open(at("dir/sub/log")).unwrap();
        std::io::Write::write_all(&mut log, b"two").unwrap();
        fs::write(at("dir/sub/new"), "new").unwrap();
        flag(&at("linked"), IFlags::empty());
        fs::hard_link(at("linked"), at("dir/sub/other")).unwrap();
        flag(&at("linked"), IFlags::IMMUTABLE);
        round(&mut base);
        let inode = |name: &str| fs::metadata(to.path().join(name)).unwrap().ino();
        assert_eq!(inode("dir/sub/other"), inode("zlinked"));
        // What was protected goes, changes its type, or is only protected otherwise.
        for name in ["dir", "dir/sub", "dir/fixed", "linked"] {
            flag(&at(name), IFlags::empty());
        }
        fs::remove_file(at("dir/fixed")).unwrap();
        fs::create_dir(at("dir/fixed")).unwrap();
        flag(&at("dir/fixed"), IFlags::IMMUTABLE);
        round(&mut base);
        flag(&at("dir/fixed"), IFlags::empty());
        flag(&at("dir/sub/log"), IFlags::empty());
        fs::remove_dir_all(at("dir")).unwrap();
        round(&mut base);
        godwit_disk::trees::clear(to.path()).unwrap();
        godwit_disk::trees::clear(from.path()).unwrap();
    }

    #[test]
    fn a_root_that_cannot_be_renamed_is_refused() {
        let from = scratch();
        flag(from.path(), IFlags::IMMUTABLE);
        let error = capture(from.path(), &mut Objects::default(), &mut Unchanged::default());
        flag(from.path(), IFlags::empty());
        let error = error.unwrap_err();
        assert!(error.to_string().contains("itself is immutable (i)"), "{error}");
    }

    /// Method: two directories of a file system with projects; what is made in the second inherits
    /// another project.
    #[test]
    fn projects_are_kept_where_the_file_system_has_them() {
        let file_system = crate::mounted::Mounted::xfs();
        let (from, to) = (file_system.path().join("from"), file_system.path().join("to"));
        fs::create_dir_all(from.join("dir")).unwrap();
        fs::create_dir(&to).unwrap();
        fs::write(from.join("linked"), "x").unwrap();
        fs::hard_link(from.join("linked"), from.join("dir/linked")).unwrap();
        let of = |path: &Path, project| {
            let bits = IFlags::PROJECT_INHERIT.bits();
            inode::write(File::open(path).unwrap(), Flags { bits, project }).unwrap();
        };
        of(&from.join("dir"), 300);
        // What is laid out here would inherit another one.
        of(&to, 7);
        fs::write(from.join("dir/inherits"), "x").unwrap();
        let mut objects = Objects::default();
        let before = take(&from, &mut objects);
        materialize(&objects, &before, None, &to).unwrap();
        assert_eq!(take(&to, &mut objects), before);
        let project =
            |path: &str| godwit_disk::sys::project(File::open(to.join(path)).unwrap()).unwrap();
        assert_eq!((project("dir"), project("dir/inherits"), project("dir/linked")), (300, 300, 0));
        fs::write(from.join("plain"), "y").unwrap();
        of(&from.join("dir"), 301);
        let after = take(&from, &mut objects);
        materialize(&objects, &after, Some(&before), &to).unwrap();
        assert_eq!(take(&to, &mut objects), after);
        // A file system without projects.
        let without = crate::mounted::Mounted::ext4();
        let error = materialize(&objects, &after, None, &without.path()).unwrap_err();
        assert!(error.to_string().contains("set the flags of"), "{error}");
    }

    /// Method: pipes, symbolic links and sockets with several names; then the first of the names
    /// gets another target.
    #[test]
    fn what_is_no_file_keeps_its_several_names_also_when_it_is_replaced() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let at = |name: &str| from.path().join(name);
        fs::create_dir(at("d")).unwrap();
        let root = File::open(from.path()).unwrap();
        mkfifoat(&root, "pipe", Mode::from_bits_truncate(0o640)).unwrap();
        drop(std::os::unix::net::UnixListener::bind(at("socket")).unwrap());
        std::os::unix::fs::symlink("one", at("a")).unwrap();
        for (name, other) in [("pipe", "d/pipe"), ("socket", "d/socket"), ("a", "z/a")] {
            fs::create_dir_all(at(other).parent().unwrap()).unwrap();
            fs::hard_link(at(name), at(other)).unwrap();
        }
        let mut objects = Objects::default();
        let same = |one: &str, other: &str| {
            let inode = |name: &str| fs::symlink_metadata(to.path().join(name)).unwrap().ino();
            inode(one) == inode(other)
        };
        let before = take(from.path(), &mut objects);
        materialize(&objects, &before, None, to.path()).unwrap();
        assert_eq!(take(to.path(), &mut objects), before);
        assert!(same("pipe", "d/pipe") && same("socket", "d/socket") && same("a", "z/a"));
        fs::remove_file(at("a")).unwrap();
        fs::remove_file(at("z/a")).unwrap();
        std::os::unix::fs::symlink("two", at("a")).unwrap();
        fs::hard_link(at("a"), at("z/a")).unwrap();
        let after = take(from.path(), &mut objects);
        materialize(&objects, &after, Some(&before), to.path()).unwrap();
        assert_eq!(take(to.path(), &mut objects), after);
        assert!(same("a", "z/a"));
        assert_eq!(fs::read_link(to.path().join("z/a")).unwrap(), Path::new("two"));
    }

    /// Method: a peer's tree says that it has no flags, and an entry has one.
    #[test]
    fn a_tree_that_hides_its_flags_is_refused() {
        use crate::content::Sink as _;
        use crate::content::object::{Directory, Object as _};
        let to = tempfile::tempdir().unwrap();
        let (modified, xattrs) = ((0, 0), Vec::new());
        let plain =
            Attributes { mode: 0o755, uid: 0, gid: 0, modified, xattrs, flags: 0, project: 0 };
        let entry = |attributes| Entry {
            name: serde_bytes::ByteBuf::from(b"f".to_vec()),
            attributes: Some(attributes),
            node: Node::File(0, Content::Pieces(Vec::new())),
        };
        for hidden in [
            Attributes { flags: 0x10, ..plain.clone() },
            Attributes { project: 7, ..plain.clone() },
        ] {
            let mut objects = Objects::default();
            let root = objects.put(&Directory::Entries(vec![entry(hidden)]).encode()).unwrap();
            let tree =
                Tree { attributes: plain.clone(), root, bytes: 0, flags: 0, has_projects: false };
            let tree = objects.put(&tree.encode()).unwrap();
            let error = materialize(&objects, &tree, None, to.path()).unwrap_err();
            assert!(matches!(error, ContentError::Object { .. }), "{error}");
            fs::remove_file(to.path().join("f")).unwrap();
        }
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
        /// Method: any changes, any number of rounds; a patched directory is captured as the same
        /// tree.
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
