//! A ledger: steps that a witness outside hears of, and that everything a container consists of
//! keeps a count of.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, UdpSocket};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use godwit_tests::ledger::{RECORD_BYTES, Step, read_record, record};
use godwit_tests::pattern;

use super::report;

/// Pause between two steps.
const PAUSE: Duration = Duration::from_millis(5);
/// Pause before a write is tried again that found no room.
const ROOM_PAUSE: Duration = Duration::from_millis(20);
const PAGE_BYTES: usize = 4096;
/// Pages that are written, and others that are verified, in each step.
const PAGES_PER_STEP: u64 = 16;

/// `probe ledger WITNESS MIB DIRECTORY...`: one step every 5 ms, reported to WITNESS; MIB of
/// memory are written and verified page by page, and every step is appended to the file
/// `ledger-LIFE` in each DIRECTORY.
///
/// A child process and a second thread count along. The line is `life LIFE`.
pub(super) fn ledger(arguments: &[String]) -> io::Result<()> {
    let [witness, mib, directories @ ..] = arguments else {
        return Err(invalid("needs WITNESS MIB DIRECTORY..."));
    };
    let witness: SocketAddr = witness.parse().map_err(|_cause| invalid("WITNESS"))?;
    let mib: usize = mib.parse().map_err(|_cause| invalid("MIB"))?;
    let mut life = u64::try_from(now()?.as_nanos() % u128::from(u64::MAX)).unwrap_or(0);
    let life = pattern::next_random(&mut life);
    let mut child = Follower::start()?;
    let mut thread = Second::start();
    let mut memory = Memory::new(life, (mib << 20) / PAGE_BYTES);
    let mut files =
        directories.iter().map(|at| Records::open(at, life)).collect::<io::Result<Vec<_>>>()?;
    // Not connected: a connected socket keeps the address of the node that it was made on.
    let socket = UdpSocket::bind(("0.0.0.0", 0))?;
    report(&format!("life {life:016x}"))?;
    let mut unsent = 0;
    for counter in 1_u64.. {
        let wall_ns = u64::try_from(now()?.as_nanos()).unwrap_or(0);
        let mut places = vec![child.count(counter)?, thread.count(counter)?];
        for file in &mut files {
            places.push(file.append(life, counter, wall_ns)?);
        }
        memory.step();
        let bad_pages = memory.bad;
        let step = Step { life, counter, wall_ns, bad_pages, unsent, places };
        unsent += u64::from(socket.send_to(step.to_string().as_bytes(), witness).is_err());
        thread::sleep(PAUSE);
    }
    Ok(())
}

/// `probe ledger-child`: answers each number that it reads with its own count of them.
pub(super) fn child(_arguments: &[String]) -> io::Result<()> {
    let (mut input, mut output) = (io::stdin().lock(), io::stdout().lock());
    let (mut number, mut count) = ([0; 8], 0_u64);
    loop {
        input.read_exact(&mut number)?;
        count += 1;
        let agrees = u64::from_le_bytes(number) == count;
        output.write_all(&if agrees { count } else { 0 }.to_le_bytes())?;
        output.flush()?;
    }
}

/// The child process, which counts what it is asked.
struct Follower {
    child: Child,
}

impl Follower {
    fn start() -> io::Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("ledger-child").stdin(Stdio::piped()).stdout(Stdio::piped());
        Ok(Self { child: command.spawn()? })
    }

    fn count(&mut self, counter: u64) -> io::Result<u64> {
        let (Some(input), Some(output)) = (&mut self.child.stdin, &mut self.child.stdout) else {
            return Err(invalid("no pipes to the child"));
        };
        input.write_all(&counter.to_le_bytes())?;
        let mut answer = [0; 8];
        output.read_exact(&mut answer)?;
        Ok(u64::from_le_bytes(answer))
    }
}

/// The second thread, which does the same.
struct Second {
    ask: SyncSender<u64>,
    answers: Receiver<u64>,
}

