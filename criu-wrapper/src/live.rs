//! Reading, from a process that goes on running, the pages that CRIU would dump.
//!
//! For each private mapping of `/proc/PID/maps` the kernel is asked which pages exist
//! ([`crate::sys`], or `/proc/PID/pagemap` before Linux 6.7), and those are read through
//! `/proc/PID/mem` in batches. Which pages count follows CRIU: present or swapped, not a file's own
//! pages, not the zero page; nothing of vvar and vsyscall, which the kernel provides.
//!
//! What is read is torn: the process writes while we read. It serves as a base from which the dump
//! that follows differs by little, never as a state. A mapping or a whole process that goes away
//! meanwhile is skipped. Shared memory is read by segment, not by process, as CRIU dumps it
//! ([`scan_shared`]).

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use crate::pagemap::PAGE_BYTES;
use crate::sys::{self, Region};

/// Longest slice given to a visitor, in bytes.
pub const BATCH_BYTES_MAX: usize = 1 << 20;

/// Longest `/proc/PID/maps`, in bytes. The kernel's default limit is 65 530 mappings.
const MAPS_BYTES_MAX: u64 = 64 << 20;

/// Regions asked for at once.
const REGIONS: usize = 1024;

/// Entries of `/proc/PID/pagemap` read at once; each stands for a page.
const PAGEMAP_ENTRIES: usize = 1 << 15;

/// Deepest nesting of cgroups that is followed.
const CGROUP_DEPTH_MAX: u32 = 16;

/// What a scan has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScanStats {
    /// Pages given to the visitor.
    pub pages_read: u64,
    /// Pages that were gone between listing and reading.
    pub pages_vanished: u64,
    /// Private mappings looked at.
    pub mappings: u64,
    /// The process ended before the scan did.
    pub has_exited: bool,
}

/// Why a process cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ScanError {
    /// The operating system refused: not allowed, or not a proc file system.
    #[error("read {path}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A file of `/proc` is not in the form that is known.
    #[error("{path} is not understood: {line:?}")]
    Form {
        /// The file.
        path: PathBuf,
        /// The line, cut to a readable length.
        line: String,
    },
}

/// Reads the pages that CRIU would dump of process `pid` (a number in our pid namespace),
/// ascending.
///
/// `visit` gets the address and the bytes of whole, consecutive pages, 1 MiB at most. Errors:
/// [`ScanError`]; that the process ends is none, see [`ScanStats::has_exited`].
pub fn scan(pid: u32, visit: &mut dyn FnMut(u64, &[u8])) -> Result<ScanStats, ScanError> {
    let mut scan = match Scan::open(pid) {
        Err(ScanError::Io { source, .. }) if is_gone(&source) => {
            return Ok(ScanStats { has_exited: true, ..ScanStats::default() });
        }
        opened => opened?,
    };
    for mapping in mappings(pid)? {
        if !mapping.is_dumped() {
            continue;
        }
        scan.stats.mappings += 1;
        scan.read_mapping(&mapping, visit)?;
        if scan.stats.has_exited {
            break;
        }
    }
    Ok(scan.stats)
}

/// Reads the pages that CRIU would dump of a segment of shared anonymous memory, which process
/// `pid` has at `mapping` ([`Mapping::is_shared_memory`]); their addresses are offsets in the
/// segment.
///
/// `visit` is given what [`scan`]'s is. Errors: [`ScanError`]; that the mapping goes away is none.
pub fn scan_shared(
    pid: u32,
    mapping: &Mapping,
    visit: &mut dyn FnMut(u64, &[u8]),
) -> Result<(), ScanError> {
    let path =
        PathBuf::from(format!("/proc/{pid}/map_files/{:x}-{:x}", mapping.start, mapping.end));
    match read_data(&path, visit) {
        // Without the right to open it, less is read beforehand and more from the dump.
        Err(error) if is_gone(&error) || error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        Err(source) => Err(ScanError::Io { path, source }),
        Ok(()) => Ok(()),
    }
}

/// Reads what a file of shared memory has besides holes.
fn read_data(path: &Path, visit: &mut dyn FnMut(u64, &[u8])) -> io::Result<()> {
    let file = File::open(path)?;
    let mut buffer = vec![0; BATCH_BYTES_MAX];
    let mut at = 0;
    while let Some(data) = seek(&file, at, Whence::SeekData)? {
        let end = seek(&file, data, Whence::SeekHole)?.unwrap_or(data);
        at = data;
        while at < end {
            let wanted = usize::try_from(end - at).unwrap_or(usize::MAX).min(BATCH_BYTES_MAX);
            let read = file.read_at(&mut buffer[..wanted], at)?;
            let whole = read - read % as_usize(PAGE_BYTES);
            if whole == 0 {
                return Ok(());
            }
            visit(at, &buffer[..whole]);
            at += whole as u64;
        }
    }
    Ok(())
}

