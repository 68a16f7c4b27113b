//! What became of a hand-off: the question that one node asks another, and what follows from the
//! answer.
//!
//! Both nodes name a hand-off by container and epoch. A source that has released asks its
//! destination until the answer lets it end ([`Fate::at_source`]); a destination that claims and
//! lost the answer to its release asks its source ([`Fate::at_destination`]). "Unknown" is an
//! answer like any other, and never a reason to run or to remove anything at the source.

use godwit_protos::peer as wire;

use super::{Epoch, Event, Ledger, Outcome, Ownership};

/// What a node's journal says of one epoch of a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fate {
    /// It knows nothing of that epoch.
    Unknown,
    /// A source: frozen and offered, not released.
    Offered,
    /// A source: released, or given away for good.
    Released,
    /// A source: the offer was taken back, or the container came back.
    Kept,
    /// A destination: it claims, and runs nothing.
    Claiming,
    /// A destination: the tasks may run, or may have run; it cannot tell yet.
    Granted,
    /// A destination: no task ran and none will.
    NeverRan,
    /// A destination: tasks ran, or may have; what they need may not be on its disk yet.
    Ran,
    /// A destination: tasks ran, and what they need is on its disk.
    RanDurably,
}

/// What a source does about a container that it has released.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AtSource {
    /// End the tasks and give everything away: the destination has all of it.
    LetGo,
    /// Run it here again.
    TakeBack,
    /// Keep it frozen and ask again.
    AskAgain,
}

/// What a destination does about a container that it claims.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AtDestination {
    /// Let the tasks run.
    Grant,
    /// Undo the restore: no task runs here.
    GiveBack,
    /// Hold the tasks and ask again.
    AskAgain,
}

/// What a daemon that starts does about an entry of its journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recovery {
    /// Nothing is under way.
    Nothing,
    /// The session of the offer is gone: take it back, which thaws.
    TakeOfferBack(Epoch),
    /// The container is ours and still frozen: thaw it.
    Thaw,
    /// Ask the destination how the hand-off ended.
    AskDestination(Epoch),
    /// Nothing was granted: give it back unless a shim still asks for it.
    GiveBack(Epoch),
    /// It was granted: find out whether the tasks run.
    FindOut(Epoch),
}

impl Fate {
    /// What a source that has released does on this answer of its destination.
    pub fn at_source(self) -> AtSource {
        match self {
            Self::RanDurably => AtSource::LetGo,
            Self::NeverRan => AtSource::TakeBack,
            Self::Unknown
            | Self::Offered
            | Self::Released
            | Self::Kept
            | Self::Claiming
            | Self::Granted
            | Self::Ran => AtSource::AskAgain,
        }
    }

    /// What a destination that claims does on this answer of its source, which released it to this
    /// destination, if at all; `None` is no answer. `is_late` says that it has asked for long
    /// enough.
    ///
    /// Giving back is always safe: nothing has run here, and nothing will.
    pub fn at_destination(answer: Option<Self>, is_late: bool) -> AtDestination {
        match answer {
            Some(Self::Released) => AtDestination::Grant,
            Some(Self::Offered) | None if !is_late => AtDestination::AskAgain,
            Some(
                Self::Unknown
                | Self::Offered
                | Self::Kept
                | Self::Claiming
                | Self::Granted
                | Self::NeverRan
                | Self::Ran
                | Self::RanDurably,
            )
            | None => AtDestination::GiveBack,
        }
    }

    /// Whether a source may go on with its offer: its destination says that it claims it.
    pub fn confirms_offer(self) -> bool {
        self == Self::Claiming
    }
}

/// An answer that is not filled in, or that only a newer version knows, is none.
impl From<wire::Fate> for Fate {
    fn from(fate: wire::Fate) -> Self {
        match fate {
            wire::Fate::Unspecified | wire::Fate::Unknown => Self::Unknown,
            wire::Fate::Offered => Self::Offered,
            wire::Fate::Released => Self::Released,
            wire::Fate::Kept => Self::Kept,
            wire::Fate::Claiming => Self::Claiming,
            wire::Fate::Granted => Self::Granted,
            wire::Fate::NeverRan => Self::NeverRan,
            wire::Fate::Ran => Self::Ran,
            wire::Fate::RanDurably => Self::RanDurably,
        }
    }
}

impl From<Fate> for wire::Fate {
    fn from(fate: Fate) -> Self {
        match fate {
            Fate::Unknown => Self::Unknown,
            Fate::Offered => Self::Offered,
            Fate::Released => Self::Released,
            Fate::Kept => Self::Kept,
            Fate::Claiming => Self::Claiming,
            Fate::Granted => Self::Granted,
            Fate::NeverRan => Self::NeverRan,
            Fate::Ran => Self::Ran,
            Fate::RanDurably => Self::RanDurably,
        }
    }
}

