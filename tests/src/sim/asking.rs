//! The policies that are compared: the nodes that a destination asks for a subject.

use std::time::Duration;

use godwit_policy::choose::{Candidate, Source, Wanted, choose};

use super::parameters::ASKED_MAX;

/// Nodes that a destination asks besides the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Policy {
    /// None; no node keeps snapshots by schedule either.
    None,
    /// The node with the newest snapshot; of equal ones the nearest.
    Newest,
    /// The nearest node that has any; of equal ones the newest.
    Nearest,
    /// As many as ours may ask, the newest.
    NewestMany,
    /// As many as ours may ask, the nearest.
    NearestMany,
    /// The daemon's rule.
    Ours,
}

impl Policy {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::None, Self::Newest, Self::Nearest, Self::NewestMany, Self::NearestMany, Self::Ours];

    /// As in reports.
    pub fn word(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Newest => "newest",
            Self::Nearest => "nearest",
            Self::NewestMany => "newest-8",
            Self::NearestMany => "nearest-8",
            Self::Ours => "ours",
        }
    }

    /// The candidates that are asked.
    pub fn ask(
        self,
        wanted: &Wanted,
        candidates: &[Candidate],
        source: &Source,
        ingest: f64,
    ) -> Vec<String> {
        let newest = |one: &Candidate| (one.lag, one.round_trip, one.node.clone());
        let nearest = |one: &Candidate| (one.round_trip, one.lag, one.node.clone());
        match self {
            Self::None => Vec::new(),
            Self::Newest => first(1, candidates, newest),
            Self::NewestMany => first(ASKED_MAX, candidates, newest),
            Self::Nearest => first(1, candidates, nearest),
            Self::NearestMany => first(ASKED_MAX, candidates, nearest),
            Self::Ours => {
                let choices = choose(wanted, candidates, source, ingest);
                choices.into_iter().filter(|one| one.chosen).map(|one| one.node).collect()
            }
        }
    }
}

fn first<K: Ord>(count: usize, all: &[Candidate], key: impl Fn(&Candidate) -> K) -> Vec<String> {
    let mut all: Vec<&Candidate> = all.iter().collect();
    all.sort_by_key(|one| key(one));
    all.iter().take(count).map(|one| one.node.clone()).collect()
}

/// Seconds as the rules want them.
pub fn duration(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds.max(0.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newest_goes_by_lineage_and_nearest_by_way() {
        let candidate = |node: &str, lag, ms| Candidate {
            node: node.to_owned(),
            lag,
            round_trip: Duration::from_millis(ms),
            ..Candidate::default()
        };
        let all = [candidate("far", 0, 9), candidate("mid", 0, 5), candidate("near", 4, 1)];
        let wanted = Wanted { size_bytes: 1e9, missing_bytes: 1e9, write_rate: None };
        let ask = |policy: Policy| policy.ask(&wanted, &all, &Source::default(), 1e9);
        assert_eq!(ask(Policy::Newest), ["mid"]);
        assert_eq!(ask(Policy::Nearest), ["near"]);
        assert_eq!(ask(Policy::NewestMany), ["mid", "far", "near"]);
        assert!(ask(Policy::None).is_empty());
        assert!(!ask(Policy::Ours).is_empty());
    }
}
