//! What is seen through the mounts of a chain must be what the same changes make of a plain
//! directory.

use std::collections::BTreeMap;
use std::fs::{self, File, Permissions};
use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::{
    FileTypeExt as _, MetadataExt as _, PermissionsExt as _, chown, lchown, symlink,
};
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use nix::sys::stat::{Mode, SFlag, mknod};

use super::client::{Snapshotter, command, mounted};

type Change<'a> = &'a dyn Fn(&Path) -> Result<()>;

/// Makes a layer of each of `changes`, one over the other, and compares at every step.
fn add_up(snapshotter: &Snapshotter, changes: &[Change<'_>]) -> Result<()> {
    let flat = plain_directory()?;
    let mut parent = String::new();
    for (number, change) in changes.iter().enumerate() {
        let (key, name) = (format!("work {number}"), format!("layer {number}"));
        mounted(&snapshotter.prepare(&key, &parent)?, |top| {
            same(top, flat.path()).context("before the change")?;
            change(top)?;
            change(flat.path())?;
            same(top, flat.path()).context("after the change")
        })
        .with_context(|| name.clone())?;
        snapshotter.commit(&name, &key)?;
        parent = name;
    }
    mounted(&snapshotter.view("whole", &parent)?, |top| {
        same(top, flat.path()).context("in the view")?;
        let refused = File::create(top.join("new")).expect_err("a view is read-only");
        assert_eq!(refused.kind(), ErrorKind::ReadOnlyFilesystem);
        Ok(())
    })
}

fn plain_directory() -> Result<tempfile::TempDir> {
    let flat = tempfile::tempdir_in("/var/tmp")?;
    fs::set_permissions(flat.path(), Permissions::from_mode(0o755))?;
    Ok(flat)
}

fn same(top: &Path, flat: &Path) -> Result<()> {
    let (found, expected) = (describe(top)?, describe(flat)?);
    for (path, wanted) in &expected {
        let there = found.get(path).with_context(|| format!("{path} is not there"))?;
        ensure!(there == wanted, "{path} is {there}, expected {wanted}");
    }
    let more: Vec<_> = found.keys().filter(|path| !expected.contains_key(*path)).collect();
    ensure!(more.is_empty(), "{more:?} should not be there");
    Ok(())
}

/// All of a tree, a line for each path.
fn describe(top: &Path) -> Result<BTreeMap<String, String>> {
    let (mut lines, mut links) = (BTreeMap::new(), BTreeMap::new());
    let mut todo = vec![top.to_owned()];
    while let Some(path) = todo.pop() {
        let metadata = fs::symlink_metadata(&path)?;
        let name = path.strip_prefix(top)?.display().to_string();
        let kind = metadata.file_type();
        let content = if kind.is_dir() {
            for entry in fs::read_dir(&path)? {
                todo.push(entry?.path());
            }
            "a directory".to_owned()
        } else if kind.is_symlink() {
            format!("a link to {}", fs::read_link(&path)?.display())
        } else if kind.is_file() {
            format!("a file of {:?}", String::from_utf8_lossy(&fs::read(&path)?))
        } else {
            format!("a device or pipe {kind:?} {}", metadata.rdev())
        };
        let mut line =
            format!("{content} {:o} {}:{}", metadata.mode(), metadata.uid(), metadata.gid());
        // Times of now differ between the two trees; those that were set do not.
        if metadata.mtime() < 1_000_000_000 {
            line += &format!(" of {}.{}", metadata.mtime(), metadata.mtime_nsec());
        }
        for key in xattr::list(&path)? {
            let value = xattr::get(&path, &key)?.unwrap_or_default();
            line += &format!(" {}={value:?}", key.display());
        }
        if metadata.nlink() > 1 && !kind.is_dir() {
            let inode = (metadata.dev(), metadata.ino());
            links.entry(inode).or_insert_with(Vec::new).push(name.clone());
        }
        lines.insert(name, line);
    }
    for mut names in links.into_values() {
        names.sort();
        lines.insert(format!("{} and its links", names[0]), names.join(" "));
    }
    Ok(lines)
}

fn write(path: impl AsRef<Path>, text: &str, mode: u32) -> Result<()> {
    fs::write(&path, text)?;
    Ok(fs::set_permissions(path, Permissions::from_mode(mode))?)
}

fn mkdir(path: impl AsRef<Path>, mode: u32) -> Result<()> {
    fs::create_dir_all(&path)?;
    Ok(fs::set_permissions(path, Permissions::from_mode(mode))?)
}

/// What mv(1) does where a directory of a lower layer cannot be renamed in place.
fn rename(from: &Path, to: &Path) -> Result<()> {
    let words = ["mv", "-T", &from.display().to_string(), &to.display().to_string()];
    command(&words).map(drop)
}

pub(crate) fn files_are_replaced_changed_and_removed(s: &Snapshotter) -> Result<()> {
    let first = |top: &Path| {
        write(top.join("kept"), "kept", 0o644)?;
        write(top.join("changed"), "one", 0o777)?;
        write(top.join("removed"), "removed", 0o600)?;
        mkdir(top.join("a/b/c"), 0o755)?;
        write(top.join("a/b/c/deep"), "deep", 0o644)
    };
    let second = |top: &Path| {
        File::options().append(true).open(top.join("changed"))?.write_all(b" two")?;
        fs::remove_file(top.join("removed"))?;
        fs::remove_dir_all(top.join("a/b"))?;
        write(top.join("new"), "new", 0o640)
    };
    let third = |top: &Path| {
        write(top.join("removed"), "back, and another", 0o644)?;
        fs::remove_file(top.join("new"))?;
        Ok(File::options().write(true).open(top.join("kept"))?.set_len(2)?)
    };
    add_up(s, &[&first, &second, &third, &|_| Ok(())])
}

/// Method: a directory is removed and made again in the next layer: nothing of the old one may
/// shine through. What takes the place of a file is a directory, and the other way round.
pub(crate) fn whiteouts_and_opaque_directories_hide_what_is_below(s: &Snapshotter) -> Result<()> {
    let first = |top: &Path| {
        for name in ["one", "two", "three"] {
            mkdir(top.join(name), 0o755)?;
            write(top.join(name).join("old"), name, 0o644)?;
        }
        write(top.join("file"), "file", 0o644)
    };
    let second = |top: &Path| {
        fs::remove_dir_all(top.join("one"))?;
        mkdir(top.join("one"), 0o700)?;
        write(top.join("one/new"), "new", 0o644)?;
        fs::remove_dir_all(top.join("two"))?;
        write(top.join("two"), "a file now", 0o644)?;
        fs::remove_file(top.join("file"))?;
        mkdir(top.join("file/inside"), 0o755)
    };
    let third = |top: &Path| {
        fs::remove_file(top.join("two"))?;
        mkdir(top.join("two/again"), 0o755)?;
        write(top.join("one/old"), "another of this name", 0o644)?;
        Ok(fs::remove_dir_all(top.join("three"))?)
    };
    add_up(s, &[&first, &second, &third])
}

pub(crate) fn directories_are_renamed_and_removed_across_layers(s: &Snapshotter) -> Result<()> {
    let first = |top: &Path| {
        mkdir(top.join("dir/sub"), 0o750)?;
        write(top.join("dir/sub/file"), "file", 0o644)?;
        mkdir(top.join("other"), 0o755)?;
        write(top.join("other/x"), "x", 0o644)
    };
    let second = |top: &Path| {
        rename(&top.join("dir"), &top.join("moved"))?;
        write(top.join("moved/sub/more"), "more", 0o644)
    };
    let third = |top: &Path| {
        rename(&top.join("moved/sub"), &top.join("other/sub"))?;
        mkdir(top.join("dir"), 0o755)?;
        write(top.join("dir/fresh"), "fresh", 0o644)
    };
    let fourth = |top: &Path| {
        fs::remove_dir_all(top.join("moved"))?;
        rename(&top.join("other"), &top.join("moved"))
    };
    add_up(s, &[&first, &second, &third, &fourth])
}

/// Method: rename(2) itself. Without `redirect_dir`, for which neither snapshotter asks, the kernel
/// renames a directory that this layer alone has, and says of others that programs are to copy
/// them.
pub(crate) fn a_directory_of_a_lower_layer_is_not_renamed_in_place(s: &Snapshotter) -> Result<()> {
    let is_redirected = fs::read("/sys/module/overlay/parameters/redirect_dir")? == b"Y\n";
    let first = |top: &Path| {
        mkdir(top.join("lower/sub"), 0o750)?;
        mkdir(top.join("replaced"), 0o755)?;
        write(top.join("lower/sub/file"), "file", 0o644)?;
        write(top.join("replaced/old"), "old", 0o644)
    };
    let second = |top: &Path| {
        mkdir(top.join("own/sub"), 0o700)?;
        fs::rename(top.join("own"), top.join("renamed"))?;
        fs::remove_dir_all(top.join("replaced"))?;
        mkdir(top.join("replaced"), 0o711)?;
        write(top.join("replaced/new"), "new", 0o644)?;
        Ok(fs::rename(top.join("replaced"), top.join("again"))?)
    };
    add_up(s, &[&first, &second])?;
    mounted(&s.prepare("active", "layer 1")?, |top| {
        let before = describe(top)?;
        let renamed = fs::rename(top.join("lower"), top.join("moved"));
        if is_redirected {
            ensure!(renamed.is_ok() && fs::read(top.join("moved/sub/file"))? == b"file");
            return Ok(());
        }
        let refused = renamed.expect_err("a directory of a lower layer");
        assert_eq!(refused.kind(), ErrorKind::CrossesDevices);
        assert_eq!(describe(top)?, before, "what is refused changes nothing");
        Ok(())
    })
}

/// Method: one that is new takes the place of one below, then both are of lower layers.
pub(crate) fn files_are_renamed_over_files_of_lower_layers(s: &Snapshotter) -> Result<()> {
    let first = |top: &Path| {
        mkdir(top.join("files"), 0o700)?;
        write(top.join("files/f1"), "was here first", 0o644)?;
        write(top.join("files/f2"), "nothing interesting", 0o644)
    };
    let second = |top: &Path| {
        write(top.join("files/f1-overwrite"), "new", 0o600)?;
        fs::rename(top.join("files/f1-overwrite"), top.join("files/f1"))?;
        Ok(fs::rename(top.join("files/f2"), top.join("files/f3"))?)
    };
    let third = |top: &Path| Ok(fs::rename(top.join("files/f3"), top.join("files/f1"))?);
    add_up(s, &[&first, &second, &third])
}

/// Method: owners change with nothing else, down a path; and of what is removed and made again, in
/// the same layer or in the next.
pub(crate) fn owners_change_down_a_path_and_of_what_is_made_anew(s: &Snapshotter) -> Result<()> {
    const PATH: [&str; 4] = ["opt", "opt/a", "opt/a/b", "opt/a/b/file"];
    let own = |top: &Path, name: &str, id: u32| chown(top.join(name), Some(id), Some(id));
    let first = |top: &Path| {
        mkdir(top.join("opt/a/b"), 0o700)?;
        write(top.join("opt/a/b/file"), "hello", 0o644)?;
        for name in ["given-back", "removed", "given", "again"] {
            mkdir(top.join(name), 0o700)?;
        }
        write(top.join("given/file"), "given", 0o644)?;
        write(top.join("again/file"), "old", 0o644)?;
        let given = ["given-back", "removed", "again", "again/file"];
        Ok(given.iter().try_for_each(|name| own(top, name, 1))?)
    };
    let second = |top: &Path| {
        PATH.iter().chain(&["given", "given/file"]).try_for_each(|name| own(top, name, 1))?;
        own(top, "given-back", 0)?;
        Ok(fs::remove_dir_all(top.join("removed"))?)
    };
    let third = |top: &Path| {
        mkdir(top.join("removed"), 0o700)?;
        fs::remove_dir_all(top.join("again"))?;
        mkdir(top.join("again"), 0o700)?;
        own(top, "removed", 2)?;
        own(top, "again", 2)?;
        Ok(own(top, "opt/a/b", 3)?)
    };
    add_up(s, &[&first, &second, &third])
}

pub(crate) fn files_move_between_directories_of_several_layers(s: &Snapshotter) -> Result<()> {
    let first = |top: &Path| {
        mkdir(top.join("from"), 0o700)?;
        write(top.join("from/renamed"), "renamed", 0o644)?;
        write(top.join("from/linked"), "linked", 0o644)
    };
    let second = |top: &Path| {
        mkdir(top.join("to"), 0o700)?;
        fs::rename(top.join("from/renamed"), top.join("to/renamed"))?;
        fs::hard_link(top.join("from/linked"), top.join("to/linked"))?;
        Ok(fs::remove_file(top.join("from/linked"))?)
    };
    let third = |top: &Path| Ok(fs::rename(top.join("to/linked"), top.join("from/renamed"))?);
    add_up(s, &[&first, &second, &third])
}

pub(crate) fn hard_links_stay_linked(s: &Snapshotter) -> Result<()> {
    let first = |top: &Path| {
        write(top.join("a"), "shared", 0o644)?;
        mkdir(top.join("d"), 0o755)?;
        fs::hard_link(top.join("a"), top.join("d/b"))?;
        fs::hard_link(top.join("a"), top.join("c"))?;
        symlink("a", top.join("s"))?;
        Ok(fs::hard_link(top.join("s"), top.join("t"))?)
    };
    let second = |top: &Path| Ok(fs::remove_file(top.join("c"))?);
    add_up(s, &[&first, &|_| Ok(())])?;
    // After the removal overlayfs may count the links of the layers below, so only what is read is
    // compared.
    s.layer("removed", "layer 1", second)?;
    mounted(&s.view("after", "removed")?, |top| {
        ensure!(!top.join("c").exists() && fs::read(top.join("d/b"))? == b"shared");
        let inode = |name: &str| fs::metadata(top.join(name)).map(|found| found.ino());
        assert_eq!(inode("a")?, inode("d/b")?);
        Ok(())
    })
}

pub(crate) fn modes_owners_times_and_special_files_are_kept(s: &Snapshotter) -> Result<()> {
    let first = |top: &Path| {
        mkdir(top.join("sticky"), 0o1777)?;
        mkdir(top.join("set-group"), 0o2775)?;
        write(top.join("program"), "program", 0o4755)?;
        write(top.join("secret"), "secret", 0o000)?;
        // The owner first: it takes the set-user bit away.
        chown(top.join("secret"), Some(1000), Some(2000))?;
        chown(top.join("set-group"), Some(65_534), Some(4_000_000_000))?;
        symlink("/nowhere", top.join("link"))?;
        lchown(top.join("link"), Some(3), Some(4))?;
        let mode = Mode::from_bits_truncate(0o640);
        mknod(&top.join("pipe"), SFlag::S_IFIFO, mode, 0)?;
        mknod(&top.join("null"), SFlag::S_IFCHR, mode, nix::sys::stat::makedev(1, 3))?;
        mknod(&top.join("disk"), SFlag::S_IFBLK, mode, nix::sys::stat::makedev(7, 0))?;
        let kind = fs::metadata(top.join("pipe"))?.file_type();
        ensure!(kind.is_fifo());
        age(&top.join("program"))
    };
    let second = |top: &Path| {
        chown(top.join("sticky"), Some(7), Some(8))?;
        fs::set_permissions(top.join("secret"), Permissions::from_mode(0o604))?;
        write(top.join("set-group/inside"), "inside", 0o644)?;
        age(&top.join("set-group"))
    };
    // The root itself is an entry like any other.
    let third = |top: &Path| {
        fs::set_permissions(top, Permissions::from_mode(0o711))?;
        Ok(chown(top, Some(9), Some(10))?)
    };
    let fourth = |top: &Path| Ok(chown(top.join("program"), Some(11), None)?);
    add_up(s, &[&first, &second])?;
    // A layer over it begins with the owner of its root, and with a mode of its own, as overlayfs
    // does it.
    s.layer("root", "layer 1", third)?;
    s.layer("top", "root", fourth)?;
    mounted(&s.view("root seen", "top")?, |top| {
        let root = fs::metadata(top)?;
        assert_eq!((root.uid(), root.gid()), (9, 10));
        let program = fs::metadata(top.join("program"))?;
        assert_eq!((program.uid(), program.mode() & 0o7777), (11, 0o755));
        Ok(())
    })
}

/// Gives a file or directory a time of long ago.
fn age(path: &Path) -> Result<()> {
    let time = SystemTime::UNIX_EPOCH + Duration::new(123_456_789, 987_654_321);
    Ok(File::open(path)?.set_modified(time)?)
}

pub(crate) fn extended_attributes_are_kept(s: &Snapshotter) -> Result<()> {
    // Version 2, effective, cap_net_raw: what ping has (capability.h).
    let capability: &[u8] = &[1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let first = |top: &Path| {
        write(top.join("file"), "file", 0o755)?;
        mkdir(top.join("dir"), 0o755)?;
        xattr::set(top.join("file"), "user.one", b"\0binary\xff")?;
        xattr::set(top.join("file"), "security.capability", capability)?;
        xattr::set(top.join("dir"), "user.two", b"")?;
        Ok(xattr::set(top.join("dir"), "trusted.three", b"three")?)
    };
    let second = |top: &Path| {
        xattr::set(top.join("file"), "user.four", b"four")?;
        xattr::remove(top.join("dir"), "user.two")?;
        write(top.join("dir/inside"), "inside", 0o644)
    };
    let third = |top: &Path| Ok(xattr::remove(top.join("file"), "user.one")?);
    add_up(s, &[&first, &second, &third])
}

/// Method: each layer replaces a file, adds one, and removes and makes again a directory.
pub(crate) fn chains_of_128_layers_can_be_mounted(s: &Snapshotter) -> Result<()> {
    let change = |number: usize| {
        move |top: &Path| {
            write(top.join("last"), &number.to_string(), 0o644)?;
            mkdir(top.join("all"), 0o755)?;
            write(top.join(format!("all/{number}")), "one", 0o644)?;
            let again = top.join("again");
            if again.exists() {
                fs::remove_dir_all(&again)?;
            }
            mkdir(&again, 0o755)?;
            write(again.join(number.to_string()), "only this", 0o644)
        }
    };
    let flat = plain_directory()?;
    let mut parent = String::new();
    for number in 0..128 {
        let name = format!("layer {number}");
        s.layer(&name, &parent, change(number))?;
        change(number)(flat.path())?;
        parent = name;
    }
    mounted(&s.prepare("active", &parent)?, |top| same(top, flat.path()))?;
    mounted(&s.view("view", &parent)?, |top| same(top, flat.path()))
}

pub(crate) fn a_layer_may_have_many_files(s: &Snapshotter) -> Result<()> {
    const FILES: usize = 2000;
    s.layer("many", "", |top| {
        for number in 0..FILES {
            let dir = top.join((number % 50).to_string());
            fs::create_dir_all(&dir)?;
            fs::write(dir.join(number.to_string()), number.to_string())?;
        }
        Ok(())
    })?;
    let (_, inodes) = s.usage("many")?;
    assert_eq!(inodes, 51 + i64::try_from(FILES)?);
    s.layer("fewer", "many", |top| {
        (0..25).try_for_each(|dir| Ok(fs::remove_dir_all(top.join(dir.to_string()))?))
    })?;
    mounted(&s.view("seen", "fewer")?, |top| {
        let mut files = 0;
        for dir in fs::read_dir(top)? {
            files += fs::read_dir(dir?.path())?.count();
        }
        assert_eq!(files, FILES / 2);
        assert_eq!(fs::read_to_string(top.join("49/99"))?, "99");
        Ok(())
    })
}
