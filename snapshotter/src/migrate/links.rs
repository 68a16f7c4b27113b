//! Open files whose own name was removed while another hard link is left, in the trees that a cut
//! reads.
//!
//! CRIU gives such a file the name `link_remap.N` for the time of the dump, and its images refer to
//! it ([`criu_wrapper::links`]). The trees are read beside the dump and so may lack the name.
//! Therefore the source makes the same names again after the dump, reads the trees once more, and
//! removes the names:
//!
//! 1. Find the names in CRIU's images ([`criu_wrapper::links::link_remaps`]). Without any there is
//!    nothing to do.
//! 2. Find the files among those that the frozen processes have open or mapped, by the name that
//!    was removed.
//! 3. Link them ([`Links`] removes what it made when it is dropped).
//! 4. The caller reads the trees.
//!
//! At the destination CRIU removes the names once it has opened the files. If the daemon dies
//! between 3 and 4, a name stays at the source. Nothing refers to it; CRIU leaves the same when it
//! dies.

use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use criu_wrapper::links::LinkRemap;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, linkat, openat, openat2, unlinkat};
use rustix::io::Errno;

use crate::content::{ContentError, on};

/// What `/proc` appends to the path of a file whose name was removed.
const DELETED: &[u8] = b" (deleted)";

/// Names that were made for a reading of the trees; dropping this removes them.
#[derive(Debug, Default)]
pub(super) struct Links {
    made: Vec<(OwnedFd, OsString)>,
}

impl Links {
    /// Makes the names `remaps`. `pids` are the frozen processes of the container; the first has
    /// its root directory. May block.
    ///
    /// Errors: [`ContentError::File`] with the file that cannot be linked, or that cannot be told
    /// from another one.
    pub(super) fn make(remaps: &[LinkRemap], pids: &[u32]) -> Result<Self, ContentError> {
        let mut links = Self::default();
        let Some(init) = pids.first() else { return Ok(links) };
        let removed = removed_files(pids);
        let root = openat(CWD, format!("/proc/{init}/root"), directory_flags(), Mode::empty())
            .map_err(on("open", Path::new("/")))?;
        for remap in remaps {
            let path = without_suffix(&remap.removed);
            let file = match removed.get(&path).map(Vec::as_slice) {
                Some([file]) => file,
                Some(_) => {
                    return Err(on("tell apart the removed files named", &path)(Errno::NOTUNIQ));
                }
                None => return Err(on("find the open and removed file", &path)(Errno::NOENT)),
            };
            // The container may have put a symbolic link into the path: it must not lead out of the
            // root.
            let (Some(parent), Some(name)) = (remap.link.parent(), remap.link.file_name()) else {
                return Err(on("link", &remap.link)(Errno::INVAL));
            };
            let (below, mode) = (relative(parent), Mode::empty());
            let parent = openat2(&root, below, directory_flags(), mode, ResolveFlags::IN_ROOT)
                .map_err(on("open", parent))?;
            linkat(CWD, file, &parent, name, AtFlags::SYMLINK_FOLLOW)
                .map_err(on("link", &remap.link))?;
            links.made.push((parent, name.to_owned()));
        }
        Ok(links)
    }
}

impl Drop for Links {
    fn drop(&mut self) {
        for (parent, name) in self.made.drain(..) {
            if let Err(error) = unlinkat(&parent, &name, AtFlags::empty()) {
                let name = name.display();
                tracing::warn!(%name, %error, "a temporary name of an open file stays");
            }
        }
    }
}

fn directory_flags() -> OFlags {
    OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC
}

/// The path below the root; the root itself is `.`.
fn relative(path: &Path) -> &Path {
    let below = path.strip_prefix("/").unwrap_or(path);
    if below.as_os_str().is_empty() { Path::new(".") } else { below }
}

fn without_suffix(path: &Path) -> PathBuf {
    let bytes = path.as_os_str().as_bytes();
    PathBuf::from(OsStr::from_bytes(bytes.strip_suffix(DELETED).unwrap_or(bytes)))
}

/// Files without their own name that other names still lead to: for each removed path what opens
/// them, one for each inode.
pub(super) fn removed_files(pids: &[u32]) -> HashMap<PathBuf, Vec<PathBuf>> {
    let (mut found, mut seen) = (HashMap::<PathBuf, Vec<PathBuf>>::new(), HashSet::new());
    for pid in pids {
        for places in ["fd", "map_files"] {
            let listed = fs::read_dir(format!("/proc/{pid}/{places}")).into_iter().flatten();
            let exe = (places == "fd").then(|| PathBuf::from(format!("/proc/{pid}/exe")));
            for handle in listed.flatten().map(|entry| entry.path()).chain(exe) {
                let Ok(target) = fs::read_link(&handle) else { continue };
                let mut bytes = target.into_os_string().into_vec();
                if !bytes.ends_with(DELETED) {
                    continue;
                }
                let Ok(file) = fs::metadata(&handle) else { continue };
                bytes.truncate(bytes.len() - DELETED.len());
                let path = PathBuf::from(OsString::from_vec(bytes));
                if file.nlink() > 0 && seen.insert((path.clone(), file.dev(), file.ino())) {
                    found.entry(path).or_default().push(handle);
                }
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn a_removed_file_with_another_name_is_found_and_others_are_not() {
        let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let at = |name: &str| directory.path().join(name);
        let open = |name: &str| File::create(at(name)).unwrap();
        let (_linked, _gone, _there) = (open("linked"), open("gone"), open("there"));
        fs::hard_link(at("linked"), at("other")).unwrap();
        fs::remove_file(at("linked")).unwrap();
        fs::remove_file(at("gone")).unwrap();
        let found = removed_files(&[std::process::id()]);
        let here = |path: &&PathBuf| path.starts_with(directory.path());
        assert_eq!(found.keys().filter(here).collect::<Vec<_>>(), [&at("linked")]);
        let [handle] = &found[&at("linked")][..] else { panic!("{found:?}") };
        linkat(CWD, handle, CWD, at("again"), AtFlags::SYMLINK_FOLLOW).unwrap();
        let inode = |name: &str| fs::metadata(at(name)).unwrap().ino();
        assert_eq!(inode("again"), inode("other"));
    }

    #[test]
    fn paths_are_below_the_root_and_lose_their_suffix() {
        assert_eq!(relative(Path::new("/")), Path::new("."));
        assert_eq!(relative(Path::new("/a/b")), Path::new("a/b"));
        assert_eq!(without_suffix(Path::new("/a (deleted)")), Path::new("/a"));
        assert_eq!(without_suffix(Path::new("/a")), Path::new("/a"));
    }
}
