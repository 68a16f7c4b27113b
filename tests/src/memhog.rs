//! What a test asks the workload `memhog` (`src/bin/memhog.rs`).

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Deserialize;

/// How long an answer may take; a verification reads all memory.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a connection may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// What the workload says of itself.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
pub struct Stat {
    /// Tells this process from one that was started again.
    pub incarnation: u64,
    /// Beats so far, one every 5 ms.
    pub beats: u64,
    /// Pages written so far.
    pub writes: u64,
    /// Pages of memory.
    pub pages: u64,
    /// Pages that are not as they were written; always 0 in the answer to `stat`.
    pub bad_pages: u64,
    /// Longest gap between two beats by its own monotonic clock, in microseconds.
    pub longest_gap_us: u64,
}

/// Asks for the counters. Call it where `address` can be reached, see [`crate::Bed::as_client`].
pub fn stat(address: SocketAddr) -> Result<Stat> {
    ask(address, "stat\n")
}

/// Has it look at every page, and asks for the counters then.
pub fn verify(address: SocketAddr) -> Result<Stat> {
    ask(address, "verify\n")
}

/// The longest gap between two beats in the text of a volume's `beats`, by the real-time clock.
///
/// Errors: a line is not a count and a time, or a count does not follow the one before it: beats
/// that are missing or there twice.
pub fn longest_gap(beats: &str) -> Result<Duration> {
    let mut longest = 0;
    let mut last: Option<(u64, u64)> = None;
    for line in beats.lines() {
        let (count, time) = line.split_once(' ').with_context(|| format!("odd beat {line:?}"))?;
        let (count, time): (u64, u64) = (count.parse()?, time.parse()?);
        if let Some((last_count, last_time)) = last {
            anyhow::ensure!(count == last_count + 1, "beat {count} follows beat {last_count}");
            longest = longest.max(time.saturating_sub(last_time));
        }
        last = Some((count, time));
    }
    Ok(Duration::from_nanos(longest))
}

fn ask(address: SocketAddr, question: &str) -> Result<Stat> {
    let mut stream = TcpStream::connect_timeout(&address, CONNECT_TIMEOUT)
        .with_context(|| format!("connect to memhog at {address}"))?;
    stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
    stream.write_all(question.as_bytes())?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    serde_json::from_str(&line).with_context(|| format!("odd answer of memhog: {line:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_gap_is_found_and_a_missing_beat_is_an_error() {
        let gap = longest_gap("1 1000\n2 3000\n3 3500\n").unwrap();
        assert_eq!(gap, Duration::from_nanos(2000));
        assert!(longest_gap("1 1000\n3 3000\n").is_err());
        assert!(longest_gap("1 1000\n1 3000\n").is_err());
    }
}
