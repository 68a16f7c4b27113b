//! Embedded databases (redb, one file each) that are there whole or not at all.

mod deferred;
mod gate;
mod healing;
mod room;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use redb::{Builder, Database};

use crate::step::reach;
use deferred::Deferring;
pub use deferred::Flushes;
pub use gate::Failure;
use gate::Gate;
pub use healing::Healing;
pub use room::Room;
use room::Roomy;

/// What a disk must take before a database that failed on it is opened again, in bytes.
pub const PROBE_BYTES: usize = 1 << 20;

/// Opens the database at `path`, or makes one in which there is what `fill` puts there.
///
/// Every page is compared with its checksum first, since redb trusts what it reads later: a changed
/// bit would be another owner, or a panic. An index of a million objects (100 MB) takes 0.2 s.
///
/// Making: 1. write `<path>.new`, 2. rename it to `path`, 3. fsync the directory. On open: a
/// `<path>.new` was never used and is removed.
///
/// Caller: looks first where a missing database must not be taken for a new one. Errors:
/// redb's, and the system's; also for an empty file, which redb would take for a new database. What
/// is there is left as it is.
fn open(
    path: &Path,
    mut builder: Builder,
    fill: impl FnOnce(&Database) -> Result<(), redb::Error>,
) -> Result<Opened, redb::Error> {
    builder.set_check_integrity_on_open(true);
    let (file, room) = Roomy::new(made(path, &builder, fill)?)?;
    let (file, failure) = Gate::new(file);
    Ok(Opened { database: builder.create_with_backend(file)?, room, failure })
}

/// A database that is open, room for its file, and whether it has failed.
struct Opened {
    database: Database,
    room: Room,
    failure: Failure,
}

/// The same for a database whose commits need not wait for the disk; what they name in `directory`
/// is flushed before them, and after it that it is no longer in `source`, which may be missing.
/// Caller: no other process has it open, and nothing is added without [`Room::ensure`].
pub fn open_deferring(
    path: &Path,
    directory: &Path,
    source: PathBuf,
    mut builder: Builder,
    fill: impl FnOnce(&Database) -> Result<(), redb::Error>,
) -> Result<Deferred, redb::Error> {
    builder.set_check_integrity_on_open(true);
    let (file, room) = Roomy::new(made(path, &builder, fill)?)?;
    let directory = File::open(directory)?;
    let first = move || {
        directory.sync_all()?;
        match File::open(&source) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            opened => opened?.sync_all(),
        }
    };
    // A process that was killed may not have come to it.
    first()?;
    let (file, flushes) = Deferring::new(file, first)?;
    let (file, failure) = Gate::new(file);
    Ok(Deferred { database: builder.create_with_backend(file)?, flushes, room, failure })
}

/// A database whose commits need not wait for the disk.
#[derive(Debug)]
pub struct Deferred {
    /// The database.
    pub database: Database,
    /// Which of its flushes are left to a thread.
    pub flushes: Flushes,
    /// Room for its file.
    pub room: Room,
    /// Whether it has failed. Then nothing can be changed until the process ends.
    pub failure: Failure,
}

impl Deferred {
    /// Why nothing can be changed any more.
    pub fn failed(&self) -> Option<String> {
        let flush =
            || self.flushes.failure().map(|kind| format!("a change was not written: {kind}"));
        self.failure.reason().or_else(flush)
    }
}

/// Whether the disk of `directory` takes a file of [`PROBE_BYTES`] to its end. Errors: why not.
pub fn probe(directory: &Path) -> io::Result<()> {
    let path = directory.join(".probe");
    let written = File::create(&path).and_then(|mut file| {
        file.write_all(&vec![0xa5; PROBE_BYTES])?;
        file.sync_all()
    });
    let removed = fs::remove_file(&path);
    written.and(removed)
}

/// The file of the database at `path`, which is made if there is none.
fn made(
    path: &Path,
    builder: &Builder,
    fill: impl FnOnce(&Database) -> Result<(), redb::Error>,
) -> Result<File, redb::Error> {
    let new = path.with_extension("redb.new");
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    if !fs::exists(path)? {
        reach("create 1");
        let made = builder.create(&new)?;
        fill(&made)?;
        drop(made);
        reach("create 2");
        fs::rename(&new, path)?;
        reach("create 3");
        if let Some(directory) = path.parent() {
            File::open(directory)?.sync_all()?;
        }
    } else if fs::metadata(path)?.len() == 0 {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file is empty").into());
    }
    Ok(OpenOptions::new().read(true).write(true).open(path)?)
}

#[cfg(test)]
mod tests {
    use redb::{ReadableDatabase as _, ReadableTable as _, TableDefinition};

    use super::*;
    use crate::step::stop_before;

    const TABLE: TableDefinition<'_, u64, u64> = TableDefinition::new("table");
    const ROWS: u64 = 1000;

    fn fill(database: &Database) -> Result<(), redb::Error> {
        let write = database.begin_write()?;
        for row in 0..ROWS {
            write.open_table(TABLE)?.insert(row, row)?;
        }
        Ok(write.commit()?)
    }

    fn rows(database: &Database) -> Result<u64, redb::Error> {
        let table = database.begin_read()?.open_table(TABLE)?;
        let whole = table.iter()?.map(|row| row.map(|(key, value)| key.value() == value.value()));
        Ok(whole.collect::<Result<Vec<_>, _>>()?.into_iter().filter(|is_whole| *is_whole).count()
            as u64)
    }

    #[test]
    fn making_one_may_stop_anywhere() {
        for step in ["create 1", "create 2", "create 3"] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("one.redb");
            stop_before(step, || open(&path, Database::builder(), fill));
            assert_eq!(path.exists(), step == "create 3");
            let database = open(&path, Database::builder(), fill).unwrap().database;
            assert_eq!(rows(&database).unwrap(), ROWS, "{step}");
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "{step}");
        }
    }

    /// Method: a file of a process that was killed while redb made it, as redb leaves it under its
    /// own name.
    #[test]
    fn one_that_was_half_made_is_made_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("one.redb");
        fs::write(path.with_extension("redb.new"), [0; 4096]).unwrap();
        assert_eq!(rows(&open(&path, Database::builder(), fill).unwrap().database).unwrap(), ROWS);
    }

    /// Method: cut anywhere, empty, overwritten at its beginning, and one bit of a row.
    #[test]
    fn a_damaged_one_is_an_error_and_left_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("one.redb");
        drop(open(&path, Database::builder(), fill).unwrap());
        let good = fs::read(&path).unwrap();
        let mut noise = good.clone();
        noise[..64].fill(0xa5);
        let mut flipped = good.clone();
        let row = (ROWS / 2).to_le_bytes();
        let places = good.windows(8).enumerate().filter(|(_, some)| *some == row);
        places.for_each(|(at, _)| flipped[at] ^= 1);
        assert!(flipped != good);
        let cuts = (0..good.len()).step_by(2999).map(|at| &good[..at]);
        for damaged in cuts.chain([noise.as_slice(), flipped.as_slice()]) {
            fs::write(&path, damaged).unwrap();
            let opened = open(&path, Database::builder(), fill);
            assert!(opened.is_err(), "{} of {} bytes were enough", damaged.len(), good.len());
            assert!(fs::read(&path).unwrap() == damaged, "{} bytes were changed", damaged.len());
        }
        fs::write(&path, good).unwrap();
        assert_eq!(rows(&open(&path, Database::builder(), fill).unwrap().database).unwrap(), ROWS);
    }
}
