//! The store as a whole: against a model, across crashes at every step, with damage, and its speed.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use std::rc::Rc;
use std::{cell::RefCell, convert::Infallible};

use proptest::prelude::*;
use tempfile::TempDir;

use super::encoding::random_bytes;
use super::*;
use godwit_disk::step;

const HOUR: Duration = Duration::from_secs(3600);
const LEAF: u8 = 0;
const NODE: u8 = 1;

/// Small packs, so that tests reach the second.
fn small() -> Options {
    Options { pack_bytes_max: 64 << 10, reserve_bytes: 0 }
}

fn open(dir: &Path) -> Store {
    Store::open(dir, small()).unwrap()
}

fn page(seed: u64) -> Vec<u8> {
    random_bytes(seed, 4096)
}

fn put_all(store: &Store, objects: &[Vec<u8>]) -> Vec<Digest> {
    let lease = store.lease("test", HOUR);
    let mut writer = store.writer(&lease);
    let digests = objects.iter().map(|bytes| writer.put(bytes).unwrap()).collect();
    writer.flush().unwrap();
    digests
}

/// An inner object of these tests: the concatenated digests of its leaves.
fn node_of(leaves: &[Digest]) -> Vec<u8> {
    leaves.iter().flat_map(|digest| *digest.as_bytes()).collect()
}

#[derive(Debug, PartialEq, thiserror::Error)]
#[error("not a list of digests")]
struct NotANode;

fn leaves_of(_kind: u8, bytes: &[u8]) -> Result<Vec<(u8, Digest)>, NotANode> {
    let digest = |bytes| Digest::try_from(bytes).map_err(|_wrong| NotANode);
    bytes.chunks(32).map(|bytes| digest(bytes).map(|digest| (LEAF, digest))).collect()
}

fn is_leaf(kind: u8) -> bool {
    kind == LEAF
}

fn no_roots<E>() -> Result<Vec<(u8, Digest)>, E> {
    Ok(Vec::new())
}

fn sweep(store: &Store) -> Result<SweepReport, SweepError<NotANode>> {
    store.sweep(&leaves_of, is_leaf, &no_roots, Compaction::Usual)
}

fn snapshot(root: Digest, sequence: u64) -> Snapshot {
    Snapshot {
        subject: "volume|data".parse().unwrap(),
        sequence,
        taken_at_unix_ms: 1_700_000_000_000,
        root,
        root_kind: NODE,
        size_bytes: 1,
        node: "edge-a".to_owned(),
        is_pinned: false,
    }
}

/// Records a snapshot of pages with these seeds; returns its id and the pages' digests.
fn record(store: &Store, seeds: impl Iterator<Item = u64>) -> (SnapshotId, Vec<Digest>) {
    let pages: Vec<Vec<u8>> = seeds.map(page).collect();
    let leaves = put_all(store, &pages);
    let root = put_all(store, &[node_of(&leaves)])[0];
    (store.record(&snapshot(root, 1)).unwrap(), leaves)
}

/// What is on the disk at this moment, as a kill of the process would leave it.
fn copy_dir(from: &Path) -> TempDir {
    let to = tempfile::tempdir().unwrap();
    std::fs::create_dir(to.path().join(PACKS_DIR)).unwrap();
    std::fs::copy(from.join(INDEX_FILE), to.path().join(INDEX_FILE)).unwrap();
    for entry in std::fs::read_dir(from.join(PACKS_DIR)).unwrap() {
        let name = entry.unwrap().file_name();
        let pack = Path::new(PACKS_DIR).join(name);
        std::fs::copy(from.join(&pack), to.path().join(&pack)).unwrap();
    }
    to
}

fn pack_files(dir: &Path) -> BTreeSet<u32> {
    Packs::list(&dir.join(PACKS_DIR)).unwrap().into_iter().collect()
}

fn all_whole(store: &Store, digests: &[Digest]) -> bool {
    digests.iter().all(|digest| store.verify(digest).unwrap())
}

#[test]
fn what_is_put_can_be_got_in_every_way() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let objects = [vec![1], vec![0; 4096], page(1), random_bytes(2, 256 << 10), vec![7; 4 << 20]];
    let digests = put_all(&store, &objects);
    for (digest, object) in digests.iter().zip(&objects) {
        assert!(store.contains(digest).unwrap() && store.verify(digest).unwrap());
        assert_eq!(store.get(digest).unwrap().as_ref(), Some(object));
        let stored = store.get_stored(digest).unwrap().unwrap();
        assert!(stored.bytes.len() <= object.len());
        assert_eq!(decode(stored.encoding, &stored.bytes, object.len()).as_ref(), Some(object));
    }
    let absent = Digest::of(b"absent");
    assert_eq!(store.get(&absent).unwrap(), None);
    assert_eq!(store.get_stored(&absent).unwrap(), None);
    assert!(!store.verify(&absent).unwrap());
    assert_eq!(store.missing(&[digests[0], absent]).unwrap(), [absent]);
    assert_eq!(store.usage().unwrap().objects, 5);
}

