//! Block volumes on real nodes: what minds the inode numbers of its files goes on after a move, a
//! cut is never torn, whatever freezes thaws, and nothing stays mounted.

use std::net::Ipv4Addr;
use std::sync::LazyLock;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use godwit_tests::command::wait_until;
use godwit_tests::images::Image;
use godwit_tests::workload::{self, Container, memhog};
use godwit_tests::{Bed, BedOptions, Node, criu};
use serde_json::Value;

/// The nodes that all tests share; torn down at exit. The last one admits no images of file
/// systems.
static BED: LazyLock<Bed> = LazyLock::new(|| {
    let options = BedOptions::nodes(3).rate_mbit(1000).config(configuration);
    let bed = Bed::start(&options).expect("the test nodes start");
    for image in [Image::Sqlite, Image::Memhog, Image::Postgresql] {
        bed.import(image, "godwit").expect("images can be imported");
    }
    bed
});

const SOON: Duration = Duration::from_secs(20);

fn configuration(node: &str) -> String {
    let admitted = if node == "edge-c" { "" } else { "\"ext4\", \"xfs\"" };
    format!("[cache]\nschedule = false\n[admit]\nfile_systems = [{admitted}]\n")
}

fn node(index: usize) -> &'static Node {
    BED.node(index)
}

fn create(at: &Node, id: &str, options: &[&str]) -> Result<()> {
    let words = ["godwit", "volume", "create", id, "--kind", "block", "--size", "320M"];
    at.ok(&[&words[..], options].concat()).map(drop)
}

/// What `godwit volume ls` knows of a volume.
fn volume(at: &Node, id: &str) -> Result<Value> {
    let listed = at.ok(&["godwit", "--output", "json", "volume", "ls"])?;
    let all: Vec<Value> = serde_json::from_str(&listed)?;
    all.into_iter().find(|one| one["id"] == id).with_context(|| format!("{id} is not listed"))
}

/// Where the host of a container has its block volume of the same name.
fn mounted(name: &str) -> String {
    format!("/run/godwit-volumes/default/{name}/{name}")
}

