//! containerd's snapshotter `godwit`: layers and containers' root file systems over overlayfs.
//!
//! containerd names file trees and we keep them. A snapshot is one of three kinds:
//!
//! ```text
//! prepare(key, parent) --> Active --commit(name)--> Committed   (a parent; never changes again)
//! view(key, parent) -----> View                                 (read-only)
//! ```
//!
//! Each has a number, which is never used twice, and a directory of that number: `fs/<number>/fs`
//! holds what it adds to its parents, `fs/<number>/work` is overlayfs's own. Directories are made
//! in advance ([`spare`]). The names, the kinds and the chain are in a database ([`metadata`]).
//! What is mounted ([`Snapshotter::mounts`]) is either a bind mount, where there is one tree only,
//! or an overlay of the whole chain; containerd mounts it, we never do.
//!
//! Promises: what the database names has a directory, whenever the machine stops; a committed layer
//! is on disk before the database calls it committed, and that before containerd gets the answer;
//! what else was answered survives the daemon's death, and a power cut unless it was the last
//! change, which is on its way to the disk then; nothing is deleted that the database on disk
//! names; two daemons never work on one state; a damaged database is an error that leaves
//! everything as it is. On open, in this order:
//!
//! 1. take the lock, or fail;
//! 2. open the database and check it, or fail;
//! 3. delete what the database does not name under `fs/`: prepares and removals that did not
//!    finish, and what was made in advance;
//! 4. make again what the directories of active snapshots lack: prepares that the file system had
//!    not written yet.
//!
//! Read next: `api::snapshots` for the gRPC side, [`filter`] for how containerd asks for some of
//! all snapshots. Source: containerd's `core/snapshots/snapshotter.go` (the contract) and its
//! overlayfs snapshotter (the mounts).

mod error;
mod filter;
mod lost;
mod metadata;
mod mounts;
mod spare;
#[cfg(test)]
pub(crate) mod tests;
mod tree;
mod usage;
mod writeback;

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, lchown};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use containerd_client::types::Mount;
use serde::{Deserialize, Serialize};

pub use error::{OpenError, SnapshotError};
pub use filter::FilterError;
use filter::Filters;
use metadata::{Chain, Change, Metadata, Row};
use mounts::overlay_options;
use spare::Spares;
use tree::{WORK_MODE, discard, make_dir, measure, tree_names, tree_number, write_out};
pub use usage::Usage;
use writeback::Writeback;

use godwit_disk::leftovers::Leftovers;
use godwit_disk::step;

/// Longest key or name, in bytes. containerd's own are an image's chain ID or a container's id with
/// a short prefix.
pub const KEY_BYTES_MAX: usize = 4096;

/// Longest label, key and value together, in bytes: containerd's own limit.
pub const LABEL_BYTES_MAX: usize = 4096;

/// Owner and group of a new root directory.
const ROOT: (u32, u32) = (0, 0);

/// Labels of a snapshot for a container with a user namespace.
pub(crate) const MAPPINGS: [&str; 2] =
    ["containerd.io/snapshot/uidmapping", "containerd.io/snapshot/gidmapping"];

/// Where directories are made in advance, under `fs/`.
const SPARES: &str = ".spare";

/// How long opening waits for the lock: a daemon that was killed while it flushed has it until the
/// disk has answered.
const LOCK_WAIT: Duration = Duration::from_secs(3);

/// What a snapshot is to containerd.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Read-only, of a committed one.
    View,
    /// Writable, of a committed one or of nothing.
    Active,
    /// Immutable, and the only kind that can be a parent.
    Committed,
}

/// A snapshot as containerd sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    /// Key of a view or an active snapshot, name of a committed one.
    pub name: String,
    /// Name of the committed snapshot that this one continues.
    pub parent: Option<String>,
    /// What it is.
    pub kind: Kind,
    /// containerd's labels, as given; a label with an empty value is no label.
    pub labels: BTreeMap<String, String>,
    /// When it was prepared, or committed.
    pub created: SystemTime,
    /// When it was created or its labels last changed.
    pub updated: SystemTime,
}