#[test]
fn get_many_gives_each_distinct_object_once_and_tells_what_is_absent() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let objects: Vec<Vec<u8>> = (0..100).map(page).collect();
    let digests = put_all(&store, &objects);
    let absent = Digest::of(b"absent");
    let mut asked: Vec<Digest> = digests.iter().rev().step_by(3).copied().collect();
    asked.push(absent);
    asked.push(asked[0]);
    let mut got = HashMap::new();
    let told = store.get_many(&asked, &mut |digest, bytes| {
        assert_eq!(got.insert(*digest, bytes.to_vec()), None);
        ControlFlow::Continue(())
    });
    assert_eq!(told.unwrap(), [absent]);
    assert_eq!(got.len(), 34);
    for (digest, bytes) in &got {
        assert_eq!(Digest::of(bytes), *digest);
    }
    let mut visited = 0;
    let stop_at_second = &mut |_: &Digest, _: &[u8]| {
        visited += 1;
        if visited == 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    store.get_many(&digests, stop_at_second).unwrap();
    assert_eq!(visited, 2);
}

#[test]
fn sizes_outside_the_limits_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let lease = store.lease("test", HOUR);
    let mut writer = store.writer(&lease);
    for len in [0, OBJECT_BYTES_MAX + 1] {
        assert!(matches!(writer.put(&vec![0; len]), Err(StoreError::ObjectSize(l)) if l == len));
        let stored = writer.put_stored(Digest::of(b""), Encoding::Zstd, &[1], len);
        assert!(matches!(stored, Err(StoreError::ObjectSize(_))));
    }
}

#[test]
fn nothing_is_visible_before_the_flush_nor_after_a_drop_without_one() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let lease = store.lease("test", HOUR);
    let mut writer = store.writer(&lease);
    // More than one batch, so that some of it is in the pack already.
    let digests: Vec<Digest> = (0..400).map(|seed| writer.put(&page(seed)).unwrap()).collect();
    assert_eq!(store.missing(&digests).unwrap(), digests);
    drop(writer);
    assert_eq!(store.usage().unwrap(), Usage { bytes: 0, objects: 0 });
    drop((lease, store));
    assert_eq!(open(dir.path()).usage().unwrap().objects, 0);
    assert_eq!(pack_files(dir.path()), BTreeSet::new());
}

#[test]
fn one_process_has_the_store_and_a_store_reopens_with_everything_synced() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let digests = put_all(&store, &[page(1), page(2)]);
    assert!(matches!(Store::open(dir.path(), small()), Err(OpenError::InUse(_))));
    drop(store);
    let store = open(dir.path());
    assert!(all_whole(&store, &digests) && store.damage().is_empty());
    // The pack is gone on with, not begun again.
    put_all(&store, &[page(3)]);
    assert_eq!(pack_files(dir.path()), BTreeSet::from([1]));
}

/// Method: something is mounted over a pack that the index does not name.
#[test]
fn a_pack_that_cannot_be_removed_keeps_no_store_from_opening() {
    use nix::mount::{MsFlags, mount, umount};
    let dir = tempfile::tempdir().unwrap();
    drop(open(dir.path()));
    let stray = dir.path().join("packs/7.pack");
    std::fs::write(&stray, "x").unwrap();
    let none = None::<&str>;
    mount(Some(&stray), &stray, none, MsFlags::MS_BIND, none).unwrap();
    let store = open(dir.path());
    assert_eq!(store.leftovers().reasons().len(), 1);
    let digests = put_all(&store, &[page(1)]);
    assert!(all_whole(&store, &digests) && pack_files(dir.path()) == [7, 8].into());
    umount(&stray).unwrap();
    store.leftovers().retry();
    assert_eq!(store.leftovers().reasons(), [""; 0]);
    assert_eq!(pack_files(dir.path()), [8].into());
}

#[test]
fn a_full_disk_is_told_apart_and_nothing_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let before = put_all(&store, &[page(1)]);
    drop(store);
    let options = Options { reserve_bytes: u64::MAX, ..small() };
    let store = Store::open(dir.path(), options).unwrap();
    let lease = store.lease("test", HOUR);
    let mut writer = store.writer(&lease);
    writer.put(&page(2)).unwrap();
    assert!(matches!(writer.flush(), Err(StoreError::Full { .. })));
    assert!(matches!(writer.flush(), Err(StoreError::Full { .. })));
    assert!(matches!(store.record(&snapshot(before[0], 1)), Err(StoreError::Full { .. })));
    assert!(all_whole(&store, &before));
}

