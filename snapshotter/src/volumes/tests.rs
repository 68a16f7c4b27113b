//! Volumes come, are looked at and go; and stop at every step on the way.

use std::os::unix::fs::MetadataExt as _;

use nix::mount::{MsFlags, mount, umount};
use rustix::fs::{IFlags, ioctl_setflags};

use super::*;
use godwit_disk::step::stop_before;

fn open(dir: &Path) -> Volumes {
    let journal = Journal::open(&dir.join("node.redb"), &dir.join("fences")).unwrap();
    let store = Store::open(&dir.join("store"), crate::store::Options::default()).unwrap();
    Volumes::open(dir, journal, store).unwrap()
}

fn arriving(container: &ContainerRef) -> Arriving {
    Arriving { container: container.to_string(), session: "session".to_owned() }
}

fn named(id: &str) -> VolumeSource {
    id.parse().unwrap()
}

#[test]
fn a_volume_that_moved_is_neither_here_nor_overwritten_by_create() {
    let dir = tempfile::tempdir().unwrap();
    let volumes = open(dir.path());
    let id: VolumeId = "data".parse().unwrap();
    let path = volumes.create(&id, Shape::Tree).unwrap();
    fs::write(path.join("f"), b"x").unwrap();
    assert!(matches!(volumes.create(&id, Shape::Tree), Err(VolumeError::Exists(_))));
    volumes.give_away(&id, "edge-b").unwrap().delete();
    assert!(!path.exists());
    let error = volumes.path(&named("data"), false).unwrap_err();
    assert!(error.to_string().contains("edge-b"), "{error}");
    assert!(matches!(volumes.create(&id, Shape::Tree), Err(VolumeError::Moved { .. })));
    let staged = dir.path().join("staged");
    fs::create_dir(&staged).unwrap();
    let container = ContainerRef::new("default", "cache").unwrap();
    volumes.install(&id, (&staged, None), &arriving(&container)).unwrap();
    volumes.may_receive(&id).expect("what never ran here is replaced");
    volumes.arrived(&container).unwrap();
    assert_eq!(volumes.path(&named("data"), false).unwrap(), path);
    assert!(matches!(volumes.may_receive(&id), Err(VolumeError::Exists(_))));
}

/// Method: as after an older journal was restored, which has a volume that is in use as arriving.
#[test]
fn a_volume_without_a_session_s_mark_is_not_removed_whatever_the_journal_says() {
    let dir = tempfile::tempdir().unwrap();
    let volumes = open(dir.path());
    let (id, container) = ("data".parse().unwrap(), ContainerRef::new("default", "cache").unwrap());
    let staged = dir.path().join("staged");
    fs::create_dir(&staged).unwrap();
    volumes.install(&id, (&staged, None), &arriving(&container)).unwrap();
    let other = volumes.uninstall(&id, "another").unwrap_err();
    assert!(matches!(other, VolumeError::NotMarked { .. }), "{other}");
    assert_eq!(volumes.arriving_by("session").unwrap(), std::slice::from_ref(&id));
    let older = volumes.journal.volume(&id).unwrap();
    volumes.arrived(&container).unwrap();
    assert!(volumes.arriving_by("session").unwrap().is_empty());

    volumes.journal.set_volume(&id, older.as_ref()).unwrap();
    let kept = volumes.uninstall(&id, "session").unwrap_err();
    assert!(matches!(kept, VolumeError::NotMarked { .. }), "{kept}");
    assert!(matches!(volumes.may_receive(&id), Err(VolumeError::Exists(_))));
    fs::create_dir(&staged).unwrap();
    volumes.install(&id, (&staged, None), &arriving(&container)).unwrap_err();
    assert!(volumes.path(&named("data"), false).unwrap().exists());
    volumes.arrived(&container).unwrap();
    volumes.give_away(&id, "edge-b").unwrap().delete();
}

