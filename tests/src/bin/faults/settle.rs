//! Waiting until a run has come to an end: the container runs at one node, or has ended as the
//! fault allows.

use std::time::{Duration, Instant};

use anyhow::Result;
use godwit_tests::Node;
use godwit_tests::command::wait_until;

use crate::run::Names;
use crate::site::Site;

/// Longest time until a container runs again at one node and nowhere else, once everything that was
/// broken is mended.
const SETTLE_MAX: Duration = Duration::from_secs(120);
/// How long nothing may run before a container counts as ended.
const ENDED_AFTER: Duration = Duration::from_secs(4);
/// How long a container that runs may be unheard.
const UNHEARD_MAX: Duration = Duration::from_secs(20);
/// How long its steps are watched once it has settled.
const WATCHED: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(150);

/// What a node shows of a container.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seen {
    /// The task's state, in containerd's words.
    pub(crate) task: Option<String>,
    /// Its process, by the node's own number.
    pub(crate) pid: Option<u32>,
}

impl Seen {
    fn is(&self, state: &str) -> bool {
        self.task.as_deref() == Some(state)
    }
}

/// How a run settled.
#[derive(Clone, Debug)]
pub(crate) enum Settled {
    /// At one node, and nowhere else.
    Runs { index: usize, pid: u32, is_heard: bool },
    /// Nowhere, as the fault allows.
    Ended,
    /// Neither within [`SETTLE_MAX`]: the tasks' states by node.
    Not(Vec<Option<String>>),
}

/// What a node shows of the container `name`.
pub(crate) fn look(node: &Node, name: &str) -> Result<Seen> {
    let listed = node.ok(&["ctr", "tasks", "ls"])?;
    let line = listed.lines().find(|line| line.split_whitespace().next() == Some(name));
    let mut words = line.unwrap_or_default().split_whitespace().skip(1);
    let pid = words.next().and_then(|word| word.parse().ok());
    Ok(Seen { task: words.next().map(str::to_owned), pid })
}

/// Waits. `may_end` tells whether the container may be gone.
pub(crate) fn settle(site: &Site, names: &Names, may_end: bool) -> Result<Settled> {
    let begin = Instant::now();
    let mut nothing_since = None;
    loop {
        let seen = site.nodes().iter().map(|node| look(node, &names.container));
        let seen = seen.collect::<Result<Vec<Seen>>>()?;
        let namesake = |seen: &&Seen| !seen.is("STOPPED");
        let tasks: Vec<usize> = (0..seen.len()).filter(|&at| seen[at].task.is_some()).collect();
        let others = tasks.iter().filter(|&&at| seen[at].is("PAUSED")).count();
        let running: Vec<usize> =
            tasks.iter().copied().filter(|&at| seen[at].is("RUNNING")).collect();
        // The witness, which has never heard of a namesake, tells it from the ledger.
        let ledgers: Vec<usize> =
            running.iter().copied().filter(|&at| site.witness().last_at(at).is_some()).collect();
        if let ([index], 0) = (&ledgers[..], others) {
            let (index, pid) = (*index, seen[*index].pid.unwrap_or(0));
            let is_heard = is_heard(site, index);
            std::thread::sleep(WATCHED);
            return Ok(Settled::Runs { index, pid, is_heard });
        }
        let is_nothing = ledgers.is_empty()
            && others == 0
            && !tasks.iter().any(|&at| {
                namesake(&&seen[at])
                    && site.witness().last_at(at).is_some()
                    && !seen[at].is("UNKNOWN")
            });
        let since = *nothing_since.get_or_insert_with(Instant::now);
        if !is_nothing {
            nothing_since = None;
        } else if may_end && since.elapsed() > ENDED_AFTER {
            return Ok(Settled::Ended);
        }
        if begin.elapsed() > SETTLE_MAX {
            return Ok(Settled::Not(seen.into_iter().map(|seen| seen.task).collect()));
        }
        std::thread::sleep(PAUSE);
    }
}

/// Whether the witness hears further steps of a node.
fn is_heard(site: &Site, index: usize) -> bool {
    let last = || site.witness().last_at(index).map(|step| (step.life, step.counter));
    let before = last();
    wait_until("further steps are heard", UNHEARD_MAX, || Ok(last() != before)).is_ok()
}