/// The snapshots of one node. All methods block on the disk; none holds a lock while it measures or
/// deletes a tree.
#[derive(Debug)]
pub struct Snapshotter {
    metadata: Metadata,
    /// Absolute path of `fs/`.
    trees: PathBuf,
    spares: Spares,
    writeback: Writeback,
    /// Smallest number whose directory has not been touched yet, also by prepares that failed.
    number_floor: AtomicU64,
    /// overlayfs options that every overlay gets.
    overlay_options: Vec<String>,
    leftovers: Leftovers,
    /// Released when the file is closed.
    _lock: File,
}

impl Snapshotter {
    /// Opens the snapshots in `dir`, which is made if it is not there; see the rules above.
    ///
    /// Errors: [`OpenError`]; in every case what snapshots have is as it was.
    pub fn open(dir: &Path) -> Result<Self, OpenError> {
        let io_error = |source| OpenError::Io { path: dir.to_owned(), source };
        let trees = dir.join("fs");
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&trees).map_err(io_error)?;
        let trees = fs::canonicalize(&trees).map_err(io_error)?;
        if trees.to_str().is_none_or(|path| path.contains([':', ',', '\\'])) {
            return Err(OpenError::Path(trees));
        }
        let lock = File::create(dir.join("lock")).map_err(io_error)?;
        match take(&lock) {
            Ok(()) => (),
            Err(TryLockError::WouldBlock) => return Err(OpenError::Locked(dir.to_owned())),
            Err(TryLockError::Error(error)) => return Err(io_error(error)),
        }
        let found = tree_names(&trees).map_err(io_error)?;
        let highest = found.iter().filter_map(|name| tree_number(name)).max();
        let metadata = Metadata::open(&metadata::path_in(dir), &trees, highest.is_none())?;
        let spares = Spares::open(trees.join(SPARES)).map_err(io_error)?;
        let snapshots = Self {
            metadata,
            trees,
            spares,
            writeback: Writeback::default(),
            number_floor: AtomicU64::new(highest.map_or(1, |number| number + 1)),
            overlay_options: overlay_options(),
            leftovers: Leftovers::default(),
            _lock: lock,
        };
        snapshots.cleanup().map_err(OpenError::Unreadable)?;
        snapshots.make_missing_trees().map_err(OpenError::Unreadable)?;
        Ok(snapshots)
    }

    /// Why no snapshot can be added, removed or changed until the daemon starts again.
    pub fn failure(&self) -> Option<String> {
        self.metadata.failure()
    }

    /// Makes a writable snapshot of `parent`, or of nothing, and says what to mount.
    ///
    /// Errors: [`SnapshotError::AlreadyExists`], [`SnapshotError::ParentMissing`],
    /// [`SnapshotError::ParentNotCommitted`], [`SnapshotError::Key`], [`SnapshotError::Label`], and
    /// the disk's.
    pub fn prepare(
        &self,
        key: &str,
        parent: Option<&str>,
        labels: BTreeMap<String, String>,
    ) -> Result<Vec<Mount>, SnapshotError> {
        self.add(Kind::Active, key, parent, labels)
    }

    /// Makes a read-only snapshot of `parent`, or of nothing, and says what to mount. Errors: as
    /// for `prepare`.
    pub fn view(
        &self,
        key: &str,
        parent: Option<&str>,
        labels: BTreeMap<String, String>,
    ) -> Result<Vec<Mount>, SnapshotError> {
        self.add(Kind::View, key, parent, labels)
    }

    /// 1. rename a spare directory to `<number>`, 2. commit the database. All inside one change, so
    ///    that `cleanup` cannot see it half done.
    ///
    /// On open: without step 2 the database does not name the directory, and it is deleted. What is
    /// renamed is on disk, and its name is flushed before the database; if a stopped machine had
    /// written the database only, the directory is made again, since nothing in it can have been
    /// synced.
    fn add(
        &self,
        kind: Kind,
        key: &str,
        parent: Option<&str>,
        labels: BTreeMap<String, String>,
    ) -> Result<Vec<Mount>, SnapshotError> {
        check_key(key)?;
        let labels = checked(labels)?;
        self.metadata.ensure_room().map_err(|source| SnapshotError::Io {
            what: "keep room in",
            path: self.trees.clone(),
            source,
        })?;
        let change = self.metadata.begin()?;
        let floor = self.number_floor.load(Ordering::Relaxed);
        let chain = change.add(kind, key, parent, labels, floor)?;
        let number = chain.row.number;
        // Only one change at a time comes here, so this does not race with the load above.
        self.number_floor.store(number + 1, Ordering::Relaxed);
        step::reach("add 1");
        let made = self.place_tree(&chain);
        step::reach("add 2");
        // Before anybody can commit or remove it.
        if kind == Kind::Active && Writeback::is_for(key) {
            self.writeback.follow(number, self.upper(number));
        }
        if let Err(error) = made.and_then(|()| change.commit()) {
            self.writeback.leave(number);
            discard(&self.tree(number));
            return Err(error);
        }
        Ok(self.mounts_of(&chain))
    }

    /// Gives a snapshot its directory, whose name is not on disk yet. If that fails, it has none.
    fn place_tree(&self, chain: &Chain) -> Result<(), SnapshotError> {
        let (tree, upper) = (self.tree(chain.row.number), self.upper(chain.row.number));
        let failed = |what, path: &Path| {
            let path = path.to_owned();
            move |source| SnapshotError::Io { what, path, source }
        };
        // The owner of "/" is not root where the container has a user namespace.
        let owner = match (mapped_root(&chain.row.labels)?, chain.parents.first()) {
            (Some(owner), _) => owner,
            (None, Some(parent)) => {
                let parent = self.upper(*parent);
                let found = fs::metadata(&parent).map_err(failed("look at", &parent))?;
                (found.uid(), found.gid())
            }
            (None, None) => ROOT,
        };
        self.spares.take(&tree).map_err(failed("make", &tree))?;
        if owner != ROOT {
            let owned = lchown(&upper, Some(owner.0), Some(owner.1))
                .and_then(|()| File::open(&upper)?.sync_all())
                .map_err(failed("own", &upper));
            owned.inspect_err(|_| discard(&tree))?;
        }
        Ok(())
    }

    /// Makes the active snapshot `key` the committed one `name`, with these labels and no others.
    ///
    /// 1. write its files out, if it is not as it was made, and measure it, 2. commit the database.
    ///
    /// On open: without step 2 it is still active.
    ///
    /// Caller: nothing writes to it any more. Errors: [`SnapshotError::NotFound`],
    /// [`SnapshotError::NotActive`], [`SnapshotError::AlreadyExists`] for `name`,
    /// [`SnapshotError::Key`], [`SnapshotError::Label`], and the disk's.
    pub fn commit(
        &self,
        name: &str,
        key: &str,
        labels: BTreeMap<String, String>,
    ) -> Result<(), SnapshotError> {
        check_key(name)?;
        let labels = checked(labels)?;
        let row = self.metadata.get(key)?;
        let usage = if row.kind == Kind::Active {
            self.writeback.leave(row.number);
            step::reach("commit 1");
            // Otherwise a power cut leaves a layer of empty files that is never unpacked again.
            write_out(&self.upper(row.number), row.created)?
        } else {
            Usage::default()
        };
        let change = self.metadata.begin()?;
        change.commit_active(name, (key, row.number), labels, usage)?;
        step::reach("commit 2");
        // containerd never unpacks again what it was told is there.
        change.commit_to_disk()
    }

    /// What to mount to see the view or active snapshot `key`.
    ///
    /// Errors: [`SnapshotError::NotFound`]; [`SnapshotError::NotMountable`] for a committed one.
    pub fn mounts(&self, key: &str) -> Result<Vec<Mount>, SnapshotError> {
        let chain = self.metadata.chain(key)?;
        if chain.row.kind == Kind::Committed {
            return Err(SnapshotError::NotMountable(key.to_owned()));
        }
        Ok(self.mounts_of(&chain))
    }

    /// Errors: [`SnapshotError::NotFound`].
    pub fn stat(&self, key: &str) -> Result<Info, SnapshotError> {
        Ok(self.metadata.get(key)?.into_info(key))
    }

    /// Replaces the fields of `key` that `fields` names by those of `labels`: `labels` is all of
    /// them, `labels.KEY` one; no field at all is all labels.
    ///
    /// Errors: [`SnapshotError::NotFound`]; [`SnapshotError::Immutable`] for another field;
    /// [`SnapshotError::Label`].
    pub fn update(
        &self,
        key: &str,
        labels: BTreeMap<String, String>,
        fields: &[String],
    ) -> Result<Info, SnapshotError> {
        let labels = checked(labels)?;
        let of_labels = |field: &&String| *field == "labels" || field.starts_with("labels.");
        let change = self.metadata.begin()?;
        let row = change.relabel(key, |current| {
            if fields.is_empty() {
                current.clone_from(&labels);
            }
            for field in fields.iter().filter(of_labels) {
                match field.strip_prefix("labels.") {
                    None => current.clone_from(&labels),
                    Some(one) => match labels.get(one) {
                        Some(value) => drop(current.insert(one.to_owned(), value.clone())),
                        None => drop(current.remove(one)),
                    },
                }
            }
        })?;
        if let Some(field) = fields.iter().find(|field| !of_labels(field)) {
            return Err(SnapshotError::Immutable { key: key.to_owned(), field: field.clone() });
        }
        change.commit()?;
        Ok(row.into_info(key))
    }

    /// What `key` takes on disk, without its parents: of an active one now, of a committed one when
    /// it was committed, of a view nothing. Errors: [`SnapshotError::NotFound`], and the disk's.
    pub fn usage(&self, key: &str) -> Result<Usage, SnapshotError> {
        let row = self.metadata.get(key)?;
        if row.kind == Kind::Active { measure(&self.upper(row.number)) } else { Ok(row.usage) }
    }

    /// Removes `key`: it is gone when this returns; its directory goes at the next `cleanup`, which
    /// containerd asks for once it has removed what it had to.
    ///
    /// 1. commit the database without it. On open: the directory is deleted.
    ///
    /// Errors: [`SnapshotError::NotFound`]; [`SnapshotError::HasChildren`].
    pub fn remove(&self, key: &str) -> Result<(), SnapshotError> {
        let change = self.metadata.begin()?;
        let number = change.remove(key)?;
        step::reach("remove 1");
        change.commit()?;
        self.writeback.leave(number);
        Ok(())
    }

    /// All snapshots that any of `filters` matches, or all, in the order of names.
    ///
    /// Errors: [`SnapshotError::Filter`].
    pub fn list(&self, filters: &[String]) -> Result<Vec<Info>, SnapshotError> {
        let filters = Filters::parse(filters)?;
        let infos = self.metadata.all()?.into_iter().map(|(name, row)| row.into_info(&name));
        Ok(infos.filter(|info| filters.matches(info)).collect())
    }

    /// Deletes the directories that the database does not name. What cannot be deleted is left and
    /// reported; its number is not used again.
    ///
    /// 1. find them, 2. commit the database, so that no removal can be undone, 3. delete one after
    ///    the other.
    ///
    /// On open: all of it is done again.
    pub fn cleanup(&self) -> Result<(), SnapshotError> {
        // Inside a change no snapshot is half added; after it, numbers are not used again.
        let change = self.metadata.begin()?;
        let orphans = self.orphans(&change)?;
        step::reach("cleanup 2");
        if !orphans.is_empty() {
            change.commit_to_disk()?;
        }
        for orphan in orphans {
            step::reach("cleanup 3");
            self.leftovers.remove(&orphan);
        }
        Ok(())
    }

    /// How many snapshots there are, and what is wrong with them, each in words that say what to
    /// do. Changes nothing.
    pub fn check(&self) -> Result<(u64, Vec<String>), SnapshotError> {
        // Inside a change no snapshot is half added.
        let change = self.metadata.begin()?;
        let (rows, mut found) = change.contradictions()?;
        for row in rows.values() {
            let Some(missing) = self.missing_of(row) else { continue };
            let advice = match row.kind {
                _ if missing.ends_with("work") => "`godwit check --repair` recreates it",
                Kind::View | Kind::Active => "remove the container that uses it",
                Kind::Committed => {
                    "`godwit check --repair` unpacks its layer again, if the daemon runs and the layer can be \
                     had; else remove the containers and images that use it, and pull again"
                }
            };
            let missing = missing.display();
            found.push(format!("directory {missing} of a snapshot is missing: {advice}"));
        }
        found.extend(self.leftovers.reasons());
        Ok((rows.len() as u64, found))
    }

    /// Directories that could not be deleted so far.
    pub fn leftovers(&self) -> &Leftovers {
        &self.leftovers
    }

    /// What a snapshot's directory lacks.
    fn missing_of(&self, row: &Row) -> Option<PathBuf> {
        let work = (row.kind == Kind::Active).then(|| self.tree(row.number).join("work"));
        let needed = [Some(self.upper(row.number)), work];
        needed.into_iter().flatten().find(|path| !path.is_dir())
    }

    /// Mends of [`Self::check`] what can be mended without losing anything.
    pub fn mend(&self) -> Result<(), SnapshotError> {
        let change = self.metadata.begin()?;
        change.relink()?;
        let (rows, _) = change.contradictions()?;
        for work in rows.values().filter_map(|row| self.missing_of(row)) {
            // An empty `fs` in place of one that is gone would hide that it is lost.
            if work.ends_with("work") {
                self.make_work(&work)?;
            }
        }
        change.commit_to_disk()?;
        self.cleanup()
    }

    /// Whether a prepare, a removal or another small change would wait: for a change that is under
    /// way, or for the disk.
    pub(crate) fn is_busy(&self) -> bool {
        self.metadata.is_busy() || self.spares.is_empty()
    }

    fn orphans(&self, change: &Change) -> Result<Vec<PathBuf>, SnapshotError> {
        let named: HashSet<u64> = change.numbers()?.into_iter().collect();
        let found = tree_names(&self.trees).map_err(|source| SnapshotError::Io {
            what: "list",
            path: self.trees.clone(),
            source,
        })?;
        // Not ours unless it is a number: an administrator may have put something here.
        let is_orphan = |name: &String| tree_number(name).is_some_and(|one| !named.contains(&one));
        Ok(found.into_iter().filter(is_orphan).map(|name| self.trees.join(name)).collect())
    }

    /// That of a committed snapshot cannot be made again: its layer is lost, and with it the owner
    /// of what lies directly above. What cannot be made is reported, and does not keep the others
    /// from being served.
    fn make_missing_trees(&self) -> Result<(), SnapshotError> {
        let mut has_placed = false;
        for (name, row) in self.metadata.all()? {
            let Some(missing) = self.missing_of(&row) else { continue };
            let (path, kind) = (missing.display(), row.kind);
            tracing::warn!(snapshot = name, ?kind, %path, "a snapshot's directory is missing");
            // What is there and no directory, or cannot be looked at, was not lost by a power cut.
            let looked = fs::symlink_metadata(&missing).map_err(|error| error.kind());
            if kind == Kind::Committed || looked.err() != Some(io::ErrorKind::NotFound) {
                continue;
            }
            let made = if missing.ends_with("work") {
                // Where there is `fs`, it may hold a container's files.
                self.make_work(&missing)
            } else {
                discard(&self.tree(row.number));
                let chain = self.metadata.chain(&name);
                let placed = chain.and_then(|chain| self.place_tree(&chain));
                placed.inspect(|()| has_placed = true)
            };
            if let Err(error) = made {
                tracing::warn!(snapshot = name, %path, %error, "cannot recreate it");
            }
        }
        // The database names them already.
        let renamed = [self.trees.clone(), self.trees.join(SPARES)];
        renamed.into_iter().filter(|_| has_placed).try_for_each(|path| {
            let synced = File::open(&path).and_then(|directory| directory.sync_all());
            synced.map_err(|source| SnapshotError::Io { what: "sync", path, source })
        })
    }

    fn make_work(&self, work: &Path) -> Result<(), SnapshotError> {
        let failed = |source| SnapshotError::Io { what: "make", path: work.to_owned(), source };
        match make_dir(work, WORK_MODE) {
            // Something else is in its place.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            made => made.map_err(failed),
        }
    }

    fn tree(&self, number: u64) -> PathBuf {
        self.trees.join(number.to_string())
    }

    fn upper(&self, number: u64) -> PathBuf {
        self.tree(number).join("fs")
    }
}

