//! What the demo found: the table for people, the report for programs, and the verdict.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::arm::{DESTINATION, Outcome, SOURCE};

/// Largest part of traditional mode's bytes that the source may send in cooperative mode.
pub(crate) const SHARE_MAX: f64 = 0.3;

/// What `godwit --output json migrate` prints, as far as the demo uses it.
#[derive(Clone, Debug, Default, Deserialize)]
pub(crate) struct MigrationReport {
    /// From the request to redis running at the destination, in milliseconds.
    pub(crate) total_ms: f64,
    /// From the freeze to redis running at the destination, in milliseconds.
    pub(crate) downtime_ms: f64,
    /// Rounds of pre-copy.
    pub(crate) rounds: u32,
    /// Where the time went.
    pub(crate) phases_ms: Phases<f64>,
    /// Bytes that the destination received, by node; a node that was not asked may be missing.
    pub(crate) wire_bytes_by_node: BTreeMap<String, u64>,
    /// Bytes sent after the freeze.
    pub(crate) stop_and_copy_bytes: u64,
}

/// Milliseconds of each phase. All but `pre_copy` add up to the downtime.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Phases<T> {
    pub(crate) pre_copy: T,
    pub(crate) freeze: T,
    pub(crate) dump: T,
    pub(crate) transfer: T,
    pub(crate) restore: T,
}

/// `report.json`.
#[derive(Debug, Serialize)]
struct Report {
    modes: Modes,
}

#[derive(Debug, Serialize)]
struct Modes {
    traditional: ModeReport,
    cooperative: ModeReport,
}

/// One mode in `report.json`.
#[derive(Debug, Serialize)]
struct ModeReport {
    total_ms: u64,
    downtime_ms: u64,
    rounds: u32,
    verified: bool,
    wire_bytes_by_node: BTreeMap<String, u64>,
    phases_ms: Phases<u64>,
    /// Longest time that the client had no answer.
    client_gap_ms: u64,
    stop_and_copy_bytes: u64,
    /// What left each node through its uplink meanwhile, answers to the client included.
    uplink_sent_bytes_by_node: BTreeMap<String, u64>,
    start: StartReport,
    problems: Vec<String>,
}

#[derive(Debug, Serialize)]
struct StartReport {
    data_sha256: String,
    volume_sha256: String,
    read_only_volume: String,
    destination_objects: u64,
    destination_images: usize,
}

impl Outcome {
    fn verified(&self) -> bool {
        self.problems.is_empty()
    }

    /// What the destination received from a node, in bytes.
    fn wire_bytes(&self, node: &str) -> u64 {
        self.report.wire_bytes_by_node.get(node).copied().unwrap_or(0)
    }

    /// The nodes that may serve the destination.
    fn servers(&self) -> impl Iterator<Item = &str> {
        let names = self.uplinks.iter().map(|(name, _)| name.as_str());
        names.filter(|&name| name != DESTINATION)
    }

    fn for_programs(&self) -> ModeReport {
        let MigrationReport { phases_ms, .. } = &self.report;
        ModeReport {
            total_ms: rounded(self.report.total_ms),
            downtime_ms: rounded(self.report.downtime_ms),
            rounds: self.report.rounds,
            verified: self.verified(),
            wire_bytes_by_node: self
                .servers()
                .map(|name| (name.to_owned(), self.wire_bytes(name)))
                .collect(),
            phases_ms: Phases {
                pre_copy: rounded(phases_ms.pre_copy),
                freeze: rounded(phases_ms.freeze),
                dump: rounded(phases_ms.dump),
                transfer: rounded(phases_ms.transfer),
                restore: rounded(phases_ms.restore),
            },
            client_gap_ms: rounded(self.gap_ms()),
            stop_and_copy_bytes: self.report.stop_and_copy_bytes,
            uplink_sent_bytes_by_node: self
                .uplinks
                .iter()
                .map(|(name, counters)| (name.clone(), counters.sent))
                .collect(),
            start: StartReport {
                data_sha256: self.start.data.clone(),
                volume_sha256: self.start.volume.clone(),
                read_only_volume: self.start.read_only.clone(),
                destination_objects: self.start.destination_objects,
                destination_images: self.start.destination_images,
            },
            problems: self.problems.clone(),
        }
    }

    fn gap_ms(&self) -> f64 {
        self.longest_gap.as_secs_f64() * 1e3
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "casts saturate")]
fn rounded(milliseconds: f64) -> u64 {
    milliseconds.round() as u64
}

/// Writes `report.json`; returns its text.
pub(crate) fn write(path: &Path, traditional: &Outcome, cooperative: &Outcome) -> Result<String> {
    let (traditional, cooperative) = (traditional.for_programs(), cooperative.for_programs());
    let text = serde_json::to_string_pretty(&Report { modes: Modes { traditional, cooperative } })?;
    let write = || {
        fs::create_dir_all(path.parent().unwrap_or(path))?;
        fs::write(path, format!("{text}\n"))
    };
    write().with_context(|| format!("write {}", path.display()))?;
    Ok(text)
}

