//! Attributes of files in a tmpfs that a plain tar archive does not keep.

use std::fs::{self, File, FileTimes};
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::thread;
use std::time::{Duration, UNIX_EPOCH};

use crate::{TICK, report};

/// An access control list in the kernel's form: the owner, user 1234, the group, the mask, others
/// may read.
const LIST: &[u8] = &[
    2, 0, 0, 0, 1, 0, 6, 0, 255, 255, 255, 255, 2, 0, 4, 0, 210, 4, 0, 0, 4, 0, 4, 0, 255, 255,
    255, 255, 16, 0, 4, 0, 255, 255, 255, 255, 32, 0, 4, 0, 255, 255, 255, 255,
];
/// The capability CAP_NET_RAW, permitted and effective, version 2.
const CAPABILITY: &[u8] = &[1, 0, 0, 2, 0, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
const TIME: Duration = Duration::from_nanos(1_700_000_000_123_456_789);

/// `names DIRECTORY`: makes the files. The line: which of their attributes are as they were made.
pub(crate) fn names(arguments: &[String]) -> io::Result<()> {
    let directory = Path::new(arguments.first().ok_or_else(|| io::Error::other("no directory"))?);
    let (file, link) = (directory.join("file"), directory.join("link"));
    let socket = directory.join("left-behind");
    let attributes = [("system.posix_acl_access", LIST), ("security.capability", CAPABILITY)];
    File::create_new(&file)?.set_times(FileTimes::new().set_modified(UNIX_EPOCH + TIME))?;
    for (name, value) in attributes {
        xattr::set(&file, name, value)?;
    }
    fs::hard_link(&file, &link)?;
    drop(UnixListener::bind(&socket)?);
    let time = |of: &fs::Metadata| (of.mtime(), of.mtime_nsec());
    let made = time(&fs::metadata(directory)?);
    loop {
        let now = fs::metadata(&file)?;
        let has =
            |name, value| Ok::<_, io::Error>(xattr::get(&file, name)?.as_deref() == Some(value));
        report(&format!(
            "list {} capability {} time {} directory {} link {} socket {}",
            has(attributes[0].0, LIST)?,
            has(attributes[1].0, CAPABILITY)?,
            UNIX_EPOCH + TIME == now.modified()?,
            made == time(&fs::metadata(directory)?),
            now.nlink() == 2,
            fs::symlink_metadata(&socket).is_ok_and(|found| found.file_type().is_socket()),
        ))?;
        thread::sleep(TICK);
    }
}
