//! The neighbours that a destination asks for a subject, and what that is expected to bring.
//!
//! The model. Of a subject written at a set rate, a snapshot of some age leaves a difference
//! ([`predict::changed`](changed)), which the source must send; what it has besides, a fresher
//! snapshot has too, since pages that have stayed the same since long ago have stayed the same
//! since. So, freshest first, everything that is missing is a row of nested parts, and by an
//! instant T all of it can be here if
//!
//! ```text
//! for every k:  what only the k freshest and the source have           <=  what they send until T
//!               all that is missing                                      <=  what the destination takes in until T
//! ```
//!
//! A node sends from the moment it has been asked ([`ROUND_TRIPS`]), at half its measured rate
//! ([`RELIED_ON`]) divided among the tasks that run there. The earliest such T is [`end`]; it never
//! decreases when a rate falls or an age, a load or a way grows, so a worse candidate never ranks
//! above a better one. What the container writes until T follows from the source after it and grows
//! with T, so the earliest T is also the earliest end of the whole.
//!
//! Candidates are ranked by the time that each would save alone, and taken in that order while
//! another one makes the end earlier than those taken before it by [`GAIN_MIN`]. No node is asked
//! without use: a request to a node that adds nothing costs that node something. Should the
//! measurements be wrong, the source helps all the same (`peer::queue`); the choice only says who
//! is asked first. Of a subject whose write rate was never measured it is unknown what a snapshot
//! has that a fresher one lacks: then every useful neighbour is asked.

use std::fmt;
use std::time::Duration;

use crate::predict::{RATE_UNKNOWN, changed};

/// Most neighbours that are asked for one subject.
pub const CHOSEN_MAX: usize = 8;

/// Another neighbour must make the end earlier by this share of it: less is within the noise of any
/// measurement.
pub const GAIN_MIN: f64 = 0.01;

/// Share of a measured rate that is relied on. What was measured then need not hold now: equal runs
/// differ by 30%, and other traffic comes and goes. Relying on less asks more nodes, so that no
/// single one decides how long it takes.
pub const RELIED_ON: f64 = 0.5;

/// Round trips before the first content of a node arrives: what it has, and the lists above the
/// content.
const ROUND_TRIPS: u32 = 3;

/// Bytes that are on their way from one node at once: what a node that was never measured can bring
/// per round trip.
const WINDOW_BYTES: f64 = 1_048_576.0;

/// A subject that was never measured is taken to be written over once in this time.
const WRITTEN_OVER_UNKNOWN: Duration = Duration::from_secs(3600);

/// No end is later than this, in microseconds; about 50 days.
const END_MAX_US: u64 = 1 << 42;

/// What is to be brought.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Wanted {
    /// Its whole size.
    pub size_bytes: f64,
    /// Of that, what the destination lacks.
    pub missing_bytes: f64,
    /// Bytes per second that are written, if it was measured.
    pub write_rate: Option<f64>,
}

/// A neighbour that has a snapshot of the subject.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Candidate {
    /// Its name.
    pub node: String,
    /// How many snapshots of the subject are known to be newer than its newest.
    pub lag: u64,
    /// How old its newest is. Snapshots of more lag are taken to be at least as old as those of
    /// less, whatever clocks say.
    pub age: Duration,
    /// Bytes per second that earlier migrations measured.
    pub rate: Option<f64>,
    /// How long it takes to answer.
    pub round_trip: Duration,
    /// Runnable tasks per processor, as it says of itself.
    pub load: f64,
}

/// The node that has everything.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Source {
    /// Bytes per second that earlier migrations measured.
    pub rate: Option<f64>,
    /// How long it takes to answer.
    pub round_trip: Duration,
    /// Runnable tasks per processor.
    pub load: f64,
}

/// Why a candidate is asked or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Asked: all is here sooner with it.
    Sooner,
    /// Not asked: its snapshot is so old, or it is so slow, that the source alone is as soon.
    NoUse,
    /// Asked: how fast the subject is written was never measured, so how much others leave to it
    /// cannot be told.
    Unmeasured,
    /// Not asked: those that are asked bring as much as soon.
    NotNeeded,
    /// Not asked: [`CHOSEN_MAX`] others are.
    Enough,
}

