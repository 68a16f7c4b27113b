//! Who may run a container after faults of containerd, of daemons and of machines: fences,
//! tombstones, claims.

use std::sync::LazyLock;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use godwit_protos::peer::peer_client::PeerClient;
use godwit_protos::peer::{
    self, Begin, Refusal, Release, Round, Stop, ToSource, from_source, to_source,
};
use godwit_tests::command::wait_until;
use godwit_tests::images::{self, Image};
use godwit_tests::preload::Failing;
use godwit_tests::workload::{self, Container};
use godwit_tests::{Bed, BedOptions, Node, criu};
use nix::errno::Errno;
use serde_json::Value;

/// The nodes that all tests share; torn down at exit.
static BED: LazyLock<Bed> = LazyLock::new(|| {
    let bed = Bed::start(&BedOptions::nodes(2).rate_mbit(1000)).expect("the test nodes start");
    workload::import_everywhere(&bed, Image::Busybox).expect("images can be imported");
    bed
});

const SOON: Duration = Duration::from_secs(20);

/// How often containerd's restart monitor looks for containers that should run.
const RESTART_INTERVAL: Duration = Duration::from_secs(10);

const METADATA: &str = "/var/lib/containerd/io.containerd.metadata.v1.bolt/meta.db";

fn source() -> &'static Node {
    BED.node(0)
}

fn destination() -> &'static Node {
    BED.node(1)
}

/// A container that does next to nothing.
fn idle(name: &str) -> Container<'_> {
    let script = "while :; do usleep 50000; done";
    Container::new(name, Image::Busybox).command(&["sh", "-c", script])
}

/// Moves a container by annotation: the source keeps its record, stopped and fenced.
fn move_by_annotation(name: &str, renamed: &str) -> Result<()> {
    let from = format!("{}/default/{name}", source().name());
    idle(renamed).annotation("godwit.io/migrate-from", &from).start(destination())?;
    wait_until("the source's task has ended", SOON, || {
        Ok(workload::task(source(), name)?.as_deref() == Some("STOPPED"))
    })?;
    ensure!(is_fenced(name), "no fence");
    Ok(())
}

fn is_fenced(name: &str) -> bool {
    source().path(format!("/var/lib/godwit/fences/default/{name}")).exists()
}

fn remove(at: &Node, name: &str) -> Result<()> {
    at.ok(&["ctr", "tasks", "rm", "-f", name])?;
    at.ok(&["ctr", "containers", "rm", name]).map(drop)
}

/// Method: a restart policy would start the source's container again. containerd runs for a while
/// on an empty root, as when a disk is mounted late, and then on a metadata database from before
/// the container.
#[test]
fn a_fence_outlives_a_containerd_that_lost_its_records() -> Result<()> {
    let (name, renamed) = ("fenced", "fenced-there");
    let node = source();
    node.stop_containerd()?;
    node.sh(&format!("cp {METADATA} /var/lib/older.db"))?;
    node.start_containerd()?;
    idle(name).options(&["--label", "containerd.io/restart.status=running"]).start(node)?;
    let logged = node.log_end("daemon");
    move_by_annotation(name, renamed)?;

    let run_for_a_while = || -> Result<()> {
        node.start_containerd()?;
        std::thread::sleep(Duration::from_secs(4));
        ensure!(!node.ok(&["ctr", "containers", "ls", "-q"])?.contains(name), "it has the record");
        node.stop_containerd()
    };
    node.stop_containerd()?;
    node.sh("mount -t tmpfs tmpfs /var/lib/containerd")?;
    run_for_a_while()?;
    node.sh(&format!("umount /var/lib/containerd; cp {METADATA} /var/lib/newer.db"))?;
    node.sh(&format!("cp /var/lib/older.db {METADATA}"))?;
    run_for_a_while()?;
    node.sh(&format!("cp /var/lib/newer.db {METADATA}"))?;
    node.start_containerd()?;

    let begun = Instant::now();
    while begun.elapsed() < RESTART_INTERVAL * 2 {
        ensure!(is_fenced(name), "the fence is gone: {}", node.log_since("daemon", logged));
        let task = workload::task(node, name)?;
        ensure!(task.as_deref() != Some("RUNNING"), "two runners");
        std::thread::sleep(Duration::from_millis(200));
    }
    ensure!(workload::task(destination(), renamed)?.as_deref() == Some("RUNNING"), "none runs");
    // A deletion that containerd reports ends it.
    node.sh(&format!(
        "ctr containers label {name} containerd.io/restart.status=; ctr tasks rm -f {name} || true"
    ))?;
    node.ok(&["ctr", "containers", "rm", name])?;
    wait_until("the fence ends", SOON, || Ok(!is_fenced(name)))?;
    remove(destination(), renamed)
}

