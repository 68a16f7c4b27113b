//! Making faults, and mending their causes.

use std::os::unix::fs::MetadataExt as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use godwit_tests::Node;
use godwit_tests::command::host;
use nix::sys::signal::Signal;

use crate::cell::{Act, Blow, Cell, Cut, Fault, Program, Role};
use crate::process;
use crate::run::Names;
use crate::settle;
use crate::site::{STATE, Site, begin_services};

/// How long CRIU, runc or a shim may take to appear for a blow.
const APPEAR_MAX: Duration = Duration::from_secs(3);
/// How long a program may take to end when it is asked to; then it is killed, as systemd does.
const END_MAX: Duration = Duration::from_secs(90);
/// Room that is left for a daemon beyond what it uses, in bytes.
const HEADROOM: u64 = 4 << 20;
const FILLER: &str = "/var/lib/godwit/filler";
const MEMORY_GROUP: &str = "/sys/fs/cgroup/memory/limited";
/// Longest wait for a command that a fault consists of.
const COMMAND_MAX: Duration = Duration::from_secs(30);

/// What is to be done about a fault, and when.
pub(crate) struct Mending {
    at: Instant,
    what: What,
}

enum What {
    GoOn(Vec<i32>),
    Restart(usize, Program, Vec<i32>),
    /// With the device number of its disk.
    Revive(usize, u64),
    Link(usize),
    Rules(usize),
    Room(usize),
    Memory(usize),
    Resume(usize),
}

/// Strikes. Returns what to mend, or nothing if there was nothing to strike at.
pub(crate) fn strike(
    site: &Site,
    cell: &Cell,
    names: &Names,
    fault: Fault,
) -> Result<Option<Vec<Mending>>> {
    let later = |what| Some(vec![Mending { at: Instant::now() + cell.mend_after, what }]);
    Ok(match fault {
        Fault::Signal(program, blow) => return signalled(site, cell, names, program, blow),
        Fault::Crash(role) => {
            let node = site.node(role.index());
            let disk = std::fs::metadata(node.path(STATE))?.dev();
            node.crash()?;
            later(What::Revive(role.index(), disk))
        }
        Fault::Link(role, cut) => {
            let node = site.node(role.index());
            let (time, what) = match cut {
                Cut::BothWays(time) => {
                    node.cut_link()?;
                    (time, What::Link(role.index()))
                }
                Cut::OneWay(time) => {
                    drop_packets(node, "drop")?;
                    (time, What::Rules(role.index()))
                }
                Cut::Lossy(time) => {
                    drop_packets(node, "numgen random mod 10 < 3 drop")?;
                    (time, What::Rules(role.index()))
                }
            };
            Some(vec![Mending { at: Instant::now() + time, what }])
        }
        Fault::DiskFull(role) => {
            let node = site.node(role.index());
            // What its metadata left is filled byte by byte.
            let script = format!(
                "fallocate -l $(($(stat -f -c '%a * %S' {STATE}) - (1 << 20))) {FILLER} || true
                 cat /dev/zero >> {FILLER} 2> /dev/null || true"
            );
            node.sh(&script)?;
            later(What::Room(role.index()))
        }
        Fault::MemoryLimit(role) => {
            let node = site.node(role.index());
            let found = process::find(node, Program::Daemon(role), &names.container);
            let Some(daemon) = found.first() else { return Ok(None) };
            limit_memory(node, daemon.pid)?;
            later(What::Memory(role.index()))
        }
        Fault::Container(act) => return happened(site, names, act, cell),
        Fault::Namesake => {
            let made = names.other(&names.container).command(&["probe", "idle"]);
            started(site.node(Role::Destination.index()), names, &made.words())
        }
        Fault::SecondUser => {
            let name = names.second_user();
            let made = names.other(&name).volume(&names.tree(), "/tree", "rw");
            let made = made.command(&["probe", "idle"]);
            started(site.node(Role::Source.index()), names, &made.words())
        }
        Fault::TwoDestinations => migrate_again(site, cell, names, (0, 2)),
        Fault::BackAtOnce => migrate_again(site, cell, names, (1, 0)),
    })
}