impl Reason {
    fn is_asked(self) -> bool {
        matches!(self, Self::Sooner | Self::Unmeasured)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Sooner => "all is here sooner with it",
            Self::NoUse => "too old or too slow: the source alone is as soon",
            Self::Unmeasured => "it may have what others lack: the write rate is not known",
            Self::NotNeeded => "those that are asked bring as much as soon",
            Self::Enough => "enough others are asked",
        })
    }
}

/// What was decided about a candidate.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// Its name.
    pub node: String,
    /// Seconds that it alone would save over the source alone. Higher is better.
    pub score: f64,
    /// Bytes expected from it; none if it is not asked.
    pub expected_bytes: f64,
    /// Whether it is to be asked.
    pub chosen: bool,
    /// Why.
    pub reason: Reason,
}

/// A candidate as the model sees it.
#[derive(Clone, Copy, Debug)]
struct Channel {
    held: f64,
    rate: f64,
    begins: Duration,
}

impl Channel {
    fn bytes_until(&self, end: Duration) -> f64 {
        self.rate * end.saturating_sub(self.begins).as_secs_f64()
    }
}

/// Decides about all candidates; the best first.
///
/// - Units: bytes per second. `ingest` is what the destination takes in from everybody together.
/// - The order of `candidates` does not matter.
pub fn choose(
    wanted: &Wanted,
    candidates: &[Candidate],
    source: &Source,
    ingest: f64,
) -> Vec<Choice> {
    let (size, missing) = (at_least_zero(wanted.size_bytes), at_least_zero(wanted.missing_bytes));
    let written_over = || size / WRITTEN_OVER_UNKNOWN.as_secs_f64();
    let write_rate = at_least_zero(wanted.write_rate.unwrap_or_else(written_over));
    let ages = ages(candidates);
    let source = Channel {
        held: missing,
        rate: rate(source.rate, source.round_trip, source.load),
        begins: source.round_trip * ROUND_TRIPS,
    };
    let channel = |(one, age): (&Candidate, &Duration)| Channel {
        held: at_least_zero(missing - changed(size, write_rate, age.as_secs_f64())),
        rate: rate(one.rate, one.round_trip, one.load),
        begins: one.round_trip * ROUND_TRIPS,
    };
    let channels: Vec<Channel> = candidates.iter().zip(&ages).map(channel).collect();
    let end = |chosen: &[usize]| {
        end(&source, chosen.iter().map(|index| channels[*index]).collect(), ingest)
    };
    let alone = end(&[]);
    let saved: Vec<Duration> =
        (0..channels.len()).map(|one| alone - end(&[one]).min(alone)).collect();
    // What differs by less than would be a reason to ask differs by noise.
    let step = alone.mul_f64(GAIN_MIN).max(Duration::from_micros(1)).as_micros();
    let rank = |saved: Duration| saved.as_micros() / step;
    let mut order: Vec<usize> = (0..channels.len()).collect();
    order.sort_by(|one, other| {
        let ((a, x), (b, y)) =
            ((&candidates[*one], &channels[*one]), (&candidates[*other], &channels[*other]));
        (rank(saved[*other]).cmp(&rank(saved[*one])))
            // As good in the end, give or take noise: the fresher, which leaves the source less,
            // faster, nearer, idler.
            .then(ages[*one].cmp(&ages[*other]))
            .then(y.rate.total_cmp(&x.rate))
            .then(a.round_trip.cmp(&b.round_trip))
            .then(a.load.total_cmp(&b.load))
            .then(a.lag.cmp(&b.lag))
            .then(a.node.cmp(&b.node))
    });
    let (mut chosen, mut soonest) = (Vec::new(), alone);
    let mut reasons: Vec<Reason> = Vec::new();
    for index in &order {
        let asked = reasons.iter().filter(|reason| reason.is_asked()).count();
        let mut with = chosen.clone();
        with.push(*index);
        let sooner = end(&with);
        let is_sooner = |than: Duration, end: Duration| end < than.mul_f64(1.0 - GAIN_MIN);
        reasons.push(if !is_sooner(alone, alone - saved[*index]) {
            Reason::NoUse
        } else if asked == CHOSEN_MAX {
            Reason::Enough
        } else if is_sooner(soonest, sooner) {
            (chosen, soonest) = (with, sooner);
            Reason::Sooner
        } else if wanted.write_rate.is_none() {
            Reason::Unmeasured
        } else {
            Reason::NotNeeded
        });
    }
    let shares = shares(&chosen, &channels, soonest);
    let choice = |(index, reason): (&usize, Reason)| Choice {
        node: candidates[*index].node.clone(),
        score: saved[*index].as_secs_f64(),
        expected_bytes: shares[*index],
        chosen: reason.is_asked(),
        reason,
    };
    order.iter().zip(reasons).map(choice).collect()
}