/// Method: the daemon misses the deletion; a container of that name is created before it comes
/// back.
#[test]
fn a_container_that_was_created_again_while_the_daemon_was_away_is_not_fenced() -> Result<()> {
    let (name, renamed) = ("again", "again-there");
    let node = source();
    idle(name).start(node)?;
    move_by_annotation(name, renamed)?;
    node.kill_daemon()?;
    node.ok(&["ctr", "tasks", "rm", "-f", name])?;
    node.ok(&["ctr", "containers", "rm", name])?;
    // Its root needs the daemon's snapshotter, so another one holds it.
    images::import(node, Image::Busybox, "overlayfs")?;
    let runtime = "io.containerd.runc.godwit.v1";
    let words = ["ctr", "containers", "create", "--runtime", runtime, Image::Busybox.reference()];
    node.ok(&[&words[..], &[name, "sleep", "1000"]].concat())?;
    ensure!(is_fenced(name), "nothing could end the fence");
    node.start_daemon()?;
    wait_until("the fence ends", SOON, || Ok(!is_fenced(name)))?;
    node.ok(&["ctr", "tasks", "start", "-d", name])?;
    ensure!(workload::task(node, name)?.as_deref() == Some("RUNNING"), "it does not run");
    remove(node, name)?;
    remove(destination(), renamed)
}

/// What a node's journal says of a container, in one word.
fn state(at: &Node, name: &str) -> Result<Option<String>> {
    let status = at.ok(&["godwit", "--output", "json", "status"])?;
    let status: Value = serde_json::from_str(&status).with_context(|| status.clone())?;
    let all = status["ownership"].as_array().context("a list")?.iter();
    let mut of_name = all.filter(|one| one["container"] == format!("default/{name}"));
    Ok(of_name.next().and_then(|one| one["state"].as_str()).map(str::to_owned))
}

/// Has a destination die after it asked for the release and before it was granted: CRIU takes its
/// time there, and shortly before it is done, what the source sends does not arrive any more; then
/// all of its processes die. What the source sends still does not arrive, and CRIU is slow until
/// the returned value is dropped.
fn dies_while_it_claims(name: &str) -> Result<criu::Changed<'static>> {
    let (from, to) = (source(), destination());
    idle(name).start(from)?;
    // It is called more than once; a silent connection counts as dead after 4 s at the earliest.
    let slow = criu::slow(to, 1)?;
    let words = ["godwit", "migrate", name, "--from", "edge-a", "--to", "edge-b"];
    let (logged, logged_there) = (to.log_end("daemon"), from.log_end("daemon"));
    let mut running = to.spawn(&words, &format!("migrate-{name}"))?;
    wait_until("the restore begins", SOON, || {
        Ok(to.log_since("daemon", logged).contains("restoring"))
    })?;
    let deaf = format!(
        "nft add table inet deaf; nft 'add chain inet deaf in {{ type filter hook input priority 0; }}'; \
         nft add rule inet deaf in ip saddr {} drop",
        from.address()
    );
    to.sh(&deaf)?;
    wait_until("the source has released it", SOON, || {
        Ok(state(from, name)?.as_deref() == Some("released"))
    })
    .with_context(|| from.log_since("daemon", logged_there) + &to.log_since("daemon", logged))?;
    to.kill_daemon()?;
    to.sh(&format!(
        "for one in /proc/[0-9]*; do tr '\\0' ' ' <$one/cmdline | grep -q -- '[s]him-godwit.* -id {name}' \
         && kill -9 ${{one#/proc/}} || true; done 2>/dev/null"
    ))?;
    ensure!(running.wait(SOON)? != 0, "it was migrated");
    std::thread::sleep(Duration::from_secs(2));
    ensure!(workload::task(from, name)?.as_deref() == Some("PAUSED"), "no node knows yet");
    Ok(slow)
}

