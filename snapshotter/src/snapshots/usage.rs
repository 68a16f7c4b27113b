//! How much a directory tree takes on its disk.

use std::collections::HashSet;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// What a snapshot takes, without its parents.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Allocated bytes: holes cost nothing, and a file with several names costs once.
    pub size_bytes: u64,
    /// Inodes, the top directory included.
    pub inodes: u64,
}

/// Measures the tree below `top`, without following symbolic links.
///
/// The tree may change meanwhile (a container may run in it): what disappears between being listed
/// and being looked at is not counted. Errors: any other I/O error, with the path.
pub(super) fn of(top: &Path) -> Result<Usage, (PathBuf, io::Error)> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |error| (path, error)
    };
    let (mut usage, mut seen) = (Usage::default(), HashSet::new());
    let mut count = |found: &Metadata| {
        if found.nlink() > 1 && !found.is_dir() && !seen.insert((found.dev(), found.ino())) {
            return;
        }
        usage.inodes += 1;
        // st_blocks counts 512 bytes whatever the file system's block size is (stat(2)).
        usage.size_bytes += found.blocks() * 512;
    };
    count(&fs::symlink_metadata(top).map_err(failed(top))?);
    let mut pending = vec![top.to_owned()];
    while let Some(directory) = pending.pop() {
        let gone = |error: &io::Error| error.kind() == io::ErrorKind::NotFound && directory != top;
        let entries = match fs::read_dir(&directory) {
            Err(error) if gone(&error) => continue,
            entries => entries.map_err(failed(&directory))?,
        };
        for entry in entries {
            let entry = entry.map_err(failed(&directory))?;
            // Through the directory's descriptor, so that its path is not looked up for each.
            match entry.metadata() {
                Err(error) if error.kind() == io::ErrorKind::NotFound => (),
                Err(error) => return Err((entry.path(), error)),
                Ok(found) => {
                    count(&found);
                    if found.is_dir() {
                        pending.push(entry.path());
                    }
                }
            }
        }
    }
    Ok(usage)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hard_links_count_once_and_holes_cost_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let empty = of(dir.path()).unwrap();
        assert_eq!(empty.inodes, 1);

        fs::write(dir.path().join("a"), vec![1; 65536]).unwrap();
        fs::hard_link(dir.path().join("a"), dir.path().join("b")).unwrap();
        fs::File::create(dir.path().join("hole")).unwrap().set_len(1 << 40).unwrap();
        std::os::unix::fs::symlink("/", dir.path().join("link")).unwrap();
        let full = of(dir.path()).unwrap();
        assert_eq!(full.inodes, 4);
        assert!((65536..2 * 65536).contains(&(full.size_bytes - empty.size_bytes)), "{full:?}");
    }

    #[test]
    fn a_missing_top_is_an_error_with_its_path() {
        let (path, error) = of(Path::new("/nonexistent/fs")).unwrap_err();
        assert_eq!(
            (path.to_str(), error.kind()),
            (Some("/nonexistent/fs"), io::ErrorKind::NotFound)
        );
    }
}
