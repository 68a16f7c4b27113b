//! How much a directory tree takes on its disk.

use std::collections::HashSet;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::{fs, io};

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
    let mut usage = Usage::default();
    let mut seen = HashSet::new();
    let mut pending = vec![top.to_owned()];
    while let Some(path) = pending.pop() {
        let gone = |error: &io::Error| error.kind() == io::ErrorKind::NotFound && path != top;
        let metadata = match fs::symlink_metadata(&path) {
            Err(error) if gone(&error) => continue,
            other => other.map_err(|error| (path.clone(), error))?,
        };
        if metadata.nlink() > 1
            && !metadata.is_dir()
            && !seen.insert((metadata.dev(), metadata.ino()))
        {
            continue;
        }
        usage.inodes += 1;
        // st_blocks counts 512 bytes whatever the file system's block size is (stat(2)).
        usage.size_bytes += metadata.blocks() * 512;
        if metadata.is_dir() {
            let entries = match fs::read_dir(&path) {
                Err(error) if gone(&error) => continue,
                other => other.map_err(|error| (path.clone(), error))?,
            };
            for entry in entries {
                pending.push(entry.map_err(|error| (path.clone(), error))?.path());
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
