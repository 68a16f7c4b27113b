//! File trees that containers made: removed and walked whatever their shape is.
//!
//! A container can nest directories deeper than any path, the stack or the limit of open files
//! allows, and put symbolic links where directories were a moment ago. So nothing here follows one,
//! and all goes by the directory above (openat(2)).
//!
//! A removal lifts flags that keep root from removing (chattr(1), `+i` and `+a`). It never enters
//! another file system that is mounted in the tree: what lies there is not ours.

use std::ffi::{CStr, CString, OsStr};
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use nix::errno::Errno as NixErrno;
use nix::fcntl::renameat;
use nix::unistd::{UnlinkatFlags, unlinkat};
use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, Stat, openat, openat2, statat,
};
use rustix::io::Errno;

use crate::inode;

/// Deepest tree that is walked: as many files are open, and that is below the usual limit of 1024.
/// What goes by paths, as containerd does when it unpacks, ends at 4096 bytes.
const WALK_DEPTH_MAX: usize = 800;

/// Directories inside one another that a removal has open. On a full disk there may be no room to
/// move one up.
const OPEN_MAX: usize = 64;

/// How a directory is opened.
const DIRECTORY: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Why something in a tree could not be removed. All else that was to be removed is gone.
#[derive(Debug, thiserror::Error)]
#[error("cannot remove {}", path.display())]
pub struct RemoveError {
    /// The first that stays. Where directories had to move up, it lies there.
    pub path: PathBuf,
    /// The system's reason.
    pub source: io::Error,
}

fn open_directory(at: impl AsFd, name: impl rustix::path::Arg) -> rustix::io::Result<OwnedFd> {
    openat(at, name, DIRECTORY, Mode::empty())
}

/// Opens a directory unless another file system is mounted there.
fn open_in_same_mount(at: impl AsFd, name: impl rustix::path::Arg) -> io::Result<OwnedFd> {
    match openat2(at, name, DIRECTORY, Mode::empty(), ResolveFlags::NO_XDEV) {
        Err(Errno::XDEV) => Err(mounted()),
        opened => Ok(opened?),
    }
}

fn mounted() -> io::Error {
    io::Error::new(io::ErrorKind::ResourceBusy, "a file system is mounted there; unmount it")
}

fn is_itself_or_above(name: &CStr) -> bool {
    [c".", c".."].contains(&name)
}

/// Removes `top`, and if it is a directory all below it, of any depth: with few files open, and a
/// memory and stack that do not grow.
///
/// What is deeper than [`OPEN_MAX`] moves up to `top` first; if this stops midway, it can be done
/// again.
/// Errors: [`RemoveError`] for the first thing that stays; not that something was gone already, but
/// for `top`.
pub fn remove(top: &Path) -> Result<(), RemoveError> {
    let failed = |source| RemoveError { path: top.to_owned(), source };
    let (above, name) = above(top).map_err(failed)?;
    // The directory above is not part of the tree: its flags stay.
    let unlink = |kind| {
        unguarded(|| unlinkat(&above, &*name, kind), || lift_guards(&above, &name)).map_err(failed)
    };
    match unlink(UnlinkatFlags::NoRemoveDir) {
        Err(error) if error.source.kind() == io::ErrorKind::IsADirectory => {}
        done => return done,
    }
    clear(top)?;
    unlink(UnlinkatFlags::RemoveDir)
}

/// Removes all below the directory `top`, but not the directory itself. Errors: as of [`remove`].
pub fn clear(top: &Path) -> Result<(), RemoveError> {
    let failed = |source| RemoveError { path: top.to_owned(), source };
    let (above, name) = above(top).map_err(failed)?;
    let directory = open_in_same_mount(&above, &*name).map_err(failed)?;
    let mut removal =
        Removal { top: &directory, names: Vec::new(), next: 0, has_removed: false, failed: None };
    // Each pass removes something, and what moved up may be seen in the next only.
    while removal.empty(&directory) {
        if !removal.has_removed {
            let (names, source) = removal.failed.unwrap_or((Vec::new(), Errno::NOTEMPTY.into()));
            let below = names.iter().map(|name| OsStr::from_bytes(name.as_bytes()));
            return Err(RemoveError { path: top.iter().chain(below).collect(), source });
        }
        (removal.has_removed, removal.failed) = (false, None);
    }
    Ok(())
}

