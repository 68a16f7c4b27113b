//! A workload that notices: memory of a set size, written at a set rate, that checks itself.
//!
//! Each page of its memory is a record ([`godwit_tests::pattern`]): its number, how often it was
//! written, and bytes that follow from both and that nothing compresses. A table elsewhere in
//! memory holds the sequence of every page, so that a page that went back in time is noticed like a
//! torn one.
//!
//! Every 5 ms it makes a *beat*: it writes its share of pages, counts, and appends the count and
//! the time to `beats` on its volume. The longest gap between two beats is what a migration cost
//! it.
//!
//! A *witness* outside gets each beat's count in a datagram, so that it can tell where it ran when.
//!
//! On TCP it answers lines: `stat` with counters, `verify` after looking at every page; both with
//! one line of JSON, documented at [`godwit_tests::memhog::Stat`].

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use godwit_tests::pattern;

const PAGE_BYTES: usize = 4096;
const PAGES_PER_MIB: usize = 256;
const BEAT: Duration = Duration::from_millis(5);
/// Pages that are verified before others get a turn.
const VERIFY_PAGES: usize = 256;
const USAGE: &str = "usage: memhog --resident-mib N --dirty-mib-per-s M [--listen PORT] \
                     [--volume DIRECTORY] [--witness ADDRESS:PORT]";

#[derive(Default)]
struct Arguments {
    resident_mib: usize,
    dirty_mib_per_s: usize,
    listen: Option<u16>,
    volume: Option<PathBuf>,
    witness: Option<SocketAddr>,
}

/// The memory and everything that is known about it.
struct Hog {
    memory: Vec<u8>,
    sequences: Vec<u64>,
    /// Tells this process from one that was started again.
    incarnation: u64,
    random: u64,
    beats: u64,
    writes: u64,
    longest_gap: Duration,
}

fn main() -> Result<(), String> {
    let arguments = parse(std::env::args().skip(1))?;
    let hog = Arc::new(Mutex::new(Hog::new(arguments.resident_mib * PAGES_PER_MIB)));
    if let Some(port) = arguments.listen {
        let listener = TcpListener::bind(("0.0.0.0", port)).map_err(|e| format!("listen: {e}"))?;
        let hog = Arc::clone(&hog);
        thread::spawn(move || serve(&listener, &hog));
    }
    let beats = arguments.volume.as_deref().map(open_beats).transpose();
    let beats = beats.map_err(|e| format!("open the file of beats: {e}"))?;
    println!("memhog: {} MiB ready", arguments.resident_mib);
    beat(&hog, arguments.dirty_mib_per_s, beats, arguments.witness)
        .map_err(|e| format!("write a beat: {e}"))
}

fn parse(mut words: impl Iterator<Item = String>) -> Result<Arguments, String> {
    let mut arguments = Arguments::default();
    while let Some(word) = words.next() {
        let value = words.next().ok_or(USAGE)?;
        let number = || value.parse().map_err(|e| format!("{word} {value}: {e}"));
        match word.as_str() {
            "--resident-mib" => arguments.resident_mib = number()?,
            "--dirty-mib-per-s" => arguments.dirty_mib_per_s = number()?,
            "--listen" => arguments.listen = Some(value.parse().map_err(|e| format!("port: {e}"))?),
            "--volume" => arguments.volume = Some(value.into()),
            "--witness" => {
                let witness = value.parse().map_err(|e| format!("{word} {value}: {e}"))?;
                arguments.witness = Some(witness);
            }
            _ => return Err(USAGE.into()),
        }
    }
    Ok(arguments)
}

fn open_beats(volume: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).open(volume.join("beats"))
}

