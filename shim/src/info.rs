//! `-info`: what containerd 2 asks before it starts anything. With the OCI runtime's own list of
//! features, since pods with a user namespace, or with recursively read-only mounts, are refused
//! where it does not name them.

use std::io::Write as _;
use std::process::{Command, ExitCode, Stdio};

use containerd_shim::protos::protobuf::Message as _;
use containerd_shim::protos::protobuf::well_known_types::any::Any;
use containerd_shim::protos::types::introspection::{RuntimeInfo, RuntimeVersion};

use crate::options;
use crate::runc::binary_of;
use crate::server::ServeError;
use crate::{RUNTIME_NAME, bootstrap, failed};

/// `specs.Features` as containerd names it.
const FEATURES: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

pub(crate) fn main() -> ExitCode {
    match info() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&error),
    }
}

fn info() -> Result<(), ServeError> {
    let given = bootstrap::options_in(&bootstrap::read_input()?);
    let options = options::decode(given.as_ref())?;
    let version = env!("CARGO_PKG_VERSION").to_owned();
    let info = RuntimeInfo {
        name: RUNTIME_NAME.to_owned(),
        version: Some(RuntimeVersion { version, ..Default::default() }).into(),
        options: given.into(),
        features: features(binary_of(&options)).into(),
        ..Default::default()
    };
    let bytes = info.write_to_bytes()?;
    std::io::stdout().lock().write_all(&bytes).map_err(crate::server::io_error("answer"))
}

/// What the runtime says it can do; `None` if it is not there or too old to say.
fn features(binary: &str) -> Option<Any> {
    let said = Command::new(binary).arg("features").stderr(Stdio::null()).output().ok()?;
    let is_json = serde_json::from_slice::<serde_json::Value>(&said.stdout).is_ok();
    let type_url = FEATURES.to_owned();
    (said.status.success() && is_json).then(|| Any {
        type_url,
        value: said.stdout,
        ..Default::default()
    })
}
