//! Trees that come as tar archives.

use std::path::Path;

use super::VolumeError;
use super::format::run;

/// Unpacks the archive at `path`, compressed or not, into the empty directory `target`: owners by
/// number, times, hard links, extended attributes, devices and holes as they are in it. Names that
/// lead out of `target` are refused.
///
/// Errors: [`VolumeError::NoProgram`], [`VolumeError::Program`]; `target` may then hold a part of
/// it.
pub(super) fn unpack(path: &Path, target: &Path) -> Result<(), VolumeError> {
    let target = target.to_string_lossy();
    let arguments = [
        "--extract",
        "--directory",
        &target,
        "--same-permissions",
        "--same-owner",
        "--numeric-owner",
        "--xattrs",
        "--xattrs-include=*",
        "--acls",
        // The root's own owner and times may be in it too.
        "--overwrite-dir",
        "--file",
    ];
    run(("tar", "tar"), &arguments, path)
}
