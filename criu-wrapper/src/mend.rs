//! Mends images before a restore where CRIU would restore something else than what it dumped.
//!
//! - `files.img`: CRIU restores a periodic timerfd with an unread tick disarmed (CRIU issue 3162).
//!   It is armed for one interval later. A timerfd set to an absolute time would be up to one
//!   second early, or fire twice: see [`mended_timer`].
//! - `core-*.img`: a wait in a system call would end with `EINTR`. The call runs again: see
//!   [`crate::waits`].
//! - `mm-*.img`: with a parent image CRIU maps every private mapping writable at first, so a
//!   reservation beyond the memory would fail with `ENOMEM`. It gets `MAP_NORESERVE`, or its
//!   process is restored without a parent.
//!
//! Only fields named here change; all others keep their bytes. An image that does not parse stays
//! as it is and is reported in [`Mended::unread`]: CRIU then says itself what is wrong with it.
//!
//! Field numbers are those of CRIU's images/*.proto, the same from CRIU 3.0 to 4.2.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::Path;
use std::time::{Duration, SystemTime};

use crate::image::{self, Kind};
use crate::pagemap::{ImageDirectory, ImageError};
use crate::waits;
use crate::wire::{self, New, Value};

/// Longest message read, in bytes: a process with a million mappings has 64 MiB of them.
const MESSAGE_BYTES_MAX: u32 = 64 << 20;

/// `file_entry.tfd` (fdinfo.proto).
const FILE_TIMER: u64 = 12;
/// Fields of `timerfd_entry` (timerfd.proto).
mod timer {
    pub(super) const CLOCK: u64 = 4;
    pub(super) const TICKS: u64 = 5;
    pub(super) const SETTIME_FLAGS: u64 = 6;
    pub(super) const VALUE_SECONDS: u64 = 7;
    pub(super) const VALUE_NANOSECONDS: u64 = 8;
    pub(super) const INTERVAL_SECONDS: u64 = 9;
    pub(super) const INTERVAL_NANOSECONDS: u64 = 10;
}
/// Fields of `core_entry` and the messages in it (core.proto, core-x86.proto, siginfo.proto).
mod core {
    pub(super) const ARCHITECTURE: u64 = 1;
    pub(super) const X86_64: u64 = 1;
    pub(super) const REGISTERS: &[u64] = &[2, 2];
    pub(super) const AX: u64 = 11;
    pub(super) const ORIG_AX: u64 = 16;
    pub(super) const IP: u64 = 17;
    pub(super) const CS: u64 = 18;
    pub(super) const THREAD: &[u64] = &[5];
    pub(super) const THREAD_BLOCKED: u64 = 6;
    pub(super) const THREAD_SIGNALS: &[u64] = &[5, 9];
    pub(super) const PROCESS: &[u64] = &[3];
    pub(super) const PROCESS_BLOCKED: u64 = 5;
    pub(super) const PROCESS_SIGNALS: &[u64] = &[3, 10];
    pub(super) const QUEUED: u64 = 1;
    pub(super) const SIGNAL_INFO: &[u64] = &[1];
}
/// Fields of `mm_entry` and `vma_entry` (mm.proto, vma.proto).
mod mm {
    pub(super) const MAPPING: u64 = 14;
    pub(super) const START: u64 = 1;
    pub(super) const END: u64 = 2;
    pub(super) const FLAGS: u64 = 6;
}

/// `TFD_TIMER_ABSTIME`
const ABSOLUTE: u64 = 1;
const CLOCK_REALTIME: u64 = 0;
const MAP_TYPE: u64 = 0xf;
const MAP_PRIVATE: u64 = 2;
const MAP_NORESERVE: u64 = 0x4000;
const MAP_HUGETLB: u64 = 0x4_0000;

/// How the kernel judges mappings that are larger than the memory (`vm.overcommit_memory`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overcommit {
    /// 0: refuses a writable mapping larger than memory and swap, unless it has `MAP_NORESERVE`.
    Heuristic,
    /// 1: refuses none.
    Always,
    /// 2: counts every writable mapping, `MAP_NORESERVE` or not.
    Never,
}