#[test]
fn a_failed_index_is_reopened_as_of_the_last_sync_and_ends_all_leases() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let synced = put_all(&store, &[page(1)]);
    store.sync().unwrap();
    let lease = store.lease("before", HOUR);
    let mut writer = store.writer(&lease);
    let lost = writer.put(&page(2)).unwrap();
    writer.flush().unwrap();
    assert!(store.contains(&lost).unwrap());
    store.inner.index.fail("the disk is full");
    assert_eq!(store.failure().as_deref(), Some("the disk is full"));
    // It may refer to what is lost.
    writer.put(&page(3)).unwrap();
    assert!(matches!(writer.flush(), Err(StoreError::LeaseExpired(name)) if name == "before"));
    assert!(lease.renew().is_err());
    assert_eq!(store.failure(), None);
    assert_eq!(store.missing(&[synced[0], lost]).unwrap(), [lost]);
    let again = put_all(&store, &[page(1), page(2), page(4)]);
    store.sync().unwrap();
    drop((writer, lease, store));
    let store = open(dir.path());
    assert!(store.damage().is_empty() && all_whole(&store, &again));
}

#[test]
fn a_lease_that_is_taken_after_a_failure_lasts() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    store.inner.index.fail("the disk is full");
    let lease = store.lease("after", HOUR);
    let mut writer = store.writer(&lease);
    writer.put(&page(1)).unwrap();
    writer.flush().unwrap();
    lease.renew().unwrap();
}

/// Method: bytes that were flushed and not synced are overwritten, as by a kernel that dropped the
/// pages that it could not write.
#[test]
fn after_a_failed_sync_of_a_pack_nothing_names_its_unsynced_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let synced = put_all(&store, &[page(1)]);
    store.sync().unwrap();
    let pack = dir.path().join("packs/1.pack");
    let end = usize::try_from(std::fs::metadata(&pack).unwrap().len()).unwrap();
    let unsynced = put_all(&store, &[page(2), page(3)]);
    store.inner.packs.break_sync();
    assert!(matches!(store.sync(), Err(StoreError::Io { doing: "sync", .. })));
    let mut bytes = std::fs::read(&pack).unwrap();
    bytes[end..].fill(0);
    std::fs::write(&pack, bytes).unwrap();
    assert_eq!(store.missing(&unsynced).unwrap(), unsynced);
    let again = put_all(&store, &[page(2), page(3)]);
    store.sync().unwrap();
    assert!(all_whole(&store, &synced) && all_whole(&store, &again));
    drop(store);
    let store = open(dir.path());
    assert!(store.damage().is_empty() && all_whole(&store, &synced) && all_whole(&store, &again));
}

/// Method: as above, and the store is closed instead of used.
#[test]
fn a_store_that_closes_without_a_sync_names_no_unsynced_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let unsynced = put_all(&store, &[page(1)]);
    store.inner.packs.break_sync();
    drop(store);
    assert_eq!(open(dir.path()).missing(&unsynced).unwrap(), unsynced);
}

#[test]
fn a_sweep_removes_nothing_after_the_index_was_reopened() {
    for step in ["before the copies are committed", "before the unmarked are removed"] {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        put_all(&store, &(0..60).map(page).collect::<Vec<_>>());
        let (_, kept) = record(&store, (0..60).step_by(3));
        store.sync().unwrap();
        let failing = store.clone();
        let hook = move |reached: &'static str| {
            if reached == step {
                failing.inner.index.fail("the disk is full");
            }
        };
        assert!(step::with_hook(hook, || sweep(&store)).is_err(), "{step}");
        assert!(all_whole(&store, &kept), "{step}");
        sweep(&store).unwrap();
        assert!(all_whole(&store, &kept), "{step}");
        drop(store);
        let store = open(dir.path());
        assert!(store.damage().is_empty() && all_whole(&store, &kept), "{step}");
    }
}

#[test]
fn writers_at_once_do_not_disturb_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    std::thread::scope(|scope| {
        for writer in 0..4_u64 {
            let store = &store;
            scope.spawn(move || {
                for round in 0..10 {
                    // Half of the pages are the same for all writers.
                    let seeds =
                        (0..40).map(|i| if i % 2 == 0 { i } else { i + 1000 * (writer + 1) });
                    let pages: Vec<Vec<u8>> = seeds.map(|seed| page(seed + round * 100)).collect();
                    let digests = put_all(store, &pages);
                    store.sync().unwrap();
                    assert!(all_whole(store, &digests));
                }
            });
        }
    });
}

/// Method: stop at every step of a sync, look at what a kill would have left, and what a power cut
/// that took the unsynced bytes of the packs along would have.
#[test]
fn after_a_crash_at_any_step_of_a_sync_objects_are_whole_or_absent() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let old = put_all(&store, &[page(1), page(2)]);
    store.sync().unwrap();
    let synced_len = store.usage().unwrap().bytes;
    let new = put_all(&store, &(3..40).map(page).collect::<Vec<_>>());
    let copies = Rc::new(RefCell::new(Vec::new()));
    let hook = {
        let (copies, from) = (Rc::clone(&copies), dir.path().to_owned());
        move |step| copies.borrow_mut().push((step, copy_dir(&from)))
    };
    step::with_hook(hook, || store.sync()).unwrap();
    let copies = copies.take();
    assert_eq!(copies.len(), 3);
    for (step, copy) in copies {
        let is_committed = step == "after the index is committed";
        if step == "before the packs are synced" {
            for number in pack_files(copy.path()) {
                let path = copy.path().join(format!("{PACKS_DIR}/{number}.pack"));
                let kept = if number == 1 { synced_len } else { 0 };
                std::fs::OpenOptions::new().write(true).open(path).unwrap().set_len(kept).unwrap();
            }
        }
        let store = open(copy.path());
        assert!(store.damage().is_empty(), "{step}");
        assert!(all_whole(&store, &old), "{step}");
        let missing = store.missing(&new).unwrap();
        assert_eq!(missing.is_empty(), is_committed, "{step}");
        // And it works on.
        let again = put_all(&store, &(3..40).map(page).collect::<Vec<_>>());
        assert!(all_whole(&store, &again), "{step}");
    }
}

