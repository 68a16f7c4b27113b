//! File systems of their own, for tests of this crate and of those that include this file.

use std::fs::File;
use std::process::Command;

/// A new file system, mounted until it is dropped.
pub(crate) struct Mounted(tempfile::TempDir);

impl Mounted {
    /// One with projects.
    pub(crate) fn xfs() -> Self {
        Self::new(&["mkfs.xfs", "-q"], 512 << 20)
    }

    /// One without.
    pub(crate) fn ext4() -> Self {
        Self::new(&["mkfs.ext4", "-q", "-O", "^project"], 16 << 20)
    }

    fn new(make: &[&str], bytes: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (image, at) = (dir.path().join("image"), dir.path().join("mounted"));
        File::create(&image).unwrap().set_len(bytes).unwrap();
        std::fs::create_dir(&at).unwrap();
        let made = Command::new(make[0]).args(&make[1..]).arg(&image).status();
        assert!(made.unwrap().success());
        let mounted = Command::new("mount").args(["-o", "loop"]).args([&image, &at]).status();
        assert!(mounted.unwrap().success());
        Self(dir)
    }

    pub(crate) fn path(&self) -> std::path::PathBuf {
        self.0.path().join("mounted")
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = nix::mount::umount(&self.path());
    }
}
