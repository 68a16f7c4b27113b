//! `godwit check`: damage is found, whether the daemon runs or not, and repaired from a neighbour
//! that has what is lost.

use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{fs, io};

use anyhow::{Context, Result, ensure};
use godwit_protos::Digest;
use godwit_tests::command::wait_until;
use godwit_tests::images::{self, Image};
use godwit_tests::workload::{self, Container, memhog};
use godwit_tests::{Bed, BedOptions, Node, neighbours};
use serde_json::Value;

const STATE: &str = "/var/lib/godwit";
const SOON: Duration = Duration::from_secs(20);
/// Of a pack and of a record (docs/formats.md, "The store").
const PACK_HEADER: u64 = 24;
const RECORD_HEADER: u64 = 44;

/// Exit code and report.
fn check(node: &Node, words: &[&str]) -> Result<(i32, Value)> {
    let done = node.run(&[&["godwit", "--output", "json", "check"], words].concat())?;
    let report = serde_json::from_str(&done.stdout).with_context(|| done.to_string())?;
    Ok((done.code, report))
}

fn len(report: &Value, field: &str) -> usize {
    report[field].as_array().map_or(usize::MAX, Vec::len)
}

/// Flips one bit of an object that something hangs on, in the first pack. Returns what checking
/// then says.
fn flip_a_byte(node: &Node) -> Result<Value> {
    let packs = node.path(STATE).join("store/packs");
    let mut names: Vec<_> = fs::read_dir(&packs)?.collect::<Result<_, _>>()?;
    names.sort_by_key(fs::DirEntry::file_name);
    for pack in names {
        let file = fs::File::options().read(true).write(true).open(pack.path())?;
        let mut at = PACK_HEADER;
        let mut header = [0; 4];
        // Tens of records, of thousands.
        for _ in 0..64 {
            if file.read_exact_at(&mut header, at).is_err() {
                break;
            }
            let end = at + RECORD_HEADER + u64::from(u32::from_le_bytes(header));
            flip(&file, end - 1)?;
            let (code, report) = check(node, &[])?;
            if len(&report, "lost") > 0 {
                ensure!(code == 3, "exit code {code}: {report}");
                return Ok(report);
            }
            // Nothing needs it any more.
            flip(&file, end - 1)?;
            at = end;
        }
    }
    anyhow::bail!("no object is in use")
}

fn flip(file: &fs::File, at: u64) -> Result<()> {
    let mut byte = [0];
    file.read_exact_at(&mut byte, at)?;
    Ok(file.write_all_at(&[byte[0] ^ 1], at)?)
}

/// Method: a container moves, so that both nodes keep the same snapshots of it; then bytes of one
/// node's packs change.
#[test]
fn what_is_damaged_is_found_and_fetched_again_from_a_neighbour() -> Result<()> {
    let name = "checked";
    let bed = Bed::start(&BedOptions::nodes(2))?;
    let [a, b] = [0, 1].map(|index| bed.node(index));
    images::import(a, Image::Memhog, "godwit")?;
    workload::networks(&bed, name, 0)?;
    a.ok(&["godwit", "volume", "create", name])?;
    memhog(name, name, 8, 1).start(a)?;
    workload::migrated(b, name, a, b, &[])?;
    wait_until("both keep what moved", SOON, || {
        let keeps = |node: &Node| {
            Ok::<_, anyhow::Error>(node.ok(&["godwit", "snapshot", "list"])?.contains("memory|"))
        };
        Ok(keeps(a)? && keeps(b)?)
    })?;
    let (code, report) = check(b, &[])?;
    ensure!(code == 0 && report["objects"].as_u64() > Some(100), "exit code {code}: {report}");
    ensure!(report["layers"].as_u64() > Some(0), "{report}");

    a_flipped_byte_is_found_and_mended(b)?;
    what_is_repaired_offline_is_fetched_by_the_next_repair(b)?;
    without_a_neighbour_it_is_told_what_is_lost(a, b)?;
    a_laid_out_volume_and_the_store_mend_each_other(a, b)?;
    a_missing_directory_of_a_snapshot_is_told(b)?;
    a_layer_that_lost_its_directory_is_unpacked_again(b)?;
    a_damaged_database_is_told_and_left_alone(b, name)?;
    ensure!(check(b, &[])?.0 == 0);
    workload_goes_on(b, name)
}

