//! What is known of each snapshot, in an embedded database (redb, one file).
//!
//! | table | key | value |
//! |---|---|---|
//! | `meta` | `format`, `next_number` | a number |
//! | `snapshots` | the snapshot's key or name | [`Row`] as JSON |
//! | `children` | parent's name, child's key or name | nothing |
//!
//! All writing goes through one [`Change`] at a time: redb has one writer, and a second waits. A
//! change that is dropped leaves no trace; one that is committed waits for the one before to be on
//! disk, not for itself. The rules of containerd's contract that concern metadata alone (what may
//! be a parent, what may be removed) are checked here, inside the change.
//!
//! It is made whole or not at all ([`godwit_disk::database`]). On open: a damaged one, one of
//! another format, and a missing one beside snapshots that exist are errors and nothing is touched:
//! the directories hold containers' data.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::SystemTime;

use redb::{
    Database, ReadableDatabase as _, ReadableTable as _, TableDefinition, WriteTransaction,
};
use serde::{Deserialize, Serialize};

use super::{Info, Kind, OpenError, SPARES, SnapshotError, Usage};
use godwit_disk::database::{self, Deferred, Flushes};

const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
const SNAPSHOTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("snapshots");
const CHILDREN: TableDefinition<'_, (&str, &str), ()> = TableDefinition::new("children");

/// History: 1, the first.
const FORMAT: u64 = 1;

/// What is stored of a snapshot. The name is the key of the table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Row {
    /// Name of its directory. A parent's is smaller than its children's.
    pub(super) number: u64,
    pub(super) kind: Kind,
    pub(super) parent: Option<String>,
    pub(super) labels: BTreeMap<String, String>,
    pub(super) created: SystemTime,
    pub(super) updated: SystemTime,
    /// Zero until it is committed.
    pub(super) usage: Usage,
}

impl Row {
    pub(super) fn into_info(self, name: &str) -> Info {
        let Self { kind, parent, labels, created, updated, .. } = self;
        Info { name: name.to_owned(), parent, kind, labels, created, updated }
    }
}

/// A snapshot together with where its parents are.
#[derive(Debug)]
pub(super) struct Chain {
    pub(super) row: Row,
    /// Numbers of the parents, nearest first.
    pub(super) parents: Vec<u64>,
}

#[derive(Debug)]
pub(super) struct Metadata {
    db: Deferred,
    /// Changes that are under way or wait for their turn.
    changes: AtomicUsize,
}

/// One write transaction.
pub(super) struct Change<'a> {
    txn: WriteTransaction,
    flushes: &'a Flushes,
    /// Something was added, whose tree is to have its name on disk before.
    has_tree: Cell<bool>,
    _counted: Counted<'a>,
}

/// One more, as long as it lives.
struct Counted<'a>(&'a AtomicUsize);

impl<'a> Counted<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn failed(source: impl Into<redb::Error>) -> SnapshotError {
    SnapshotError::Database(Box::new(source.into()))
}

fn decode(name: &str, bytes: &[u8]) -> Result<Row, SnapshotError> {
    serde_json::from_slice(bytes).map_err(|source| SnapshotError::Damaged {
        key: name.to_owned(),
        reason: source.to_string(),
    })
}

impl Metadata {
    /// Opens the database of the snapshots whose directories are in `trees` at `path`, or makes one
    /// if `may_create`.
    pub(super) fn open(path: &Path, trees: &Path, may_create: bool) -> Result<Self, OpenError> {
        let io_error = |source| OpenError::Io { path: path.to_owned(), source };
        if !may_create && !fs::exists(path).map_err(io_error)? {
            return Err(OpenError::MetadataMissing(path.to_owned()));
        }
        // Without a journal a renamed directory may be on disk under both names, and the old one is
        // deleted on open.
        let spares = trees.join(SPARES);
        let opened = database::open_deferring(path, trees, spares, Database::builder(), Self::fill);
        let db = opened.map_err(|error| Self::damaged(path, error))?;
        let found = Self::format(&db.database).map_err(|error| Self::damaged(path, error))?;
        if found != FORMAT {
            return Err(OpenError::Format { path: path.to_owned(), found, known: FORMAT });
        }
        Ok(Self { db, changes: AtomicUsize::new(0) })
    }

    fn damaged(path: &Path, source: redb::Error) -> OpenError {
        OpenError::Database { path: path.to_owned(), source: Box::new(source) }
    }

    fn fill(db: &Database) -> Result<(), redb::Error> {
        let txn = db.begin_write()?;
        txn.open_table(META)?.insert("format", FORMAT)?;
        txn.open_table(META)?.insert("next_number", 1)?;
        txn.open_table(SNAPSHOTS)?;
        txn.open_table(CHILDREN)?;
        Ok(txn.commit()?)
    }

