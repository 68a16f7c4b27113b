//! The directory between real nodes: both backends, etcd that dies and comes back, nodes that die,
//! leave and change their name, clocks that differ, entries that are out of date.

use std::collections::BTreeSet;
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use godwit_protos::etcd::kv_client::KvClient;
use godwit_protos::etcd::request_op::Request as Op;
use godwit_protos::etcd::{PutRequest, RangeRequest, RequestOp, TxnRequest};
use godwit_tests::command::wait_until;
use godwit_tests::images::{self, Image};
use godwit_tests::neighbours;
use godwit_tests::workload::{self, memhog};
use godwit_tests::{Background, Bed, BedOptions, Node};
use serde_json::Value;

#[path = "directory/conformance.rs"]
mod conformance;

const RESIDENT_MIB: usize = 12;

/// How long a daemon has to notice that etcd is there or away: two renewals and a publication.
const NOTICE: Duration = Duration::from_secs(15);

/// Of `directory::etcd`: entries of a dead node last so long after their last renewal.
const LEASE_TTL: Duration = Duration::from_secs(10);

static BED: LazyLock<Bed> =
    LazyLock::new(|| Bed::start(&BedOptions::nodes(4)).expect("the test nodes start"));

/// etcd runs on the last node; dropped, it is killed.
static ETCD: Mutex<Option<Background>> = Mutex::new(None);

fn node(index: usize) -> &'static Node {
    BED.node(index)
}

fn etcd_url() -> String {
    format!("http://{}:2379", node(3).address())
}

fn start_etcd() -> Result<()> {
    let (url, peer) = (etcd_url(), "http://127.0.0.1:2380");
    let words = [
        "etcd",
        "--data-dir",
        "/var/lib/etcd",
        "--listen-client-urls",
        &url,
        "--advertise-client-urls",
        &url,
        "--listen-peer-urls",
        peer,
        "--initial-advertise-peer-urls",
        peer,
        "--initial-cluster",
        "default=http://127.0.0.1:2380",
    ];
    let started = node(3).spawn(&words, "etcd")?;
    *ETCD.lock().unwrap_or_else(PoisonError::into_inner) = Some(started);
    wait_until("etcd answers", NOTICE, || Ok(keys().is_ok()))
}

fn kill_etcd() {
    ETCD.lock().unwrap_or_else(PoisonError::into_inner).take();
}

fn is_etcd_running() -> bool {
    ETCD.lock().unwrap_or_else(PoisonError::into_inner).is_some()
}

/// Runs `work` in the network of the node that etcd runs on.
fn there<T: Send>(work: impl Future<Output = Result<T>> + Send) -> Result<T> {
    node(3).in_network(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(work)
    })
}

/// Keys in etcd, below the prefix of the default site.
fn keys() -> Result<BTreeSet<String>> {
    there(async {
        let mut kv = KvClient::connect(etcd_url()).await?;
        let (key, range_end) = ("/godwit/v1/default/".into(), "/godwit/v1/default0".into());
        let asked = RangeRequest { key, range_end, ..RangeRequest::default() };
        let pairs = kv.range(asked).await?.into_inner().kvs;
        pairs
            .into_iter()
            .map(|pair| {
                let key = String::from_utf8(pair.key.to_vec())?;
                Ok(key["/godwit/v1/default/".len()..].to_owned())
            })
            .collect()
    })
}

fn put(key: String, value: String) -> Result<()> {
    there(async move {
        let mut kv = KvClient::connect(etcd_url()).await?;
        let key = format!("/godwit/v1/default/{key}").into_bytes().into();
        let put = PutRequest { key, value: value.into_bytes().into(), lease: 0 };
        let success = vec![RequestOp { request: Some(Op::RequestPut(put)) }];
        kv.txn(TxnRequest { success }).await?;
        Ok(())
    })
}

/// Whether a node has an entry in etcd.
fn is_published(name: &str) -> Result<bool> {
    Ok(keys()?.iter().any(|key| key.ends_with(&format!("/{name}"))))
}

fn directory(at: &Node) -> Result<String> {
    let status: Value = serde_json::from_str(&at.ok(&["godwit", "--output", "json", "status"])?)?;
    Ok(status["directory"].as_str().unwrap_or_default().to_owned())
}