/// Writes rows into a SQLite database that it keeps open, and the number of the last one into a
/// file.
fn writer(name: &'static str, journal: &str) -> Container<'static> {
    let script = format!(
        "sqlite3 /data/db 'pragma journal_mode={journal}; create table if not exists t (n integer primary key, x)'
         n=0
         while :; do
             n=$((n+1))
             echo \"insert into t values ($n, hex(randomblob(500)));\"
             echo .once /data/last
             echo 'select max(n) from t;'
             usleep 2000
         done | sqlite3 -bail /data/db >/data/said 2>&1"
    );
    Container::new(name, Image::Sqlite).volume(name, "/data", "rw").command(&["sh", "-c", &script])
}

/// The last row that the writer knows to be there.
fn last_row(at: &Node, name: &str) -> Result<u64> {
    let path = format!("{}/last", mounted(name));
    let mut last = None;
    wait_until("the writer has written", SOON, || {
        // It is made again with every row.
        last = at.run(&["cat", &path])?.stdout.trim().parse().ok();
        Ok(last.is_some())
    })?;
    last.context("a row")
}

/// Waits for `more` rows. Errors: the writer has given up.
fn goes_on(at: &Node, name: &str, more: u64) -> Result<()> {
    let before = last_row(at, name)?;
    wait_until("the writer goes on", SOON, || Ok(last_row(at, name)? >= before + more))
        .with_context(|| at.sh(&format!("cat {}/said", mounted(name))).unwrap_or_default())?;
    ensure!(workload::task(at, name)?.as_deref() == Some("RUNNING"), "{name} does not run");
    Ok(())
}

/// Ends the writer and looks at its database: every row is there up to the last, once. Then removes
/// both.
fn ends_whole(at: &Node, name: &str) -> Result<()> {
    at.ok(&["ctr", "tasks", "kill", "-s", "KILL", name])?;
    wait_until("it ends", SOON, || Ok(workload::task(at, name)?.as_deref() == Some("STOPPED")))?;
    let sql = "pragma integrity_check; select count(*) = max(n) from t";
    let answer = at.ok(&["sqlite3", &format!("{}/db", mounted(name)), sql])?;
    ensure!(answer == "ok\n1\n", "{answer}");
    remove(at, name)
}

/// Ends a container and checks its volume with the file system's own program; then nothing of it is
/// left.
fn remove(at: &Node, name: &str) -> Result<()> {
    at.ok(&["ctr", "tasks", "rm", "-f", name])?;
    at.ok(&["ctr", "containers", "rm", name])?;
    at.ok(&["godwit", "volume", "verify", name])?;
    at.ok(&["godwit", "volume", "rm", name])?;
    nothing_is_mounted(at, name)?;
    has_loop_devices(name, 0)
}

/// Images of the volume `name` that a loop device shows, on all nodes together: they have one
/// kernel.
fn has_loop_devices(name: &str, count: usize) -> Result<()> {
    let path = format!("volumes/{name}/data");
    let script = format!("grep -l {path} /sys/block/loop*/loop/backing_file 2>/dev/null || true");
    wait_until(&format!("{count} loop devices of {name}"), SOON, || {
        Ok(node(0).sh(&script)?.lines().count() == count)
    })
}

fn nothing_is_mounted(at: &Node, name: &str) -> Result<()> {
    let script = format!(
        "grep godwit-volumes/default/{name} /proc/mounts || true
         ls /run/godwit-volumes/default 2>/dev/null | grep '^{name}$' || true"
    );
    wait_until("nothing is mounted", SOON, || Ok(at.sh(&script)?.is_empty()))
        .with_context(|| at.sh(&script).unwrap_or_default())
}

fn migrated(name: &str, from: usize, to: usize) -> Result<Value> {
    let report = workload::migrated(node(to), name, node(from), node(to), &[])?;
    nothing_is_mounted(node(from), name)?;
    has_loop_devices(name, 1)?;
    Ok(report)
}

/// There and back again: what a node had serves the return.
#[test]
fn a_sqlite_writer_with_a_rollback_journal_goes_on_after_two_moves() -> Result<()> {
    let name = "rollback";
    create(node(0), name, &[])?;
    writer(name, "delete").start(node(0))?;
    goes_on(node(0), name, 30)?;
    for (from, to) in [(0, 1), (1, 0)] {
        let before = last_row(node(from), name)?;
        let report = migrated(name, from, to)?;
        println!("rollback journal: downtime {} ms", report["downtime_ms"]);
        ensure!(last_row(node(to), name)? >= before, "rows are lost");
        goes_on(node(to), name, 30)?;
    }
    ends_whole(node(0), name)
}

#[test]
fn a_sqlite_writer_with_a_write_ahead_log_goes_on_after_a_move() -> Result<()> {
    let name = "wal";
    create(node(0), name, &[])?;
    writer(name, "wal").start(node(0))?;
    goes_on(node(0), name, 30)?;
    let before = last_row(node(0), name)?;
    migrated(name, 0, 1)?;
    ensure!(last_row(node(1), name)? >= before, "rows are lost");
    goes_on(node(1), name, 30)?;
    // No other process may open it while the writer has it open.
    ends_whole(node(1), name)
}

/// Method: XFS, whose copy has the same identity and is mounted on the same kernel here.
#[test]
fn a_sqlite_writer_on_xfs_goes_on_after_a_move() -> Result<()> {
    let name = "xfs";
    create(node(0), name, &["--fs", "xfs"])?;
    writer(name, "delete").start(node(0))?;
    goes_on(node(0), name, 30)?;
    migrated(name, 0, 1)?;
    goes_on(node(1), name, 30)?;
    ends_whole(node(1), name)
}

#[test]
fn a_postgresql_goes_on_after_a_move() -> Result<()> {
    let name = "pg";
    create(node(0), name, &[])?;
    Container::new(name, Image::Postgresql)
        .volume(name, "/data", "rw")
        .command(&["postgresql.sh", "-c", "listen_addresses="])
        .start(node(0))?;
    let sql = |at: &Node, sql: &str| {
        let client = ["psql", "-h", "/run/postgresql", "-U", "postgres", "-v", "ON_ERROR_STOP=1"];
        let exec = ["ctr", "tasks", "exec", "--exec-id", "psql", name];
        at.ok(&[&exec[..], &client[..], &["-qAtc", sql]].concat())
    };
    wait_until("PostgreSQL answers", Duration::from_secs(60), || {
        Ok(sql(node(0), "select 1").is_ok())
    })?;
    sql(node(0), "create table t as select i, md5(i::text) from generate_series(1, 20000) as i")?;
    let state = "select count(*), sum(i), pg_postmaster_start_time() from t";
    let before = sql(node(0), state)?;
    let report = migrated(name, 0, 1)?;
    println!("PostgreSQL: downtime {} ms", report["downtime_ms"]);
    let after = sql(node(1), state)?;
    ensure!(after == before, "before: {before}\nafter: {after}");
    sql(node(1), "insert into t select i, 'more' from generate_series(1, 1000) as i; checkpoint")?;
    ensure!(sql(node(1), "select count(*) from t")? == "21000\n", "rows are lost");
    remove(node(1), name)
}

fn memhog_answers(addresses: &[Ipv4Addr], at: usize) -> Result<u64> {
    Ok(workload::memhog_answers(&BED, addresses[at])?.beats)
}

/// Method: it writes a line every 5 ms and never flushes; none is missing and none is there twice.
#[test]
fn what_was_written_until_the_freeze_is_there_after_it() -> Result<()> {
    let name = "beats";
    let addresses = workload::networks(&BED, name, 0)?;
    create(node(0), name, &[])?;
    memhog(name, name, 16, 2).start(node(0))?;
    wait_until("it beats", SOON, || Ok(memhog_answers(&addresses, 0)? > 100))?;
    let before = memhog_answers(&addresses, 0)?;
    migrated(name, 0, 1)?;
    wait_until("it goes on", SOON, || Ok(memhog_answers(&addresses, 1)? > before + 100))?;
    let beats = node(1).sh(&format!("cat {}/beats", mounted(name)))?;
    godwit_tests::memhog::longest_gap(&beats).context("beats on the volume")?;
    let count = u64::try_from(beats.lines().count())?;
    ensure!(count > before + 100, "{count} beats on the volume, {before} before the move");
    remove(node(1), name)
}

/// Starts a migration in the background and waits until the source is frozen, while the destination
/// restores slowly.
fn frozen(name: &str) -> Result<(godwit_tests::Background, criu::Changed<'static>)> {
    let slow = criu::slow(node(1), 5)?;
    let words = ["godwit", "migrate", name, "--from", "edge-a", "--to", "edge-b"];
    let running = node(0).spawn(&words, &format!("migrate-{name}"))?;
    wait_until("the source is frozen", SOON, || {
        Ok(workload::task(node(0), name)?.as_deref() == Some("PAUSED"))
    })?;
    // Until the dump is over and the restore has begun.
    wait_until("the image has come", SOON, || {
        Ok(node(1)
            .run(&["test", "-f", &format!("/var/lib/godwit/volumes/{name}/data")])?
            .succeeded())
    })?;
    Ok((running, slow))
}

/// Method: the images at both nodes are looked at while the source is frozen; then its daemon is
/// killed.
#[test]
fn a_frozen_image_is_clean_and_a_daemon_that_dies_meanwhile_thaws_it() -> Result<()> {
    let name = "dies";
    create(node(0), name, &[])?;
    writer(name, "delete").start(node(0))?;
    goes_on(node(0), name, 30)?;
    let (mut running, slow) = frozen(name)?;
    // The destination has mounted its own by now; the source's is what was sent.
    node(0).sh(&format!(
        "cp --sparse=always /var/lib/godwit/volumes/{name}/data /tmp/frozen.img
         e2fsck -f -n /tmp/frozen.img
         ! dumpe2fs -h /tmp/frozen.img 2>&1 | grep needs_recovery
         rm /tmp/frozen.img"
    ))?;
    // A write to a frozen file system waits.
    node(0).sh(&format!("touch {}/late & sleep 0.3; kill -0 $!", mounted(name)))?;
    node(0).kill_daemon()?;
    node(0).start_daemon()?;
    goes_on(node(0), name, 30)?;
    let code = running.wait(Duration::from_secs(120))?;
    ensure!(code != 0, "it was migrated by a dead daemon");
    drop(slow);
    wait_until("the destination is cleaned up", Duration::from_secs(60), || {
        Ok(!node(1).ok(&["godwit", "volume", "ls"])?.contains(name))
    })?;
    nothing_is_mounted(node(1), name)?;
    ends_whole(node(0), name)
}

/// Method: the node offers the container only to itself, and its daemon is away for a while.
#[test]
fn a_daemon_that_dies_during_a_consistent_snapshot_thaws_the_volume() -> Result<()> {
    let name = "cut-off";
    create(node(0), name, &[])?;
    writer(name, "delete").start(node(0))?;
    goes_on(node(0), name, 30)?;
    let slow = criu::slow(node(0), 5)?;
    let words = ["godwit", "snapshot", "create", "--consistent", name];
    let mut running = node(0).spawn(&words, "cut-off")?;
    wait_until("it is frozen", SOON, || {
        Ok(workload::task(node(0), name)?.as_deref() == Some("PAUSED"))
    })?;
    // CRIU is called once the file system is frozen too, and takes its time.
    slow.wait_for_call()?;
    let mut late = node(0).spawn(&["touch", &format!("{}/late", mounted(name))], "late")?;
    node(0).kill_daemon()?;
    std::thread::sleep(Duration::from_secs(1));
    ensure!(late.ended()?.is_none(), "a write to a frozen file system did not wait");
    drop(slow);
    node(0).start_daemon()?;
    ensure!(late.wait(SOON)? == 0, "the write that waited failed");
    goes_on(node(0), name, 30)?;
    ensure!(running.wait(SOON)? != 0, "a dead daemon took a snapshot");
    ends_whole(node(0), name)
}

/// Method: the shim that could thaw is killed; containerd has another one clear up. All had been
/// sent, so the hand-off goes on.
#[test]
fn a_shim_that_dies_while_frozen_leaves_nothing_frozen_or_mounted() -> Result<()> {
    let name = "shimless";
    create(node(0), name, &[])?;
    writer(name, "delete").start(node(0))?;
    goes_on(node(0), name, 10)?;
    let (mut running, slow) = frozen(name)?;
    node(0).sh(&format!("pkill -KILL -f 'shim-godwit-v[1].* -id {name}'"))?;
    nothing_is_mounted(node(0), name)?;
    has_loop_devices(name, 1)?;
    let code = running.wait(Duration::from_secs(60))?;
    drop(slow);
    ensure!(code == 0, "the hand-off did not go on");
    goes_on(node(1), name, 10)?;
    ends_whole(node(1), name)
}

#[test]
fn a_migration_that_fails_after_the_freeze_thaws_the_volume() -> Result<()> {
    aborted("aborted", "ext4")
}

#[test]
fn a_migration_that_fails_after_the_freeze_thaws_xfs_too() -> Result<()> {
    aborted("aborted-xfs", "xfs")
}

/// Method: the destination's CRIU fails; the source's writer waits in a frozen file system until
/// the thaw.
fn aborted(name: &'static str, file_system: &str) -> Result<()> {
    create(node(0), name, &["--fs", file_system])?;
    writer(name, "delete").start(node(0))?;
    goes_on(node(0), name, 30)?;
    let broken = criu::broken(node(1))?;
    let refused = workload::migrate(node(0), name, node(0), node(1), &[])?;
    drop(broken);
    ensure!(refused.stderr.contains("runs on at its source"), "{}", refused.stderr);
    goes_on(node(0), name, 30)?;
    ensure!(!node(1).ok(&["godwit", "volume", "ls"])?.contains(name), "a volume is left");
    nothing_is_mounted(node(1), name)?;
    has_loop_devices(name, 1)?;
    // It can be moved still.
    migrated(name, 0, 1)?;
    goes_on(node(1), name, 10)?;
    ends_whole(node(1), name)
}

/// Method: a file system that cannot be frozen is mounted beside the volume, and the volume once
/// more after it: the last comes first.
#[test]
fn a_freeze_that_fails_half_way_thaws_what_was_frozen() -> Result<()> {
    let (name, at) = ("unfrozen", "/run/godwit-volumes/default/unfrozen");
    create(node(0), name, &[])?;
    writer(name, "delete").start(node(0))?;
    goes_on(node(0), name, 30)?;
    node(0).sh(&format!(
        "mkdir {at}/beside {at}/again
         mount -t tmpfs tmpfs {at}/beside
         mount --bind {} {at}/again",
        mounted(name)
    ))?;
    let refused = workload::migrate(node(0), name, node(0), node(1), &[])?;
    let text = refused.to_string();
    ensure!(text.contains(&format!("freezing the file system at {at}/beside")), "{text}");
    ensure!(text.contains("runs on at its source"), "{text}");
    goes_on(node(0), name, 30)?;
    ensure!(!node(1).ok(&["godwit", "volume", "ls"])?.contains(name), "a volume is left");
    node(0).sh(&format!("cd {at}; umount again beside; rmdir again beside"))?;
    migrated(name, 0, 1)?;
    goes_on(node(1), name, 10)?;
    ends_whole(node(1), name)
}

/// Method: container and volume are removed, and come back as they were at the cut.
#[test]
fn a_block_volume_comes_back_from_a_consistent_snapshot() -> Result<()> {
    let name = "again";
    create(node(0), name, &[])?;
    writer(name, "delete").start(node(0))?;
    goes_on(node(0), name, 30)?;
    let before = last_row(node(0), name)?;
    let words = ["godwit", "--output", "json", "snapshot", "create", "--consistent", name];
    let taken: Value = serde_json::from_str(&node(0).ok(&words)?)?;
    let whole = |one: &&Value| one["subject"] == format!("container|default|{name}");
    let cut = taken.as_array().context("snapshots")?.iter().find(whole).context("the cut")?;
    goes_on(node(0), name, 10)?;
    node(0).ok(&["ctr", "tasks", "rm", "-f", name])?;
    node(0).ok(&["ctr", "containers", "rm", name])?;
    node(0).ok(&["godwit", "volume", "rm", name])?;
    let id = cut["id"].as_str().context("its number")?;
    node(0).ok(&["godwit", "snapshot", "restore", id])?;
    ensure!(last_row(node(0), name)? >= before, "rows are lost");
    goes_on(node(0), name, 10)?;
    ends_whole(node(0), name)
}

/// Create, use by two containers of one node, which see one file system, export, remove; and what
/// is refused.
#[test]
fn a_block_volume_lives_and_ends() -> Result<()> {
    let (at, name) = (node(0), "life");
    let refused = |words: &[&str]| -> Result<String> {
        let done = at.run(&[&["godwit", "volume"], words].concat())?;
        ensure!(!done.succeeded(), "{words:?} succeeded");
        Ok(done.stderr)
    };
    let block = ["create", name, "--kind", "block"];
    for (options, word) in [
        (&[][..], "--size"),
        (&["--size", "0"], "16 MiB"),
        (&["--size", "1000T"], "1 TiB"),
        (&["--size", "10X"], "K, M, G or T"),
        (&["--size", "64M", "--fs", "vfat"], "ext4 or xfs"),
        (&["--size", "64M", "--fs", "xfs"], "mkfs.xfs failed"),
    ] {
        let text = refused(&[&block[..], options].concat())?;
        ensure!(text.contains(word), "{options:?}: {text}");
    }
    let text = refused(&["create", name, "--size", "64M"])?;
    ensure!(text.contains("--kind block"), "{text}");
    ensure!(!at.ok(&["godwit", "volume", "ls"])?.contains(name), "a refused volume is there");
    create(at, name, &[])?;
    ensure!(refused(&["create", name])?.contains("exists on this node already"), "taken");
    let line = volume(at, name)?;
    ensure!(line["kind"] == "block" && line["file_system"] == "ext4", "{line}");
    ensure!(line["size_bytes"] == 320 << 20, "{line}");

    let sleeper = |id: &'static str| {
        let script = "echo $0 > /data/$0; while :; do usleep 100000; done";
        Container::new(id, Image::Sqlite)
            .volume(name, "/data", "rw")
            .command(&["sh", "-c", script, id])
    };
    for id in ["life-1", "life-2"] {
        sleeper(id).start(at)?;
    }
    let seen = |id: &str| at.sh(&format!("ls /run/godwit-volumes/default/{id}/{name}"));
    wait_until("both see both", SOON, || {
        Ok(seen("life-1")? == "life-1\nlife-2\n" && seen("life-2")? == seen("life-1")?)
    })?;
    has_loop_devices(name, 1)?;
    let options = at.sh("grep godwit-volumes/default/life-1 /proc/mounts")?;
    for option in ["nosuid", "nodev", "errors=remount-ro"] {
        ensure!(options.contains(option), "{options}");
    }
    for words in [["rm", name, ""], ["verify", name, ""], ["export", name, "/tmp/copy"]] {
        let words: Vec<&str> = words.into_iter().filter(|word| !word.is_empty()).collect();
        ensure!(refused(&words)?.contains("in use by container default/life-"), "{words:?}");
    }
    // The daemon's restart touches no mount.
    at.kill_daemon()?;
    at.start_daemon()?;
    at.ok(&["ctr", "tasks", "rm", "-f", "life-1"])?;
    at.ok(&["ctr", "tasks", "exec", "--exec-id", "w", "life-2", "touch", "/data/still"])?;
    nothing_is_mounted(at, "life-1")?;
    at.ok(&["ctr", "tasks", "rm", "-f", "life-2"])?;
    at.ok(&["ctr", "containers", "rm", "life-1", "life-2"])?;
    has_loop_devices(name, 0)?;
    at.ok(&["godwit", "volume", "export", name, "/tmp/copy"])?;
    at.sh(&format!(
        "e2fsck -f -n /tmp/copy/{name}.img; debugfs -R 'ls -p /' /tmp/copy/{name}.img | grep -q still"
    ))?;
    at.ok(&["godwit", "volume", "verify", name])?;
    at.ok(&["godwit", "volume", "rm", name])?;
    nothing_is_mounted(at, "life-2")
}