/// The machine that restores.
#[derive(Clone, Copy, Debug)]
pub struct Host {
    /// Its wall clock.
    pub now: SystemTime,
    /// Memory and swap, in bytes.
    pub memory_bytes: u64,
    /// What it allows beyond that.
    pub overcommit: Overcommit,
}

impl Host {
    /// This machine, now. Errors: /proc cannot be read.
    pub fn here() -> io::Result<Self> {
        let overcommit = match fs::read_to_string("/proc/sys/vm/overcommit_memory")?.trim() {
            "1" => Overcommit::Always,
            "2" => Overcommit::Never,
            _ => Overcommit::Heuristic,
        };
        let memory_bytes = memory_bytes(&fs::read_to_string("/proc/meminfo")?);
        Ok(Self { now: SystemTime::now(), memory_bytes, overcommit })
    }

    /// Largest private mapping that CRIU can map writable without help, in bytes.
    fn area_bytes_max(&self) -> u64 {
        match self.overcommit {
            Overcommit::Always => u64::MAX,
            // Half: the figure may differ a little from what the kernel compares with.
            Overcommit::Heuristic => self.memory_bytes / 2,
            // All mappings together count; one that takes an eighth is no ordinary heap.
            Overcommit::Never => self.memory_bytes / 8,
        }
    }
}

/// Sum of `MemTotal` and `SwapTotal` (proc(5), "meminfo").
fn memory_bytes(meminfo: &str) -> u64 {
    let kib = |line: &str| {
        let rest = line.strip_prefix("MemTotal:").or_else(|| line.strip_prefix("SwapTotal:"))?;
        rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
    };
    meminfo.lines().filter_map(kib).sum::<u64>().saturating_mul(1024)
}

/// What [`mend`] changed.
#[derive(Debug, Default)]
pub struct Mended {
    /// Timerfds.
    pub timers: usize,
    /// Threads whose system call runs again.
    pub waits: usize,
    /// Mappings that got `MAP_NORESERVE`.
    pub reservations: usize,
    /// Page maps (names without `.img`) that must not refer to a parent image, because CRIU could
    /// not restore them.
    pub whole: BTreeSet<String>,
    /// Images that do not parse and stayed as they were.
    pub unread: Vec<ImageError>,
}

/// Mends every image in `directory` for a restore on `host`, in place. Not idempotent: call it
/// once.
///
/// Errors: an image cannot be read or written; the directory must not be restored from then.
pub fn mend(directory: &Path, host: &Host) -> Result<Mended, ImageError> {
    let mut mended = Mended::default();
    let files = ImageDirectory::open(directory)?.other_files();
    let names = || files.iter().filter_map(|file| file.strip_suffix(".img"));
    let cores: Vec<&str> = names().filter(|name| name.starts_with("core-")).collect();
    let signals = shared_signals(directory, &cores)?;
    for name in names() {
        let path = directory.join(format!("{name}.img"));
        let outcome = if name == "files" {
            let dumped = fs::metadata(&path).and_then(|metadata| metadata.modified());
            let dumped = dumped.map_err(ImageError::io("stat", &path))?;
            let count = &mut mended.timers;
            replace(&path, Kind::Files, |entry| {
                let timer = wire::message(entry, &[FILE_TIMER])?;
                let timer = mended_timer(timer, dumped, host.now)?;
                *count += 1;
                wire::with_message(entry, &[FILE_TIMER], timer)
            })?
        } else if name.starts_with("core-") {
            let count = &mut mended.waits;
            replace(&path, Kind::Core, |core| {
                let core = mended_wait(core, signals)?;
                *count += 1;
                Some(core)
            })?
        } else if let Some(id) = name.strip_prefix("mm-") {
            mend_mappings(&path, id, host, &mut mended)?
        } else {
            Ok(())
        };
        if let Err(broken) = outcome {
            mended.unread.push(ImageError::broken(name)(broken));
        }
    }
    Ok(mended)
}