    fn format(db: &Database) -> Result<u64, redb::Error> {
        let meta = db.begin_read()?.open_table(META)?;
        Ok(meta.get("format")?.map_or(0, |found| found.value()))
    }

    /// Makes sure that a snapshot can be added. Errors: the disk's, before it could do harm.
    pub(super) fn ensure_room(&self) -> std::io::Result<()> {
        self.db.room.ensure()
    }

    /// Why nothing can be changed until the database is opened again, which takes a new process:
    /// containerd may have been answered with changes that are lost.
    pub(super) fn failure(&self) -> Option<String> {
        self.db.failed()
    }

    /// Waits for the change before, if there is one.
    pub(super) fn begin(&self) -> Result<Change<'_>, SnapshotError> {
        let counted = Counted::new(&self.changes);
        let txn = self.db.database.begin_write().map_err(failed)?;
        Ok(Change { txn, flushes: &self.db.flushes, has_tree: Cell::new(false), _counted: counted })
    }

    /// Whether a change would wait for another one, or for the disk to have the last.
    pub(super) fn is_busy(&self) -> bool {
        self.changes.load(Ordering::Relaxed) > 0 || self.db.flushes.is_due()
    }

    /// Errors: [`SnapshotError::NotFound`].
    pub(super) fn get(&self, key: &str) -> Result<Row, SnapshotError> {
        let txn = self.db.database.begin_read().map_err(failed)?;
        let table = txn.open_table(SNAPSHOTS).map_err(failed)?;
        let found = table.get(key).map_err(failed)?;
        decode(key, found.ok_or_else(|| SnapshotError::NotFound(key.to_owned()))?.value())
    }

    /// Errors: [`SnapshotError::NotFound`].
    pub(super) fn chain(&self, key: &str) -> Result<Chain, SnapshotError> {
        let txn = self.db.database.begin_read().map_err(failed)?;
        chain_in(&txn.open_table(SNAPSHOTS).map_err(failed)?, key)
    }

    /// Every snapshot with its name, as of one moment, in the order of names.
    pub(super) fn all(&self) -> Result<Vec<(String, Row)>, SnapshotError> {
        let txn = self.db.database.begin_read().map_err(failed)?;
        let table = txn.open_table(SNAPSHOTS).map_err(failed)?;
        let mut all = Vec::new();
        for entry in table.iter().map_err(failed)? {
            let (name, row) = entry.map_err(failed)?;
            all.push((name.value().to_owned(), decode(name.value(), row.value())?));
        }
        Ok(all)
    }
}

fn chain_in(
    table: &impl redb::ReadableTable<&'static str, &'static [u8]>,
    key: &str,
) -> Result<Chain, SnapshotError> {
    let get = |name: &str| -> Result<Option<Row>, SnapshotError> {
        let found = table.get(name).map_err(failed)?;
        found.map(|bytes| decode(name, bytes.value())).transpose()
    };
    let row = get(key)?.ok_or_else(|| SnapshotError::NotFound(key.to_owned()))?;
    let (mut parents, mut below, mut next) = (Vec::new(), row.number, row.parent.clone());
    while let Some(name) = next {
        let damaged =
            |reason: &str| SnapshotError::Damaged { key: name.clone(), reason: reason.to_owned() };
        let parent = get(&name)?.ok_or_else(|| damaged("it has children but is not there"))?;
        // Numbers fall along the chain, so a damaged database cannot make this loop for ever.
        if parent.number >= below {
            return Err(damaged("it is younger than its child"));
        }
        below = parent.number;
        parents.push(parent.number);
        next = parent.parent;
    }
    Ok(Chain { row, parents })
}

/// Every parent with every child.
fn links(rows: &BTreeMap<String, Row>) -> BTreeSet<(String, String)> {
    rows.iter().filter_map(|(name, row)| Some((row.parent.clone()?, name.clone()))).collect()
}

