//! Why CRIU failed, in one line.
//!
//! CRIU's exit says only that it failed; the reason is in `dump.log` or `restore.log`, in lines
//! such as `(00.036461)      1: Error (criu/files-reg.c:2175): File data/log has bad size 87
//! (expect 60)`. The first error is nearly always the cause and the later ones its consequences,
//! but some lines marked as errors are harmless and come before it. [`reason`] picks the cause and
//! adds what to do about the known ones.
//!
//! The text holds names that the container chose: control characters are replaced, lengths are
//! capped.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::Path;

/// How much of the end of a log is looked at, in bytes. CRIU stops soon after the cause; a log of a
/// hundred processes at the most verbose level has about 1 MiB.
const LOG_BYTES_MAX: u64 = 4 << 20;

/// Longest message kept, in bytes, without place and hint.
const MESSAGE_BYTES_MAX: usize = 400;

/// Marked as errors, printed by runs that succeed.
const HARMLESS: &[&str] = &[
    "rlimit: Can't setup RLIMIT_NOFILE for self",
    "Can't setup prctl PR_SET_IO_FLUSHER",
    "cg: cgroupd: recv req error",
    "Unable to move self to the root cgroup",
];

/// What follows from an error somewhere else; told only when there is nothing better.
const CONSEQUENCES: &[&str] = &[
    "exited, status=",
    "killed by signal",
    "Restoring FAILED",
    "Dumping FAILED",
    "Dump files",
    "Dump opened files failed",
    "Collect fixups failed",
    "Error dumping",
    "Unable to get a fd",
];

/// A part of a message, and what to do when it appears.
const HINTS: &[(&str, &str)] = &[
    ("file locks are hold", "the container holds file locks: allow CRIU's file-locks option"),
    ("[io_uring]", "io_uring cannot be dumped: deny io_uring_setup by seccomp"),
    ("secretmem", "memory of memfd_secret cannot be dumped: start the program without it"),
    ("[userfaultfd]", "a process that uses userfaultfd cannot be dumped"),
    ("[bpf", "a process that holds BPF objects cannot be dumped"),
    ("[perf_event]", "a process that holds perf events cannot be dumped"),
    ("No mapping for", "a mount of the container is missing at the destination"),
    ("in parent pagemap", "the staged memory lacks a page that the last difference builds on"),
    ("has bad size", "a file the container has open or mapped differs at the destination"),
    (
        "Can't get 1:16 opt",
        "CRIU before 4.2 cannot dump internet sockets on Linux 6.16 and later: install CRIU 4.2",
    ),
    (
        "Can't get 1:34 opt",
        "CRIU before 4.2 cannot dump internet sockets on Linux 6.16 and later: install CRIU 4.2",
    ),
    ("Can't get rlimit", "CRIU needs CAP_SYS_RESOURCE to dump processes of other users"),
    ("page-pipe: splice", "CRIU needs CAP_SYS_RESOURCE to move pages through large pipes"),
    ("Connected TCP socket", "the container has connections: allow CRIU's tcp-established option"),
    ("In-flight connection", "a connection awaits its accept: allow CRIU's skip-in-flight option"),
    ("size, increase limit", "a deleted file is still open and large: raise CRIU's ghost-limit"),
    (
        "half of stream unix connection",
        "the container is connected to a Unix socket outside: close that connection first",
    ),
    (
        "External socket is used",
        "a process outside the container, such as one of exec, is connected to its Unix socket: end it first",
    ),
    ("task not stopped after seize", "a process is traced by a debugger: detach it first"),
    (
        "Unsupported proto 262",
        "MPTCP sockets cannot be dumped: start the container with the annotation godwit.io/mptcp=no",
    ),
    ("Unsupported proto", "a socket of this protocol cannot be dumped: close it first"),
    (
        "Can't dump that handle",
        "a watched directory has no path that CRIU finds: watch one that stays",
    ),
    ("half of dgram unix connection", "the container is connected to a Unix socket outside"),
    (
        "Can't lookup mount=",
        "a file lies on a mount CRIU cannot see, such as a POSIX message queue",
    ),
    ("Unknown socket collected", "a socket of this family cannot be dumped"),
    ("dump more than one netns", "a second network namespace in the container cannot be dumped"),
    ("nested pid namespace", "a second pid namespace in the container cannot be dumped"),
    ("Tracking memory is not available", "this kernel has no soft-dirty bits: no parent images"),
    ("another root than mntns", "the container runs under a chroot, not under its own root"),
    ("do not match run time", "the processor lacks features that the source's has"),
    ("xsave size mismatch", "the processor lacks features that the source's has"),
    ("unsupported bits", "the processor lacks features that the source's has"),
    ("Can't fork for", "a process id of the container is taken at the destination"),
    ("of that type", "a file descriptor of this kind cannot be dumped"),
    ("No space left on device", "the disk is full"),
    (
        "Unable to map ANON_VMA",
        "a mapping of the container is larger than memory and swap of the destination: \
         set vm.overcommit_memory=1 there",
    ),
    (
        "Cannot allocate memory",
        "memory is short at the destination, or the container's memory limit there is too small",
    ),
    (
        "execvp(\"iptables-restore\"",
        "iptables is missing: install it, or use network-lock nftables",
    ),
];

