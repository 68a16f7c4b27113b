//! Semantics, error codes and crash points.
//!
//! The crash points stop a numbered procedure; then the state is opened again.

mod model;

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;

use super::tree::{TICK, few_inodes, is_untouched};
use super::*;
use godwit_disk::step::stop_before;

/// In memory if possible: what is tested is not the disk, and `commit` writes out the whole file
/// system.
fn scratch() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap()
}

pub(crate) fn fixture() -> (tempfile::TempDir, Snapshotter) {
    let dir = scratch();
    let snapshots = Snapshotter::open(dir.path()).unwrap();
    (dir, snapshots)
}

fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

/// Runs `work` while a change is under way.
pub(crate) fn holding_a_change(snapshots: &Snapshotter, work: impl FnOnce()) {
    let _change = snapshots.metadata.begin().unwrap();
    work();
}

pub(crate) fn none() -> BTreeMap<String, String> {
    BTreeMap::new()
}

/// A committed snapshot whose tree holds one file of that name.
pub(crate) fn layer(snapshots: &Snapshotter, name: &str, parent: Option<&str>) {
    let key = format!("extract {name}");
    let mounts = snapshots.prepare(&key, parent, none()).unwrap();
    fs::write(upper_of(&mounts[0]).join(name), name).unwrap();
    snapshots.commit(name, &key, none()).unwrap();
}

fn upper_of(mount: &Mount) -> PathBuf {
    let upper = mount.options.iter().find_map(|option| option.strip_prefix("upperdir="));
    PathBuf::from(upper.unwrap_or(&mount.source))
}

/// Names of the directories in `fs/`, sorted.
fn trees(dir: &Path) -> Vec<String> {
    let mut names = tree_names(&dir.join("fs")).unwrap();
    names.retain(|name| name != ".spare");
    names.sort();
    names
}

