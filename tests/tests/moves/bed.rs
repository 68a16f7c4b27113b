//! The two nodes that all rows share, and how a row starts a container, moves it and reads its
//! state.

use std::sync::LazyLock;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use godwit_tests::command::wait_until;
use godwit_tests::images::{self, Image};
use godwit_tests::workload::{self, Container};
use godwit_tests::{Bed, BedOptions, Node};

/// The nodes; torn down at exit.
pub(crate) static BED: LazyLock<Bed> = LazyLock::new(|| {
    let bed = Bed::start(&BedOptions::nodes(2).rate_mbit(1000)).expect("the test nodes start");
    for image in [Image::Busybox, Image::Probe, Image::Memhog] {
        images::import(bed.node(0), image, "godwit").expect("images can be imported");
    }
    bed
});

/// Longest wait for a container to do something.
pub(crate) const SOON: Duration = Duration::from_secs(10);

/// Where containers start.
pub(crate) fn source() -> &'static Node {
    BED.node(0)
}

/// Where they move.
pub(crate) fn destination() -> &'static Node {
    BED.node(1)
}

/// A container that runs `probe` with these words.
pub(crate) fn probe<'a>(name: &'a str, words: &[&str]) -> Container<'a> {
    Container::new(name, Image::Probe).command(&[&["probe"], words].concat())
}

/// Process id, inside its node, of a container's init process.
pub(crate) fn init(at: &Node, name: &str) -> Result<u32> {
    let listed = at.ok(&["ctr", "tasks", "ls"])?;
    let line = listed.lines().find(|line| line.split_whitespace().next() == Some(name));
    let line = line.with_context(|| format!("no task {name} at {}: {listed}", at.name()))?;
    Ok(line.split_whitespace().nth(1).unwrap_or_default().parse()?)
}

/// A file of a running container, by its path in it.
pub(crate) fn file(at: &Node, name: &str, path: &str) -> Result<String> {
    at.sh(&format!("cat /proc/{}/root{path}", init(at, name)?))
}

/// The line in which a probe reports its state.
pub(crate) fn status(at: &Node, name: &str) -> Result<String> {
    file(at, name, "/status")
}

/// Starts a container at the source and waits until its probe has reported.
pub(crate) fn start(container: &Container<'_>) -> Result<()> {
    container.start(source())?;
    let name = container.name;
    wait_until("the probe reports", SOON, || Ok(status(source(), name).is_ok()))?;
    let line = status(source(), name)?;
    ensure!(!line.starts_with("failed"), "probe {name}: {line}");
    Ok(())
}

/// Removes the probe's line and waits for the next: what it says of itself from now on.
pub(crate) fn forget_status(at: &Node, name: &str) -> Result<()> {
    at.sh(&format!("rm /proc/{}/root/status", init(at, name)?))?;
    wait_until("the probe reports again", SOON, || Ok(status(at, name).is_ok()))
}

/// Waits until the probe's line holds for `is_right`; returns it. Errors: the last line.
pub(crate) fn status_becomes(
    at: &Node,
    name: &str,
    is_right: impl Fn(&str) -> bool,
) -> Result<String> {
    let mut line = String::new();
    let reached = wait_until("the probe's state is right", SOON, || {
        line = status(at, name)?;
        Ok(is_right(&line))
    });
    reached.with_context(|| format!("probe {name} at {}: {line}", at.name()))?;
    Ok(line)
}

/// Moves it to the destination; the report.
pub(crate) fn moved(name: &str) -> Result<serde_json::Value> {
    workload::migrated(source(), name, source(), destination(), &[])
}

/// `plan` and `migrate` refuse it with these words, and it runs on at the source without having
/// been frozen.
pub(crate) fn is_refused(name: &str, words: &[&str]) -> Result<()> {
    let plan = ["godwit", "plan", name, "--from", "edge-a", "--to", "edge-b"];
    let plan = source().run(&plan)?.ok().expect_err("plan says that it moves").to_string();
    let done = workload::migrate(source(), name, source(), destination(), &[])?;
    let migrate = done.ok().expect_err("it was moved").to_string();
    for (from, text) in [("plan", &plan), ("migrate", &migrate)] {
        for word in words {
            ensure!(text.contains(word), "{from} does not say {word:?}: {text}");
        }
        ensure!(!text.contains("frozen"), "{from}: it was frozen first: {text}");
    }
    let state = workload::task(source(), name)?;
    ensure!(state.as_deref() == Some("RUNNING"), "{name} is {state:?} at the source");
    let tasks = destination().ok(&["ctr", "containers", "ls", "-q"])?;
    ensure!(!tasks.lines().any(|line| line == name), "{name} is left at the destination");
    Ok(())
}

/// Removes a container from a node.
pub(crate) fn remove(at: &Node, name: &str) -> Result<()> {
    at.ok(&["ctr", "tasks", "rm", "-f", name])?;
    at.ok(&["ctr", "containers", "rm", name]).map(drop)
}
