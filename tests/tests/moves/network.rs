//! Sockets and what they are members of.

use anyhow::{Result, ensure};
use godwit_tests::Node;

use crate::bed::{self, destination, init, probe, source};
use crate::table::rows;

rows! {
    memberships_move: "memberships in multicast groups (IPv4 and IPv6)", Moves,
        "joined again before the first instruction; on the interface of the same name, else of the same IPv4 address"
        => hears_its_groups();
    a_missing_interface_is_named: "an interface that a socket uses (a multicast group joined on it, IPV6_MULTICAST_IF, SO_BINDTODEVICE), that the destination lacks",
        Refused, "create it there first; for a group, one with the same IPv4 address will do" => missing_interface();
    options_of_sockets_move: "socket options that CRIU leaves out (TCP_USER_TIMEOUT, IP_MULTICAST_IF, SO_TIMESTAMP ...)",
        Moves, "all that a process may set without a privilege and can be read" => keeps_options();
}

fn hears_its_groups() -> Result<()> {
    let name = "multicast";
    bed::start(&probe(name, &["multicast"]))?;
    let heard = |line: &str| {
        let count = line.strip_prefix("heard ")?.strip_suffix(" v6 true")?;
        count.parse::<u64>().ok()
    };
    let line = bed::status_becomes(source(), name, |line| heard(line) > Some(3))?;
    let before = heard(&line).unwrap_or(0);
    bed::moved(name)?;
    bed::status_becomes(destination(), name, |line| heard(line) > Some(before + 100))?;
    bed::remove(destination(), name)
}

/// Method: a second interface in the source's network namespace, at the destination not there, then
/// there by another name.
fn missing_interface() -> Result<()> {
    let (name, address) = ("member", "198.51.100.7");
    source().add_network(name, bed::BED.container_address(79))?;
    let add = |at: &Node, interface: &str| {
        at.sh(&format!(
            "ip -n {name} link add {interface} type veth peer name other
             ip -n {name} address add {address}/24 dev {interface}
             ip -n {name} link set {interface} up
             ip -n {name} link set other up"
        ))
    };
    add(source(), "cast0")?;
    bed::start(&probe(name, &["multicast", address]).network(name))?;
    destination().add_network(name, bed::BED.container_address(80))?;
    let path = format!("/run/netns/{name}");
    let missing = format!("interface cast0 is not in network namespace {path} on edge-b: ");
    bed::is_refused(name, &[&missing, "multicast group 239.1.1.1", address])?;
    add(destination(), "cast1")?;
    bed::moved(name)?;
    let groups = destination().sh(&format!("cat /proc/{}/net/igmp", init(destination(), name)?))?;
    // 239.1.1.1, as the kernel writes it.
    let of_it = groups.split("cast1").nth(1).unwrap_or_default();
    ensure!(of_it.contains("010101EF"), "{groups}");
    bed::remove(destination(), name)
}

fn keeps_options() -> Result<()> {
    let name = "options";
    bed::start(&probe(name, &["options"]))?;
    let right = "lost []";
    let before = bed::status(source(), name)?;
    ensure!(before == right, "{before}");
    bed::moved(name)?;
    bed::forget_status(destination(), name)?;
    bed::status_becomes(destination(), name, |line| line == right)?;
    bed::remove(destination(), name)
}