#[test]
fn one_tree_is_bound_and_several_are_overlaid() {
    let (dir, snapshots) = fixture();
    let fs = |number: u64| dir.path().join(format!("fs/{number}/fs")).display().to_string();
    let bind = |number, mode: &str| {
        let options = vec![mode.to_owned(), "rbind".to_owned()];
        let (r#type, target) = ("bind".to_owned(), String::new());
        vec![Mount { r#type, source: fs(number), target, options }]
    };

    assert_eq!(snapshots.prepare("extract a", None, none()).unwrap(), bind(1, "rw"));
    snapshots.commit("a", "extract a", none()).unwrap();
    assert_eq!(snapshots.view("empty", None, none()).unwrap(), bind(2, "ro"));
    assert_eq!(snapshots.view("view a", Some("a"), none()).unwrap(), bind(1, "ro"));

    layer(&snapshots, "b", Some("a"));
    let over = snapshots.prepare("c", Some("b"), none()).unwrap();
    let work = dir.path().join("fs/5/work").display().to_string();
    let lower = format!("lowerdir={}:{}", fs(4), fs(1));
    assert_eq!((over[0].r#type.as_str(), over[0].source.as_str()), ("overlay", "overlay"));
    let own = vec![format!("workdir={work}"), format!("upperdir={}", fs(5)), lower.clone()];
    assert_eq!(over[0].options, [own, overlay_options()].concat());
    assert_eq!(snapshots.mounts("c").unwrap(), over);
    let view = snapshots.view("view b", Some("b"), none()).unwrap();
    assert_eq!(view[0].options, [vec![lower], overlay_options()].concat());
}

#[test]
fn directories_have_the_modes_that_overlayfs_wants_and_the_parents_owner() {
    let (dir, snapshots) = fixture();
    snapshots.prepare("x", None, none()).unwrap();
    let mode = |path: &str| fs::metadata(dir.path().join(path)).unwrap().mode() & 0o7777;
    assert_eq!((mode("fs/1/fs"), mode("fs/1/work"), mode("fs/1")), (0o755, 0o711, 0o700));
    if nix::unistd::geteuid().is_root() {
        lchown(dir.path().join("fs/1/fs"), Some(1000), Some(1001)).unwrap();
        snapshots.commit("mapped", "x", none()).unwrap();
        snapshots.prepare("y", Some("mapped"), none()).unwrap();
        let owner = fs::metadata(dir.path().join("fs/2/fs")).unwrap();
        assert_eq!((owner.uid(), owner.gid()), (1000, 1001));
    }
}

#[test]
fn an_id_mapping_must_say_who_root_is() {
    let root = |uids: &str, gids: &str| {
        let keys = ["containerd.io/snapshot/uidmapping", "containerd.io/snapshot/gidmapping"];
        let given = [(keys[0], uids), (keys[1], gids)];
        let given: Vec<_> = given.into_iter().filter(|(_, text)| !text.is_empty()).collect();
        mapped_root(&labels(&given))
    };
    assert!(matches!(root("", ""), Ok(None)));
    assert!(matches!(root("0:1000:65536", "0:2000:1"), Ok(Some((1000, 2000)))));
    assert!(matches!(root("5:1:1,0:1000:5", "0:2000:1"), Ok(Some((1000, 2000)))));
    for bad in ["0", "0:1000", "0:x:1", "0:1000:0", "1:1000:5", "0:1000:1,", "0:4294967296:1", ","]
    {
        let refused = |found| matches!(found, Err(SnapshotError::IdMapping(_)));
        assert!(refused(root(bad, "0:2000:1")) && refused(root("0:1000:1", bad)), "{bad}");
    }
    assert!(matches!(root("0:1000:1", ""), Err(SnapshotError::IdMapping(_))));
}

#[test]
fn a_commit_replaces_the_key_by_the_name_and_the_labels() {
    let (_dir, snapshots) = fixture();
    snapshots.prepare("key", None, labels(&[("containerd.io/gc.root", "now")])).unwrap();
    assert_eq!(snapshots.stat("key").unwrap().labels.len(), 1);
    let given = labels(&[("containerd.io/gc.ref.snapshot.godwit", "x"), ("empty", "")]);
    snapshots.commit("name", "key", given.clone()).unwrap();
    assert!(matches!(snapshots.stat("key"), Err(SnapshotError::NotFound(_))));
    let info = snapshots.stat("name").unwrap();
    assert_eq!((info.kind, info.parent), (Kind::Committed, None));
    assert_eq!(info.labels, labels(&[("containerd.io/gc.ref.snapshot.godwit", "x")]));
    assert_eq!(info.created, info.updated);
    // The key is free again.
    snapshots.prepare("key", Some("name"), none()).unwrap();
}

#[test]
fn labels_are_updated_whole_or_one_by_one_and_nothing_else_is() {
    let (_dir, snapshots) = fixture();
    let before = snapshots.prepare("x", None, labels(&[("a", "1"), ("b", "2")]));
    assert!(before.is_ok());
    let created = snapshots.stat("x").unwrap().created;
    let update = |given: &[(&str, &str)], fields: &[&str]| {
        let fields: Vec<_> = fields.iter().map(|field| (*field).to_owned()).collect();
        snapshots.update("x", labels(given), &fields).map(|info| info.labels)
    };
    let one = update(&[("b", "3"), ("c", "4"), ("d", "5")], &["labels.b", "labels.c"]).unwrap();
    assert_eq!(one, labels(&[("a", "1"), ("b", "3"), ("c", "4")]));
    let gone = update(&[("a", "")], &["labels.a", "labels.b"]).unwrap();
    assert_eq!(gone, labels(&[("c", "4")]));
    assert_eq!(update(&[("z", "1")], &[]).unwrap(), labels(&[("z", "1")]));
    assert_eq!(update(&[("y", "1")], &["labels"]).unwrap(), labels(&[("y", "1")]));
    assert!(matches!(update(&[], &["labels", "parent"]), Err(SnapshotError::Immutable { .. })));
    let info = snapshots.stat("x").unwrap();
    assert_eq!(info.labels, labels(&[("y", "1")]));
    assert!(info.created == created && info.updated >= created);
}

#[test]
fn usage_is_of_the_own_tree_now_or_at_the_commit() {
    let (dir, snapshots) = fixture();
    layer(&snapshots, "a", None);
    let mounts = snapshots.prepare("x", Some("a"), none()).unwrap();
    let empty = snapshots.usage("x").unwrap();
    assert_eq!(empty.inodes, 1);
    fs::write(upper_of(&mounts[0]).join("f"), vec![7; 40960]).unwrap();
    let full = snapshots.usage("x").unwrap();
    assert_eq!(full.inodes, 2);
    assert!(full.size_bytes >= empty.size_bytes + 40960);
    snapshots.commit("b", "x", none()).unwrap();
    fs::write(dir.path().join("fs/2/fs/later"), "later").unwrap();
    assert_eq!(snapshots.usage("b").unwrap(), full);
    snapshots.view("v", Some("b"), none()).unwrap();
    assert_eq!(snapshots.usage("v").unwrap(), Usage::default());
}

#[test]
fn removal_frees_the_directory_and_numbers_are_not_used_again() {
    let (dir, snapshots) = fixture();
    layer(&snapshots, "a", None);
    snapshots.prepare("x", Some("a"), none()).unwrap();
    let error = snapshots.remove("a").unwrap_err();
    assert!(matches!(error, SnapshotError::HasChildren(_)), "{error}");
    // The words of containerd's own snapshotters (`core/snapshots/storage/bolt.go`).
    assert!(error.to_string().starts_with("cannot remove snapshot with child: \"a\""), "{error}");
    snapshots.remove("x").unwrap();
    snapshots.remove("a").unwrap();
    assert!(snapshots.list(&[]).unwrap().is_empty());
    snapshots.cleanup().unwrap();
    assert!(trees(dir.path()).is_empty());
    drop(snapshots);
    let snapshots = Snapshotter::open(dir.path()).unwrap();
    assert!(snapshots.list(&[]).unwrap().is_empty());
    snapshots.prepare("x", None, none()).unwrap();
    assert_eq!(trees(dir.path()), ["3"]);
}

/// Method: the lock is held for a while, as by a killed process that the disk keeps waiting.
#[test]
fn opening_waits_for_a_daemon_that_is_ending() {
    let dir = scratch();
    let lock = File::create(dir.path().join("lock")).unwrap();
    lock.lock().unwrap();
    let ending = std::thread::spawn(move || {
        std::thread::sleep(LOCK_WAIT / 10);
        drop(lock);
    });
    Snapshotter::open(dir.path()).unwrap();
    ending.join().unwrap();
}

#[test]
fn everything_is_there_after_reopening() {
    let (dir, snapshots) = fixture();
    layer(&snapshots, "a", None);
    layer(&snapshots, "b", Some("a"));
    let mounts = snapshots.prepare("x", Some("b"), labels(&[("k", "v")])).unwrap();
    let before = snapshots.list(&[]).unwrap();
    let usage = snapshots.usage("b").unwrap();
    drop(snapshots);
    let snapshots = Snapshotter::open(dir.path()).unwrap();
    assert_eq!(snapshots.list(&[]).unwrap(), before);
    assert_eq!(snapshots.mounts("x").unwrap(), mounts);
    assert_eq!(snapshots.usage("b").unwrap(), usage);
    assert_eq!(snapshots.list(&["kind==active".to_owned()]).unwrap(), before[2..]);
}

#[test]
fn a_second_daemon_is_refused_until_the_first_is_gone() {
    let (dir, snapshots) = fixture();
    assert!(matches!(Snapshotter::open(dir.path()), Err(OpenError::Locked(_))));
    drop(snapshots);
    Snapshotter::open(dir.path()).unwrap();
}

#[test]
fn a_path_that_overlayfs_would_misread_is_refused() {
    let dir = scratch();
    for name in ["a:b", "a,b", "a\\b"] {
        let opened = Snapshotter::open(&dir.path().join(name));
        assert!(matches!(opened, Err(OpenError::Path(_))), "{name}");
    }
}

/// Method: a state with one layer; its database truncated, overwritten here and there, emptied,
/// deleted.
#[test]
fn a_damaged_database_is_an_error_and_loses_nothing() {
    let (dir, snapshots) = fixture();
    layer(&snapshots, "a", None);
    drop(snapshots);
    let path = metadata::path_in(dir.path());
    let good = fs::read(&path).unwrap();
    let file = dir.path().join("fs/1/fs/a");
    let refused = |what: &str| {
        let error = Snapshotter::open(dir.path()).expect_err(what);
        assert!(error.to_string().contains("metadata.redb"), "{what}: {error}");
        assert!(file.exists(), "{what}");
    };

    let mut garbage = good.clone();
    garbage[..64].fill(0xa5);
    for (what, bytes) in [("empty", &b""[..]), ("cut", &good[..100]), ("garbage", &garbage)] {
        fs::write(&path, bytes).unwrap();
        refused(what);
        assert_eq!(fs::read(&path).unwrap(), bytes, "{what} was changed");
    }
    fs::remove_file(&path).unwrap();
    refused("missing");
    assert!(!path.exists());

    // One flipped byte anywhere is either refused or in a page that is not used; the layer stays.
    for offset in (0..good.len()).step_by(509) {
        let mut flipped = good.clone();
        flipped[offset] ^= 0x40;
        fs::write(&path, &flipped).unwrap();
        if let Ok(snapshots) = Snapshotter::open(dir.path()) {
            assert_eq!(snapshots.list(&[]).unwrap().len(), 1, "offset {offset}");
        }
        assert!(file.exists(), "offset {offset}");
    }
    fs::write(&path, &good).unwrap();
    Snapshotter::open(dir.path()).unwrap().stat("a").unwrap();
}

#[test]
fn a_first_start_that_stops_anywhere_can_be_repeated() {
    for step in ["create 1", "create 2", "create 3"] {
        let dir = scratch();
        stop_before(step, || Snapshotter::open(dir.path()));
        let snapshots = Snapshotter::open(dir.path()).unwrap();
        layer(&snapshots, "a", None);
        assert!(!dir.path().join("metadata.redb.new").exists(), "{step}");
    }
}

#[test]
fn a_prepare_that_stops_anywhere_never_happened() {
    for step in ["add 1", "add 2"] {
        let (dir, snapshots) = fixture();
        layer(&snapshots, "a", None);
        stop_before(step, || snapshots.prepare("x", Some("a"), none()));
        drop(snapshots);
        let snapshots = Snapshotter::open(dir.path()).unwrap();
        assert!(matches!(snapshots.stat("x"), Err(SnapshotError::NotFound(_))), "{step}");
        assert_eq!(trees(dir.path()), ["1"], "{step}");
        snapshots.prepare("x", Some("a"), none()).unwrap();
        snapshots.remove("x").unwrap();
        snapshots.remove("a").unwrap();
    }
}

/// Method: directories are gone that the database names, as after a power cut.
#[test]
fn what_the_file_system_had_not_written_is_made_anew_but_never_a_layer() {
    let (dir, snapshots) = fixture();
    layer(&snapshots, "a", None);
    let above = snapshots.prepare("x", Some("a"), none()).unwrap();
    snapshots.view("v", Some("a"), none()).unwrap();
    layer(&snapshots, "b", None);
    drop(snapshots);
    for number in [2, 3, 4] {
        fs::remove_dir_all(dir.path().join(format!("fs/{number}"))).unwrap();
    }
    let snapshots = Snapshotter::open(dir.path()).unwrap();
    assert_eq!(trees(dir.path()), ["1", "2", "3"]);
    assert_eq!(snapshots.mounts("x").unwrap(), above);
    let mode = |path: &str| fs::metadata(dir.path().join(path)).unwrap().mode() & 0o7777;
    assert_eq!((mode("fs/2/fs"), mode("fs/2/work"), mode("fs/2")), (0o755, 0o711, 0o700));
    assert!(snapshots.check().unwrap().1[0].contains("fs/4/fs"), "a lost layer is reported");
    // Without the layer below, it is unknown whose the directory above it was.
    drop(snapshots);
    for number in [1, 2] {
        fs::remove_dir_all(dir.path().join(format!("fs/{number}"))).unwrap();
    }
    let snapshots = Snapshotter::open(dir.path()).unwrap();
    assert_eq!((trees(dir.path()), snapshots.check().unwrap().1.len()), (vec!["3".into()], 3));
}

/// Method: `work` goes, once while the snapshots are open; what was written beside it stays.
#[test]
fn a_work_directory_that_is_missing_is_told_and_made_anew() {
    let (dir, snapshots) = fixture();
    snapshots.prepare("x", None, none()).unwrap();
    let [work, file] = ["fs/1/work", "fs/1/fs/file"].map(|path| dir.path().join(path));
    fs::write(&file, "of a container").unwrap();
    fs::remove_dir(&work).unwrap();
    let found = snapshots.check().unwrap().1;
    assert!(found.len() == 1 && found[0].contains("fs/1/work"), "{found:?}");
    snapshots.mend().unwrap();
    assert_eq!(snapshots.check().unwrap(), (1, Vec::new()));
    fs::remove_dir(&work).unwrap();
    drop(snapshots);
    let snapshots = Snapshotter::open(dir.path()).unwrap();
    assert_eq!(snapshots.check().unwrap(), (1, Vec::new()));
    assert_eq!(fs::metadata(&work).unwrap().mode() & 0o7777, 0o711);
    // A file in its place cannot be helped, and costs nothing else.
    drop(snapshots);
    fs::remove_dir(&work).unwrap();
    fs::write(&work, "").unwrap();
    let snapshots = Snapshotter::open(dir.path()).unwrap();
    assert_eq!(snapshots.check().unwrap().1.len(), 1);
    assert_eq!(fs::read_to_string(&file).unwrap(), "of a container");
}

#[test]
fn a_commit_that_stops_anywhere_leaves_it_active() {
    for step in ["commit 1", "commit 2"] {
        let (dir, snapshots) = fixture();
        snapshots.prepare("x", None, none()).unwrap();
        stop_before(step, || snapshots.commit("a", "x", none()));
        drop(snapshots);
        let snapshots = Snapshotter::open(dir.path()).unwrap();
        assert_eq!(snapshots.stat("x").unwrap().kind, Kind::Active, "{step}");
        assert!(matches!(snapshots.stat("a"), Err(SnapshotError::NotFound(_))), "{step}");
        snapshots.commit("a", "x", none()).unwrap();
    }
}

#[test]
fn a_layer_that_lost_its_directory_is_put_back_or_still_lost() {
    for step in ["", "put back 1", "put back 2", "put back 3", "put back 4"] {
        let (dir, snapshots) = fixture();
        layer(&snapshots, "a", None);
        layer(&snapshots, "b", Some("a"));
        assert!(snapshots.lost().unwrap().is_empty());
        fs::remove_dir_all(dir.path().join("fs/1")).unwrap();
        fs::remove_dir_all(dir.path().join("fs/2/fs")).unwrap();
        let names = |infos: Vec<Info>| infos.into_iter().map(|one| one.name).collect::<Vec<_>>();
        assert_eq!(names(snapshots.lost().unwrap()), ["a", "b"]);
        snapshots.prepare("again", None, none()).unwrap();
        fs::write(dir.path().join("fs/3/fs/file"), "content").unwrap();
        if step.is_empty() {
            snapshots.put_back("a", "again").unwrap();
        } else {
            stop_before(step, || snapshots.put_back("a", "again"));
        }
        drop(snapshots);
        let snapshots = Snapshotter::open(dir.path()).unwrap();
        let is_back = ["", "put back 3", "put back 4"].contains(&step);
        let lost = names(snapshots.lost().unwrap());
        assert_eq!(lost, if is_back { vec!["b"] } else { vec!["a", "b"] }, "{step}");
        assert_eq!(snapshots.stat("again").is_ok(), !step.is_empty(), "{step}");
        if is_back {
            assert_eq!(fs::read(dir.path().join("fs/1/fs/file")).unwrap(), b"content");
            let again = snapshots.prepare("more", None, none());
            let refused = again.and_then(|_| snapshots.put_back("a", "more"));
            assert!(matches!(refused, Err(SnapshotError::AlreadyExists(_))), "{step}");
            let number = snapshots.metadata.get("more").unwrap().number;
            fs::remove_dir_all(snapshots.tree(number)).unwrap();
            snapshots.prepare("other", None, none()).unwrap();
            let refused = snapshots.put_back("more", "other");
            assert!(matches!(refused, Err(SnapshotError::AlreadyExists(_))), "{step}");
        } else {
            snapshots.put_back("a", "again").unwrap();
            assert_eq!(fs::read(dir.path().join("fs/1/fs/file")).unwrap(), b"content");
        }
    }
}

/// Method: what a process that was killed leaves is copied, since this one goes on.
fn killed(dir: &Path) -> (tempfile::TempDir, Snapshotter) {
    fn copy(from: &Path, to: &Path) {
        for entry in fs::read_dir(from).unwrap() {
            let (from, to) = (entry.as_ref().unwrap().path(), to.join(entry.unwrap().file_name()));
            if from.is_dir() {
                fs::create_dir(&to).unwrap();
                copy(&from, &to);
            } else {
                fs::copy(&from, &to).unwrap();
            }
        }
    }
    let left = scratch();
    copy(dir, left.path());
    let snapshots = Snapshotter::open(left.path()).unwrap();
    (left, snapshots)
}

#[test]
fn a_removal_that_stops_is_either_not_begun_or_finished_on_open() {
    for (step, remaining) in [("remove 1", 1), ("cleanup 2", 0), ("cleanup 3", 0)] {
        let (dir, snapshots) = fixture();
        layer(&snapshots, "a", None);
        let all = || snapshots.remove("a").and_then(|()| snapshots.cleanup());
        stop_before(step, all);
        assert_eq!(trees(dir.path()), ["1"], "{step}");
        let (left, snapshots) = killed(dir.path());
        assert_eq!(snapshots.list(&[]).unwrap().len(), remaining, "{step}");
        assert_eq!(trees(left.path()).len(), remaining, "{step}");
    }
}

/// Prepares and removals do not wait for the disk, but the kernel has them when they return.
#[test]
fn nothing_that_returned_is_lost_by_a_kill() {
    let (dir, snapshots) = fixture();
    layer(&snapshots, "a", None);
    snapshots.prepare("x", Some("a"), labels(&[("k", "v")])).unwrap();
    snapshots.view("v", Some("a"), none()).unwrap();
    let infos = snapshots.list(&[]).unwrap();
    assert_eq!(killed(dir.path()).1.list(&[]).unwrap(), infos);
    snapshots.remove("v").unwrap();
    let infos = snapshots.list(&[]).unwrap();
    assert_eq!(killed(dir.path()).1.list(&[]).unwrap(), infos);
}

#[test]
fn few_files_are_written_out_one_by_one_and_many_or_those_of_other_kinds_at_once() {
    let (dir, snapshots) = fixture();
    snapshots.prepare("x", None, none()).unwrap();
    let upper = dir.path().join("fs/1/fs");
    fs::create_dir_all(upper.join("a/b")).unwrap();
    fs::write(upper.join("a/b/file"), "content").unwrap();
    assert_eq!(few_inodes(&upper).unwrap().unwrap().len(), 4);
    snapshots.commit("layer", "x", none()).unwrap();
    assert_eq!(snapshots.usage("layer").unwrap().inodes, 4);

    snapshots.prepare("y", None, none()).unwrap();
    let upper = dir.path().join("fs/2/fs");
    for number in 0..15 {
        assert!(few_inodes(&upper).unwrap().is_some());
        fs::write(upper.join(number.to_string()), "").unwrap();
    }
    fs::create_dir(upper.join("one more")).unwrap();
    assert_eq!(few_inodes(&upper).unwrap(), None);
    snapshots.commit("many", "y", none()).unwrap();
    assert_eq!(snapshots.usage("many").unwrap().inodes, 17);
    assert!(write_out(&upper.join("missing"), SystemTime::now()).is_err());

    for (number, kind) in ["link", "pipe", "socket"].into_iter().enumerate() {
        snapshots.prepare(kind, None, none()).unwrap();
        let upper = dir.path().join(format!("fs/{}/fs", number + 3));
        let path = upper.join(kind);
        match kind {
            "link" => std::os::unix::fs::symlink("/nowhere", path).unwrap(),
            "pipe" => nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRUSR).unwrap(),
            _ => drop(std::os::unix::net::UnixListener::bind(path).unwrap()),
        }
        assert_eq!(few_inodes(&upper).unwrap(), None, "{kind}");
        snapshots.commit(&format!("of {kind}"), kind, none()).unwrap();
        assert_eq!(snapshots.usage(&format!("of {kind}")).unwrap().inodes, 2, "{kind}");
    }
}

/// Method: all that an unpacker may do to a layer's own directory, also what leaves no entry, or
/// the value from before.
#[test]
fn a_directory_is_untouched_only_if_nothing_was_done_to_it() {
    let (dir, snapshots) = fixture();
    snapshots.prepare("first", None, none()).unwrap();
    let names = ["nothing", "entry", "mode", "owner", "attribute", "time", "other owner"];
    for (number, name) in names.into_iter().enumerate() {
        // Some wait, and have done so for more than a tick.
        while snapshots.spares.is_empty() {
            std::thread::yield_now();
        }
        std::thread::sleep(3 * TICK);
        let owned = [
            ("containerd.io/snapshot/uidmapping", "0:7:1"),
            ("containerd.io/snapshot/gidmapping", "0:7:1"),
        ];
        let wanted = if name == "other owner" { labels(&owned) } else { none() };
        snapshots.prepare(name, None, wanted).unwrap();
        let upper = dir.path().join(format!("fs/{}/fs", number + 2));
        let owner = |id| lchown(&upper, Some(id), Some(id)).unwrap();
        let mode = |mode| fs::set_permissions(&upper, Permissions::from_mode(mode)).unwrap();
        let (file, key) = (upper.join("file"), "trusted.overlay.opaque");
        match name {
            "entry" => fs::write(&file, "").and_then(|()| fs::remove_file(&file)).unwrap(),
            "mode" => [0o700, 0o755].into_iter().for_each(mode),
            "owner" => [7, 0].into_iter().for_each(owner),
            "attribute" => {
                xattr::set(&upper, key, b"y").and_then(|()| xattr::remove(&upper, key)).unwrap();
            }
            "time" => File::open(&upper).unwrap().set_modified(SystemTime::UNIX_EPOCH).unwrap(),
            _ => (),
        }
        let since = snapshots.stat(name).unwrap().created;
        assert_eq!(is_untouched(&upper, since).unwrap(), name == "nothing", "{name}");
        assert!(!is_untouched(&upper, since - 10 * TICK - Duration::from_secs(10)).unwrap());
        snapshots.commit(&format!("layer {name}"), name, none()).unwrap();
    }
}

#[test]
fn a_prepare_that_fails_on_disk_leaves_no_trace_and_does_not_stand_in_the_way() {
    let (dir, snapshots) = fixture();
    layer(&snapshots, "a", None);
    fs::rename(dir.path().join("fs/1"), dir.path().join("fs/away")).unwrap();
    let failed = snapshots.prepare("x", Some("a"), none());
    assert!(matches!(failed, Err(SnapshotError::Io { what: "look at", .. })), "{failed:?}");
    assert_eq!(trees(dir.path()), ["away"]);
    fs::rename(dir.path().join("fs/away"), dir.path().join("fs/1")).unwrap();
    snapshots.prepare("x", Some("a"), none()).unwrap();
    assert_eq!(trees(dir.path()), ["1", "3"]);
}

#[test]
fn cleanup_deletes_our_orphans_and_nothing_else() {
    let (dir, snapshots) = fixture();
    layer(&snapshots, "a", None);
    for name in ["7/fs", "lost+found", "007"] {
        fs::create_dir_all(dir.path().join("fs").join(name)).unwrap();
    }
    snapshots.cleanup().unwrap();
    assert_eq!(trees(dir.path()), ["007", "1", "lost+found"]);
}

#[test]
fn a_cleanup_that_stops_is_done_again_on_open() {
    let (dir, snapshots) = fixture();
    layer(&snapshots, "a", None);
    for name in ["7/fs", "9/fs"] {
        fs::create_dir_all(dir.path().join("fs").join(name)).unwrap();
    }
    stop_before("cleanup 3", || snapshots.cleanup());
    assert_eq!(trees(dir.path()), ["1", "7", "9"]);
    drop(snapshots);
    Snapshotter::open(dir.path()).unwrap();
    assert_eq!(trees(dir.path()), ["1"]);
}