/// Why the demo failed, one line each; nothing, if it did not.
pub(crate) fn shortcomings(traditional: &Outcome, cooperative: &Outcome) -> Vec<String> {
    let mut wrong = Vec::new();
    for arm in [traditional, cooperative] {
        wrong.extend(arm.problems.iter().map(|problem| format!("{}: {problem}", arm.mode)));
        let objects = arm.start.destination_objects;
        let images = arm.start.destination_images;
        if (objects, images) != (0, 0) {
            wrong.push(format!(
                "{}: {DESTINATION} was not empty: {objects} objects, {images} images",
                arm.mode
            ));
        }
    }
    let (one, other) = (&traditional.start, &cooperative.start);
    for (what, one, other) in [
        ("data set", &one.data, &other.data),
        ("writable volume", &one.volume, &other.volume),
        ("read-only volume", &one.read_only, &other.read_only),
    ] {
        if one != other {
            wrong.push(format!("the arms started from different states of the {what}"));
        }
    }
    let (one, other) = (traditional.wire_bytes(SOURCE), cooperative.wire_bytes(SOURCE));
    let share = ratio(float(one), float(other));
    if share.is_nan() || share > SHARE_MAX {
        wrong.push(format!(
            "cooperative mode had {:.1} MiB from the source, more than {:.0}% of the {:.1} MiB of \
             traditional mode",
            mib(other),
            SHARE_MAX * 100.0,
            mib(one),
        ));
    }
    let (one, other) = (traditional.report.total_ms, cooperative.report.total_ms);
    if other >= one {
        wrong.push(format!(
            "cooperative mode took {other:.0} ms, no less than the {one:.0} ms of traditional mode"
        ));
    }
    wrong
}

/// Both modes side by side.
pub(crate) fn table(traditional: &Outcome, cooperative: &Outcome) -> String {
    let arms = [traditional, cooperative];
    let mut table = Table::default();
    let reports = arms.map(|arm| &arm.report);
    let milliseconds = |value: fn(&MigrationReport) -> f64| reports.map(value);
    table.row("pre-copy, redis runs", "ms", 0, milliseconds(|report| report.phases_ms.pre_copy));
    table.row("freeze", "ms", 0, milliseconds(|report| report.phases_ms.freeze));
    table.row("dump", "ms", 0, milliseconds(|report| report.phases_ms.dump));
    table.row("transfer", "ms", 0, milliseconds(|report| report.phases_ms.transfer));
    table.row("restore", "ms", 0, milliseconds(|report| report.phases_ms.restore));
    table.rule();
    table.row("downtime", "ms", 0, milliseconds(|report| report.downtime_ms));
    table.row("client without an answer", "ms", 0, arms.map(Outcome::gap_ms));
    table.row("total time", "ms", 0, milliseconds(|report| report.total_ms));
    table.row("rounds of pre-copy", "", 0, milliseconds(|report| report.rounds.into()));
    table.rule();
    for name in traditional.servers() {
        let of = if name == SOURCE { " (source)" } else { "" };
        let received = arms.map(|arm| mib(arm.wire_bytes(name)));
        table.row(&format!("from {name}{of}"), "MiB", 1, received);
    }
    table.row("after the freeze", "MiB", 1, reports.map(|report| mib(report.stop_and_copy_bytes)));
    table.rule();
    for (at, (name, _)) in traditional.uplinks.iter().enumerate() {
        let counters = arms.map(|arm| arm.uplinks[at].1);
        if name == DESTINATION {
            let received = counters.map(|counters| mib(counters.received));
            table.row(&format!("link of {name}, received"), "MiB", 1, received);
        } else {
            let sent = counters.map(|counters| mib(counters.sent));
            table.row(&format!("link of {name}, sent"), "MiB", 1, sent);
        }
    }
    table.rule();
    let verified = arms.map(|arm| if arm.verified() { "yes" } else { "NO" });
    table.line("every value verified", verified[0], verified[1], "");
    table.text
}

#[derive(Default)]
struct Table {
    text: String,
}

impl Table {
    /// A quantity in both modes, and cooperative as a part of traditional.
    fn row(&mut self, name: &str, unit: &str, digits: usize, values: [f64; 2]) {
        self.head();
        let [one, other] = values;
        let cell = |value: f64| format!("{value:.digits$} {unit:<3}");
        // Less than one of its unit is what an idle link carries: nothing to compare with.
        let percent = format!("{:.0}%", ratio(one, other) * 100.0);
        let ratio = if one >= 1.0 { percent.as_str() } else { "" };
        self.line(name, &cell(one), &cell(other), ratio);
    }

    fn head(&mut self) {
        if self.text.is_empty() {
            self.line("", "traditional", "cooperative", "ratio");
            self.rule();
        }
    }