/// The directory in which `top` lies, and its name there.
fn above(top: &Path) -> io::Result<(OwnedFd, CString)> {
    let name = top.file_name().ok_or(Errno::INVAL)?;
    let parent = top.parent().filter(|parent| !parent.as_os_str().is_empty());
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let parent = openat(CWD, parent.unwrap_or(Path::new(".")), flags, Mode::empty())?;
    Ok((parent, CString::new(name.as_bytes())?))
}

struct Removal<'a> {
    top: &'a OwnedFd,
    /// Where it is, as names below `top`.
    names: Vec<CString>,
    /// Number under which the next directory moves up.
    next: u64,
    /// Whether this pass has removed anything, or moved it up.
    has_removed: bool,
    /// The first that could not be removed in this pass.
    failed: Option<(Vec<CString>, io::Error)>,
}

impl Removal<'_> {
    /// Removes what is in `directory`. Returns whether there was anything.
    fn empty(&mut self, directory: &OwnedFd) -> bool {
        let listing = match Dir::read_from(directory) {
            Ok(listing) => listing,
            Err(error) => {
                self.note(error.into());
                return true;
            }
        };
        let mut found = false;
        for entry in listing {
            let entry = match entry {
                Ok(entry) if is_itself_or_above(entry.file_name()) => continue,
                Ok(entry) => entry,
                Err(error) => {
                    self.note(error.into());
                    return true;
                }
            };
            found = true;
            self.names.push(entry.file_name().to_owned());
            match self.entry(directory, entry.file_name(), entry.file_type()) {
                Ok(()) => self.has_removed = true,
                Err(error) if error.kind() == io::ErrorKind::NotFound => self.has_removed = true,
                Err(error) => self.note(error),
            }
            self.names.pop();
        }
        found
    }

    fn note(&mut self, error: io::Error) {
        self.failed.get_or_insert_with(|| (self.names.clone(), error));
    }

    /// Removes one entry, or moves it up.
    fn entry(&mut self, directory: &OwnedFd, name: &CStr, kind: FileType) -> io::Result<()> {
        let lift = || lift_guards(directory, c".").and_then(|()| lift_guards(directory, name));
        if kind != FileType::Directory {
            // By way of the C library, as tests that stop a daemon count it
            // (`tests/preload/step-preload.c`).
            let unlink = || unlinkat(directory, name, UnlinkatFlags::NoRemoveDir);
            match unguarded(unlink, lift) {
                // The file system does not say what its entries are.
                Err(error) if error.kind() == io::ErrorKind::IsADirectory => {}
                removed => return removed,
            }
        }
        if self.names.len() == OPEN_MAX {
            return self.move_up(directory, name);
        }
        self.empty(&open_in_same_mount(directory, name)?);
        unguarded(|| unlinkat(directory, name, UnlinkatFlags::RemoveDir), lift)
    }

    /// Moves a directory to `top` under a number that nothing has there, or an empty directory.
    fn move_up(&mut self, from: &OwnedFd, name: &CStr) -> io::Result<()> {
        // A directory moves only where its project is.
        inode::lift_guards(self.top)?;
        loop {
            let to = self.next.to_string();
            let lift = || lift_guards(from, c".").and_then(|()| lift_guards(from, name));
            let moved = unguarded(|| renameat(from, name, self.top, to.as_str()), lift);
            self.next += 1;
            let is_taken = |error: &io::Error| {
                let kinds = [
                    io::ErrorKind::AlreadyExists,
                    io::ErrorKind::DirectoryNotEmpty,
                    io::ErrorKind::NotADirectory,
                ];
                kinds.contains(&error.kind())
            };
            match moved {
                Err(error) if is_taken(&error) => {}
                moved => return moved,
            }
        }
    }
}

/// Takes a name out of a directory by `act`. If flags forbid it, `lift` takes them away first.
fn unguarded(
    act: impl Fn() -> nix::Result<()>,
    lift: impl FnOnce() -> io::Result<()>,
) -> io::Result<()> {
    let mut done = act();
    if done == Err(NixErrno::EPERM) {
        lift()?;
        done = act();
    }
    match done {
        Err(NixErrno::EBUSY) => Err(mounted()),
        done => Ok(done?),
    }
}

