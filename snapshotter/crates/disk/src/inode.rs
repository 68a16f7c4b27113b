//! Inode flags and project IDs (chattr(1)): what a file has besides mode, owner, times and extended
//! attributes.
//!
//! Every flag falls into one of three groups (docs/formats.md, "Flags"):
//!
//! - [`KEPT`] flags change what programs may do or what the disk promises, and mean the same on
//!   every file system that has them. They travel. A subset, [`GUARDS`], keeps even root from
//!   changing a file: patching and removing a tree begin with lifting them.
//! - [`REFUSED`] flags cannot be laid out again: a copy without them would be another file.
//! - The others describe how this file system stores the file (extents, compression, no copy on
//!   write). They stay behind.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};
use rustix::io::Errno;

use crate::sys;

/// Flags that keep even root from changing a file or directory, and from renaming it.
pub const FIXED: IFlags = IFlags::IMMUTABLE.union(IFlags::APPEND);

/// Flags that keep root from changing what is in a file or directory; one of them from linking
/// there what belongs to another project.
pub const GUARDS: IFlags = FIXED.union(IFlags::PROJECT_INHERIT);

/// Flags that travel with a file or directory.
pub const KEPT: IFlags =
    GUARDS.union(IFlags::NODUMP).union(IFlags::NOATIME).union(IFlags::SYNC).union(IFlags::DIRSYNC);

/// Flags of files and directories that cannot be moved, with their names. Source: `linux/fs.h`,
/// which rustix does not have in full.
const REFUSED: [(u32, &str); 3] = [
    (0x0000_0800, "encryption (E)"),
    (0x0010_0000, "fs-verity (V)"),
    (0x4000_0000, "names without case (F)"),
];

/// Names of the flags that travel, as chattr(1) has them.
const NAMES: [(IFlags, &str); 7] = [
    (IFlags::IMMUTABLE, "immutable (i)"),
    (IFlags::APPEND, "append-only (a)"),
    (IFlags::NODUMP, "no dump (d)"),
    (IFlags::NOATIME, "no access times (A)"),
    (IFlags::SYNC, "synchronous (S)"),
    (IFlags::DIRSYNC, "synchronous directory (D)"),
    (IFlags::PROJECT_INHERIT, "project inheritance (P)"),
];

/// Project ID that a probe sets for a moment, the largest that all file systems take.
const PROBED_PROJECT: u32 = u32::MAX >> 1;

/// Flags and project of a file or directory, as far as they travel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flags {
    /// Of [`KEPT`].
    pub bits: u32,
    /// Project ID for quotas; 0 is the default project.
    pub project: u32,
}

impl Flags {
    /// Flags that keep root from changing the file.
    pub fn guards(self) -> u32 {
        self.bits & GUARDS.bits()
    }

    /// Without the flags that keep root from changing the file.
    pub fn unguarded(self) -> Self {
        Self { bits: self.bits & !GUARDS.bits(), ..self }
    }
}

/// Names of the flags in `flags` that travel.
pub fn names(flags: u32) -> String {
    let has = |(flag, _): &&(IFlags, &str)| flags & flag.bits() != 0;
    NAMES.iter().filter(has).map(|(_, name)| *name).collect::<Vec<_>>().join(", ")
}

/// Reads the flags of an open file or directory. The inner error is the name of a flag that cannot
/// be moved.
///
/// Errors: the system's. A file system that knows no flags, or no projects, has none set.
pub fn read(file: impl AsFd) -> io::Result<Result<Flags, &'static str>> {
    let Some(found) = bits(&file)? else { return Ok(Ok(Flags::default())) };
    let project = sys::project(&file).or_else(none_if_unknown)?;
    Ok(travelling(found.bits()).map(|bits| Flags { bits, project }))
}

/// Of the flags of a file, those that travel. Errors: the name of one that cannot move.
fn travelling(found: u32) -> Result<u32, &'static str> {
    match REFUSED.iter().find(|(flag, _)| found & flag != 0) {
        Some((_, name)) => Err(name),
        None => Ok(found & KEPT.bits()),
    }
}

