//! What a run does, as it follows from its seed.

use std::fmt;
use std::time::Duration;

use godwit_tests::random::Random;

/// Memory of a ledger in MiB.
const MEMORY_MIB: [u32; 2] = [2, 24];

/// Which node of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Source,
    Destination,
}

impl Role {
    pub(crate) const BOTH: [Self; 2] = [Self::Source, Self::Destination];

    /// Index in the bed.
    pub(crate) fn index(self) -> usize {
        match self {
            Self::Source => 0,
            Self::Destination => 1,
        }
    }
}

/// The event at which a fault strikes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// The destination has the request.
    Request,
    /// The first round begins.
    PreCopy,
    /// The destination asks for the freeze.
    Stop,
    /// CRIU works at the source.
    Dump,
    /// CRIU has ended at the source.
    Transfer,
    /// CRIU works at the destination.
    Restore,
    /// The source has released the container.
    Release,
    /// The witness hears the destination's first step.
    Running,
    /// The client has ended.
    Done,
}

impl Phase {
    pub(crate) const ALL: [Self; 9] = [
        Self::Request,
        Self::PreCopy,
        Self::Stop,
        Self::Dump,
        Self::Transfer,
        Self::Restore,
        Self::Release,
        Self::Running,
        Self::Done,
    ];

    /// Its name in reports.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Request => "request",
            Self::PreCopy => "pre-copy",
            Self::Stop => "stop",
            Self::Dump => "dump",
            Self::Transfer => "transfer",
            Self::Restore => "restore",
            Self::Release => "release",
            Self::Running => "running",
            Self::Done => "done",
        }
    }

    /// Whether the container may run at the destination by now.
    pub(crate) fn may_be_given_away(self) -> bool {
        match self {
            Self::Request | Self::PreCopy | Self::Stop | Self::Dump | Self::Transfer => false,
            Self::Restore | Self::Release | Self::Running | Self::Done => true,
        }
    }
}

/// What receives a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Program {
    Daemon(Role),
    Shim(Role),
    Containerd(Role),
    /// At whichever node it works.
    Criu,
    /// Likewise.
    Runc,
    /// `godwit migrate`.
    Client,
}

/// Signals, and how long a stopped process stays so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Blow {
    Kill,
    Terminate,
    Stop,
}

/// How a link fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cut {
    BothWays(Duration),
    /// What is sent to the node is lost; what it sends arrives.
    OneWay(Duration),
    /// Three in ten packets that are sent to the node are lost.
    Lossy(Duration),
}

/// What happens to the container itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Act {
    Exit,
    Delete,
    Pause,
    Exec,
    OutOfMemory,
}

/// What strikes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    Signal(Program, Blow),
    Crash(Role),
    Link(Role, Cut),
    DiskFull(Role),
    MemoryLimit(Role),
    Container(Act),
    /// Another container of the same name is started at the destination.
    Namesake,
    /// Another container at the source mounts the volume.
    SecondUser,
    TwoDestinations,
    /// The destination is asked to give the container back at once.
    BackAtOnce,
}

/// Faults by kind; the seed draws the variant.
const KINDS: u64 = 19;

