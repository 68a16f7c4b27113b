//! A witness of a redis: writes at a set rate, remembers what was acknowledged, and checks it all.
//!
//! Every value is a record that says its key's number and its sequence ([`crate::pattern`]), so a
//! torn or a mixed-up value is noticed. For each key the client knows the last sequence that was
//! acknowledged and the last that was tried: what is there must lie between the two, because a
//! write without an answer may or may not have happened. So nothing acknowledged may be missing,
//! and a write that a frozen server still had in its buffers must not overwrite a later one.
//!
//! Every acknowledgement is a *beat*. The client knows several addresses and goes to the next when
//! one fails, with short deadlines and shorter ones while no server answers, so that the longest
//! gap between two beats is the outage as a client sees it, at most one short deadline too long.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};

use crate::network::in_namespace;
use crate::pattern;
use crate::redis::{Client, RedisError};

/// Deadline of an answer while all is well.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(100);
/// Deadline of an attempt while no server answers.
const PROBE_TIMEOUT: Duration = Duration::from_millis(20);
/// Pause after a failed attempt: a refused connection fails at once.
const RETRY_PAUSE: Duration = Duration::from_millis(1);
/// Longest pause between beats: slow loads ping in between.
const BEAT: Duration = Duration::from_millis(5);
/// Gaps that are worth a line in the report.
const NOTABLE_GAP: Duration = Duration::from_millis(30);
/// Most gaps that are listed.
const GAPS_MAX: usize = 1000;
/// Deadline of one read of the verifier.
const VERIFY_TIMEOUT: Duration = Duration::from_secs(5);

/// What to write, and where.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Addresses of the server, the first being tried first.
    pub addresses: Vec<SocketAddr>,
    /// Bytes of values per second.
    pub bytes_per_s: u64,
    /// Bytes of one value, at least [`pattern::HEADER_BYTES`].
    pub value_bytes: usize,
    /// Keys `key:0` to `key:N-1`, chosen at random. One or more.
    pub keys: usize,
}

/// A pause in the acknowledgements.
#[derive(Clone, Copy, Debug)]
pub struct Gap {
    /// When it began, counted from the start of the load.
    pub begin: Duration,
    /// How long it was.
    pub length: Duration,
}

/// What was seen, once the load has stopped.
#[derive(Clone, Debug)]
pub struct Report {
    /// Writes that were acknowledged.
    pub acknowledged: u64,
    /// Writes without an answer.
    pub unanswered: u64,
    /// Writes and pings that the server refused.
    pub refused: u64,
    /// Beats by address, in the order of the options.
    pub beats: Vec<u64>,
    /// The longest gap between two beats.
    pub longest_gap: Duration,
    /// All gaps of 30 ms or more.
    pub gaps: Vec<Gap>,
    /// What the verifier needs.
    pub ledger: Ledger,
}

/// For every key the last sequence that was acknowledged and the last that was tried; 0 is none.
#[derive(Clone, Debug)]
pub struct Ledger {
    keys: Vec<(u64, u64)>,
    value_bytes: usize,
}

/// What the verifier found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Keys looked at.
    pub keys: u64,
    /// Values found.
    pub values: u64,
    /// What is wrong, in words: one line per value.
    pub wrong: Vec<String>,
}

/// A load that is running. [`Load::stop`] ends it; so does dropping it.
pub struct Load {
    stop: Arc<AtomicBool>,
    acknowledged: Arc<AtomicU64>,
    beats: Arc<Mutex<Vec<u64>>>,
    thread: Option<JoinHandle<Result<Report>>>,
}

impl Load {
    /// Starts writing from a network namespace ([`crate::Bed::client_namespace`]).
    pub fn start(namespace: String, options: LoadOptions) -> Result<Self> {
        let ledger = Ledger::new(options.keys, options.value_bytes);
        Self::resume(namespace, options, ledger)
    }

    /// The same on a server that holds values already: `ledger` knows them.
    pub fn resume(namespace: String, options: LoadOptions, ledger: Ledger) -> Result<Self> {
        if options.addresses.is_empty() || options.keys == 0 {
            bail!("a load needs an address and a key");
        }
        if (ledger.keys.len(), ledger.value_bytes) != (options.keys, options.value_bytes) {
            bail!("the ledger is one of other keys or values than the load's");
        }
        let stop = Arc::new(AtomicBool::new(false));
        let acknowledged = Arc::new(AtomicU64::new(0));
        let beats = Arc::new(Mutex::new(vec![0; options.addresses.len()]));
        let mut writer = Writer::new(options, ledger, &acknowledged, &beats);
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new().name("load".into()).spawn(move || {
            in_namespace(&namespace, move || {
                writer.run(&stopped);
                Ok(writer.report)
            })
        })?;
        Ok(Self { stop, acknowledged, beats, thread: Some(thread) })
    }

