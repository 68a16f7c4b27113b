//! On which neighbours a copy of a snapshot is put.
//!
//! The nearest ones: a destination near this node is near them too. A copy goes as a difference
//! where an earlier snapshot lies already, so such a neighbour counts as half as far away; without
//! that, two that are about as near would take turns with every hello, and each turn would cost a
//! whole copy. When the neighbourhood changes by more than that, the placement follows by itself,
//! since it is made again for every snapshot.

use std::collections::BTreeMap;

/// How much farther another neighbour may be than one that has an earlier snapshot, and the latter
/// still be chosen.
const MOVE_FACTOR: f64 = 2.0;

/// A node that could hold a copy.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Neighbour {
    /// Its name.
    pub name: String,
    /// What it says of itself.
    pub labels: BTreeMap<String, String>,
    /// How long it takes to answer, in milliseconds.
    pub round_trip_ms: f64,
    /// Bytes per second, as measured; 0 if never.
    pub throughput: f64,
    /// Room that it has for copies, in bytes.
    pub free_bytes: u64,
    /// Whether it answers.
    pub is_reachable: bool,
    /// Whether it has an earlier snapshot of the subject.
    pub has_earlier: bool,
}

/// Names of the at most `count` neighbours that are to have a copy of `bytes`, the first choice
/// first.
///
/// Only those that answer, have room, bear every label of `labels` and are not named in `except`.
/// Nearest first, by round trip, then by throughput, then by name.
pub fn place(
    count: usize,
    bytes: u64,
    labels: &BTreeMap<String, String>,
    neighbours: &[Neighbour],
    except: &[&str],
) -> Vec<String> {
    let fits = |one: &&Neighbour| {
        one.is_reachable
            && one.free_bytes >= bytes
            && !except.contains(&one.name.as_str())
            && labels.iter().all(|(key, value)| one.labels.get(key) == Some(value))
    };
    let distance = |one: &Neighbour| {
        if one.has_earlier { one.round_trip_ms / MOVE_FACTOR } else { one.round_trip_ms }
    };
    let mut fitting: Vec<&Neighbour> = neighbours.iter().filter(fits).collect();
    fitting.sort_by(|one, other| {
        distance(one)
            .total_cmp(&distance(other))
            .then(other.throughput.total_cmp(&one.throughput))
            .then(one.name.cmp(&other.name))
    });
    fitting.iter().take(count).map(|one| one.name.clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn neighbour(name: &str, round_trip_ms: f64) -> Neighbour {
        Neighbour {
            name: name.to_owned(),
            round_trip_ms,
            free_bytes: 100,
            is_reachable: true,
            ..Neighbour::default()
        }
    }

    fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn nearest_first_then_fastest_then_by_name() {
        let fast = Neighbour { throughput: 9.0, ..neighbour("d", 2.0) };
        let all = [neighbour("far", 9.0), neighbour("c", 2.0), neighbour("b", 2.0), fast];
        assert_eq!(place(9, 1, &labels(&[]), &all, &[]), ["d", "b", "c", "far"]);
        assert_eq!(place(2, 1, &labels(&[]), &all, &["d"]), ["b", "c"]);
        assert!(place(0, 1, &labels(&[]), &all, &[]).is_empty());
    }

    #[test]
    fn only_those_that_answer_have_room_and_bear_the_labels() {
        let away = Neighbour { is_reachable: false, ..neighbour("away", 1.0) };
        let full = Neighbour { free_bytes: 9, ..neighbour("full", 1.0) };
        let hall = labels(&[("hall", "2"), ("power", "ups")]);
        let other = Neighbour { labels: labels(&[("hall", "1")]), ..neighbour("other", 1.0) };
        let right = Neighbour { labels: hall, ..neighbour("right", 5.0) };
        let all = [away, full, other, right];
        assert_eq!(place(9, 10, &labels(&[("hall", "2")]), &all, &[]), ["right"]);
        assert_eq!(place(9, 10, &labels(&[]), &all, &[]), ["other", "right"]);
    }

    #[test]
    fn a_copy_stays_where_its_base_is_until_another_is_clearly_nearer() {
        let has = Neighbour { has_earlier: true, ..neighbour("has", 1.5) };
        assert_eq!(place(1, 1, &labels(&[]), &[neighbour("new", 1.0), has.clone()], &[]), ["has"]);
        assert_eq!(place(1, 1, &labels(&[]), &[neighbour("new", 0.5), has], &[]), ["new"]);
    }

    proptest! {
        /// Method: neighbours in any order and state; `kept` of them fit.
        #[test]
        fn the_order_of_neighbours_does_not_matter_and_nobody_unfit_is_named(
            states in proptest::collection::vec((0u8..4, 0u64..20, any::<bool>(), any::<bool>()), 0..12),
            count in 0usize..6,
            turn in 0usize..12,
        ) {
            let mut all: Vec<Neighbour> = states
                .iter()
                .enumerate()
                .map(|(index, (distance, free_bytes, is_reachable, has_earlier))| Neighbour {
                    free_bytes: *free_bytes,
                    is_reachable: *is_reachable,
                    has_earlier: *has_earlier,
                    ..neighbour(&format!("n{index}"), f64::from(*distance))
                })
                .collect();
            let placed = place(count, 10, &labels(&[]), &all, &["n0"]);
            let is_fit = |one: &&Neighbour| one.is_reachable && one.free_bytes >= 10 && one.name != "n0";
            prop_assert_eq!(placed.len(), all.iter().filter(is_fit).count().min(count));
            prop_assert!(placed.iter().all(|name| all.iter().filter(is_fit).any(|one| one.name == *name)));
            let fewer = place(count / 2, 10, &labels(&[]), &all, &["n0"]);
            prop_assert_eq!(&placed[..fewer.len()], fewer, "more copies leave the first ones where they are");
            if !all.is_empty() {
                let middle = turn % all.len();
                all.rotate_left(middle);
            }
            prop_assert_eq!(place(count, 10, &labels(&[]), &all, &["n0"]), placed);
        }
    }
}
