//! Files in unusual states, on volumes and among the container's own.

use anyhow::{Context, Result, ensure};
use godwit_tests::{Node, workload};
use serde_json::Value;

use crate::bed::{self, destination, probe, source};
use crate::table::rows;

rows! {
    a_direct_write_that_takes_long: "a direct (O_DIRECT) write in flight", Moves,
        "the freeze waits up to 10 s for the disk" => is_whole_after_a_slow_write();
    an_open_file_whose_name_was_removed: "an open file whose name was removed while another hard link is left", Moves, ""
        => has_the_file_by_its_other_name();
    an_open_file_whose_name_was_removed_in_a_snapshot: "the same, in a consistent snapshot", Moves,
        "the snapshot is restored with it; the container that was captured runs on with it"
        => comes_back_with_the_file();
    directories_nested_too_deep: "directories nested more than 200 deep, in a volume or the writable layer", Refused,
        "move what they hold further up, or remove it" => names_the_deep_directory();
    native_aio: "native AIO (`io_setup`) that has been used", Refused,
        "switch it off: its requests go on while the process stands still" => is_refused_once_it_was_used();
    an_unused_ring_of_native_aio: "a ring of native AIO that was never used, as nginx has one", Moves, ""
        => is_used_after_the_move();
}

/// The count behind a word of the probe's line.
fn count(line: &str, word: &str) -> Option<u64> {
    line.strip_prefix(word)?.trim().parse().ok()
}

/// Method: the disk takes 1.5 s for a write, during which all rounds read the file. The write
/// leaves no mark when it ends, and the container cannot be frozen before.
fn is_whole_after_a_slow_write() -> Result<()> {
    let name = "slow-write";
    source().ok(&["godwit", "volume", "create", name])?;
    let probe = probe(name, &["direct-writes", "/data/file"]).volume(name, "/data", "rw");
    bed::start(&probe)?;
    bed::status_becomes(source(), name, |line| count(line, "written ").is_some())?;
    throttle(name, 2_000_000)?;
    let line = bed::status(source(), name)?;
    let before = count(&line, "written ").or(count(&line, "writing ")).unwrap_or(0);
    bed::status_becomes(source(), name, |line| {
        count(line, "writing ").is_some_and(|count| count > before)
    })?;
    bed::moved(name)?;
    bed::status_becomes(destination(), name, |line| {
        count(line, "written ").is_some_and(|count| count > before + 2)
    })?;
    bed::remove(destination(), name)
}

/// Method: one in the writable layer and one on a volume, there and back and there again.
fn has_the_file_by_its_other_name() -> Result<()> {
    let name = "removed-name";
    source().ok(&["godwit", "volume", "create", name])?;
    let probe = probe(name, &["removed-names", "/", "/data"]).volume(name, "/data", "rw");
    bed::start(&probe)?;
    for (from, to) in
        [(source(), destination()), (destination(), source()), (source(), destination())]
    {
        let before = count(&bed::status(from, name)?, "linked ").unwrap_or(0);
        workload::migrated(source(), name, from, to, &[])?;
        bed::status_becomes(to, name, |line| {
            count(line, "linked ").is_some_and(|count| count > before + 5)
        })?;
        let left = to.sh(&format!(
            "ls /proc/{pid}/root /proc/{pid}/root/data",
            pid = bed::init(to, name)?
        ))?;
        ensure!(!left.contains("link_remap"), "a name is left at {}: {left}", to.name());
    }
    bed::remove(destination(), name)
}