/// Gives an open file or directory these flags. Other flags than [`KEPT`] stay as they are.
///
/// Errors: the system's; [`io::ErrorKind::Unsupported`] if the file system does not keep them.
pub fn write(file: impl AsFd, wanted: Flags) -> io::Result<()> {
    let project = sys::project(&file).or_else(none_if_unknown)?;
    if project != wanted.project {
        sys::set_project(&file, wanted.project)?;
    }
    let Some(found) = bits(&file)? else {
        let is_kept = wanted.bits == 0;
        return if is_kept { Ok(()) } else { Err(io::ErrorKind::Unsupported.into()) };
    };
    let flags = found.difference(KEPT) | IFlags::from_bits_retain(wanted.bits);
    if flags == found {
        return Ok(());
    }
    ioctl_setflags(&file, flags)?;
    // Some file systems leave out what they do not know, and say nothing.
    let kept = ioctl_getflags(&file)?.intersection(KEPT);
    if kept.bits() == wanted.bits { Ok(()) } else { Err(io::ErrorKind::Unsupported.into()) }
}

/// Whether an open directory has flags that what is made in it inherits, or may.
pub fn has_any(directory: impl AsFd) -> io::Result<bool> {
    Ok(bits(directory)?.is_some_and(|bits| bits.intersects(KEPT)))
}

/// Takes the flags from an open file or directory that keep root from changing it.
pub fn lift_guards(file: impl AsFd) -> io::Result<()> {
    match bits(&file)? {
        Some(flags) if flags.intersects(GUARDS) => {
            Ok(ioctl_setflags(file, flags.difference(GUARDS))?)
        }
        _ => Ok(()),
    }
}

/// Which of `bits`, and project IDs if there `has_projects`, the file system of the empty directory
/// `probe` does not keep; their names. The directory is left as it was.
pub fn not_kept(probe: &Path, bits: u32, has_projects: bool) -> io::Result<Vec<&'static str>> {
    let probe = File::open(probe)?;
    let is_lost = |flags| write(&probe, flags).is_err();
    let mut lost = Vec::new();
    for (flag, name) in NAMES.iter().filter(|(flag, _)| bits & flag.bits() != 0) {
        if is_lost(Flags { bits: flag.bits(), project: 0 }) {
            lost.push(*name);
        }
    }
    lift_guards(&probe)?;
    if has_projects && is_lost(Flags { bits: 0, project: PROBED_PROJECT }) {
        lost.push("project IDs");
    }
    write(&probe, Flags::default())?;
    Ok(lost)
}

/// All flags of an open file; `None` if its file system knows none.
fn bits(file: impl AsFd) -> io::Result<Option<IFlags>> {
    match ioctl_getflags(file) {
        Ok(flags) => Ok(Some(flags)),
        Err(Errno::NOTTY | Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn none_if_unknown(error: io::Error) -> io::Result<u32> {
    let unknown = [Errno::NOTTY, Errno::OPNOTSUPP, Errno::INVAL, Errno::NOSYS];
    match Errno::from_io_error(&error) {
        Some(errno) if unknown.contains(&errno) => Ok(0),
        _ => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mounted::Mounted;

    /// Source: `linux/fs.h`.
    #[test]
    fn flags_travel_stop_a_move_or_stay_behind() {
        // Extents, an indexed directory, no copy on write: how a file system stores it.
        assert_eq!(travelling(0x0080_0000 | 0x0008_0000 | 0x1000), Ok(0));
        let all = 0x10 | 0x20 | 0x40 | 0x80 | 0x8 | 0x0001_0000 | 0x2000_0000;
        assert_eq!(travelling(all | 0x0008_0000), Ok(all));
        for (flag, name) in [(0x800, "(E)"), (0x0010_0000, "(V)"), (0x4000_0000, "(F)")] {
            assert!(travelling(flag | 0x10).unwrap_err().ends_with(name));
        }
        assert_eq!(names(0x30), "immutable (i), append-only (a)");
    }

    #[test]
    fn what_a_file_system_does_not_keep_is_named() {
        let all = KEPT.bits();
        for (file_system, lost) in
            [(Mounted::xfs(), "synchronous directory (D)"), (Mounted::ext4(), "project IDs")]
        {
            assert_eq!(not_kept(&file_system.path(), all, true).unwrap(), [lost]);
            let found = read(File::open(file_system.path()).unwrap()).unwrap();
            assert_eq!(found, Ok(Flags::default()), "the probe is as it was");
        }
        // proc has no flags at all.
        let lost = not_kept(Path::new("/proc/self"), 0x10, false);
        assert_eq!(lost.unwrap(), ["immutable (i)"]);
    }
}