/// Owner and group that labels of an id mapping give the root of the container.
///
/// The labels are those by which containerd's client asks for it: `CONTAINER:HOST:SIZE`, or several
/// of them parted by commas, as user_namespaces(7) has them. Errors: [`SnapshotError::IdMapping`]
/// if one cannot be read, maps no root, or stands alone.
fn mapped_root(labels: &BTreeMap<String, String>) -> Result<Option<(u32, u32)>, SnapshotError> {
    let [Some(uids), Some(gids)] = MAPPINGS.map(|key| labels.get(key)) else {
        let alone = MAPPINGS.iter().find_map(|key| labels.get(*key));
        return alone.map_or(Ok(None), |one| Err(SnapshotError::IdMapping(one.clone())));
    };
    let root_of = |text: &String| {
        let ranges = text.split(',').map(|range| {
            let numbers = range.split(':').map(|number| number.parse().ok());
            match numbers.collect::<Option<Vec<u32>>>()?.as_slice() {
                [container, host, size] if *size > 0 => Some((*container, *host)),
                _ => None,
            }
        });
        let ranges: Option<Vec<_>> = ranges.collect();
        let root = ranges.and_then(|ranges| ranges.into_iter().find(|(inside, _)| *inside == 0));
        root.map(|(_, host)| host).ok_or_else(|| SnapshotError::IdMapping(text.clone()))
    };
    Ok(Some((root_of(uids)?, root_of(gids)?)))
}

fn take(lock: &File) -> Result<(), TryLockError> {
    let begun = Instant::now();
    loop {
        match lock.try_lock() {
            Err(TryLockError::WouldBlock) if begun.elapsed() < LOCK_WAIT => {
                std::thread::sleep(LOCK_WAIT / 50);
            }
            done => return done,
        }
    }
}

fn check_key(key: &str) -> Result<(), SnapshotError> {
    if (1..=KEY_BYTES_MAX).contains(&key.len()) {
        Ok(())
    } else {
        Err(SnapshotError::Key(key.len()))
    }
}

fn checked(
    mut labels: BTreeMap<String, String>,
) -> Result<BTreeMap<String, String>, SnapshotError> {
    for (key, value) in &labels {
        if key.len() + value.len() > LABEL_BYTES_MAX {
            return Err(SnapshotError::Label { key: key.chars().take(120).collect() });
        }
    }
    labels.retain(|_, value| !value.is_empty());
    Ok(labels)
}
