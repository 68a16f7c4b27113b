//! Which snapshots a node gives up.
//!
//! 1. Of a subject that was removed, everything, after a set time: what a container left must not
//!    outlive it for ever.
//! 2. Of every subject, what is neither among its newest few nor young.
//! 3. While more is stored than the budget allows, the least useful first: what is left of removed
//!    subjects, then older snapshots, and last the newest of each subject, since that is what a
//!    migration asks for.
//!
//! Pinned and leased snapshots are never given up; they count among the newest of their subject all
//! the same. What cannot be known keeps a snapshot: a subject that is gone since an unknown time
//! is not expired.

use std::cmp::{Ordering, Reverse};
use std::collections::BTreeMap;
use std::time::Duration;

use godwit_store::store::SnapshotId;

/// A snapshot is expected to be wanted again after about as long as it has rested, and after this
/// long at least.
const REST_MIN: Duration = Duration::from_secs(60);

/// A snapshot as this node has it.
#[derive(Clone, Debug, PartialEq)]
pub struct Kept {
    /// Its name.
    pub id: SnapshotId,
    /// What it is of.
    pub subject: String,
    /// Place in the subject's lineage; higher is newer.
    pub sequence: u64,
    /// Since it was taken or came here, by this node's clock.
    pub age: Duration,
    /// Bytes that go if it alone goes; 0 if others share all its chunks.
    pub bytes_freed: u64,
    /// Whether it is pinned: kept whatever happens.
    pub is_pinned: bool,
    /// Whether something is using it now.
    pub is_leased: bool,
    /// Whether its container or volume is still there, on whatever node.
    pub subject_exists: bool,
    /// How long its container or volume has been gone, as far as known.
    pub removed_for: Option<Duration>,
    /// How long ago it served a request.
    pub last_used: Option<Duration>,
}

/// What is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// Newest snapshots of each subject.
    pub keep_last: usize,
    /// Younger ones are kept beyond that number.
    pub keep_within: Option<Duration>,
    /// How long snapshots outlive their subject.
    pub expire_removed: Duration,
    /// Bytes that may be stored in all.
    pub budget_bytes: Option<u64>,
}

/// Why a snapshot goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Its container or volume was removed long enough ago.
    SubjectRemoved,
    /// There are enough newer ones.
    Superseded,
    /// More is stored than allowed, and it is the least useful.
    OverBudget,
}

/// A snapshot to give up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Removal {
    /// Which.
    pub id: SnapshotId,
    /// Why.
    pub reason: Reason,
}

/// What to give up of `kept`, in this order, when `total_bytes` are stored in all.
///
/// Snapshots share chunks, so removing two may free more than `bytes_freed` of both: the list may
/// be longer than needed. Who wants to give up no more than needed applies it from the front and
/// measures in between.
pub fn retain(kept: &[Kept], rules: &Rules, total_bytes: u64) -> Vec<Removal> {
    let ranks = ranks(kept);
    let mut stays: Vec<(&Kept, usize)> = Vec::new();
    let mut goes = Vec::new();
    for (one, rank) in kept.iter().zip(ranks) {
        let is_expired =
            !one.subject_exists && one.removed_for.is_some_and(|gone| gone >= rules.expire_removed);
        let is_young = rules.keep_within.is_some_and(|within| one.age <= within);
        let reason = if one.is_pinned || one.is_leased {
            continue;
        } else if is_expired {
            Reason::SubjectRemoved
        } else if rank >= rules.keep_last && !is_young {
            Reason::Superseded
        } else {
            stays.push((one, rank));
            continue;
        };
        goes.push((one, reason));
    }
    // Expired ones first; of the rest the oldest first. Names make the order complete.
    goes.sort_by_key(|(one, reason)| (*reason != Reason::SubjectRemoved, Reverse(one.age), one.id));
    let freed: u64 = goes.iter().fold(0, |sum, (one, _)| sum.saturating_add(one.bytes_freed));
    let mut left = total_bytes.saturating_sub(freed);
    stays.sort_by(|one, other| less_useful_first(*one, *other));
    for (one, _) in stays {
        if rules.budget_bytes.is_none_or(|budget| left <= budget) {
            break;
        }
        left = left.saturating_sub(one.bytes_freed);
        goes.push((one, Reason::OverBudget));
    }
    goes.into_iter().map(|(one, reason)| Removal { id: one.id, reason }).collect()
}

/// How many newer ones of the same subject there are, for each.
fn ranks(kept: &[Kept]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..kept.len()).collect();
    order.sort_by_key(|index| {
        (&kept[*index].subject, Reverse((kept[*index].sequence, kept[*index].id)))
    });
    let mut newer: BTreeMap<&str, usize> = BTreeMap::new();
    let mut ranks = vec![0; kept.len()];
    for index in order {
        let count = newer.entry(&kept[index].subject).or_default();
        ranks[index] = *count;
        *count += 1;
    }
    ranks
}