impl Fault {
    fn draw(kind: u64, random: &mut Random) -> Self {
        let blow = pick(&[Blow::Kill, Blow::Kill, Blow::Terminate, Blow::Stop], random);
        let role = pick(&Role::BOTH, random);
        let (brief, long) = (Duration::from_secs(3), Duration::from_secs(15));
        let cuts = [
            Cut::BothWays(brief),
            Cut::BothWays(long),
            Cut::OneWay(brief),
            Cut::OneWay(long),
            Cut::Lossy(long),
        ];
        let acts = [Act::Exit, Act::Delete, Act::Pause, Act::Exec, Act::OutOfMemory];
        match kind {
            0 => Self::Signal(Program::Daemon(Role::Source), blow),
            1 => Self::Signal(Program::Daemon(Role::Destination), blow),
            2 => Self::Signal(Program::Shim(Role::Source), blow),
            3 => Self::Signal(Program::Shim(Role::Destination), blow),
            4 => Self::Signal(Program::Containerd(Role::Source), blow),
            5 => Self::Signal(Program::Containerd(Role::Destination), blow),
            6 => Self::Signal(Program::Criu, blow),
            7 => Self::Signal(Program::Runc, blow),
            8 => Self::Signal(Program::Client, blow),
            9 => Self::Crash(Role::Source),
            10 => Self::Crash(Role::Destination),
            11 => Self::Link(role, pick(&cuts, random)),
            12 => Self::DiskFull(role),
            13 => Self::MemoryLimit(role),
            14 => Self::Container(pick(&acts, random)),
            15 => Self::Namesake,
            16 => Self::SecondUser,
            17 => Self::TwoDestinations,
            _ => Self::BackAtOnce,
        }
    }

    /// Its name in reports: variants of a kind share it, but for signals.
    pub(crate) fn word(self) -> String {
        let role = |role| if role == Role::Source { "source" } else { "destination" };
        let program = |program| match program {
            Program::Daemon(at) => format!("{} daemon", role(at)),
            Program::Shim(at) => format!("{} shim", role(at)),
            Program::Containerd(at) => format!("{} containerd", role(at)),
            Program::Criu => "CRIU".to_owned(),
            Program::Runc => "runc".to_owned(),
            Program::Client => "client".to_owned(),
        };
        match self {
            Self::Signal(at, blow) => {
                let blow = match blow {
                    Blow::Kill => "SIGKILL",
                    Blow::Terminate => "SIGTERM",
                    Blow::Stop => "SIGSTOP",
                };
                format!("{blow} {}", program(at))
            }
            Self::Crash(at) => format!("{} crash", role(at)),
            Self::Link(at, Cut::BothWays(time)) => {
                format!("{} link cut {} s", role(at), time.as_secs())
            }
            Self::Link(at, Cut::OneWay(time)) => {
                format!("{} link one way {} s", role(at), time.as_secs())
            }
            Self::Link(at, Cut::Lossy(time)) => {
                format!("{} link loses packets {} s", role(at), time.as_secs())
            }
            Self::DiskFull(at) => format!("{} disk full", role(at)),
            Self::MemoryLimit(at) => format!("{} daemon's memory", role(at)),
            Self::Container(act) => match act {
                Act::Exit => "container exits",
                Act::Delete => "container deleted",
                Act::Pause => "container paused",
                Act::Exec => "container exec",
                Act::OutOfMemory => "container out of memory",
            }
            .to_owned(),
            Self::Namesake => "namesake".to_owned(),
            Self::SecondUser => "second user".to_owned(),
            Self::TwoDestinations => "two destinations".to_owned(),
            Self::BackAtOnce => "there and back".to_owned(),
        }
    }

    /// Whether a node lacks room or memory meanwhile.
    pub(crate) fn takes_resources(self) -> bool {
        matches!(self, Self::DiskFull(_) | Self::MemoryLimit(_))
    }

    /// Whether the container may end by it, when it strikes in `phase`.
    pub(crate) fn may_end_the_container(self, phase: Phase) -> bool {
        match self {
            Self::Signal(Program::Shim(_), blow) => blow != Blow::Stop,
            // From the grant on, a restore whose CRIU died may have run, and is ended.
            Self::Signal(Program::Criu | Program::Runc, blow) => {
                blow != Blow::Stop && phase.may_be_given_away()
            }
            Self::Crash(_) => true,
            Self::Container(act) => matches!(act, Act::Exit | Act::Delete | Act::OutOfMemory),
            Self::Signal(Program::Daemon(_) | Program::Containerd(_) | Program::Client, _)
            | Self::Link(..)
            | Self::DiskFull(_)
            | Self::MemoryLimit(_)
            | Self::Namesake
            | Self::SecondUser
            | Self::TwoDestinations
            | Self::BackAtOnce => false,
        }
    }
}