/// CRIU's own reason for a failure, in one line, from the `dump.log` or `restore.log` at `path`.
///
/// The line is the message, its place in CRIU's source in parentheses, and for the well-known ones
/// a hint after a semicolon. `None` if there is no such file or no error in it. Reads the last 4
/// MiB at most.
pub fn reason(path: &Path) -> Option<String> {
    let mut file = File::open(path).ok()?;
    let len = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(len.saturating_sub(LOG_BYTES_MAX))).ok()?;
    let mut bytes = Vec::new();
    file.take(LOG_BYTES_MAX).read_to_end(&mut bytes).ok()?;
    reason_of(&String::from_utf8_lossy(&bytes))
}

/// As [`reason`], from the text of a log.
pub fn reason_of(log: &str) -> Option<String> {
    let causes = || {
        log.lines()
            .filter_map(LogError::parse)
            .filter(|error| !error.says_one_of(HARMLESS) && !error.message.is_empty())
    };
    // A message we can explain tells more than one we cannot, wherever it stands.
    let chosen = causes()
        .find(|error| error.hint().is_some())
        .or_else(|| causes().find(|error| !error.says_one_of(CONSEQUENCES)))
        .or_else(|| causes().next())?;
    Some(chosen.to_line())
}

/// One line `... Error (PLACE): MESSAGE`.
#[derive(Clone, Copy)]
struct LogError<'a> {
    place: &'a str,
    message: &'a str,
}