fn a_flipped_byte_is_found_and_mended(node: &Node) -> Result<()> {
    let found = flip_a_byte(node)?;
    ensure!(len(&found, "damaged") == 1 && len(&found, "findings") == 0, "{found}");
    ensure!(check(node, &[])?.1 == found, "looking has changed something");
    node.stop_daemon()?;
    let offline = check(node, &[]);
    node.start_daemon()?;
    let (code, offline) = offline?;
    ensure!(code == 3 && offline["damaged"] == found["damaged"], "{code}: {offline}");
    ensure!(offline["lost"] == found["lost"], "{offline}");

    let (code, report) = check(node, &["--repair"])?;
    ensure!(code == 0 && report["quarantined"] == 1, "{code}: {report}");
    ensure!(report["fetched"].as_u64() >= Some(1), "{report}");
    let (code, report) = check(node, &[])?;
    ensure!(code == 0 && report["objects"] == found["objects"], "{code}: {report}");
    Ok(())
}

fn what_is_repaired_offline_is_fetched_by_the_next_repair(node: &Node) -> Result<()> {
    let found = flip_a_byte(node)?;
    node.stop_daemon()?;
    let offline = check(node, &["--repair"]);
    node.start_daemon()?;
    let (code, report) = offline?;
    ensure!(code == 3 && report["quarantined"] == 1 && report["fetched"] == 0, "{code}: {report}");
    ensure!(len(&report, "damaged") == 0 && report["lost"] == found["lost"], "{report}");
    let (code, report) = check(node, &["--repair"])?;
    ensure!(code == 0 && report["quarantined"] == 0, "{code}: {report}");
    ensure!(report["fetched"].as_u64() >= Some(1), "{report}");
    Ok(())
}

fn without_a_neighbour_it_is_told_what_is_lost(neighbour: &Node, node: &Node) -> Result<()> {
    neighbour.stop_daemon()?;
    flip_a_byte(node)?;
    let (code, report) = check(node, &["--repair"])?;
    ensure!(code == 3 && report["quarantined"] == 1 && report["fetched"] == 0, "{code}: {report}");
    ensure!(len(&report, "damaged") == 0 && len(&report, "lost") > 0, "{report}");
    let lost = &report["lost"][0];
    ensure!(lost["name"].as_str().is_some_and(|name| name.contains(" of ")), "{report}");
    ensure!(lost["advice"].as_str().is_some_and(|text| text.contains("snapshot delete")), "{lost}");
    let said = node.run(&["godwit", "check"])?;
    ensure!(said.code == 3 && said.stdout.contains("lost: "), "{said}");
    // It is not given up: once a neighbour is there, it comes back.
    neighbour.start_daemon()?;
    let (code, report) = check(node, &["--repair"])?;
    ensure!(code == 0 && report["fetched"].as_u64() >= Some(1), "{code}: {report}");
    Ok(())
}

/// A read-only volume that is imported and laid out, and what its one file holds.
struct Content {
    digest: String,
    text: Vec<u8>,
}

const ARCHIVE: &str = "/tmp/content.tar";

impl Content {
    fn import(node: &Node) -> Result<Self> {
        node.sh(&format!(
            "mkdir /tmp/content; head -c 300000 /dev/urandom > /tmp/content/file
             tar -C /tmp/content -cf {ARCHIVE} ."
        ))?;
        let digest = node.ok(&["godwit", "volume", "import", ARCHIVE])?.trim().to_owned();
        // It is laid out for that.
        node.ok(&["godwit", "volume", "verify", &digest])?;
        Ok(Self { digest, text: fs::read(node.path("/tmp/content/file"))? })
    }

    fn file(&self, node: &Node) -> PathBuf {
        let hex = self.digest.trim_start_matches("sha256:");
        node.path(Path::new(STATE).join("content").join(hex).join("file"))
    }

    fn is_laid_out(&self, node: &Node) -> Result<()> {
        ensure!(fs::read(self.file(node))? == self.text, "what is laid out is something else");
        Ok(())
    }

    /// Damages one chunk of it in the store.
    fn spoil(&self, node: &Node) -> Result<()> {
        for pack in fs::read_dir(node.path(STATE).join("store/packs"))? {
            let path = pack?.path();
            let (bytes, chunk) = (fs::read(&path)?, &self.text[..64]);
            let Some(at) = bytes.windows(64).position(|some| some == chunk) else { continue };
            flip(&fs::File::options().read(true).write(true).open(&path)?, at as u64)?;
        }
        Ok(())
    }
}

