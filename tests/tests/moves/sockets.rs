//! Sockets, and what the destination must have for them.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use godwit_tests::command::wait_until;
use godwit_tests::images::Image;
use godwit_tests::workload::{self, Container};
use godwit_tests::{Node, place};

use crate::bed::{self, SOON, destination, init, probe, source};
use crate::table::rows;

rows! {
    a_multipath_listener_is_named: "a listener with Multipath TCP, as of Go 1.24 and later", Refused, "start it with the annotation `godwit.io/mptcp=no`" => multipath();
    a_container_without_multipath_moves: "the same with the annotation `godwit.io/mptcp=no`", Moves, "it listens with TCP, at the destination too" => without_multipath();
    a_go_server_moves: "a server written in Go, with the annotation `godwit.io/mptcp=no`", Moves, "" => go_server();
    a_client_that_exec_added_is_named: "a process of `exec` that is connected to a Unix socket of the container", Refused, "end it first; without a connection it ends at the source, with a warning" => exec_client();
    a_missing_namespace_or_address_is_named: "a network namespace, or an address that a socket is bound to, that the destination lacks", Refused, "make it there first" => missing_network();
    an_address_of_one_link_is_found_by_its_interface: "an IPv6 address of one link (fe80::/10) that a socket is bound to", Moves, "with an interface of the same name that has it; refused where there is none" => link_local();
    a_packet_socket_is_named: "a packet socket on one interface", Refused, "CRIU knows the interface by its number only; have the program close it" => packet();
    exchanged_nodes_are_told: "`--from` and `--to` exchanged", Refused, "nothing is touched" => exchanged();
}

fn multipath() -> Result<()> {
    let name = "mptcp";
    bed::start(&probe(name, &["mptcp"]))?;
    bed::status_becomes(source(), name, |line| line == "listens mptcp now mptcp")?;
    let words = ["process 1 (probe) listens", "Multipath TCP", "on 0.0.0.0:", "godwit.io/mptcp=no"];
    bed::is_refused(name, &words)?;
    bed::remove(source(), name)
}

fn without_multipath() -> Result<()> {
    let name = "no-mptcp";
    bed::start(&probe(name, &["mptcp"]).annotation("godwit.io/mptcp", "no"))?;
    let is_plain = |line: &str| line == "listens tcp now tcp";
    bed::status_becomes(source(), name, is_plain)?;
    bed::moved(name)?;
    // Not only the socket that came: the switch is off there too.
    bed::status_becomes(destination(), name, is_plain)?;
    let switch = source().sh("cat /proc/sys/net/mptcp/enabled")?;
    ensure!(switch.trim() == "1", "the node's own switch is {switch}");
    bed::remove(destination(), name)
}

const SERVER: &str = include_str!("../../images/server.go");

/// Method: a static program, put into a container whose shell waits for it.
fn go_server() -> Result<()> {
    let directory = place::testbed().join("go");
    let (program, text) = (directory.join("server"), directory.join("server.go"));
    fs::create_dir_all(&directory)?;
    if fs::read_to_string(&text).ok().as_deref() != Some(SERVER) || !program.is_file() {
        fs::write(&text, SERVER)?;
        let mut go = Command::new("go");
        go.args(["build", "-o"]).arg(&program).arg(&text).env("CGO_ENABLED", "0");
        match go.status() {
            Ok(status) => ensure!(status.success(), "go build: {status}"),
            Err(error) => {
                eprintln!("SKIPPED: a_go_server_moves: go cannot be run: {error}");
                return Ok(());
            }
        }
    }
    let run = |name: &'static str, annotation: &str| -> Result<()> {
        let wait = "while ! [ -x /server ]; do sleep 0.02; done; exec /server";
        let container = Container::new(name, Image::Busybox).command(&["sh", "-c", wait]);
        container.annotation("godwit.io/mptcp", annotation).start(source())?;
        let root = format!("/proc/{}/root", init(source(), name)?);
        let copy =
            format!("cat > {root}/new && chmod 755 {root}/new && mv {root}/new {root}/server");
        source().command(&["sh", "-c", &copy]).stdin_file(program.clone()).ok()?;
        wait_until("the server reports", SOON, || Ok(bed::status(source(), name).is_ok()))
    };
    let name = "go-multipath";
    run(name, "yes")?;
    bed::is_refused(name, &["(server) listens with Multipath TCP on [::]:8080"])?;
    bed::remove(source(), name)?;

    let name = "go";
    run(name, "no")?;
    bed::moved(name)?;
    let beats = |line: &str| line.parse::<u64>().ok();
    let before = beats(&bed::status(destination(), name)?).context("a count")?;
    bed::status_becomes(destination(), name, |line| beats(line) > Some(before + 2))?;
    let listening =
        destination().sh(&format!("cat /proc/{}/net/tcp6", init(destination(), name)?))?;
    ensure!(listening.contains(":1F90 "), "{listening}");
    bed::remove(destination(), name)
}

