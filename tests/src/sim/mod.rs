//! A simulation of large sites: the daemon's own rules under a virtual clock.
//!
//! ```text
//!  world ── nodes, links, ways of users: the same for every policy
//!    │
//!  engine ── events ──► schedule, place, retain (policy/)   captures, copies, sweeps      cache
//!    │                  choose or a policy to compare with  nodes that are asked          asking
//!    │                  rounds, predict (migrate/)          phases of a migration
//!    ▼                                                      who sends how fast            network
//!  report ── JSON, CSV, plots
//! ```
//!
//! Every run of the same seed has the same outcome: there is no clock, no thread and no order that
//! depends on addresses. Traffic of others, loads and errors of measurement are functions of node
//! and time, so every policy meets the same. What the model leaves out is said in
//! docs/evaluation.md.
//!
//! Read next: [`parameters`] for where the figures come from.

pub mod asking;
pub mod cache;
pub mod engine;
pub mod network;
pub mod parameters;
pub mod plot;
mod random;
pub mod report;
pub mod world;

/// The whole part of a number that is not negative.
fn whole(value: f64) -> usize {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "saturates, and nothing is negative"
    )]
    let whole = value as usize;
    whole
}
