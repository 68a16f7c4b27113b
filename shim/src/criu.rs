//! CRIU's settings, given to it past the runtime: a configuration file per container, named to runc
//! by the annotation `org.criu.config` and written afresh before every dump and every restore.
//!
//! It carries what the runtime has no flag for (or containerd's API no field): [`Settings`], what
//! becomes of connections, and the script that holds a migrated container before its first
//! instruction ([`crate::hold`]).

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use godwit_protos::annotation::{CRIU_PREFIX, MPTCP};
use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe;

use crate::error::TaskError;
use crate::reap::Reaper;

/// Name of the configuration file in a bundle.
pub(crate) const CONFIG_FILE: &str = "criu.conf";
/// Note in an image directory that open connections were asked for, by the maker of the image.
const OPEN_TCP_FILE: &str = "godwit-open-tcp";
/// From this version on lock backends may be asked for; 4.1.1 crashes on it.
const NETWORK_LOCK_SINCE: (u32, u32) = (4, 2);
/// Largest ghost file that may be asked for, in bytes: CRIU keeps the limit in 32 bits.
const GHOST_LIMIT_MAX: u64 = u32::MAX as u64;
/// How long CRIU may take to tell its version.
const VERSION_TIME_MAX: Duration = Duration::from_secs(5);
/// Longest answer to it, in bytes.
const VERSION_BYTES_MAX: u64 = 4096;

/// Why a container's settings of CRIU cannot be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SettingError {
    #[error("annotation {CRIU_PREFIX}{name}: there is no such setting of CRIU")]
    Unknown { name: String },
    #[error("annotation {CRIU_PREFIX}{name}: {value:?} is not {wanted}")]
    Value { name: String, value: String, wanted: &'static str },
    #[error("annotation {MPTCP}: {0:?} is not yes or no")]
    Mptcp(String),
    #[error("annotations {CRIU_PREFIX}* and org.criu.config exclude each other")]
    OwnFile,
    #[error("annotation {CRIU_PREFIX}network-lock needs CRIU 4.2, and this node has {0}.{1}")]
    TooOld(u32, u32),
}

/// CRIU's settings for every container, as far as its annotations do not say otherwise.
/// docs/shim.md has the failure that each prevents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Settings {
    file_locks: bool,
    link_remap: bool,
    skip_in_flight: bool,
    ghost_limit_bytes: u64,
    /// The backend that the user chose.
    network_lock: Option<&'static str>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            file_locks: true,
            link_remap: true,
            skip_in_flight: true,
            // A limit would only make a move fail after the freeze.
            ghost_limit_bytes: GHOST_LIMIT_MAX,
            network_lock: None,
        }
    }
}

impl Settings {
    /// The settings of a container with these annotations. Others than `godwit.io/criu.*` are
    /// skipped. Errors: one of those is unknown or has a value that it cannot have.
    pub(crate) fn of<'a>(
        annotations: impl Iterator<Item = (&'a str, &'a str)>,
    ) -> Result<Self, SettingError> {
        let mut settings = Self::default();
        for (key, value) in annotations {
            let Some(name) = key.strip_prefix(CRIU_PREFIX) else { continue };
            let wrong = |wanted| SettingError::Value {
                name: name.to_owned(),
                value: value.to_owned(),
                wanted,
            };
            let answer = || yes_or_no(value).ok_or_else(|| wrong("yes or no"));
            match name {
                "file-locks" => settings.file_locks = answer()?,
                "link-remap" => settings.link_remap = answer()?,
                "skip-in-flight" => settings.skip_in_flight = answer()?,
                "ghost-limit" => {
                    let size = size_in_bytes(value);
                    settings.ghost_limit_bytes =
                        size.ok_or_else(|| wrong("a size below 4G, such as 64M"))?;
                }
                "network-lock" => {
                    let known = ["iptables", "nftables", "skip"].into_iter();
                    let backend = known.clone().find(|backend| *backend == value);
                    let wanted = "iptables, nftables or skip";
                    settings.network_lock = Some(backend.ok_or_else(|| wrong(wanted))?);
                }
                _ => return Err(SettingError::Unknown { name: name.to_owned() }),
            }
        }
        Ok(settings)
    }

    /// How CRIU keeps packets away while it works on connections: as the user chose, otherwise not
    /// at all if nothing needs it, else by the fastest backend that this CRIU has.
    ///
    /// Errors: [`SettingError::TooOld`]; a version that is not known is believed to be new.
    fn network_lock(
        &self,
        version: Option<(u32, u32)>,
        is_needed: bool,
    ) -> Result<Option<&'static str>, SettingError> {
        match (self.network_lock, version) {
            (Some(_), Some(version)) if version < NETWORK_LOCK_SINCE => {
                Err(SettingError::TooOld(version.0, version.1))
            }
            (None, Some(version)) if version >= NETWORK_LOCK_SINCE => {
                Ok(Some(if is_needed { "nftables" } else { "skip" }))
            }
            (chosen, _) => Ok(chosen),
        }
    }
}

