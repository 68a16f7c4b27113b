//! Noticing that a migration has reached a phase, by what itself shows: events, the source's log,
//! processes, packets.

use std::time::{Duration, Instant};

use anyhow::Result;
use godwit_tests::Background;

use crate::cell::{Phase, Program, Role};
use crate::process;
use crate::site::Site;

/// Longest wait for a phase of a migration that goes on.
const PHASE_MAX: Duration = Duration::from_secs(20);
/// Pause between two looks.
const PAUSE: Duration = Duration::from_millis(1);
/// Until a client that follows events has asked for them.
const SUBSCRIBE_MAX: Duration = Duration::from_secs(10);

/// Follows one migration.
pub(crate) struct Watcher<'a> {
    site: &'a Site,
    events: Background,
    /// Where the source's log ended when the run began.
    log_end: usize,
    name: &'a str,
    dump_seen: bool,
}

impl<'a> Watcher<'a> {
    /// Begins to follow the events of the destination.
    pub(crate) fn start(site: &'a Site, name: &'a str, seed: u64) -> Result<Self> {
        let destination = site.node(Role::Destination.index());
        let log = format!("watch-{seed}");
        let events = destination.spawn(&["godwit", "--output", "json", "watch"], &log)?;
        let log_end = site.node(Role::Source.index()).log_end("daemon");
        // It waits for events in a read once it has asked for them.
        let begin = Instant::now();
        while begin.elapsed() < SUBSCRIBE_MAX && !waits_for_events(site) {
            std::thread::sleep(10 * PAUSE);
        }
        Ok(Self { site, events, log_end, name, dump_seen: false })
    }

    /// Waits until the migration has reached `phase` or has ended. Returns the phase that it is in:
    /// the one that was asked for, or the end.
    ///
    /// One that was too short to be noticed counts as reached when the next is.
    pub(crate) fn wait_for(&mut self, phase: Phase, client: &mut Background) -> Result<Phase> {
        let begin = Instant::now();
        while begin.elapsed() < PHASE_MAX {
            if self.has_reached(phase)? {
                return Ok(phase);
            }
            if client.ended()?.is_some() {
                break;
            }
            std::thread::sleep(PAUSE);
        }
        Ok(Phase::Done)
    }

    fn has_reached(&mut self, phase: Phase) -> Result<bool> {
        let source = self.site.node(Role::Source.index());
        let destination = self.site.node(Role::Destination.index());
        let works = |at| !process::find(at, Program::Criu, self.name).is_empty();
        Ok(match phase {
            Phase::Request => self.has_event(r#""step":"request""#),
            Phase::PreCopy => self.has_event(r#""text":"round 1""#),
            Phase::Stop => self.has_event(r#""step":"stop""#),
            Phase::Dump => self.has_event(r#""step":"stop""#) && works(source),
            Phase::Transfer => {
                if !self.has_event(r#""step":"stop""#) {
                    return Ok(false);
                }
                let is_dumping = works(source);
                self.dump_seen |= is_dumping;
                (self.dump_seen && !is_dumping) || self.has_event(r#""step":"hand-off""#)
            }
            Phase::Restore => self.has_event(r#""step":"hand-off""#) && works(destination),
            Phase::Release => source.log_since("daemon", self.log_end).contains("released"),
            Phase::Running => self.site.witness().last_at(Role::Destination.index()).is_some(),
            Phase::Done => false,
        })
    }

    /// Whether the destination works on it no longer: it says so, or its daemon has ended
    /// meanwhile.
    ///
    /// A client that was killed does not end a migration.
    pub(crate) fn is_over(&mut self) -> Result<bool> {
        let has_begun = self.has_event(r#""step":"request""#);
        let has_ended =
            [r#""step":"done""#, r#""step":"failed""#].iter().any(|e| self.has_event(e));
        Ok(!has_begun || has_ended || self.events.ended()?.is_some())
    }

    fn has_event(&self, text: &str) -> bool {
        self.events.log().contains(text)
    }
}

fn waits_for_events(site: &Site) -> bool {
    let found = process::of_node(site.node(Role::Destination.index()));
    let follower =
        found.iter().find(|process| process.arguments.trim_end().ends_with("json watch"));
    // In epoll_wait with the connection made: the daemon has accepted it.
    follower.is_some_and(|process| {
        let wait = std::fs::read_to_string(format!("/proc/{}/wchan", process.pid));
        wait.is_ok_and(|wait| wait.contains("epoll"))
    })
}
