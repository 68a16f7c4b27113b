//! Unusual mappings.

use std::io;
use std::thread;
use std::time::Duration;

use crate::report;

/// Bytes that `reservation` uses at the begin of each GiB.
const USED_BYTES: usize = 1 << 16;

/// `probe reservation GIB`: an address range without access, as language runtimes reserve it, of
/// which a little is in use. The line is `beats N right`, or `beats N wrong` if a used part
/// differs.
pub(crate) fn reservation(arguments: &[String]) -> io::Result<()> {
    let gib: usize = arguments.first().and_then(|word| word.parse().ok()).unwrap_or(400);
    let parts = [0, gib / 2, gib - 1].map(|at| at << 30);
    let mut range = Range::reserve(gib << 30)?;
    for (number, part) in (1..).zip(parts) {
        range.part(part)?.fill(number);
    }
    for beats in 0_u64.. {
        let mut is_right = true;
        for (number, part) in (1..).zip(parts) {
            is_right &= range.part(part)?.iter().all(|byte| *byte == number);
        }
        report(&format!("beats {beats} {}", if is_right { "right" } else { "wrong" }))?;
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// `probe ballast MIB`: memory that does not compress. The line is `beats N`.
pub(crate) fn ballast(arguments: &[String]) -> io::Result<()> {
    let mib: usize = arguments.first().and_then(|word| word.parse().ok()).unwrap_or(1);
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let memory: Vec<u64> = (0..mib << 17).map(|_| random()).collect();
    for beats in 0_u64.. {
        std::hint::black_box(&memory);
        report(&format!("beats {beats}"))?;
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Reserved addresses.
struct Range {
    begin: *mut u8,
    bytes: usize,
}

impl Range {
    #[expect(unsafe_code, reason = "std maps no memory")]
    fn reserve(bytes: usize) -> io::Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping, wherever the kernel likes.
        let begin =
            unsafe { libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_NONE, flags, -1, 0) };
        if begin == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { begin: begin.cast(), bytes })
    }

    /// The used bytes at this offset.
    #[expect(unsafe_code, reason = "std maps no memory")]
    fn part(&mut self, offset: usize) -> io::Result<&mut [u8]> {
        if offset + USED_BYTES > self.bytes {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: inside the mapping, as just checked.
        let begin = unsafe { self.begin.add(offset) };
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: the range is ours, and gains rights only.
        if unsafe { libc::mprotect(begin.cast(), USED_BYTES, access) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: readable and writable now, zeros at first, and borrowed as long as `self`.
        Ok(unsafe { std::slice::from_raw_parts_mut(begin, USED_BYTES) })
    }
}
