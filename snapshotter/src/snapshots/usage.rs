//! How much a directory tree takes on its disk.

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::FileType;
use serde::{Deserialize, Serialize};

use godwit_disk::trees;

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
/// The tree may change meanwhile (a container may run in it). Errors: those of [`trees::walk`].
pub(super) fn of(top: &Path) -> Result<Usage, (PathBuf, io::Error)> {
    let (mut usage, mut seen) = (Usage::default(), HashSet::new());
    trees::walk(top, |found| {
        let is_directory = FileType::from_raw_mode(found.st_mode) == FileType::Directory;
        if found.st_nlink > 1 && !is_directory && !seen.insert((found.st_dev, found.st_ino)) {
            return;
        }
        usage.inodes += 1;
        // st_blocks counts 512 bytes whatever the file system's block size is (stat(2)).
        usage.size_bytes += u64::try_from(found.st_blocks).unwrap_or(0) * 512;
    })?;
    Ok(usage)
}

#[cfg(test)]
mod tests {
    use std::fs;

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
