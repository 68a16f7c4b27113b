//! The rules of a ledger: what a history of steps must not contain.

use std::collections::{BTreeMap, BTreeSet};

use super::{RECORD_BYTES, Sighting, read_record};

/// Findings that are listed of each kind; the others are counted with them.
const LISTED_MAX: usize = 5;

/// What is wrong with a history, in words, by kind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Two processes of the container ran at the same time.
    pub double_runner: Vec<String>,
    /// Steps were made twice, one after the other: what the first did was lost.
    pub repeated: Vec<String>,
    /// Parts of the container were not of the same instant, or were damaged.
    pub torn: Vec<String>,
    /// Every life that was seen, in the order of their beginnings.
    pub lives: Vec<u64>,
}

impl Verdict {
    /// Whether nothing is wrong. Several lives are not, by themselves.
    pub fn is_clean(&self) -> bool {
        self.double_runner.is_empty() && self.repeated.is_empty() && self.torn.is_empty()
    }
}

/// Judges a history.
///
/// Steps are ordered by the workload's own clock, which all nodes share: a witness's thread may
/// have been late.
pub fn check(history: &[Sighting]) -> Verdict {
    let mut ordered: Vec<&Sighting> = history.iter().collect();
    ordered.sort_by_key(|sighting| sighting.step.wall_ns);
    let mut verdict = Verdict::default();
    let mut lives: BTreeMap<u64, Vec<&Sighting>> = BTreeMap::new();
    for &sighting in &ordered {
        if !verdict.lives.contains(&sighting.step.life) {
            verdict.lives.push(sighting.step.life);
        }
        lives.entry(sighting.step.life).or_default().push(sighting);
        if let Some(wrong) = torn(sighting) {
            note(&mut verdict.torn, wrong);
        }
    }
    for steps in lives.values() {
        one_life(steps, &mut verdict);
    }
    several_lives(&verdict.lives.clone(), &lives, &mut verdict);
    verdict
}

fn torn(sighting: &Sighting) -> Option<String> {
    let step = &sighting.step;
    if step.bad_pages > 0 {
        return Some(format!("{}: {} bad pages", describe(sighting), step.bad_pages));
    }
    let differs = step.places.iter().any(|&place| place != step.counter);
    differs.then(|| format!("{}: child, thread, files say {:?}", describe(sighting), step.places))
}

/// Within a life the counter only grows. A step that was made before is of one of two kinds: if the
/// node that made it first goes on afterwards, two ran at once; otherwise its work was lost.
fn one_life(steps: &[&Sighting], verdict: &mut Verdict) {
    // By node: the last time that it was seen.
    let mut last_seen = BTreeMap::new();
    for sighting in steps {
        last_seen.insert(sighting.node, sighting.step.wall_ns);
    }
    let mut made: BTreeMap<u64, &Sighting> = BTreeMap::new();
    let mut highest: Option<&Sighting> = None;
    for &sighting in steps {
        let step = &sighting.step;
        let ahead = highest.filter(|ahead| ahead.step.counter >= step.counter);
        let Some(ahead) = ahead else {
            highest = Some(sighting);
            made.insert(step.counter, sighting);
            continue;
        };
        let first = made.get(&step.counter).copied().unwrap_or(ahead);
        let goes_on = first.node != sighting.node
            && last_seen.get(&first.node).is_some_and(|&last| last > step.wall_ns);
        let (here, before) = (describe(sighting), describe(first));
        if goes_on {
            note(&mut verdict.double_runner, format!("{here} while {before} goes on"));
        } else {
            note(&mut verdict.repeated, format!("{here} after {before}"));
        }
        made.entry(step.counter).or_insert(sighting);
    }
}

/// A life that begins before another has ended is a second runner.
fn several_lives(order: &[u64], lives: &BTreeMap<u64, Vec<&Sighting>>, verdict: &mut Verdict) {
    let mut seen: BTreeSet<u64> = BTreeSet::new();
    for life in order {
        let Some(first) = lives[life].first() else { continue };
        for earlier in &seen {
            let Some(last) = lives[earlier].last() else { continue };
            if last.step.wall_ns > first.step.wall_ns {
                let text = format!("{} before the last of {}", describe(first), describe(last));
                note(&mut verdict.double_runner, text);
            }
        }
        seen.insert(*life);
    }
}

fn describe(sighting: &Sighting) -> String {
    let step = &sighting.step;
    let ms = step.wall_ns / 1_000_000 % 1_000_000;
    format!("step {} of {:04x} at node {} ({ms} ms)", step.counter, step.life >> 48, sighting.node)
}

fn note(list: &mut Vec<String>, text: String) {
    if list.len() < LISTED_MAX {
        list.push(text);
    } else if list.len() == LISTED_MAX {
        list.push("... and more".to_owned());
    }
}

/// Reads a ledger's file as a whole: every record of `life` from 1 on, without a gap. Returns the
/// last counter.
///
/// Errors: in words, the first record that is missing, torn or of another life.
pub fn read_file(bytes: &[u8], life: u64) -> Result<u64, String> {
    let mut counter = 0;
    for record in bytes.chunks(RECORD_BYTES) {
        counter += 1;
        match read_record(record) {
            None => return Err(format!("record {counter} is torn")),
            Some((other, _)) if other != life => {
                return Err(format!("record {counter} is of life {other:016x}"));
            }
            Some((_, found)) if found != counter => {
                return Err(format!("record {counter} is step {found}"));
            }
            Some(_) => {}
        }
    }
    Ok(counter)
}

