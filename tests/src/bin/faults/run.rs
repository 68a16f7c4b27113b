//! One run, from what the nodes held before to what they hold after it.

use std::cell::RefCell;
use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use godwit_tests::Background;
use godwit_tests::command::wait_until;
use godwit_tests::images::Image;
use godwit_tests::ledger;
use godwit_tests::workload::{self, Container};

use crate::cell::{Cell, Fault, Phase, Role};
use crate::holdings::Holdings;
use crate::judge;
use crate::phase::Watcher;
use crate::settle::{self, Settled};
use crate::site::Site;
use crate::strike::{Mending, mend, strike};

/// Steps that a ledger makes before its migration begins.
const STEPS_BEFORE: u64 = 40;
const SOON: Duration = Duration::from_secs(20);
/// How long a client may take to end once nothing is broken any more.
const CLIENT_MAX: Duration = Duration::from_secs(330);
const PAUSE: Duration = Duration::from_millis(20);
/// How long a removal is tried.
const REMOVAL_MAX: Duration = Duration::from_secs(60);

/// Where a run left its container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Completed,
    RolledBack,
    KilledByFault,
    /// In none of these states: a promise is broken.
    Unsettled,
}

/// Promises that a run broke, in words.
#[derive(Clone, Debug, Default)]
pub(crate) struct Broken {
    pub(crate) lost: Vec<String>,
    pub(crate) double_runner: Vec<String>,
    pub(crate) torn: Vec<String>,
    pub(crate) frozen: Vec<String>,
    pub(crate) mute: Vec<String>,
    pub(crate) leaked: Vec<String>,
}

impl Broken {
    fn by_name(&self) -> [(&'static str, &Vec<String>); 6] {
        [
            ("lost", &self.lost),
            ("double runner", &self.double_runner),
            ("torn", &self.torn),
            ("frozen", &self.frozen),
            ("mute", &self.mute),
            ("leaked", &self.leaked),
        ]
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.by_name().iter().all(|(_, texts)| texts.is_empty())
    }
}

/// What came of a run.
#[derive(Clone, Debug)]
pub(crate) struct Outcome {
    pub(crate) end: End,
    pub(crate) broken: Broken,
    /// Phase and fault of each strike that met something.
    pub(crate) struck: Vec<(&'static str, String)>,
    /// What the run showed besides that no count stands for.
    pub(crate) notes: Vec<String>,
    took: Duration,
}

impl Outcome {
    /// A run that could not be made to its end: nothing is known of the container.
    pub(crate) fn broken(error: &anyhow::Error) -> Self {
        let lost = vec![format!("the run failed: {error:#}")];
        let broken = Broken { lost, ..Broken::default() };
        let (struck, notes, took) = (Vec::new(), Vec::new(), Duration::ZERO);
        Self { end: End::Unsettled, broken, struck, notes, took }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let end = match self.end {
            End::Completed => "completed",
            End::RolledBack => "rolled back",
            End::KilledByFault => "killed by the fault",
            End::Unsettled => "unsettled",
        };
        write!(f, "{end}, {:.1} s", self.took.as_secs_f64())?;
        for (phase, fault) in &self.struck {
            write!(f, "; {fault} at {phase}")?;
        }
        for (name, texts) in self.broken.by_name() {
            for text in texts {
                write!(f, "\n    {name}: {text}")?;
            }
        }
        self.notes.iter().try_for_each(|note| write!(f, "\n    note: {note}"))
    }
}

/// What a run calls its things, and clients of further migrations.
pub(crate) struct Names {
    pub(crate) container: String,
    tree: bool,
    block: bool,
    memory_mib: u32,
    clients: RefCell<Vec<Background>>,
    /// Whether a container beside the ledger was started by a fault.
    pub(crate) other_has_started: std::cell::Cell<bool>,
}

impl Names {
    fn of(site: &Site, cell: &Cell) -> Self {
        // No other bed of this machine has loop devices of that name; networks have short ones.
        let container = format!("f{}x{}", site.bed().number(), cell.seed % 1_000_000);
        let clients = RefCell::new(Vec::new());
        let (tree, block, memory_mib) = (cell.tree, cell.block, cell.memory_mib);
        let other_has_started = std::cell::Cell::new(false);
        Self { container, tree, block, memory_mib, clients, other_has_started }
    }

