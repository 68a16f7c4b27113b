//! Timers, sleeps, and containers that stand still.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use godwit_tests::Node;
use godwit_tests::command::wait_until;
use godwit_tests::images::Image;
use godwit_tests::workload::{self, Container};

use crate::bed::{self, SOON, destination, probe, source};
use crate::table::rows;

rows! {
    timerfds_go_on: "timerfds: periodic with an unread tick, absolute", Moves,
        "ticks go on in phase; a timer that has fired does not fire again" => timers();
    a_timer_of_an_alarm_clock_is_refused: "timerfds of alarm clocks", Refused,
        "use CLOCK_REALTIME or CLOCK_BOOTTIME" => alarm();
    a_sleep_in_a_system_call_is_not_interrupted: "a wait in a system call (`nanosleep`, `poll`, futex)", Moves,
        "the call runs again: it may wait longer, never shorter; also after a consistent snapshot" => sleep();
    a_user_s_pause_is_kept: "a container that is paused while it moves", Refused,
        "it stays paused" => paused();
}

/// A word of the timers' line, by the word before it.
fn count(line: &str, key: &str) -> Option<u64> {
    let mut words = line.split_whitespace();
    words.find(|word| *word == key)?;
    words.next()?.parse().ok()
}

fn timers() -> Result<()> {
    let name = "timers";
    bed::start(&probe(name, &["timers"]))?;
    // Old enough that a timer which lost its phase is far off.
    let many = |line: &str| count(line, "ticks") > Some(75);
    let before = bed::status_becomes(source(), name, many)?;
    let before = count(&before, "ticks").context("no ticks")?;
    bed::moved(name)?;
    let init = bed::init(destination(), name)?;
    destination().sh(&format!("touch /proc/{init}/root/ask"))?;
    let line = bed::status_becomes(destination(), name, |line| {
        count(line, "ticks") > Some(before + 50) && count(line, "late_ms") > Some(0)
    })?;
    ensure!(count(&line, "fired") == Some(1), "a timer fired twice: {line}");
    ensure!(count(&line, "late_ms") < Some(500), "a timer has lost its phase: {line}");
    bed::remove(destination(), name)
}

fn alarm() -> Result<()> {
    let name = "alarm";
    let runtime = ["--runtime", workload::RUNTIME, "--snapshotter", "godwit"];
    let right = ["--cap-add", "CAP_WAKE_ALARM", Image::Probe.reference(), name];
    let words = [&["ctr", "run", "-d"][..], &runtime, &right, &["probe", "alarm"]].concat();
    source().ok(&words)?;
    wait_until("the probe reports", SOON, || Ok(bed::status(source(), name).is_ok()))?;
    bed::status_becomes(source(), name, |line| line == "armed")?;
    bed::is_refused(name, &["alarm clock", "CLOCK_BOOTTIME"])?;
    bed::remove(source(), name)
}

/// Waits until the init process sleeps in `nanosleep` or `clock_nanosleep`. Errors: it has ended.
fn sleeps(at: &Node, name: &str) -> Result<()> {
    let init = bed::init(at, name)?;
    wait_until("it sleeps", SOON, || {
        let call = at.sh(&format!("cat /proc/{init}/syscall"))?;
        Ok(call.starts_with("35 ") || call.starts_with("230 "))
    })
}

fn sleep() -> Result<()> {
    let name = "sleep";
    let container = Container::new(name, Image::Busybox).command(&["sleep", "3600"]);
    container.start(source())?;
    sleeps(source(), name)?;
    source().ok(&["godwit", "snapshot", "create", "--consistent", name])?;
    sleeps(source(), name)?;
    bed::moved(name)?;
    sleeps(destination(), name)?;
    bed::remove(destination(), name)
}

/// Method: enough memory that pre-copy takes some seconds. The destination has the container before
/// it begins.
fn paused() -> Result<()> {
    let name = "paused";
    bed::start(&probe(name, &["ballast", "256"]))?;
    let (from, to) = (source(), destination());
    let words = ["godwit", "migrate", name, "--from", "edge-a", "--to", "edge-b"];
    let mut migration = from.spawn(&words, "paused")?;
    wait_until("the migration has begun", SOON, || {
        let there = to.ok(&["ctr", "containers", "ls", "-q"])?;
        Ok(there.lines().any(|line| line == name))
    })?;
    from.ok(&["ctr", "tasks", "pause", name])?;
    let code = migration.wait(Duration::from_secs(120))?;
    let said = migration.log();
    ensure!(code != 0 && said.contains("paused"), "exit code {code}: {said}");
    let state = workload::task(from, name)?;
    ensure!(state.as_deref() == Some("PAUSED"), "{name} is {state:?} at the source");
    from.ok(&["ctr", "tasks", "resume", name])?;
    let line = bed::status(from, name)?;
    bed::status_becomes(from, name, |now| now != line)?;
    bed::remove(from, name)
}