/// Method: at first no other node has the volume, so that only the two copies here can help each
/// other.
fn a_laid_out_volume_and_the_store_mend_each_other(neighbour: &Node, node: &Node) -> Result<()> {
    neighbour.stop_daemon()?;
    let content = Content::import(node)?;
    content.spoil(node)?;
    let (code, report) = check(node, &[])?;
    ensure!(code == 3 && len(&report, "damaged") == 1 && len(&report, "lost") == 1, "{report}");
    ensure!(report["lost"][0]["name"] == format!("volume {}", content.digest), "{report}");
    let (code, report) = check(node, &["--repair"])?;
    ensure!(code == 0 && report["quarantined"] == 1 && report["fetched"] == 0, "{code}: {report}");

    // What is laid out changes, and the store is whole.
    fs::write(content.file(node), "other")?;
    let (code, report) = check(node, &[])?;
    ensure!(code == 3 && len(&report, "findings") == 1, "{code}: {report}");
    let (code, report) = check(node, &["--repair"])?;
    ensure!(code == 0, "{code}: {report}");
    content.is_laid_out(node)?;
    fs::remove_file(content.file(node))?;
    node.stop_daemon()?;
    let offline = check(node, &["--repair"]);
    neighbours::start(node)?;
    let (code, report) = offline?;
    ensure!(code == 0, "{code}: {report}");
    content.is_laid_out(node)?;

    what_is_mounted_stays_as_it_is(node, &content)?;

    // Neither is whole, and a neighbour has it.
    neighbour.start_daemon()?;
    fs::copy(node.path(ARCHIVE), neighbour.path(ARCHIVE))?;
    let digest = neighbour.ok(&["godwit", "volume", "import", ARCHIVE])?;
    ensure!(digest.trim() == content.digest, "{digest} is not {}", content.digest);
    content.spoil(node)?;
    fs::write(content.file(node), "other")?;
    let (code, report) = check(node, &["--repair"])?;
    ensure!(code == 0 && report["fetched"].as_u64() >= Some(1), "{code}: {report}");
    content.is_laid_out(node)?;
    node.ok(&["godwit", "volume", "rm", &content.digest]).map(drop)
}

fn what_is_mounted_stays_as_it_is(node: &Node, content: &Content) -> Result<()> {
    images::import(node, Image::Busybox, "godwit")?;
    Container::new("reader", Image::Busybox)
        .volume(&content.digest, "/data", "ro")
        .command(&["sleep", "1000"])
        .start(node)?;
    fs::write(content.file(node), "other")?;
    let (code, report) = check(node, &["--repair"])?;
    ensure!(code == 3 && len(&report, "findings") == 1, "{code}: {report}");
    let finding = report["findings"][0].as_str().unwrap_or_default();
    ensure!(finding.contains("mounted"), "what to do is not said: {finding}");
    let read = ["ctr", "tasks", "exec", "--exec-id", "look", "reader", "cat", "/data/file"];
    ensure!(node.ok(&read)? == "other", "a container's files are exchanged");
    node.ok(&["ctr", "tasks", "rm", "-f", "reader"])?;
    node.ok(&["ctr", "containers", "rm", "reader"])?;
    let (code, report) = check(node, &["--repair"])?;
    ensure!(code == 0, "{code}: {report}");
    content.is_laid_out(node)
}

