//! Where the test bed keeps its things: all of it under the build's `target` directory.
//!
//! ```text
//! target/testbed/root/<key>    Debian root of the nodes, one per list of packages
//! target/testbed/debs          downloaded packages, shared by all roots
//! target/testbed/images        container images as archives
//! target/testbed/runs/<N>      one bed: a directory per node with its overlay and its state
//! target/testbed/failed/<N>    logs of beds that ended in a panic
//! ```

use std::path::{Path, PathBuf};

/// The workspace's directory.
pub fn workspace() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_path_buf()
}

/// The build's output directory: `CARGO_TARGET_DIR` or `target` in the workspace.
pub fn target() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => workspace().join(dir),
        None => workspace().join("target"),
    }
}

/// Directory of everything that test beds keep between runs.
pub fn testbed() -> PathBuf {
    target().join("testbed")
}

/// A program of this build, for example `godwit-snapshotter`. It may not have been built yet.
pub fn binary(name: &str) -> PathBuf {
    target().join("release").join(name)
}
