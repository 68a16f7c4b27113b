//! The ledger: a workload whose every step is written down outside of it, so that faults cannot
//! hide what ran.
//!
//! ```text
//!  probe ledger (in the container)                     test process, on a thread per node
//!    step n: child and second thread count along         ┌──────────┐
//!            append to each volume and to the layer ──►  │ Witness  │──► History ──► check()
//!            write and verify pages of memory     UDP    └──────────┘    one Sighting per packet
//!            send one packet: Step
//! ```
//!
//! Every process that begins has a new *life*. Within a life the counter grows by one with each
//! step, and every place that keeps a count (child, thread, files) agrees with it. A migration
//! continues a life. So a repeated counter means that steps were lost or that two nodes run the
//! container, and a place that disagrees means a torn or mixed cut.
//!
//! Each node has the witness's address on its own loopback interface: a cut link between nodes
//! hides nothing.
//!
//! Read next: [`check`] for the rules, [`witness`] for the listener, `bin/probe/ledger.rs` for the
//! workload.

mod check;
mod witness;

use std::fmt;
use std::str::FromStr;

pub use check::{Verdict, check, read_file};
pub use witness::{PORT, Sighting, Witness, address, route};

/// Bytes of one record in a file of the ledger.
pub const RECORD_BYTES: usize = 16 + 1 + 20 + 1 + 20 + 1;

/// One step of the workload, as it is sent to the witness.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Random number of the process: a process that is started again has another.
    pub life: u64,
    /// Number of the step, from 1.
    pub counter: u64,
    /// When it was made, by the machine's clock, in ns since 1970.
    pub wall_ns: u64,
    /// Pages of memory that were found torn or out of date so far.
    pub bad_pages: u64,
    /// Packets that could not be sent so far.
    pub unsent: u64,
    /// The count of each place: child, second thread, then every file. 0 where a place contradicts
    /// itself.
    pub places: Vec<u64>,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { life, counter, wall_ns, bad_pages, unsent, places } = self;
        write!(f, "{life:016x} {counter} {wall_ns} {bad_pages} {unsent}")?;
        places.iter().try_for_each(|place| write!(f, " {place}"))
    }
}

/// A packet that is no step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a step of a ledger")]
pub struct NotAStep;

impl FromStr for Step {
    type Err = NotAStep;

    fn from_str(text: &str) -> Result<Self, NotAStep> {
        let (life, rest) = text.split_once(' ').ok_or(NotAStep)?;
        let life = u64::from_str_radix(life, 16).map_err(|_cause| NotAStep)?;
        let numbers = rest.split(' ').map(|word| word.parse().map_err(|_cause| NotAStep));
        let numbers = numbers.collect::<Result<Vec<u64>, NotAStep>>()?;
        let (&[counter, wall_ns, bad_pages, unsent], places) =
            numbers.split_first_chunk().ok_or(NotAStep)?;
        Ok(Self { life, counter, wall_ns, bad_pages, unsent, places: places.to_vec() })
    }
}

/// The record of a step in the ledger's files.
pub fn record(life: u64, counter: u64, wall_ns: u64) -> String {
    format!("{life:016x} {counter:020} {wall_ns:020}\n")
}

/// Life and counter of a whole record; `None` if it is torn.
pub fn read_record(bytes: &[u8]) -> Option<(u64, u64)> {
    let text = std::str::from_utf8(bytes).ok()?.strip_suffix('\n')?;
    let mut words = text.split(' ');
    let life = u64::from_str_radix(words.next()?, 16).ok()?;
    let counter = words.next()?.parse().ok()?;
    let wall_ns: u64 = words.next()?.parse().ok()?;
    (record(life, counter, wall_ns).as_bytes() == bytes).then_some((life, counter))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_and_records_are_read_back_and_nothing_else_is() {
        let step = Step {
            life: 0xfeed,
            counter: 7,
            wall_ns: 9,
            bad_pages: 1,
            unsent: 2,
            places: vec![7, 7, 6],
        };
        assert_eq!(step.to_string().parse(), Ok(step));
        for text in ["", "feed", "feed 1 2 3", "feed 1 2 3 x", "zz 1 2 3 4"] {
            assert_eq!(text.parse::<Step>(), Err(NotAStep), "{text}");
        }
        let whole = record(0xfeed, 7, 9);
        assert_eq!(whole.len(), RECORD_BYTES);
        assert_eq!(read_record(whole.as_bytes()), Some((0xfeed, 7)));
        for end in 0..whole.len() {
            assert_eq!(read_record(&whole.as_bytes()[..end]), None, "{end}");
        }
    }
}
