//! The services that others call: each call is translated here, and the module whose business it is
//! answers.

pub mod control;
pub mod peer;
pub mod snapshots;
