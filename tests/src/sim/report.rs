//! What runs say: a line per site, mobility and policy, as JSON, CSV and plots.

use std::fmt::Write as _;

use godwit_policy::schedule::ScheduleError;
use serde::Serialize;

use super::asking::Policy;
use super::engine::{Outcome, run};
use super::parameters as given;
use super::plot::{Chart, Line};
use super::whole;
use super::world::{Mobility, World};

/// Ours may be behind the better of newest and nearest by this share in median total time, and on
/// [`LARGE`] sites not at all.
const BEHIND_MAX: f64 = 0.02;
/// See [`BEHIND_MAX`].
const LARGE: usize = 1000;

/// The first seed: the one before was used while the rule was made.
const SEED: u64 = 2;

/// A policy on sites of one size.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// Nodes of the site, and as many users.
    pub nodes: usize,
    /// How users move.
    pub mobility: &'static str,
    /// Nodes that destinations ask.
    pub policy: &'static str,
    /// Migrations counted.
    pub migrations: usize,
    /// Share of all migrated bytes that came from the source.
    pub source_share: f64,
    /// Bytes of a migration.
    pub bytes_per_migration: f64,
    /// Seconds from request to running.
    pub total_median_s: f64,
    /// See `total_median_s`.
    pub total_mean_s: f64,
    /// See `total_median_s`.
    pub total_p95_s: f64,
    /// Milliseconds from freeze to running.
    pub downtime_median_ms: f64,
    /// See `downtime_median_ms`.
    pub downtime_p95_ms: f64,
    /// Neighbours asked per migration.
    pub asked: f64,
    /// Bytes of snapshots per node after the last sweep.
    pub cache_mean_bytes: f64,
    /// Of the fullest node.
    pub cache_max_bytes: f64,
    /// Bytes of copies per node and hour.
    pub copies_bytes_per_node_hour: f64,
    /// Messages to and from the directory per node and hour.
    pub directory_messages_per_node_hour: f64,
    /// Bytes of them.
    pub directory_bytes_per_node_hour: f64,
}

/// Ours against the others, on sites of one size.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// Nodes of the site.
    pub nodes: usize,
    /// How users move.
    pub mobility: &'static str,
    /// Median total time of ours over that of the better of newest and nearest, less 1.
    pub behind_one: f64,
    /// The same against the better of the two that ask as many as ours may; not part of the
    /// requirement.
    pub behind_many: Option<f64>,
    /// Whether it is no more than required.
    pub holds: bool,
}

/// Everything that is reported.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Report {
    /// By site, mobility, policy.
    pub rows: Vec<Row>,
    /// By site and mobility.
    pub comparisons: Vec<Comparison>,
}

/// Runs `policies` on `seeds` sites of every size; `told` hears of each line.
pub fn report(
    sites: &[(usize, u64)],
    policies: &[Policy],
    mut told: impl FnMut(&Row),
) -> Result<Report, ScheduleError> {
    let mut report = Report::default();
    for (nodes, seeds) in sites {
        for mobility in Mobility::ALL {
            let worlds: Vec<World> =
                (SEED..SEED + seeds).map(|seed| World::new(*nodes, mobility, seed)).collect();
            let mut rows = Vec::new();
            for policy in policies {
                let outcomes = worlds
                    .iter()
                    .map(|world| run(world, *policy))
                    .collect::<Result<Vec<_>, _>>()?;
                let row = row(*nodes, mobility, *policy, &outcomes);
                told(&row);
                rows.push(row);
            }
            report.comparisons.extend(comparison(&rows));
            report.rows.append(&mut rows);
        }
    }
    Ok(report)
}

