//! Native AIO, whose requests go on without their process.
#![expect(unsafe_code, reason = "nix and std have no native AIO")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::Path;
use std::thread;
use std::time::Duration;

use super::report;

/// `IOCB_CMD_PWRITE`.
const WRITE: u16 = 1;
/// When this file is there, a request is made.
const GO: &str = "/go";
/// What is written.
const TEXT: &[u8] = b"by native AIO";

/// `struct iocb` of linux/aio_abi.h on little-endian machines.
#[derive(Default)]
#[repr(C)]
struct Request {
    data: u64,
    key: u32,
    flags: u32,
    command: u16,
    priority: i16,
    file: u32,
    address: u64,
    bytes: u64,
    offset: i64,
    reserved: u64,
    more_flags: u32,
    event_file: u32,
}

/// `struct io_event`.
#[derive(Default)]
#[repr(C)]
struct Event {
    data: u64,
    request: u64,
    result: i64,
    result2: i64,
}

/// Makes a ring, and a request when the file `/go` is there.
///
/// The line is `ring`, and `completed N` with the result of the request.
pub(super) fn ring(_arguments: &[String]) -> io::Result<()> {
    let mut context: u64 = 0;
    // SAFETY: the kernel writes one number, which outlives the call.
    check(unsafe { libc::syscall(libc::SYS_io_setup, 16, &raw mut context) })?;
    report("ring")?;
    while !Path::new(GO).exists() {
        thread::sleep(Duration::from_millis(20));
    }
    let file = File::create("/written")?;
    let mut request = Request {
        command: WRITE,
        file: file.as_raw_fd().cast_unsigned(),
        address: TEXT.as_ptr() as u64,
        bytes: TEXT.len() as u64,
        ..Default::default()
    };
    let mut list = [&raw mut request];
    // SAFETY: the kernel reads the list and the request, which outlive the call, and the text,
    // which is static.
    check(unsafe { libc::syscall(libc::SYS_io_submit, context, 1, list.as_mut_ptr()) })?;
    let (mut event, no_timeout) = (Event::default(), std::ptr::null::<libc::timespec>());
    // SAFETY: the kernel writes at most one event, which outlives the call.
    check(unsafe {
        libc::syscall(libc::SYS_io_getevents, context, 1, 1, &raw mut event, no_timeout)
    })?;
    report(&format!("completed {}", event.result))?;
    loop {
        thread::sleep(Duration::from_secs(1));
    }
}

fn check(result: libc::c_long) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