#[test]
fn the_same_content_has_the_same_name_and_is_only_read() {
    let dir = tempfile::tempdir().unwrap();
    let volumes = open(dir.path());
    let from = tempfile::tempdir().unwrap();
    fs::write(from.path().join("f"), b"content").unwrap();
    let digest = volumes.import(from.path()).unwrap();
    assert_eq!(volumes.import(from.path()).unwrap(), digest);
    let source = VolumeSource::Content(digest);
    drop(volumes);
    let volumes = open(dir.path());
    assert_eq!(volumes.contents().unwrap(), [digest].into());
    assert_eq!(volumes.list().unwrap()[0].path, Path::new(""), "it was not mounted yet");
    let path = volumes.path(&source, true).unwrap();
    assert_eq!(fs::read(path.join("f")).unwrap(), b"content");
    assert!(matches!(volumes.path(&source, false), Err(VolumeError::ReadOnly(_))));
    volumes.verify(&source).unwrap();
    let copy = dir.path().join("copy");
    volumes.export(&source, &copy).unwrap();
    assert_eq!(fs::read(copy.join("f")).unwrap(), b"content");
    assert!(matches!(volumes.export(&source, &copy), Err(VolumeError::NotEmpty(_))));
    fs::write(path.join("f"), b"changed").unwrap();
    assert!(matches!(volumes.verify(&source), Err(VolumeError::Damaged { .. })));
    volumes.remove(&source).unwrap();
    assert!(matches!(volumes.path(&source, true), Err(VolumeError::NoContent(_))));
}

#[test]
fn a_tar_archive_is_the_tree_that_it_unpacks_to() {
    let dir = tempfile::tempdir().unwrap();
    let volumes = open(dir.path());
    let tree = dir.path().join("tree");
    fs::create_dir_all(tree.join("below")).unwrap();
    fs::write(tree.join("below/file"), b"content").unwrap();
    fs::hard_link(tree.join("below/file"), tree.join("twice")).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", tree.join("link")).unwrap();
    let digest = volumes.import(&tree).unwrap();
    let tar = dir.path().join("tree.tar.gz");
    let packed = std::process::Command::new("tar")
        .args(["--create", "--gzip", "--format=posix", "--directory"])
        .args([&tree, Path::new("--file"), &tar, Path::new(".")])
        .status();
    assert!(packed.unwrap().success());
    assert_eq!(volumes.import(&tar).unwrap(), digest);
    fs::write(&tar, b"not an archive").unwrap();
    let error = volumes.import(&tar).unwrap_err();
    assert!(matches!(error, VolumeError::Program { program: "tar", .. }), "{error}");
    assert!(volumes.import(&dir.path().join("nowhere")).is_err());
    assert_eq!(fs::read_dir(dir.path().join("content")).unwrap().count(), 1, "nothing is left");
}

#[test]
fn a_block_volume_is_made_checked_copied_and_removed() {
    let dir = tempfile::tempdir().unwrap();
    let volumes = open(dir.path());
    let (id, source): (VolumeId, _) = ("data".parse().unwrap(), named("data"));
    let shape = Shape::Block(FileSystem::Ext4, 64 << 20);
    let path = volumes.create(&id, shape).unwrap();
    assert!(matches!(volumes.create(&id, Shape::Tree), Err(VolumeError::Exists(_))));
    assert_eq!(volumes.path(&source, false).unwrap(), path);
    assert_eq!(volumes.file_system(&source).unwrap(), Some(FileSystem::Ext4));
    let image = fs::metadata(&path).unwrap();
    assert_eq!((image.len(), image.mode() & 0o777), (64 << 20, 0o600));
    assert!(image.blocks() * 512 < 8 << 20, "{} blocks of a new file system", image.blocks());
    assert_eq!(volumes.list().unwrap()[0].image, Some((FileSystem::Ext4, 64 << 20)));
    volumes.verify(&source).unwrap();
    let copy = dir.path().join("copy");
    volumes.export(&source, &copy).unwrap();
    assert!(fs::read(copy.join("data.img")).unwrap() == fs::read(&path).unwrap());
    // The root directory's inode is not where the file system says.
    let file = fs::File::options().write(true).open(&path).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[0xff; 4096], 4096).unwrap();
    let error = volumes.verify(&source).unwrap_err();
    assert!(matches!(error, VolumeError::Program { program: "e2fsck", .. }), "{error}");
    volumes.remove(&source).unwrap();
    assert!(!path.exists());
    assert!(matches!(volumes.path(&source, false), Err(VolumeError::Unknown(_))));
}

