//! Inode flags (chattr(1)): what a file has besides mode, owner, times and extended attributes.

use std::io;
use std::os::fd::AsFd;

use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};
use rustix::io::Errno;

/// Flags that keep root from changing a file or directory, or from linking what belongs to another project there.
pub(crate) const GUARDS: IFlags =
    IFlags::IMMUTABLE.union(IFlags::APPEND).union(IFlags::PROJECT_INHERIT);

/// Takes the flags from an open file or directory that keep root from changing it.
pub(crate) fn lift_guards(file: impl AsFd) -> io::Result<()> {
    match bits(&file)? {
        Some(flags) if flags.intersects(GUARDS) => {
            Ok(ioctl_setflags(file, flags.difference(GUARDS))?)
        }
        _ => Ok(()),
    }
}

/// All flags of an open file; `None` if its file system knows none.
fn bits(file: impl AsFd) -> io::Result<Option<IFlags>> {
    match ioctl_getflags(file) {
        Ok(flags) => Ok(Some(flags)),
        Err(Errno::NOTTY | Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS) => Ok(None),
        Err(error) => Err(error.into()),
    }
}