/// Loses what comes in over a node's link, as the rule says.
fn drop_packets(node: &Node, rule: &str) -> Result<()> {
    let script = format!(
        "nft add table netdev cut
         nft add chain netdev cut in '{{ type filter hook ingress device uplink priority 0; }}'
         nft add rule netdev cut in '{rule}'"
    );
    node.sh(&script).map(drop)
}

fn signalled(
    site: &Site,
    cell: &Cell,
    names: &Names,
    program: Program,
    blow: Blow,
) -> Result<Option<Vec<Mending>>> {
    let signal = match blow {
        Blow::Kill => Signal::SIGKILL,
        Blow::Terminate => Signal::SIGTERM,
        Blow::Stop => Signal::SIGSTOP,
    };
    let at = match program {
        Program::Daemon(role) | Program::Shim(role) | Program::Containerd(role) => vec![role],
        Program::Criu | Program::Runc => Role::BOTH.to_vec(),
        Program::Client => vec![cell.client_at],
    };
    let begin = Instant::now();
    // These begin later than some phases do.
    let passes =
        matches!(program, Program::Criu | Program::Runc | Program::Shim(Role::Destination));
    let (role, pids) = loop {
        let found = at.iter().find_map(|&role| {
            let found = process::find(site.node(role.index()), program, &names.container);
            let pids: Vec<i32> = found.iter().map(|process| process.pid).collect();
            (!pids.is_empty()).then_some((role, pids))
        });
        match found {
            Some(found) => break found,
            None if passes && begin.elapsed() < APPEAR_MAX => {
                std::thread::sleep(Duration::from_millis(1));
            }
            None => return Ok(None),
        }
    };
    let mut were_there = false;
    for &pid in &pids {
        were_there |= process::signal(pid, signal)?;
    }
    if !were_there {
        return Ok(None);
    }
    let what = match (program, blow) {
        (_, Blow::Stop) => What::GoOn(pids),
        (Program::Daemon(_) | Program::Containerd(_), _) => {
            What::Restart(role.index(), program, pids)
        }
        (Program::Shim(_) | Program::Criu | Program::Runc | Program::Client, _) => {
            return Ok(Some(Vec::new()));
        }
    };
    Ok(Some(vec![Mending { at: Instant::now() + cell.mend_after, what }]))
}

fn limit_memory(node: &Node, pid: i32) -> Result<()> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = kib.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    let limit = (kib.context("resident memory")? << 10) + HEADROOM;
    // What it uses already is charged to the group that it was in.
    let script = format!(
        "mkdir -p {MEMORY_GROUP}; echo 1 > {MEMORY_GROUP}/memory.move_charge_at_immigrate 2> /dev/null || true
         echo {limit} > {MEMORY_GROUP}/memory.limit_in_bytes
         for pid in $(pgrep -x godwit-snapshot); do echo $pid > {MEMORY_GROUP}/cgroup.procs; done"
    );
    node.sh(&script).map(drop)
}

fn happened(site: &Site, names: &Names, act: Act, cell: &Cell) -> Result<Option<Vec<Mending>>> {
    // Where it runs now.
    let runs = |index: usize| {
        settle::look(site.node(index), &names.container).is_ok_and(|seen| seen.task.is_some())
    };
    let Some(index) = [1, 0].into_iter().find(|&index| runs(index)) else { return Ok(None) };
    let (node, name) = (site.node(index), &names.container);
    let ran = |words: &[&str]| node.command(words).timeout(COMMAND_MAX).run();
    let done = match act {
        Act::Exit => ran(&["ctr", "tasks", "kill", "-s", "SIGKILL", name])?,
        Act::Delete => {
            ran(&["sh", "-c", &format!("ctr tasks rm -f {name}; ctr containers rm {name}")])?
        }
        Act::Pause => ran(&["ctr", "tasks", "pause", name])?,
        Act::Exec => {
            let words = ["ctr", "tasks", "exec", "--exec-id", "added", name, "sleep", "2"];
            drop(node.spawn(&words, "exec")?);
            return Ok(Some(Vec::new()));
        }
        Act::OutOfMemory => {
            let script = format!(
                "group=/sys/fs/cgroup/memory/default/{name}
                 for pid in $(cat $group/cgroup.procs); do echo 1000 > /proc/$pid/oom_score_adj; done
                 echo 64M > $group/memory.limit_in_bytes
                 ctr tasks exec --exec-id hog {name} probe ballast 300 > /dev/null 2>&1 &"
            );
            ran(&["sh", "-c", &script])?
        }
    };
    let resume = Mending { at: Instant::now() + cell.mend_after, what: What::Resume(index) };
    Ok(match act {
        Act::Pause => done.succeeded().then(|| vec![resume]),
        _ => Some(Vec::new()),
    })
}