/// Where the next data or hole of a file begins; `None` behind the last.
fn seek(file: &File, at: u64, whence: Whence) -> io::Result<Option<u64>> {
    let at = i64::try_from(at).map_err(|_large| io::ErrorKind::InvalidInput)?;
    match lseek(file, at, whence) {
        Ok(found) => Ok(u64::try_from(found).ok()),
        Err(Errno::ENXIO) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

struct Scan {
    dir: PathBuf,
    pagemap: File,
    memory: File,
    /// Whether the kernel lacks the scan call.
    is_slow: bool,
    buffer: Vec<u8>,
    stats: ScanStats,
}

impl Scan {
    fn open(pid: u32) -> Result<Self, ScanError> {
        let dir = PathBuf::from(format!("/proc/{pid}"));
        let open = |name: &str| {
            let path = dir.join(name);
            File::open(&path).map_err(|source| ScanError::Io { path, source })
        };
        let (pagemap, memory) = (open("pagemap")?, open("mem")?);
        let buffer = vec![0; BATCH_BYTES_MAX];
        Ok(Self { dir, pagemap, memory, is_slow: false, buffer, stats: ScanStats::default() })
    }

    fn failed(&self, name: &str, source: io::Error) -> ScanError {
        ScanError::Io { path: self.dir.join(name), source }
    }

    fn read_mapping(
        &mut self,
        mapping: &Mapping,
        visit: &mut dyn FnMut(u64, &[u8]),
    ) -> Result<(), ScanError> {
        let mut at = mapping.start;
        while at < mapping.end && !self.stats.has_exited {
            let (regions, next) = match self.regions(at, mapping.end) {
                Err(source) if is_gone(&source) => {
                    self.stats.has_exited = true;
                    return Ok(());
                }
                Err(source) => return Err(self.failed("pagemap", source)),
                Ok(found) => found,
            };
            for region in regions {
                self.read_region(region, visit)?;
            }
            // The kernel always gets on, but a loop must not rest on that.
            if next <= at {
                break;
            }
            at = next;
        }
        Ok(())
    }

    /// Pages to read from `start` on, and up to where that was found out.
    fn regions(&mut self, start: u64, end: u64) -> io::Result<(Vec<Region>, u64)> {
        if !self.is_slow {
            let mut regions = vec![Region::default(); REGIONS];
            match sys::scan_private_pages(&self.pagemap, start, end, &mut regions) {
                Ok((filled, next)) => {
                    regions.truncate(filled);
                    return Ok((regions, next));
                }
                Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL)) => {
                    self.is_slow = true;
                }
                Err(error) => return Err(error),
            }
        }
        regions_from_pagemap(&self.pagemap, start, end)
    }

    fn read_region(
        &mut self,
        region: Region,
        visit: &mut dyn FnMut(u64, &[u8]),
    ) -> Result<(), ScanError> {
        let mut at = region.start;
        while at < region.end {
            let wanted =
                usize::try_from(region.end - at).unwrap_or(usize::MAX).min(BATCH_BYTES_MAX);
            let read = match self.memory.read_at(&mut self.buffer[..wanted], at) {
                // No memory any more: the process has ended.
                Ok(0) => {
                    self.stats.has_exited = true;
                    return Ok(());
                }
                Ok(read) => read - read % as_usize(PAGE_BYTES),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if is_gone(&error) => {
                    self.stats.has_exited = true;
                    return Ok(());
                }
                Err(error) if matches!(error.raw_os_error(), Some(libc::EIO | libc::EFAULT)) => 0,
                Err(source) => return Err(self.failed("mem", source)),
            };
            if read == 0 {
                // The first page cannot be read: it was unmapped, or belongs to a device.
                self.stats.pages_vanished += 1;
                at += PAGE_BYTES;
                continue;
            }
            visit(at, &self.buffer[..read]);
            self.stats.pages_read += read as u64 / PAGE_BYTES;
            at += read as u64;
        }
        Ok(())
    }
}

