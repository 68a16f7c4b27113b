//! What a series of runs came to: `target/faults/report.json`.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;

use anyhow::Result;
use godwit_tests::place;
use serde::Serialize;

use crate::cell::Cell;
use crate::run::{End, Outcome};

/// Counts of outcomes; the last six are broken promises.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Report {
    runs: u32,
    /// The container runs at another node.
    completed: u32,
    /// It runs at its source.
    rolled_back: u32,
    /// It went on only after an operator decided.
    resolved_by_hand: u32,
    /// It ended, and the fault allows it.
    killed_by_fault: u32,
    /// It, its work or its data is gone, or that of another; or the run could not be judged.
    lost: u32,
    double_runner: u32,
    torn: u32,
    /// Still frozen after the time that [`crate::settle`] states.
    frozen: u32,
    /// It runs, and no packet passes in its network namespace.
    mute: u32,
    /// A node holds something that it did not hold before the run, or does not migrate any more.
    leaked: u32,
    cells: BTreeMap<String, BTreeMap<String, u32>>,
}

impl Report {
    /// Counts a run. Returns whether it kept all promises.
    pub(crate) fn count(&mut self, cell: &Cell, outcome: &Outcome) -> bool {
        self.runs += 1;
        match outcome.end {
            End::Completed => self.completed += 1,
            End::RolledBack => self.rolled_back += 1,
            End::KilledByFault => self.killed_by_fault += 1,
            End::Unsettled => {}
        }
        let broken = &outcome.broken;
        for (count, texts) in [
            (&mut self.lost, &broken.lost),
            (&mut self.double_runner, &broken.double_runner),
            (&mut self.torn, &broken.torn),
            (&mut self.frozen, &broken.frozen),
            (&mut self.mute, &broken.mute),
            (&mut self.leaked, &broken.leaked),
        ] {
            *count += u32::from(!texts.is_empty());
        }
        for (phase, fault) in &outcome.struck {
            let faults = self.cells.entry((*phase).to_owned()).or_default();
            *faults.entry(fault.clone()).or_default() += 1;
        }
        if outcome.struck.is_empty() {
            eprintln!("run {}: no fault struck", cell.seed);
        }
        broken.is_empty()
    }

    /// Whether every run kept all promises.
    pub(crate) fn is_clean(&self) -> bool {
        [self.lost, self.double_runner, self.torn, self.frozen, self.mute, self.leaked]
            .iter()
            .all(|&count| count == 0)
    }

    /// Writes the report.
    pub(crate) fn write(&self) -> Result<()> {
        let directory = place::target().join("faults");
        fs::create_dir_all(&directory)?;
        Ok(fs::write(directory.join("report.json"), serde_json::to_string_pretty(self)?)?)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} runs: {} completed, {} rolled back, {} resolved by hand, {} killed by the fault; {} lost, {} double \
             runner, {} torn, {} frozen, {} mute, {} leaked",
            self.runs,
            self.completed,
            self.rolled_back,
            self.resolved_by_hand,
            self.killed_by_fault,
            self.lost,
            self.double_runner,
            self.torn,
            self.frozen,
            self.mute,
            self.leaked
        )
    }
}