/// Method: as above, with a sweep that removes, empties one pack and rewrites another.
#[test]
fn after_a_crash_at_any_step_of_a_sweep_what_is_marked_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    // Three full packs: one dies, of one a few pages live, one lives.
    let (dead, _) = record(&store, 0..15);
    let mixed: Vec<Vec<u8>> = (100..115).map(page).collect();
    let mixed = put_all(&store, &mixed);
    let (_, alive) = record(&store, 200..215);
    let root = put_all(&store, &[node_of(&mixed[..3])])[0];
    store.record(&snapshot(root, 2)).unwrap();
    store.remove_snapshot(dead).unwrap();
    let kept: Vec<Digest> = alive.iter().chain(&mixed[..3]).copied().collect();

    let copies = Rc::new(RefCell::new(Vec::new()));
    let hook = {
        let (copies, from) = (Rc::clone(&copies), dir.path().to_owned());
        move |step| copies.borrow_mut().push((step, copy_dir(&from)))
    };
    let report = step::with_hook(hook, || sweep(&store)).unwrap();
    assert!(report.packs_removed >= 2, "{report:?}");
    assert!(report.bytes_freed > 90 << 10, "{report:?}");
    assert!(all_whole(&store, &kept));
    let usage = store.usage().unwrap();
    let copies = copies.take();
    assert!(copies.iter().any(|(step, _)| *step == "before the old pack is unlinked"));
    for (step, copy) in copies {
        let store = open(copy.path());
        assert!(store.damage().is_empty(), "{step}");
        assert!(all_whole(&store, &kept), "{step}");
        sweep(&store).unwrap();
        assert!(all_whole(&store, &kept), "{step}");
        assert_eq!(store.usage().unwrap().objects, usage.objects, "{step}");
        let known = known_packs(&store.inner.index).unwrap();
        assert_eq!(pack_files(copy.path()), known.keys().copied().collect(), "{step}");
    }
}

#[test]
fn a_sweep_removes_nothing_while_a_lease_is_live_or_was_taken_meanwhile() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let digests = put_all(&store, &[page(1)]);
    let (_, leaves) = record(&store, 2..4);
    let lease = store.lease("pull of cache", HOUR);
    let refused = sweep(&store).unwrap_err();
    assert_eq!(refused.to_string(), "the store is leased by pull of cache");
    drop(lease);
    let take_one = |_: u8, bytes: &[u8]| {
        drop(store.lease("late", HOUR));
        leaves_of(NODE, bytes)
    };
    let refused = store.sweep(&take_one, is_leaf, &no_roots, Compaction::Usual).unwrap_err();
    assert!(matches!(refused, SweepError::Disturbed));
    assert!(all_whole(&store, &digests));
    let report = store
        .sweep(&leaves_of, is_leaf, &|| Ok(vec![(LEAF, digests[0])]), Compaction::Usual)
        .unwrap();
    assert_eq!((report.objects_kept, report.objects_removed), (4, 0));
    assert_eq!(sweep(&store).unwrap().objects_removed, 1);
    assert!(all_whole(&store, &leaves));
    assert!(!store.contains(&digests[0]).unwrap());
}

/// Method: the import ends just when the roots were asked for, after an answer that does not have
/// it yet.
#[test]
fn a_sweep_does_not_take_what_was_named_while_it_asked_for_the_roots() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let garbage = put_all(&store, &[page(1)]);
    let named = RefCell::new(Vec::new());
    let roots = || {
        let before = named.borrow().clone();
        if before.is_empty() {
            let leaves = put_all(&store, &[page(2)]);
            let root = put_all(&store, &[node_of(&leaves)])[0];
            named.borrow_mut().push((NODE, root));
        }
        Ok(before)
    };
    let sweep = || store.sweep(&leaves_of, is_leaf, &roots, Compaction::Usual);
    assert!(matches!(sweep().unwrap_err(), SweepError::Disturbed));
    let report = sweep().unwrap();
    assert_eq!((report.objects_kept, report.objects_removed), (2, 1));
    assert!(!store.contains(&garbage[0]).unwrap());
    let root = named.borrow()[0].1;
    assert!(all_whole(&store, &[root, Digest::of(&page(2))]));
}

