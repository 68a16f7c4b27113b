//! Commits that do not wait for the disk: the change is in the file when they return, and a flush
//! has begun.
//!
//! Who dies with the process loses nothing, as the kernel has it all. Who loses power may lose the
//! last change, never more, and never finds half of it: nothing further is written before the flush
//! is over, and until then the file still holds the state before, to which redb goes back if the
//! new one's checksums are wrong (redb's `docs/design.md`, "1-phase + checksum durable commits").

use std::fmt::Debug;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use redb::StorageBackend;

/// What a database is on: `inner`, whose flushes may be left to a thread of its own. redb finds no
/// locks: its user has one of its own.
#[derive(Debug)]
pub(super) struct Deferring<B> {
    inner: Arc<B>,
    flushes: Flushes,
    thread: Mutex<Option<std::thread::JoinHandle<()>>>,
}

/// Says which flushes are left to the thread.
#[derive(Clone, Debug)]
pub struct Flushes(Arc<(Mutex<State>, Condvar)>);

#[derive(Debug, Default)]
struct State {
    /// The next flush is for the thread.
    is_next_deferred: bool,
    /// The thread has one to do.
    is_due: bool,
    /// With it, what comes first.
    is_first_due: bool,
    /// One of the thread's has failed: what is on disk is unknown.
    failed: Option<io::ErrorKind>,
    is_closed: bool,
}

impl Flushes {
    /// Whether the next commit does not wait for the disk. Caller: holds the write transaction that
    /// it commits next.
    pub fn defer_next(&self, is_deferred: bool) {
        self.state().is_next_deferred = is_deferred;
    }

    /// Has what comes first put on disk before the next flush.
    pub fn also_first(&self) {
        self.state().is_first_due = true;
    }

    /// Why a flush that was left to the thread failed, if one has: the next change is refused.
    pub fn failure(&self) -> Option<io::ErrorKind> {
        self.state().failed
    }

    /// Whether the last change is on its way to the disk yet, so that a further one would wait.
    pub fn is_due(&self) -> bool {
        self.state().is_due
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_while(&self, condition: impl Fn(&State) -> bool) -> MutexGuard<'_, State> {
        let state = self.0.1.wait_while(self.state(), |state| condition(state));
        state.unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the thread has nothing to do.
    fn settled(&self) -> io::Result<MutexGuard<'_, State>> {
        let state = self.wait_while(|state| state.is_due);
        let failed = |kind| io::Error::new(kind, "a change before could not be written to disk");
        state.failed.map_or(Ok(()), |kind| Err(failed(kind)))?;
        Ok(state)
    }

    fn run(&self, first: impl Fn() -> io::Result<()>, flush: impl Fn() -> io::Result<()>) {
        loop {
            let mut state = self.wait_while(|state| !state.is_due && !state.is_closed);
            if !state.is_due {
                return;
            }
            let is_first_due = std::mem::take(&mut state.is_first_due);
            drop(state);
            let done = if is_first_due { first().and_then(|()| flush()) } else { flush() };
            if let Err(error) = &done {
                tracing::error!(%error, "a change of the database could not be written to disk");
            }
            let mut state = self.state();
            state.failed = done.err().map(|error| error.kind());
            state.is_due = false;
            self.0.1.notify_all();
        }
    }
}

impl<B: StorageBackend> Deferring<B> {
    /// Before a flush that is left to the thread, `first` puts on disk what is said to be due
    /// ([`Flushes::also_first`]).
    pub(super) fn new(
        inner: B,
        first: impl Fn() -> io::Result<()> + Send + 'static,
    ) -> io::Result<(Self, Flushes)> {
        let inner = Arc::new(inner);
        let flushes = Flushes(Arc::default());
        let (of_thread, file) = (flushes.clone(), inner.clone());
        let thread = std::thread::Builder::new()
            .name("flush".to_owned())
            .spawn(move || of_thread.run(first, || file.sync_data()))?;
        let deferring = Self { inner, flushes: flushes.clone(), thread: Mutex::new(Some(thread)) };
        Ok((deferring, flushes))
    }
}