#[test]
fn a_destination_whose_machine_dies_while_it_claims_gives_the_container_back() -> Result<()> {
    let name = "claimed";
    let (from, to) = (source(), destination());
    let slow = dies_while_it_claims(name)?;
    to.sh("nft delete table inet deaf")?;
    drop(slow);
    to.start_daemon()?;
    wait_until("the source runs it again", Duration::from_secs(60), || {
        Ok(workload::task(from, name)?.as_deref() == Some("RUNNING"))
    })?;
    ensure!(state(from, name)?.as_deref() == Some("owner"), "{:?}", state(from, name)?);
    ensure!(state(to, name)?.is_none(), "{:?}", state(to, name)?);
    let gone = || Ok(!to.ok(&["ctr", "containers", "ls", "-q"])?.contains(name));
    wait_until("nothing is left of it", Duration::from_secs(120), gone)?;

    // A namesake of what was given back can move like any other.
    remove(from, name)?;
    idle(name).start(to)?;
    workload::migrated(to, name, to, from, &[])?;
    ensure!(workload::task(from, name)?.as_deref() == Some("RUNNING"), "it does not run");
    remove(from, name)
}

/// Method: as above, and meanwhile the source's journal cannot be written any more.
#[test]
fn a_source_whose_journal_fails_runs_on_what_comes_back() -> Result<()> {
    let name = "unjournalled";
    let (from, to) = (source(), destination());
    let failing = Failing::install(from)?;
    from.stop_daemon()?;
    from.start_daemon()?;
    let slow = dies_while_it_claims(name)?;
    failing.fail("/node.redb", Errno::ENOSPC)?;
    to.sh("nft delete table inet deaf")?;
    drop(slow);
    to.start_daemon()?;
    wait_until("the source runs it again", Duration::from_secs(60), || {
        Ok(workload::task(from, name)?.as_deref() == Some("RUNNING"))
    })?;
    failing.mend()?;
    wait_until("the journal says so", SOON, || Ok(state(from, name)?.as_deref() == Some("owner")))?;
    let gone = || Ok(!to.ok(&["ctr", "containers", "ls", "-q"])?.contains(name));
    wait_until("nothing is left of it", Duration::from_secs(120), gone)?;
    remove(from, name)?;
    from.stop_daemon()?;
    drop(failing);
    from.start_daemon()
}

/// Method: the source's containerd is killed while the destination restores, and started again once
/// the source has failed to remove the container.
#[test]
fn a_containerd_that_is_away_keeps_no_container_and_no_fence() -> Result<()> {
    let name = "away";
    idle(name).start(source())?;
    let mut watching = destination().spawn(&["godwit", "watch"], "watch-away")?;
    let logged = source().log_end("daemon");
    let command = ["godwit", "migrate", name, "--from", "edge-a", "--to", "edge-b"];
    let mut migration = destination().spawn(&command, "migrate-away")?;
    wait_until("the destination restores", SOON, || Ok(watching.log().contains("restoring")))?;
    source().kill_containerd()?;
    let failed = "cannot remove what moved away; trying again";
    wait_until("the source fails to remove it", SOON, || {
        Ok(source().log_since("daemon", logged).contains(failed))
    })?;
    ensure!(is_fenced(name), "no fence");
    source().start_containerd()?;
    ensure!(migration.wait(SOON * 2)? == 0, "{}", migration.log());
    watching.kill()?;
    wait_until("the fence ends", SOON, || Ok(!is_fenced(name)))?;
    ensure!(state(source(), name)?.is_none(), "{:?}", state(source(), name)?);
    ensure!(!source().ok(&["ctr", "containers", "ls", "-q"])?.contains(name), "it is still there");
    // The name is free: it can come back at once.
    workload::migrated(destination(), name, destination(), source(), &[])?;
    remove(source(), name)
}