/// Beats for ever, at the rate that was asked for; what was missed in a freeze is not made up for.
fn beat(
    hog: &Mutex<Hog>,
    mib_per_s: usize,
    mut file: Option<File>,
    witness: Option<SocketAddr>,
) -> io::Result<()> {
    let mut last = Instant::now();
    // Pages are whole, beats are short: the rest of a page is owed to the next beat.
    let mut owed_bytes = 0;
    loop {
        thread::sleep(BEAT);
        let gap = last.elapsed();
        last = Instant::now();
        owed_bytes +=
            mib_per_s * (1 << 20) * usize::try_from(gap.min(4 * BEAT).as_micros()).unwrap_or(0)
                / 1_000_000;
        let pages = owed_bytes / PAGE_BYTES;
        owed_bytes %= PAGE_BYTES;
        let count = lock(hog).beat(pages, gap);
        if let Some(witness) = witness {
            // A socket of its own each time: its address differs between nodes.
            let socket = UdpSocket::bind(("0.0.0.0", 0))?;
            let _ = socket.send_to(&count.to_le_bytes(), witness);
        }
        if let Some(file) = &mut file {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            // One write each: a line is there as a whole or not at all.
            file.write_all(format!("{count} {}\n", now.as_nanos()).as_bytes())?;
        }
    }
}

impl Hog {
    fn new(pages: usize) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut incarnation = now.subsec_nanos().into();
        let incarnation = pattern::next_random(&mut incarnation);
        let mut hog = Self {
            memory: vec![0; pages * PAGE_BYTES],
            sequences: vec![0; pages],
            incarnation,
            random: incarnation,
            beats: 0,
            writes: 0,
            longest_gap: Duration::ZERO,
        };
        for page in 0..pages {
            hog.write(page);
        }
        hog
    }

    /// The page's number in its record also tells one process's pages from another's.
    fn number(&self, page: usize) -> u64 {
        self.incarnation ^ page as u64
    }

    fn write(&mut self, page: usize) {
        self.sequences[page] += 1;
        let (number, sequence) = (self.number(page), self.sequences[page]);
        let bytes = &mut self.memory[page * PAGE_BYTES..(page + 1) * PAGE_BYTES];
        pattern::write_record(number, sequence, bytes);
        self.writes += 1;
    }

    fn beat(&mut self, pages: usize, gap: Duration) -> u64 {
        for _ in 0..pages.min(self.sequences.len()) {
            let page = pattern::next_random(&mut self.random) % self.sequences.len() as u64;
            self.write(usize::try_from(page).unwrap_or(0));
        }
        self.longest_gap = self.longest_gap.max(gap);
        self.beats += 1;
        self.beats
    }

    fn is_good(&self, page: usize) -> bool {
        let bytes = &self.memory[page * PAGE_BYTES..(page + 1) * PAGE_BYTES];
        pattern::read_record(bytes) == Some((self.number(page), self.sequences[page]))
    }

    fn stat(&self, bad_pages: usize) -> String {
        format!(
            "{{\"incarnation\":{},\"beats\":{},\"writes\":{},\"pages\":{},\"bad_pages\":{bad_pages},\
             \"longest_gap_us\":{}}}\n",
            self.incarnation,
            self.beats,
            self.writes,
            self.sequences.len(),
            self.longest_gap.as_micros()
        )
    }
}

fn serve(listener: &TcpListener, hog: &Arc<Mutex<Hog>>) {
    for stream in listener.incoming().flatten() {
        let hog = Arc::clone(hog);
        // A client that hangs up ends its thread, and nothing else.
        thread::spawn(move || answer(&stream, &hog));
    }
}

fn answer(stream: &TcpStream, hog: &Mutex<Hog>) -> io::Result<()> {
    for line in BufReader::new(stream).lines() {
        let reply = match line?.trim() {
            "stat" => lock(hog).stat(0),
            "verify" => {
                let bad_pages = verify(hog);
                lock(hog).stat(bad_pages)
            }
            other => format!("{{\"error\":\"unknown command {}\"}}\n", other.escape_default()),
        };
        let mut stream = stream;
        stream.write_all(reply.as_bytes())?;
    }
    Ok(())
}

fn verify(hog: &Mutex<Hog>) -> usize {
    let pages = lock(hog).sequences.len();
    let starts = (0..pages).step_by(VERIFY_PAGES);
    let bad = starts.map(|start| {
        let hog = lock(hog);
        (start..pages.min(start + VERIFY_PAGES)).filter(|&page| !hog.is_good(page)).count()
    });
    bad.sum()
}

fn lock(hog: &Mutex<Hog>) -> std::sync::MutexGuard<'_, Hog> {
    hog.lock().unwrap_or_else(PoisonError::into_inner)
}