impl<B: StorageBackend> StorageBackend for Deferring<B> {
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.inner.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        drop(self.flushes.settled()?);
        self.inner.set_len(len)
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        drop(self.flushes.settled()?);
        self.inner.write(offset, data)
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut state = self.flushes.settled()?;
        if std::mem::take(&mut state.is_next_deferred) {
            state.is_due = true;
            drop(state);
            self.flushes.0.1.notify_all();
            return Ok(());
        }
        drop(state);
        self.inner.sync_data()
    }

    fn close(&self) -> io::Result<()> {
        let settled = self.flushes.settled().map(drop);
        self.flushes.state().is_closed = true;
        self.flushes.0.1.notify_all();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        let _ = thread.map(std::thread::JoinHandle::join);
        settled.and(self.inner.close())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use redb::backends::InMemoryBackend;
    use redb::{Database, ReadableDatabase as _, TableDefinition};

    use super::*;

    const TABLE: TableDefinition<'_, u64, u64> = TableDefinition::new("table");
    /// More than one write into a database takes, fewer than all their subsets can be tried.
    const WRITES_MAX: usize = 12;

    /// A disk that says what a power cut may leave of it.
    #[derive(Clone, Debug, Default)]
    struct Disk(Arc<(Mutex<Contents>, Condvar)>);

    #[derive(Debug, Default)]
    struct Contents {
        flushed: Vec<u8>,
        seen: Vec<u8>,
        /// Offset and bytes, since the last flush.
        unflushed: Vec<(usize, Vec<u8>)>,
        is_stuck: bool,
        is_broken: bool,
    }

    impl Disk {
        fn set(&self, change: impl FnOnce(&mut Contents)) {
            change(&mut self.0.0.lock().unwrap());
            self.0.1.notify_all();
        }

        fn unflushed(&self) -> usize {
            self.0.0.lock().unwrap().unflushed.len()
        }

        /// What is left if those of the unflushed writes have arrived whose bit is set in `mask`.
        fn after_power_cut(&self, mask: usize) -> Vec<u8> {
            let contents = self.0.0.lock().unwrap();
            let mut left = contents.flushed.clone();
            for (number, (offset, data)) in contents.unflushed.iter().enumerate() {
                if mask & (1 << number) != 0 {
                    left[*offset..*offset + data.len()].copy_from_slice(data);
                }
            }
            left
        }
    }

    impl StorageBackend for Disk {
        fn len(&self) -> io::Result<u64> {
            Ok(self.0.0.lock().unwrap().seen.len() as u64)
        }

        fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
            let offset = usize::try_from(offset).unwrap();
            out.copy_from_slice(&self.0.0.lock().unwrap().seen[offset..offset + out.len()]);
            Ok(())
        }

        fn set_len(&self, len: u64) -> io::Result<()> {
            self.set(|contents| {
                contents.seen.resize(usize::try_from(len).unwrap(), 0);
                contents.flushed.resize(usize::try_from(len).unwrap(), 0);
            });
            Ok(())
        }

        fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
            let offset = usize::try_from(offset).unwrap();
            self.set(|contents| {
                contents.seen[offset..offset + data.len()].copy_from_slice(data);
                contents.unflushed.push((offset, data.to_owned()));
            });
            Ok(())
        }

        fn sync_data(&self) -> io::Result<()> {
            let contents = self.0.0.lock().unwrap();
            let mut contents = self.0.1.wait_while(contents, |contents| contents.is_stuck).unwrap();
            if contents.is_broken {
                return Err(io::Error::other("broken"));
            }
            contents.flushed = contents.seen.clone();
            contents.unflushed.clear();
            Ok(())
        }
    }

    fn start() -> (Disk, Arc<Database>, Flushes) {
        let disk = Disk::default();
        let (file, flushes) = Deferring::new(disk.clone(), || Ok(())).unwrap();
        let database = Database::builder().create_with_backend(file).unwrap();
        (disk, Arc::new(database), flushes)
    }

    /// Adds a row to the `rows` that are there.
    fn add(database: &Database, rows: u64, deferring: Option<&Flushes>) -> Result<(), redb::Error> {
        let write = database.begin_write()?;
        for row in 0..=rows {
            write.open_table(TABLE)?.insert(row, rows)?;
        }
        if let Some(flushes) = deferring {
            flushes.defer_next(true);
        }
        Ok(write.commit()?)
    }

    /// How many rows there are, all of the same change.
    fn rows(bytes: &[u8]) -> u64 {
        let memory = InMemoryBackend::new();
        memory.set_len(bytes.len() as u64).unwrap();
        memory.write(0, bytes).unwrap();
        let mut builder = Database::builder();
        builder.set_check_integrity_on_open(true);
        let database = builder.create_with_backend(memory).unwrap();
        let table = database.begin_read().unwrap().open_table(TABLE).unwrap();
        let count = redb::ReadableTableMetadata::len(&table).unwrap();
        for row in 0..count {
            assert_eq!(table.get(row).unwrap().unwrap().value(), count - 1);
        }
        count
    }

    /// Method: every subset of what was written since the last flush.
    #[test]
    fn a_power_cut_leaves_the_last_change_or_the_one_before() {
        let (disk, database, flushes) = start();
        add(&database, 0, None).unwrap();
        for number in 1..20 {
            // Those before may be of either kind.
            add(&database, number, (number % 3 > 0).then_some(&flushes)).unwrap();
            drop(flushes.settled().unwrap());
            assert_eq!(disk.unflushed(), 0);
        }
        disk.set(|contents| contents.is_stuck = true);
        add(&database, 20, Some(&flushes)).unwrap();
        let writes = disk.unflushed();
        assert!((2..WRITES_MAX).contains(&writes), "{writes}");
        let left: Vec<u64> =
            (0..1 << writes).map(|mask| rows(&disk.after_power_cut(mask))).collect();
        assert!(left.iter().all(|rows| [20, 21].contains(rows)), "{left:?}");
        assert_eq!((left[0], left[(1 << writes) - 1]), (20, 21));
        // Who died with the process finds what the kernel had.
        assert_eq!(rows(&disk.0.0.lock().unwrap().seen), 21);
        disk.set(|contents| contents.is_stuck = false);
    }

    #[test]
    fn the_next_change_is_not_written_before_the_last_is_on_disk() {
        let (disk, database, flushes) = start();
        disk.set(|contents| contents.is_stuck = true);
        add(&database, 0, Some(&flushes)).unwrap();
        let writes = disk.unflushed();
        let next = std::thread::spawn({
            let database = database.clone();
            move || add(&database, 1, None)
        });
        std::thread::sleep(Duration::from_millis(100));
        assert!(!next.is_finished());
        assert_eq!(disk.unflushed(), writes);
        disk.set(|contents| contents.is_stuck = false);
        next.join().unwrap().unwrap();
        drop(database);
        assert_eq!(rows(&disk.0.0.lock().unwrap().flushed), 2);
    }

    #[test]
    fn after_a_flush_that_failed_nothing_is_changed_any_more() {
        let (disk, database, flushes) = start();
        add(&database, 0, None).unwrap();
        disk.set(|contents| contents.is_broken = true);
        add(&database, 1, Some(&flushes)).unwrap();
        let error = add(&database, 2, Some(&flushes)).unwrap_err().to_string();
        assert!(error.contains("could not be written to disk"), "{error}");
        disk.set(|contents| contents.is_broken = false);
        assert!(add(&database, 2, None).is_err());
        drop(database);
        assert_eq!(rows(&disk.after_power_cut(0)), 1);
    }

    #[test]
    fn nothing_is_flushed_without_what_comes_first() {
        let disk = Disk::default();
        let first = || Err(io::Error::other("broken"));
        let (file, flushes) = Deferring::new(disk.clone(), first).unwrap();
        let database = Database::builder().create_with_backend(file).unwrap();
        add(&database, 0, None).unwrap();
        add(&database, 1, Some(&flushes)).unwrap();
        drop(flushes.settled().unwrap());
        flushes.also_first();
        add(&database, 2, Some(&flushes)).unwrap();
        assert!(add(&database, 3, None).is_err());
        assert_eq!(rows(&disk.after_power_cut(0)), 2);
    }
}