fn yes_or_no(value: &str) -> Option<bool> {
    match value {
        "yes" => Some(true),
        "no" => Some(false),
        _ => None,
    }
}

/// `64M`: digits, then `K`, `M`, `G` or nothing.
fn size_in_bytes(value: &str) -> Option<u64> {
    let (digits, shift) = match value.as_bytes().last()? {
        b'K' => (&value[..value.len() - 1], 10),
        b'M' => (&value[..value.len() - 1], 20),
        b'G' => (&value[..value.len() - 1], 30),
        _ => (value, 0),
    };
    // Without the check a sign would pass.
    let number: u64 =
        digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok())??;
    number.checked_mul(1 << shift).filter(|bytes| *bytes <= GHOST_LIMIT_MAX)
}

/// What becomes of open TCP connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Connections {
    /// Dump: refuse. CRIU's default.
    #[default]
    Refuse,
    /// Dump or restore them.
    Keep,
    /// Dump: leave them out. Restore: the processes find them closed.
    Close,
}

/// Contents of a configuration file.
#[derive(Debug, Default)]
pub(crate) struct Config<'a> {
    pub(crate) settings: Settings,
    pub(crate) connections: Connections,
    /// For a migration: its restore closes all connections, so packets that arrive meanwhile change
    /// nothing that is used. Then CRIU sets no packet lock, and a CRIU that is killed leaves none.
    pub(crate) is_migration: bool,
    /// Program that CRIU runs at each stage, which leaves the restored tasks stopped: a path
    /// without blanks, since CRIU splits at them.
    pub(crate) action_script: Option<&'a str>,
    /// Paths of watched files that CRIU could not find by itself: without blanks, quotes and `#`.
    pub(crate) watched: Vec<PathBuf>,
    /// A file whose lines come first: the user's own.
    pub(crate) user_file: Option<&'a Path>,
    pub(crate) version: Option<(u32, u32)>,
    /// Whether a link that CRIU made beside a removed file could be one that it waits for until a
    /// thaw.
    pub(crate) files_are_frozen: bool,
}

impl Config<'_> {
    fn text(&self, user_lines: &str) -> Result<String, SettingError> {
        let mut text = String::from(user_lines);
        if !text.is_empty() && !text.ends_with('\n') {
            text.push('\n');
        }
        let settings = &self.settings;
        for (is_wanted, line) in [
            (settings.file_locks, "file-locks\n"),
            (settings.link_remap && !self.files_are_frozen, "link-remap\n"),
            (settings.skip_in_flight, "skip-in-flight\n"),
            (self.connections == Connections::Keep, "tcp-established\n"),
            (self.connections == Connections::Close, "tcp-close\n"),
        ] {
            text.push_str(if is_wanted { line } else { "" });
        }
        let _ = writeln!(text, "ghost-limit {}", settings.ghost_limit_bytes);
        if let Some(backend) = settings.network_lock(self.version, !self.is_migration)? {
            let _ = writeln!(text, "network-lock {backend}");
        }
        for path in &self.watched {
            let _ = writeln!(text, "irmap-scan-path {}", path.display());
        }
        if let Some(script) = self.action_script {
            // Whatever becomes of the runtime and of the script, no task runs before the shim lets
            // it.
            let _ = writeln!(text, "action-script {script}\nleave-stopped");
        }
        Ok(text)
    }

    /// Writes `bundle/criu.conf`. Errors: I/O, also when the user's file cannot be read; a setting
    /// that this CRIU cannot have.
    pub(crate) fn write(&self, bundle: &Path) -> Result<PathBuf, TaskError> {
        let wrong = || TaskError::io("CRIU configuration file");
        let path = bundle.join(CONFIG_FILE);
        let user_lines = match self.user_file.filter(|file| *file != path) {
            Some(file) => std::fs::read_to_string(file).map_err(wrong())?,
            None => String::new(),
        };
        let fresh = bundle.join("criu.conf.new");
        std::fs::write(&fresh, self.text(&user_lines)?).map_err(wrong())?;
        std::fs::rename(&fresh, &path).map_err(wrong())?;
        Ok(path)
    }
}