fn wait_for_status(at: &Node, part: &str) -> Result<()> {
    wait_until(&format!("{}: directory {part}", at.name()), NOTICE, || {
        Ok(directory(at)?.contains(part))
    })
}

/// Gives every node empty stores and this configuration.
fn configure(keys: &str) -> Result<()> {
    for node in BED.nodes() {
        node.configure(keys)?;
        neighbours::forget(node)?;
    }
    Ok(())
}

fn with_etcd() -> Result<()> {
    if !is_etcd_running() {
        start_etcd()?;
    }
    configure(&format!("[directory]\nbackend = \"etcd\"\nendpoints = [\"{}\"]", etcd_url()))?;
    BED.nodes().iter().try_for_each(|node| wait_for_status(node, "connected"))
}

/// A memhog on the first node; its incarnation.
fn start(name: &'static str, first: u8) -> Result<u64> {
    images::import(node(0), Image::Memhog, "godwit")?;
    let addresses = workload::networks(&BED, name, first)?;
    node(0).ok(&["godwit", "volume", "create", name])?;
    memhog(name, name, RESIDENT_MIB, 1).start(node(0))?;
    Ok(workload::memhog_answers(&BED, addresses[0])?.incarnation)
}

fn moved(name: &str, from: usize, to: usize) -> Result<Value> {
    let report = workload::migrated(node(to), name, node(from), node(to), &[]);
    report.with_context(|| format!("{} -> {}", node(from).name(), node(to).name()))
}

fn remove(at: usize, name: &str) -> Result<()> {
    node(at).ok(&["ctr", "tasks", "rm", "-f", name])?;
    node(at).ok(&["ctr", "containers", "rm", name])?;
    node(at).ok(&["godwit", "volume", "rm", name]).map(drop)
}

fn memory(name: &str) -> String {
    format!("memory|default|{}|{name}", Image::Memhog.reference())
}

/// Bytes of the container's memory that a node brought.
fn brought(report: &Value, name: &str, from: &Node) -> u64 {
    let subjects = report["subjects"].as_array().into_iter().flatten();
    let memory = memory(name);
    let share = subjects.filter(|share| share["subject"] == memory.as_str());
    share.filter_map(|share| share["raw_bytes_by_node"][from.name()].as_u64()).sum()
}

/// The neighbours that a plan names for a container's memory.
fn candidates(name: &str, from: usize, to: usize) -> Result<Vec<Value>> {
    let (from, to) = (node(from), node(to));
    let words =
        ["godwit", "--output", "json", "plan", name, "--from", from.name(), "--to", to.name()];
    let plan: Value = serde_json::from_str(&to.ok(&words)?)?;
    let memory = memory(name);
    let mut shares = plan["subjects"].as_array().into_iter().flatten();
    let share = shares.find(|share| share["subject"] == memory.as_str());
    let share = share.with_context(|| format!("no memory in {plan}"))?;
    Ok(share["candidates"].as_array().cloned().unwrap_or_default())
}

fn names(candidates: &[Value]) -> BTreeSet<&str> {
    candidates.iter().filter_map(|one| one["node"].as_str()).collect()
}

const HALF: u64 = (RESIDENT_MIB as u64) << 19;

#[test]
fn both_backends_give_the_same_answers() -> Result<()> {
    there(conformance::conforms(""))?;
    if !is_etcd_running() {
        start_etcd()?;
    }
    there(conformance::conforms(&format!(
        "[directory]\nbackend = 'etcd'\nendpoints = ['{}']\nsite = 'conformance'",
        etcd_url()
    )))
}

