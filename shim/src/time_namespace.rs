//! Starting an added process in the time namespace of the container's init process.
//!
//! CRIU gives a restored container a time namespace, so that its monotonic clock goes on where the
//! source's stood. An added process must read the same clock. runc joins a time namespace only if
//! the specification names one (and not at all before version 1.2), so the shim starts runc inside:
//!
//! ```text
//! shim --spawns--> shim's own binary --setns, then exec--> runc exec --> the added process
//! ```
//!
//! - `setns` for a time namespace needs a process with one thread: the shim has several.
//! - runc tells from its init's start time whether the container is alive, and `/proc` shows start
//!   times by the reader's clock. So runc gets a state directory of its own for this one call, in
//!   which the start time is what it sees inside.
//! - What goes wrong before `exec` is written to runc's log, where the shim looks for errors.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use nix::sched::CloneFlags;
use serde_json::{Value, json};

/// Tells the binary that it is to be the launcher; holds the pid of the init process.
const LAUNCHER_VARIABLE: &str = "GODWIT_IN_TIME_OF";
/// Name of the file in runc's state directory.
const STATE_FILE: &str = "state.json";
/// The start time of the init process in that file.
const START_FIELD: &str = "init_process_start";

/// A state directory for one call of the runtime inside. Removed when dropped.
#[derive(Debug)]
pub(crate) struct Inside {
    init: u32,
    /// The container's own state directory.
    state: PathBuf,
    root: PathBuf,
}

impl Inside {
    /// What a call for the container with this `init` needs, in `directory`; `None` if its clock is
    /// the shim's. `state` is where the runtime keeps the container's state.
    ///
    /// Errors: I/O.
    pub(crate) fn of(init: u32, state: PathBuf, directory: &Path) -> io::Result<Option<Self>> {
        let namespace = |of: &str| std::fs::read_link(format!("/proc/{of}/ns/time")).ok();
        let (ours, its) = (namespace("self"), namespace(&init.to_string()));
        if its.is_none() || ours == its {
            return Ok(None);
        }
        std::fs::create_dir_all(directory)?;
        Ok(Some(Self { init, state, root: directory.to_owned() }))
    }

    /// The runtime's `--root` for the call.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// The command that becomes the runtime; the runtime's arguments follow.
    pub(crate) fn command(&self, runtime: &str, log: &Path) -> Command {
        let mut command = Command::new(format!("/proc/{}/exe", std::process::id()));
        command.env(LAUNCHER_VARIABLE, self.init.to_string());
        command.args([self.state.as_os_str(), self.root.as_os_str(), log.as_os_str()]);
        command.arg(runtime);
        command
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.root);
    }
}

/// Whether this process is the launcher.
pub(crate) fn is_launcher() -> bool {
    std::env::var_os(LAUNCHER_VARIABLE).is_some()
}

/// The launcher: becomes the runtime. Returns only on failure.
pub(crate) fn launcher_main() -> ExitCode {
    let words: Vec<OsString> = std::env::args_os().skip(1).collect();
    let [state, root, log, runtime, args @ ..] = words.as_slice() else {
        return ExitCode::FAILURE;
    };
    let error = match enter(Path::new(state), Path::new(root)) {
        Ok(()) => Command::new(runtime).args(args).env_remove(LAUNCHER_VARIABLE).exec(),
        Err(error) => error,
    };
    let message = format!("joining the time namespace of the container: {error}");
    let _ = std::fs::write(log, json!({ "level": "error", "msg": message }).to_string());
    ExitCode::FAILURE
}

/// Joins the namespace and copies the state, with the start time as it reads inside.
fn enter(state: &Path, root: &Path) -> io::Result<()> {
    let init = std::env::var(LAUNCHER_VARIABLE).map_err(io::Error::other)?;
    let id = state.file_name().unwrap_or(OsStr::new("container"));
    let text = std::fs::read(state.join(STATE_FILE))?;
    let outside = start_time(&init)?;
    let namespace = std::fs::File::open(format!("/proc/{init}/ns/time"))?;
    nix::sched::setns(namespace, CloneFlags::from_bits_retain(libc::CLONE_NEWTIME))?;
    let text = with_start_time(&text, outside, start_time(&init)?)?;
    std::fs::create_dir_all(root.join(id))?;
    std::fs::write(root.join(id).join(STATE_FILE), text)
}

/// The state with the start time `inside`, if it has `outside`; a container that another init
/// process belongs to stays one for which the runtime starts nothing.
fn with_start_time(text: &[u8], outside: u64, inside: u64) -> io::Result<Vec<u8>> {
    let mut state: Value = serde_json::from_slice(text)?;
    if state.get(START_FIELD).and_then(Value::as_u64) == Some(outside) {
        state[START_FIELD] = Value::from(inside);
    }
    Ok(serde_json::to_vec(&state)?)
}

/// Start time of a process in clock ticks, by this process's clock (proc(5), "stat", field 22).
fn start_time(pid: &str) -> io::Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    start_time_in(&stat).ok_or_else(|| io::Error::other(format!("no start time of process {pid}")))
}

fn start_time_in(stat: &str) -> Option<u64> {
    // The name before the last parenthesis may hold anything.
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_time_is_field_22() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4711 99 1";
        assert_eq!(start_time_in(stat), Some(4711));
        assert_eq!(start_time_in("7 (a) S 1"), None);
    }

    #[test]
    fn only_the_start_time_of_this_init_changes() {
        let text = br#"{"id":"c","init_process_start":10,"x":[1]}"#;
        let inside: Value =
            serde_json::from_slice(&with_start_time(text, 10, 25).unwrap()).unwrap();
        assert_eq!(inside, json!({"id": "c", "init_process_start": 25, "x": [1]}));
        let other: Value = serde_json::from_slice(&with_start_time(text, 11, 25).unwrap()).unwrap();
        assert_eq!(other[START_FIELD], 10);
    }

    #[test]
    fn a_process_on_our_clock_needs_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let inside = Inside::of(std::process::id(), "/state/c".into(), &dir.path().join("t"));
        assert!(inside.unwrap().is_none());
        assert!(!dir.path().join("t").exists());
    }
}