/// Received images are parsed by the kernel: only a node that says so mounts them.
#[test]
fn a_node_that_admits_no_images_refuses_a_block_volume() -> Result<()> {
    let name = "foreign";
    create(node(0), name, &[])?;
    writer(name, "delete").start(node(0))?;
    goes_on(node(0), name, 10)?;
    let words = ["godwit", "--output", "json", "plan", name, "--from", "edge-a", "--to", "edge-c"];
    let plan: Value = serde_json::from_str(&node(2).run(&words)?.stdout)?;
    let admit = "admit.file_systems = [\"ext4\"]";
    ensure!(plan["obstacles"].to_string().replace('\\', "").contains(admit), "{plan}");
    let refused = workload::migrate(node(2), name, node(0), node(2), &[])?;
    ensure!(!refused.succeeded() && refused.stderr.contains(admit), "{}", refused.stderr);
    // A client that sets the annotation asks for nothing beforehand.
    let from = format!("edge-a/default/{name}");
    let refused =
        writer(name, "delete").annotation("godwit.io/migrate-from", &from).run(node(2))?;
    ensure!(!refused.succeeded() && refused.stderr.contains(admit), "{}", refused.stderr);
    nothing_is_mounted(node(2), name)?;
    goes_on(node(0), name, 10)?;
    remove(node(0), name)
}