#[test]
fn what_is_no_size_makes_no_volume() {
    let dir = tempfile::tempdir().unwrap();
    let volumes = open(dir.path());
    let id: VolumeId = "data".parse().unwrap();
    for bytes in [0, 4096, (64 << 20) + 1, (1 << 40) + 4096, u64::MAX] {
        let error = volumes.create(&id, Shape::Block(FileSystem::Ext4, bytes)).unwrap_err();
        assert!(matches!(error, VolumeError::Size(_)), "{error}");
        assert_eq!(volumes.list().unwrap().len(), 0);
    }
}

/// Method: more directories inside one another than a migration takes.
#[test]
fn a_tree_is_sound_as_long_as_it_can_be_moved() {
    let dir = tempfile::tempdir().unwrap();
    let volumes = open(dir.path());
    let path = volumes.create(&"data".parse().unwrap(), Shape::Tree).unwrap();
    fs::write(path.join("file"), "content").unwrap();
    volumes.verify(&named("data")).unwrap();
    fs::create_dir_all(path.join("d/".repeat(crate::content::capture::DEPTH_MAX + 1))).unwrap();
    let error = volumes.verify(&named("data")).unwrap_err();
    assert!(matches!(error, VolumeError::Content(ContentError::TooDeep(_))), "{error}");
}

#[test]
fn an_image_that_came_is_a_block_volume_here() {
    let dir = tempfile::tempdir().unwrap();
    let volumes = open(dir.path());
    let id: VolumeId = "data".parse().unwrap();
    let container = ContainerRef::new("default", "cache").unwrap();
    for name in ["first", "second"] {
        // The second replaces the first, which never came to run here.
        let staged = dir.path().join(name);
        fs::write(&staged, name).unwrap();
        volumes.install(&id, (&staged, Some(FileSystem::Xfs)), &arriving(&container)).unwrap();
    }
    volumes.arrived(&container).unwrap();
    assert_eq!(volumes.file_system(&named("data")).unwrap(), Some(FileSystem::Xfs));
    assert_eq!(fs::read(volumes.path(&named("data"), false).unwrap()).unwrap(), b"second");
    volumes.give_away(&id, "edge-b").unwrap().delete();
    assert_eq!(volumes.list().unwrap().len(), 0);
    assert_eq!(fs::read_dir(dir.path().join("trash")).unwrap().count(), 0);
}

#[test]
fn an_unknown_volume_is_named_with_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let error = open(dir.path()).path(&named("nosuch"), false).unwrap_err();
    assert_eq!(
        error.to_string(),
        "volume nosuch is not on this node; create it with `godwit volume create nosuch`"
    );
}

/// What is here after the daemon died and was started again: nothing but whole volumes that the
/// journal has.
fn reopened(dir: &Path) -> Volumes {
    let volumes = open(dir);
    assert_eq!(volumes.contradictions().unwrap(), [""; 0]);
    let names = |at: &str| -> Vec<String> {
        let entries = fs::read_dir(dir.join(at)).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    };
    assert_eq!(names("trash"), [""; 0]);
    for name in names("volumes") {
        let mut inside = names(&format!("volumes/{name}"));
        let entry = volumes.journal.volume(&name.parse().unwrap()).unwrap().unwrap();
        assert_eq!(inside.contains(&"arriving".to_owned()), entry.arriving.is_some(), "{name}");
        inside.retain(|file| file != "arriving");
        assert_eq!(inside, ["data"], "{name}");
    }
    let of_content = volumes.contents().unwrap();
    assert!(names("content").iter().all(|name| !name.ends_with(".tmp")));
    assert_eq!(volumes.list().unwrap().len(), names("volumes").len() + of_content.len());
    volumes
}

const PUT: [&str; 6] = ["put 1", "put 2", "put 3", "put 4", "put 5", "put 6"];
const REMOVE: [&str; 4] = ["remove 1", "remove 2", "remove 3", "remove 4"];