/// What is given up first compares as less: by kind, then by expected uses per byte, then by age
/// and name.
fn less_useful_first(one: (&Kept, usize), other: (&Kept, usize)) -> Ordering {
    let kind = |(one, rank): (&Kept, usize)| match (one.subject_exists, rank) {
        (false, _) => 0,
        (true, 1..) => 1,
        (true, 0) => 2,
    };
    kind(one)
        .cmp(&kind(other))
        .then(usefulness(one).total_cmp(&usefulness(other)))
        .then(other.0.age.cmp(&one.0.age))
        .then(one.0.id.cmp(&other.0.id))
}

/// Uses per second and byte: one in the time that it has rested, half as many for each newer one of
/// its subject. One that frees nothing is as useful as can be, since it costs nothing.
fn usefulness((one, rank): (&Kept, usize)) -> f64 {
    let rest = one.last_used.unwrap_or(one.age).min(one.age).max(REST_MIN);
    let halvings = i32::try_from(rank.min(64)).unwrap_or(64);
    0.5f64.powi(halvings) / rest.as_secs_f64() / one.bytes_freed as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HOUR: Duration = Duration::from_secs(3600);

    const RULES: Rules =
        Rules { keep_last: 2, keep_within: None, expire_removed: HOUR, budget_bytes: None };

    /// Snapshot `id` of `subject`, taken `hours` ago.
    fn kept(id: u64, subject: &str, hours: u32) -> Kept {
        Kept {
            id: SnapshotId(id),
            subject: subject.to_owned(),
            sequence: id,
            age: HOUR * hours,
            bytes_freed: 100,
            is_pinned: false,
            is_leased: false,
            subject_exists: true,
            removed_for: None,
            last_used: None,
        }
    }

    fn gone(kept: Kept, hours: u32) -> Kept {
        Kept { subject_exists: false, removed_for: Some(HOUR * hours), ..kept }
    }

    fn removed(kept: &[Kept], rules: &Rules, total: u64) -> Vec<(u64, Reason)> {
        retain(kept, rules, total).iter().map(|one| (one.id.0, one.reason)).collect()
    }

    #[test]
    fn the_newest_of_each_subject_and_the_young_are_kept() {
        let all =
            [kept(1, "a", 4), kept(2, "a", 3), kept(3, "a", 2), kept(4, "b", 9), kept(5, "a", 1)];
        let superseded =
            |ids: &[u64]| ids.iter().map(|id| (*id, Reason::Superseded)).collect::<Vec<_>>();
        assert_eq!(removed(&all, &RULES, 500), superseded(&[1, 2]));
        let young = Rules { keep_within: Some(HOUR * 3), ..RULES };
        assert_eq!(removed(&all, &young, 500), superseded(&[1]));
    }

    #[test]
    fn what_a_removed_container_left_goes_after_a_set_time_and_first() {
        let unknown = Kept { removed_for: None, ..gone(kept(3, "c", 90), 0) };
        let all = [kept(1, "a", 4), gone(kept(2, "b", 1), 1), unknown, gone(kept(4, "d", 1), 0)];
        let rules = Rules { keep_last: 0, keep_within: Some(HOUR * 100), ..RULES };
        assert_eq!(removed(&all, &rules, 500), [(2, Reason::SubjectRemoved)]);
    }

    #[test]
    fn a_full_budget_costs_the_removed_then_the_older_then_the_newest_that_rests_longest() {
        let used = Kept { last_used: Some(HOUR), ..kept(4, "b", 90) };
        let all = [kept(1, "a", 20), kept(2, "a", 10), gone(kept(3, "c", 1), 0), used];
        for (budget, ids) in
            [(400, &[][..]), (399, &[3]), (299, &[3, 1]), (150, &[3, 1, 2]), (0, &[3, 1, 2, 4])]
        {
            let rules = Rules { budget_bytes: Some(budget), ..RULES };
            let over: Vec<_> = ids.iter().map(|id| (*id, Reason::OverBudget)).collect();
            assert_eq!(removed(&all, &rules, 400), over, "{budget}");
        }
    }

    #[test]
    fn what_frees_nothing_is_given_up_last_of_its_kind() {
        let shared = Kept { bytes_freed: 0, ..kept(1, "a", 50) };
        let all = [shared, kept(2, "b", 1)];
        let rules = Rules { budget_bytes: Some(0), ..RULES };
        let ids: Vec<u64> = removed(&all, &rules, 400).iter().map(|(id, _)| *id).collect();
        assert_eq!(ids, [2, 1]);
    }

    #[test]
    fn pinned_and_leased_ones_stay_whatever_the_rules() {
        let pinned = Kept { is_pinned: true, ..gone(kept(1, "a", 90), 90) };
        let leased = Kept { is_leased: true, ..gone(kept(2, "a", 90), 90) };
        let rules = Rules { keep_last: 0, budget_bytes: Some(0), ..RULES };
        assert_eq!(removed(&[pinned, leased], &rules, u64::MAX), []);
    }

    fn any_kept() -> impl Strategy<Value = Vec<Kept>> {
        let one = (
            0u8..4,
            0u64..6,
            0u32..9,
            0u64..50,
            0u8..8,
            any::<bool>(),
            proptest::option::of(0u32..9),
        );
        proptest::collection::vec(one, 0..14).prop_map(|all| {
            let with_id =
                |(id, (subject, sequence, age, bytes_freed, bits, exists, used)): (usize, _)| {
                    Kept {
                        sequence,
                        bytes_freed,
                        is_pinned: bits == 1,
                        is_leased: bits == 2,
                        subject_exists: exists,
                        removed_for: (bits < 6).then_some(HOUR * u32::from(bits)),
                        last_used: Option::map(used, |hours: u32| HOUR * hours),
                        ..kept(id as u64, &format!("s{subject}"), age)
                    }
                };
            all.into_iter().enumerate().map(with_id).collect()
        })
    }

    fn any_rules() -> impl Strategy<Value = Rules> {
        (0usize..4, proptest::option::of(0u32..9), 0u32..6, proptest::option::of(0u64..500))
            .prop_map(|(keep_last, within, expire, budget_bytes)| Rules {
                keep_last,
                keep_within: within.map(|hours| HOUR * hours),
                expire_removed: HOUR * expire,
                budget_bytes,
            })
    }

    fn is_in(removals: &[Removal], one: &Kept) -> bool {
        removals.iter().any(|removal| removal.id == one.id)
    }

    proptest! {
        #[test]
        fn only_what_is_neither_pinned_nor_leased_goes_and_once(all in any_kept(), rules in any_rules()) {
            let removals = retain(&all, &rules, 600);
            for one in &all {
                let times = removals.iter().filter(|removal| removal.id == one.id).count();
                prop_assert!(times <= usize::from(!one.is_pinned && !one.is_leased));
            }
        }

        #[test]
        fn a_budget_is_reached_if_it_can_be_and_nothing_more_is_given_up(
            all in any_kept(), rules in any_rules(), other in 0u64..300,
        ) {
            let total = other + all.iter().map(|one| one.bytes_freed).sum::<u64>();
            let removals = retain(&all, &rules, total);
            let freed = |until: usize| -> u64 {
                let gone = &removals[..until];
                all.iter().filter(|one| is_in(gone, one)).map(|one| one.bytes_freed).sum()
            };
            if let Some(budget) = rules.budget_bytes {
                let is_reached = total - freed(removals.len()) <= budget;
                let all_went = all.iter().all(|one| one.is_pinned || one.is_leased || is_in(&removals, one));
                prop_assert!(is_reached || all_went);
                if removals.last().is_some_and(|last| last.reason == Reason::OverBudget) {
                    prop_assert!(total - freed(removals.len() - 1) > budget);
                }
            }
        }

        #[test]
        fn more_room_never_costs_a_snapshot(all in any_kept(), rules in any_rules(), more in 0u64..300) {
            let roomy = Rules { budget_bytes: rules.budget_bytes.map(|budget| budget + more), ..rules };
            let (tight, roomy) = (retain(&all, &rules, 600), retain(&all, &roomy, 600));
            prop_assert_eq!(&tight[..roomy.len()], roomy);
        }

        #[test]
        fn what_stays_stays_when_asked_again(all in any_kept(), rules in any_rules(), other in 0u64..300) {
            let total = other + all.iter().map(|one| one.bytes_freed).sum::<u64>();
            let removals = retain(&all, &rules, total);
            let stays: Vec<Kept> = all.iter().filter(|one| !is_in(&removals, one)).cloned().collect();
            let left = other + stays.iter().map(|one| one.bytes_freed).sum::<u64>();
            prop_assert_eq!(retain(&stays, &rules, left), []);
        }

        #[test]
        fn the_newest_of_a_live_subject_goes_for_room_only_after_everything_else(
            all in any_kept(), budget in 0u64..500,
        ) {
            let rules = Rules { keep_last: 99, expire_removed: HOUR * 99, budget_bytes: Some(budget), ..RULES };
            let removals = retain(&all, &rules, 600);
            let newest: Vec<bool> = ranks(&all).iter().map(|rank| *rank == 0).collect();
            let kinds: Vec<bool> = removals
                .iter()
                .filter_map(|removal| all.iter().position(|one| one.id == removal.id))
                .map(|index| newest[index] && all[index].subject_exists)
                .collect();
            prop_assert!(kinds.is_sorted());
        }
    }
}
