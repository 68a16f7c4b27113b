//! A simulation of large sites: the daemon's own rules under a virtual clock.

pub mod parameters;