/// As [`sys::scan_private_pages`], on kernels without it. Zero pages are not told apart: they cost
/// a read.
fn regions_from_pagemap(pagemap: &File, start: u64, end: u64) -> io::Result<(Vec<Region>, u64)> {
    const PRESENT: u64 = 1 << 63;
    const SWAPPED: u64 = 1 << 62;
    const FILE_OR_SHARED: u64 = 1 << 61;
    const GUARD: u64 = 1 << 58;
    let pages = as_usize((end - start) / PAGE_BYTES).min(PAGEMAP_ENTRIES);
    let mut bytes = vec![0; pages * 8];
    let read = pagemap.read_at(&mut bytes, start / PAGE_BYTES * 8)?;
    let mut regions: Vec<Region> = Vec::new();
    let mut at = start;
    for entry in bytes[..read].as_chunks::<8>().0 {
        let entry = u64::from_le_bytes(*entry);
        let next = at + PAGE_BYTES;
        if entry & (PRESENT | SWAPPED) != 0 && entry & (FILE_OR_SHARED | GUARD) == 0 {
            match regions.last_mut() {
                Some(last) if last.end == at => last.end = next,
                _ => regions.push(Region { start: at, end: next, categories: 0 }),
            }
        }
        at = next;
    }
    // Nothing read: the process has no memory any more.
    Ok((regions, if read < 8 { end } else { at }))
}

/// The mappings of process `pid`, ascending; none if it has ended.
pub fn mappings(pid: u32) -> Result<Vec<Mapping>, ScanError> {
    let path = PathBuf::from(format!("/proc/{pid}/maps"));
    let mut bytes = Vec::new();
    let read = File::open(&path).and_then(|file| file.take(MAPS_BYTES_MAX).read_to_end(&mut bytes));
    match read {
        Err(source) if is_gone(&source) => return Ok(Vec::new()),
        Err(source) => return Err(ScanError::Io { path, source }),
        Ok(_) => {}
    }
    // Paths are bytes: a container may name its files as it likes.
    let text = String::from_utf8_lossy(&bytes);
    let form =
        |line: &str| ScanError::Form { path: path.clone(), line: line.chars().take(120).collect() };
    text.lines().map(|line| Mapping::parse(line).ok_or_else(|| form(line))).collect()
}

/// One line of `/proc/PID/maps`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mapping {
    /// Its first address.
    pub start: u64,
    /// The address behind its last.
    pub end: u64,
    /// Its file's path up to the first blank, or the kernel's word for it, for example `[heap]`;
    /// may be empty.
    pub name: String,
    /// Its file's inode, or 0.
    pub inode: u64,
    /// Whether what is written there is the process's own.
    pub is_private: bool,
    /// Whether the kernel provides what lies there.
    pub is_kernel: bool,
}

impl Mapping {
    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.split_ascii_whitespace();
        let (start, end) = fields.next()?.split_once('-')?;
        let permissions = fields.next()?;
        let inode = fields.nth(2)?.parse().ok()?;
        let name = fields.next().unwrap_or("").to_owned();
        let (start, end) =
            (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
        if start >= end || !(start | end).is_multiple_of(PAGE_BYTES) {
            return None;
        }
        let is_kernel = name.starts_with("[vvar")
            || matches!(name.as_str(), "[vsyscall]" | "[vdso]" | "[uprobes]");
        let is_private = permissions.as_bytes().get(3)? == &b'p';
        Some(Self { start, end, name, inode, is_private, is_kernel })
    }

    fn is_dumped(&self) -> bool {
        self.is_private && !self.is_kernel
    }

    /// Whether it is a segment of memory that processes share and that no file keeps; its inode
    /// tells which.
    pub fn is_shared_memory(&self) -> bool {
        !self.is_private && self.name == "/dev/zero"
    }
}

/// Id of process `pid` in the innermost pid namespace, which names its page map. `None` if it has
/// ended.
pub fn ns_pid(pid: u32) -> Result<Option<u32>, ScanError> {
    let Some(status) = status(pid)? else { return Ok(None) };
    let last = field(&status, "NSpid:").and_then(|ids| ids.split_ascii_whitespace().last());
    parse_id(pid, last, &status)
}

/// Those of `pids` that are processes, not threads of one, and not ended or zombies. Sorted.
pub fn leaders(pids: &[u32]) -> Result<Vec<u32>, ScanError> {
    let mut leaders = BTreeSet::new();
    for pid in pids {
        let Some(status) = status(*pid)? else { continue };
        let group = parse_id(*pid, field(&status, "Tgid:"), &status)?;
        let is_zombie = field(&status, "State:").is_some_and(|state| state.starts_with(['Z', 'X']));
        if group == Some(*pid) && !is_zombie {
            leaders.insert(*pid);
        }
    }
    Ok(leaders.into_iter().collect())
}

/// The processes of a cgroup directory and of those below it, as [`leaders`].
pub fn processes(cgroup: &Path) -> Result<Vec<u32>, ScanError> {
    let mut pids = Vec::new();
    collect_processes(cgroup, CGROUP_DEPTH_MAX, &mut pids)?;
    leaders(&pids)
}