impl Second {
    fn start() -> Self {
        let (ask, asked) = sync_channel::<u64>(1);
        let (answer, answers) = sync_channel(1);
        thread::spawn(move || {
            let mut count = 0;
            for number in asked {
                count += 1;
                if answer.send(if number == count { count } else { 0 }).is_err() {
                    break;
                }
            }
        });
        Self { ask, answers }
    }

    fn count(&mut self, counter: u64) -> io::Result<u64> {
        self.ask.send(counter).map_err(|_cause| invalid("the thread has ended"))?;
        self.answers.recv().map_err(|_cause| invalid("the thread has ended"))
    }
}

/// A file of records.
struct Records {
    file: File,
}

impl Records {
    fn open(directory: &str, life: u64) -> io::Result<Self> {
        let path = Path::new(directory).join(format!("ledger-{life:016x}"));
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(path)?;
        Ok(Self { file })
    }

    /// Appends a record, and returns the file's count: 0 if it does not end with the step before.
    ///
    /// A full disk is waited for: the step is made when there is room.
    fn append(&mut self, life: u64, counter: u64, wall_ns: u64) -> io::Result<u64> {
        let at = (counter - 1) * RECORD_BYTES as u64;
        let agrees = self.file.metadata()?.len() == at && self.ends_with(life, counter - 1)?;
        let bytes = record(life, counter, wall_ns);
        while let Err(error) = self.file.write_all_at(bytes.as_bytes(), at) {
            if error.kind() != io::ErrorKind::StorageFull {
                return Err(error);
            }
            // No part of a record stays.
            self.file.set_len(at)?;
            thread::sleep(ROOM_PAUSE);
        }
        Ok(if agrees { counter } else { 0 })
    }

    fn ends_with(&self, life: u64, counter: u64) -> io::Result<bool> {
        let Some(before) = counter.checked_sub(1) else { return Ok(true) };
        let mut last = [0; RECORD_BYTES];
        self.file.read_exact_at(&mut last, before * RECORD_BYTES as u64)?;
        Ok(read_record(&last) == Some((life, counter)))
    }
}

/// Pages that say what they are, and a table of what each should say.
struct Memory {
    bytes: Vec<u8>,
    sequences: Vec<u64>,
    random: u64,
    life: u64,
    bad: u64,
}

impl Memory {
    fn new(life: u64, pages: usize) -> Self {
        let bytes = vec![0; pages * PAGE_BYTES];
        let mut memory = Self { bytes, sequences: vec![0; pages], random: life, life, bad: 0 };
        for page in 0..pages {
            memory.write(page);
        }
        memory
    }

    fn step(&mut self) {
        for _ in 0..PAGES_PER_STEP {
            let (written, looked_at) = (self.any(), self.any());
            if let (Some(written), Some(looked_at)) = (written, looked_at) {
                self.write(written);
                let whole = Some((self.life ^ looked_at as u64, self.sequences[looked_at]));
                self.bad += u64::from(pattern::read_record(self.page(looked_at)) != whole);
            }
        }
    }

    fn any(&mut self) -> Option<usize> {
        let pages = self.sequences.len() as u64;
        usize::try_from(pattern::next_random(&mut self.random).checked_rem(pages)?).ok()
    }

    fn page(&mut self, page: usize) -> &mut [u8] {
        &mut self.bytes[page * PAGE_BYTES..(page + 1) * PAGE_BYTES]
    }

    fn write(&mut self, page: usize) {
        self.sequences[page] += 1;
        let (number, sequence) = (self.life ^ page as u64, self.sequences[page]);
        pattern::write_record(number, sequence, self.page(page));
    }
}

fn now() -> io::Result<Duration> {
    SystemTime::now().duration_since(UNIX_EPOCH).map_err(io::Error::other)
}

fn invalid(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, text.to_owned())
}