#[test]
fn what_a_snapshot_alone_holds_is_what_its_removal_frees() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    // Pages 4 and 5 are shared, page 2 is kept by another root.
    let (one, leaves) = record(&store, 1..6);
    let (other, _) = record(&store, 4..9);
    let kept = [(LEAF, leaves[1])];
    let bytes = store.exclusive_bytes(&leaves_of, is_leaf, &kept).unwrap();
    let page = (4096 + pack::RECORD_BYTES) as u64;
    let list = |leaves: u64| leaves * 32 + pack::RECORD_BYTES as u64;
    assert_eq!(bytes, [(one, 2 * page + list(5)), (other, 3 * page + list(5))].into());
    store.remove_snapshot(other).unwrap();
    let before = store.usage().unwrap().bytes;
    let report =
        store.sweep(&leaves_of, is_leaf, &|| Ok(kept.to_vec()), Compaction::Tight).unwrap();
    assert_eq!(report.objects_removed, 4);
    assert!(before - store.usage().unwrap().bytes >= bytes[&other], "tight: it is given back");
}

#[test]
fn what_was_removed_is_there_again_with_its_next_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let (id, _) = record(&store, 1..3);
    let (_, mut one) = store.all_snapshots().unwrap().remove(0);
    let unknown = "layer|default|unknown".parse().unwrap();
    store.note_removed(&unknown, 5).unwrap();
    store.note_removed(&one.subject, 6).unwrap();
    store.note_removed(&one.subject, 7).unwrap();
    assert_eq!(store.removed().unwrap(), [(one.subject.to_string(), 6)].into());
    one.sequence += 1;
    let again = store.record(&one).unwrap();
    assert!(again > id);
    assert!(store.removed().unwrap().is_empty());
    store.note_removed(&one.subject, 8).unwrap();
    store.remove_snapshot(id).unwrap();
    assert_eq!(store.removed().unwrap().len(), 1, "it has a snapshot yet");
    store.remove_snapshot(again).unwrap();
    assert!(store.removed().unwrap().is_empty(), "nothing is left to expire");
}

#[test]
fn a_writer_whose_lease_has_ended_cannot_flush() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let lease = store.lease("gone", HOUR);
    let mut writer = store.writer(&lease);
    let digest = writer.put(&page(1)).unwrap();
    drop(lease);
    sweep(&store).unwrap();
    assert!(matches!(writer.flush(), Err(StoreError::LeaseExpired(name)) if name == "gone"));
    assert!(!store.contains(&digest).unwrap());
    // Nor one that wrote nothing because all was there: it may have been swept.
    let lease = store.lease("short", Duration::ZERO);
    assert!(matches!(store.writer(&lease).flush(), Err(StoreError::LeaseExpired(_))));
}

#[test]
fn a_sweep_fails_closed_on_what_it_cannot_read() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let garbage = put_all(&store, &[page(1)]);
    let (id, leaves) = record(&store, 2..4);
    let cannot = |_: u8, _: &[u8]| Err(NotANode);
    let failed = store.sweep(&cannot, is_leaf, &no_roots, Compaction::Usual).unwrap_err();
    assert!(matches!(failed, SweepError::Children { source: NotANode, .. }));
    let unknown = || Err(NotANode);
    let failed = store.sweep(&leaves_of, is_leaf, &unknown, Compaction::Usual).unwrap_err();
    assert!(matches!(failed, SweepError::Roots(NotANode)));
    let absent = Digest::of(b"absent");
    let failed = store
        .sweep(&leaves_of, is_leaf, &|| Ok(vec![(NODE, absent)]), Compaction::Usual)
        .unwrap_err();
    assert!(matches!(failed, SweepError::Missing(digest) if digest == absent));
    assert!(all_whole(&store, &garbage) && all_whole(&store, &leaves));

    // The root itself is damaged on the disk.
    let root = store.all_snapshots().unwrap()[0].1.root;
    damage_object(&store, dir.path(), &root);
    assert!(matches!(sweep(&store), Err(SweepError::Store(StoreError::Corrupt { .. }))));
    assert!(matches!(sweep(&store), Err(SweepError::Missing(digest)) if digest == root));
    assert!(all_whole(&store, &garbage) && all_whole(&store, &leaves));
    store.remove_snapshot(id).unwrap();
    assert_eq!(sweep(&store).unwrap().objects_kept, 0);

    // A snapshot's record is damaged in the index.
    let garbage = put_all(&store, &[page(1)]);
    let write = store.inner.index.begin_write().unwrap();
    write.open_table(index::SNAPSHOTS).unwrap().insert(9, &b"\xff"[..]).unwrap();
    index::commit_visible(write).unwrap();
    let failed = sweep(&store).unwrap_err();
    assert!(matches!(failed, SweepError::Store(StoreError::SnapshotRecord(SnapshotId(9)))));
    assert!(all_whole(&store, &garbage));
}