    pub(crate) fn tree(&self) -> String {
        format!("{}-t", self.container)
    }

    fn block(&self) -> String {
        format!("{}-b", self.container)
    }

    pub(crate) fn second_user(&self) -> String {
        format!("{}-u", self.container)
    }

    /// Volumes with further arguments of `godwit volume create`, and where they are mounted.
    fn volumes(&self) -> Vec<(String, &'static [&'static str], &'static str)> {
        let mut volumes: Vec<(String, &'static [&'static str], _)> = Vec::new();
        if self.tree {
            volumes.push((self.tree(), &[], "/tree"));
        }
        if self.block {
            volumes.push((self.block(), &["--kind", "block", "--size", "32M"], "/block"));
        }
        volumes
    }

    /// Directories in the container that have a file of the ledger.
    pub(crate) fn places(&self) -> Vec<&'static str> {
        let mounted = self.volumes().into_iter().map(|(_, _, at)| at);
        ["/"].into_iter().chain(mounted).collect()
    }

    /// A container beside the ledger.
    pub(crate) fn other<'a>(&self, name: &'a str) -> Container<'a> {
        Container::new(name, Image::Probe)
    }

    /// The words of a migration.
    pub(crate) fn migrate(&self, from: &str, to: &str, mode: &str) -> Vec<String> {
        let words = ["godwit", "--output", "json", "migrate", &self.container];
        let options = ["--from", from, "--to", to, "--mode", mode];
        words.iter().chain(&options).map(|word| (*word).to_owned()).collect()
    }

    /// Keeps the client of a further migration until the run ends.
    pub(crate) fn keep(&self, client: Background) {
        self.clients.borrow_mut().push(client);
    }

    /// Whether the clients of further migrations have ended.
    pub(crate) fn others_have_ended(&self) -> Result<bool> {
        let mut clients = self.clients.borrow_mut();
        clients.iter_mut().try_fold(true, |all, client| Ok(all & client.ended()?.is_some()))
    }

    /// Makes the container's network at a node, with a route to the witness.
    pub(crate) fn add_network(&self, site: &Site, index: usize) -> Result<()> {
        let number = u8::try_from(index)?;
        let address = site.bed().container_address(number);
        site.node(index).add_network(&self.container, address)?;
        ledger::route(site.node(index), &self.container)
    }

    fn start(&self, site: &Site) -> Result<()> {
        let source = site.node(Role::Source.index());
        for index in 0..site.nodes().len() {
            self.add_network(site, index)?;
        }
        let mut container = Container::new(&self.container, Image::Probe).network(&self.container);
        for (id, options, at) in self.volumes() {
            source.ok(&[&["godwit", "volume", "create", &id], options].concat())?;
            container = container.volume(&id, at, "rw");
        }
        let (witness, memory) = (ledger::address().to_string(), self.memory_mib.to_string());
        let mut words = vec!["probe", "ledger", &witness, &memory];
        words.extend(self.places());
        container.command(&words).start(source)?;
        wait_until("the ledger begins", SOON, || {
            let last = site.witness().last_at(Role::Source.index());
            Ok(last.is_some_and(|step| step.counter >= STEPS_BEFORE))
        })
    }

    /// Removes everything of the run, as an operator does. Retries while something is being ended.
    fn remove(&self, site: &Site) -> Result<()> {
        let (name, user) = (&self.container, self.second_user());
        let volumes: Vec<String> = self.volumes().into_iter().map(|(id, ..)| id).collect();
        let script = format!(
            "for name in {name} {user}; do
                 ctr tasks rm -f $name; ctr containers rm $name
             done > /dev/null 2>&1
             for volume in {}; do godwit volume rm $volume; done > /dev/null 2>&1
             ctr containers ls -q | grep {name}; ctr tasks ls -q | grep {name}; godwit volume ls | grep {name}; true",
            volumes.join(" ")
        );
        for node in site.nodes() {
            let begin = Instant::now();
            loop {
                let left = node.ok(&["sh", "-c", &script])?;
                if left.trim().is_empty() || begin.elapsed() > REMOVAL_MAX {
                    break;
                }
                std::thread::sleep(10 * PAUSE);
            }
            node.run(&["sh", "-c", &format!("ip netns del {name}; ip link del v-{name}")])?;
        }
        Ok(())
    }
}

