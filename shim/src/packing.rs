//! How CRIU packs and unpacks the files of a tmpfs: with GNU tar, which the shim steers by its
//! environment.
//!
//! `TAR_OPTIONS` has tar keep what it leaves out by default ([`criu_wrapper::tmpfs`]). The archives
//! are images for CRIU, which always asks tar to compress them with `gzip`. While a container is
//! frozen for a migration that takes seconds, and hides that nearly all of the bytes are known at
//! the destination. So tar finds this program under the name `gzip`: it copies what tar packs, and
//! unpacks what is compressed or is not. Images for containerd's own checkpoints are compressed as
//! ever, since others may restore them.
//!
//! Where the program cannot be found under that name, tar goes on to the real `gzip`, and all is
//! slower but right.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use criu_wrapper::tmpfs::{PACK_OPTIONS, UNPACK_OPTIONS};

/// Directory with the program, before all others in tar's PATH.
const DIRECTORY: &str = "/run/godwit-packing";
/// The name by which tar calls it.
const NAME: &str = "gzip";
/// Names the PATH without that directory.
const PATH_VARIABLE: &str = "GODWIT_PATH";
/// How gzip's format begins.
const MAGIC: [u8; 2] = [0x1f, 0x8b];

/// What an archive is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Packing {
    /// An image that others may restore.
    Compressed,
    /// An image that is about to move.
    Plain,
    /// An image of either kind is unpacked.
    Unpacked,
}

/// Environment of the OCI runtime, and so of CRIU and tar.
pub(crate) fn environment(packing: Packing) -> Vec<(&'static str, OsString)> {
    let options = if packing == Packing::Unpacked { UNPACK_OPTIONS } else { PACK_OPTIONS };
    let mut environment = vec![("TAR_OPTIONS", options.into())];
    match packing {
        // Half the time of the default, for content that compresses (gzip's manual, "Environment").
        Packing::Compressed => environment.push(("GZIP", "-1".into())),
        Packing::Plain | Packing::Unpacked => match install(Path::new(DIRECTORY)) {
            Ok(()) => {
                let path = std::env::var_os("PATH").unwrap_or_default();
                let ours = [DIRECTORY.as_bytes(), b":", path.as_bytes()].concat();
                environment.extend([("PATH", OsString::from_vec(ours)), (PATH_VARIABLE, path)]);
            }
            Err(error) => tracing::warn!("a tmpfs is compressed: {DIRECTORY}: {error}"),
        },
    }
    environment
}

/// Puts this program into `directory`. Shims of several versions may do so at the same time.
fn install(directory: &Path) -> io::Result<()> {
    let program = std::env::current_exe()?.into_os_string().into_vec();
    // The kernel's words for a program that was replaced by a newer one.
    let program = program.strip_suffix(b" (deleted)").unwrap_or(&program);
    let (program, link) = (PathBuf::from(OsStr::from_bytes(program)), directory.join(NAME));
    if fs::read_link(&link).is_ok_and(|target| target == program) {
        return Ok(());
    }
    fs::create_dir_all(directory)?;
    let fresh = directory.join(format!("{NAME}.{}", std::process::id()));
    let _ = fs::remove_file(&fresh);
    symlink(program, &fresh)?;
    fs::rename(fresh, link)
}

/// Whether tar called this program.
pub(crate) fn is_gzip() -> bool {
    let called = std::env::args_os().next().unwrap_or_default();
    Path::new(&called).file_name() == Some(OsStr::new(NAME))
}

/// What tar calls `gzip` for: standard input to standard output.
pub(crate) fn gzip_main() -> ExitCode {
    let unpacks = std::env::args_os().any(|word| word == "-d");
    let done = file(&io::stdin()).and_then(|from| {
        let to = file(&io::stdout())?;
        if unpacks { unpack(from, to) } else { io::copy(&mut { from }, &mut { to }).map(drop) }
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        // tar closes the pipe at the end of the archive, whatever padding follows.
        Err(error) if unpacks && error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{NAME} of Godwit: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The same open file without a buffer.
fn file(stream: &impl AsFd) -> io::Result<File> {
    Ok(stream.as_fd().try_clone_to_owned()?.into())
}

fn unpack(mut from: File, mut to: File) -> io::Result<()> {
    let mut begin = Vec::new();
    (&from).take(MAGIC.len() as u64).read_to_end(&mut begin)?;
    if begin != MAGIC {
        to.write_all(&begin)?;
        return io::copy(&mut from, &mut to).map(drop);
    }
    let path = std::env::var_os(PATH_VARIABLE).unwrap_or_default();
    let mut command = Command::new(NAME);
    command.arg("-d").env("PATH", path).stdin(Stdio::piped()).stdout(to);
    let mut gzip = command.spawn()?;
    if let Some(mut input) = gzip.stdin.take() {
        input.write_all(&begin)?;
        io::copy(&mut from, &mut input)?;
    }
    if gzip.wait()?.success() { Ok(()) } else { Err(io::ErrorKind::InvalidData.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_is_there_by_the_name_that_tar_calls() {
        let dir = tempfile::tempdir().unwrap();
        let directory = dir.path().join("packing");
        for _ in 0..2 {
            install(&directory).unwrap();
            let target = fs::read_link(directory.join(NAME)).unwrap();
            assert_eq!(target, std::env::current_exe().unwrap());
        }
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 1);
    }

    /// Compressed ones are in the tests of whole nodes: here the reaper would take gzip's exit.
    #[test]
    fn an_archive_that_is_not_compressed_is_copied() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        for content in [&b""[..], b"\x1f", b"not gzip's"] {
            fs::write(&from, content).unwrap();
            unpack(File::open(&from).unwrap(), File::create(&to).unwrap()).unwrap();
            assert_eq!(fs::read(&to).unwrap(), content);
        }
    }
}
