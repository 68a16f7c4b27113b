//! Who may run a container.
//!
//! ```text
//!  source:        Owner --offer--> Offered --release--> Released --returned--> Owner
//!                   ^-----abort------'                     '--gone--> (forgotten with the container)
//!  destination:   Claiming --granted--> Owner
//!                    |                    |
//!                    '-----give back------'--> Returned      only while no task has run
//! ```
//!
//! Promise: a node lets the container run only in [`Ownership::Owner`]. The source journals
//! `Released` before it says so; the destination journals `Claiming` before it asks, and runs the
//! tasks only once it has heard the release; if the message is lost it asks again. So a fault can
//! delay a hand-off but never make two runners. Read next: [`journal`] for the bytes on disk,
//! docs/failure-model.md for each fault.

pub mod absence;
pub mod journal;

use serde::{Deserialize, Serialize};

/// Fence of one offer. Grows by one with each offer and is never reused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Epoch(pub u64);

impl Epoch {
    /// The fence of the next offer.
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

/// What this node knows of a container's owner. A container that was never offered has no entry and
/// is ours. The text is the container's name at the other node: `NODE/NAMESPACE/CONTAINER`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ownership {
    /// This node may run it.
    Owner(Epoch),
    /// Frozen here and offered to another node; not yet given away.
    Offered(Epoch, String),
    /// Given to another node: this node must not run it.
    Released(Epoch, String),
    /// This node asks another one for it, or waits for the answer.
    Claiming(Epoch, String),
    /// This node never ran it and never will; the other node may.
    Returned(Epoch, String),
}

/// What happens to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The source freezes the container and offers it under this name, with an epoch beyond the one
    /// given.
    Offer(String, Epoch),
    /// The source takes an offer back.
    Abort(Epoch),
    /// The source gives the container away.
    Release(Epoch),
    /// The destination has journalled that it never resumed the tasks.
    Returned(Epoch),
    /// The destination has restored the container and asks for it.
    Claim(Epoch, String),
    /// The source has released it.
    Granted(Epoch),
    /// The destination gives up, and vouches that no task ran and none will.
    GiveBack(Epoch, String),
}

/// In the words of an error: "is on its way to edge-b: it cannot be offered to ...".
impl std::fmt::Display for Event {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Offer(to, _) => write!(f, "be frozen to be offered to {to}"),
            Self::Abort(Epoch(epoch)) => write!(f, "have its offer {epoch} taken back"),
            Self::Release(Epoch(epoch)) => write!(f, "be given away by offer {epoch}"),
            Self::Returned(Epoch(epoch)) => write!(f, "come back from offer {epoch}"),
            Self::Claim(Epoch(epoch), from) => write!(f, "be claimed from {from} by offer {epoch}"),
            Self::Granted(Epoch(epoch)) => write!(f, "be granted by offer {epoch}"),
            Self::GiveBack(Epoch(epoch), to) => {
                write!(f, "be given back to {to} from offer {epoch}")
            }
        }
    }
}

impl Ownership {
    /// The state after `event`, or `None` if the event is stale or out of phase.
    ///
    /// Pure: the caller journals the new state first and only then acts on it. `None` as the state
    /// before is a container that this node never saw.
    pub fn on(before: Option<&Self>, event: &Event) -> Option<Self> {
        use {Event as E, Ownership as S};
        match (before, event) {
            (None, E::Offer(to, known)) => Some(S::Offered(known.next(), to.clone())),
            (Some(S::Owner(now)), E::Offer(to, known)) => {
                Some(S::Offered(now.max(known).next(), to.clone()))
            }
            (Some(S::Offered(now, _)), E::Abort(of)) => (of == now).then_some(S::Owner(*now)),
            (Some(S::Offered(now, to)), E::Release(of)) => {
                (of == now).then(|| S::Released(*now, to.clone()))
            }
            (Some(S::Released(now, _)), E::Returned(of)) => (of == now).then_some(S::Owner(*now)),
            (None, E::Claim(epoch, from)) => Some(S::Claiming(*epoch, from.clone())),
            // It was here before and comes back with a newer epoch, or an earlier attempt is
            // superseded.
            (
                Some(
                    S::Owner(now) | S::Released(now, _) | S::Claiming(now, _) | S::Returned(now, _),
                ),
                E::Claim(epoch, from),
            ) => (epoch > now).then(|| S::Claiming(*epoch, from.clone())),
            (Some(S::Claiming(now, _)), E::Granted(of)) => (of == now).then_some(S::Owner(*now)),
            (Some(S::Claiming(now, _) | S::Owner(now)), E::GiveBack(of, to)) => {
                (of == now).then(|| S::Returned(*now, to.clone()))
            }
            // Listed, not `_`: a new state or event must be decided here.
            (
                None,
                E::Abort(_) | E::Release(_) | E::Returned(_) | E::Granted(_) | E::GiveBack(..),
            )
            | (Some(S::Owner(_)), E::Abort(_) | E::Release(_) | E::Returned(_) | E::Granted(_))
            | (
                Some(S::Offered(..)),
                E::Offer(..) | E::Returned(_) | E::Claim(..) | E::Granted(_) | E::GiveBack(..),
            )
            | (
                Some(S::Released(..)),
                E::Offer(..) | E::Abort(_) | E::Release(_) | E::Granted(_) | E::GiveBack(..),
            )
            | (
                Some(S::Claiming(..) | S::Returned(..)),
                E::Offer(..) | E::Abort(_) | E::Release(_) | E::Returned(_),
            )
            | (Some(S::Returned(..)), E::Granted(_) | E::GiveBack(..)) => None,
        }
    }