/// Sends these messages in a session that a client begins in the destination's name. Returns how
/// many rounds the source captured, and its refusal.
fn as_stranger(
    name: &str,
    messages: impl IntoIterator<Item = to_source::Message>,
) -> Result<(usize, Refusal)> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let at = format!("http://{}:{}", source().address(), godwit_tests::deploy::PEER_PORT);
    let named = peer::Container { namespace: "default".to_owned(), id: name.to_owned() };
    let begin = to_source::Message::Begin(Begin {
        container: Some(named.clone()),
        destination: destination().name().to_owned(),
        r#as: Some(named),
        ..Begin::default()
    });
    let messages = std::iter::once(begin).chain(messages);
    let messages = messages.map(|message| ToSource { message: Some(message) });
    let messages: Vec<ToSource> = messages.collect();
    let talk = async {
        let mut client = PeerClient::connect(at).await?;
        let response = client.hand_off(tokio_stream::iter(messages)).await?;
        let mut response = response.into_inner();
        let (mut rounds, mut refused) = (0, None);
        while let Ok(Some(message)) = response.message().await {
            match message.message {
                Some(from_source::Message::RoundDone(_)) => rounds += 1,
                Some(from_source::Message::Refusal(refusal)) => refused = Some(refusal),
                _ => {}
            }
        }
        Ok((rounds, refused.context("a refusal")?))
    };
    BED.as_client(|| runtime.block_on(talk))
}

/// Method: a client asks for the same round again and again, then for more rounds than there are.
#[test]
fn a_session_has_a_limited_number_of_rounds() -> Result<()> {
    let name = "rounds";
    idle(name).start(source())?;
    let round = |number| to_source::Message::Round(Round { number });
    for (numbers, captured) in [(vec![1; 200], 1), ((1..=200).collect(), 30)] {
        let (rounds, refusal) = as_stranger(name, numbers.into_iter().map(round))?;
        ensure!(rounds == captured, "{rounds} rounds instead of {captured}");
        ensure!(refusal.detail.contains("a round out of order, or one too many"), "{refusal:?}");
    }
    ensure!(workload::task(source(), name)?.as_deref() == Some("RUNNING"), "it does not run");
    remove(source(), name)
}

/// Method: a client that is none of the nodes begins a session in the name of one, has the
/// container stopped, asks for its release, and goes away.
#[test]
fn messages_of_a_stranger_freeze_nothing() -> Result<()> {
    let name = "strangers";
    idle(name).start(source())?;
    let messages = [
        to_source::Message::Stop(Stop::default()),
        to_source::Message::Release(Release { epoch: 1 }),
    ];
    let (_, refusal) = as_stranger(name, messages)?;
    ensure!(refusal.detail.contains("does not confirm"), "{refusal:?}");
    ensure!(workload::task(source(), name)?.as_deref() == Some("RUNNING"), "it does not run");
    ensure!(state(source(), name)?.is_none(), "{:?}", state(source(), name)?);
    ensure!(!is_fenced(name), "it is fenced");
    remove(source(), name)
}

/// Method: the destination's machine dies while it claims, and does not come back until a person
/// has decided.
#[test]
fn a_person_decides_what_no_journal_can_tell() -> Result<()> {
    let (name, other) = ("decided", "undecided-not");
    let (from, to) = (source(), destination());
    idle(other).start(from)?;
    let refused = from.run(&["godwit", "resolve", other, "--never-ran", "--yes"])?;
    let text = refused.ok().expect_err("there was something to decide").to_string();
    ensure!(text.contains("nothing about it is undecided here"), "{text}");
    remove(from, other)?;

    let slow = dies_while_it_claims(name)?;
    let asked = from.run(&["sh", "-c", &format!("echo no | godwit resolve {name} --never-ran")])?;
    ensure!(!asked.succeeded(), "it was resolved without a confirmation");
    ensure!(state(from, name)?.as_deref() == Some("released"), "{:?}", state(from, name)?);
    let shown = from.ok(&["godwit", "resolve", name, "--never-ran", "--yes"])?;
    ensure!(shown.contains("runs on from where it was frozen"), "{shown}");
    ensure!(workload::task(from, name)?.as_deref() == Some("RUNNING"), "it does not run");
    ensure!(state(from, name)?.as_deref() == Some("owner"), "{:?}", state(from, name)?);

    to.sh("nft delete table inet deaf")?;
    drop(slow);
    to.start_daemon()?;
    wait_until("the claim is given back", SOON, || {
        Ok(state(to, name)?.as_deref() != Some("claiming"))
    })?;
    ensure!(workload::task(from, name)?.as_deref() == Some("RUNNING"), "it does not run on");
    remove(from, name)
}
