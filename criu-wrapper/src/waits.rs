//! Waits in system calls that CRIU turns into `EINTR`, and which of them may run again.
//!
//! CRIU stops every thread by ptrace and saves its registers. A thread asleep in a system call then
//! has one of the kernel's restart codes as its result. CRIU restarts the call for most codes, but
//! for `ERESTART_RESTARTBLOCK` (`nanosleep`, `poll`, a futex with a timeout) the rest of the
//! timeout is known to the kernel only, so CRIU saves `EINTR` (`compel_get_task_regs` in
//! compel/arch/x86). Other calls return `EINTR` on any stop by themselves (signal(7), "Interruption
//! of system calls and library functions by stop signals"). No signal handler ran, so no program
//! expects either: busybox `sleep` exits.
//!
//! The saved registers still name the call while no handler has run: `orig_ax` holds its number. So
//! the call runs again with its first arguments. It may wait longer than asked for, never shorter.
//! [`crate::mend`] does that in images; a shim does it in a container that goes on at its source.
//!
//! Only x86-64 needs this. On aarch64 the kernel itself prepares the restart before a tracer sees
//! the registers. Three waits still return `EINTR`: a call of a 32-bit program; a call during which
//! an unblocked signal was pending at the dump, as its handler runs first; a call that the kernel
//! had restarted by `restart_syscall` before (after SIGCONT, for example), as its number is gone.

/// `EINTR` as system calls return it.
pub const INTERRUPTED: u64 = (-4_i64).cast_unsigned();

/// `ERESTARTNOHAND` as a tracer sees and sets it: the kernel restarts the call unless a signal
/// handler is to run.
pub const RESTART_IF_NO_HANDLER: u64 = (-514_i64).cast_unsigned();

/// Length of the instruction that enters the kernel, in bytes.
pub const ENTRY_BYTES: u64 = 2;

/// Code segment of 64-bit programs.
pub const CODE_SEGMENT: u64 = 0x33;

/// Numbers of the calls that may run again after `EINTR`.
///
/// A call qualifies if it had no effect when it returned `EINTR`. `connect` does not: it would
/// return `EALREADY`.
const CALLS: &[u64] = &[
    0,   // read: from a socket with SO_RCVTIMEO
    1,   // write: to a socket with SO_SNDTIMEO
    7,   // poll
    19,  // readv
    20,  // writev
    23,  // select: with a timeout that the kernel could not update
    35,  // nanosleep
    43,  // accept
    44,  // sendto
    45,  // recvfrom
    46,  // sendmsg
    47,  // recvmsg
    65,  // semop
    128, // rt_sigtimedwait
    202, // futex
    208, // io_getevents
    220, // semtimedop
    230, // clock_nanosleep
    232, // epoll_wait
    270, // pselect6
    271, // ppoll
    281, // epoll_pwait
    288, // accept4
    299, // recvmmsg
    333, // io_pgetevents
    441, // epoll_pwait2
];

/// Whether system call `number` of x86-64 may run again after `EINTR` that no handler caused.
pub fn may_run_again(number: u64) -> bool {
    CALLS.binary_search(&number).is_ok()
}

/// Whether these registers are of a 64-bit program whose call returned `EINTR` and may run again.
pub fn is_interrupted(ax: u64, orig_ax: u64, cs: u64) -> bool {
    cs == CODE_SEGMENT && ax == INTERRUPTED && may_run_again(orig_ax)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_harmless_calls_of_64_bit_programs_run_again() {
        assert!(CALLS.is_sorted());
        let connect = 42;
        let after_a_handler = u64::MAX;
        let restart_syscall = 219;
        for number in [connect, after_a_handler, restart_syscall] {
            assert!(!is_interrupted(INTERRUPTED, number, CODE_SEGMENT));
        }
        assert!(is_interrupted(INTERRUPTED, 35, CODE_SEGMENT));
        assert!(!is_interrupted(0, 35, CODE_SEGMENT));
        assert!(!is_interrupted(INTERRUPTED, 35, 0x23));
    }
}