    /// The epoch of the state.
    pub fn epoch(&self) -> Epoch {
        match self {
            Self::Owner(epoch)
            | Self::Offered(epoch, _)
            | Self::Released(epoch, _)
            | Self::Claiming(epoch, _)
            | Self::Returned(epoch, _) => *epoch,
        }
    }

    /// The container's name at the other node, where there is one.
    pub fn peer(&self) -> Option<&str> {
        match self {
            Self::Owner(_) => None,
            Self::Offered(_, peer)
            | Self::Released(_, peer)
            | Self::Claiming(_, peer)
            | Self::Returned(_, peer) => Some(peer),
        }
    }

    /// The protocol's word for the state.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Owner(_) => "owner",
            Self::Offered(..) => "offered",
            Self::Released(..) => "released",
            Self::Claiming(..) => "claiming",
            Self::Returned(..) => "returned",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn step(before: &mut Option<Ownership>, event: Event) {
        if let Some(after) = Ownership::on(before.as_ref(), &event) {
            *before = Some(after);
        }
    }

    /// Messages between two nodes that may be lost, repeated and late.
    #[derive(Debug, Clone, Copy)]
    enum Move {
        Offer,
        Abort(u64),
        Claim(u64),
        Release(u64),
        Grant(u64),
        GiveBack(u64),
        Returned(u64),
    }

    fn moves() -> impl Strategy<Value = Vec<Move>> {
        let epoch = 1..4u64;
        proptest::collection::vec(
            prop_oneof![
                Just(Move::Offer),
                epoch.clone().prop_map(Move::Abort),
                epoch.clone().prop_map(Move::Claim),
                epoch.clone().prop_map(Move::Release),
                epoch.clone().prop_map(Move::Grant),
                epoch.clone().prop_map(Move::GiveBack),
                epoch.prop_map(Move::Returned),
            ],
            0..40,
        )
    }

    proptest! {
        /// Method: any order of messages, each delivered only if its sender's journal allows it; at
        /// no time may both nodes run the container.
        #[test]
        fn there_is_never_a_second_runner(moves in moves()) {
            let (mut source, mut destination) = (Some(Ownership::Owner(Epoch(0))), None);
            for one in moves {
                match one {
                    Move::Offer => step(&mut source, Event::Offer("b".into(), Epoch(0))),
                    Move::Abort(epoch) => step(&mut source, Event::Abort(Epoch(epoch))),
                    // The destination claims what it was offered at some time.
                    Move::Claim(epoch) if source.as_ref().is_some_and(|s| s.epoch() >= Epoch(epoch)) => {
                        step(&mut destination, Event::Claim(Epoch(epoch), "a".into()));
                    }
                    // The source is asked only by a node that claims.
                    Move::Release(epoch)
                        if destination == Some(Ownership::Claiming(Epoch(epoch), "a".into())) =>
                    {
                        step(&mut source, Event::Release(Epoch(epoch)));
                    }
                    // A grant is heard only after it was said.
                    Move::Grant(epoch)
                        if source == Some(Ownership::Released(Epoch(epoch), "b".into())) =>
                    {
                        step(&mut destination, Event::Granted(Epoch(epoch)));
                    }
                    Move::GiveBack(epoch) => {
                        step(&mut destination, Event::GiveBack(Epoch(epoch), "a".into()));
                    },
                    Move::Returned(epoch)
                        if destination == Some(Ownership::Returned(Epoch(epoch), "a".into())) =>
                    {
                        step(&mut source, Event::Returned(Epoch(epoch)));
                    }
                    Move::Claim(_) | Move::Release(_) | Move::Grant(_) | Move::Returned(_) => {}
                }
                let runs = |state: &Option<Ownership>| matches!(state, Some(Ownership::Owner(_)));
                prop_assert!(!(runs(&source) && runs(&destination)), "{source:?} {destination:?}");
            }
        }
    }

    #[test]
    fn a_stale_release_is_refused() {
        let offered = Ownership::Offered(Epoch(3), "b".into());
        assert_eq!(Ownership::on(Some(&offered), &Event::Release(Epoch(2))), None);
        assert!(Ownership::on(Some(&offered), &Event::Release(Epoch(3))).is_some());
    }

    #[test]
    fn an_epoch_is_never_reused() {
        let mut state = None;
        step(&mut state, Event::Offer("b".into(), Epoch(0)));
        step(&mut state, Event::Abort(Epoch(1)));
        step(&mut state, Event::Offer("b".into(), Epoch(0)));
        assert_eq!(state, Some(Ownership::Offered(Epoch(2), "b".into())));
    }
}
