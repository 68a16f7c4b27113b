//! What a node keeps for later, where it puts copies of it, and which peers it asks. Rules without
//! hands.
//!
//! ```text
//!  schedule ── when a subject is captured ──► place ── on which neighbours a copy goes
//!                                                         │
//!  choose ◄── peers of a destination ◄────────── retain ◄─┘   what is given up, in which order
//! ```
//!
//! Every function here is pure: it takes ages, rates and loads, and returns a decision with its
//! reason. There is no clock, no I/O and no randomness but a seed that the caller gives. So the
//! daemon and the simulation of large sites run the same code, and every order of events can be
//! tried in tests.
//!
//! Foreign clocks are never trusted alone: what is newer is a question of lineage
//! ([`choose::Candidate::lag`]), and ages only fill in how much newer.
//!
//! Read next: docs/adr/0008-whoever-brings-the-end-nearer-is-asked.md for the choosing rule,
//! docs/evaluation.md for what these rules are worth on large sites.

pub mod choose;
pub mod place;
pub mod predict;
pub mod retain;
pub mod rounds;
pub mod schedule;
