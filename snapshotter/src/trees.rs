//! File trees that containers made: removed and walked whatever their shape is.
//!
//! A container can nest directories deeper than any path, the stack or the limit of open files allows, and put symbolic links
//! where directories were a moment ago. So nothing here follows one, and all goes by the directory above (openat(2)).

use std::ffi::{CStr, CString, OsStr};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::{fs, io};

use nix::errno::Errno as NixErrno;
use nix::fcntl::renameat;
use nix::unistd::{UnlinkatFlags, unlinkat};
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, Stat, openat, statat};
use rustix::io::Errno;

/// Deepest tree that is walked: as many files are open, and that is below the usual limit of 1024. What goes by paths, as
/// containerd does when it unpacks, ends at 4096 bytes.
const WALK_DEPTH_MAX: usize = 800;

/// Directories inside one another that a removal has open. On a full disk there may be no room to move one up.
const OPEN_MAX: usize = 64;

fn open_directory(at: impl AsFd, name: impl rustix::path::Arg) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(at, name, flags, Mode::empty())
}

fn is_itself_or_above(name: &CStr) -> bool {
    [c".", c".."].contains(&name)
}

/// Removes the directory `top` and all below it, of any depth: with few files open, and a memory and stack that do not grow.
///
/// What is deeper than [`OPEN_MAX`] moves up to `top` first; if this stops midway, it can be done again.
/// Errors: the system's; not that something was gone already, but for `top`.
pub(crate) fn remove(top: &Path) -> io::Result<()> {
    let directory = open_directory(CWD, top)?;
    let mut next = 0;
    // Each pass removes at least one directory, and what moved up may be seen in the next only.
    while empty(&directory, &directory, 1, &mut next)? {}
    fs::remove_dir(top)
}

/// Removes what is in `directory`, which is so deep in `top`. Returns whether there was anything.
fn empty(directory: &OwnedFd, top: &OwnedFd, depth: usize, next: &mut u64) -> io::Result<bool> {
    let mut found = false;
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        if is_itself_or_above(name) {
            continue;
        }
        found = true;
        if entry.file_type() != FileType::Directory {
            // By way of the C library, as tests that stop a daemon count it (`tests/preload/step-preload.c`).
            match unlinkat(directory, name, UnlinkatFlags::NoRemoveDir) {
                Ok(()) | Err(NixErrno::ENOENT) => continue,
                // The file system does not say what its entries are.
                Err(NixErrno::EISDIR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        if depth == OPEN_MAX {
            move_up(directory, name, top, next)?;
        } else {
            empty(&open_directory(directory, name)?, top, depth + 1, next)?;
            unlinkat(directory, name, UnlinkatFlags::RemoveDir)?;
        }
    }
    Ok(found)
}

/// Moves a directory to `top` under a number that nothing has there, or an empty directory.
fn move_up(from: &OwnedFd, name: &CStr, top: &OwnedFd, next: &mut u64) -> io::Result<()> {
    loop {
        let moved = renameat(from, name, top, next.to_string().as_str());
        *next += 1;
        match moved {
            Err(NixErrno::EEXIST | NixErrno::ENOTEMPTY | NixErrno::ENOTDIR) => {}
            moved => return Ok(moved?),
        }
    }
}

/// Calls `visit` with all that is in `top`, itself included.
///
/// The tree may change meanwhile: what disappears between being listed and being looked at is passed over.
/// Errors: the system's, with the path; more than [`WALK_DEPTH_MAX`] directories inside one another.
pub(crate) fn walk(top: &Path, mut visit: impl FnMut(&Stat)) -> Result<(), (PathBuf, io::Error)> {
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
    use std::os::unix::fs::symlink;

    use super::*;

    /// Directories inside one another: more than a path can name, than a thread's stack has room for, or files may be open.
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
        assert_eq!(remove(&top).unwrap_err().kind(), io::ErrorKind::NotFound);
        symlink(&outside, &top).unwrap();
        remove(&top).unwrap_err();
        assert!(outside.join("file").exists());
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
