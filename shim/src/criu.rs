//! What CRIU is told past the runtime: a configuration file per container, named to runc by the
//! annotation `org.criu.config` and written afresh before every dump and every restore.
//!
//! It carries what the runtime has no flag for (or containerd's API no field): links to removed
//! files, larger ghost files, connections not yet accepted, the lock backend, and the script that
//! holds a migrated container before its first instruction ([`crate::hold`]).

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe;

use crate::reap::Reaper;

/// Name of the configuration file in a bundle.
pub(crate) const CONFIG_FILE: &str = "criu.conf";
/// Note in an image directory that open connections were asked for, by whoever made the image.
const OPEN_TCP_FILE: &str = "godwit-open-tcp";
/// From this version on nftables may be asked for; 4.1.1 crashes on it.
const NFTABLES_SINCE: (u32, u32) = (4, 2);
/// How long CRIU may take to tell its version.
const VERSION_TIME_MAX: Duration = Duration::from_secs(5);
/// Longest answer to it, in bytes.
const VERSION_BYTES_MAX: u64 = 4096;

/// What becomes of open TCP connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Connections {
    /// Dump: refuse. CRIU's default.
    #[default]
    Refuse,
    /// Dump or restore them.
    Keep,
    /// Restore: the processes find them closed.
    Close,
}

/// Contents of a configuration file.
#[derive(Debug, Default)]
pub(crate) struct Config<'a> {
    pub(crate) connections: Connections,
    /// Program that CRIU runs at each stage: a path without blanks, since CRIU splits at them.
    pub(crate) action_script: Option<&'a str>,
    /// A file whose lines come first: the user's own.
    pub(crate) user_file: Option<&'a Path>,
    pub(crate) version: Option<(u32, u32)>,
    /// Whether a link that CRIU made beside a removed file could be one that it waits for until a thaw.
    pub(crate) files_are_frozen: bool,
}

impl Config<'_> {
    fn text(&self, user_lines: &str) -> String {
        let mut text = String::from(user_lines);
        if !text.is_empty() && !text.ends_with('\n') {
            text.push('\n');
        }
        text.push_str("file-locks\n");
        if !self.files_are_frozen {
            text.push_str("link-remap\n");
        }
        text.push_str("ghost-limit 64M\nskip-in-flight\n");
        match self.connections {
            Connections::Refuse => {}
            Connections::Keep => text.push_str("tcp-established\n"),
            Connections::Close => text.push_str("tcp-close\n"),
        }
        if self.version.is_some_and(|version| version >= NFTABLES_SINCE) {
            text.push_str("network-lock nftables\n");
        }
        if let Some(script) = self.action_script {
            let _ = writeln!(text, "action-script {script}");
        }
        text
    }

    /// Writes `bundle/criu.conf`. Errors: I/O, also when the user's file cannot be read.
    pub(crate) fn write(&self, bundle: &Path) -> std::io::Result<PathBuf> {
        let path = bundle.join(CONFIG_FILE);
        let user_lines = match self.user_file.filter(|file| *file != path) {
            Some(file) => std::fs::read_to_string(file)?,
            None => String::new(),
        };
        let fresh = bundle.join("criu.conf.new");
        std::fs::write(&fresh, self.text(&user_lines))?;
        std::fs::rename(&fresh, &path)?;
        Ok(path)
    }
}

/// Notes beside an image that its open connections were asked for.
pub(crate) fn note_open_tcp(image_path: &Path) -> std::io::Result<()> {
    std::fs::write(image_path.join(OPEN_TCP_FILE), "")
}

/// Whether [`note_open_tcp`] was called for this image.
pub(crate) fn has_open_tcp(image_path: &Path) -> bool {
    image_path.join(OPEN_TCP_FILE).is_file()
}

/// Why CRIU failed, from its log, else `fallback`.
pub(crate) fn reason(log: &Path, fallback: &dyn std::fmt::Display) -> String {
    criu_wrapper::log::reason(log).unwrap_or_else(|| fallback.to_string())
}

/// Major and minor version of the `criu` that the runtime will find, if it tells one in time.
pub(crate) async fn version(reaper: &Reaper) -> Option<(u32, u32)> {
    let (read, write) = std::io::pipe().ok()?;
    let mut command = Command::new("criu");
    command.arg("--version").stdin(Stdio::null()).stdout(write).stderr(Stdio::null());
    let (child, _done) = reaper.spawn(&mut command).ok()?;
    drop(command);
    let mut text = String::new();
    let mut output = pipe::Receiver::from_owned_fd(read.into()).ok()?.take(VERSION_BYTES_MAX);
    let told = tokio::time::timeout(VERSION_TIME_MAX, output.read_to_string(&mut text)).await;
    if told.is_err() {
        let _ = reaper.signal(child.id(), nix::sys::signal::Signal::SIGKILL);
    }
    version_in(&text)
}

/// `Version: 4.2.1`, with a line for the commit it was built from.
fn version_in(text: &str) -> Option<(u32, u32)> {
    let number = text.lines().find_map(|line| line.strip_prefix("Version:"))?.trim();
    let mut parts = number.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((parts.next()?.ok()?, parts.next()?.ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: &str = "file-locks\nlink-remap\nghost-limit 64M\nskip-in-flight\n";

    #[test]
    fn lines_of_a_dump_and_of_a_held_restore() {
        let dump = Config {
            connections: Connections::Keep,
            action_script: None,
            user_file: None,
            version: Some((4, 1)),
            files_are_frozen: false,
        };
        assert_eq!(dump.text(""), format!("{BASE}tcp-established\n"));
        let frozen = Config { files_are_frozen: true, ..dump };
        let without_links = BASE.replace("link-remap\n", "");
        assert_eq!(frozen.text(""), format!("{without_links}tcp-established\n"));
        let restore = Config {
            connections: Connections::Close,
            action_script: Some("/proc/7/exe"),
            user_file: None,
            version: Some((4, 2)),
            files_are_frozen: false,
        };
        let expected = format!(
            "log-level 4\n{BASE}tcp-close\nnetwork-lock nftables\naction-script /proc/7/exe\n"
        );
        assert_eq!(restore.text("log-level 4"), expected);
    }

    #[test]
    fn versions() {
        assert_eq!(version_in("Version: 4.2.1\nGitID: v4.2.1\n"), Some((4, 2)));
        assert_eq!(version_in("Version: 3.17\n"), Some((3, 17)));
        assert_eq!(version_in("criu: not found"), None);
    }
}
