//! What a migration will cost, from what is wanted and who has it. Pure.
//!
//! The model is the procedure's own: what neighbours hold comes from them, each in proportion to
//! its rate; the source sends the rest and helps where they are slower (`peer::queue`); rounds
//! follow [`rounds::another`]; what is written meanwhile hits the same pages again, so that of
//! `size` bytes written at `rate` after `t` seconds `size * (1 - exp(-rate * t / size))` differ.

use std::collections::BTreeMap;
use std::time::Duration;

use super::rounds;

/// A peer that sent less than this in a migration was not measured by it.
pub const MEASURED_BYTES_MIN: u64 = 1 << 20;

/// Bytes per second of a peer that was never measured: about what a destination takes in from a
/// fast link.
pub const RATE_UNKNOWN: f64 = 30e6;

/// Seconds that one of something costs while the container is frozen.
struct Cost {
    /// CRIU's dump.
    dump: f64,
    /// Reading its image files, and laying them out at the destination; without the wire.
    images: f64,
    /// CRIU's restore, and the hand-off.
    restore: f64,
}

/// Measured with CRIU 4.2 on two virtual processors (`make bench ARGS=--shapes`). The first
/// process, with its first thread and the mappings of a small program, is part of `CONTAINER`.
const CONTAINER: Cost = Cost { dump: 0.13, images: 0.03, restore: 0.13 };
const BYTE: Cost = Cost { dump: 0.7 / GIB, images: 0.0, restore: 0.85 / GIB };
const PROCESS: Cost = Cost { dump: 4.5e-3, images: 6e-3, restore: 3.5e-3 };
const THREAD: Cost = Cost { dump: 0.28e-3, images: 0.25e-3, restore: 0.45e-3 };
const MAPPING: Cost = Cost { dump: 9e-6, images: 2e-6, restore: 3.5e-6 };
const GIB: f64 = 1_073_741_824.0;

/// Seconds to look at one file or directory while the container is frozen, which happens beside the
/// dump: one `stat`, and CRIU wants the processors too.
const ENTRY: f64 = 2e-6;

/// Seconds for connecting, the image's lists and the new container; and for staging what a round
/// has brought.
const BEGIN: f64 = 0.3;
const STAGE: f64 = 0.15;

/// Who has how much of a part.
#[derive(Clone, Debug, PartialEq)]
pub struct Held {
    /// The neighbour.
    pub node: String,
    /// Bytes of the part that it has and the destination lacks.
    pub bytes: f64,
}

/// One subject, read-only volume, or the image. Sizes are in bytes, uncompressed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Part {
    /// Its whole size.
    pub size: f64,
    /// What the destination lacks.
    pub missing: f64,
    /// Of that, what at least one neighbour has.
    pub held: f64,
    /// By neighbour.
    pub holders: Vec<Held>,
    /// Bytes per second that change.
    pub write_rate: f64,
    /// Files and directories in it.
    pub entries: f64,
    /// Whether its pages are dumped and restored.
    pub is_memory: bool,
}

/// What CRIU has to dump and restore besides bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Shape {
    /// Processes.
    pub processes: f64,
    /// Threads of all processes.
    pub threads: f64,
    /// Mappings of all processes.
    pub mappings: f64,
}

/// What is asked.
#[derive(Clone, Debug, Default)]
pub struct Input {
    /// Everything that moves.
    pub parts: Vec<Part>,
    /// The source's name.
    pub source: String,
    /// Bytes per second of each node that was measured.
    pub rates: BTreeMap<String, f64>,
    /// How long the source takes to capture everything once.
    pub capture: Duration,
    /// What the container consists of.
    pub shape: Shape,
    /// How long dump and restore take, as a share of what the constants say: what earlier
    /// migrations measured, or 1.
    pub pace: f64,
    /// Rounds at most, as in a request.
    pub max_rounds: u32,
}

