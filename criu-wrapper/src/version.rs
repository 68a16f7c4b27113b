//! Which CRIU is installed, and what follows from its version.
//!
//! Versions decide two things that CRIU does not announce: which options crash it, and which
//! kernels it can cope with. Everything else is asked of `criu check`.

use std::ffi::OsStr;
use std::fmt;
use std::process::Command;
use std::str::FromStr;

/// Version of CRIU, such as 4.2 (patch 0) or 4.1.1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    /// First number.
    pub major: u32,
    /// Second number.
    pub minor: u32,
    /// Third number; 0 where CRIU prints none.
    pub patch: u32,
}

/// Why the version is not known.
#[derive(Debug, thiserror::Error)]
pub enum VersionError {
    /// The program does not start: not installed, or not executable.
    #[error("start {program} --version")]
    Start {
        /// The program as named by the caller.
        program: String,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The program ran and printed something else.
    #[error("{0:?} is not a version of CRIU")]
    Text(String),
}

impl Version {
    /// Asks `program` (usually `criu`) for its version.
    pub fn of(program: impl AsRef<OsStr>) -> Result<Self, VersionError> {
        let program = program.as_ref();
        let output = Command::new(program).arg("--version").output().map_err(|source| {
            VersionError::Start { program: program.to_string_lossy().into_owned(), source }
        })?;
        String::from_utf8_lossy(&output.stdout).parse()
    }

    const fn new(major: u32, minor: u32, patch: u32) -> Self {
        Self { major, minor, patch }
    }

    /// Whether `network-lock nftables` and `network-lock skip` work in a configuration file. CRIU
    /// 4.1.1 crashes on them when it is driven by runc.
    pub fn has_network_lock_option(self) -> bool {
        self >= Self::new(4, 2, 0)
    }

    /// Whether internet sockets can be dumped on Linux 6.16 and later, which refuse socket options
    /// that older CRIU insists on.
    pub fn dumps_sockets_on_linux_6_16(self) -> bool {
        self >= Self::new(4, 2, 0)
    }

    /// Whether page maps may hold 64-bit page counts ([`crate::pagemap::Form::Wide`]).
    pub fn reads_wide_page_counts(self) -> bool {
        self >= Self::new(4, 2, 0)
    }
}

impl FromStr for Version {
    type Err = VersionError;

    /// Parses what `criu --version` prints, `Version: 4.2` and perhaps more lines, or a bare
    /// `4.1.1`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || VersionError::Text(text.chars().take(80).collect());
        let first = text.lines().next().ok_or_else(wrong)?;
        let numbers = first.strip_prefix("Version:").unwrap_or(first).trim();
        let mut parsed = [0; 3];
        let parts: Vec<&str> = numbers.split('.').collect();
        if !(2..=3).contains(&parts.len()) {
            return Err(wrong());
        }
        for (number, part) in parsed.iter_mut().zip(&parts) {
            // Development builds append to the last number: 4.2-dev, 4.2+git.
            let end = part.find(|c: char| !c.is_ascii_digit()).unwrap_or(part.len());
            let Ok(value) = part[..end].parse() else { return Err(wrong()) };
            *number = value;
        }
        Ok(Self::new(parsed[0], parsed[1], parsed[2]))
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)?;
        if self.patch > 0 { write!(f, ".{}", self.patch) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_criu_prints_is_parsed() {
        assert_eq!("Version: 4.2\n".parse::<Version>().unwrap(), Version::new(4, 2, 0));
        assert_eq!(
            "Version: 4.1.1\nGitID: v4.1.1\n".parse::<Version>().unwrap().to_string(),
            "4.1.1"
        );
        assert_eq!("4.2-dev".parse::<Version>().unwrap().to_string(), "4.2");
        for text in ["", "Version:", "criu: not found", "4", "4.x", "1.2.3.4", "4.99999999999"] {
            assert!(text.parse::<Version>().is_err(), "{text}");
        }
    }

    #[test]
    fn features_follow_the_version() {
        let has = |text: &str| text.parse::<Version>().unwrap().has_network_lock_option();
        assert!(!has("3.17.1") && !has("4.1.1") && has("4.2") && has("4.2.1") && has("5.0"));
    }

    #[test]
    fn a_missing_program_is_named() {
        let error = Version::of("/nonexistent/criu").unwrap_err();
        assert_eq!(error.to_string(), "start /nonexistent/criu --version");
    }
}