/// Replaces messages of one image. Outer errors: I/O. Inner errors: the image does not parse.
fn replace(
    path: &Path,
    kind: Kind,
    change: impl FnMut(&[u8]) -> Option<Vec<u8>>,
) -> Result<Result<(), image::Broken>, ImageError> {
    let bytes = fs::read(path).map_err(ImageError::io("read", path))?;
    let new = match image::rewritten(&bytes, kind, MESSAGE_BYTES_MAX, change) {
        Ok(Some(new)) => new,
        Ok(None) => return Ok(Ok(())),
        Err(broken) => return Ok(Err(broken)),
    };
    fs::write(path, new).map_err(ImageError::io("write", path))?;
    Ok(Ok(()))
}

/// A `timerfd_entry` as CRIU should restore it; `None` if CRIU restores the given one rightly.
///
/// - Expired, periodic, tick unread: /proc shows no time left, on which CRIU leaves it disarmed. It
///   gets one interval. (The daemon makes this rare, see [`crate::timers`].)
/// - Expired or disarmed, set to an absolute time: CRIU would arm it for the current second and so
///   fire it again. As a relative time it stays disarmed.
/// - Armed for an absolute time: CRIU adds the time left to the clock's whole seconds, so the timer
///   fires up to one second early. Of the clocks that stood still with the container the time left
///   is right as a relative time. A wall clock timer fires when the clock shows its time; with
///   whole seconds only, it fires up to one second late instead.
fn mended_timer(timer: &[u8], dumped: SystemTime, now: SystemTime) -> Option<Vec<u8>> {
    let field = |number| wire::number(timer, number);
    let value = duration(field(timer::VALUE_SECONDS)?, field(timer::VALUE_NANOSECONDS)?)?;
    let interval = duration(field(timer::INTERVAL_SECONDS)?, field(timer::INTERVAL_NANOSECONDS)?)?;
    let flags = field(timer::SETTIME_FLAGS)?;
    let is_absolute = flags & ABSOLUTE != 0;
    // Without a tick it is disarmed: timerfd_settime with an interval only.
    let is_overdue = value.is_zero() && !interval.is_zero() && field(timer::TICKS)? > 0;
    let relative = (timer::SETTIME_FLAGS, flags & !ABSOLUTE);
    if value.is_zero() && !is_overdue {
        return is_absolute.then(|| wire::with_numbers(timer, &[relative]))?;
    }
    let left = if is_overdue { interval } else { value };
    let with_value = |seconds, flags| {
        let nanoseconds = (timer::VALUE_NANOSECONDS, u64::from(left.subsec_nanos()));
        wire::with_numbers(timer, &[(timer::VALUE_SECONDS, seconds), nanoseconds, flags])
    };
    if !is_absolute {
        return is_overdue.then(|| with_value(left.as_secs(), relative))?;
    }
    if field(timer::CLOCK)? != CLOCK_REALTIME {
        return with_value(left.as_secs(), relative);
    }
    let since = if is_overdue { now } else { dumped };
    let expiry = since_1970(since).checked_add(left)?;
    // Negative for a time that has passed: CRIU adds it to the clock's seconds all the same.
    let seconds = expiry.as_secs().wrapping_sub(since_1970(now).as_secs());
    let nanoseconds = (timer::VALUE_NANOSECONDS, u64::from(expiry.subsec_nanos()));
    wire::with_numbers(timer, &[(timer::VALUE_SECONDS, seconds), nanoseconds])
}