/// What is expected.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Prediction {
    /// Bytes of the whole migration by node, by part of the input.
    pub parts: Vec<BTreeMap<String, f64>>,
    /// Bytes of each round; the first has everything.
    pub rounds: Vec<f64>,
    /// Bytes after the stop.
    pub stop_and_copy: f64,
    /// From the request until the container runs.
    pub total: Duration,
    /// From the freeze until it runs.
    pub downtime: Duration,
}

/// Of `size` bytes, how many differ after `seconds` of writing at `rate`.
pub fn changed(size: f64, rate: f64, seconds: f64) -> f64 {
    if size <= 0.0 { 0.0 } else { size * (1.0 - (-rate * seconds / size).exp()) }
}

/// The rate at which `changed` of `size` bytes differ after `seconds`.
pub fn write_rate(size: f64, changed: f64, seconds: f64) -> f64 {
    if size <= 0.0 || seconds <= 0.0 {
        return 0.0;
    }
    // Everything may have changed many times over.
    let share = (changed / size).min(0.99);
    -size / seconds * (1.0 - share).ln()
}

/// Divides what several neighbours hold among them in proportion to their rates; none brings more
/// than it has.
fn divide(part: &Part, rate: impl Fn(&str) -> f64) -> BTreeMap<String, f64> {
    let (mut open, mut left): (Vec<&Held>, f64) = (part.holders.iter().collect(), part.held);
    let mut shares = BTreeMap::new();
    while !open.is_empty() && left > 0.0 {
        let together: f64 = open.iter().map(|held| rate(&held.node)).sum();
        let fair = |held: &Held| left * rate(&held.node) / together;
        let full: Vec<&Held> = open.iter().copied().filter(|one| one.bytes < fair(one)).collect();
        if full.is_empty() {
            shares.extend(open.iter().map(|held| (held.node.clone(), fair(held))));
            break;
        }
        for held in full {
            shares.insert(held.node.clone(), held.bytes);
            left -= held.bytes;
            open.retain(|other| other.node != held.node);
        }
    }
    shares
}

/// What a container of this shape with `memory` bytes costs.
fn cost(shape: &Shape, memory: f64) -> Cost {
    // Threads beyond the first of each process.
    let threads = (shape.threads - shape.processes).max(0.0);
    let processes = (shape.processes - 1.0).max(0.0);
    let sum = |of: fn(&Cost) -> f64| {
        of(&CONTAINER)
            + of(&BYTE) * memory
            + of(&PROCESS) * processes
            + of(&THREAD) * threads
            + of(&MAPPING) * shape.mappings
    };
    Cost {
        dump: sum(|cost| cost.dump),
        images: sum(|cost| cost.images),
        restore: sum(|cost| cost.restore),
    }
}

/// Seconds that dump and restore take at a pace of 1.
pub fn criu_seconds(shape: &Shape, memory_bytes: u64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "an estimate")]
    let Cost { dump, restore, .. } = cost(shape, memory_bytes as f64);
    dump + restore
}