fn row(nodes: usize, mobility: Mobility, policy: Policy, outcomes: &[Outcome]) -> Row {
    let moved = || outcomes.iter().flat_map(|outcome| &outcome.moved);
    let migrations = moved().count();
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len().max(1) as f64;
    let totals = sorted(moved().map(|one| one.total));
    let downtimes = sorted(moved().map(|one| one.downtime * 1e3));
    let stored = sorted(outcomes.iter().flat_map(|outcome| outcome.stored.iter().copied()));
    let sources: f64 = moved().map(|one| one.from_source).sum();
    let all: f64 = moved().map(|one| one.from_source + one.from_others).sum();
    let asked: Vec<f64> = moved().map(|one| one.asked as f64).collect();
    let node_hours = stored.len() as f64 * given::RUN.as_secs_f64() / 3600.0;
    let traffic = |value: fn(&Outcome) -> f64| outcomes.iter().map(value).sum::<f64>() / node_hours;
    Row {
        nodes,
        mobility: mobility.word(),
        policy: policy.word(),
        migrations,
        source_share: sources / all,
        bytes_per_migration: all / migrations as f64,
        total_median_s: quantile(&totals, 0.5),
        total_mean_s: mean(&totals),
        total_p95_s: quantile(&totals, 0.95),
        downtime_median_ms: quantile(&downtimes, 0.5),
        downtime_p95_ms: quantile(&downtimes, 0.95),
        asked: mean(&asked),
        cache_mean_bytes: mean(&stored),
        cache_max_bytes: quantile(&stored, 1.0),
        copies_bytes_per_node_hour: traffic(|one| one.traffic.copies),
        directory_messages_per_node_hour: traffic(|one| one.traffic.directory_messages as f64),
        directory_bytes_per_node_hour: traffic(|one| one.traffic.directory_bytes),
    }
}

fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values
}

fn quantile(sorted: &[f64], share: f64) -> f64 {
    let index = whole(sorted.len() as f64 * share);
    sorted.get(index.min(sorted.len().saturating_sub(1))).copied().unwrap_or(0.0)
}

/// Compares ours, if it and the two that it is compared with are among the rows of a site.
fn comparison(rows: &[Row]) -> Option<Comparison> {
    let median = |policy: Policy| {
        rows.iter().find(|row| row.policy == policy.word()).map(|row| row.total_median_s)
    };
    let ours = median(Policy::Ours)?;
    let behind = |one, other| Some(ours / f64::min(median(one)?, median(other)?) - 1.0);
    let behind_one = behind(Policy::Newest, Policy::Nearest)?;
    let (nodes, mobility) = rows.first().map(|row| (row.nodes, row.mobility))?;
    let holds = if nodes >= LARGE { behind_one < 0.0 } else { behind_one <= BEHIND_MAX };
    let behind_many = behind(Policy::NewestMany, Policy::NearestMany);
    Some(Comparison { nodes, mobility, behind_one, behind_many, holds })
}

/// A figure of a row.
type Figure = fn(&Row) -> f64;

/// The plots: file name, title, and what is shown.
const PLOTS: [(&str, &str, Figure); 7] = [
    ("total", "median total time, s", |row| row.total_median_s),
    ("total-p95", "95th percentile of total time, s", |row| row.total_p95_s),
    ("source", "share of bytes from the source", |row| row.source_share),
    ("downtime", "median downtime, ms", |row| row.downtime_median_ms),
    ("asked", "neighbours asked per migration", |row| row.asked),
    ("cache", "snapshots per node, GB", |row| row.cache_mean_bytes / 1e9),
    ("directory", "directory messages per node and hour", |row| {
        row.directory_messages_per_node_hour
    }),
];

impl Report {
    /// The rows, one a line, under the names of the fields.
    pub fn csv(&self) -> Result<String, serde_json::Error> {
        let mut text = String::new();
        for row in &self.rows {
            let serde_json::Value::Object(fields) = serde_json::to_value(row)? else { continue };
            let line = |words: Vec<String>| words.join(",").replace('"', "");
            if text.is_empty() {
                _ = writeln!(text, "{}", line(fields.keys().cloned().collect()));
            }
            _ = writeln!(text, "{}", line(fields.values().map(ToString::to_string).collect()));
        }
        Ok(text)
    }

    /// Plots by file name.
    pub fn plots(&self) -> Vec<(String, String)> {
        PLOTS
            .map(|(name, title, figure)| (format!("{name}.svg"), self.plot(title, figure)))
            .to_vec()
    }

    fn plot(&self, title: &str, figure: Figure) -> String {
        let mut positions: Vec<usize> = self.rows.iter().map(|row| row.nodes).collect();
        positions.dedup();
        let line = |mobility: Mobility, policy: Policy| {
            let is_of = |row: &&Row| row.mobility == mobility.word() && row.policy == policy.word();
            let values = self.rows.iter().filter(is_of).map(figure).collect();
            Line { name: policy.word().to_owned(), values }
        };
        let panel = |mobility: Mobility| {
            let lines = Policy::ALL.map(|policy| line(mobility, policy)).to_vec();
            (mobility.word().to_owned(), lines)
        };
        Chart {
            title: title.to_owned(),
            across: "nodes of the site".to_owned(),
            positions: positions.iter().map(ToString::to_string).collect(),
            panels: Mobility::ALL.map(panel).to_vec(),
        }
        .svg()
    }
}