impl Change<'_> {
    fn get(&self, key: &str) -> Result<Option<Row>, SnapshotError> {
        let table = self.txn.open_table(SNAPSHOTS).map_err(failed)?;
        let found = table.get(key).map_err(failed)?;
        found.map(|bytes| decode(key, bytes.value())).transpose()
    }

    fn put(&self, key: &str, row: &Row) -> Result<(), SnapshotError> {
        let bytes = serde_json::to_vec(row).map_err(|error| SnapshotError::Damaged {
            key: key.to_owned(),
            reason: error.to_string(),
        })?;
        let mut table = self.txn.open_table(SNAPSHOTS).map_err(failed)?;
        table.insert(key, bytes.as_slice()).map_err(failed)?;
        Ok(())
    }

    fn link(&self, parent: Option<&str>, child: &str) -> Result<(), SnapshotError> {
        let Some(parent) = parent else { return Ok(()) };
        let mut children = self.txn.open_table(CHILDREN).map_err(failed)?;
        children.insert((parent, child), ()).map_err(failed)?;
        Ok(())
    }

    /// Takes `key` out of both tables.
    fn forget(&self, key: &str, row: &Row) -> Result<(), SnapshotError> {
        let mut table = self.txn.open_table(SNAPSHOTS).map_err(failed)?;
        table.remove(key).map_err(failed)?;
        if let Some(parent) = row.parent.as_deref() {
            let mut children = self.txn.open_table(CHILDREN).map_err(failed)?;
            children.remove((parent, key)).map_err(failed)?;
        }
        Ok(())
    }

    fn has_children(&self, name: &str) -> Result<bool, SnapshotError> {
        let children = self.txn.open_table(CHILDREN).map_err(failed)?;
        let mut from_here = children.range((name, "")..).map_err(failed)?;
        let first = from_here.next().transpose().map_err(failed)?;
        Ok(first.is_some_and(|(key, _nothing)| key.value().0 == name))
    }

    /// Adds a view or an active snapshot and gives it a number, which is at least `number_floor`.
    ///
    /// Errors: [`SnapshotError::AlreadyExists`]; [`SnapshotError::ParentMissing`];
    /// [`SnapshotError::ParentNotCommitted`].
    pub(super) fn add(
        &self,
        kind: Kind,
        key: &str,
        parent: Option<&str>,
        labels: BTreeMap<String, String>,
        number_floor: u64,
    ) -> Result<Chain, SnapshotError> {
        if let Some(parent) = parent {
            match self.get(parent)? {
                None => return Err(SnapshotError::ParentMissing(parent.to_owned())),
                Some(row) if row.kind != Kind::Committed => {
                    return Err(SnapshotError::ParentNotCommitted(parent.to_owned()));
                }
                Some(_) => (),
            }
        }
        if self.get(key)?.is_some() {
            return Err(SnapshotError::AlreadyExists(key.to_owned()));
        }
        let number = {
            let mut meta = self.txn.open_table(META).map_err(failed)?;
            let next = meta.get("next_number").map_err(failed)?.map_or(1, |next| next.value());
            let number = next.max(number_floor);
            meta.insert("next_number", number + 1).map_err(failed)?;
            number
        };
        let now = SystemTime::now();
        let parent = parent.map(str::to_owned);
        let usage = Usage::default();
        let row = Row { number, kind, parent, labels, created: now, updated: now, usage };
        self.put(key, &row)?;
        self.link(row.parent.as_deref(), key)?;
        self.has_tree.set(true);
        let table = self.txn.open_table(SNAPSHOTS).map_err(failed)?;
        chain_in(&table, key)
    }

    /// Makes the active snapshot `key`, whose number is still `number`, the committed one `name`.
    ///
    /// Labels are replaced, not inherited; the time of creation is now. Errors:
    /// [`SnapshotError::AlreadyExists`] for `name`; [`SnapshotError::NotFound`];
    /// [`SnapshotError::NotActive`].
    pub(super) fn commit_active(
        &self,
        name: &str,
        (key, number): (&str, u64),
        labels: BTreeMap<String, String>,
        usage: Usage,
    ) -> Result<(), SnapshotError> {
        if self.get(name)?.is_some() {
            return Err(SnapshotError::AlreadyExists(name.to_owned()));
        }
        // Another number: it was removed and prepared again since its usage was measured.
        let row = self.get(key)?.filter(|row| row.number == number);
        let row = row.ok_or_else(|| SnapshotError::NotFound(key.to_owned()))?;
        if row.kind != Kind::Active {
            return Err(SnapshotError::NotActive { key: key.to_owned(), kind: row.kind });
        }
        self.forget(key, &row)?;
        let now = SystemTime::now();
        let row = Row { kind: Kind::Committed, labels, created: now, updated: now, usage, ..row };
        self.put(name, &row)?;
        self.link(row.parent.as_deref(), name)
    }

    /// Gives `key` the labels that `change` makes of its labels. Errors:
    /// [`SnapshotError::NotFound`].
    pub(super) fn relabel(
        &self,
        key: &str,
        change: impl FnOnce(&mut BTreeMap<String, String>),
    ) -> Result<Row, SnapshotError> {
        let mut row = self.get(key)?.ok_or_else(|| SnapshotError::NotFound(key.to_owned()))?;
        change(&mut row.labels);
        row.updated = SystemTime::now();
        self.put(key, &row)?;
        Ok(row)
    }

    /// Takes `key` out and returns its number. Errors: [`SnapshotError::NotFound`];
    /// [`SnapshotError::HasChildren`].
    pub(super) fn remove(&self, key: &str) -> Result<u64, SnapshotError> {
        let row = self.get(key)?.ok_or_else(|| SnapshotError::NotFound(key.to_owned()))?;
        if self.has_children(key)? {
            return Err(SnapshotError::HasChildren(key.to_owned()));
        }
        self.forget(key, &row)?;
        Ok(row.number)
    }

    /// The numbers of all snapshots, this change's included.
    pub(super) fn numbers(&self) -> Result<Vec<u64>, SnapshotError> {
        let table = self.txn.open_table(SNAPSHOTS).map_err(failed)?;
        let mut numbers = Vec::new();
        for entry in table.iter().map_err(failed)? {
            let (name, row) = entry.map_err(failed)?;
            numbers.push(decode(name.value(), row.value())?.number);
        }
        Ok(numbers)
    }

    /// Every row that can be read, and in what the tables contradict themselves, each in words.
    pub(super) fn contradictions(
        &self,
    ) -> Result<(BTreeMap<String, Row>, Vec<String>), SnapshotError> {
        let mut rows = BTreeMap::new();
        let table = self.txn.open_table(SNAPSHOTS).map_err(failed)?;
        let mut found = Vec::new();
        for entry in table.iter().map_err(failed)? {
            let (name, row) = entry.map_err(failed)?;
            match decode(name.value(), row.value()) {
                Ok(row) => drop(rows.insert(name.value().to_owned(), row)),
                Err(error) => found.push(error.to_string()),
            }
        }
        for (name, row) in &rows {
            let Some(parent) = &row.parent else { continue };
            match rows.get(parent) {
                Some(above) if above.kind == Kind::Committed && above.number < row.number => {}
                Some(_) => found.push(format!("snapshot {name:?} cannot have parent {parent:?}")),
                None => found.push(format!("snapshot {name:?} has lost its parent {parent:?}")),
            }
        }
        let children = self.txn.open_table(CHILDREN).map_err(failed)?;
        let mut linked = BTreeSet::new();
        for entry in children.iter().map_err(failed)? {
            let (key, _nothing) = entry.map_err(failed)?;
            let (parent, child) = key.value();
            linked.insert((parent.to_owned(), child.to_owned()));
        }
        if linked != links(&rows) {
            found.push("the table of children is not that of the snapshots".to_owned());
        }
        Ok((rows, found))
    }

    /// Makes the table of children again from the snapshots.
    pub(super) fn relink(&self) -> Result<(), SnapshotError> {
        let mut rows = BTreeMap::new();
        for entry in self.txn.open_table(SNAPSHOTS).map_err(failed)?.iter().map_err(failed)? {
            let (name, row) = entry.map_err(failed)?;
            rows.insert(name.value().to_owned(), decode(name.value(), row.value())?);
        }
        let mut children = self.txn.open_table(CHILDREN).map_err(failed)?;
        children.retain(|_, ()| false).map_err(failed)?;
        for (parent, child) in links(&rows) {
            children.insert((parent.as_str(), child.as_str()), ()).map_err(failed)?;
        }
        Ok(())
    }

    /// Everybody sees the change when this returns, and a kill does not undo it; to the disk it is
    /// on its way ([`Flushes`]). Caller: the trees of what was added have their names.
    pub(super) fn commit(self) -> Result<(), SnapshotError> {
        if self.has_tree.get() {
            self.flushes.also_first();
        }
        self.flushes.defer_next(true);
        self.txn.commit().map_err(failed)
    }

    /// The same, and it is on disk when this returns. Caller: has added none.
    pub(super) fn commit_to_disk(self) -> Result<(), SnapshotError> {
        self.flushes.defer_next(false);
        self.txn.commit().map_err(failed)
    }
}