/// What to expect of a migration.
pub fn predict(input: &Input) -> Prediction {
    let rate = |node: &str| input.rates.get(node).copied().unwrap_or(RATE_UNKNOWN).max(1.0);
    let source = rate(&input.source);
    let mut parts: Vec<_> = input.parts.iter().map(|part| divide(part, rate)).collect();
    let mut by_neighbour = BTreeMap::<&str, f64>::new();
    for (node, bytes) in parts.iter().flatten() {
        *by_neighbour.entry(node).or_default() += bytes;
    }
    let missing: f64 = input.parts.iter().map(|part| part.missing).sum();
    let held: f64 = by_neighbour.values().sum();
    let neighbours = by_neighbour.iter().map(|(node, bytes)| bytes / rate(node));
    let alone = missing / source;
    // However many send, this node takes in no more than it ever did.
    let ingest = input.rates.values().copied().fold(RATE_UNKNOWN, f64::max);
    let mut first = neighbours.fold((missing - held) / source, f64::max).max(missing / ingest);
    if first > alone && held > 0.0 {
        // The neighbours are slower than the source alone: it helps, and all end together.
        let together: f64 = by_neighbour.keys().map(|node| rate(node)).sum();
        first = missing / (together + source);
        let stays = (first * together / held).min(1.0);
        parts.iter_mut().flatten().for_each(|(_, bytes)| *bytes *= stays);
    }
    for (part, shares) in input.parts.iter().zip(&mut parts) {
        let rest = part.missing - shares.values().sum::<f64>();
        *shares.entry(input.source.clone()).or_default() += rest.max(0.0);
    }
    let between = input.capture.as_secs_f64() + STAGE;
    let (mut sizes, mut lasted, mut total) = (Vec::new(), 0.0, BEGIN);
    let mut whole = Vec::new();
    while rounds::another(&whole, input.max_rounds) {
        let bytes = if sizes.is_empty() { missing } else { change(input, lasted, &mut parts) };
        lasted = between + if sizes.is_empty() { first } else { bytes / source };
        total += lasted;
        let size: f64 = input.parts.iter().map(|part| part.size).sum();
        whole.push(to_u64(if sizes.is_empty() { size } else { bytes }));
        sizes.push(bytes);
    }
    let stop_and_copy = change(input, lasted, &mut parts);
    let memory: f64 = input.parts.iter().filter(|part| part.is_memory).map(|part| part.size).sum();
    let entries: f64 = input.parts.iter().map(|part| part.entries).sum();
    let Cost { dump, images, restore } = cost(&input.shape, memory);
    let frozen = dump.max(entries * ENTRY) + images + restore;
    let downtime = frozen * input.pace + stop_and_copy / source;
    Prediction {
        parts,
        rounds: sizes,
        stop_and_copy,
        total: Duration::from_secs_f64(total + downtime),
        downtime: Duration::from_secs_f64(downtime),
    }
}

/// What changes in `seconds`, which the source sends; adds it to its shares.
fn change(input: &Input, seconds: f64, parts: &mut [BTreeMap<String, f64>]) -> f64 {
    let mut all = 0.0;
    for (part, shares) in input.parts.iter().zip(parts) {
        let bytes = changed(part.size, part.write_rate, seconds);
        *shares.entry(input.source.clone()).or_default() += bytes;
        all += bytes;
    }
    all
}