/// Method: etcd is killed and comes back, first with its data, then without.
#[test]
fn without_etcd_a_migration_asks_the_neighbours_and_entries_come_back() -> Result<()> {
    with_etcd()?;
    let name = "outage";
    let incarnation = start(name, 0)?;
    moved(name, 0, 1)?;
    let key = |at: usize| format!("subject/{}/{}", memory(name), node(at).name());
    wait_until("both have published", NOTICE, || {
        let keys = keys()?;
        Ok(keys.contains(&key(0)) && keys.contains(&key(1)))
    })?;
    // What etcd says is used.
    let report = moved(name, 1, 2)?;
    ensure!(brought(&report, name, node(0)) > 0, "with etcd: {report}");

    kill_etcd();
    // Before anybody has noticed, and when everybody has.
    let report = moved(name, 2, 0)?;
    ensure!(brought(&report, name, node(1)) > 0, "etcd just killed: {report}");
    BED.nodes().iter().try_for_each(|node| wait_for_status(node, "not reachable"))?;
    let begun = Instant::now();
    let report = moved(name, 0, 1)?;
    eprintln!("without etcd: {} ms, {:?}", report["total_ms"], begun.elapsed());
    ensure!(brought(&report, name, node(2)) > 0, "without etcd: {report}");

    start_etcd()?;
    BED.nodes().iter().try_for_each(|node| wait_for_status(node, "connected"))?;
    wait_until("all come back", NOTICE, || {
        let keys = keys()?;
        Ok((0..3).all(|at| keys.contains(&key(at))))
    })?;
    kill_etcd();
    node(3).sh("rm -rf /var/lib/etcd")?;
    start_etcd()?;
    wait_until("all are published again", NOTICE, || {
        let keys = keys()?;
        Ok((0..3).all(|at| keys.contains(&key(at))))
    })?;
    let stat = workload::memhog_is_whole(&BED, BED.container_address(1), incarnation)?;
    ensure!(stat.beats > 0, "it runs");
    remove(1, name)
}

#[test]
fn entries_of_a_dead_node_vanish_those_of_a_leaving_one_at_once_and_a_name_is_a_name() -> Result<()>
{
    with_etcd()?;
    let name = "leaving";
    start(name, 10)?;
    moved(name, 0, 1)?;
    let (dead, old) = (node(0), node(0).name());
    wait_until("it has published", NOTICE, || is_published(old))?;

    dead.kill_daemon()?;
    let killed = Instant::now();
    ensure!(is_published(old)?, "no node could know yet");
    wait_until("its lease ends", LEASE_TTL + Duration::from_secs(5), || Ok(!is_published(old)?))?;
    eprintln!("entries of a killed daemon lasted {:?}", killed.elapsed());
    dead.start_daemon()?;
    wait_until("it publishes again", NOTICE, || is_published(old))?;

    let leaving = Instant::now();
    dead.stop_daemon()?;
    ensure!(!is_published(old)?, "it has left");
    ensure!(leaving.elapsed() < LEASE_TTL / 2, "that took {:?}", leaving.elapsed());

    // Under another name it is no node's peer: found by etcd, asked by no one.
    dead.sh("sed -i 's/^node = .*/node = \"edge-z\"/' /etc/godwit/godwit.toml")?;
    dead.start_daemon()?;
    wait_until("it publishes under its new name", NOTICE, || is_published("edge-z"))?;
    ensure!(!is_published(old)?, "the old name is gone");
    let found = candidates(name, 1, 2)?;
    ensure!(found.is_empty(), "{found:?}");
    let report = moved(name, 1, 2)?;
    ensure!(brought(&report, name, node(1)) > HALF, "{report}");
    remove(2, name)
}

#[test]
fn entries_that_are_stale_or_lies_cost_a_refused_request() -> Result<()> {
    with_etcd()?;
    let (name, told) = ("stale", node(1).log_end("daemon"));
    let incarnation = start(name, 20)?;
    let digest = format!("sha256:{}", "ab".repeat(32));
    let lie = format!(
        r#"{{"snapshots":[{{"sequence":99,"manifest":"{digest}","size_bytes":1,"age_ms":1}}],"siblings":true}}"#
    );
    // The third node has nothing; the other does not exist; the last key says nothing that can be
    // read.
    let key = |node: &str| format!("subject/{}/{node}", memory(name));
    put(key(node(2).name()), lie.clone())?;
    put(key("unknown"), lie)?;
    put(key(node(3).name()), "{".to_owned())?;
    let found = candidates(name, 0, 1)?;
    ensure!(found.is_empty(), "{found:?}");
    let report = moved(name, 0, 1)?;
    ensure!(brought(&report, name, node(0)) > HALF, "{report}");
    ensure!(brought(&report, name, node(2)) == 0, "{report}");
    workload::memhog_is_whole(&BED, BED.container_address(21), incarnation)?;
    let log = node(1).log_since("daemon", told);
    ensure!(log.matches("skipped in etcd").count() == 1, "told once: {log}");
    remove(1, name)
}

