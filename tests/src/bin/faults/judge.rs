//! What a run shows once it has settled: the witness's history, the files, the network, and what
//! others had.

use std::fs;
use std::time::Duration;

use anyhow::Result;
use godwit_tests::command::wait_until;
use godwit_tests::ledger::{self, Sighting};

use crate::cell::{Cell, Fault, Phase};
use crate::holdings::{VANISH_MAX, packet_rules};
use crate::run::{Broken, Names};
use crate::settle::{Settled, look};
use crate::site::Site;

/// Judges a run. Returns notes.
pub(crate) fn judge(
    site: &Site,
    cell: &Cell,
    names: &Names,
    settled: &Settled,
    struck: &[(Phase, Fault)],
    broken: &mut Broken,
) -> Result<Vec<String>> {
    let mut notes = Vec::new();
    let history = site.witness().history();
    match settled {
        Settled::Runs { index, pid, is_heard } => {
            if !is_heard {
                let at = site.node(*index).name();
                broken.mute.push(format!("it runs at {at}, and the witness hears nothing"));
            }
            broken.torn.extend(files(site, names, *index, *pid, &history));
        }
        Settled::Ended => broken.lost.extend(volume(site, cell, names, &history)?),
        Settled::Not(tasks) if tasks.iter().flatten().any(|task| task == "PAUSED") => {
            broken.frozen.push(format!("tasks by node: {tasks:?}"));
        }
        Settled::Not(tasks) => {
            broken.lost.push(format!("it does not run at one node; tasks by node: {tasks:?}"));
        }
    }
    let verdict = ledger::check(&history);
    if verdict.lives.len() > 1 {
        broken.lost.push(format!("it was started again: {} lives", verdict.lives.len()));
    }
    broken.double_runner.extend(verdict.double_runner);
    broken.lost.extend(verdict.repeated);
    broken.torn.extend(verdict.torn);
    network(site, names, settled, broken)?;
    for (_, fault) in struck {
        notes.extend(others(site, names, *fault, broken)?);
    }
    Ok(notes)
}

/// The last step that was heard of.
fn heard(history: &[Sighting]) -> (u64, u64) {
    let last = history.iter().max_by_key(|sighting| sighting.step.wall_ns);
    last.map_or((0, 0), |last| (last.step.life, last.step.counter))
}

/// Reads the ledger's files in the running container as a whole.
fn files(site: &Site, names: &Names, index: usize, pid: u32, history: &[Sighting]) -> Vec<String> {
    let (life, counter) = heard(history);
    let wrong = names.places().into_iter().filter_map(|place| {
        let place = place.trim_end_matches('/');
        let path = format!("/proc/{pid}/root{place}/ledger-{life:016x}");
        let found = match fs::read(site.node(index).path(&path)) {
            Ok(bytes) => ledger::read_file(&bytes, life),
            Err(error) => Err(error.to_string()),
        };
        match found {
            // It was heard of after it was written, and the file is read after that.
            Ok(last) if last >= counter => None,
            Ok(last) => Some(format!("{place}/: {counter} steps were heard of, {last} are there")),
            Err(error) => Some(format!("{place}/: {error}")),
        }
    });
    wrong.collect()
}

/// The volume of a container that has ended is at one of the nodes, with every step that was heard
/// of.
fn volume(site: &Site, cell: &Cell, names: &Names, history: &[Sighting]) -> Result<Vec<String>> {
    if !cell.tree {
        return Ok(Vec::new());
    }
    let (life, counter) = heard(history);
    let script = format!(
        "find /var/lib/godwit/volumes -path '*{}*' -name ledger-{life:016x} | head -1",
        names.tree()
    );
    let mut best = None;
    for node in site.nodes() {
        let path = node.sh(&script)?;
        if path.trim().is_empty() {
            continue;
        }
        let bytes = fs::read(node.path(path.trim())).unwrap_or_default();
        best = best.max(Some(ledger::read_file(&bytes, life).unwrap_or(0)));
    }
    Ok(match best {
        None => vec![format!("volume {} is at no node", names.tree())],
        Some(last) if last < counter => {
            vec![format!(
                "volume {}: {counter} steps were heard of, {last} are there",
                names.tree()
            )]
        }
        Some(_) => Vec::new(),
    })
}

/// Neither end of a migration may have packet rules left in the container's network.
fn network(site: &Site, names: &Names, settled: &Settled, broken: &mut Broken) -> Result<()> {
    for (index, node) in site.nodes().iter().enumerate() {
        // Where it does not run, a restore may yet have to be given up.
        let patience = match settled {
            Settled::Runs { index: runs, .. } if *runs == index => Duration::ZERO,
            _ => VANISH_MAX,
        };
        let _ = wait_until("packet rules vanish", patience, || {
            Ok(packet_rules(node, &names.container)?.is_empty())
        });
        for rule in packet_rules(node, &names.container)? {
            let text = format!("{} has in the container's network: {rule}", node.name());
            if matches!(settled, Settled::Runs { index: runs, .. } if *runs == index) {
                broken.mute.push(text);
            } else {
                broken.leaked.push(text);
            }
        }
    }
    Ok(())
}

/// What belongs to others is theirs still.
fn others(site: &Site, names: &Names, fault: Fault, broken: &mut Broken) -> Result<Vec<String>> {
    let mut notes = Vec::new();
    match fault {
        Fault::Namesake | Fault::SecondUser if !names.other_has_started.get() => {
            notes.push("the other container was refused".to_owned());
        }
        Fault::Namesake => {
            let seen = look(site.node(1), &names.container)?;
            if seen.task.as_deref() != Some("RUNNING") {
                broken.lost.push(format!("the namesake was removed: {:?}", seen.task));
            }
        }
        Fault::SecondUser => {
            let seen = look(site.node(0), &names.second_user())?;
            let Some(pid) = seen.pid else {
                broken.lost.push("the volume's second user was removed".to_owned());
                return Ok(notes);
            };
            let tree = site.node(0).path(format!("/proc/{pid}/root/tree"));
            let has_ledger = fs::read_dir(&tree)?
                .flatten()
                .any(|entry| entry.file_name().to_string_lossy().starts_with("ledger-"));
            if !has_ledger {
                broken.lost.push("a second user's volume was emptied under it".to_owned());
            }
        }
        Fault::Signal(..)
        | Fault::Crash(_)
        | Fault::Link(..)
        | Fault::DiskFull(_)
        | Fault::MemoryLimit(_)
        | Fault::Container(_)
        | Fault::TwoDestinations
        | Fault::BackAtOnce => {}
    }
    Ok(notes)
}

/// Whether what the client said is true. Returns notes.
pub(crate) fn words(code: Option<i32>, said: &str, settled: &Settled) -> Vec<String> {
    let mut notes = Vec::new();
    let at_source = matches!(settled, Settled::Runs { index: 0, .. });
    let elsewhere = matches!(settled, Settled::Runs { index, .. } if *index > 0);
    if code == Some(0) && at_source {
        notes.push("the client reports success, and it runs at its source".to_owned());
    }
    if said.contains("runs on at its source") && !at_source {
        notes.push(format!("not true: {}", said.trim()));
    }
    if code.is_some_and(|code| code != 0) && elsewhere {
        notes.push(format!("it runs at the destination, and the client said: {}", said.trim()));
    } else if code.is_some_and(|code| code != 0) {
        notes.push(format!("the client said: {}", said.trim().lines().last().unwrap_or_default()));
    }
    notes
}