/// For people.
impl std::fmt::Display for Fate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Unknown => "unknown",
            Self::Offered => "offered",
            Self::Released => "released",
            Self::Kept => "taken back",
            Self::Claiming => "claimed, and not run",
            Self::Granted => "granted, and perhaps run",
            Self::NeverRan => "never run",
            Self::Ran => "run, and perhaps not on its disk",
            Self::RanDurably => "run, and on its disk",
        })
    }
}

impl Ledger {
    /// What became of `epoch`, as far as `peer` is concerned: the container's name at the node that
    /// asks.
    pub fn fate(&self, epoch: Epoch, peer: &str) -> Fate {
        if let Some(ended) = self.ended.get(&epoch) {
            return match ended.outcome {
                _ if ended.peer != peer => Fate::Unknown,
                Outcome::Kept => Fate::Kept,
                Outcome::GivenAway => Fate::Released,
                Outcome::NeverRan => Fate::NeverRan,
                Outcome::Ran => Fate::Ran,
                Outcome::RanDurably => Fate::RanDurably,
            };
        }
        match &self.state {
            Some(Ownership::Offered(now, to)) if *now == epoch && to == peer => Fate::Offered,
            Some(Ownership::Released(now, to) | Ownership::Moved(now, to))
                if *now == epoch && to == peer =>
            {
                Fate::Released
            }
            Some(Ownership::Claiming(now, from)) if *now == epoch && from == peer => Fate::Claiming,
            Some(Ownership::Granted(now, from)) if *now == epoch && from == peer => Fate::Granted,
            Some(
                Ownership::Owner(_)
                | Ownership::Offered(..)
                | Ownership::Released(..)
                | Ownership::Moved(..)
                | Ownership::Claiming(..)
                | Ownership::Granted(..),
            )
            | None => Fate::Unknown,
        }
    }

    /// What a daemon that starts does; `is_frozen` is whether the tasks were frozen here and not
    /// thawed.
    pub fn recovery(&self, is_frozen: bool) -> Recovery {
        match &self.state {
            None | Some(Ownership::Moved(..)) => Recovery::Nothing,
            Some(Ownership::Owner(_)) if is_frozen => Recovery::Thaw,
            Some(Ownership::Owner(_)) => Recovery::Nothing,
            Some(Ownership::Offered(epoch, _)) => Recovery::TakeOfferBack(*epoch),
            Some(Ownership::Released(epoch, _)) => Recovery::AskDestination(*epoch),
            Some(Ownership::Claiming(epoch, _)) => Recovery::GiveBack(*epoch),
            Some(Ownership::Granted(epoch, _)) => Recovery::FindOut(*epoch),
        }
    }
}

impl AtSource {
    /// What is journalled for it, of `epoch`. Letting go is journalled once the tasks have ended.
    pub fn event(self, epoch: Epoch) -> Option<Event> {
        match self {
            Self::LetGo => Some(Event::LetGo(epoch)),
            Self::TakeBack => Some(Event::Returned(epoch)),
            Self::AskAgain => None,
        }
    }
}

impl AtDestination {
    /// What is journalled for it, of `epoch`, before it is done.
    pub fn event(self, epoch: Epoch) -> Option<Event> {
        match self {
            Self::Grant => Some(Event::Granted(epoch)),
            Self::GiveBack => Some(Event::GiveBack(epoch)),
            Self::AskAgain => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ownership::Ended;

    #[test]
    fn an_epoch_of_another_peer_is_unknown() {
        let state = Some(Ownership::Released(Epoch(3), "c/d/x".into()));
        let mut ledger = Ledger { state, ..Ledger::default() };
        assert_eq!(ledger.fate(Epoch(3), "b/d/x"), Fate::Unknown);
        assert_eq!(ledger.fate(Epoch(3), "c/d/x"), Fate::Released);
        let ended = Ended { outcome: Outcome::Ran, peer: "a/d/x".into() };
        ledger.ended.insert(Epoch(2), ended);
        assert_eq!(ledger.fate(Epoch(2), "a/d/x"), Fate::Ran);
        assert_eq!(ledger.fate(Epoch(2), "c/d/x"), Fate::Unknown);
        assert_eq!(ledger.fate(Epoch(1), "a/d/x"), Fate::Unknown);
    }

    #[test]
    fn an_unknown_epoch_neither_runs_nor_ends_a_released_container() {
        for fate in [Fate::Unknown, Fate::Claiming, Fate::Granted, Fate::Ran] {
            assert_eq!(fate.at_source(), AtSource::AskAgain, "{fate:?}");
        }
    }

    #[test]
    fn without_an_answer_a_claim_is_given_back_after_its_time() {
        assert_eq!(Fate::at_destination(None, false), AtDestination::AskAgain);
        assert_eq!(Fate::at_destination(None, true), AtDestination::GiveBack);
        assert_eq!(Fate::at_destination(Some(Fate::Released), true), AtDestination::Grant);
        assert_eq!(Fate::at_destination(Some(Fate::Unknown), false), AtDestination::GiveBack);
    }
}