/// Method: no volume is there beforehand, and the destination's command line knows nothing of its
/// kind or size.
#[test]
fn an_annotation_brings_a_block_volume_with_all_that_is_known_of_it() -> Result<()> {
    let name = "by-annotation";
    create(node(0), name, &["--fs", "xfs"])?;
    let known = volume(node(0), name)?;
    ensure!(known["kind"] == "block" && known["file_system"] == "xfs", "{known}");
    writer(name, "delete").start(node(0))?;
    goes_on(node(0), name, 10)?;
    let before = last_row(node(0), name)?;
    let from = format!("edge-a/default/{name}");
    writer(name, "delete").annotation("godwit.io/migrate-from", &from).start(node(1))?;
    ensure!(last_row(node(1), name)? >= before, "rows are lost");
    goes_on(node(1), name, 10)?;
    ensure!(volume(node(1), name)? == known, "{} at the destination", volume(node(1), name)?);
    node(0).run(&["ctr", "tasks", "rm", "-f", name])?;
    node(0).ok(&["ctr", "containers", "rm", name])?;
    ends_whole(node(1), name)
}

#[test]
fn a_database_that_minds_the_move_of_a_tree_is_warned_of() -> Result<()> {
    let name = "warned";
    node(0).ok(&["godwit", "volume", "create", name])?;
    let at = format!("/var/lib/godwit/volumes/{name}/data");
    writer(name, "delete").start(node(0))?;
    wait_until("it writes", SOON, || {
        Ok(node(0).run(&["test", "-s", &format!("{at}/last")])?.succeeded())
    })?;
    let words = ["godwit", "--output", "json", "plan", name, "--from", "edge-a", "--to", "edge-b"];
    let plan: Value = serde_json::from_str(&node(0).ok(&words)?)?;
    let warning = "SQLite database /data/db is open on volume warned";
    ensure!(plan["warnings"].to_string().contains(warning), "{plan}");
    let words = ["godwit", "migrate", name, "--from", "edge-a", "--to", "edge-b"];
    let done = node(0).run(&words)?;
    ensure!(format!("{}{}", done.stdout, done.stderr).contains(warning), "{done:?}");
    node(1).run(&["ctr", "tasks", "rm", "-f", name])?;
    node(1).ok(&["ctr", "containers", "rm", name])?;
    node(1).ok(&["godwit", "volume", "rm", name]).map(drop)
}