fn collect_processes(dir: &Path, depth: u32, pids: &mut Vec<u32>) -> Result<(), ScanError> {
    let path = dir.join("cgroup.procs");
    let text = fs::read_to_string(&path).map_err(|source| ScanError::Io { path, source })?;
    pids.extend(text.lines().filter_map(|line| line.trim().parse::<u32>().ok()));
    if depth == 0 {
        return Ok(());
    }
    let failed = |source| ScanError::Io { path: dir.to_owned(), source };
    for entry in fs::read_dir(dir).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect_processes(&entry.path(), depth - 1, pids)?;
        }
    }
    Ok(())
}

fn status(pid: u32) -> Result<Option<String>, ScanError> {
    let path = PathBuf::from(format!("/proc/{pid}/status"));
    match fs::read(&path) {
        Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
        Err(error) if is_gone(&error) => Ok(None),
        Err(source) => Err(ScanError::Io { path, source }),
    }
}

fn field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim)
}

fn parse_id(pid: u32, text: Option<&str>, status: &str) -> Result<Option<u32>, ScanError> {
    let id = text.and_then(|text| text.parse().ok());
    let path = PathBuf::from(format!("/proc/{pid}/status"));
    let line = || status.lines().next().unwrap_or_default().to_owned();
    id.map(Some).ok_or_else(|| ScanError::Form { path, line: line() })
}

/// Whether the error says that the process has ended.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

