//! The calls that std and nix have no safe form of: work at exit and on a signal.
#![expect(unsafe_code, reason = "the only module that may call libc directly")]

use std::io::{self, Read};
use std::os::fd::{AsRawFd, IntoRawFd};
use std::sync::atomic::{AtomicI32, Ordering};

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// Write end of the pipe that the signal handler writes to; -1 before there is one.
static SIGNAL_PIPE: AtomicI32 = AtomicI32::new(-1);

/// Runs `work` when the process exits, after `main` or in `std::process::exit`.
pub(crate) fn at_exit(work: extern "C" fn()) -> io::Result<()> {
    // SAFETY: `work` is a function of the program and lives as long as it does.
    match unsafe { libc::atexit(work) } {
        0 => Ok(()),
        _ => Err(io::Error::other("atexit has no more room")),
    }
}

extern "C" fn write_signal(number: libc::c_int) {
    let fd = SIGNAL_PIPE.load(Ordering::Relaxed);
    let byte = number.to_le_bytes();
    // SAFETY: write(2) is async-signal-safe; the buffer outlives the call and has at least one
    // byte.
    unsafe { libc::write(fd, byte.as_ptr().cast(), 1) };
}

/// Calls `work` on a thread of its own with the number of the first SIGINT, SIGTERM or SIGHUP.
pub(crate) fn on_signal(work: impl FnOnce(i32) + Send + 'static) -> io::Result<()> {
    let (mut reader, writer) = io::pipe()?;
    let ready = writer.as_raw_fd();
    SIGNAL_PIPE.store(ready, Ordering::Relaxed);
    // The handler may run until the process ends, so the pipe stays open until then.
    let _ = writer.into_raw_fd();
    let action =
        SigAction::new(SigHandler::Handler(write_signal), SaFlags::SA_RESTART, SigSet::empty());
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: the handler only calls write(2) and reads an atomic.
        unsafe { sigaction(signal, &action) }?;
    }
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        let mut byte = [0];
        if reader.read_exact(&mut byte).is_ok() {
            work(byte[0].into());
        }
    })?;
    Ok(())
}
