//! Terminals, and processes that are added after a move.

use anyhow::{Result, ensure};
use godwit_tests::command::wait_until;
use godwit_tests::images::Image;
use godwit_tests::workload::Container;

use crate::bed::{self, SOON, destination, source};
use crate::table::rows;

rows! {
    a_terminal_moves_and_can_be_attached: "a terminal", Moves,
        "`ctr tasks attach` works after it; output that no client reads is discarded, the oldest first"
        => is_attached();
    a_terminal_nobody_attaches_holds_nothing: "a terminal with output that no client reads", Moves,
        "the container does not wait for a client" => prints_on();
    an_exec_reads_the_clock_of_init: "a process added by exec after the move", Moves,
        "it is in the time namespace of the container's first process" => shares_the_clock();
}

/// A container whose first process has a terminal. `ctr` wants one of its own for that.
fn start(name: &str, script: &str) -> Result<()> {
    let container = Container::new(name, Image::Busybox).options(&["-t"]);
    let container = container.command(&["sh", "-c", script]);
    let words: Vec<String> = container.words().iter().map(|word| format!("'{word}'")).collect();
    source().ok(&["script", "-q", "-e", "-c", &words.join(" "), "/dev/null"]).map(drop)
}

/// What a client that attaches to the container and types `line` sees within two seconds.
fn attached(name: &str, line: &str) -> Result<String> {
    let attach = format!("ctr tasks attach {name}");
    let typed = format!("(sleep 0.5; echo '{line}'; sleep 2)");
    let run = format!("{typed} | timeout -s KILL 2 script -q -c '{attach}' /dev/null || :");
    destination().sh(&run)
}

/// Method: the shell in the container calculates, so the answer is not the echo of what was typed.
fn is_attached() -> Result<()> {
    let name = "tty";
    start(name, "while read line; do eval \"$line\"; done")?;
    bed::moved(name)?;
    for round in 1..=2 {
        let seen = attached(name, &format!("echo answer $((6 * 7 + {round})) ; tty"))?;
        ensure!(seen.contains(&format!("answer {}", 42 + round)), "round {round}: {seen:?}");
        ensure!(seen.contains("/dev/"), "round {round}: no terminal: {seen:?}");
    }
    let left = source().sh("find /run/containerd/fifo -type p 2>/dev/null || :")?;
    ensure!(!left.contains(name), "left at the source: {left}");
    bed::remove(destination(), name)?;
    let left = destination().sh("find /run/godwit-streams -type p")?;
    ensure!(!left.contains(name), "left at the destination: {left}");
    Ok(())
}

/// Method: far more than terminal and FIFO hold, and a count of the lines in a file.
fn prints_on() -> Result<()> {
    let name = "tty-unread";
    let script = "i=0; while [ ! -e /go ]; do usleep 20000; done; \
                  while :; do i=$((i+1)); printf %1000d\\\\n $i; echo $i > /count; done";
    start(name, script)?;
    bed::moved(name)?;
    destination().ok(&["ctr", "tasks", "exec", "--exec-id", "go", name, "touch", "/go"])?;
    wait_until("it prints on", SOON, || {
        let count = bed::file(destination(), name, "/count").unwrap_or_default();
        Ok(count.trim().parse().unwrap_or(0) > 1000)
    })?;
    bed::remove(destination(), name)
}

/// Method: the links of the two namespaces; a restored container has one that is not the node's.
fn shares_the_clock() -> Result<()> {
    let name = "clock";
    let container = Container::new(name, Image::Busybox);
    let script = "while :; do usleep 100000; done";
    container.command(&["sh", "-c", script]).start(source())?;
    bed::moved(name)?;
    let exec = ["ctr", "tasks", "exec", "--exec-id", "clock", name, "readlink"];
    let links = ["/proc/self/ns/time", "/proc/1/ns/time"];
    let namespace = |link: &str| destination().ok(&[&exec[..], &[link]].concat());
    let (of_added, of_init) = (namespace(links[0])?, namespace(links[1])?);
    ensure!(of_added == of_init, "{of_added} is not the {of_init} of init");
    let of_node = destination().ok(&["readlink", links[0]])?;
    ensure!(of_init != of_node, "the container has no clock of its own");
    bed::remove(destination(), name)
}
