use godwit_disk::step::stop_before;
use godwit_protos::FileSystem;

use super::*;
use crate::ownership::fate::Fate;
use crate::ownership::{Epoch, Ownership};

fn container() -> ContainerRef {
    ContainerRef::new("default", "cache").unwrap()
}

fn open(dir: &Path) -> Journal {
    Journal::open(&dir.join("node.redb"), &dir.join("fences")).unwrap()
}

#[test]
fn a_release_is_fenced_and_survives_reopening() {
    let dir = tempfile::tempdir().unwrap();
    let journal = open(dir.path());
    journal
        .apply(&container(), &Event::Offer("edge-b/default/cache".into(), Epoch(0)), |_| {})
        .unwrap();
    journal.apply(&container(), &Event::Release(Epoch(1)), |_| {}).unwrap();
    let fence = dir.path().join("fences/default/cache");
    assert_eq!(fs::read_to_string(&fence).unwrap(), "moved to edge-b, epoch 1");
    drop(journal);
    // The directory was lost: with a state that was copied, say.
    fs::remove_file(&fence).unwrap();
    let journal = open(dir.path());
    assert!(fence.exists());
    let entry = journal.container(&container()).unwrap().unwrap();
    assert_eq!(entry.ownership, Ownership::Released(Epoch(1), "edge-b/default/cache".into()));
    journal.forget(&container()).unwrap();
    assert!(!fence.exists());
    assert_eq!(journal.container(&container()).unwrap(), None);
}

/// Method: something is mounted where a fence of no container lies, and the fence of a released
/// one cannot be replaced.
#[test]
fn a_fence_that_cannot_be_removed_keeps_no_journal_from_opening() {
    use nix::mount::{MsFlags, mount, umount};
    let dir = tempfile::tempdir().unwrap();
    let journal = open(dir.path());
    let offer = Event::Offer("edge-b/default/cache".into(), Epoch(0));
    journal.apply(&container(), &offer, |_| {}).unwrap();
    journal.apply(&container(), &Event::Release(Epoch(1)), |_| {}).unwrap();
    drop(journal);
    let fences = [("cache", "moved to edge-b, epoch 1"), ("other", "stale")];
    let fences = fences.map(|(name, text)| (dir.path().join("fences/default").join(name), text));
    let none = None::<&str>;
    for (fence, text) in &fences {
        fs::write(fence, text).unwrap();
        mount(Some(fence), fence, none, MsFlags::MS_BIND, none).unwrap();
    }
    let journal = open(dir.path());
    assert!(fences.iter().all(|(fence, _)| fence.exists()), "it only refuses");
    journal.forget(&container()).unwrap();
    assert_eq!(journal.container(&container()).unwrap(), None);
    drop(journal);
    fences.iter().for_each(|(fence, _)| umount(fence).unwrap());
    drop(open(dir.path()));
    assert!(fences.iter().all(|(fence, _)| !fence.exists()));
}

/// Method: a release stops before either of its steps, and a return between its two.
#[test]
fn fence_and_journal_agree_on_open_wherever_the_daemon_died() {
    let offer = Event::Offer("edge-b/default/cache".into(), Epoch(0));
    for step in ["release 1", "release 2", "return 2"] {
        let dir = tempfile::tempdir().unwrap();
        let fence = dir.path().join("fences/default/cache");
        let journal = open(dir.path());
        journal.apply(&container(), &offer, |_| {}).unwrap();
        if step == "return 2" {
            journal.apply(&container(), &Event::Release(Epoch(1)), |_| {}).unwrap();
            let returned = Event::Returned(Epoch(1));
            stop_before(step, || journal.apply(&container(), &returned, |_| {}));
        } else {
            let release = Event::Release(Epoch(1));
            stop_before(step, || journal.apply(&container(), &release, |_| {}));
        }
        assert_eq!(fence.exists(), step != "release 1", "{step}");
        drop(journal);
        let journal = open(dir.path());
        assert!(!fence.exists(), "{step}");
        let entry = journal.container(&container()).unwrap().unwrap();
        assert!(!matches!(entry.ownership, Ownership::Released(..)), "{step}: {entry:?}");
    }
}

#[test]
fn a_volumes_entry_is_this_text_and_those_from_before_block_volumes_are_trees() {
    let block =
        r#"{"moved_to":null,"arriving":{"container":"d/c","session":"1"},"file_system":"ext4"}"#;
    let entry: VolumeEntry = serde_json::from_str(block).unwrap();
    assert_eq!(entry.file_system, Some(FileSystem::Ext4));
    assert_eq!(serde_json::to_string(&entry).unwrap(), block);
    let tree: VolumeEntry = serde_json::from_str(r#"{"moved_to":null}"#).unwrap();
    assert_eq!(tree, VolumeEntry::default());
}

#[test]
fn an_event_out_of_phase_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let journal = open(dir.path());
    let refused = journal.apply(&container(), &Event::Release(Epoch(1)), |_| {});
    assert!(matches!(refused, Err(JournalError::OutOfPhase { .. })));
    assert_eq!(journal.containers().unwrap(), []);
}