/// Lifts the flags of a file or directory that forbid its removal. Others have none, and a device
/// is not opened.
fn lift_guards(directory: &OwnedFd, name: &CStr) -> io::Result<()> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let found = openat(directory, name, flags, Mode::empty())?;
    let kind = FileType::from_raw_mode(rustix::fs::fstat(&found)?.st_mode);
    if !matches!(kind, FileType::RegularFile | FileType::Directory) {
        return Ok(());
    }
    // The very inode that was looked at.
    let itself = format!("/proc/self/fd/{}", found.as_raw_fd());
    let opened = openat(CWD, itself, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    inode::lift_guards(opened)
}

/// Calls `visit` with all that is in `top`, itself included.
///
/// The tree may change meanwhile: what disappears between being listed and being looked at is
/// skipped.
/// Errors: the system's, with the path; more than [`WALK_DEPTH_MAX`] directories inside one
/// another.
pub fn walk(top: &Path, mut visit: impl FnMut(&Stat)) -> Result<(), (PathBuf, io::Error)> {
    let failed_at_top = |error: Errno| (top.to_owned(), error.into());
    let directory = open_directory(CWD, top).map_err(failed_at_top)?;
    visit(&rustix::fs::fstat(&directory).map_err(failed_at_top)?);
    let mut above = vec![(Dir::new(directory).map_err(failed_at_top)?, CString::default())];
    let path = |above: &[(Dir, CString)]| {
        let names = above.iter().skip(1).map(|(_, name)| OsStr::from_bytes(name.as_bytes()));
        top.iter().chain(names).collect::<PathBuf>()
    };
    while let Some((directory, _)) = above.last_mut() {
        let Some(entry) = directory.next() else {
            above.pop();
            continue;
        };
        let look = || {
            let entry = entry?;
            let name = entry.file_name();
            if is_itself_or_above(name) {
                return Ok(None);
            }
            let at = directory.fd()?;
            let found = statat(at, name, AtFlags::SYMLINK_NOFOLLOW)?;
            visit(&found);
            if FileType::from_raw_mode(found.st_mode) != FileType::Directory {
                return Ok(None);
            }
            Ok(Some((Dir::new(open_directory(at, name)?)?, name.to_owned())))
        };
        match look() {
            Ok(Some(_)) if above.len() == WALK_DEPTH_MAX => {
                return Err((path(&above), Errno::NAMETOOLONG.into()));
            }
            Ok(below) => above.extend(below),
            // It is no directory any more.
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {}
            Err(error) => return Err((path(&above), error.into())),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use nix::mount::{MsFlags, mount};
    use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};

    use super::*;

    /// A directory on a file system that has flags.
    fn scratch() -> tempfile::TempDir {
        tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap()
    }

    /// Directories inside one another: more than a path can name, than a thread's stack has room
    /// for, or files may be open.
    const DEEP: usize = 20_000;

    fn nest(top: &Path, depth: usize) {
        let mut at = open_directory(CWD, top).unwrap();
        for _ in 0..depth {
            rustix::fs::mkdirat(&at, "d", Mode::RWXU).unwrap();
            at = open_directory(&at, "d").unwrap();
        }
    }

    #[test]
    fn a_tree_of_any_shape_is_removed_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let (top, outside) = (dir.path().join("top"), dir.path().join("outside"));
        fs::create_dir_all(outside.join("inner")).unwrap();
        fs::write(outside.join("file"), "x").unwrap();
        for name in ["0/1/0", "1/a/b", "2", "a/3/0/2", "a/4", "full/5"] {
            fs::create_dir_all(top.join(name)).unwrap();
        }
        // Names that those have which move up.
        for name in ["3", "4", "7", "a/3/5", "full/6"] {
            fs::write(top.join(name), "x").unwrap();
        }
        symlink(&outside, top.join("a/link")).unwrap();
        symlink(outside.join("file"), top.join("5")).unwrap();
        nest(&top, DEEP);
        nest(&top.join("1/a/b"), 2 * OPEN_MAX);
        remove(&top).unwrap();
        assert!(!top.exists());
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 2);
        assert_eq!(remove(&top).unwrap_err().source.kind(), io::ErrorKind::NotFound);
        symlink(&outside, &top).unwrap();
        clear(&top).unwrap_err();
        remove(&top).unwrap();
        assert!(fs::symlink_metadata(&top).is_err() && outside.join("file").exists());
    }

    fn forbid(path: &Path, flags: IFlags) {
        let file = fs::File::open(path).unwrap();
        let found = ioctl_getflags(&file).unwrap();
        ioctl_setflags(file, found | flags).unwrap();
    }

    /// Method: immutable and append-only files and directories at the top, in the middle, and so
    /// deep that they move up.
    #[test]
    fn flags_do_not_keep_a_tree_from_being_removed() {
        let dir = scratch();
        let top = dir.path().join("top");
        fs::create_dir_all(top.join("a/b")).unwrap();
        nest(&top, OPEN_MAX + 3);
        for name in ["file", "log", "a/file", "a/b/file"] {
            fs::write(top.join(name), "x").unwrap();
        }
        let deep = |depth: usize| top.join("d/".repeat(depth));
        let directories = ["a", "a/b"].map(|name| top.join(name));
        let directories = directories.into_iter().chain([OPEN_MAX - 1, OPEN_MAX].map(deep));
        for path in ["file", "a/b/file"].map(|name| top.join(name)).into_iter().chain(directories) {
            forbid(&path, IFlags::IMMUTABLE);
        }
        forbid(&top.join("log"), IFlags::APPEND);
        forbid(&top, IFlags::APPEND | IFlags::PROJECT_INHERIT);
        let mut beside = dir.path().join("image");
        fs::write(&beside, "x").unwrap();
        forbid(&beside, IFlags::IMMUTABLE);
        remove(&top).unwrap();
        assert!(!top.exists());
        remove(&beside).unwrap();
        beside.pop();
        assert_eq!(fs::read_dir(beside).unwrap().count(), 0);
    }

    /// Method: another file system is mounted in the tree, and a file over a file.
    #[test]
    fn what_is_mounted_in_a_tree_is_not_touched_and_all_else_is_removed() {
        let dir = scratch();
        let (top, other) = (dir.path().join("top"), dir.path().join("other"));
        for path in [top.join("a/mounted"), top.join("b/c"), other.clone()] {
            fs::create_dir_all(path).unwrap();
        }
        for path in [top.join("a/x"), top.join("b/file"), other.join("kept")] {
            fs::write(path, "x").unwrap();
        }
        let bind = |from: &Path, to: &Path| {
            let none = None::<&str>;
            mount(Some(from), to, none, MsFlags::MS_BIND, none).unwrap();
        };
        bind(&other, &top.join("a/mounted"));
        bind(&other.join("kept"), &top.join("b/file"));
        for point in ["a/mounted", "b/file"] {
            let error = remove(&top).unwrap_err();
            assert!(error.source.to_string().contains("unmount"), "{error}");
            assert!([top.join("a/mounted"), top.join("b/file")].contains(&error.path), "{error}");
            assert!(other.join("kept").exists());
            assert!(!top.join("a/x").exists() && !top.join("b/c").exists());
            nix::mount::umount(&top.join(point)).unwrap();
        }
        remove(&top).unwrap();
        bind(&other, &other);
        remove(&other).unwrap_err();
        nix::mount::umount(&other).unwrap();
        assert!(other.join("kept").exists());
    }

    #[test]
    fn a_walk_sees_all_and_ends_at_links_and_where_it_is_too_deep() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("a/b")).unwrap();
        fs::write(dir.path().join("a/b/file"), "x").unwrap();
        symlink("/", dir.path().join("a/link")).unwrap();
        let mut count = 0;
        walk(dir.path(), |_| count += 1).unwrap();
        assert_eq!(count, 5);
        nest(&dir.path().join("a/b"), WALK_DEPTH_MAX);
        let (path, error) = walk(dir.path(), |_| ()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::NAMETOOLONG.raw_os_error()));
        assert!(path.ends_with("a/b/d".to_owned() + &"/d".repeat(WALK_DEPTH_MAX - 4)), "{path:?}");
        let file = dir.path().join("a/b/file");
        let (path, _) = walk(&file, |_| ()).unwrap_err();
        assert_eq!(path, file);
    }
}