#[test]
fn a_creation_that_stops_anywhere_never_happened_or_is_finished_on_open() {
    let id: VolumeId = "data".parse().unwrap();
    for shape in [Shape::Tree, Shape::Block(FileSystem::Ext4, 16 << 20)] {
        for step in PUT {
            let dir = tempfile::tempdir().unwrap();
            let volumes = open(dir.path());
            stop_before(step, || volumes.create(&id, shape));
            drop(volumes);
            let volumes = reopened(dir.path());
            let is_here = volumes.path(&named("data"), false).is_ok_and(|path| path.exists());
            assert_eq!(is_here, step > "put 4", "{step}");
            assert_eq!(volumes.create(&id, shape).is_ok(), !is_here, "{step}");
            if shape != Shape::Tree {
                volumes.verify(&named("data")).unwrap();
            }
        }
    }
}

/// Method: twice, so that the second replaces what the first brought, which never ran here.
#[test]
fn an_arrival_that_stops_anywhere_leaves_the_old_volume_none_or_the_new_one() {
    let (id, container) = ("data".parse().unwrap(), ContainerRef::new("default", "cache").unwrap());
    let staged = |dir: &Path, text: &str| {
        fs::write(dir.join("staged"), text).unwrap();
        (dir.join("staged"), Some(FileSystem::Ext4))
    };
    for (at, step) in REMOVE.into_iter().chain(PUT).enumerate() {
        let dir = tempfile::tempdir().unwrap();
        let volumes = open(dir.path());
        let (path, kind) = staged(dir.path(), "first");
        volumes.install(&id, (&path, kind), &arriving(&container)).unwrap();
        let (path, kind) = staged(dir.path(), "second");
        stop_before(step, || volumes.install(&id, (&path, kind), &arriving(&container)));
        drop(volumes);
        let volumes = reopened(dir.path());
        let found = volumes.path(&named("data"), false).map(|path| fs::read(path).unwrap());
        match at {
            0..3 => assert_eq!(found.unwrap(), b"first", "{step}"),
            3..8 => assert!(matches!(found, Err(VolumeError::Unknown(_))), "{step}"),
            _ => assert_eq!(found.unwrap(), b"second", "{step}"),
        }
        // The session is begun again, or given up.
        let (path, kind) = staged(dir.path(), "third");
        volumes.install(&id, (&path, kind), &arriving(&container)).unwrap();
        volumes.uninstall(&id, "session").unwrap();
        drop(volumes);
        assert_eq!(reopened(dir.path()).list().unwrap().len(), 0, "{step}");
    }
}

/// Method: a volume that is removed, and one that moves away.
#[test]
fn a_removal_that_stops_anywhere_never_happened_or_is_finished_on_open() {
    let id: VolumeId = "data".parse().unwrap();
    for step in REMOVE {
        for moves in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let volumes = open(dir.path());
            let path = volumes.create(&id, Shape::Tree).unwrap();
            fs::write(path.join("row"), "1").unwrap();
            let go = |volumes: &Volumes| {
                if moves {
                    volumes.give_away(&id, "edge-b").map(Removed::delete)
                } else {
                    volumes.remove(&named("data"))
                }
            };
            stop_before(step, || go(&volumes));
            drop(volumes);
            let volumes = reopened(dir.path());
            match volumes.path(&named("data"), false) {
                Ok(path) => assert_eq!(fs::read(path.join("row")).unwrap(), b"1", "{step}"),
                Err(VolumeError::Moved { .. }) => assert!(moves && step == "remove 4", "{step}"),
                Err(error) => assert!(!moves && step == "remove 4", "{step}: {error}"),
            }
            if step != "remove 4" {
                go(&volumes).unwrap();
            }
            drop(volumes);
            assert_eq!(reopened(dir.path()).list().unwrap().len(), 0, "{step}");
        }
    }
}

#[test]
fn an_import_that_stops_anywhere_and_its_removal_leave_all_or_nothing() {
    for (step, is_here) in [
        ("keep 1", false),
        ("keep 2", true),
        ("content 1", true),
        ("content 2", true),
        ("content 3", true),
        ("trash 1", true),
        ("trash 2", true),
        ("trash 3", false),
        ("trash 4", false),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let from = tempfile::tempdir().unwrap();
        fs::write(from.path().join("f"), b"content").unwrap();
        let volumes = open(dir.path());
        stop_before(step, || {
            let source = VolumeSource::Content(volumes.import(from.path()).unwrap());
            volumes.path(&source, true).unwrap();
            volumes.remove(&source)
        });
        drop(volumes);
        let volumes = reopened(dir.path());
        assert_eq!(volumes.contents().unwrap().len(), usize::from(is_here), "{step}");
        let digest = volumes.import(from.path()).unwrap();
        volumes.verify(&VolumeSource::Content(digest)).unwrap();
    }
}