/// Flips one bit of the object's stored bytes.
fn damage_object(store: &Store, dir: &Path, digest: &Digest) {
    use std::os::unix::fs::FileExt as _;
    let at =
        index::lookup(&store.inner.index.objects().unwrap(), digest).unwrap().unwrap().unwrap();
    let path = dir.join(format!("{PACKS_DIR}/{}.pack", at.pack));
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let place = at.end() - 1;
    let mut byte = [0];
    file.read_exact_at(&mut byte, place).unwrap();
    file.write_all_at(&[byte[0] ^ 1], place).unwrap();
}

#[test]
fn a_damaged_object_is_quarantined_and_can_be_stored_again() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let digests = put_all(&store, &[page(1), page(2)]);
    // A writer that has seen the object must notice that it is gone.
    let lease = store.lease("test", HOUR);
    let mut writer = store.writer(&lease);
    assert!(!writer.put_hashed(digests[0], &page(1)).unwrap());
    damage_object(&store, dir.path(), &digests[0]);
    let found = store.verify(&digests[0]).unwrap_err();
    assert!(matches!(found, StoreError::Corrupt { why: Mismatch::Content, .. }));
    assert!(!store.contains(&digests[0]).unwrap());
    assert_eq!(store.quarantined().unwrap(), [digests[0]]);
    assert!(writer.put_hashed(digests[0], &page(1)).unwrap());
    writer.flush().unwrap();
    assert!(all_whole(&store, &digests));
}

/// Method: content, an entry that points elsewhere, one that makes no sense, and a pack that is
/// gone.
#[test]
fn examining_finds_every_damage_and_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let digests = put_all(&store, &[page(1), page(2), page(3), page(4)]);
    let whole = store.examine().unwrap();
    assert_eq!((whole.objects, whole.damaged.len()), (4, 0));
    assert_eq!(whole.bytes, 4 * (4096 + pack::RECORD_BYTES as u64));

    damage_object(&store, dir.path(), &digests[0]);
    let write = store.inner.index.begin_write().unwrap();
    {
        let mut objects = write.open_table(index::OBJECTS).unwrap();
        let other = *objects.get(digests[3].as_bytes()).unwrap().unwrap().value();
        objects.insert(digests[1].as_bytes(), &other).unwrap();
        objects.insert(digests[2].as_bytes(), &[0xff; 17]).unwrap();
    }
    index::commit_visible(write).unwrap();
    let found = store.examine().unwrap();
    let whys: HashMap<Digest, Mismatch> =
        found.damaged.iter().map(|one| (one.digest, one.why)).collect();
    let expected = [Mismatch::Content, Mismatch::Header, Mismatch::Entry];
    assert_eq!(whys, digests.iter().copied().zip(expected).collect());
    assert_eq!(store.examine().unwrap(), found);
    assert!(store.quarantined().unwrap().is_empty());

    store.sync().unwrap();
    let copy = copy_dir(dir.path());
    let gone = open(copy.path());
    std::fs::remove_file(copy.path().join(PACKS_DIR).join("1.pack")).unwrap();
    assert!(gone.examine().unwrap().damaged.iter().any(|one| one.why == Mismatch::Gone));
    for damaged in &found.damaged {
        assert!(matches!(store.verify(&damaged.digest), Err(StoreError::Corrupt { .. })));
    }
    assert_eq!(store.examine().unwrap().damaged, []);
}

#[test]
fn an_index_entry_that_points_elsewhere_is_noticed_without_hashing() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let digests = put_all(&store, &[page(1), page(2), page(3)]);
    let write = store.inner.index.begin_write().unwrap();
    {
        let mut objects = write.open_table(index::OBJECTS).unwrap();
        let other = *objects.get(digests[1].as_bytes()).unwrap().unwrap().value();
        objects.insert(digests[0].as_bytes(), &other).unwrap();
        objects.insert(digests[2].as_bytes(), &[0xff; 17]).unwrap();
    }
    index::commit_visible(write).unwrap();
    let why = |digest| match store.get(digest) {
        Err(StoreError::Corrupt { why, .. }) => why,
        other => panic!("{other:?}"),
    };
    assert_eq!(why(&digests[0]), Mismatch::Header);
    assert_eq!(why(&digests[2]), Mismatch::Entry);
    let told = store.get_many(&digests, &mut |_, _| ControlFlow::Continue(())).unwrap();
    assert_eq!(told, [digests[0], digests[2]]);
}