    /// Writes acknowledged so far.
    pub fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::Relaxed)
    }

    /// Beats so far by address.
    pub fn beats(&self) -> Vec<u64> {
        self.beats.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until `count` more writes are acknowledged. Errors: not within `timeout`.
    pub fn wait_for(&self, count: u64, timeout: Duration) -> Result<()> {
        let goal = self.acknowledged() + count;
        let what = format!("{count} writes are acknowledged");
        crate::command::wait_until(&what, timeout, || Ok(self.acknowledged() >= goal))
    }

    /// Ends the load and returns what it saw.
    pub fn stop(mut self) -> Result<Report> {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().ok_or_else(|| anyhow!("the load was stopped before"))?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(Err(_panic)) = self.thread.take().map(JoinHandle::join) {
            eprintln!("the load's thread has panicked");
        }
    }
}

/// The thread's own state.
struct Writer {
    options: LoadOptions,
    report: Report,
    shared_acknowledged: Arc<AtomicU64>,
    shared_beats: Arc<Mutex<Vec<u64>>>,
    random: u64,
    current: usize,
    client: Option<Client>,
    begin: Instant,
    last_beat: Instant,
    /// Since when no server answers.
    outage: bool,
}

impl Writer {
    fn new(
        options: LoadOptions,
        ledger: Ledger,
        acknowledged: &Arc<AtomicU64>,
        beats: &Arc<Mutex<Vec<u64>>>,
    ) -> Self {
        let report = Report {
            acknowledged: 0,
            unanswered: 0,
            refused: 0,
            beats: vec![0; options.addresses.len()],
            longest_gap: Duration::ZERO,
            gaps: Vec::new(),
            ledger,
        };
        let now = Instant::now();
        Self {
            options,
            report,
            shared_acknowledged: Arc::clone(acknowledged),
            shared_beats: Arc::clone(beats),
            random: 1,
            current: 0,
            client: None,
            begin: now,
            last_beat: now,
            outage: true,
        }
    }

    fn run(&mut self, stop: &AtomicBool) {
        let mut value = vec![0; self.options.value_bytes.max(pattern::HEADER_BYTES)];
        let mut sent_bytes = 0;
        let mut pace = Instant::now();
        while !stop.load(Ordering::Relaxed) {
            let Some(mut client) = self.client.take().or_else(|| self.connect()) else {
                // What could not be written in an outage is not made up for.
                (sent_bytes, pace) = (0, Instant::now());
                continue;
            };
            let due_bytes =
                pace.elapsed().as_micros() * u128::from(self.options.bytes_per_s) / 1_000_000;
            let outcome = if sent_bytes < due_bytes {
                sent_bytes += value.len() as u128;
                self.write(&mut client, &mut value)
            } else if self.last_beat.elapsed() >= BEAT {
                client.ping()
            } else {
                std::thread::sleep(Duration::from_micros(200));
                self.client = Some(client);
                continue;
            };
            self.settle(client, outcome);
        }
    }

    /// Takes note of an answer or its absence.
    fn settle(&mut self, client: Client, outcome: Result<(), RedisError>) {
        match outcome {
            Ok(()) => {
                self.beat();
                self.client = Some(client);
            }
            Err(RedisError::Refused(_)) => {
                // For example LOADING or READONLY: an answer, but not a beat.
                self.report.refused += 1;
                self.client = Some(client);
                std::thread::sleep(RETRY_PAUSE);
            }
            Err(RedisError::Connection(_) | RedisError::Protocol(_)) => {
                self.report.unanswered += 1;
                self.outage = true;
                self.next_address();
            }
        }
    }

    fn write(&mut self, client: &mut Client, value: &mut [u8]) -> Result<(), RedisError> {
        let keys = self.options.keys as u64;
        let key = pattern::next_random(&mut self.random) % keys;
        let index = usize::try_from(key).unwrap_or(0);
        let sequence = self.report.ledger.keys[index].1 + 1;
        self.report.ledger.keys[index].1 = sequence;
        pattern::write_record(key, sequence, value);
        client.set(&key_name(index), value)?;
        self.report.ledger.keys[index].0 = sequence;
        self.report.acknowledged += 1;
        self.shared_acknowledged.store(self.report.acknowledged, Ordering::Relaxed);
        Ok(())
    }

    fn beat(&mut self) {
        let (gap, begin) = (self.last_beat.elapsed(), self.last_beat - self.begin);
        let first = self.report.beats.iter().all(|&beats| beats == 0);
        if !first {
            self.report.longest_gap = self.report.longest_gap.max(gap);
            if gap >= NOTABLE_GAP && self.report.gaps.len() < GAPS_MAX {
                self.report.gaps.push(Gap { begin, length: gap });
            }
        }
        self.last_beat = Instant::now();
        self.outage = false;
        self.report.beats[self.current] += 1;
        let mut shared = self.shared_beats.lock().unwrap_or_else(PoisonError::into_inner);
        shared[self.current] += 1;
    }