fn since_1970(time: SystemTime) -> Duration {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

/// A time as the kernel would accept it.
fn duration(seconds: u64, nanoseconds: u64) -> Option<Duration> {
    let nanoseconds = u32::try_from(nanoseconds).ok().filter(|n| *n < 1_000_000_000)?;
    i64::try_from(seconds).ok()?;
    Some(Duration::new(seconds, nanoseconds))
}

/// Signals that waited for any thread of a process when it was dumped, as a mask over all
/// processes.
fn shared_signals(directory: &Path, cores: &[&str]) -> Result<u64, ImageError> {
    let mut signals = 0;
    for name in cores {
        let path = directory.join(format!("{name}.img"));
        let bytes = fs::read(&path).map_err(ImageError::io("read", &path))?;
        let Ok(messages) = image::messages(&bytes, Kind::Core, MESSAGE_BYTES_MAX) else { continue };
        for framed in messages.flatten() {
            signals |= queued_signals(framed.message, core::PROCESS_SIGNALS);
        }
    }
    Ok(signals)
}

/// The signals in the `signal_queue_entry` at `path` of a `core_entry`, as a mask.
fn queued_signals(core: &[u8], path: &[u64]) -> u64 {
    let Some(queue) = wire::message(core, path) else { return 0 };
    let mut signals = 0;
    for entry in wire::all_bytes(queue, core::QUEUED) {
        // A siginfo_t begins with the signal's number.
        let info = wire::message(entry, core::SIGNAL_INFO).and_then(<[u8]>::first_chunk);
        let number = info.map_or(0, |bytes| u32::from_le_bytes(*bytes));
        signals |= number.checked_sub(1).and_then(|bit| 1_u64.checked_shl(bit)).unwrap_or(0);
    }
    signals
}

/// The signals that a thread blocks, as a mask. For the first thread of a process they stand with
/// the process.
fn blocked_signals(core: &[u8]) -> Option<u64> {
    let of_thread = || wire::number(wire::message(core, core::THREAD)?, core::THREAD_BLOCKED);
    let of_process = || wire::number(wire::message(core, core::PROCESS)?, core::PROCESS_BLOCKED);
    of_thread().or_else(of_process)
}

/// A `core_entry` whose system call runs again; `None` if it did not end with `EINTR`, or if one of
/// its own or of the shared `signals` is about to be handled, which ends the call rightly.
fn mended_wait(core: &[u8], signals: u64) -> Option<Vec<u8>> {
    if wire::number(core, core::ARCHITECTURE)? != core::X86_64 {
        return None;
    }
    let registers = wire::message(core, core::REGISTERS)?;
    let register = |number| wire::number(registers, number);
    let call = register(core::ORIG_AX)?;
    if !waits::is_interrupted(register(core::AX)?, call, register(core::CS)?) {
        return None;
    }
    let blocked = blocked_signals(core)?;
    if (signals | queued_signals(core, core::THREAD_SIGNALS)) & !blocked != 0 {
        return None;
    }
    let ip = register(core::IP)?.checked_sub(waits::ENTRY_BYTES)?;
    let registers = wire::with_numbers(registers, &[(core::AX, call), (core::IP, ip)])?;
    wire::with_message(core, core::REGISTERS, registers)
}

/// Whether CRIU cannot map a `vma_entry` writable where a mapping may have `area_bytes_max` bytes.
fn is_reservation(mapping: &[u8], area_bytes_max: u64) -> bool {
    let Some([start, end, flags]) = wire::numbers(mapping, [mm::START, mm::END, mm::FLAGS]) else {
        return false;
    };
    flags & MAP_TYPE == MAP_PRIVATE
        && flags & (MAP_NORESERVE | MAP_HUGETLB) == 0
        && end.saturating_sub(start) > area_bytes_max
}

/// Sees to it that CRIU can map every mapping of process `id`.
fn mend_mappings(
    path: &Path,
    id: &str,
    host: &Host,
    mended: &mut Mended,
) -> Result<Result<(), image::Broken>, ImageError> {
    let area_bytes_max = host.area_bytes_max();
    if area_bytes_max == u64::MAX {
        return Ok(Ok(()));
    }
    let is_counted_always = host.overcommit == Overcommit::Never;
    replace(path, Kind::Mm, |mm| {
        wire::rewritten(mm, |number, value| match value {
            Value::Bytes(mapping)
                if number == mm::MAPPING && is_reservation(mapping, area_bytes_max) =>
            {
                if is_counted_always {
                    mended.whole.insert(format!("pagemap-{id}"));
                    return None;
                }
                let flags = wire::number(mapping, mm::FLAGS)? | MAP_NORESERVE;
                mended.reservations += 1;
                wire::with_numbers(mapping, &[(mm::FLAGS, flags)]).map(New::Bytes)
            }
            _ => None,
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// A message of numeric fields.
    fn numbers(fields: &[(u64, u64)]) -> Vec<u8> {
        fields.iter().fold(Vec::new(), |mut message, (number, value)| {
            message.extend(varint(number << 3));
            message.extend(varint(*value));
            message
        })
    }

    fn nested(number: u64, inner: &[u8]) -> Vec<u8> {
        [varint(number << 3 | 2), varint(inner.len() as u64), inner.to_vec()].concat()
    }

    fn varint(mut value: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        while value >= 0x80 {
            bytes.push((value & 0x7f) as u8 | 0x80);
            value >>= 7;
        }
        bytes.push((value & 0x7f) as u8);
        bytes
    }

    fn write(directory: &Path, name: &str, kind: Kind, messages: &[Vec<u8>]) {
        let mut image = image::empty(kind);
        messages.iter().for_each(|message| image::push(&mut image, message));
        fs::write(directory.join(name), image).unwrap();
    }

    fn read(directory: &Path, name: &str, kind: Kind) -> Vec<Vec<u8>> {
        let bytes = fs::read(directory.join(name)).unwrap();
        let messages = image::messages(&bytes, kind, MESSAGE_BYTES_MAX).unwrap();
        messages.map(|framed| framed.unwrap().message.to_vec()).collect()
    }

    fn host() -> Host {
        let now = SystemTime::UNIX_EPOCH + Duration::from_millis(5_000_250);
        Host { now, memory_bytes: 8 << 30, overcommit: Overcommit::Heuristic }
    }

    /// A `file_entry` in CRIU's form: a timer of 20 ms with an unread tick.
    const OVERDUE: &[u8] = b"\x08\x11\x10\x09\x62\x21\x08\x09\x10\x02\
        \x1a\x0a\x08\0\x10\0\x18\0\x20\0\x28\0\x20\x01\x28\x01\x30\0\
        \x38\0\x40\0\x48\0\x50\x80\xda\xc4\x09";
    /// The same armed.
    const ARMED: &[u8] = b"\x08\x11\x10\x09\x62\x24\x08\x09\x10\x02\
        \x1a\x0a\x08\0\x10\0\x18\0\x20\0\x28\0\x20\x01\x28\x01\x30\0\
        \x38\0\x40\x80\xda\xc4\x09\x48\0\x50\x80\xda\xc4\x09";

    #[test]
    fn an_unread_periodic_timer_is_armed_and_the_rest_of_the_image_stays() {
        let dir = tempfile::tempdir().unwrap();
        let other = b"\x08\x01\x10\x02\x1a\x02\x08\x02".to_vec();
        write(dir.path(), "files.img", Kind::Files, &[other.clone(), OVERDUE.to_vec()]);
        let mended = mend(dir.path(), &host()).unwrap();
        assert_eq!((mended.timers, mended.waits, mended.unread.len()), (1, 0, 0));
        assert_eq!(read(dir.path(), "files.img", Kind::Files), [other, ARMED.to_vec()]);
    }

    /// Clock, ticks, flags, value and interval, the latter as seconds and nanoseconds.
    fn timer_entry(head: [u64; 3], value: (u64, u64), interval: (u64, u64)) -> Vec<u8> {
        let times = [(7, value.0), (8, value.1), (9, interval.0), (10, interval.1)];
        numbers(&[&[(1, 9), (4, head[0]), (5, head[1]), (6, head[2])], &times[..]].concat())
    }

    #[test]
    fn timers_are_mended_by_clock_and_state() {
        let now = host().now;
        let mended = |timer: &[u8]| mended_timer(timer, now - 2 * SECOND, now);
        // Right as they are: armed; disarmed with an interval; fired once.
        for (value, interval, ticks) in
            [((1, 5), (1, 0), 1), ((0, 0), (1, 0), 0), ((0, 0), (0, 0), 1)]
        {
            assert_eq!(mended(&timer_entry([1, ticks, 0], value, interval)), None);
        }
        // A fired one-shot timer must not fire again.
        let fired = timer_entry([1, 0, 1], (0, 0), (0, 0));
        assert_eq!(mended(&fired), Some(timer_entry([1, 0, 0], (0, 0), (0, 0))));
        // The clocks of the container stood still: what was left is left.
        let armed = timer_entry([1, 0, 1], (3, 7), (9, 0));
        assert_eq!(mended(&armed), Some(timer_entry([1, 0, 0], (3, 7), (9, 0))));
        // The wall clock did not: dumped at 4998.25 s for 5001.75 s, CRIU adds 5000 s or more.
        let wall = timer_entry([0, 0, 3], (3, 500_000_000), (0, 0));
        assert_eq!(mended(&wall), Some(timer_entry([0, 0, 3], (1, 750_000_000), (0, 0))));
        let passed = timer_entry([0, 0, 1], (0, 250_000_000), (60, 0));
        let before = (-2_i64).cast_unsigned();
        assert_eq!(mended(&passed), Some(timer_entry([0, 0, 1], (before, 500_000_000), (60, 0))));
        let overdue = timer_entry([0, 1, 1], (0, 0), (60, 0));
        assert_eq!(mended(&overdue), Some(timer_entry([0, 1, 1], (60, 250_000_000), (60, 0))));
        // Times that no kernel has written.
        assert_eq!(mended(&timer_entry([1, 1, 1], (0, 0), (0, 1_000_000_000))), None);
        assert_eq!(mended(&timer_entry([0, 0, 1], (u64::MAX, 0), (0, 0))), None);
    }

    /// A thread's core: call, result, signals in its own queue, and blocked ones.
    fn core_entry(call: u64, ax: u64, signal: Option<u32>, blocked: u64) -> Vec<u8> {
        let registers = numbers(&[(10, 7), (11, ax), (16, call), (17, 0x1000), (18, 0x33)]);
        let info =
            |signal: u32| nested(1, &nested(1, &[&signal.to_le_bytes()[..], &[0; 124]].concat()));
        let queue = nested(9, &signal.map(info).unwrap_or_default());
        let thread = [numbers(&[(1, 0), (2, 24), (6, blocked)]), queue].concat();
        let machine = [numbers(&[(1, 0)]), nested(2, &registers), nested(3, b"\x08\x01")].concat();
        [numbers(&[(1, 1)]), nested(2, &machine), nested(5, &thread)].concat()
    }

    #[test]
    fn an_interrupted_wait_runs_again_unless_a_signal_ended_it() {
        let dir = tempfile::tempdir().unwrap();
        let (sleep, interrupted) = (35, waits::INTERRUPTED);
        let cores = [
            core_entry(sleep, interrupted, None, 0),
            core_entry(sleep, interrupted, Some(15), 0),
            core_entry(sleep, interrupted, Some(15), 1 << 14),
            core_entry(u64::MAX, interrupted, None, 0),
            core_entry(sleep, 0, None, 0),
        ];
        for (number, core) in (1..).zip(&cores) {
            write(
                dir.path(),
                &format!("core-{number}.img"),
                Kind::Core,
                std::slice::from_ref(core),
            );
        }
        assert_eq!(mend(dir.path(), &host()).unwrap().waits, 2);
        for (number, core) in (1..).zip(&cores) {
            let mut right = core.clone();
            if number == 1 || number == 3 {
                let registers = numbers(&[(10, 7), (11, 35), (16, 35), (17, 0xffe), (18, 0x33)]);
                right = wire::with_message(core, &[2, 2], registers).unwrap();
            }
            assert_eq!(read(dir.path(), &format!("core-{number}.img"), Kind::Core), [right]);
        }
    }

    /// The first thread's mask stands with the process.
    fn leader_entry(call: u64, signal: Option<u32>, blocked: u64) -> Vec<u8> {
        let thread = core_entry(call, waits::INTERRUPTED, signal, 0);
        let queue = wire::message(&thread, core::THREAD_SIGNALS).unwrap();
        let own = [numbers(&[(1, 0), (2, 24)]), nested(9, queue)].concat();
        let core = wire::with_message(&thread, core::THREAD, own).unwrap();
        [core, nested(3, &numbers(&[(1, 1), (5, blocked)]))].concat()
    }

    #[test]
    fn the_first_thread_of_a_process_is_as_any_other() {
        assert!(mended_wait(&leader_entry(230, None, 0), 0).is_some());
        assert!(mended_wait(&leader_entry(230, Some(10), 1 << 9), 1 << 9).is_some());
        assert!(mended_wait(&leader_entry(230, Some(10), 1 << 8), 0).is_none());
        assert!(mended_wait(&leader_entry(230, None, 0), 1 << 9).is_none());
    }

    #[test]
    fn a_signal_for_the_process_ends_the_wait_of_its_threads() {
        let dir = tempfile::tempdir().unwrap();
        let info = nested(1, &nested(1, &[10, 0, 0, 0]));
        let leader = [numbers(&[(1, 1)]), nested(3, &nested(10, &info))].concat();
        let thread = core_entry(202, waits::INTERRUPTED, None, 0);
        write(dir.path(), "core-1.img", Kind::Core, &[leader]);
        write(dir.path(), "core-2.img", Kind::Core, &[thread]);
        assert_eq!(mend(dir.path(), &host()).unwrap().waits, 0);
    }

    fn mapping(gib: u64, flags: u64) -> Vec<u8> {
        let start = 0x1000;
        let fields = [(1, start), (2, start + (gib << 30)), (5, 0), (6, flags), (7, 1)];
        nested(14, &numbers(&fields))
    }

    #[test]
    fn large_private_reservations_get_noreserve_or_no_parent() {
        let dir = tempfile::tempdir().unwrap();
        let (private, shared, no_reserve, huge) = (0x22, 0x21, 0x4022, 0x4_0022);
        let process = |large| {
            let mappings = [
                mapping(400, large),
                mapping(4, private),
                mapping(400, shared),
                mapping(400, huge),
            ];
            [vec![numbers(&[(12, 3)])], mappings.to_vec(), vec![numbers(&[(15, 1)])]]
                .concat()
                .concat()
        };
        let before = process(private);
        write(dir.path(), "mm-7.img", Kind::Mm, std::slice::from_ref(&before));
        let never = Host { overcommit: Overcommit::Never, ..host() };
        let mended = mend(dir.path(), &never).unwrap();
        assert_eq!(mended.whole.iter().collect::<Vec<_>>(), ["pagemap-7"]);
        assert_eq!(read(dir.path(), "mm-7.img", Kind::Mm), [before]);
        let always = Host { overcommit: Overcommit::Always, ..host() };
        assert_eq!(mend(dir.path(), &always).unwrap().reservations, 0);
        let mended = mend(dir.path(), &host()).unwrap();
        assert_eq!((mended.reservations, mended.whole.len()), (1, 0));
        assert_eq!(read(dir.path(), "mm-7.img", Kind::Mm), [process(no_reserve)]);
    }

    #[test]
    fn an_image_that_does_not_parse_stays_and_is_named() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("files.img"), b"\x19\x43\x56\x54\x38\x31\x30\x56\x09\0\0\0")
            .unwrap();
        fs::write(dir.path().join("core-1.img"), b"nothing").unwrap();
        fs::write(dir.path().join("tmpfs-dev-1.tar.gz.img"), b"any").unwrap();
        let mended = mend(dir.path(), &host()).unwrap();
        let unread: Vec<String> = mended.unread.iter().map(ToString::to_string).collect();
        assert_eq!(
            unread,
            [
                "core-1.img at offset 0: the magic numbers are another image's",
                "files.img at offset 8: a message is cut off",
            ]
        );
        assert_eq!(fs::read(dir.path().join("core-1.img")).unwrap(), b"nothing");
    }

    #[test]
    fn memory_and_swap_are_added() {
        assert_eq!(memory_bytes("MemTotal: 8 kB\nMemFree: 1 kB\nSwapTotal:  2 kB\n"), 10 << 10);
    }
}
