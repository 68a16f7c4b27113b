//! Sockets and what they are members of.

use anyhow::{Result, ensure};

use crate::bed::{self, destination, probe, source};
use crate::table::rows;

rows! {
    memberships_move: "memberships in multicast groups (IPv4 and IPv6)", Moves,
        "joined again before the first instruction; on the interface of the same name, else of the same IPv4 address"
        => hears_its_groups();
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