#[cfg(test)]
mod tests {
    use super::super::{Step, record};
    use super::*;

    /// Steps `from..=to` at a node, 5 ms apart from `begin_ms` on.
    fn stream(life: u64, node: usize, from: u64, to: u64, begin_ms: u64) -> Vec<Sighting> {
        let step = |counter| {
            let wall_ns = (begin_ms + (counter - from) * 5) * 1_000_000;
            let places = vec![counter; 4];
            Step { life, counter, wall_ns, bad_pages: 0, unsent: 0, places }
        };
        (from..=to).map(|counter| Sighting { node, step: step(counter) }).collect()
    }

    fn judged(streams: &[Vec<Sighting>]) -> Verdict {
        check(&streams.concat())
    }

    #[test]
    fn a_life_that_moves_there_and_back_is_clean_also_with_packets_lost() {
        let mut there = stream(1, 1, 101, 150, 700);
        there.retain(|sighting| sighting.step.counter % 7 != 0);
        let verdict = judged(&[stream(1, 0, 1, 100, 0), there, stream(1, 0, 151, 200, 2000)]);
        assert!(verdict.is_clean(), "{verdict:?}");
        assert_eq!(verdict.lives, [1]);
    }

    #[test]
    fn late_threads_of_the_witness_are_no_fault() {
        let verdict = judged(&[stream(1, 1, 101, 150, 700), stream(1, 0, 1, 100, 0)]);
        assert!(verdict.is_clean(), "{verdict:?}");
    }

    #[test]
    fn two_nodes_at_once_are_two_runners() {
        // The source goes on from step 100 while the destination does, too.
        let verdict = judged(&[stream(1, 0, 1, 200, 0), stream(1, 1, 101, 150, 600)]);
        assert!(!verdict.double_runner.is_empty() && verdict.repeated.is_empty(), "{verdict:?}");
    }

    #[test]
    fn a_source_that_wakes_up_beside_the_destination_is_a_second_runner() {
        let source = [stream(1, 0, 1, 100, 0), stream(1, 0, 101, 110, 1000)].concat();
        let verdict = judged(&[source, stream(1, 1, 101, 300, 700)]);
        assert!(!verdict.double_runner.is_empty(), "{verdict:?}");
    }

    #[test]
    fn steps_that_a_disowned_destination_made_are_repeated() {
        let source = [stream(1, 0, 1, 100, 0), stream(1, 0, 101, 200, 3000)].concat();
        let verdict = judged(&[source, stream(1, 1, 101, 140, 700)]);
        assert!(verdict.double_runner.is_empty(), "{verdict:?}");
        assert!(verdict.repeated[0].contains("step 101"), "{verdict:?}");
    }

    #[test]
    fn a_step_back_on_one_node_is_a_loss() {
        let verdict = judged(&[stream(1, 0, 1, 100, 0), stream(1, 0, 90, 120, 700)]);
        assert!(!verdict.repeated.is_empty() && verdict.double_runner.is_empty(), "{verdict:?}");
    }

    #[test]
    fn a_second_life_beside_the_first_is_a_second_runner_and_one_after_it_is_not() {
        let beside = judged(&[stream(1, 0, 1, 100, 0), stream(2, 1, 1, 10, 300)]);
        assert!(!beside.double_runner.is_empty(), "{beside:?}");
        let after = judged(&[stream(1, 0, 1, 100, 0), stream(2, 1, 1, 10, 3000)]);
        assert!(after.is_clean() && after.lives == [1, 2], "{after:?}");
    }

    #[test]
    fn a_place_of_another_instant_or_a_bad_page_is_a_torn_cut() {
        for place in 0..4 {
            let mut history = stream(1, 0, 1, 10, 0);
            history[5].step.places[place] = 5;
            assert_eq!(check(&history).torn.len(), 1, "{place}");
        }
        let mut history = stream(1, 0, 1, 10, 0);
        history[9].step.bad_pages = 1;
        assert_eq!(check(&history).torn.len(), 1);
    }

    #[test]
    fn many_findings_are_cut_short() {
        let verdict = judged(&[stream(1, 0, 1, 100, 0), stream(1, 0, 1, 100, 3000)]);
        assert_eq!(verdict.repeated.len(), LISTED_MAX + 1);
    }

    #[test]
    fn a_file_must_have_every_record_once_and_in_order() {
        let file = |counters: &[u64]| -> Vec<u8> {
            counters.iter().flat_map(|&counter| record(7, counter, 1).into_bytes()).collect()
        };
        assert_eq!(read_file(&file(&[1, 2, 3]), 7), Ok(3));
        assert_eq!(read_file(&[], 7), Ok(0));
        for wrong in [&[1, 3][..], &[2], &[1, 2, 2], &[1, 2, 1]] {
            assert!(read_file(&file(wrong), 7).is_err(), "{wrong:?}");
        }
        let whole = file(&[1, 2, 3]);
        assert!(read_file(&whole[..whole.len() - 1], 7).unwrap_err().contains("torn"));
        assert!(read_file(&whole, 8).unwrap_err().contains("life"));
    }
}
