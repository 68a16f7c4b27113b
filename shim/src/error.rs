//! What a call to the shim can fail with, and the gRPC code that containerd acts on.

use std::path::PathBuf;
use std::time::Duration;

use containerd_shim::protos::ttrpc::{self, Code};
use criu_wrapper::supplement::SupplementError;
use godwit_protos::ParseNameError;

use crate::criu::SettingError;
use crate::daemon::DaemonError;
use crate::options::OptionsError;
use crate::rootfs::RootfsError;
use crate::runc::RuncError;
use crate::spec::SpecError;
use crate::stdio::WiringError;
use crate::volumes::VolumeError;

/// A failed call.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TaskError {
    #[error("container {0} does not exist")]
    NoContainer(String),
    #[error("process {exec} of container {container} does not exist")]
    NoExec { container: String, exec: String },
    #[error("{0} exists already")]
    Exists(String),
    #[error("process already finished")]
    Finished,
    #[error("container {container} is {is}: {wanted}")]
    Phase { container: String, is: &'static str, wanted: &'static str },
    #[error(
        "container {container} {text}; it runs there now; delete the container here to create it again"
    )]
    Fenced { container: String, text: String },
    #[error("cannot tell whether container {container} moved away: {path}")]
    Fence { container: String, path: PathBuf, source: std::io::Error },
    #[error(transparent)]
    Name(#[from] ParseNameError),
    #[error("{0}")]
    Invalid(String),
    #[error(transparent)]
    Options(#[from] OptionsError),
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error(transparent)]
    Rootfs(#[from] RootfsError),
    #[error(transparent)]
    Volume(#[from] VolumeError),
    #[error(transparent)]
    Runc(#[from] RuncError),
    #[error(transparent)]
    Wiring(#[from] WiringError),
    #[error(transparent)]
    Daemon(#[from] DaemonError),
    #[error(transparent)]
    Supplement(#[from] SupplementError),
    #[error("{what}")]
    Io { what: String, source: std::io::Error },
    #[error(
        "processes {pids:?} of container {container} are stopped by a signal and would block the dump \
         for ever: send them SIGCONT first"
    )]
    StoppedBySignal { container: String, pids: Vec<u32> },
    #[error(
        "container {container} starts programs all the time: it was never frozen without a thread that waits in vfork(2), \
         which CRIU cannot dump; try again"
    )]
    InVfork { container: String },
    #[error(transparent)]
    Setting(#[from] SettingError),
    #[error("container {container} runs under crun: checkpoint, restore and migration need runc")]
    NeedsRunc { container: String },
    #[error("dump of container {container} failed: {reason} (log: {log})")]
    Dump { container: String, reason: String, log: PathBuf },
    #[error("dump of container {container} hung for {limit:?} and was broken off by thawing it")]
    DumpHung { container: String, limit: Duration },
    #[error("restore of container {container} failed: {reason} (log: {log})")]
    Restore { container: String, reason: String, log: PathBuf },
    #[error("container {container} may not run here: {reason}")]
    NotGranted { container: String, reason: String },
    #[error("container {container} cannot be restored here: {reason}")]
    NoMemory { container: String, reason: String },
    #[error("the start of container {0} was cancelled")]
    Cancelled(String),
}

impl TaskError {
    /// An I/O error on `what`.
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }

    fn code(&self) -> Code {
        match self {
            Self::NoContainer(_) | Self::NoExec { .. } | Self::Finished => Code::NOT_FOUND,
            Self::Exists(_) => Code::ALREADY_EXISTS,
            Self::Name(_) | Self::Invalid(_) | Self::Options(_) | Self::Setting(_) => {
                Code::INVALID_ARGUMENT
            }
            Self::Spec(SpecError::Volume { .. } | SpecError::Process(_)) => Code::INVALID_ARGUMENT,
            Self::Phase { .. }
            | Self::Fenced { .. }
            | Self::Fence { .. }
            | Self::StoppedBySignal { .. }
            | Self::InVfork { .. }
            | Self::Dump { .. }
            | Self::DumpHung { .. }
            | Self::NotGranted { .. }
            | Self::NoMemory { .. }
            | Self::Daemon(DaemonError::Refused(_)) => Code::FAILED_PRECONDITION,
            Self::Daemon(DaemonError::Unreachable { .. }) => Code::UNAVAILABLE,
            Self::NeedsRunc { .. } => Code::UNIMPLEMENTED,
            Self::Cancelled(_) => Code::CANCELLED,
            Self::Runc(error) if error.is_gone() => Code::NOT_FOUND,
            Self::Spec(_)
            | Self::Rootfs(_)
            | Self::Volume(_)
            | Self::Runc(_)
            | Self::Wiring(_)
            | Self::Supplement(_)
            | Self::Daemon(DaemonError::Answer(_))
            | Self::Io { .. }
            | Self::Restore { .. } => Code::UNKNOWN,
        }
    }
}

/// An error with its causes, in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

impl From<TaskError> for ttrpc::Error {
    fn from(error: TaskError) -> Self {
        Self::RpcStatus(ttrpc::get_status(error.code(), chain(&error)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_told_with_its_causes_in_one_line() {
        let source = std::io::Error::other("disk\n on fire");
        let error = TaskError::io("bundle /b")(source);
        assert_eq!(chain(&error), "bundle /b: disk on fire");
    }

    #[test]
    fn codes_that_containerd_acts_on() {
        let code = |error: TaskError| match ttrpc::Error::from(error) {
            ttrpc::Error::RpcStatus(status) => status.code.enum_value_or_default(),
            other => panic!("{other}"),
        };
        assert_eq!(code(TaskError::NoContainer("c".into())), Code::NOT_FOUND);
        assert_eq!(code(TaskError::Exists("c".into())), Code::ALREADY_EXISTS);
        let fenced =
            TaskError::Fenced { container: "ns/c".into(), text: "moved to edge-b, epoch 3".into() };
        assert_eq!(
            fenced.to_string(),
            "container ns/c moved to edge-b, epoch 3; it runs there now; delete the container here to \
             create it again"
        );
        assert_eq!(code(fenced), Code::FAILED_PRECONDITION);
    }
}
