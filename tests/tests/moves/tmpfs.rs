//! Files that only memory keeps.

use anyhow::{Context as _, Result, ensure};
use godwit_tests::Node;

use crate::bed::{self, destination, probe, source};
use crate::table::rows;

/// More than the 64 MiB that an image of CRIU's was once limited to.
const MIB: &str = "66";

/// The tmpfs that it is in, as `ctr` takes it.
const TMPFS: &str = "type=tmpfs,src=tmpfs,dst=/scratch,options=rw:size=100m";

rows! {
    a_large_tmpfs_moves: "more than 64 MiB in a tmpfs", Warned,
        "packed and unpacked while the container is frozen; only changes are sent then"
        => keeps_a_file_in_a_tmpfs();
    attributes_in_a_tmpfs_move:
        "in a tmpfs: access control lists, capabilities, extended attributes, sub-second times, hard links, sockets left behind",
        Moves, "needs GNU tar on both nodes, as CRIU does" => keeps_attributes();
    a_large_deleted_file_moves: "an open file without a name, of more than 64 MiB", Warned, "copied while the container is frozen; refused from 4 GiB on"
        => keeps_a_deleted_file();
}

fn keeps_a_file_in_a_tmpfs() -> Result<()> {
    let name = "tmpfs";
    let mut container = probe(name, &["bulk", "/scratch/file", MIB, "kept"]);
    container.mounts.push(TMPFS.to_owned());
    bed::start(&container)?;
    plan_warns(name, "tmpfs /scratch holds 66 MiB: ")?;
    let report = stays_the_same(name, "root/scratch/file")?;
    // It was captured before the freeze.
    let sent = report["stop_and_copy_bytes"].as_u64().context("no bytes in the report")?;
    ensure!(sent < 2 << 20, "{sent} bytes were sent of an unchanged tmpfs: {report}");
    Ok(())
}

fn keeps_attributes() -> Result<()> {
    let name = "names";
    let mut container = probe(name, &["names", "/scratch"]);
    container.mounts.push(TMPFS.to_owned());
    bed::start(&container)?;
    let right = "list true capability true time true directory true link true socket true";
    let before = bed::status(source(), name)?;
    ensure!(before == right, "{before}");
    bed::moved(name)?;
    bed::forget_status(destination(), name)?;
    bed::status_becomes(destination(), name, |line| line == right)?;
    bed::remove(destination(), name)
}

fn keeps_a_deleted_file() -> Result<()> {
    let name = "deleted";
    bed::start(&probe(name, &["bulk", "/file", MIB, "deleted"]))?;
    plan_warns(name, "open file /file (deleted) of process 1 (probe) has 66 MiB: ")?;
    let line = bed::status(source(), name)?;
    stays_the_same(name, &line.replace("holds ", "fd/")).map(drop)
}

fn plan_warns(name: &str, words: &str) -> Result<()> {
    let plan = source().sh(&format!("godwit plan {name} --from edge-a --to edge-b 2>&1"))?;
    ensure!(plan.contains(words), "plan does not say {words:?}: {plan}");
    Ok(())
}

/// A file, by its path below the process's directory in `/proc`, has the same content before and
/// after the move. Returns the report.
fn stays_the_same(name: &str, file: &str) -> Result<serde_json::Value> {
    let digest = |at: &Node| -> Result<String> {
        at.sh(&format!("sha256sum < /proc/{}/{file}", bed::init(at, name)?))
    };
    let before = digest(source())?;
    let report = bed::moved(name)?;
    let after = digest(destination())?;
    ensure!(before == after, "{before} became {after}");
    bed::remove(destination(), name)?;
    Ok(report)
}