/// Notes beside an image that its open connections were asked for: its restore has to be told as
/// well, and containerd can tell the checkpoint only.
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

    const BASE: &str = "file-locks\nlink-remap\nskip-in-flight\n";
    const GHOSTS: &str = "ghost-limit 4294967295\n";

    #[test]
    fn lines_of_a_dump_and_of_a_held_restore() {
        let dump =
            Config { connections: Connections::Keep, version: Some((4, 1)), ..Default::default() };
        assert_eq!(dump.text("").unwrap(), format!("{BASE}tcp-established\n{GHOSTS}"));
        let frozen = Config { files_are_frozen: true, ..dump };
        let without_links = BASE.replace("link-remap\n", "");
        assert_eq!(frozen.text("").unwrap(), format!("{without_links}tcp-established\n{GHOSTS}"));
        let restore = Config {
            connections: Connections::Close,
            action_script: Some("/proc/7/exe"),
            version: Some((4, 2)),
            ..Default::default()
        };
        let watched = vec![PathBuf::from("/srv/in")];
        let dump = Config { watched, ..Config::default() };
        assert_eq!(dump.text("").unwrap(), format!("{BASE}{GHOSTS}irmap-scan-path /srv/in\n"));
        let expected = format!(
            "log-level 4\n{BASE}tcp-close\n{GHOSTS}network-lock nftables\n\
             action-script /proc/7/exe\nleave-stopped\n"
        );
        assert_eq!(restore.text("log-level 4").unwrap(), expected);
        let migration = Config { is_migration: true, ..restore };
        let expected = expected.replace("nftables", "skip");
        assert_eq!(migration.text("log-level 4").unwrap(), expected);
        let old = Config { version: Some((4, 1)), ..migration };
        assert!(!old.text("").unwrap().contains("network-lock"));
    }

    fn settings(pairs: &[(&str, &str)]) -> Result<Settings, SettingError> {
        Settings::of(pairs.iter().copied())
    }

    #[test]
    fn annotations_change_the_settings() {
        let none = [("godwit.io/mode", "x"), ("org.criu.config", "/x"), ("godwit.io/criu", "y")];
        assert_eq!(settings(&none), Ok(Settings::default()));
        let all = settings(&[
            ("godwit.io/criu.file-locks", "no"),
            ("godwit.io/criu.link-remap", "no"),
            ("godwit.io/criu.skip-in-flight", "yes"),
            ("godwit.io/criu.ghost-limit", "3G"),
            ("godwit.io/criu.network-lock", "skip"),
        ]);
        let config = Config { settings: all.unwrap(), version: Some((4, 2)), ..Default::default() };
        let expected = "skip-in-flight\nghost-limit 3221225472\nnetwork-lock skip\n";
        assert_eq!(config.text("").unwrap(), expected);
        let old = Config { version: Some((4, 1)), ..config };
        assert_eq!(old.text(""), Err(SettingError::TooOld(4, 1)));
    }

    #[test]
    fn settings_that_make_no_sense_are_named() {
        for (name, value) in [
            ("file-locks", "true"),
            ("link-remap", ""),
            ("skip-in-flight", "yes\nexec-cmd"),
            ("ghost-limit", "64 M"),
            ("ghost-limit", "-1"),
            ("ghost-limit", "+1"),
            ("ghost-limit", "M"),
            ("ghost-limit", ""),
            ("ghost-limit", "4G"),
            ("ghost-limit", "99999999999999999999G"),
            ("ghost-limit", "1\u{fc}"),
            ("network-lock", "skip\naction-script /evil"),
        ] {
            let refused = settings(&[(&format!("godwit.io/criu.{name}"), value)]).unwrap_err();
            assert!(matches!(&refused, SettingError::Value { .. }), "{name}={value}");
            assert!(refused.to_string().contains(&format!("godwit.io/criu.{name}: {value:?}")));
        }
        let unknown = settings(&[("godwit.io/criu.exec-cmd", "yes")]).unwrap_err();
        assert_eq!(unknown, SettingError::Unknown { name: "exec-cmd".to_owned() });
    }

    #[test]
    fn versions() {
        assert_eq!(version_in("Version: 4.2.1\nGitID: v4.2.1\n"), Some((4, 2)));
        assert_eq!(version_in("Version: 3.17\n"), Some((3, 17)));
        assert_eq!(version_in("criu: not found"), None);
    }
}
