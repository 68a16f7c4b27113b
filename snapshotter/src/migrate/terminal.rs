//! The terminal of a container that a migration creates here.
//!
//! A container that has a terminal is created with one, as `ctr run -d -t` does: its task names a
//! FIFO for the terminal's input and one for its output, which `ctr tasks attach` opens. No client
//! is there to make them or to read, so this node makes them, in [`path::STREAMS`]. The shim knows
//! them by that place, and discards the oldest output that no client reads: the container must not
//! wait for a client that it lost by moving.
//!
//! The client that deletes the task removes the FIFOs that it names: `ctr` with the task, and this
//! node with a container that moves away or does not come ([`remove_fifos`]).

use std::io;
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _};
use std::path::{Path, PathBuf};

use godwit_protos::{ContainerRef, path};
use nix::sys::stat::Mode;

use crate::containerd::Terminal;

/// Makes the FIFOs of a container's terminal. Errors: I/O, with the path.
pub(super) fn make(container: &ContainerRef) -> io::Result<Terminal> {
    make_in(Path::new(path::STREAMS), container)
}

fn make_in(streams: &Path, container: &ContainerRef) -> io::Result<Terminal> {
    let directory = streams.join(container.namespace()).join(container.id());
    let at = |path: &Path| {
        let path = path.display().to_string();
        move |error: io::Error| io::Error::new(error.kind(), format!("{path}: {error}"))
    };
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&directory);
    made.map_err(at(&directory))?;
    let fifo = |name: &str| {
        let path = directory.join(name);
        // What lies there is of an earlier container of this name.
        let _ = std::fs::remove_file(&path);
        let made = nix::unistd::mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR);
        made.map_err(|errno| at(&path)(errno.into()))?;
        Ok::<_, io::Error>(path.display().to_string())
    };
    Ok(Terminal { stdin: fifo("stdin")?, stdout: fifo("stdout")? })
}

/// Removes the FIFOs of a terminal whose container did not come.
pub(super) fn discard(container: &ContainerRef) {
    let directory = Path::new(path::STREAMS).join(container.namespace()).join(container.id());
    remove_fifos(&["stdin", "stdout"].map(|name| directory.join(name).display().to_string()));
}

/// Removes the FIFOs that a deleted task named, and the directories that they leave empty, as
/// containerd's client does.
pub(super) fn remove_fifos(streams: &[String]) {
    let fifos: Vec<PathBuf> = streams
        .iter()
        .map(PathBuf::from)
        .filter(|path| std::fs::metadata(path).is_ok_and(|data| data.file_type().is_fifo()))
        .collect();
    for fifo in &fifos {
        if let Err(error) = std::fs::remove_file(fifo) {
            tracing::warn!(fifo = %fifo.display(), %error, "cannot remove a stream of a container");
        }
    }
    for directory in fifos.iter().filter_map(|fifo| fifo.parent()) {
        // It stays if anything else lies there.
        let _ = std::fs::remove_dir(directory);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fifos_are_made_once_more_and_removed_with_their_directory() {
        let dir = tempfile::tempdir().unwrap();
        let container = ContainerRef::new("default", "tt").unwrap();
        let terminal = make_in(dir.path(), &container).unwrap();
        assert_eq!(make_in(dir.path(), &container).unwrap(), terminal);
        let other = dir.path().join("file");
        std::fs::write(&other, "").unwrap();
        let other = other.display().to_string();
        remove_fifos(&[terminal.stdin, terminal.stdout, String::new(), other.clone()]);
        assert!(!dir.path().join("default/tt").exists());
        assert!(Path::new(&other).exists(), "a file is not the task's to remove");
    }
}