/// Starts a container; one that is refused has struck, too.
fn started(node: &Node, names: &Names, words: &[String]) -> Option<Vec<Mending>> {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let done = node.command(&words).timeout(COMMAND_MAX).run().ok()?;
    names.other_has_started.set(done.succeeded());
    Some(Vec::new())
}

/// Asks for a second migration, which may be refused; its client ends by itself.
fn migrate_again(
    site: &Site,
    cell: &Cell,
    names: &Names,
    (from, to): (usize, usize),
) -> Option<Vec<Mending>> {
    let words = names.migrate(site.node(from).name(), site.node(to).name(), cell.mode);
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let log = format!("migrate-again-{}", cell.seed);
    let client = site.node(from).spawn(&words, &log).ok()?;
    names.keep(client);
    Some(Vec::new())
}

/// Mends what is due; the rest stays in the list.
pub(crate) fn mend(site: &Site, names: &Names, list: &mut Vec<Mending>) -> Result<()> {
    let (due, rest) = std::mem::take(list).into_iter().partition(|one| one.at <= Instant::now());
    *list = rest;
    let due: Vec<Mending> = due;
    due.into_iter().try_for_each(|one| one.what.mend(site, names))
}

impl What {
    fn mend(self, site: &Site, names: &Names) -> Result<()> {
        match self {
            Self::GoOn(pids) => process::go_on(&pids),
            Self::Restart(index, program, pids) => restart(site.node(index), program, &pids),
            Self::Revive(index, disk) => {
                let node = site.node(index);
                detach_loops(disk)?;
                node.revive()?;
                names.add_network(site, index)?;
                begin_services(node)
            }
            Self::Link(index) => site.node(index).mend_link(),
            Self::Rules(index) => site.node(index).sh("nft delete table netdev cut").map(drop),
            Self::Room(index) => site.node(index).sh(&format!("rm -f {FILLER}")).map(drop),
            Self::Memory(index) => {
                let node = site.node(index);
                let script = format!(
                    "for pid in $(cat {MEMORY_GROUP}/cgroup.procs); do echo $pid > /sys/fs/cgroup/memory/cgroup.procs; done
                     rmdir {MEMORY_GROUP}"
                );
                node.sh(&script)?;
                let role = if index == 0 { Role::Source } else { Role::Destination };
                ensure_daemon(node, role)
            }
            Self::Resume(index) => {
                site.node(index).run(&["ctr", "tasks", "resume", &names.container]).map(drop)
            }
        }
    }
}

/// Detaches the loop devices over files of a disk, which end with the kernel where a machine
/// crashes.
fn detach_loops(disk: u64) -> Result<()> {
    let of_disk = format!("{}:{}", nix::sys::stat::major(disk), nix::sys::stat::minor(disk));
    let listed = host(&["losetup", "-n", "-O", "NAME,BACK-MAJ:MIN"])?;
    for line in listed.lines() {
        let mut words = line.split_whitespace();
        if let (Some(name), Some(back)) = (words.next(), words.next())
            && back == of_disk
        {
            host(&["losetup", "-d", name])?;
        }
    }
    Ok(())
}

fn restart(node: &Node, program: Program, pids: &[i32]) -> Result<()> {
    if process::wait_for_end(pids, END_MAX).is_err() {
        for &pid in pids {
            process::signal(pid, Signal::SIGKILL)?;
        }
    }
    match program {
        Program::Containerd(_) => {
            node.kill_containerd()?;
            node.start_containerd()
        }
        _ => {
            node.kill_daemon()?;
            node.start_daemon()
        }
    }
}

/// Starts a daemon that has ended.
pub(crate) fn ensure_daemon(node: &Node, role: Role) -> Result<()> {
    if process::find(node, Program::Daemon(role), "").is_empty() {
        node.kill_daemon()?;
        node.start_daemon()?;
    }
    Ok(())
}