#[test]
fn an_annotation_is_spent_only_by_tasks_that_ran() {
    let dir = tempfile::tempdir().unwrap();
    let journal = open(dir.path());
    let from = "edge-a/default/cache";
    journal
        .apply(&container(), &Event::Claim(Epoch(4), "edge-a".into()), |entry| {
            entry.migrate_from = Some(from.into());
        })
        .unwrap();
    let has_spent = || journal.container(&container()).unwrap().unwrap().has_spent(from);
    journal.apply(&container(), &Event::Granted(Epoch(4)), |_| {}).unwrap();
    assert!(!has_spent());
    journal.apply(&container(), &Event::Ran(Epoch(4)), |_| {}).unwrap();
    assert!(has_spent());
}

#[test]
fn an_outcome_outlives_the_container_and_its_epoch_is_not_used_again() {
    let dir = tempfile::tempdir().unwrap();
    let journal = open(dir.path());
    let other = ContainerRef::new("default", "cache2").unwrap();
    let offer = || Event::Offer("edge-b/default/cache".into(), Epoch(0));
    assert_eq!(journal.apply(&other, &offer(), |_| {}).unwrap(), Epoch(1));
    journal.apply(&container(), &offer(), |_| {}).unwrap();
    journal.apply(&container(), &Event::Release(Epoch(1)), |_| {}).unwrap();
    journal.apply(&container(), &Event::LetGo(Epoch(1)), |_| {}).unwrap();
    journal.forget(&container()).unwrap();
    drop(journal);
    let journal = open(dir.path());
    assert_eq!(journal.container(&container()).unwrap(), None);
    let fate = |peer| journal.ledger(&container()).unwrap().fate(Epoch(1), peer);
    assert_eq!(fate("edge-b/default/cache"), Fate::Released);
    assert_eq!(fate("edge-c/default/cache"), Fate::Unknown);
    assert_eq!(journal.ledger(&other).unwrap().ended.len(), 0, "a name that only begins alike");
    // Long after, nothing is known of it, but its epoch.
    journal.expire(i64::MAX).unwrap();
    assert_eq!(journal.tombstones().unwrap(), []);
    assert_eq!(journal.apply(&container(), &offer(), |_| {}).unwrap(), Epoch(2));
}

/// Method: as after a write that failed; then the file is gone, and then it is there again.
#[test]
fn a_journal_that_failed_is_opened_again_and_never_made_anew() {
    let dir = tempfile::tempdir().unwrap();
    let journal = open(dir.path());
    let offer = Event::Offer("edge-b/default/cache".into(), Epoch(0));
    journal.apply(&container(), &offer, |_| {}).unwrap();
    let fail = || journal.database.fail("the disk is full");
    fail();
    journal.apply(&container(), &Event::Abort(Epoch(1)), |_| {}).unwrap();
    let (path, away) = (dir.path().join("node.redb"), dir.path().join("away"));
    fs::rename(&path, &away).unwrap();
    fail();
    assert!(journal.apply(&container(), &offer, |_| {}).is_err());
    assert!(journal.containers().is_err() && !path.exists());
    fs::rename(&away, &path).unwrap();
    assert_eq!(journal.apply(&container(), &offer, |_| {}).unwrap(), Epoch(2));
}

/// Method: the file is deleted, or emptied, beside a fence, and beside a volume.
#[test]
fn a_journal_that_is_gone_undoes_no_fence_and_forgets_no_volume() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |beside: &Path| {
        for is_empty in [false, true] {
            let path = dir.path().join("node.redb");
            if is_empty {
                fs::write(&path, "").unwrap();
            }
            let opened = Journal::open(&path, &dir.path().join("fences"));
            let found = matches!(opened, Err(JournalError::Missing { beside: found, .. }) if found == beside);
            assert!(found && beside.exists(), "{}", beside.display());
            let _ = fs::remove_file(path);
        }
    };
    for beside in ["fences/default/cache", "volumes/data/data"] {
        let beside = dir.path().join(beside);
        fs::create_dir_all(beside.parent().unwrap()).unwrap();
        fs::write(&beside, "moved to b, epoch 1").unwrap();
        refused(&beside);
        fs::remove_file(&beside).unwrap();
    }
    open(dir.path());
}

#[test]
fn a_second_daemon_on_the_same_journal_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let _first = open(dir.path());
    let second = Journal::open(&dir.path().join("node.redb"), &dir.path().join("fences"));
    assert!(matches!(second, Err(JournalError::Database { .. })));
}