/// Method: what is laid out is damaged, and is as damaged as it was, or whole.
#[test]
fn laying_out_again_may_stop_anywhere() {
    for (step, is_mended) in [
        ("replace 1", false),
        ("replace 2", false),
        ("keep 2", false),
        ("replace 3", false),
        ("replace 4", true),
        ("replace 5", true),
        ("replace 6", true),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let from = tempfile::tempdir().unwrap();
        fs::write(from.path().join("f"), b"content").unwrap();
        let volumes = open(dir.path());
        let digest = volumes.import(from.path()).unwrap();
        let source = VolumeSource::Content(digest);
        fs::write(volumes.path(&source, true).unwrap().join("f"), b"other").unwrap();
        assert!(matches!(volumes.compare(&digest), Err(VolumeError::Damaged { .. })));
        stop_before(step, || volumes.lay_out_again(&digest));
        drop(volumes);
        let volumes = reopened(dir.path());
        assert_eq!(volumes.compare(&digest).is_ok(), is_mended, "{step}");
        volumes.lay_out_again(&digest).unwrap();
        volumes.compare(&digest).unwrap();
        volumes.remove(&source).unwrap();
        drop(volumes);
        assert_eq!(reopened(dir.path()).list().unwrap().len(), 0, "{step}");
    }
}

/// Method: the journal is an older copy, from before the volume was made.
#[test]
fn what_the_journal_does_not_know_is_kept_and_told() {
    let dir = tempfile::tempdir().unwrap();
    let id: VolumeId = "data".parse().unwrap();
    let journal = dir.path().join("node.redb");
    drop(open(dir.path()));
    let older = fs::read(&journal).unwrap();
    let path = open(dir.path()).create(&id, Shape::Tree).unwrap();
    let newer = fs::read(&journal).unwrap();
    fs::write(path.join("row"), "1").unwrap();
    fs::write(&journal, older).unwrap();
    let volumes = open(dir.path());
    let told = volumes.contradictions().unwrap();
    assert!(told.len() == 1 && told[0].contains(path.to_str().unwrap()), "{told:?}");
    let refused = volumes.create(&id, Shape::Tree);
    assert!(matches!(refused, Err(VolumeError::Unjournalled(_))), "{refused:?}");
    drop(volumes);
    fs::write(&journal, newer).unwrap();
    assert_eq!(
        fs::read(reopened(dir.path()).path(&named("data"), false).unwrap().join("row")).unwrap(),
        b"1"
    );
    fs::rename(&path, dir.path().join("away")).unwrap();
    let told = open(dir.path()).contradictions().unwrap();
    assert!(told.len() == 1 && told[0].contains("godwit volume rm data"), "{told:?}");
}

#[test]
fn who_comes_while_a_volume_is_made_is_told_to_try_again() {
    let dir = tempfile::tempdir().unwrap();
    let volumes = open(dir.path());
    let id: VolumeId = "data".parse().unwrap();
    let places = volumes.places.clone();
    let (at, other) = (VolumeEntry::default(), volumes.clone());
    let put = places.put(&id, &at, |path| {
        let refused = other.create(&id, Shape::Tree);
        assert!(matches!(refused, Err(VolumeError::Busy(_))), "{refused:?}");
        assert_eq!(other.contradictions().unwrap(), [""; 0]);
        Ok(fs::create_dir(path).map_err(on("make directory", path))?)
    });
    assert!(put.unwrap().is_dir());
}

/// A directory on a file system that has flags.
fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap()
}

/// Mounts the directory at `point` over itself.
fn mount_at(point: &Path) {
    let none = None::<&str>;
    mount(Some(point), point, none, MsFlags::MS_BIND, none).unwrap();
}

/// A staged volume that arrives with a container, and has run.
fn arrive(dir: &Path, volumes: &Volumes, id: &VolumeId) {
    let (staged, container) = (dir.join("staged"), ContainerRef::new("default", "cache").unwrap());
    fs::create_dir(&staged).unwrap();
    volumes.may_receive(id).unwrap();
    volumes.install(id, (&staged, None), &arriving(&container)).unwrap();
    volumes.arrived(&container).unwrap();
}