    /// Connects to the current address, and has it answer once; goes to the next if that fails.
    fn connect(&mut self) -> Option<Client> {
        let timeout = if self.outage { PROBE_TIMEOUT } else { ANSWER_TIMEOUT };
        let address = self.options.addresses[self.current];
        let connected = Client::connect(address, timeout).and_then(|mut client| {
            // A frozen server's kernel accepts for it; only an answer counts.
            client.ping()?;
            client.set_timeout(ANSWER_TIMEOUT)?;
            Ok(client)
        });
        if connected.is_err() {
            self.outage = true;
            self.next_address();
            std::thread::sleep(RETRY_PAUSE);
        }
        connected.ok()
    }

    fn next_address(&mut self) {
        self.current = (self.current + 1) % self.options.addresses.len();
    }
}

impl Ledger {
    /// Knows that keys `key:0` to `key:N-1` have no value.
    pub fn new(keys: usize, value_bytes: usize) -> Self {
        Self { keys: vec![(0, 0); keys], value_bytes }
    }

    /// Writes the next value of a key and waits for the acknowledgement.
    pub fn write(&mut self, client: &mut Client, index: usize) -> Result<(), RedisError> {
        let mut value = vec![0; self.value_bytes.max(pattern::HEADER_BYTES)];
        let (acknowledged, tried) = &mut self.keys[index];
        *tried += 1;
        pattern::write_record(index as u64, *tried, &mut value);
        client.set(&key_name(index), &value)?;
        *acknowledged = *tried;
        Ok(())
    }

    /// Reads every key from a server and compares it with what was acknowledged and tried.
    ///
    /// Call it where `address` can be reached, see [`crate::Bed::as_client`].
    pub fn verify(&self, address: SocketAddr) -> Result<Verdict> {
        let mut client = Client::connect(address, VERIFY_TIMEOUT)?;
        let mut verdict = Verdict::default();
        for (index, &(acknowledged, tried)) in self.keys.iter().enumerate() {
            let value = client.get(&key_name(index))?;
            verdict.keys += 1;
            verdict.values += u64::from(value.is_some());
            if let Some(wrong) = self.judge(index, acknowledged, tried, value.as_deref()) {
                verdict.wrong.push(format!("{}: {wrong}", key_name(index)));
            }
        }
        Ok(verdict)
    }

    fn judge(
        &self,
        index: usize,
        acknowledged: u64,
        tried: u64,
        value: Option<&[u8]>,
    ) -> Option<String> {
        let Some(value) = value else {
            return (acknowledged > 0).then(|| format!("missing, {acknowledged} was acknowledged"));
        };
        if value.len() != self.value_bytes.max(pattern::HEADER_BYTES) {
            return Some(format!("{} bytes instead of {}", value.len(), self.value_bytes));
        }
        match pattern::read_record(value) {
            None => Some("torn".into()),
            Some((number, _)) if number != index as u64 => Some(format!("belongs to key {number}")),
            Some((_, sequence)) if sequence < acknowledged => {
                Some(format!("is write {sequence}, {acknowledged} was acknowledged"))
            }
            Some((_, sequence)) if sequence > tried => {
                Some(format!("is write {sequence}, only {tried} were tried"))
            }
            Some(_) => None,
        }
    }
}

/// Name of the key numbered `index`.
pub fn key_name(index: usize) -> String {
    format!("key:{index}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_must_be_whole_and_lie_between_acknowledged_and_tried() {
        let ledger = Ledger { keys: vec![], value_bytes: 64 };
        let value = |number, sequence| {
            let mut bytes = vec![0; 64];
            pattern::write_record(number, sequence, &mut bytes);
            bytes
        };
        let judge = |bytes: Option<&[u8]>| ledger.judge(3, 5, 7, bytes);
        for sequence in 5..=7 {
            assert_eq!(judge(Some(&value(3, sequence))), None);
        }
        assert!(judge(Some(&value(3, 4))).unwrap().contains("5 was acknowledged"));
        assert!(judge(Some(&value(3, 8))).unwrap().contains("only 7"));
        assert!(judge(Some(&value(2, 6))).unwrap().contains("key 2"));
        assert!(judge(None).unwrap().contains("missing"));
        assert_eq!(ledger.judge(3, 0, 7, None), None);
        let mut torn = value(3, 6);
        torn[40] ^= 1;
        assert_eq!(judge(Some(&torn)).as_deref(), Some("torn"));
        assert!(judge(Some(&torn[..63])).unwrap().contains("63 bytes"));
    }
}