/// Method: a layer of its own, and an active snapshot over it, which nothing mounts.
fn a_missing_directory_of_a_snapshot_is_told(node: &Node) -> Result<()> {
    node.sh("ctr snapshots --snapshotter godwit prepare lower > /dev/null
         ctr snapshots --snapshotter godwit commit layer lower
         ctr snapshots --snapshotter godwit prepare upper layer > /dev/null")?;
    let mounts =
        node.ok(&["ctr", "snapshots", "--snapshotter", "godwit", "mounts", "/mnt", "upper"])?;
    let directory = |option: &str| {
        let path = mounts.split([',', ' ', '\n']).find_map(|word| word.strip_prefix(option));
        path.with_context(|| mounts.clone())
    };
    let (layer, work) = (directory("lowerdir=")?, directory("workdir=")?);
    let tree = node.path(layer.trim_end_matches("/fs"));
    let away = node.path(STATE).join("snapshots/away");
    node.stop_daemon()?;
    fs::rename(&tree, &away)?;
    let told = check(node, &[]);
    fs::rename(&away, &tree)?;
    let (code, report) = told?;
    let finding = report["findings"][0].as_str().unwrap_or_default();
    ensure!(code == 3 && len(&report, "findings") == 1, "{code}: {report}");
    ensure!(finding.contains(layer) && finding.contains("pull again"), "{finding}");
    let (code, report) = check(node, &[])?;
    ensure!(code == 0, "{code}: {report}");

    // What would not be missed is made again, when the snapshots are opened or as they are used.
    let at = node.path(work);
    fs::remove_dir(&at)?;
    let (code, report) = check(node, &[])?;
    ensure!(code == 0 && at.is_dir(), "{code}: {report}");
    neighbours::start(node)?;
    fs::remove_dir(&at)?;
    let (code, report) = check(node, &[])?;
    let finding = report["findings"][0].as_str().unwrap_or_default();
    ensure!(code == 3 && finding.contains(work) && finding.contains("--repair"), "{report}");
    let (code, report) = check(node, &["--repair"])?;
    ensure!(code == 0 && at.is_dir(), "{code}: {report}");
    node.sh(
        "ctr snapshots --snapshotter godwit rm upper; ctr snapshots --snapshotter godwit rm layer",
    )
    .map(drop)
}

/// Method: the layers of an image that nothing else has, whose blobs containerd has.
fn a_layer_that_lost_its_directory_is_unpacked_again(node: &Node) -> Result<()> {
    let trees = node.path(STATE).join("snapshots/fs");
    let all = || -> Result<Vec<PathBuf>> {
        Ok(fs::read_dir(&trees)?.map(|entry| Ok(entry?.path())).collect::<io::Result<_>>()?)
    };
    let before = all()?;
    images::import(node, Image::Redis, "godwit")?;
    let mut layers = all()?;
    layers.retain(|tree| !before.contains(tree) && tree.file_name() != Some(".spare".as_ref()));
    let count = layers.len();
    ensure!(count > 0, "no layer came");
    layers.iter().try_for_each(fs::remove_dir_all)?;
    let (code, report) = check(node, &[])?;
    ensure!(code == 3 && len(&report, "findings") == count, "{code}: {report}");
    let (code, report) = check(node, &["--repair"])?;
    ensure!(code == 0 && layers.iter().all(|tree| tree.join("fs").is_dir()), "{code}: {report}");
    let run = ["ctr", "run", "--rm", "--snapshotter", "godwit", Image::Redis.reference(), "again"];
    let said = node.ok(&[&run[..], &["redis-server", "--version"]].concat())?;
    ensure!(said.contains("Redis server"), "{said}");
    node.ok(&["ctr", "images", "rm", "--sync", Image::Redis.reference()]).map(drop)
}

/// One bit of every copy of `key`: a database may still have some that it no longer reads.
fn with_a_bit_flipped(bytes: &[u8], key: &[u8]) -> Result<Vec<u8>> {
    let mut flipped = bytes.to_vec();
    let places = bytes.windows(key.len()).enumerate().filter(|(_, some)| *some == key);
    places.for_each(|(at, _)| flipped[at + key.len() / 2] ^= 1);
    ensure!(flipped != bytes, "the key is not there");
    Ok(flipped)
}

fn a_damaged_database_is_told_and_left_alone(node: &Node, name: &str) -> Result<()> {
    let listed = node.ok(&["godwit", "--output", "json", "snapshot", "list"])?;
    let listed: Value = serde_json::from_str(&listed)?;
    let manifest: Digest = listed[0]["manifest"].as_str().context("a snapshot")?.parse()?;
    node.stop_daemon()?;
    // A database that was closed has no last change that could be taken back.
    ensure!(check(node, &[])?.0 == 0);
    let keys = [
        ("snapshots/metadata.redb", &b"sha256:"[..]),
        ("store/index.redb", manifest.as_bytes()),
        ("node.redb", name.as_bytes()),
    ];
    for (database, key) in keys {
        let path = node.path(STATE).join(database);
        let whole = fs::read(&path)?;
        // Missing or empty, which must not be taken for a state that was never used; cut short;
        // noise; and a key that is another one.
        let mut noise = whole.clone();
        noise[..4096].fill(0x5a);
        let flipped = with_a_bit_flipped(&whole, key).context(database)?;
        let half = &whole[..whole.len() / 2];
        for damaged in [None, Some(&b""[..]), Some(half), Some(&noise), Some(&flipped)] {
            match damaged {
                Some(bytes) => fs::write(&path, bytes)?,
                None => fs::remove_file(&path)?,
            }
            let (code, report) = check(node, &[])?;
            let finding = report["findings"][0].as_str().unwrap_or_default();
            ensure!(code == 3 && finding.contains(STATE), "{database}: {code}: {report}");
            ensure!(finding.contains("restore"), "what to do is not said: {finding}");
            let refused = node.run(&["godwit-snapshotter"])?;
            ensure!(!refused.succeeded() && refused.stderr.contains("restore"), "{refused}");
            ensure!(fs::read(&path).ok().as_deref() == damaged, "{database} was changed");
        }
        fs::write(&path, whole)?;
    }
    node.start_daemon()
}

fn workload_goes_on(node: &Node, name: &str) -> Result<()> {
    let tasks = node.ok(&["ctr", "task", "ls"])?;
    ensure!(
        tasks.lines().any(|line| line.starts_with(name) && line.contains("RUNNING")),
        "{tasks}"
    );
    Ok(())
}