impl<'a> LogError<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let (before, after) = line.split_once("Error (")?;
        // Time and process id stand before; anything else quotes the word in the middle of a
        // message.
        let is_prefix = |c: char| c.is_ascii_digit() || " ().:".contains(c);
        if !before.chars().all(is_prefix) {
            return None;
        }
        let (place, message) = after.split_once("):")?;
        Some(Self { place, message: message.trim() })
    }

    fn says_one_of(self, parts: &[&str]) -> bool {
        parts.iter().any(|part| self.message.contains(part))
    }

    fn hint(self) -> Option<&'static str> {
        HINTS.iter().find(|(part, _)| self.message.contains(part)).map(|(_, hint)| *hint)
    }

    fn to_line(self) -> String {
        let mut end = self.message.len().min(MESSAGE_BYTES_MAX);
        while !self.message.is_char_boundary(end) {
            end -= 1;
        }
        let printable = |c: char| if c.is_control() { '?' } else { c };
        let mut line: String = self.message[..end].chars().map(printable).collect();
        if self.place.len() <= 80 {
            line.push_str(" (");
            line.extend(self.place.chars().map(printable));
            line.push(')');
        }
        if let Some(hint) = self.hint() {
            line.push_str("; ");
            line.push_str(hint);
        }
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HARMLESS_LINE: &str = "(00.000060) Error (criu/util.c:1534): rlimit: Can't setup \
                                 RLIMIT_NOFILE for self: Operation not permitted\n";

    #[test]
    fn the_cause_is_told_not_what_follows_from_it_nor_what_is_harmless() {
        let log = format!(
            "{HARMLESS_LINE}(00.036460)      1: Opening 0x00 for data/log\n\
             (00.036461)      1: Error (criu/files-reg.c:2175): File data/log has bad size 87 (expect 60)\n\
             (00.036502) Error (criu/cr-restore.c:1480): 12 exited, status=1\n\
             (00.037000) Error (criu/cr-restore.c:2447): Restoring FAILED.\n"
        );
        assert_eq!(
            reason_of(&log).as_deref(),
            Some(
                "File data/log has bad size 87 (expect 60) (criu/files-reg.c:2175); \
                 a file the container has open or mapped differs at the destination"
            )
        );
    }

    #[test]
    fn recorded_messages_come_with_a_hint() {
        let recorded = [
            (
                "(00.1) Error (criu/sockets.c:628): sockets: Can't get 1:16 opt: Operation not supported",
                "4.2",
            ),
            (
                "(00.1) Error (criu/cr-dump.c:371): Can't get rlimit 0: Operation not permitted",
                "CAP_SYS_RESOURCE",
            ),
            (
                "(00.1) Error (criu/proc_parse.c:479): Unknown shit 600 (anon_inode:[io_uring])",
                "io_uring",
            ),
            (
                "(00.1) Error (criu/mount.c:3130): mnt: No mapping for 1052:(null) mountpoint",
                "mount",
            ),
            (
                "(00.1) Error (criu/file-lock.c:110): Some file locks are hold by dumping tasks! You can try --file-locks to dump them.",
                "file-locks",
            ),
            (
                "(00.1) Error (criu/config.c:1128): Tracking memory is not available. Consider omitting --track-mem option.",
                "soft-dirty",
            ),
            (
                "(00.1) Error (criu/sk-unix.c:881): unix: Can't dump half of stream unix connection. name: ; peer name: /run/x",
                "Unix socket",
            ),
            (
                "(00.1) Error (criu/files-ext.c:94): Can't dump file 3 of that type [600] (unknown /memfd:secret)",
                "descriptor",
            ),
            (
                "(00.1)      1: Error (criu/mem.c:964): Unable to map ANON_VMA: Cannot allocate memory",
                "overcommit",
            ),
            (
                "(00.1) Error (criu/files-ext.c:94): Can't dump file 3 of that type [600] (unknown /secretmem (deleted))",
                "memfd_secret",
            ),
            (
                "(00.1) Error (criu/sk-inet.c:181): inet: Unsupported proto 262 for socket 3e",
                "godwit.io/mptcp=no",
            ),
            (
                "(00.1) Error (criu/sk-unix.c:874): unix: External socket is used. Consider using --ext-unix-sk option.",
                "Unix socket",
            ),
            (
                "(00.1) Error (compel/src/lib/infect.c:186): SEIZE 7: task not stopped after seize",
                "debugger",
            ),
            (
                "(00.1) Error (criu/sk-inet.c:200): inet: Connected TCP socket, consider using --tcp-established option.",
                "tcp-established",
            ),
        ];
        for (line, hint) in recorded {
            let told = reason_of(&format!("{HARMLESS_LINE}{line}\n")).unwrap();
            let (_, told_hint) = told.split_once("; ").unwrap_or_else(|| panic!("no hint: {told}"));
            assert!(told_hint.contains(hint), "{told}");
        }
    }

    #[test]
    fn a_consequence_is_better_than_nothing_and_no_error_is_none() {
        let log = format!("{HARMLESS_LINE}(00.2) Error (criu/cr-dump.c:2111): Dumping FAILED.\n");
        assert_eq!(reason_of(&log).as_deref(), Some("Dumping FAILED. (criu/cr-dump.c:2111)"));
        assert_eq!(reason_of(HARMLESS_LINE), None);
        assert_eq!(reason_of("(00.3) Dumping finished successfully\n"), None);
        assert_eq!(reason(Path::new("/nonexistent/dump.log")), None);
    }

    #[test]
    fn what_the_container_chose_cannot_forge_a_line_or_flood_it() {
        let name = "x\u{1b}[2J".repeat(400);
        let told = reason_of(&format!("(0.1) Error (criu/a.c:1): open {name}\n")).unwrap();
        assert!(told.len() < 500 && !told.contains('\u{1b}'), "{told}");
        assert_eq!(reason_of("(0.1) open a file called Error (criu/a.c:1): fake\n"), None);
    }

    #[test]
    fn only_the_end_of_a_long_log_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("dump.log");
        let mut log = "(00.1) some line of no interest\n".repeat(200_000);
        log.push_str("(09.9) Error (criu/x.c:7): the cause\n");
        std::fs::write(&path, log).unwrap();
        assert_eq!(reason(&path).as_deref(), Some("the cause (criu/x.c:7)"));
    }
}
