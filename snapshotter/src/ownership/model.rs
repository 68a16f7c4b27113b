//! The state machines of source and destination together, checked in every order of events.
//!
//! What is checked is what the daemon runs: [`Ledger::on`], [`Ledger::fate`], [`Ledger::recovery`],
//! [`Fate::at_source`] and [`Fate::at_destination`]. Around them is a world of three nodes that
//! hand one container to each other over a network which loses, repeats, delays and reorders, while
//! daemons, shims and machines stop between any two steps. Journalling and acting are steps of
//! their own.
//!
//! Method: breadth first over all states that can be reached. In each, at most one node runs the
//! container, and only one whose journal allows it; no copy is removed that is the only one; and
//! from each a state can be reached in which nothing is under way, without another fault.

use std::collections::{BTreeSet, HashMap, VecDeque};

use super::fate::{AtDestination, AtSource, Fate, Recovery};
use super::{Epoch, Event, Ledger, Outcome, Ownership};

const NODES: usize = 3;
const NAMES: [&str; NODES] = ["a", "b", "c"];

/// The container's tasks on one node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Tasks {
    None,
    Running,
    Frozen,
    /// Restored, and not let run.
    Held,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Node {
    ledger: Ledger,
    /// Journalled with the offer: the tasks may be frozen.
    is_frozen: bool,
    tasks: Tasks,
    /// What the tasks need is on this node's disk.
    is_safe: bool,
    /// As a source: the destination said that it claims this epoch. Lost with the daemon.
    confirmed: Option<Epoch>,
    /// As a destination: its session. Lost with the daemon.
    session: Option<Epoch>,
    /// As a destination: the machine or the shim ended before it was known whether the tasks ran.
    is_undecided: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Word {
    Stop,
    Release,
    Released,
    Refused,
    Answer(u8),
}

/// Answers in an order, so that messages have one.
const FATES: [Fate; 9] = [
    Fate::Unknown,
    Fate::Offered,
    Fate::Released,
    Fate::Kept,
    Fate::Claiming,
    Fate::Granted,
    Fate::NeverRan,
    Fate::Ran,
    Fate::RanDurably,
];

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Message {
    from: usize,
    to: usize,
    epoch: Epoch,
    word: Word,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    nodes: [Node; NODES],
    /// Everything that was ever sent and may still matter: it arrives at any time, any number of
    /// times, or never.
    net: BTreeSet<Message>,
    attempts_left: u8,
    faults_left: u8,
}

/// A step, in words, whether it is a fault, and the world after it.
struct Step {
    what: String,
    is_fault: bool,
    world: World,
}

impl Node {
    fn new(tasks: Tasks) -> Self {
        Self {
            ledger: Ledger::default(),
            is_frozen: false,
            tasks,
            is_safe: tasks == Tasks::Running,
            confirmed: None,
            session: None,
            is_undecided: false,
        }
    }

    /// Journals `event`, if the state allows it.
    fn journal(&mut self, event: &Event) -> bool {
        let change = self.ledger.on(event);
        let has_changed = change.is_some();
        change.into_iter().for_each(|change| self.ledger.apply(change));
        has_changed
    }

    fn is_settled(&self) -> bool {
        let is_open = self.ledger.state.as_ref().is_some_and(Ownership::is_open);
        !is_open && !matches!(self.tasks, Tasks::Frozen | Tasks::Held)
    }

    fn may_run(&self) -> bool {
        match self.ledger.state {
            // Not frozen yet, or thawed by the failed freeze.
            None | Some(Ownership::Owner(_) | Ownership::Granted(..) | Ownership::Offered(..)) => {
                true
            }
            Some(Ownership::Released(..) | Ownership::Moved(..) | Ownership::Claiming(..)) => false,
        }
    }
}

impl World {
    fn new(attempts_left: u8, faults_left: u8) -> Self {
        let nodes = [Node::new(Tasks::Running), Node::new(Tasks::None), Node::new(Tasks::None)];
        let mut world = Self { nodes, net: BTreeSet::new(), attempts_left, faults_left };
        // Messages that no claimant has sent.
        for word in [Word::Stop, Word::Release] {
            world.send(2, 0, Epoch(1), word);
        }
        world
    }

    fn send(&mut self, from: usize, to: usize, epoch: Epoch, word: Word) {
        self.net.insert(Message { from, to, epoch, word });
    }

    /// Drops messages that can have no effect any more, so that fewer worlds differ.
    fn prune(&mut self) {
        let nodes = &self.nodes;
        self.net.retain(|message| {
            let ledger = &nodes[message.to].ledger;
            !ledger.ended.contains_key(&message.epoch)
                && ledger.state.as_ref().is_none_or(|state| state.epoch() <= message.epoch)
        });
    }

    fn check(&self) -> Result<(), String> {
        let running = |node: &&Node| node.tasks == Tasks::Running;
        if self.nodes.iter().filter(running).count() > 1 {
            return Err("two nodes run it".to_owned());
        }
        match self.nodes.iter().filter(running).find(|node| !node.may_run()) {
            Some(node) => Err(format!("it runs as {:?}", node.ledger.state)),
            None => Ok(()),
        }
    }

    /// Every step that can happen now.
    fn steps(&self) -> Result<Vec<Step>, String> {
        let mut steps = Vec::new();
        for here in 0..NODES {
            self.own_steps(here, &mut steps)?;
            self.faults(here, &mut steps);
            self.operator(here, &mut steps);
        }
        for message in &self.net {
            self.deliver(*message, &mut steps)?;
        }
        for step in &mut steps {
            step.world.prune();
        }
        Ok(steps)
    }

    fn push(&self, steps: &mut Vec<Step>, what: impl Into<String>, change: impl FnOnce(&mut Self)) {
        let mut world = self.clone();
        change(&mut world);
        steps.push(Step { what: what.into(), is_fault: false, world });
    }

    /// What a node does of itself.
    fn own_steps(&self, here: usize, steps: &mut Vec<Step>) -> Result<(), String> {
        let node = &self.nodes[here];
        for source in (0..NODES).filter(|source| *source != here) {
            self.begin(here, source, steps);
        }
        match node.ledger.state.clone() {
            Some(Ownership::Offered(epoch, _)) => {
                if node.tasks == Tasks::Running {
                    self.push(steps, format!("{here} freezes"), |world| {
                        world.nodes[here].tasks = Tasks::Frozen;
                    });
                }
                // Silence, an error, or a daemon that is stopping.
                self.push(steps, format!("{here} takes the offer back"), |world| {
                    world.nodes[here].journal(&Event::Abort(epoch));
                });
            }
            Some(Ownership::Released(epoch, to)) => {
                self.ask(here, index(&to), epoch, steps);
                self.push(steps, format!("{here} is deleted by its user"), |world| {
                    world.nodes[here].tasks = Tasks::None;
                    world.nodes[here].journal(&Event::Deleted);
                });
            }
            Some(Ownership::Claiming(epoch, from)) => {
                let source = index(&from);
                // Whatever it was made of: who may run must not depend on it.
                if node.session == Some(epoch) && node.tasks == Tasks::None {
                    self.push(steps, format!("{here} restores"), |world| {
                        world.nodes[here].tasks = Tasks::Held;
                    });
                }
                if node.tasks == Tasks::Held {
                    self.push(steps, format!("{here} asks for the release"), |world| {
                        world.send(here, source, epoch, Word::Release);
                    });
                    self.ask(here, source, epoch, steps);
                }
                if node.session != Some(epoch)
                    || Fate::at_destination(None, true) == AtDestination::GiveBack
                {
                    self.push(steps, format!("{here} gives up"), |world| {
                        world.nodes[here].journal(&Event::GiveBack(epoch));
                    });
                }
            }
            Some(Ownership::Granted(epoch, _)) if !node.is_undecided => {
                match node.tasks {
                    Tasks::Held => {
                        self.push(steps, format!("{here} lets it run"), |world| {
                            world.nodes[here].tasks = Tasks::Running;
                        });
                        // The shim vouches that it never let them run.
                        self.push(steps, format!("{here} undoes the restore"), |world| {
                            world.nodes[here].tasks = Tasks::None;
                            world.nodes[here].journal(&Event::GiveBack(epoch));
                        });
                    }
                    Tasks::Running => self.push(steps, format!("{here} reports"), |world| {
                        world.nodes[here].journal(&Event::Ran(epoch));
                    }),
                    Tasks::None | Tasks::Frozen => {
                        return Err(format!("granted with {:?}", node.tasks));
                    }
                }
            }
            _ => {}
        }
        // Whatever is held for an epoch that is over is ended, and what is ours and frozen runs on.
        let claims =
            matches!(node.ledger.state, Some(Ownership::Claiming(..) | Ownership::Granted(..)));
        if node.tasks == Tasks::Held && !claims {
            self.push(steps, format!("{here} ends what it held"), |world| {
                world.nodes[here].tasks = Tasks::None;
            });
        }
        if node.ledger.recovery(node.is_frozen) == Recovery::Thaw {
            self.push(steps, format!("{here} thaws"), |world| {
                let node = &mut world.nodes[here];
                node.is_frozen = false;
                if node.tasks == Tasks::Frozen {
                    node.tasks = Tasks::Running;
                }
            });
        }
        self.become_durable(here, steps);
        Ok(())
    }

    /// A destination opens a session: it learns the epoch of the offer to come, and claims it.
    fn begin(&self, here: usize, source: usize, steps: &mut Vec<Step>) {
        let (node, other) = (&self.nodes[here], &self.nodes[source]);
        let known = node.ledger.last();
        let offer = other.ledger.on(&Event::Offer(NAMES[here].to_owned(), known));
        let offered = offer.and_then(|change| change.state);
        if self.attempts_left == 0 || other.tasks != Tasks::Running || node.tasks != Tasks::None {
            return;
        }
        if let Some(Ownership::Offered(epoch, _)) = offered {
            self.push(steps, format!("{here} claims {epoch:?} from {source}"), |world| {
                world.attempts_left -= 1;
                if world.nodes[here].journal(&Event::Claim(epoch, NAMES[source].to_owned())) {
                    world.nodes[here].session = Some(epoch);
                    world.send(here, source, epoch, Word::Stop);
                }
            });
        }
    }

    /// The answer to a question, which arrives some time.
    fn ask(&self, here: usize, peer: usize, epoch: Epoch, steps: &mut Vec<Step>) {
        let fate = self.nodes[peer].ledger.fate(epoch, NAMES[here]);
        let number = FATES.iter().position(|one| *one == fate).unwrap_or_default();
        let answer = Word::Answer(u8::try_from(number).unwrap_or_default());
        self.push(steps, format!("{here} asks {peer}, answer {fate:?}"), |world| {
            world.send(peer, here, epoch, answer);
        });
    }

    fn become_durable(&self, here: usize, steps: &mut Vec<Step>) {
        let node = &self.nodes[here];
        for (epoch, ended) in &node.ledger.ended {
            if ended.outcome == Outcome::Ran && !node.is_undecided {
                let (epoch, source) = (*epoch, index(&ended.peer));
                self.push(steps, format!("{here} syncs"), |world| {
                    world.nodes[here].is_safe = true;
                    world.nodes[here].journal(&Event::Durable(epoch));
                    let answer = Word::Answer(8);
                    world.send(here, source, epoch, answer);
                });
            }
        }
    }

    fn deliver(&self, message: Message, steps: &mut Vec<Step>) -> Result<(), String> {
        let Message { from, to, epoch, word } = message;
        let node = &self.nodes[to];
        let what = format!("{to} hears {word:?} of {epoch:?} from {from}");
        match word {
            // Nothing is frozen for a node that does not say that it claims it.
            Word::Stop if node.confirmed != Some(epoch) => self.ask(to, from, epoch, steps),
            Word::Stop if node.tasks == Tasks::Running => {
                let offer = Event::Offer(NAMES[from].to_owned(), Epoch(epoch.0.saturating_sub(1)));
                let offered = node.ledger.on(&offer).and_then(|change| change.state);
                let is_it = offered.is_some_and(|state| state.epoch() == epoch);
                self.push(steps, what, |world| {
                    if is_it {
                        world.nodes[to].journal(&offer);
                        world.nodes[to].is_frozen = true;
                    } else {
                        world.send(to, from, epoch, Word::Refused);
                    }
                });
            }
            Word::Release => {
                let has_offered = node.ledger.fate(epoch, NAMES[from]) == Fate::Offered;
                if has_offered && node.tasks == Tasks::Frozen {
                    self.push(steps, what, |world| {
                        world.nodes[to].journal(&Event::Release(epoch));
                        world.send(to, from, epoch, Word::Released);
                    });
                } else if !has_offered && node.ledger.last() >= epoch {
                    self.push(steps, what, |world| world.send(to, from, epoch, Word::Refused));
                }
            }
            Word::Released | Word::Refused => {
                let fate = if word == Word::Released { Fate::Released } else { Fate::Kept };
                self.at_destination(to, from, epoch, Some(fate), what, steps);
            }
            Word::Answer(number) => {
                let fate = FATES[usize::from(number)];
                let may_offer = matches!(node.ledger.state, None | Some(Ownership::Owner(_)));
                if may_offer && node.tasks == Tasks::Running && fate.confirms_offer() {
                    self.push(steps, what.clone(), |world| {
                        world.nodes[to].confirmed = Some(epoch);
                    });
                }
                self.at_destination(to, from, epoch, Some(fate), what.clone(), steps);
                self.at_source(to, from, epoch, fate, what, steps)?;
            }
            Word::Stop => {}
        }
        Ok(())
    }

    fn at_destination(
        &self,
        here: usize,
        from: usize,
        epoch: Epoch,
        fate: Option<Fate>,
        what: String,
        steps: &mut Vec<Step>,
    ) {
        let node = &self.nodes[here];
        let claims = Some(Ownership::Claiming(epoch, NAMES[from].to_owned()));
        // A grant is heard by a shim that holds the tasks.
        if node.ledger.state != claims || node.tasks != Tasks::Held {
            return;
        }
        if let Some(event) = Fate::at_destination(fate, false).event(epoch) {
            self.push(steps, what, |world| {
                world.nodes[here].journal(&event);
            });
        }
    }

    fn at_source(
        &self,
        here: usize,
        from: usize,
        epoch: Epoch,
        fate: Fate,
        what: String,
        steps: &mut Vec<Step>,
    ) -> Result<(), String> {
        let node = &self.nodes[here];
        if node.ledger.state != Some(Ownership::Released(epoch, NAMES[from].to_owned())) {
            return Ok(());
        }
        let next = fate.at_source();
        if next == AtSource::LetGo && !self.nodes[from].is_safe {
            return Err("the source would remove the only copy".to_owned());
        }
        if let Some(event) = next.event(epoch) {
            if next == AtSource::LetGo && node.tasks != Tasks::None {
                // The tasks end first.
                self.push(steps, what, |world| world.nodes[here].tasks = Tasks::None);
            } else {
                self.push(steps, what, |world| {
                    world.nodes[here].journal(&event);
                });
            }
        }
        Ok(())
    }

    fn faults(&self, here: usize, steps: &mut Vec<Step>) {
        if self.faults_left == 0 {
            return;
        }
        let node = &self.nodes[here];
        let mut fault = |what: String, change: &dyn Fn(&mut Node)| {
            let mut world = self.clone();
            world.faults_left -= 1;
            change(&mut world.nodes[here]);
            steps.push(Step { what, is_fault: true, world });
        };
        let restart = |node: &mut Node| {
            (node.confirmed, node.session) = (None, None);
            if let Recovery::TakeOfferBack(epoch) = node.ledger.recovery(node.is_frozen) {
                node.journal(&Event::Abort(epoch));
            }
        };
        if node.confirmed.is_some() || node.session.is_some() {
            fault(format!("the daemon of {here} restarts"), &restart);
        }
        // Then it is unknown whether what was granted has run, and what ran may not be on the disk.
        let lose_tasks = |node: &mut Node| {
            let is_granted = matches!(node.ledger.state, Some(Ownership::Granted(..)));
            let is_torn = node.ledger.ended.values().any(|one| one.outcome == Outcome::Ran);
            node.is_undecided |= is_granted || is_torn;
            node.tasks = Tasks::None;
        };
        if node.tasks == Tasks::Held {
            fault(format!("the shim of {here} dies"), &|node| {
                lose_tasks(node);
            });
        }
        if node.tasks != Tasks::None {
            fault(format!("the machine of {here} restarts"), &|node| {
                restart(node);
                lose_tasks(node);
            });
        }
    }

    /// What a person decides where no journal can tell: `godwit resolve`.
    fn operator(&self, here: usize, steps: &mut Vec<Step>) {
        let node = &self.nodes[here];
        if !node.is_undecided {
            return;
        }
        if let Some(Ownership::Granted(epoch, _)) = node.ledger.state {
            for event in [Event::Ran(epoch), Event::GiveBack(epoch)] {
                self.push(steps, format!("{here} is resolved by {event:?}"), |world| {
                    world.nodes[here].journal(&event);
                });
            }
            return;
        }
        let torn = node.ledger.ended.iter().find(|(_, one)| one.outcome == Outcome::Ran);
        if let Some((epoch, _)) = torn {
            // The person gives the source's copy up.
            self.push(steps, format!("{here} is resolved as safe"), |world| {
                world.nodes[here].is_safe = true;
                world.nodes[here].journal(&Event::Durable(*epoch));
            });
        }
    }
}

fn index(name: &str) -> usize {
    NAMES.iter().position(|one| *one == name).unwrap_or_default()
}

/// Explores everything from `start`. Returns how many worlds there are.
fn explore(start: World) -> usize {
    let mut numbers = HashMap::from([(start.clone(), 0_usize)]);
    let mut worlds = vec![start.clone()];
    let mut came_by: Vec<(usize, String)> = vec![(0, "the start".to_owned())];
    let mut before: Vec<Vec<usize>> = vec![Vec::new()];
    let mut todo = VecDeque::from([0]);
    let story = |mut at: usize, came_by: &[(usize, String)]| {
        let mut story = Vec::new();
        while at != 0 {
            story.push(came_by[at].1.clone());
            at = came_by[at].0;
        }
        story.reverse();
        story.join("\n")
    };
    while let Some(at) = todo.pop_front() {
        let world = worlds[at].clone();
        let steps = world.check().and_then(|()| world.steps());
        let steps = steps.unwrap_or_else(|why| panic!("{why}:\n{}", story(at, &came_by)));
        for step in steps {
            let next = *numbers.entry(step.world.clone()).or_insert_with(|| {
                worlds.push(step.world);
                came_by.push((at, step.what));
                before.push(Vec::new());
                todo.push_back(worlds.len() - 1);
                worlds.len() - 1
            });
            if !step.is_fault {
                before[next].push(at);
            }
        }
    }
    let settled = |world: &World| world.nodes.iter().all(Node::is_settled);
    let mut has_way_out: Vec<bool> = worlds.iter().map(settled).collect();
    let mut todo: Vec<usize> = (0..worlds.len()).filter(|at| has_way_out[*at]).collect();
    while let Some(at) = todo.pop() {
        for earlier in &before[at] {
            if !std::mem::replace(&mut has_way_out[*earlier], true) {
                todo.push(*earlier);
            }
        }
    }
    if let Some(stuck) = has_way_out.iter().position(|has| !has) {
        panic!("no way out:\n{}\n{:#?}", story(stuck, &came_by), worlds[stuck]);
    }
    worlds.len()
}

#[test]
fn with_two_faults_there_is_one_runner_and_a_way_out() {
    let worlds = explore(World::new(1, 2));
    assert!(worlds > 1000, "only {worlds} worlds");
}

#[test]
fn with_two_attempts_and_a_fault_there_is_one_runner_and_a_way_out() {
    let worlds = explore(World::new(2, 1));
    assert!(worlds > 1000, "only {worlds} worlds");
}
