//! The simulation of large sites, at 100 nodes: it is the same every time, adds up, and the
//! daemon's rules are worth what is claimed.

use anyhow::{Context, Result};
use godwit_tests::sim::asking::Policy;
use godwit_tests::sim::engine::{Outcome, run};
use godwit_tests::sim::parameters as given;
use godwit_tests::sim::report::{Report, Row, report};
use godwit_tests::sim::world::{Mobility, World};

const NODES: usize = 100;

fn outcome(mobility: Mobility, policy: Policy) -> Result<Outcome> {
    Ok(run(&World::new(NODES, mobility, 1), policy)?)
}

#[test]
fn a_run_is_the_same_again() -> Result<()> {
    let one = outcome(Mobility::Waypoint, Policy::Ours)?;
    let again = outcome(Mobility::Waypoint, Policy::Ours)?;
    assert!(one.moved.len() > 1000, "{} migrations", one.moved.len());
    assert_eq!(one.moved, again.moved);
    assert_eq!(one.stored, again.stored);
    Ok(())
}

/// Method: every migration on its own; the least time that fixed costs, dump and restore leave, and
/// the bytes that the destination can take in.
#[test]
fn no_migration_is_faster_than_its_parts_or_ends_without_its_bytes() -> Result<()> {
    for policy in Policy::ALL {
        let outcome = outcome(Mobility::Commuter, policy)?;
        assert!(!outcome.moved.is_empty());
        for one in &outcome.moved {
            let bytes = one.from_source + one.from_others;
            let least = given::BEGIN + given::DUMP.0 + given::RESTORE.0 + bytes / given::INGEST;
            assert!(one.total >= least, "{one:?}");
            assert!(one.downtime >= given::DUMP.0 + given::RESTORE.0, "{one:?}");
            assert!(one.total > one.downtime && bytes > 0.0, "{one:?}");
            assert!(one.asked <= 3 * given::ASKED_MAX);
        }
    }
    Ok(())
}

#[test]
fn without_cooperation_everything_comes_from_the_source_and_nothing_is_sent_besides() -> Result<()>
{
    let outcome = outcome(Mobility::Waypoint, Policy::None)?;
    assert!(outcome.moved.iter().all(|one| one.from_others == 0.0 && one.asked == 0));
    assert_eq!((outcome.traffic.copies, outcome.traffic.directory_messages), (0.0, 0));
    Ok(())
}

/// What is still on its way when a node is swept is in use and stays: so a copy's size beyond the
/// budget.
#[test]
fn caches_stay_within_their_budget() -> Result<()> {
    let outcome = outcome(Mobility::Waypoint, Policy::Ours)?;
    let largest = (given::MEMORY.0.1 + given::VOLUME.0.1 + given::LAYER.0.1) * given::MIB;
    let most = outcome.stored.iter().copied().fold(0.0, f64::max);
    assert!(most <= given::BUDGET as f64 + largest, "{most}");
    assert!(most > 0.5 * given::BUDGET as f64, "the budget is what limits them: {most}");
    Ok(())
}

#[test]
fn ours_is_never_far_behind_the_better_of_newest_and_nearest() -> Result<()> {
    let policies = [Policy::None, Policy::Newest, Policy::Nearest, Policy::Ours];
    let report = report(&[(NODES, 3)], &policies, |_| ())?;
    assert_eq!(report.comparisons.len(), Mobility::ALL.len());
    for comparison in &report.comparisons {
        assert!(comparison.holds, "{comparison:?}");
    }
    for mobility in Mobility::ALL {
        let row = |policy: Policy| row(&report, mobility, policy);
        let (none, ours) = (row(Policy::None)?, row(Policy::Ours)?);
        assert!(ours.source_share < 0.5 * none.source_share, "{ours:?}");
        assert!(ours.total_median_s < none.total_median_s, "{ours:?}");
        for other in [Policy::Newest, Policy::Nearest] {
            assert!(ours.source_share < row(other)?.source_share, "{ours:?}");
        }
    }
    assert_eq!(report.csv()?.lines().count(), 1 + report.rows.len());
    assert!(
        report.plots().iter().all(|(name, svg)| name.ends_with(".svg") && svg.contains("ours"))
    );
    Ok(())
}

fn row(report: &Report, mobility: Mobility, policy: Policy) -> Result<&Row> {
    let is_it = |row: &&Row| row.mobility == mobility.word() && row.policy == policy.word();
    report.rows.iter().find(is_it).context("a row for every mobility and policy")
}