/// Where the database of the snapshots in `dir` is.
pub(super) fn path_in(dir: &Path) -> PathBuf {
    dir.join("metadata.redb")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    /// The literal bytes of format 1: a daemon of tomorrow must read what this one wrote.
    #[test]
    fn a_row_of_format_1_is_this_text() {
        let text = concat!(
            r#"{"number":7,"kind":"committed","parent":"sha256:aa","labels":{"k":"v"},"#,
            r#""created":{"secs_since_epoch":1,"nanos_since_epoch":2},"#,
            r#""updated":{"secs_since_epoch":3,"nanos_since_epoch":0},"#,
            r#""usage":{"size_bytes":4096,"inodes":1}}"#
        );
        let row = Row {
            number: 7,
            kind: Kind::Committed,
            parent: Some("sha256:aa".to_owned()),
            labels: [("k".to_owned(), "v".to_owned())].into(),
            created: SystemTime::UNIX_EPOCH + Duration::new(1, 2),
            updated: SystemTime::UNIX_EPOCH + Duration::new(3, 0),
            usage: Usage { size_bytes: 4096, inodes: 1 },
        };
        assert_eq!(serde_json::to_string(&row).unwrap(), text);
        assert_eq!(decode("x", text.as_bytes()).unwrap(), row);
    }

    #[test]
    fn a_name_that_is_the_beginning_of_another_has_not_its_children() {
        let dir = tempfile::tempdir().unwrap();
        let metadata = Metadata::open(&path_in(dir.path()), dir.path(), true).unwrap();
        let change = metadata.begin().unwrap();
        for name in ["a", "ab"] {
            let chain = change.add(Kind::Active, "key", None, BTreeMap::new(), 0).unwrap();
            let active = ("key", chain.row.number);
            change.commit_active(name, active, BTreeMap::new(), Usage::default()).unwrap();
        }
        change.add(Kind::View, "child", Some("ab"), BTreeMap::new(), 0).unwrap();
        assert!(matches!(change.remove("ab"), Err(SnapshotError::HasChildren(_))));
        change.remove("a").unwrap();
    }

    #[test]
    fn contradictions_are_found_and_children_linked_anew() {
        let dir = tempfile::tempdir().unwrap();
        let metadata = Metadata::open(&path_in(dir.path()), dir.path(), true).unwrap();
        let change = metadata.begin().unwrap();
        let base = change.add(Kind::Active, "work", None, BTreeMap::new(), 0).unwrap();
        let active = ("work", base.row.number);
        change.commit_active("base", active, BTreeMap::new(), Usage::default()).unwrap();
        let row = change.add(Kind::View, "view", Some("base"), BTreeMap::new(), 0).unwrap().row;
        let counted = || change.contradictions().map(|(rows, found)| (rows.len(), found)).unwrap();
        assert_eq!(counted(), (2, vec![]));

        change.txn.open_table(CHILDREN).unwrap().remove(("base", "view")).unwrap();
        let (_, found) = counted();
        assert_eq!(found, ["the table of children is not that of the snapshots"]);
        change.relink().unwrap();
        assert_eq!(counted(), (2, vec![]));

        let lost = Row { parent: Some("gone".to_owned()), ..row.clone() };
        change.put("lost", &lost).unwrap();
        change.put("odd", &Row { parent: Some("view".to_owned()), ..row }).unwrap();
        change.txn.open_table(SNAPSHOTS).unwrap().insert("bad", b"{".as_slice()).unwrap();
        change.link(Some("gone"), "lost").unwrap();
        change.link(Some("view"), "odd").unwrap();
        let (count, found) = counted();
        assert_eq!((count, found.len()), (4, 3), "{found:?}");
    }

    /// Method: one of the directories that are flushed first cannot be opened.
    #[test]
    fn the_directories_are_flushed_before_what_adds_a_tree_and_before_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let metadata = Metadata::open(&path_in(dir.path()), dir.path(), true).unwrap();
        let add = |key| {
            let change = metadata.begin()?;
            change.add(Kind::Active, key, None, BTreeMap::new(), 0)?;
            change.commit()
        };
        let relabel = || {
            let change = metadata.begin()?;
            change.relabel("a", BTreeMap::clear)?;
            change.commit()
        };
        add("a").unwrap();
        // Waits for that flush.
        relabel().unwrap();
        std::os::unix::fs::symlink(SPARES, dir.path().join(SPARES)).unwrap();
        relabel().unwrap();
        relabel().unwrap();
        // The first caller after the flush has failed gets the error.
        add("b").and_then(|()| relabel()).unwrap_err();
    }

    #[test]
    fn a_chain_that_does_not_grow_older_is_damage() {
        let dir = tempfile::tempdir().unwrap();
        let metadata = Metadata::open(&path_in(dir.path()), dir.path(), true).unwrap();
        let change = metadata.begin().unwrap();
        let mut row = change.add(Kind::Active, "loop", None, BTreeMap::new(), 0).unwrap().row;
        row.parent = Some("loop".to_owned());
        change.put("loop", &row).unwrap();
        change.commit().unwrap();
        assert!(matches!(metadata.chain("loop"), Err(SnapshotError::Damaged { .. })));
    }
}
