//! The file system of a block volume: made and checked in its image by the programs that come with
//! it.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use godwit_protos::FileSystem;

use super::VolumeError;
use crate::content::object::{IMAGE_BYTES_MAX, PAGE_BYTES};
use crate::content::on;

/// Smallest block volume, in bytes; XFS asks for 300 MiB.
const IMAGE_BYTES_MIN: u64 = 16 << 20;

/// How long a program may take.
const PROGRAM_MAX: Duration = Duration::from_secs(600);

/// Longest words of a program that are repeated, in bytes.
const WORDS_BYTES_MAX: u64 = 4096;

/// Makes a sparse file with an empty file system in it, durably. On failure the file may be there.
///
/// Blocks and sectors have 4096 bytes, as has the loop device that the image is mounted by: then
/// the disk below may have sectors of any size, on every node that it comes to.
pub(super) fn make(path: &Path, file_system: FileSystem, bytes: u64) -> Result<(), VolumeError> {
    let fits = (IMAGE_BYTES_MIN..=IMAGE_BYTES_MAX).contains(&bytes);
    if !fits || !bytes.is_multiple_of(PAGE_BYTES as u64) {
        return Err(VolumeError::Size(bytes));
    }
    let file = File::options().write(true).create_new(true).mode(0o600).open(path);
    let file = file.map_err(on("make", path))?;
    file.set_len(bytes).map_err(on("set the length of", path))?;
    match file_system {
        FileSystem::Ext4 => {
            // What is not there is zeroes: nothing needs to be written now, nor in the background
            // later.
            let zeroed = "lazy_itable_init=0,lazy_journal_init=1";
            let format = ["-q", "-F", "-b", "4096", "-m", "0", "-E", zeroed];
            run(("mkfs.ext4", "e2fsprogs"), &format, path)?;
            // An empty volume is empty: programs that make their data directory look for that.
            run(("debugfs", "e2fsprogs"), &["-w", "-R", "rmdir lost+found"], path)?;
        }
        FileSystem::Xfs => {
            let format = ["-q", "-f", "-b", "size=4096", "-s", "size=4096"];
            run(("mkfs.xfs", "xfsprogs"), &format, path)?;
        }
    }
    Ok(file.sync_all().map_err(on("sync", path))?)
}

/// Checks the file system in an image that nothing has mounted, and repairs nothing.
pub(super) fn check(path: &Path, file_system: FileSystem) -> Result<(), VolumeError> {
    match file_system {
        FileSystem::Ext4 => run(("e2fsck", "e2fsprogs"), &["-f", "-n"], path),
        FileSystem::Xfs => run(("xfs_repair", "xfsprogs"), &["-f", "-n"], path),
    }
}

/// Runs a program on a file. Errors: it is not there, takes longer than [`PROGRAM_MAX`], or fails,
/// with its words.
pub(super) fn run(
    (program, package): (&'static str, &'static str),
    arguments: &[&str],
    path: &Path,
) -> Result<(), VolumeError> {
    let (mut said, out) = io::pipe().map_err(on("make a pipe for", path))?;
    let err = out.try_clone().map_err(on("make a pipe for", path))?;
    let mut command = Command::new(program);
    command.args(arguments).arg(path).stdin(Stdio::null()).stdout(out).stderr(err);
    let spawned = command.spawn();
    // It holds the other end of the pipe.
    drop(command);
    let mut child = match spawned {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(VolumeError::NoProgram { program, package });
        }
        child => child.map_err(on("run a program on", path))?,
    };
    let reader = std::thread::spawn(move || {
        let mut words = Vec::new();
        let _ = (&mut said).take(WORDS_BYTES_MAX).read_to_end(&mut words);
        let _ = io::copy(&mut said, &mut io::sink());
        let words = String::from_utf8_lossy(&words).into_owned();
        words.split_whitespace().collect::<Vec<_>>().join(" ")
    });
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().map_err(on("wait for a program on", path))? {
            break status;
        }
        if begun.elapsed() > PROGRAM_MAX {
            let _ = child.kill();
            let _ = child.wait();
            let words = format!("it took longer than {} s", PROGRAM_MAX.as_secs());
            return Err(VolumeError::Program { program, words });
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    if status.success() {
        return Ok(());
    }
    let words = reader.join().unwrap_or_default();
    Err(VolumeError::Program { program, words: format!("{status}: {words}") })
}