    fn rule(&mut self) {
        let _ = writeln!(self.text, "{}", "-".repeat(69));
    }

    fn line(&mut self, name: &str, one: &str, other: &str, ratio: &str) {
        let line = format!("{name:<28} {one:>15} {other:>15} {ratio:>8}");
        let _ = writeln!(self.text, "{}", line.trim_end());
    }
}

/// `other` as a part of `one`; not a number if there is nothing to compare with.
fn ratio(one: f64, other: f64) -> f64 {
    if one > 0.0 { other / one } else { f64::NAN }
}

#[expect(clippy::cast_precision_loss, reason = "bytes of one migration, shown with a decimal")]
fn float(bytes: u64) -> f64 {
    bytes as f64
}

fn mib(bytes: u64) -> f64 {
    float(bytes) / f64::from(1 << 20)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use godwit_tests::network::Counters;
    use serde_json::Value;

    use super::*;
    use crate::arm::{Mode, Start};

    fn outcome(mode: Mode, source_bytes: u64, total_ms: f64) -> Outcome {
        let start = Start {
            data: "d".into(),
            volume: "v".into(),
            read_only: "r".into(),
            destination_objects: 0,
            destination_images: 0,
        };
        let wire_bytes_by_node = BTreeMap::from([(SOURCE.to_owned(), source_bytes)]);
        let report = MigrationReport { total_ms, wire_bytes_by_node, ..MigrationReport::default() };
        let uplink = |name: &str| (name.to_owned(), Counters { received: 1, sent: 2 });
        let uplinks = [SOURCE, DESTINATION, "edge-c", "edge-d"].map(uplink).to_vec();
        let longest_gap = Duration::from_millis(7);
        Outcome { mode, start, report, longest_gap, uplinks, problems: Vec::new() }
    }

    fn good() -> [Outcome; 2] {
        [outcome(Mode::Traditional, 1000, 50.0), outcome(Mode::Cooperative, 300, 49.0)]
    }

    #[test]
    fn each_condition_is_one_that_the_demo_fails_by() {
        let wrong = |spoil: fn(&mut Outcome)| {
            let [one, mut other] = good();
            spoil(&mut other);
            shortcomings(&one, &other).join(";")
        };
        assert_eq!(wrong(|_| {}), "");
        assert!(wrong(|arm| arm.problems.push("torn".into())).contains("cooperative: torn"));
        assert!(wrong(|arm| arm.start.data = "x".into()).contains("of the data set"));
        assert!(wrong(|arm| arm.start.volume = "x".into()).contains("of the writable volume"));
        assert!(wrong(|arm| arm.start.read_only = "x".into()).contains("of the read-only volume"));
        assert!(wrong(|arm| arm.start.destination_objects = 1).contains("1 objects"));
        assert!(wrong(|arm| arm.start.destination_images = 1).contains("1 images"));
        assert!(wrong(|arm| arm.report.total_ms = 50.0).contains("no less"));
        let bytes = |arm: &mut Outcome| {
            arm.report.wire_bytes_by_node.insert(SOURCE.to_owned(), 301);
        };
        assert!(wrong(bytes).contains("more than 30%"));
    }

    #[test]
    fn the_table_compares_what_can_be_compared() {
        let [one, mut other] = good();
        other.report.wire_bytes_by_node.insert("edge-c".to_owned(), 3 << 20);
        let table = table(&one, &other);
        let line = |name: &str| table.lines().find(|line| line.starts_with(name)).unwrap();
        assert!(line("total time").ends_with("98%"), "{table}");
        assert!(line("from edge-c").ends_with("3.0 MiB"), "{table}");
        assert!(line("every value verified").ends_with("yes"), "{table}");
        assert!(table.lines().all(|line| line.len() <= 70), "{table}");
    }

    #[test]
    fn nothing_measured_is_a_failure_too() {
        let [mut one, mut other] = good();
        one.report.wire_bytes_by_node.clear();
        other.report.wire_bytes_by_node.clear();
        assert!(!shortcomings(&one, &other).is_empty());
    }

    #[test]
    fn the_report_has_the_documented_fields() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("demo/report.json");
        let [one, other] = good();
        let text = write(&path, &one, &other).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap().trim_end(), text);
        let report: Value = serde_json::from_str(&text).unwrap();
        let mode = &report["modes"]["traditional"];
        assert_eq!((mode["total_ms"].as_u64(), mode["verified"].as_bool()), (Some(50), Some(true)));
        assert_eq!(mode["wire_bytes_by_node"]["edge-a"], 1000);
        assert_eq!(mode["wire_bytes_by_node"]["edge-c"], 0);
        for phase in ["pre_copy", "freeze", "dump", "transfer", "restore"] {
            assert!(mode["phases_ms"][phase].is_u64(), "{phase}");
        }
        assert!(mode["downtime_ms"].is_u64() && mode["rounds"].is_u64());
        assert!(report["modes"]["cooperative"].is_object());
    }
}
