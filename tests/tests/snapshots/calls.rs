//! What containerd's contract says of each call, and the codes of its refusals.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use containerd_client::services::v1::snapshots::Kind;
use containerd_client::tonic::Code;
use godwit_tests::Containerd;

use super::client::{Labels, Snapshotter, mounted, refused, refused_with};

/// Committed `c1` and `c2` over it; of `c2` active `a1` and view `v1`, of nothing `a2` and `v2`.
fn each_kind(
    s: &Snapshotter,
    labels: Labels<'_>,
) -> Result<[(&'static str, Kind, &'static str); 6]> {
    s.prepare("work", "")?;
    s.commit_labelled("c1", "work", labels)?;
    s.prepare("work", "c1")?;
    s.commit_labelled("c2", "work", labels)?;
    s.prepare_labelled("a1", "c2", labels)?;
    s.prepare_labelled("a2", "", labels)?;
    s.view_labelled("v1", "c2", labels)?;
    s.view_labelled("v2", "", labels)?;
    Ok([
        ("c1", Kind::Committed, ""),
        ("c2", Kind::Committed, "c1"),
        ("a1", Kind::Active, "c2"),
        ("a2", Kind::Active, ""),
        ("v1", Kind::View, "c2"),
        ("v2", Kind::View, ""),
    ])
}

