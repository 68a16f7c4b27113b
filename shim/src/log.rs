//! The shim's log: containerd reads the FIFO `log` in the bundle and prints it among its own lines.
//!
//! The FIFO is opened for reading as well, so that writing goes on while containerd is away; what
//! does not fit meanwhile is dropped, since a log must never block the shim.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use tracing::level_filters::LevelFilter;

/// Name of the FIFO in the bundle.
const LOG_FIFO: &str = "log";

/// A clone of the FIFO for one event.
struct Fifo(File);

impl Write for Fifo {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.0.write(bytes) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(bytes.len()),
            written => written,
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Sends log lines to the FIFO in `bundle`; without one there is no log.
pub(crate) fn init(bundle: &Path, debug: bool) {
    let mut options = File::options();
    options.read(true).write(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC);
    let Ok(fifo) = options.open(bundle.join(LOG_FIFO)) else { return };
    let level = if debug { LevelFilter::DEBUG } else { LevelFilter::INFO };
    let writer = move || -> Box<dyn Write> {
        match fifo.try_clone() {
            Ok(fifo) => Box::new(Fifo(fifo)),
            Err(_) => Box::new(io::sink()),
        }
    };
    let lines =
        tracing_subscriber::fmt().with_ansi(false).with_max_level(level).with_writer(writer);
    let lines = lines.with_target(false).finish();
    // Both fail only if a logger was installed before, and then there is one. What ttrpc logs is
    // that a client has hung up, as containerd does whenever it restarts; what matters of it comes
    // back as an error.
    let _ = tracing_log::LogTracer::builder().ignore_crate("ttrpc").init();
    let _ = tracing::subscriber::set_global_default(lines);
}