fn at_least_zero(value: f64) -> f64 {
    // Also of a number that is none.
    value.max(0.0)
}

/// Bytes per second to rely on: divided among the tasks that run, and never more than a window per
/// round trip of a node that was never measured.
fn rate(measured: Option<f64>, round_trip: Duration, load: f64) -> f64 {
    let by_window = WINDOW_BYTES / round_trip.as_secs_f64().max(1e-6);
    let rate = at_least_zero(measured.unwrap_or(RATE_UNKNOWN.min(by_window)));
    RELIED_ON * rate / at_least_zero(load).max(1.0)
}

/// Ages that agree with the lineage: one snapshot has one age, the least that anybody tells, and
/// older ones are not younger.
fn ages(candidates: &[Candidate]) -> Vec<Duration> {
    let mut order: Vec<usize> = (0..candidates.len()).collect();
    order.sort_by_key(|index| (candidates[*index].lag, candidates[*index].age));
    let mut ages = vec![Duration::ZERO; candidates.len()];
    let (mut lag, mut age) = (None, Duration::ZERO);
    for index in order {
        let one = &candidates[index];
        if lag != Some(one.lag) {
            (lag, age) = (Some(one.lag), age.max(one.age));
        }
        ages[index] = age;
    }
    ages
}

/// The earliest whole microsecond by which everything can be here. Searched for, not computed: so
/// rounding never turns a worse candidate into a better one.
fn end(source: &Channel, mut chosen: Vec<Channel>, ingest: f64) -> Duration {
    chosen.sort_by(|one, other| other.held.total_cmp(&one.held));
    let suffices = |end: Duration| {
        let mut sent = source.bytes_until(end);
        let mut others = chosen.iter();
        loop {
            let next = others.next();
            if sent < source.held - next.map_or(0.0, |next| next.held) {
                return false;
            }
            let Some(next) = next else {
                return at_least_zero(ingest) * end.as_secs_f64() >= source.held;
            };
            sent += next.bytes_until(end);
        }
    };
    let (mut early, mut late) = (0, END_MAX_US);
    while early < late {
        let middle = early + (late - early) / 2;
        if suffices(Duration::from_micros(middle)) { late = middle } else { early = middle + 1 }
    }
    Duration::from_micros(late)
}