/// Method: the probe ends with an error if a file is not what it wrote. It goes on after the
/// snapshot, is removed with its volume, and comes back.
fn comes_back_with_the_file() -> Result<()> {
    let name = "kept-name";
    source().ok(&["godwit", "volume", "create", name])?;
    let probe = probe(name, &["removed-names", "/", "/data"]).volume(name, "/data", "rw");
    bed::start(&probe)?;
    let linked = |line: &str| count(line, "linked ");
    let before = linked(&bed::status(source(), name)?).unwrap_or(0);
    let create = ["godwit", "--output", "json", "snapshot", "create", "--consistent", name];
    let taken: Value = serde_json::from_str(&source().ok(&create)?)?;
    let after = linked(&bed::status(source(), name)?).unwrap_or(0);
    bed::status_becomes(source(), name, |line| linked(line) > Some(after + 5))?;
    let no_name_is_left = || {
        let list =
            format!("ls /proc/{pid}/root /proc/{pid}/root/data", pid = bed::init(source(), name)?);
        let left = source().sh(&list)?;
        ensure!(!left.contains("link_remap"), "a name is left: {left}");
        Ok(())
    };
    no_name_is_left()?;
    bed::remove(source(), name)?;
    source().ok(&["godwit", "volume", "rm", name])?;
    let whole = format!("container|default|{name}");
    let mut cuts = taken.as_array().into_iter().flatten();
    let cut = cuts.find(|one| one["subject"] == *whole).with_context(|| taken.to_string())?;
    let id = cut["id"].as_str().context("its number")?;
    source().ok(&["godwit", "snapshot", "restore", id])?;
    bed::status_becomes(source(), name, |line| linked(line) > Some(before + 5))?;
    no_name_is_left()?;
    bed::remove(source(), name)
}

/// Method: one on a volume, then one in the writable layer. Without it the container moves.
fn names_the_deep_directory() -> Result<()> {
    let name = "deep";
    source().ok(&["godwit", "volume", "create", name])?;
    bed::start(&probe(name, &["idle"]).volume(name, "/data", "rw"))?;
    for place in ["data/deep", "deep"] {
        let path = format!("/proc/{}/root/{place}", bed::init(source(), name)?);
        let levels = vec!["d"; 201].join("/");
        source().sh(&format!("mkdir -p {path}/{levels}"))?;
        bed::is_refused(name, &["deep/d/d/d/", "nests deeper than 200 directories", "remove it"])?;
        source().sh(&format!("rm -r {path}"))?;
    }
    bed::moved(name)?;
    bed::remove(destination(), name)
}

/// Has a probe make a request; it completes.
fn use_ring(at: &Node, name: &str) -> Result<()> {
    at.sh(&format!("touch /proc/{}/root/go", bed::init(at, name)?))?;
    bed::status_becomes(at, name, |line| line == "completed 13").map(drop)
}

fn is_refused_once_it_was_used() -> Result<()> {
    let name = "aio";
    bed::start(&probe(name, &["aio-ring"]))?;
    use_ring(source(), name)?;
    bed::is_refused(name, &["(probe) uses native AIO", "innodb_use_native_aio=OFF"])?;
    bed::remove(source(), name)
}

fn is_used_after_the_move() -> Result<()> {
    let name = "aio-unused";
    bed::start(&probe(name, &["aio-ring"]))?;
    bed::moved(name)?;
    use_ring(destination(), name)?;
    bed::remove(destination(), name)
}

/// Limits the bytes per second that a container at the source writes to the disk of its volumes.
fn throttle(name: &str, bytes_per_s: u32) -> Result<()> {
    let pid = bed::init(source(), name)?;
    // Limits are per disk, not per partition. The groups are those of version 1 or 2, whichever has
    // the controller.
    let script = format!(
        "device=$(stat -c %d /var/lib/godwit); device=$((device / 256)):$((device % 256))\n\
         sys=/sys/dev/block/$device\n\
         [ ! -e $sys/partition ] || device=$(cat $(readlink -f $sys)/../dev)\n\
         group=$(sed -n 's/^[0-9]*:.*blkio.*:\\(.*\\)/\\1/p' /proc/{pid}/cgroup)\n\
         if [ -n \"$group\" ]; then\n\
             echo $device {bytes_per_s} >/sys/fs/cgroup/blkio$group/blkio.throttle.write_bps_device\n\
         else\n\
             group=$(sed -n 's/^0:://p' /proc/{pid}/cgroup)\n\
             echo $device wbps={bytes_per_s} >/sys/fs/cgroup$group/io.max\n\
         fi"
    );
    source().sh(&script).map(drop)
}