/// One run.
#[derive(Clone, Debug)]
pub(crate) struct Cell {
    pub(crate) seed: u64,
    pub(crate) tree: bool,
    pub(crate) block: bool,
    pub(crate) memory_mib: u32,
    pub(crate) mode: &'static str,
    pub(crate) client_at: Role,
    pub(crate) phase: Phase,
    pub(crate) fault: Fault,
    pub(crate) second: Option<(Phase, Fault)>,
    /// How long what was broken stays so; links and disks know themselves.
    pub(crate) mend_after: Duration,
}

impl Cell {
    /// The run of a seed.
    pub(crate) fn draw(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let phases = Phase::ALL.len() as u64;
        let phase = usize::try_from(seed / KINDS % phases).unwrap_or(0);
        let (phase, since) = (Phase::ALL[phase], &Phase::ALL[phase..]);
        let fault = Fault::draw(seed % KINDS, &mut random);
        let mends = [50, 1000, 1000, 4000, 9000].map(Duration::from_millis);
        let second = (random.below(4) == 0).then(|| {
            // What disturbs another thing than the container: two of those make a run that says
            // nothing.
            let kind = random.below(14);
            (pick(since, &mut random), Fault::draw(kind, &mut random))
        });
        let fills = |fault: Option<Fault>| matches!(fault, Some(Fault::DiskFull(_)));
        // A block volume loses writes that the disk below it has no room for, with or without a
        // migration.
        let may_have_block = !fills(Some(fault)) && !fills(second.map(|(_, fault)| fault));
        let block = may_have_block && random.below(3) == 0;
        let tree = matches!(fault, Fault::SecondUser) || random.below(3) > 0;
        Self {
            seed,
            tree,
            block,
            memory_mib: pick(&MEMORY_MIB, &mut random),
            mode: pick(&["cooperative", "traditional"], &mut random),
            client_at: pick(&Role::BOTH, &mut random),
            phase,
            fault,
            second,
            mend_after: pick(&mends, &mut random),
        }
    }

    /// Faults with their phases, in order.
    pub(crate) fn faults(&self) -> Vec<(Phase, Fault)> {
        [Some((self.phase, self.fault)), self.second].into_iter().flatten().collect()
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let volumes = match (self.tree, self.block) {
            (false, false) => "layer",
            (true, false) => "layer and tree",
            (false, true) => "layer and block",
            (true, true) => "layer, tree and block",
        };
        let client = if self.client_at == Role::Source { "source" } else { "destination" };
        write!(f, "run {}: {} at {}", self.seed, self.fault.word(), self.phase.word())?;
        if let Some((phase, fault)) = self.second {
            write!(f, ", then {} at {}", fault.word(), phase.word())?;
        }
        write!(
            f,
            "; {}, {volumes}, {} MiB, client at the {client}, mended after {} ms",
            self.mode,
            self.memory_mib,
            self.mend_after.as_millis()
        )
    }
}

fn pick<T: Copy>(from: &[T], random: &mut Random) -> T {
    from[usize::try_from(random.below(from.len() as u64)).unwrap_or(0)]
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn consecutive_seeds_reach_every_kind_of_fault_in_every_phase() {
        let phases = Phase::ALL.len() as u64;
        let mut cells = BTreeMap::new();
        for seed in 0..3 * KINDS * phases {
            *cells.entry((seed % KINDS, Cell::draw(seed).phase.word())).or_insert(0) += 1;
        }
        assert_eq!(cells.len() as u64, KINDS * phases);
        assert!(cells.values().all(|&count| count == 3), "{cells:?}");
    }

    #[test]
    fn a_seed_is_always_the_same_run() {
        for seed in 0..1000 {
            assert_eq!(Cell::draw(seed).to_string(), Cell::draw(seed).to_string());
        }
    }
}