fn map(labels: Labels<'_>) -> BTreeMap<String, String> {
    labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

fn since_1970() -> Result<Duration> {
    Ok(SystemTime::UNIX_EPOCH.elapsed()?)
}

pub(crate) fn each_kind_is_what_stat_and_list_say(s: &Snapshotter) -> Result<()> {
    let begin = since_1970()?;
    let all = each_kind(s, &[("l", "1")])?;
    let end = since_1970()?;
    let listed = s.list(&[])?;
    for (name, kind, parent) in all {
        let info = s.stat(name)?;
        assert_eq!((info.name.as_str(), info.kind, info.parent.as_str()), (name, kind, parent));
        assert_eq!(info.labels, map(&[("l", "1")]), "{name}");
        assert_eq!(info.created, info.updated, "{name}");
        assert!((begin..=end).contains(&info.created), "{name}: {info:?}");
        assert_eq!(listed.get(name), Some(&info));
    }
    refused(s.stat("work"), Code::NotFound);
    refused(s.stat("never"), Code::NotFound);
    Ok(())
}

pub(crate) fn a_snapshot_of_nothing_is_empty_and_its_root_is_open_to_all(
    s: &Snapshotter,
) -> Result<()> {
    for mounts in [s.prepare("active", "")?, s.view("view", "")?] {
        mounted(&mounts, |top| {
            let root = fs::metadata(top)?;
            assert_eq!((root.mode() & 0o7777, root.uid(), root.gid()), (0o755, 0, 0));
            assert_eq!(fs::read_dir(top)?.count(), 0);
            Ok(())
        })?;
    }
    Ok(())
}

pub(crate) fn mounts_are_those_that_prepare_and_view_gave(s: &Snapshotter) -> Result<()> {
    s.layer("base", "", |top| Ok(fs::write(top.join("file"), "base")?))?;
    assert_eq!(s.prepare("active", "base")?, s.mounts("active")?);
    assert_eq!(s.view("view", "base")?, s.mounts("view")?);
    refused(s.mounts("base"), Code::FailedPrecondition);
    refused(s.mounts("never"), Code::NotFound);
    Ok(())
}

pub(crate) fn a_view_is_read_only_and_does_not_see_what_others_write(
    s: &Snapshotter,
) -> Result<()> {
    s.layer("base", "", |top| Ok(fs::write(top.join("file"), "base")?))?;
    let view = s.view("view", "base")?;
    mounted(&s.prepare("active", "base")?, |top| Ok(fs::write(top.join("file"), "other")?))?;
    mounted(&view, |top| {
        ensure!(fs::read(top.join("file"))? == b"base");
        for refused in [fs::write(top.join("file"), "x"), fs::remove_file(top.join("file"))] {
            let error = refused.expect_err("a view is read-only");
            assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
        }
        Ok(())
    })
}

pub(crate) fn an_active_snapshot_keeps_what_was_written_between_mounts(
    s: &Snapshotter,
) -> Result<()> {
    s.layer("base", "", |_| Ok(()))?;
    s.prepare("active", "base")?;
    mounted(&s.mounts("active")?, |top| Ok(fs::write(top.join("file"), "kept")?))?;
    mounted(&s.mounts("active")?, |top| {
        ensure!(fs::read(top.join("file"))? == b"kept");
        Ok(())
    })
}

pub(crate) fn keys_and_names_share_one_space(s: &Snapshotter) -> Result<()> {
    each_kind(s, &[])?;
    for taken in ["a1", "v1", "c1"] {
        refused(s.prepare(taken, "c2"), Code::AlreadyExists);
        refused(s.view(taken, "c2"), Code::AlreadyExists);
    }
    for taken in ["a1", "v1", "c1"] {
        refused(s.commit(taken, "a2"), Code::AlreadyExists);
    }
    assert_eq!(s.stat("a2")?.kind, Kind::Active);
    Ok(())
}

pub(crate) fn only_what_is_committed_can_be_a_parent(s: &Snapshotter) -> Result<()> {
    each_kind(s, &[])?;
    for parent in ["a1", "v1"] {
        refused(s.prepare("child", parent), Code::InvalidArgument);
        refused(s.view("child", parent), Code::InvalidArgument);
    }
    refused(s.prepare("child", "never"), Code::NotFound);
    refused(s.view("child", "never"), Code::NotFound);
    refused(s.stat("child"), Code::NotFound);
    Ok(())
}

pub(crate) fn only_what_is_active_can_be_committed_and_once(s: &Snapshotter) -> Result<()> {
    each_kind(s, &[])?;
    refused(s.commit("new", "v1"), Code::FailedPrecondition);
    refused(s.commit("new", "c1"), Code::FailedPrecondition);
    refused(s.commit("new", "never"), Code::NotFound);
    s.commit("new", "a1")?;
    refused_with(s.commit("new", "a1"), &[Code::NotFound, Code::AlreadyExists]);
    refused(s.commit("newer", "a1"), Code::NotFound);
    refused(s.commit("newer", "new"), Code::FailedPrecondition);
    // The key is free, the name is not.
    s.prepare("a1", "new")?;
    refused(s.commit("new", "a1"), Code::AlreadyExists);
    Ok(())
}

pub(crate) fn a_commit_gives_labels_and_a_time_of_its_own(s: &Snapshotter) -> Result<()> {
    s.prepare_labelled("key", "", &[("of-the-key", "1")])?;
    let between = since_1970()?;
    s.commit_labelled("name", "key", &[("of-the-name", "2")])?;
    let info = s.stat("name")?;
    assert_eq!(info.labels, map(&[("of-the-name", "2")]));
    assert!(info.created >= between && info.created == info.updated, "{info:?}");
    Ok(())
}

/// Method: committed while a container still has it mounted, as `ctr` and CRI do it for a running
/// one.
pub(crate) fn what_is_mounted_can_be_committed(s: &Snapshotter) -> Result<()> {
    s.layer("base", "", |top| Ok(fs::write(top.join("file"), "base")?))?;
    mounted(&s.prepare("active", "base")?, |top| {
        fs::write(top.join("new"), "new")?;
        s.commit("name", "active")?;
        mounted(&s.view("view", "name")?, |seen| {
            ensure!(fs::read(seen.join("new"))? == b"new");
            ensure!(fs::read(seen.join("file"))? == b"base");
            Ok(())
        })
    })
}

pub(crate) fn a_parent_stays_as_long_as_it_has_children(s: &Snapshotter) -> Result<()> {
    each_kind(s, &[])?;
    refused(s.remove("c1"), Code::FailedPrecondition);
    refused(s.remove("c2"), Code::FailedPrecondition);
    s.remove("a1")?;
    refused(s.remove("c2"), Code::FailedPrecondition);
    s.remove("v1")?;
    s.remove("c2")?;
    s.remove("c1")?;
    refused(s.remove("c1"), Code::NotFound);
    refused(s.remove("never"), Code::NotFound);
    Ok(())
}

pub(crate) fn what_was_removed_can_be_made_anew(s: &Snapshotter) -> Result<()> {
    s.layer("base", "", |top| Ok(fs::write(top.join("file"), "base")?))?;
    mounted(&s.prepare("key", "base")?, |top| Ok(fs::write(top.join("old"), "old")?))?;
    s.remove("key")?;
    s.view("key", "base")?;
    s.remove("key")?;
    mounted(&s.prepare("key", "")?, |top| {
        assert_eq!(fs::read_dir(top)?.count(), 0);
        Ok(())
    })?;
    s.remove("base")?;
    Ok(s.commit("base", "key")?)
}

pub(crate) fn labels_change_as_the_fields_say_and_nothing_else_does(s: &Snapshotter) -> Result<()> {
    for (name, kind, parent) in each_kind(s, &[("old", "0")])? {
        let before = s.stat(name)?;
        let first = [("l1", "v1"), ("l2", "v2"), ("with.dots/and-more", "v3")];
        let begin = since_1970()?;
        let info = s.update(name, &first, &[])?;
        assert_eq!(info.labels, map(&first), "{name}: without fields, all are replaced");
        assert_eq!((info.kind, info.parent.as_str()), (kind, parent), "{name}");
        assert_eq!(info.created, before.created, "{name}");
        assert!(info.updated >= begin && info.updated <= since_1970()?, "{name}: {info:?}");
        assert_eq!(s.stat(name)?, info);

        let some = [("l1", "changed"), ("l4", "not asked for")];
        let fields = ["labels.l1", "labels.l2", "labels.l5"];
        let info = s.update(name, &some, &fields)?;
        let expected = map(&[("l1", "changed"), ("with.dots/and-more", "v3")]);
        assert_eq!(info.labels, expected, "{name}: one is changed, one removed");
        let fields = ["labels.with.dots/and-more"];
        let info = s.update(name, &[("with.dots/and-more", "dotted")], &fields)?;
        assert_eq!(info.labels["with.dots/and-more"], "dotted");

        let info = s.update(name, &[("last", "x")], &["labels"])?;
        assert_eq!(info.labels, map(&[("last", "x")]));
        for field in ["parent", "name", "kind", "created"] {
            refused(s.update(name, &[("l", "x")], &[field]), Code::InvalidArgument);
        }
        refused(
            s.update(name, &[("last", "y")], &["labels.last", "parent"]),
            Code::InvalidArgument,
        );
        assert_eq!(s.stat(name)?, info, "a refused update changes nothing");
    }
    refused(s.update("never", &[("l", "x")], &[]), Code::NotFound);
    Ok(())
}

pub(crate) fn a_label_that_is_too_long_is_refused(s: &Snapshotter) -> Result<()> {
    let long = "x".repeat(4097);
    let labels = [("l", long.as_str())];
    refused(s.prepare_labelled("key", "", &labels), Code::InvalidArgument);
    refused(s.stat("key"), Code::NotFound);
    s.prepare("key", "")?;
    refused(s.commit_labelled("name", "key", &labels), Code::InvalidArgument);
    refused(s.update("key", &labels, &[]), Code::InvalidArgument);
    assert_eq!(s.stat("key")?.labels, map(&[]));
    Ok(())
}

pub(crate) fn lists_can_be_filtered(s: &Snapshotter) -> Result<()> {
    each_kind(s, &[("check", "lists")])?;
    s.prepare_labelled("a3", "c1", &[("check", "lists"), ("l", "two words, and a \"quote\"")])?;
    s.view_labelled("v3", "c1", &[("check", "lists"), ("l.with/dots", "2")])?;
    let (c2, a2) = (s.whole("c2"), s.whole("a2"));
    let (of_c2, of_name) = (format!("parent==\"{c2}\""), format!("name==\"{a2}\""));
    let of_other_name = format!("name!=\"{a2}\",kind==active,labels.check");
    let cases: &[(&[&str], &[&str])] = &[
        (&["labels.check==lists"], &["a1", "a2", "a3", "c1", "c2", "v1", "v2", "v3"]),
        (&["kind==active,labels.check==lists"], &["a1", "a2", "a3"]),
        (&["kind==view,labels.check==lists"], &["v1", "v2", "v3"]),
        (&[" kind == committed, labels.check"], &["c1", "c2"]),
        (&["kind!=view,labels.check"], &["a1", "a2", "a3", "c1", "c2"]),
        (&[&of_c2], &["a1", "v1"]),
        (&[&of_name], &["a2"]),
        (&[&of_name, &of_c2], &["a1", "a2", "v1"]),
        (&[&of_other_name], &["a1", "a3"]),
        (&["parent==\"\",labels.check"], &["a2", "c1", "v2"]),
        (&["labels.l"], &["a3"]),
        (&[r#"labels.l=="two words, and a \"quote\"""#], &["a3"]),
        (&["labels.\"l.with/dots\"==2"], &["v3"]),
        (&["labels.l==2"], &[]),
        (&["labels.check==other"], &[]),
        (&["kind==unknown"], &[]),
    ];
    for (filters, expected) in cases {
        let found: Vec<String> = s.list(filters)?.into_keys().collect();
        assert_eq!(found, *expected, "{filters:?}");
    }
    let spaced = ["kind==active kind==view", "kind==active ,labels.check", "labels.check "];
    for bad in ["labels.check=lists", "==x", "kind=="].into_iter().chain(spaced) {
        // containerd itself gives this error no code.
        refused_with(s.list(&[bad]), &[Code::InvalidArgument, Code::Unknown]);
    }
    Ok(())
}

/// Method: labels make every message of the list longer than what a server may send unasked, 2 MiB.
/// With four of them it is still at it while the snapshots of the first are looked at; with two all
/// would be underway.
pub(crate) fn what_is_listed_can_be_looked_at_meanwhile(s: &Snapshotter) -> Result<()> {
    const SNAPSHOTS: usize = 400;
    let long = "x".repeat(4000);
    let labels = ["a", "b", "c", "d", "e", "f"].map(|key| (key, long.as_str()));
    for number in 0..SNAPSHOTS {
        s.view_labelled(&format!("v{number}"), "", &labels)?;
    }
    let mut messages = Vec::new();
    s.walk(&["labels.f"], |some| {
        for info in &some {
            assert_eq!(s.stat(&info.name)?, *info);
            s.mounts(&info.name)?;
        }
        messages.push(some.len());
        Ok(())
    })?;
    assert!(messages.len() > 3 && messages.iter().sum::<usize>() == SNAPSHOTS, "{messages:?}");
    Ok(())
}

pub(crate) fn usage_is_what_a_snapshot_adds_to_its_parents(s: &Snapshotter) -> Result<()> {
    const BIG: i64 = 1 << 20;
    let fill = |name: &str, count: usize| {
        let text = name.repeat(count);
        move |top: &std::path::Path| Ok(fs::write(top.join("blob"), text)?)
    };
    s.layer("base", "", fill("b", 1 << 20))?;
    let (base_bytes, base_inodes) = s.usage("base")?;
    assert!((BIG..2 * BIG).contains(&base_bytes), "{base_bytes}");
    assert_eq!(base_inodes, 2);

    let mounts = s.prepare("active", "base")?;
    let (empty_bytes, empty_inodes) = s.usage("active")?;
    assert_eq!(empty_inodes, 1, "its own root");
    mounted(&mounts, |top| {
        fs::write(top.join("new"), vec![1; 65_536])?;
        fs::hard_link(top.join("new"), top.join("again"))?;
        Ok(fs::File::create(top.join("hole"))?.set_len(1 << 30)?)
    })?;
    let (bytes, inodes) = s.usage("active")?;
    assert_eq!(inodes, 3, "a file of two names counts once");
    assert!((65_536..2 * 65_536).contains(&(bytes - empty_bytes)), "{bytes}");
    s.commit("committed", "active")?;
    assert_eq!(s.usage("committed")?, (bytes, inodes));
    s.view("view", "committed")?;
    assert_eq!(s.usage("view")?, (0, 0));
    refused(s.usage("never"), Code::NotFound);
    Ok(())
}

pub(crate) fn of_many_that_prepare_one_key_one_succeeds(s: &Snapshotter) -> Result<()> {
    s.layer("base", "", |_| Ok(()))?;
    let before = s.directories()?;
    for round in 0..5 {
        let key = format!("contended {round}");
        let attempts = s.prepare_at_once(&key, "base", 16);
        let (done, others): (Vec<_>, Vec<_>) = attempts.into_iter().partition(Result::is_ok);
        assert_eq!(done.len(), 1, "{others:?}");
        for other in others {
            refused(other, Code::AlreadyExists);
        }
        assert_eq!(s.stat(&key)?.kind, Kind::Active);
    }
    assert_eq!(s.directories()?, before + 5, "those that lost leave nothing");
    Ok(())
}

/// Method: containerd's client gives these labels where a pod has a user namespace; the root
/// directory must be its root's. How the layers below are mapped is not looked at.
pub(crate) fn id_mapping_labels_give_the_root_to_the_mapped_root(s: &Snapshotter) -> Result<()> {
    let labels = [
        ("containerd.io/snapshot/uidmapping", "0:100000:65536"),
        ("containerd.io/snapshot/gidmapping", "0:200000:65536"),
    ];
    // overlayfs of containerd 1.7 keeps the labels and does nothing about them.
    let is_older = s.subject.snapshotter == "overlayfs" && Containerd::of_suite() == Containerd::V1;
    let expected = if is_older { (0, 0) } else { (100_000, 200_000) };
    s.layer("base", "", |_| Ok(()))?;
    for parent in ["", "base"] {
        let key = format!("mapped over {parent:?}");
        let mounts = s.prepare_labelled(&key, parent, &labels)?;
        let own = mounts[0].options.iter().find_map(|option| option.strip_prefix("upperdir="));
        let root = fs::metadata(own.unwrap_or(&mounts[0].source))?;
        assert_eq!((root.uid(), root.gid()), expected, "{key}");
        assert_eq!(s.stat(&key)?.labels, map(&labels));
    }
    if !is_older {
        let wrong = [("containerd.io/snapshot/uidmapping", "0-100000"), labels[1]];
        s.prepare_labelled("wrong", "base", &wrong).expect_err("this is no mapping");
        refused(s.stat("wrong"), Code::NotFound);
    }
    Ok(())
}

pub(crate) fn what_was_removed_gives_its_space_back(s: &Snapshotter) -> Result<()> {
    let before = s.directories()?;
    s.layer("base", "", |top| Ok(fs::write(top.join("file"), "base")?))?;
    s.prepare("active", "base")?;
    s.view("view", "base")?;
    let full = s.directories()?;
    assert_eq!(full, before + 3);
    s.remove("active")?;
    s.remove("view")?;
    assert_eq!(s.directories()?, before + 1);
    s.remove("base")?;
    assert_eq!(s.directories()?, before);
    Ok(())
}

/// Method: a directory as a crash leaves it, with a number that no snapshot has, and one that is
/// not the snapshotter's.
pub(crate) fn cleanup_frees_what_nothing_refers_to(s: &Snapshotter) -> Result<()> {
    let trees = std::path::Path::new(s.subject.trees);
    let before = s.directories()?;
    for orphan in ["999999", "999998"] {
        fs::create_dir_all(trees.join(orphan).join("fs/etc"))?;
        fs::write(trees.join(orphan).join("fs/etc/passwd"), "left over")?;
    }
    s.layer("base", "", |top| Ok(fs::write(top.join("file"), "base")?))?;
    s.free()?;
    assert!(!trees.join("999999").exists() && !trees.join("999998").exists());
    assert_eq!(s.directories()?, before + 1);
    let mounts = s.view("view", "base")?;
    mounted(&mounts, |top| fs::read(top.join("file")).map(drop).context("it is still there"))
}

/// Method: without a lease. What carries the label stays, and what it refers to by another; the
/// rest goes. A snapshotter that is asked directly only keeps the labels: collecting is
/// containerd's business.
pub(crate) fn labels_for_garbage_collection_are_respected(s: &mut Snapshotter) -> Result<()> {
    s.lease = None;
    let (root, reference) = ("containerd.io/gc.root", "containerd.io/gc.ref.snapshot");
    let reference = format!("{reference}.{}", s.subject.snapshotter);
    let target = s.whole("referred");
    let labels = [(root, "2026-01-01T00:00:00Z"), (reference.as_str(), target.as_str())];
    // One that roots itself while the next is made.
    for name in ["parent", "referred", "loose"] {
        s.prepare_labelled("work", "", &[(root, "now")])?;
        s.commit_labelled(name, "work", &[(root, "now")])?;
    }
    s.prepare_labelled("rooted", "parent", &labels)?;
    assert_eq!(s.stat("rooted")?.labels, map(&labels));
    for name in ["parent", "referred", "loose"] {
        assert_eq!(s.update(name, &[], &["labels"])?.labels, map(&[]));
    }
    s.free()?;
    let left: Vec<String> = s.list(&[])?.into_keys().filter(|name| !name.contains('/')).collect();
    if s.subject.through_containerd {
        assert_eq!(left, ["parent", "referred", "rooted"]);
    } else {
        assert_eq!(left, ["loose", "parent", "referred", "rooted"]);
    }
    Ok(())
}
