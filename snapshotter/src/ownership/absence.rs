//! When a container counts as deleted, so that its entry and its fence may end.
//!
//! containerd's "not found" alone proves nothing: it may run on an empty root because a disk is
//! mounted late, or on a metadata database that was restored from a copy. A container counts as
//! deleted when
//!
//! 1. containerd reported its deletion, or lists a younger container of that name, or
//! 2. containerd has not listed it for [`ABSENCE_MIN`] without a pause, while neither a task, a
//!    bundle nor a process in a control group of that name was found;
//!
//! and in both cases only if it is the containerd in which the container was (its server UUID,
//! which lies below its root). Everything else keeps the entry: a fence too many refuses a start
//! and is reported, a fence too few makes a second runner.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// How long a container must be absent before its absence counts as a deletion.
pub const ABSENCE_MIN: Duration = Duration::from_secs(600);

/// Which container of a name: one that is created again under the same name is another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Incarnation {
    /// UUID of the containerd that has it.
    pub containerd: String,
    /// When that containerd created it, in nanoseconds since 1970.
    pub created_at_ns: i64,
}

/// `UUID/NANOSECONDS`, as messages have it.
impl std::fmt::Display for Incarnation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.containerd, self.created_at_ns)
    }
}

/// What containerd and the node show of a container's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// containerd lists a container, created then.
    Listed {
        /// In nanoseconds since 1970.
        created_at_ns: i64,
    },
    /// containerd lists none, but a task, a bundle or a process is here.
    Traces,
    /// Nothing of that name is here.
    Nothing,
}

/// What speaks for a deletion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Evidence {
    /// containerd reported the deletion.
    pub has_event: bool,
    /// What is seen now.
    pub seen: Seen,
    /// For how long nothing of that name has been seen, without a pause.
    pub absent_for: Duration,
}

/// Whether `journalled` was deleted, by what the containerd `uuid` shows.
///
/// `None` as the incarnation is an entry whose container was never seen in containerd.
pub fn is_deleted(journalled: Option<&Incarnation>, uuid: &str, evidence: &Evidence) -> bool {
    let Some(journalled) = journalled else {
        return evidence.has_event && !matches!(evidence.seen, Seen::Listed { .. });
    };
    if journalled.containerd != uuid {
        return false;
    }
    match evidence.seen {
        // An older one is from a restored database.
        Seen::Listed { created_at_ns } => created_at_ns > journalled.created_at_ns,
        Seen::Traces => false,
        Seen::Nothing => evidence.has_event || evidence.absent_for >= ABSENCE_MIN,
    }
}

/// What is remembered of a container between two looks.
#[derive(Clone, Debug, Default)]
pub struct Watched {
    /// UUID of the containerd that reported its deletion.
    pub deleted_in: Option<String>,
    /// The containerd that did not list it, and since when.
    absent: Option<(String, Instant)>,
}

impl Watched {
    /// containerd was lost: the time of absence starts again.
    pub fn lost_contact(&mut self) {
        self.absent = None;
    }

    /// Adds what was seen now. Returns what speaks for a deletion.
    pub fn look(&mut self, uuid: &str, seen: Seen, now: Instant) -> Evidence {
        self.absent = match self.absent.take() {
            _ if seen != Seen::Nothing => None,
            Some((of, since)) if of == uuid => Some((of, since)),
            _ => Some((uuid.to_owned(), now)),
        };
        let since = self.absent.as_ref().map_or(now, |(_, since)| *since);
        let has_event = self.deleted_in.as_deref() == Some(uuid);
        Evidence { has_event, seen, absent_for: now.duration_since(since) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: &str = "7b0c";
    const LONG: Duration = Duration::from_secs(1_000_000);

    fn journalled() -> Incarnation {
        Incarnation { containerd: HERE.to_owned(), created_at_ns: 5 }
    }

    fn deleted(uuid: &str, has_event: bool, seen: Seen, absent_for: Duration) -> bool {
        is_deleted(Some(&journalled()), uuid, &Evidence { has_event, seen, absent_for })
    }

    #[test]
    fn another_containerd_proves_nothing() {
        for seen in [Seen::Nothing, Seen::Traces, Seen::Listed { created_at_ns: 6 }] {
            assert!(!deleted("another", true, seen, LONG), "{seen:?}");
        }
    }

    #[test]
    fn absence_counts_only_after_its_time_and_without_traces() {
        assert!(!deleted(HERE, false, Seen::Nothing, ABSENCE_MIN - Duration::from_secs(1)));
        assert!(deleted(HERE, false, Seen::Nothing, ABSENCE_MIN));
        assert!(!deleted(HERE, false, Seen::Traces, LONG));
        assert!(deleted(HERE, true, Seen::Nothing, Duration::ZERO));
        assert!(!deleted(HERE, true, Seen::Traces, Duration::ZERO));
    }

    #[test]
    fn only_a_younger_namesake_means_that_it_was_deleted() {
        for (created_at_ns, is_other) in [(4, false), (5, false), (6, true)] {
            for has_event in [false, true] {
                let seen = Seen::Listed { created_at_ns };
                assert_eq!(deleted(HERE, has_event, seen, LONG), is_other, "{created_at_ns}");
            }
        }
    }

    #[test]
    fn an_entry_that_was_never_in_containerd_ends_by_an_event_only() {
        let evidence = |has_event, seen| Evidence { has_event, seen, absent_for: LONG };
        assert!(!is_deleted(None, HERE, &evidence(false, Seen::Nothing)));
        assert!(is_deleted(None, HERE, &evidence(true, Seen::Nothing)));
        assert!(!is_deleted(None, HERE, &evidence(true, Seen::Listed { created_at_ns: 9 })));
    }

    #[test]
    fn the_time_of_absence_starts_again_with_every_sight_and_every_other_containerd() {
        let mut watched = Watched::default();
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut look = |uuid: &str, seen, seconds| watched.look(uuid, seen, at(seconds)).absent_for;
        assert_eq!(look(HERE, Seen::Nothing, 0), Duration::ZERO);
        assert_eq!(look(HERE, Seen::Nothing, 100), Duration::from_secs(100));
        assert_eq!(look("another", Seen::Nothing, 200), Duration::ZERO);
        assert_eq!(look(HERE, Seen::Nothing, 300), Duration::ZERO);
        assert_eq!(look(HERE, Seen::Traces, 400), Duration::ZERO);
        assert_eq!(look(HERE, Seen::Nothing, 500), Duration::ZERO);
        assert_eq!(look(HERE, Seen::Nothing, 501), Duration::from_secs(1));
    }

    #[test]
    fn a_deletion_counts_only_in_the_containerd_that_reported_it() {
        let mut watched = Watched { deleted_in: Some("another".to_owned()), absent: None };
        assert!(!watched.look(HERE, Seen::Nothing, Instant::now()).has_event);
        watched.deleted_in = Some(HERE.to_owned());
        assert!(watched.look(HERE, Seen::Nothing, Instant::now()).has_event);
    }
}