/// Method: two neighbours' daemons run five hours ahead and behind; each takes a snapshot of the
/// same container.
#[test]
fn clocks_that_differ_by_hours_change_no_order_and_no_age() -> Result<()> {
    for directory in ["neighbours", "etcd"] {
        let name = if directory == "etcd" { "clocks-etcd" } else { "clocks" };
        if directory == "etcd" {
            with_etcd()?;
        } else {
            configure("")?;
        }
        for (index, hours) in [(0, "+5h"), (1, "-5h")] {
            node(index).stop_daemon()?;
            shift_clock(node(index), hours)?;
            node(index).start_daemon()?;
        }
        start(name, if directory == "etcd" { 30 } else { 40 })?;
        moved(name, 0, 1)?;
        moved(name, 1, 2)?;
        if directory == "etcd" {
            wait_until("both have published", NOTICE, || {
                Ok(is_published(node(0).name())? && is_published(node(1).name())?)
            })?;
        }
        let found = candidates(name, 2, 3)?;
        let told: Vec<_> = found.iter().map(|one| (&one["node"], &one["sequence"])).collect();
        ensure!(names(&found) == BTreeSet::from([node(0).name(), node(1).name()]), "{found:?}");
        let sequence = |at: &Node| {
            let mut all = found.iter().filter(|one| one["node"] == at.name());
            all.find_map(|one| one["sequence"].as_u64())
        };
        ensure!(sequence(node(1)) > sequence(node(0)), "{told:?}");
        for one in &found {
            ensure!(one["age_ms"].as_u64().is_some_and(|age| age < 120_000), "{one}");
        }
        for index in [0, 1] {
            node(index).stop_daemon()?;
            node(index).sh("mv /usr/local/bin/true-daemon /usr/local/bin/godwit-snapshotter")?;
            node(index).start_daemon()?;
        }
        remove(2, name)?;
    }
    Ok(())
}

/// Has the node's daemon see another time of day from its next start on.
fn shift_clock(node: &Node, by: &str) -> Result<()> {
    node.sh(&format!(
        "cd /usr/local/bin
         mv godwit-snapshotter true-daemon
         library=$(ls /usr/lib/*/faketime/libfaketimeMT.so.1)
         printf '#!/bin/sh\\nexec env LD_PRELOAD=%s FAKETIME={by} FAKETIME_DONT_FAKE_MONOTONIC=1 true-daemon \"$@\"\\n' \
             $library > godwit-snapshotter
         chmod 755 godwit-snapshotter"
    ))
    .map(drop)
}

/// Method: one user's memhog has left snapshots on two nodes; another user's is about to move.
#[test]
fn another_users_memory_helps_only_where_it_is_configured() -> Result<()> {
    configure("")?;
    let (one, two) = ("user-one", "user-two");
    start(one, 50)?;
    moved(one, 0, 1)?;
    start(two, 60)?;
    let found = candidates(two, 0, 2)?;
    ensure!(found.is_empty(), "off by default: {found:?}");
    let share = |at: usize| -> Result<()> {
        node(at).stop_daemon()?;
        node(at).configure("sibling_memory = true")?;
        node(at).start_daemon()
    };
    share(2)?;
    let found = candidates(two, 0, 2)?;
    ensure!(found.is_empty(), "the other node does not give it: {found:?}");
    share(1)?;
    let found = candidates(two, 0, 2)?;
    ensure!(names(&found) == BTreeSet::from([node(1).name()]), "{found:?}");
    ensure!(found.iter().all(|one| one["is_sibling"] == true), "{found:?}");
    let report = moved(two, 0, 2)?;
    ensure!(brought(&report, two, node(1)) > 0, "{report}");
    remove(2, two)?;
    remove(1, one)
}
