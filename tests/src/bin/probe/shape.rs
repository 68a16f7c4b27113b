//! Large shapes: many mappings, threads, processes or files.
//!
//! ```text
//! mappings COUNT                  one page each    mappings COUNT wrong W beats K
//! threads COUNT                                    threads COUNT wrong 0 beats K
//! processes COUNT THREADS PAGES   PAGES shared     processes COUNT wrong W beats K
//!                                 by copy-on-write
//! files COUNT DIRECTORY           a line each      files COUNT wrong W beats K
//! ```
//!
//! W counts what did not read as it was written. A beat takes part of every mapping, thread,
//! process or, for files, of the next one; so K grows only while all of them live.
#![expect(unsafe_code, reason = "std neither forks nor maps memory")]

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use nix::unistd::{ForkResult, fork};

use crate::report;

const PAGE_BYTES: usize = 4096;

/// Time between two beats.
const BEAT: Duration = Duration::from_millis(200);

/// Files in one directory.
const FILES_PER_DIRECTORY: usize = 1000;

/// Numbered pages: each begins with its own number, counted from 1.
struct Pages {
    start: *mut u64,
    count: usize,
}

impl Pages {
    /// `sharing` is `MAP_PRIVATE` or `MAP_SHARED`.
    fn new(count: usize, sharing: libc::c_int) -> io::Result<Self> {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let flags = sharing | libc::MAP_ANONYMOUS;
        // SAFETY: the kernel chooses the place, so nothing that is in use is replaced.
        let start =
            unsafe { libc::mmap(std::ptr::null_mut(), count * PAGE_BYTES, access, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { start: start.cast(), count })
    }

    /// The first word of a page.
    fn word(&self, page: usize) -> *mut u64 {
        assert!(page < self.count);
        // SAFETY: the page lies within the mapping.
        unsafe { self.start.byte_add(page * PAGE_BYTES) }
    }

    fn number(&self) {
        for page in 0..self.count {
            // SAFETY: the mapping is writable and aligned, and nothing else refers to it.
            unsafe { self.word(page).write_volatile(page as u64 + 1) };
        }
    }

    /// Pages that do not begin with their number.
    fn wrong(&self) -> usize {
        // SAFETY: the mapping is readable and aligned, and nothing writes to it any more.
        let is_wrong =
            |page: &usize| unsafe { self.word(*page).read_volatile() } != *page as u64 + 1;
        (0..self.count).filter(is_wrong).count()
    }
}

fn number(arguments: &[String], place: usize) -> io::Result<usize> {
    let word = arguments.get(place).map_or("", String::as_str);
    word.parse().map_err(|error| io::Error::other(format!("argument {place}, {word:?}: {error}")))
}

/// Holds one mapping for each page: neighbours differ in their protection, so that the kernel
/// cannot merge them.
pub(crate) fn mappings(arguments: &[String]) -> io::Result<()> {
    let count = number(arguments, 0)?;
    let pages = Pages::new(count, libc::MAP_PRIVATE)?;
    pages.number();
    for page in (0..count).step_by(2) {
        // SAFETY: from here on the pages are only read.
        let set = unsafe { libc::mprotect(pages.word(page).cast(), PAGE_BYTES, libc::PROT_READ) };
        if set != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    for beat in 0_u64.. {
        report(&format!("mappings {count} wrong {} beats {beat}", pages.wrong()))?;
        thread::sleep(BEAT);
    }
    Ok(())
}

/// Holds threads that meet at every beat.
pub(crate) fn threads(arguments: &[String]) -> io::Result<()> {
    let count = number(arguments, 0)?;
    meet(count, &|beat| report(&format!("threads {count} wrong 0 beats {beat}")))
}

/// Runs `count` threads, this one included, that all meet before each call of `each_beat`.
fn meet(count: usize, each_beat: &dyn Fn(u64) -> io::Result<()>) -> io::Result<()> {
    let barrier = Barrier::new(count);
    thread::scope(|scope| {
        for _ in 1..count {
            let wait = || loop {
                barrier.wait();
            };
            thread::Builder::new().stack_size(64 << 10).spawn_scoped(scope, wait)?;
        }
        for beat in 0_u64.. {
            barrier.wait();
            each_beat(beat)?;
            thread::sleep(BEAT);
        }
        Ok(())
    })
}

/// Holds child processes that share pages with their parent by copy-on-write, each with threads
/// that meet.
pub(crate) fn processes(arguments: &[String]) -> io::Result<()> {
    let (count, threads) = (number(arguments, 0)?, number(arguments, 1)?);
    let inherited = Pages::new(number(arguments, 2)?, libc::MAP_PRIVATE)?;
    inherited.number();
    // A word of its own for each child: how often it has beaten, and whether it found a page wrong.
    let told = Pages::new(count, libc::MAP_SHARED)?;
    let words = |child: usize| {
        // SAFETY: a page has room for two aligned words, and only atomic accesses are made to them.
        unsafe { &*told.word(child).cast::<[AtomicU64; 2]>() }
    };
    for child in 0..count {
        // SAFETY: this process has only one thread.
        if let ForkResult::Child = unsafe { fork() }? {
            let [beats, wrong] = words(child);
            meet(threads, &|_| {
                wrong.store(inherited.wrong() as u64, Ordering::Relaxed);
                beats.fetch_add(1, Ordering::Relaxed);
                Ok(())
            })?;
        }
    }
    loop {
        let beats = (0..count).map(|child| words(child)[0].load(Ordering::Relaxed)).min();
        let wrong: u64 = (0..count).map(|child| words(child)[1].load(Ordering::Relaxed)).sum();
        report(&format!("processes {count} wrong {wrong} beats {}", beats.unwrap_or(0)))?;
        thread::sleep(BEAT);
    }
}

/// Holds files of a line each, and at each beat reads one and appends to it.
pub(crate) fn files(arguments: &[String]) -> io::Result<()> {
    let count = number(arguments, 0)?;
    let root = Path::new(arguments.get(1).map_or("/data", String::as_str));
    let path = |file: usize| -> PathBuf {
        root.join((file / FILES_PER_DIRECTORY).to_string()).join(file.to_string())
    };
    for file in 0..count {
        if file % FILES_PER_DIRECTORY == 0 {
            fs::create_dir_all(root.join((file / FILES_PER_DIRECTORY).to_string()))?;
        }
        fs::write(path(file), format!("file {file}\n"))?;
    }
    let mut wrong = 0;
    for beat in 0_u64.. {
        report(&format!("files {count} wrong {wrong} beats {beat}"))?;
        let file = usize::try_from(beat).unwrap_or(0).wrapping_mul(7919) % count;
        let line = fs::read_to_string(path(file))?;
        wrong += u64::from(!line.starts_with(&format!("file {file}\n")));
        fs::write(path(file), format!("{line}beat {beat}\n"))?;
        thread::sleep(BEAT);
    }
    Ok(())
}