#[test]
fn a_short_or_missing_pack_is_reported_and_only_what_it_held_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let digests = put_all(&store, &(0..15).map(page).collect::<Vec<_>>());
    let others = put_all(&store, &(20..35).map(page).collect::<Vec<_>>());
    assert_eq!(pack_files(dir.path()), BTreeSet::from([1, 2]));
    drop(store);
    let first = dir.path().join("packs/1.pack");
    let file = std::fs::OpenOptions::new().write(true).open(&first).unwrap();
    file.set_len(24 + 5 * (4096 + 44) + 7).unwrap();
    let store = open(dir.path());
    assert_eq!(store.damage().len(), 1);
    assert_eq!((store.damage()[0].pack, store.damage()[0].objects_lost), (1, 10));
    assert!(all_whole(&store, &others) && all_whole(&store, &digests[..5]));
    assert_eq!(store.missing(&digests).unwrap(), digests[5..]);
    drop(store);
    std::fs::remove_file(&first).unwrap();
    let store = open(dir.path());
    assert_eq!((store.damage()[0].found_bytes, store.damage()[0].objects_lost), (None, 5));
    assert!(all_whole(&store, &others));
    // Gone pages can be stored again, and the sweep forgets the pack.
    assert!(all_whole(&store, &put_all(&store, &(0..15).map(page).collect::<Vec<_>>())));
    sweep(&store).unwrap();
    drop(store);
    assert!(open(dir.path()).damage().is_empty());
}

#[test]
fn a_store_that_cannot_be_understood_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let digests = put_all(&open(dir.path()), &[page(1)]);
    let (index, pack) = (dir.path().join(INDEX_FILE), dir.path().join("packs/1.pack"));
    let (index_bytes, pack_bytes) = (std::fs::read(&index).unwrap(), std::fs::read(&pack).unwrap());
    let refused = || Store::open(dir.path(), small()).err().unwrap();

    std::fs::remove_file(&index).unwrap();
    assert!(matches!(refused(), OpenError::IndexMissing(_)));
    assert!(!index.exists());

    let mut foreign = index_bytes.clone();
    foreign[..64].fill(0x55);
    std::fs::write(&index, &foreign).unwrap();
    assert!(matches!(refused(), OpenError::Index { .. }));
    assert_eq!(std::fs::read(&index).unwrap(), foreign);

    std::fs::write(&index, &index_bytes).unwrap();
    let mut newer = pack_bytes.clone();
    newer[8] = 2;
    std::fs::write(&pack, &newer).unwrap();
    assert!(matches!(refused(), OpenError::Version { found: 2, .. }));
    newer[0] = b'?';
    std::fs::write(&pack, &newer).unwrap();
    assert!(matches!(refused(), OpenError::ForeignPack(_)));
    assert_eq!(std::fs::read(&pack).unwrap(), newer);

    std::fs::write(&pack, &pack_bytes).unwrap();
    assert!(all_whole(&open(dir.path()), &digests));
}

#[test]
fn snapshots_are_ordered_by_sequence_survive_reopening_and_are_retired_unless_pinned() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let root = put_all(&store, &[vec![1; 32]])[0];
    let absent = Digest::of(b"absent");
    assert!(matches!(store.record(&snapshot(absent, 1)), Err(StoreError::NotFound(_))));
    let ids: Vec<SnapshotId> =
        [3, 1, 2, 4].iter().map(|n| store.record(&snapshot(root, *n)).unwrap()).collect();
    let other = Snapshot { subject: "layer|default|cache".parse().unwrap(), ..snapshot(root, 9) };
    let other_id = store.record(&other).unwrap();
    store.pin(ids[1], true).unwrap();
    drop(store);
    let store = open(dir.path());
    let subject = snapshot(root, 0).subject;
    let sequences = |store: &Store| -> Vec<u64> {
        store.snapshots(&subject).unwrap().iter().map(|(_, one)| one.sequence).collect()
    };
    assert_eq!(sequences(&store), [4, 3, 2, 1]);
    assert_eq!(store.snapshots(&other.subject).unwrap(), [(other_id, other)]);
    store.remove_snapshots(&[ids[2]]).unwrap();
    assert_eq!(sequences(&store), [4, 3, 1]);
    store.remove_snapshot(ids[1]).unwrap();
    assert!(matches!(store.pin(ids[1], true), Err(StoreError::UnknownSnapshot(_))));
    assert!(matches!(store.remove_snapshot(ids[1]), Err(StoreError::UnknownSnapshot(_))));
    // Ids are never used twice.
    assert!(store.record(&snapshot(root, 5)).unwrap() > other_id);
}

/// Version 1 as it was written by the first release: it must open for ever.
#[test]
fn a_store_of_version_1_opens() {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/store/testdata/v1");
    let copy = tempfile::tempdir().unwrap();
    std::fs::create_dir(copy.path().join(PACKS_DIR)).unwrap();
    for (file, from) in [(INDEX_FILE, "index.redb.zst"), ("packs/1.pack", "1.pack.zst")] {
        let bytes = zstd::decode_all(std::fs::File::open(data.join(from)).unwrap()).unwrap();
        std::fs::write(copy.path().join(file), bytes).unwrap();
    }
    let store = open(copy.path());
    let text = b"godwit ".repeat(100);
    let (plain, compressed) = (Digest::of(b"a raw object"), Digest::of(&text));
    assert_eq!(store.get(&plain).unwrap().unwrap(), b"a raw object");
    assert_eq!(store.get_stored(&compressed).unwrap().unwrap().encoding, Encoding::Zstd);
    assert_eq!(store.get(&compressed).unwrap().unwrap(), text);
    let (_, recorded) = store.all_snapshots().unwrap().remove(0);
    assert_eq!(recorded, Snapshot { is_pinned: true, root: plain, ..snapshot(plain, 7) });
}

