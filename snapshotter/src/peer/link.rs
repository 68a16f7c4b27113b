//! What is known of the way to each peer: measured by migrations, kept across restarts.
//!
//! Measurements only: a file that is lost or damaged costs the next migration some waiting, so it
//! is begun again then. It is replaced as a whole (docs/formats.md, "Directories").

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use super::Connection;
pub use crate::policy::predict::MEASURED_BYTES_MIN;

/// Share of a new measurement in what is remembered.
const NEW_SHARE: f64 = 0.5;

/// Bounds of a pace that is believed: beyond them something else than the machines' speed was
/// measured.
const FROZEN_PACE_MIN: f64 = 0.2;
const FROZEN_PACE_MAX: f64 = 5.0;

/// The way to one peer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Link {
    /// Bytes per second, uncompressed, that it delivered while it was asked.
    pub throughput_bytes_per_second: Option<f64>,
    /// How long its last hello took, in milliseconds.
    pub round_trip_ms: f64,
    /// Runnable tasks per processor, as it last said of itself.
    pub load: f64,
    /// How long containers from it were frozen, as a share of what the model predicts without
    /// having measured.
    #[serde(default)]
    pub frozen_pace: Option<f64>,
}

/// The ways to all peers. Cheap to ask.
#[derive(Debug)]
pub struct LinkStats {
    path: PathBuf,
    known: Mutex<BTreeMap<String, Link>>,
}

impl LinkStats {
    /// What the file says; nothing if it is not there or damaged.
    pub fn open(path: &Path) -> Self {
        let known = match fs::read(path) {
            Ok(bytes) => serde_json::from_slice(&bytes).unwrap_or_else(|error| {
                tracing::warn!(path = %path.display(), %error, "peers are measured again");
                BTreeMap::new()
            }),
            Err(_) => BTreeMap::new(),
        };
        Self { path: path.to_owned(), known: Mutex::new(known) }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Link>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is known of one.
    pub fn of(&self, node: &str) -> Link {
        self.lock().get(node).copied().unwrap_or_default()
    }

    /// Rates of all that were measured, in bytes per second.
    pub fn rates(&self) -> Vec<(String, f64)> {
        let rate = |(node, channel): (&String, &Link)| {
            Some((node.clone(), channel.throughput_bytes_per_second?))
        };
        self.lock().iter().filter_map(rate).collect()
    }

    /// A peer has said hello.
    pub fn greeted(&self, connection: &Connection) {
        let mut known = self.lock();
        let channel = known.entry(connection.node.clone()).or_default();
        channel.round_trip_ms = connection.round_trip.as_secs_f64() * 1e3;
        channel.load = connection.hello.load;
    }

    /// A container from `node` was frozen for `measured` seconds, and the model predicts
    /// `predicted`.
    pub fn frozen(&self, node: &str, measured: f64, predicted: f64) {
        let pace = (measured / predicted).clamp(FROZEN_PACE_MIN, FROZEN_PACE_MAX);
        if pace.is_nan() {
            return;
        }
        let mut known = self.lock();
        let known = &mut known.entry(node.to_owned()).or_default().frozen_pace;
        let before = known.unwrap_or(pace);
        *known = Some(before + (pace - before) * NEW_SHARE);
    }

    /// Remembers what a migration measured, in bytes per second, and writes the file.
    pub fn measured(&self, rates: &[(String, f64)]) {
        let text = {
            let mut known = self.lock();
            for (node, rate) in rates {
                let throughput =
                    &mut known.entry(node.clone()).or_default().throughput_bytes_per_second;
                let before = throughput.unwrap_or(*rate);
                *throughput = Some(before + (rate - before) * NEW_SHARE);
            }
            serde_json::to_vec_pretty(&*known).unwrap_or_default()
        };
        let new = self.path.with_extension("new");
        let written = fs::write(&new, text).and_then(|()| fs::rename(&new, &self.path));
        if let Err(error) = written {
            tracing::warn!(path = %self.path.display(), %error, "cannot save the measurements of peers");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measurements_are_averaged_and_outlive_the_daemon() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("peers.json");
        let channels = LinkStats::open(&path);
        channels.measured(&[("near".to_owned(), 100.0)]);
        channels.measured(&[("near".to_owned(), 200.0), ("far".to_owned(), 8.0)]);
        let again = LinkStats::open(&path);
        assert_eq!(again.rates(), [("far".to_owned(), 8.0), ("near".to_owned(), 150.0)]);
        assert_eq!(again.of("unknown"), Link::default());
    }

    #[test]
    fn the_pace_of_frozen_time_is_averaged_and_bounded_and_outlives_the_daemon() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("peers.json");
        // As a daemon wrote it that did not know of a pace.
        let earlier =
            r#"{"near":{"throughput_bytes_per_second":8.0,"round_trip_ms":1.0,"load":0.0}}"#;
        fs::write(&path, earlier).unwrap();
        let channels = LinkStats::open(&path);
        assert_eq!(channels.of("near").throughput_bytes_per_second, Some(8.0));
        channels.frozen("near", 1.0, 1.0);
        channels.frozen("near", 2.0, 1.0);
        channels.frozen("far", 1e9, 1.0);
        channels.frozen("none", 0.0, 0.0);
        channels.measured(&[]);
        let again = LinkStats::open(&path);
        let pace = |node| again.of(node).frozen_pace;
        assert_eq!((pace("near"), pace("far"), pace("none")), (Some(1.5), Some(5.0), None));
    }

    #[test]
    fn a_damaged_file_is_begun_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("peers.json");
        fs::write(&path, "{").unwrap();
        let channels = LinkStats::open(&path);
        assert!(channels.rates().is_empty());
        channels.measured(&[("near".to_owned(), 1.0)]);
        assert_eq!(LinkStats::open(&path).rates().len(), 1);
    }
}