#[test]
fn an_immutable_file_keeps_no_volume_from_being_removed() {
    let dir = scratch();
    let volumes = open(dir.path());
    let id: VolumeId = "data".parse().unwrap();
    let path = volumes.create(&id, Shape::Tree).unwrap();
    fs::write(path.join("fixed"), "x").unwrap();
    for path in [path.join("fixed"), path] {
        ioctl_setflags(fs::File::open(path).unwrap(), IFlags::IMMUTABLE).unwrap();
    }
    volumes.give_away(&id, "edge-b").unwrap().delete();
    assert_eq!(volumes.leftovers().reasons(), [""; 0]);
    drop(volumes);
    reopened(dir.path());
}

/// Method: something is mounted in the volume, and then at its very directory.
#[test]
fn what_cannot_be_removed_is_set_aside_and_its_volume_may_come_back() {
    for below in ["mounted", ""] {
        let dir = scratch();
        let volumes = open(dir.path());
        let id: VolumeId = "data".parse().unwrap();
        let path = volumes.create(&id, Shape::Tree).unwrap();
        fs::create_dir(path.join("mounted")).unwrap();
        fs::write(path.join("file"), "x").unwrap();
        fs::write(path.join("mounted/file"), "x").unwrap();
        mount_at(&path.join(below));
        volumes.give_away(&id, "edge-b").unwrap().delete();
        let told = volumes.leftovers().reasons();
        assert!(told.len() == 1 && told[0].contains("unmount it"), "{told:?}");
        arrive(dir.path(), &volumes, &id);
        drop(volumes);
        let volumes = open(dir.path());
        assert_eq!(volumes.leftovers().reasons().len(), 1);
        assert_eq!(volumes.path(&named("data"), false).unwrap(), path);
        // Nor does a second one of that name.
        volumes.give_away(&id, "edge-b").unwrap().delete();
        arrive(dir.path(), &volumes, &id);
        let mut aside = fs::read_dir(dir.path().join("trash")).unwrap();
        let aside = aside.next().unwrap().unwrap().path().join("data").join(below);
        assert!(aside.join("file").exists(), "what is mounted is not ours");
        umount(&aside).unwrap();
        volumes.leftovers().retry();
        assert_eq!(volumes.leftovers().reasons(), [""; 0]);
        drop(volumes);
        reopened(dir.path());
    }
}

/// Method: the directory of the volume's ID is a mount point, which cannot be renamed.
#[test]
fn a_volume_that_cannot_be_moved_away_is_reported_before_one_of_its_name_comes() {
    let dir = scratch();
    let volumes = open(dir.path());
    let id: VolumeId = "data".parse().unwrap();
    let path = volumes.create(&id, Shape::Tree).unwrap();
    mount_at(path.parent().unwrap());
    volumes.give_away(&id, "edge-b").unwrap_err();
    let error = volumes.may_receive(&id).unwrap_err();
    assert!(crate::error::chain(&error).contains("volumes/data"), "{error}");
    drop(volumes);
    let volumes = open(dir.path());
    assert!(matches!(volumes.path(&named("data"), false), Err(VolumeError::Moved { .. })));
    let told = volumes.contradictions().unwrap();
    assert!(told.iter().any(|one| one.contains("could not be recovered")), "{told:?}");
    umount(path.parent().unwrap()).unwrap();
    arrive(dir.path(), &volumes, &id);
    drop(volumes);
    reopened(dir.path());
}

#[test]
fn a_volume_comes_back_while_what_was_there_is_still_being_deleted() {
    let dir = tempfile::tempdir().unwrap();
    let volumes = open(dir.path());
    let id: VolumeId = "data".parse().unwrap();
    let path = volumes.create(&id, Shape::Tree).unwrap();
    fs::write(path.join("old"), "x").unwrap();
    let removed = volumes.give_away(&id, "edge-b").unwrap();
    arrive(dir.path(), &volumes, &id);
    removed.delete();
    assert_eq!(fs::read_dir(path).unwrap().count(), 0);
    assert_eq!(fs::read_dir(dir.path().join("trash")).unwrap().count(), 0);
}