/// What each brings until `end`: part by part, the one that most have first, in proportion to what
/// each can still send.
fn shares(chosen: &[usize], channels: &[Channel], end: Duration) -> Vec<f64> {
    let mut by_held = chosen.to_vec();
    by_held.sort_by(|one, other| channels[*other].held.total_cmp(&channels[*one].held));
    let mut shares = vec![0.0; channels.len()];
    let mut held_by_less = 0.0;
    while let Some(last) = by_held.last() {
        let part = channels[*last].held - held_by_less;
        held_by_less = channels[*last].held;
        let free = |shares: &[f64], one: &usize| {
            at_least_zero(channels[*one].bytes_until(end) - shares[*one])
        };
        let together: f64 = by_held.iter().map(|one| free(&shares, one)).sum();
        if together > 0.0 {
            let filled = (part / together).min(1.0);
            for one in &by_held {
                shares[*one] += filled * free(&shares, one);
            }
        }
        by_held.pop();
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: f64 = 1_048_576.0;
    const WANTED: Wanted =
        Wanted { size_bytes: 100.0 * MIB, missing_bytes: 100.0 * MIB, write_rate: Some(0.1 * MIB) };
    /// Relied on for 10 MiB/s.
    const SOURCE: Source =
        Source { rate: Some(10.0 * MIB / RELIED_ON), round_trip: Duration::ZERO, load: 0.0 };
    const INGEST: f64 = 1000.0 * MIB;

    /// A neighbour relied on for `mib_per_s` whose snapshot is `age` seconds old and the newest but
    /// `lag`.
    fn candidate(node: &str, lag: u64, age: u64, mib_per_s: f64) -> Candidate {
        Candidate {
            node: node.to_owned(),
            lag,
            age: Duration::from_secs(age),
            rate: Some(mib_per_s * MIB / RELIED_ON),
            ..Candidate::default()
        }
    }

    fn reasons(choices: &[Choice]) -> Vec<(&str, Reason)> {
        choices.iter().map(|choice| (choice.node.as_str(), choice.reason)).collect()
    }

    /// Method: figures by hand; the source needs 10 s alone, and with the first 0.95 s for what it
    /// must send.
    #[test]
    fn freshness_and_rate_both_count() {
        // At 0.1 MiB/s, after 1000 s 63 of 100 MiB differ, after 100 s 9.5, after 10 s 1.
        let all = [
            candidate("old-fast", 2, 1000, 100.0),
            candidate("fresh-slow", 0, 10, 5.0),
            candidate("both", 1, 100, 100.0),
        ];
        let choices = choose(&WANTED, &all, &SOURCE, INGEST);
        let reasons = reasons(&choices);
        use Reason::{NotNeeded, Sooner};
        assert_eq!(reasons, [("both", Sooner), ("old-fast", NotNeeded), ("fresh-slow", Sooner)]);
        for (choice, saved) in choices.iter().zip([10.0 - 0.95, 10.0 - 6.32, 10.0 - 6.67]) {
            assert!((choice.score - saved).abs() < 0.01, "{choice:?}");
        }
    }

    #[test]
    fn several_are_asked_while_that_brings_the_end_nearer() {
        let all = [0, 1, 2].map(|one| candidate(["a", "b", "c"][one], 0, 0, 20.0));
        let choices = choose(&WANTED, &all, &SOURCE, INGEST);
        assert!(choices.iter().all(|choice| choice.chosen));
        let bytes: f64 = choices.iter().map(|choice| choice.expected_bytes).sum();
        assert!(
            (bytes / MIB - 100.0 * 60.0 / 70.0).abs() < 0.1,
            "the source does its share: {bytes}"
        );
        // The destination takes in no more than one of them sends.
        let choices = choose(&WANTED, &all, &SOURCE, 20.0 * MIB);
        use Reason::{NotNeeded, Sooner};
        assert_eq!(reasons(&choices), [("a", Sooner), ("b", NotNeeded), ("c", NotNeeded)]);
    }

    #[test]
    fn nobody_is_asked_who_is_of_no_use() {
        let overwritten = candidate("overwritten", 1, 1_000_000, 100.0);
        let slow = candidate("slow", 0, 0, 0.01);
        let never = Candidate { rate: Some(0.0), ..candidate("never", 0, 0, 1.0) };
        let far = Candidate { round_trip: Duration::from_secs(9), ..candidate("far", 0, 0, 1.0) };
        let choices = choose(&WANTED, &[overwritten, slow, never, far], &SOURCE, INGEST);
        assert!(choices.iter().all(|choice| choice.reason == Reason::NoUse && !choice.chosen));
        assert!(choices.iter().all(|choice| choice.expected_bytes == 0.0));
        assert!(choose(&WANTED, &[], &SOURCE, INGEST).is_empty());
    }

    #[test]
    fn of_what_was_never_measured_everybody_of_use_is_asked() {
        let near = |node: &str, age| Candidate {
            node: node.to_owned(),
            age: Duration::from_secs(age),
            rate: Some(1e9),
            ..Candidate::default()
        };
        let candidates = [near("fresh", 1), near("older", 60)];
        let source = Source { rate: Some(1e6), ..Source::default() };
        let asked = |write_rate| {
            let wanted = Wanted { size_bytes: 1e9, missing_bytes: 1e9, write_rate };
            let choices = choose(&wanted, &candidates, &source, 1e8);
            choices.iter().filter(|choice| choice.chosen).count()
        };
        assert_eq!((asked(Some(1e3)), asked(None)), (1, 2));
    }

    #[test]
    fn no_more_are_asked_than_allowed() {
        let all: Vec<_> = (0..20).map(|one| candidate(&format!("n{one:02}"), 0, 0, 1.0)).collect();
        let choices = choose(&WANTED, &all, &SOURCE, INGEST);
        assert_eq!(choices.iter().filter(|choice| choice.chosen).count(), CHOSEN_MAX);
        assert_eq!(choices.last().map(|last| last.reason), Some(Reason::Enough));
    }

    #[test]
    fn a_clock_that_is_wrong_does_not_make_an_old_snapshot_new() {
        let old_by_lineage = candidate("z", 3, 0, 10.0);
        let new_by_lineage = candidate("a", 0, 500, 10.0);
        assert_eq!(
            ages(&[old_by_lineage, new_by_lineage, candidate("b", 0, 900, 1.0)]),
            [500, 500, 500].map(Duration::from_secs)
        );
    }

    #[test]
    fn who_was_never_measured_is_taken_to_be_slower_the_farther_it_is() {
        let unknown = |node: &str, ms| Candidate {
            rate: None,
            round_trip: Duration::from_millis(ms),
            ..candidate(node, 0, 0, 0.0)
        };
        let choices = choose(&WANTED, &[unknown("far", 200), unknown("near", 1)], &SOURCE, INGEST);
        assert_eq!(choices[0].node, "near");
        assert!(choices[0].chosen);
        assert_eq!(rate(None, Duration::ZERO, 0.0), RATE_UNKNOWN * RELIED_ON);
        assert_eq!(rate(None, Duration::from_millis(200), 0.0), 5.0 * MIB * RELIED_ON);
    }

    #[test]
    fn nonsense_is_survived() {
        let nan = Candidate { rate: Some(f64::NAN), load: f64::NAN, ..candidate("nan", 0, 0, 1.0) };
        let wanted = Wanted { size_bytes: f64::NAN, write_rate: Some(f64::NEG_INFINITY), ..WANTED };
        let source = Source { rate: Some(f64::INFINITY), ..SOURCE };
        let nan = std::slice::from_ref(&nan);
        assert!(!choose(&wanted, nan, &source, f64::NAN)[0].chosen);
        assert!(!choose(&WANTED, nan, &source, INGEST)[0].chosen);
    }

    fn any_candidates() -> impl Strategy<Value = Vec<Candidate>> {
        let one =
            (0u64..5, 0u64..5000, proptest::option::of(0.0f64..200.0), 0u64..300, 0.0f64..4.0);
        proptest::collection::vec(one, 1..12).prop_map(|all| {
            let named = |(index, (lag, age, rate, ms, load)): (usize, _)| Candidate {
                rate: Option::map(rate, |mib: f64| mib * MIB),
                round_trip: Duration::from_millis(ms),
                load,
                ..candidate(&format!("n{index:02}"), lag, age, 0.0)
            };
            all.into_iter().enumerate().map(named).collect()
        })
    }

    fn any_wanted() -> impl Strategy<Value = (Wanted, Source, f64)> {
        let source = (proptest::option::of(0.1f64..200.0), 0u64..100, 0.0f64..4.0);
        let sizes = (0.0f64..2000.0, 0.0f64..=1.0);
        (sizes, proptest::option::of(0.0f64..10.0), source, 1.0f64..200.0).prop_map(
            |((size, missing), rate, (source, ms, load), ingest)| {
                let wanted = Wanted {
                    size_bytes: size * MIB,
                    missing_bytes: size * missing * MIB,
                    write_rate: rate.map(|rate| rate * MIB),
                };
                let (rate, round_trip) = (source.map(|rate| rate * MIB), Duration::from_millis(ms));
                (wanted, Source { rate, round_trip, load }, ingest * MIB)
            },
        )
    }

    proptest! {
        #[test]
        fn the_order_of_candidates_does_not_matter(
            mut all in any_candidates(), (wanted, source, ingest) in any_wanted(), turn in 0usize..12,
        ) {
            let choices = choose(&wanted, &all, &source, ingest);
            let middle = turn % all.len();
            all.rotate_left(middle);
            all.reverse();
            let again = choose(&wanted, &all, &source, ingest);
            prop_assert_eq!(choices, again);
        }

        /// Method: any candidate, and a copy of it that is worse in some ways and better in none.
        #[test]
        fn a_dominated_candidate_never_ranks_above_its_dominator(
            mut all in any_candidates(), (wanted, source, ingest) in any_wanted(),
            (lag, age, rate, ms, load) in (0u64..3, 0u64..900, 0.1f64..=1.0, 0u64..99, 0.0f64..2.0),
        ) {
            let better = all[0].clone();
            let worse = Candidate {
                node: "a name that sorts first".to_owned(),
                lag: better.lag + lag,
                age: better.age + Duration::from_secs(age),
                rate: better.rate.map(|better| better * rate),
                round_trip: better.round_trip + Duration::from_millis(ms),
                load: better.load + load,
            };
            prop_assume!(lag + ms > 0 || load > 0.0);
            all.push(worse.clone());
            let choices = choose(&wanted, &all, &source, ingest);
            let place = |node: &str| choices.iter().position(|choice| choice.node == node);
            prop_assert!(place(&better.node) < place(&worse.node));
        }

        #[test]
        fn nobody_is_chosen_who_makes_the_end_later_than_the_source_alone(
            all in any_candidates(), (wanted, source, ingest) in any_wanted(),
        ) {
            let choices = choose(&wanted, &all, &source, ingest);
            prop_assert!(choices.iter().all(|choice| choice.score >= 0.0));
            prop_assert!(choices.iter().all(|choice| !choice.chosen || choice.score > 0.0));
            let first = choices.iter().find(|choice| choice.reason != Reason::NoUse);
            prop_assert!(first.is_none_or(|first| first.chosen), "what is of use is used");
        }

        #[test]
        fn a_loaded_or_slower_or_farther_node_never_scores_higher(
            mut all in any_candidates(), (wanted, source, ingest) in any_wanted(),
            (load, ms, slower) in (0.0f64..9.0, 0u64..900, 0.0f64..=1.0),
        ) {
            let score = |all: &[Candidate]| {
                let choices = choose(&wanted, all, &source, ingest);
                choices.into_iter().find(|choice| choice.node == "n00").unwrap().score
            };
            let before = score(&all);
            all[0].load += load;
            all[0].round_trip += Duration::from_millis(ms);
            all[0].rate = all[0].rate.map(|rate| rate * slower);
            prop_assert!(score(&all) <= before);
        }

        #[test]
        fn expected_bytes_are_no_more_than_a_node_has_and_than_is_wanted(
            all in any_candidates(), (wanted, source, ingest) in any_wanted(),
        ) {
            let choices = choose(&wanted, &all, &source, ingest);
            let sum: f64 = choices.iter().map(|choice| choice.expected_bytes).sum();
            prop_assert!(sum <= wanted.missing_bytes * 1.000_001 + 1.0);
            let size = wanted.size_bytes;
            let rate = wanted.write_rate.unwrap_or(size / 3600.0);
            for choice in &choices {
                let index = all.iter().position(|one| one.node == choice.node).unwrap();
                let leaves = changed(size, rate, ages(&all)[index].as_secs_f64());
                let held = at_least_zero(wanted.missing_bytes - leaves);
                prop_assert!(choice.expected_bytes <= held * 1.000_001 + 1.0);
            }
        }
    }
}