/// Bytes as a whole number.
pub fn to_u64(bytes: f64) -> u64 {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "saturates, and nothing is negative"
    )]
    let whole = bytes.max(0.0).round() as u64;
    whole
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: f64 = 1_048_576.0;

    fn input(parts: Vec<Part>) -> Input {
        let rates = [("source", 10.0 * MIB), ("near", 100.0 * MIB), ("slow", MIB)];
        let rates = rates.map(|(node, rate)| (node.to_owned(), rate)).into();
        Input { parts, source: "source".to_owned(), rates, pace: 1.0, ..Input::default() }
    }

    fn part(missing: f64, holders: &[(&str, f64)], held: f64) -> Part {
        let holders = holders
            .iter()
            .map(|(node, bytes)| Held { node: (*node).to_owned(), bytes: bytes * MIB })
            .collect();
        let (size, missing, held) = (missing * MIB, missing * MIB, held * MIB);
        Part { size, missing, held, holders, ..Part::default() }
    }

    fn mib(prediction: &Prediction, node: &str) -> f64 {
        let bytes: f64 = prediction.parts.iter().filter_map(|shares| shares.get(node)).sum();
        (bytes / MIB * 10.0).round() / 10.0
    }

    #[test]
    fn neighbours_bring_what_they_hold_and_the_source_the_rest() {
        let told = predict(&input(vec![part(200.0, &[("near", 150.0)], 150.0)]));
        assert_eq!((mib(&told, "near"), mib(&told, "source")), (150.0, 50.0));
        // 50 MiB of the source at 10 MiB/s take longer than 150 MiB of the neighbour.
        assert_eq!((told.total - told.downtime).as_secs(), 5);
    }

    #[test]
    fn the_source_helps_neighbours_that_are_slower_than_it() {
        let told = predict(&input(vec![part(110.0, &[("slow", 110.0)], 110.0)]));
        assert_eq!((mib(&told, "slow"), mib(&told, "source")), (10.0, 100.0));
    }

    #[test]
    fn what_changes_meanwhile_comes_from_the_source() {
        let still = part(100.0, &[("near", 100.0)], 100.0);
        let writes = Part { write_rate: 2.0 * MIB, ..still.clone() };
        let (still, writes) = (predict(&input(vec![still])), predict(&input(vec![writes])));
        assert_eq!(mib(&still, "source"), 0.0);
        assert!(writes.rounds.is_sorted_by(|one, next| one > next), "{writes:?}");
        // 1 s of the first round, then ever less.
        assert!(mib(&writes, "source") > 2.0 && mib(&writes, "source") < 6.0, "{writes:?}");
    }

    #[test]
    fn a_rate_is_found_again_from_what_it_changed() {
        let (size, rate) = (64.0 * MIB, 5.0 * MIB);
        let after = changed(size, rate, 3.0);
        assert!((write_rate(size, after, 3.0) - rate).abs() < 1.0);
        assert!(after < 15.0 * MIB, "pages are hit again");
        assert_eq!(changed(0.0, rate, 1.0), 0.0);
        assert_eq!(write_rate(size, 0.0, 0.0), 0.0);
    }

    fn downtime(input: &Input) -> f64 {
        predict(input).downtime.as_secs_f64()
    }

    #[test]
    fn processes_threads_and_mappings_cost_time_and_not_only_bytes() {
        let small = input(vec![part(1.0, &[], 0.0)]);
        let with = |processes, threads, mappings| {
            let shape = Shape { processes, threads, mappings };
            downtime(&Input { shape, ..small.clone() })
        };
        let usual = with(1.0, 1.0, 20.0);
        assert!((usual - 0.35).abs() < 0.1, "{usual}");
        for many in [with(250.0, 250.0, 5000.0), with(1.0, 2000.0, 4000.0), with(1.0, 1.0, 300e3)] {
            assert!(many > 5.0 * usual, "{many}");
        }
        // A source that counts nothing.
        assert!((with(0.0, 0.0, 0.0) - usual).abs() < 0.01);
    }

    #[test]
    fn what_earlier_migrations_measured_beats_the_constants() {
        let once = input(vec![part(0.0, &[], 0.0)]);
        let twice = Input { pace: 2.0, ..once.clone() };
        assert!((downtime(&twice) - 2.0 * downtime(&once)).abs() < 1e-9);
    }

    #[test]
    fn files_are_looked_at_beside_the_dump() {
        let with = |entries| downtime(&input(vec![Part { entries, ..part(0.0, &[], 0.0) }]));
        assert_eq!(with(0.0), with(1000.0));
        assert!((with(1e6) - with(0.0) - (1e6 * ENTRY - CONTAINER.dump)).abs() < 1e-9);
    }

    proptest! {
        /// Method: any holders; every byte has a holder, no holder brings more than it has, and
        /// time is never longer than the source alone would take.
        #[test]
        fn shares_add_up_and_cooperation_is_never_predicted_to_cost(
            missing in 0.0f64..1000.0,
            near in 0.0f64..1.0,
            slow in 0.0f64..1.0,
        ) {
            let held = near.max(slow) * missing;
            let holders = [("near", near * missing), ("slow", slow * missing)];
            let told = predict(&input(vec![part(missing, &holders, held)]));
            let alone = predict(&input(vec![part(missing, &[], 0.0)]));
            let all: f64 = told.parts[0].values().sum();
            prop_assert!((all - missing * MIB).abs() < 1.0);
            for (node, most) in holders {
                prop_assert!(told.parts[0].get(node).is_none_or(|bytes| *bytes <= most * MIB + 1.0));
            }
            prop_assert!(told.total <= alone.total + Duration::from_millis(1));
        }
    }
}