fn exec_client() -> Result<()> {
    let name = "unix";
    bed::start(&probe(name, &["unix-server"]))?;
    let added = ["ctr", "tasks", "exec", "-d", "--exec-id", "client", name, "probe", "unix-client"];
    source().ok(&added)?;
    bed::status_becomes(source(), name, |line| line == "clients 1")?;
    bed::is_refused(
        name,
        &["process 1 (probe) is connected to", "which exec added", "Unix socket"],
    )?;
    source().ok(&["ctr", "tasks", "kill", "-s", "SIGKILL", "--exec-id", "client", name])?;
    let plan = ["godwit", "plan", name, "--from", "edge-a", "--to", "edge-b"];
    wait_until("the process of exec has ended", SOON, || Ok(source().run(&plan)?.succeeded()))?;
    bed::moved(name)?;
    bed::remove(destination(), name)
}

fn missing_network() -> Result<()> {
    let name = "bound";
    let address = bed::BED.container_address(77);
    source().add_network(name, address)?;
    let word = address.to_string();
    let script = format!("echo ready > /status; exec httpd -f -p {word}:8080 -h /data");
    bed::start(
        &Container::new(name, Image::Busybox).network(name).command(&["sh", "-c", &script]),
    )?;
    wait_until("it listens", SOON, || {
        let sockets = source().sh(&format!("cat /proc/{}/net/tcp", init(source(), name)?))?;
        Ok(sockets.contains(":1F90 "))
    })?;
    let path = format!("/run/netns/{name}");
    bed::is_refused(
        name,
        &[&format!("network namespace {path} is not on edge-b"), "ip netns add"],
    )?;
    destination().add_network(name, bed::BED.container_address(78))?;
    bed::is_refused(name, &[&format!("address {word} is not in"), &path, "ip address add"])?;
    bed::remove(source(), name)
}

fn link_local() -> Result<()> {
    let name = "one-link";
    source().add_network(name, bed::BED.container_address(81))?;
    let add = |at: &Node| at.sh(&format!("ip -n {name} address add fe80::77/64 dev eth0 nodad"));
    add(source())?;
    let script = "echo ready > /status; exec httpd -f -p [fe80::77%eth0]:8080 -h /data";
    bed::start(&Container::new(name, Image::Busybox).network(name).command(&["sh", "-c", script]))?;
    // fe80::77 and 8080, as the kernel writes them.
    let listens = |at: &Node| {
        let sockets = at.sh(&format!("cat /proc/{}/net/tcp6", init(at, name)?))?;
        Ok(sockets.contains("000080FE000000000000000077000000:1F90 "))
    };
    wait_until("it listens", SOON, || listens(source()))?;
    destination().add_network(name, bed::BED.container_address(82))?;
    bed::is_refused(
        name,
        &["address fe80::77%eth0 is not in network namespace", "ip address add"],
    )?;
    add(destination())?;
    bed::moved(name)?;
    ensure!(listens(destination())?, "it does not listen");
    bed::remove(destination(), name)
}

/// Method: a DHCP client that is never answered.
fn packet() -> Result<()> {
    let name = "packet";
    for (at, address) in [(source(), 83), (destination(), 84)] {
        at.add_network(name, bed::BED.container_address(address))?;
    }
    let script = "echo ready > /status; exec udhcpc -f -i eth0 -t 1000000 -T 1 -s /bin/true";
    bed::start(&Container::new(name, Image::Busybox).network(name).command(&["sh", "-c", script]))?;
    wait_until("it has a packet socket", SOON, || {
        let sockets = source().sh(&format!("cat /proc/{}/net/packet", init(source(), name)?))?;
        Ok(sockets.lines().count() > 1)
    })?;
    bed::is_refused(name, &["a packet socket on interface eth0", "by the interface's number"])?;
    bed::remove(source(), name)
}

fn exchanged() -> Result<()> {
    let name = "exchanged";
    bed::start(&probe(name, &["idle"]))?;
    let nodes = ["--from", "edge-b", "--to", "edge-a"];
    for command in ["plan", "migrate"] {
        let done = source().run(&[&["godwit", command, name], &nodes[..]].concat())?;
        let says = done.stderr.contains("exists on this node already, edge-a")
            && done.stderr.contains("exchange --from and --to");
        ensure!(!done.succeeded() && says && !done.stderr.contains("delete"), "{done:?}");
    }
    ensure!(workload::task(source(), name)?.as_deref() == Some("RUNNING"));
    bed::remove(source(), name)
}
