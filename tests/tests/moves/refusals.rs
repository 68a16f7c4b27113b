//! What CRIU cannot dump: refused before the freeze, by name and with what to do.

use anyhow::{Result, ensure};

use crate::bed::{self, probe, source};
use crate::table::rows;

rows! {
    what_criu_cannot_dump_is_named: "io_uring, memfd_secret, userfaultfd, Landlock rule sets, POSIX message queues; sockets of vsock, AF_ALG, SCTP", Refused, "close them, or start the program without them" => undumped();
    a_sandbox_is_named: "a process id, user or network namespace inside the container", Refused, "also by `godwit snapshot create`; run the program without its sandbox" => nested();
    a_traced_process_is_named: "a process that a debugger traces", Refused, "detach the debugger" => traced();
}

/// The word of the probe's line, and those of the refusal.
const UNDUMPED: &[(&str, &[&str])] = &[
    ("io_uring", &["an io_uring", "ENOSYS"]),
    ("memfd_secret", &["memory of memfd_secret"]),
    ("userfaultfd", &["a userfaultfd"]),
    ("landlock", &["a Landlock rule set"]),
    ("mqueue", &["the POSIX message queue /probe"]),
    ("vsock", &["a vsock socket"]),
    ("alg", &["AF_ALG (kernel cryptography) socket"]),
    ("sctp", &["a socket of SCTP"]),
];

fn undumped() -> Result<()> {
    let name = "undumped";
    bed::start(&probe(name, &["undumped"]))?;
    let line = bed::status(source(), name)?;
    let held: Vec<&str> = line.split_whitespace().skip(1).collect();
    for certain in ["io_uring", "memfd_secret", "mqueue"] {
        ensure!(held.contains(&certain), "this kernel gives no {certain}: {line}");
    }
    let words = UNDUMPED.iter().filter(|(word, _)| held.contains(word));
    let words: Vec<&str> = words.flat_map(|(_, words)| words.iter().copied()).collect();
    bed::is_refused(name, &[&["process 1 (probe)", "CRIU cannot dump"][..], &words].concat())?;
    bed::remove(source(), name)
}

fn nested() -> Result<()> {
    let name = "nested";
    bed::start(&probe(name, &["nested"]))?;
    bed::is_refused(name, &["(sleep)", "process id namespace of its own", "sandbox"])?;
    for options in [
        &["godwit", "snapshot", "create", name][..],
        &["godwit", "snapshot", "create", "--consistent", name],
    ] {
        let taken = source().run(options)?;
        ensure!(!taken.succeeded() && taken.stderr.contains("process id namespace"), "{taken:?}");
    }
    let listed = source().ok(&["godwit", "snapshot", "list"])?;
    ensure!(!listed.contains(name), "a snapshot of it is kept: {listed}");
    source().ok(&["godwit", "check"])?;
    bed::remove(source(), name)
}

fn traced() -> Result<()> {
    let name = "traces";
    bed::start(&probe(name, &["traces"]))?;
    bed::is_refused(name, &["(sleep) is traced by process 1 (probe)", "detach"])?;
    bed::remove(source(), name)
}