/// Makes one run. Errors: the bed fails, which says nothing of the programs.
pub(crate) fn run(site: &Site, cell: &Cell) -> Result<Outcome> {
    let begin = Instant::now();
    let names = Names::of(site, cell);
    site.witness().forget();
    let before = Holdings::of(site, &names.container)?;
    names.start(site).context("start the ledger")?;

    let mut watcher = Watcher::start(site, &names.container, cell.seed)?;
    let from = site.node(Role::Source.index()).name();
    let to = site.node(Role::Destination.index()).name();
    let words = names.migrate(from, to, cell.mode);
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let log = format!("migrate-{}", cell.seed);
    let mut client = site.node(cell.client_at.index()).spawn(&words, &log)?;

    let mut mendings = Vec::new();
    let mut notes = Vec::new();
    let mut struck: Vec<(Phase, Fault)> = Vec::new();
    for (wanted, fault) in cell.faults() {
        let phase = watcher.wait_for(wanted, &mut client)?;
        match strike(site, cell, &names, fault) {
            Ok(Some(more)) => {
                mendings.extend(more);
                struck.push((phase, fault));
            }
            Ok(None) => notes.push(format!("{} met nothing", fault.word())),
            // The first fault may have taken the node away.
            Err(error) if !struck.is_empty() => notes.push(format!("{}: {error:#}", fault.word())),
            Err(error) => return Err(error.context(fault.word())),
        }
    }
    while !mendings.is_empty() {
        mend_due(site, &names, &mut mendings)?;
        std::thread::sleep(PAUSE);
    }
    for (index, role) in [(0, Role::Source), (1, Role::Destination)] {
        crate::strike::ensure_daemon(site.node(index), role)?;
    }
    // One whose daemon died has been told so; one that was stopped goes on.
    let over = wait_until("the migration is over", CLIENT_MAX, || {
        Ok(client.ended()?.is_some() && names.others_have_ended()? && watcher.is_over()?)
    });
    if over.is_err() {
        notes.push(format!("the migration is not over after {} s", CLIENT_MAX.as_secs()));
    }
    drop(watcher);
    let code = client.ended()?;
    let may_end = struck.iter().any(|(phase, fault)| fault.may_end_the_container(*phase));
    let settled = settle::settle(site, &names, may_end)?;
    let mut broken = Broken::default();
    let judged = judge::judge(site, cell, &names, &settled, &struck, &mut broken)?;
    notes.extend(judge::words(code, &client.log(), &settled));
    notes.extend(judged);
    drop(client);
    names.clients.borrow_mut().clear();
    names.remove(site)?;
    broken.leaked.extend(before.differences(site, &names.container)?);
    if struck.iter().any(|(_, fault)| fault.takes_resources()) {
        broken.leaked.extend(still_migrates(site, &names)?);
    }
    let struck = struck.iter().map(|(phase, fault)| (phase.word(), fault.word())).collect();
    Ok(Outcome { end: end(&settled), broken, struck, notes, took: begin.elapsed() })
}

/// With room again, the next migration completes. Returns why it does not.
fn still_migrates(site: &Site, names: &Names) -> Result<Option<String>> {
    let [from, to] = Role::BOTH.map(|role| site.node(role.index()));
    let next = format!("{}-n", names.container);
    names.other(&next).command(&["probe", "idle"]).start(from)?;
    let done = workload::migrate(from, &next, from, to, &[])?;
    for node in [from, to] {
        node.run(&["ctr", "tasks", "rm", "-f", &next])?;
        node.run(&["ctr", "containers", "rm", &next])?;
    }
    Ok((!done.succeeded()).then(|| format!("the next migration fails: {done}")))
}

fn mend_due(site: &Site, names: &Names, mendings: &mut Vec<Mending>) -> Result<()> {
    mend(site, names, mendings).context("mend what a fault broke")
}

fn end(settled: &Settled) -> End {
    match settled {
        Settled::Runs { index: 0, .. } => End::RolledBack,
        Settled::Runs { .. } => End::Completed,
        Settled::Ended => End::KilledByFault,
        Settled::Not(_) => End::Unsettled,
    }
}