fn as_usize(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;
    use std::io::{BufRead as _, BufReader, Write as _};
    use std::process::{Child, Command, Stdio};

    const PATTERN_PAGES: usize = 700;

    /// Path of the test that is the target, and what tells it so.
    const TARGET: &str = "live::tests::a_target_says_where_its_pattern_lies";
    const TARGET_VARIABLE: &str = "GODWIT_LIVE_TARGET";

    /// Another copy of this test program, which lays out known pages and waits.
    struct Target {
        child: Child,
        /// Address of its pattern.
        vaddr: u64,
    }

    impl Target {
        fn start() -> Self {
            let mut child = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", TARGET, "--nocapture"])
                .env(TARGET_VARIABLE, "1")
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let lines = BufReader::new(child.stdout.take().unwrap()).lines();
            let address = lines
                .map_while(Result::ok)
                .find_map(|line| line.split_once("pattern at ").map(|(_, at)| at.parse().unwrap()));
            Self { vaddr: address.unwrap(), child }
        }
    }

    impl Drop for Target {
        fn drop(&mut self) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }

    fn pattern(page: usize) -> [u8; 4096] {
        let mut bytes = [u8::try_from(page % 251).unwrap(); 4096];
        bytes[..8].copy_from_slice(&(page as u64 ^ 0xfeed_f00d).to_le_bytes());
        bytes
    }

    /// Method: this test is also the program that the others read.
    #[test]
    fn a_target_says_where_its_pattern_lies() {
        if std::env::var_os(TARGET_VARIABLE).is_none() {
            assert_eq!(Target::start().vaddr % PAGE_BYTES, 0);
            return;
        }
        let mut memory = vec![0_u8; (PATTERN_PAGES + 1) * 4096];
        let begin = memory.as_ptr().align_offset(4096);
        for (page, place) in memory[begin..].chunks_exact_mut(4096).enumerate() {
            place.copy_from_slice(&pattern(page));
        }
        println!("\npattern at {}", memory[begin..].as_ptr().addr());
        std::io::stdout().flush().unwrap();
        let mut line = String::new();
        std::io::stdin().read_line(&mut line).unwrap();
        assert!(!memory.is_empty());
    }

    fn pages_of(pid: u32) -> (HashMap<u64, Vec<u8>>, ScanStats) {
        let mut pages = HashMap::new();
        let stats = scan(pid, &mut |vaddr, bytes| {
            assert!(bytes.len() <= BATCH_BYTES_MAX && !bytes.is_empty());
            for (at, page) in (vaddr..).step_by(4096).zip(bytes.chunks_exact(4096)) {
                assert!(pages.insert(at, page.to_vec()).is_none(), "page {at:x} twice");
            }
        });
        (pages, stats.unwrap())
    }

    #[test]
    fn the_pages_of_a_running_process_are_read() {
        let target = Target::start();
        let (pages, stats) = pages_of(target.child.id());
        assert_eq!(stats.pages_read, pages.len() as u64);
        assert!(!stats.has_exited && stats.mappings > 5);
        for page in 0..PATTERN_PAGES {
            let at = target.vaddr + page as u64 * PAGE_BYTES;
            assert_eq!(pages.get(&at).map(Vec::as_slice), Some(&pattern(page)[..]), "page {page}");
        }
        // Code is a file's: much more is mapped than read.
        assert!(pages.len() < PATTERN_PAGES + 1000, "{}", pages.len());
    }

    #[test]
    fn shared_memory_is_read_by_its_offsets_without_what_was_never_written() {
        let written = [0usize, 1, 2, 40, 63];
        let mut memory = sys::tests::SharedMemory::new(64 * 4096);
        for page in written {
            memory.bytes()[page * 4096..][..4096].copy_from_slice(&pattern(page));
        }
        let address = memory.bytes().as_ptr().addr() as u64;
        let me = std::process::id();
        let all = mappings(me).unwrap();
        let mapping = all.iter().find(|mapping| mapping.start == address).unwrap();
        assert!(mapping.is_shared_memory() && mapping.inode > 0);
        let mut read = HashMap::new();
        scan_shared(me, mapping, &mut |offset, bytes| {
            for (at, page) in (offset..).step_by(4096).zip(bytes.chunks_exact(4096)) {
                assert!(read.insert(at / PAGE_BYTES, page.to_vec()).is_none(), "{at} twice");
            }
        })
        .unwrap();
        assert_eq!(read.len(), written.len());
        for page in written {
            assert_eq!(read[&(page as u64)], pattern(page), "page {page}");
        }
        let gone = Mapping { end: mapping.end + PAGE_BYTES, ..mapping.clone() };
        scan_shared(me, &gone, &mut |_, _| panic!("there is no such mapping")).unwrap();
    }

    #[test]
    fn old_kernels_find_the_same_pages() {
        let target = Target::start();
        let mut scan = Scan::open(target.child.id()).unwrap();
        let begin = target.vaddr;
        let end = begin + PATTERN_PAGES as u64 * PAGE_BYTES;
        let count = |regions: &[Region]| -> u64 { regions.iter().map(|r| r.end - r.start).sum() };
        let (fast, _) = scan.regions(begin, end).unwrap();
        let (slow, next) = regions_from_pagemap(&scan.pagemap, begin, end).unwrap();
        assert_eq!((count(&slow), next), (end - begin, end));
        if !scan.is_slow {
            assert_eq!(count(&fast), count(&slow));
        }
    }

    #[test]
    fn a_process_that_has_ended_is_no_error() {
        let mut target = Target::start();
        let pid = target.child.id();
        assert_eq!(leaders(&[pid]).unwrap(), [pid]);
        target.child.kill().unwrap();
        // First a zombie, then nothing.
        while leaders(&[pid]).unwrap() == [pid] {
            std::thread::yield_now();
        }
        assert_eq!(pages_of(pid).0.len(), 0);
        target.child.wait().unwrap();
        assert!(pages_of(pid).1.has_exited);
        assert_eq!(ns_pid(pid).unwrap(), None);
    }

    #[test]
    fn threads_are_not_leaders_and_ids_are_found() {
        let (tell, told) = std::sync::mpsc::channel();
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            tell.send(u32::try_from(nix::unistd::gettid().as_raw()).unwrap()).unwrap();
            let _ = stopped.recv();
        });
        let (me, thread_id) = (std::process::id(), told.recv().unwrap());
        assert_eq!(leaders(&[thread_id, me, u32::MAX]).unwrap(), [me]);
        assert!(ns_pid(me).unwrap().is_some());
        drop(stop);
        thread.join().unwrap();
    }

    #[test]
    fn lines_of_maps_are_understood() {
        let parse = |line| Mapping::parse(line).unwrap();
        let heap = parse("55d0c000-55d0e000 rw-p 00000000 00:00 0                    [heap]");
        assert!(heap.is_dumped() && (heap.start, heap.end) == (0x55d0_c000, 0x55d0_e000));
        assert!(
            parse("7f00a000-7f00b000 r--p 00001000 fe:00 12 /lib/a b.so (deleted)").is_dumped()
        );
        assert!(!parse("7f00a000-7f00b000 rw-s 00000000 00:01 12 /dev/zero (deleted)").is_dumped());
        assert!(!parse("7ffd8000-7ffdc000 r--p 00000000 00:00 0 [vvar]").is_dumped());
        assert!(!parse("7ffd8000-7ffdc000 r--p 00000000 00:00 0 [vvar_vclock]").is_dumped());
        for bad in ["", "x", "1000-2000", "2000-1000 rw-p 0 0:0 0", "1001-2000 rw-p 0 0:0 0"] {
            assert_eq!(Mapping::parse(bad), None, "{bad}");
        }
    }
}