#[derive(Clone, Debug)]
enum Act {
    Put(Vec<u8>),
    Flush,
    DropWriter,
    Snapshot(u8),
    RemoveSnapshot(u8),
    Sweep,
    Sync,
    Reopen,
    Crash,
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let act = prop_oneof![
        // Few different objects, so that they meet again.
        8 => (0_u8..24).prop_map(|seed| {
            let len = usize::from(seed) * 400 + 1;
            Act::Put(if seed % 3 == 0 { vec![seed; len] } else { random_bytes(seed.into(), len) })
        }),
        3 => Just(Act::Flush),
        1 => Just(Act::DropWriter),
        2 => (0_u8..24).prop_map(Act::Snapshot),
        1 => (0_u8..8).prop_map(Act::RemoveSnapshot),
        2 => Just(Act::Sweep),
        1 => Just(Act::Sync),
        1 => Just(Act::Reopen),
        1 => Just(Act::Crash),
    ];
    proptest::collection::vec(act, 1..60)
}

/// What a store should hold.
#[derive(Clone, Default)]
struct Model {
    visible: HashMap<Digest, Vec<u8>>,
    pending: HashMap<Digest, Vec<u8>>,
    snapshots: Vec<(SnapshotId, Digest)>,
}

/// Method: any order of acts; the model is a map. After a crash, which is a copy of the files at
/// that moment, the store holds what was visible at the last durable commit.
fn agrees_with_a_map(acts: Vec<Act>) -> Result<(), TestCaseError> {
    let mut dir = tempfile::tempdir().unwrap();
    let mut store =
        Store::open(dir.path(), Options { pack_bytes_max: 8 << 10, reserve_bytes: 0 }).unwrap();
    let mut lease = store.lease("model", HOUR);
    let mut writer = Some(store.writer(&lease));
    let (mut now, mut durable) = (Model::default(), Model::default());
    for act in acts {
        match act {
            Act::Put(bytes) => {
                let digest =
                    writer.get_or_insert_with(|| store.writer(&lease)).put(&bytes).unwrap();
                now.pending.insert(digest, bytes);
            }
            Act::Flush => {
                writer.get_or_insert_with(|| store.writer(&lease)).flush().unwrap();
                now.visible.extend(now.pending.drain());
            }
            Act::DropWriter => {
                writer = None;
                now.pending.clear();
            }
            Act::Snapshot(pick) => {
                let mut digests: Vec<Digest> = now.visible.keys().copied().collect();
                digests.sort();
                let Some(root) = digests.get(usize::from(pick)) else { continue };
                let one = Snapshot { root_kind: LEAF, ..snapshot(*root, 1) };
                now.snapshots.push((store.record(&one).unwrap(), *root));
                durable = Model { pending: HashMap::new(), ..now.clone() };
            }
            Act::RemoveSnapshot(pick) => {
                if usize::from(pick) < now.snapshots.len() {
                    let (id, _) = now.snapshots.remove(pick.into());
                    store.remove_snapshot(id).unwrap();
                    durable = Model { pending: HashMap::new(), ..now.clone() };
                }
            }
            Act::Sweep => {
                writer = None;
                now.pending.clear();
                drop(lease);
                let nothing = |_: u8, _: &[u8]| Ok::<_, Infallible>(Vec::new());
                let report = store.sweep(&nothing, is_leaf, &no_roots, Compaction::Usual).unwrap();
                let roots: BTreeSet<Digest> = now.snapshots.iter().map(|(_, root)| *root).collect();
                now.visible.retain(|digest, _| roots.contains(digest));
                prop_assert_eq!(report.objects_kept, now.visible.len() as u64);
                lease = store.lease("model", HOUR);
                durable = now.clone();
            }
            Act::Sync => {
                store.sync().unwrap();
                durable = Model { pending: HashMap::new(), ..now.clone() };
            }
            Act::Reopen | Act::Crash => {
                let copy = copy_dir(dir.path());
                writer = None;
                drop(lease);
                drop(store);
                now.pending.clear();
                if matches!(act, Act::Crash) {
                    dir = copy;
                    now = durable.clone();
                }
                store =
                    Store::open(dir.path(), Options { pack_bytes_max: 8 << 10, reserve_bytes: 0 })
                        .unwrap();
                prop_assert!(store.damage().is_empty());
                lease = store.lease("model", HOUR);
                durable = now.clone();
            }
        }
        prop_assert_eq!(store.usage().unwrap().objects, now.visible.len() as u64);
    }
    for (digest, bytes) in &now.visible {
        let got = store.get(digest).unwrap();
        prop_assert_eq!(got.as_ref(), Some(bytes));
        prop_assert!(store.verify(digest).unwrap());
    }
    drop(writer);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_order_of_acts_agrees_with_a_map(acts in acts()) {
        agrees_with_a_map(acts)?;
    }
}
