//! How containerd starts a shim, and the answer it expects.
//!
//! Since containerd 2.3 `start` reads a protobuf `BootstrapParams` from stdin and answers with a
//! protobuf `BootstrapResult`. Older daemons pass flags and environment, with the runtime options
//! (a protobuf `Any`) on stdin, and take a bare address for a shim that serves the task API's
//! version 2. Which daemon calls can be told only from stdin: an `Any` decodes as `BootstrapParams`
//! too, so the message counts only if it names the same container and namespace as the flags do.

use std::io::{IsTerminal as _, Read as _};

use containerd_shim::bootstrap::{BootstrapParams, BootstrapResult};
use containerd_shim::protos::protobuf::Message as _;
use containerd_shim::protos::protobuf::well_known_types::any::Any;
use containerd_shim::{Flags, StartOpts};

/// Largest input that is read, in bytes; containerd's own limit.
const INPUT_BYTES_MAX: u64 = 10 << 20;

/// The API version told to a daemon that asked with `BootstrapParams`.
const TASK_VERSION: i32 = 3;

/// Why the input makes no sense.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BootstrapError {
    #[error("reading the bootstrap parameters")]
    Read(#[source] std::io::Error),
    #[error("bootstrap parameters name {got}, the command line names {expected}")]
    OtherContainer { got: String, expected: String },
    #[error(
        "containerd's ttrpc address is not known: neither parameters nor TTRPC_ADDRESS name it"
    )]
    NoAddress,
    #[error("encoding the answer")]
    Encode(#[from] protobuf::Error),
}

/// In which form the caller expects the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dialect {
    /// containerd 2.3 and later.
    Protobuf,
    /// Everything before it.
    BareAddress,
}

/// Reads what containerd wrote to stdin. Errors: I/O.
pub(crate) fn read_input() -> Result<Vec<u8>, BootstrapError> {
    let stdin = std::io::stdin();
    let mut input = Vec::new();
    if !stdin.is_terminal() {
        let limited = stdin.lock().take(INPUT_BYTES_MAX);
        { limited }.read_to_end(&mut input).map_err(BootstrapError::Read)?;
    }
    Ok(input)
}

/// Tells the dialect and brings either one into the same form.
///
/// - `ttrpc_address`: the environment's, used when `input` does not name one.
/// - Errors: parameters meant for another container; no ttrpc address.
pub(crate) fn parse(
    input: &[u8],
    flags: &Flags,
    ttrpc_address: Option<String>,
) -> Result<(StartOpts, Dialect), BootstrapError> {
    let (options, dialect) = match BootstrapParams::parse_from_bytes(input) {
        Ok(params) if params.instance_id == flags.id && params.namespace == flags.namespace => {
            (StartOpts::from(params), Dialect::Protobuf)
        }
        Ok(params) if is_bootstrap(&params) => {
            return Err(BootstrapError::OtherContainer {
                got: format!("{}/{}", params.namespace, params.instance_id),
                expected: format!("{}/{}", flags.namespace, flags.id),
            });
        }
        Ok(_) | Err(_) => (from_flags(input, flags, ttrpc_address), Dialect::BareAddress),
    };
    if options.ttrpc_address.is_empty() {
        return Err(BootstrapError::NoAddress);
    }
    Ok((StartOpts { debug: options.debug || flags.debug, ..options }, dialect))
}

/// Whether a message holds more than the two fields that an `Any` fills by chance.
fn is_bootstrap(params: &BootstrapParams) -> bool {
    let chance = BootstrapParams {
        instance_id: params.instance_id.clone(),
        namespace: params.namespace.clone(),
        ..Default::default()
    };
    *params != chance
}

/// The runtime options that an input consists of.
pub(crate) fn options_in(input: &[u8]) -> Option<Any> {
    Any::parse_from_bytes(input).ok().filter(|any| !any.type_url.is_empty())
}

fn from_flags(input: &[u8], flags: &Flags, ttrpc_address: Option<String>) -> StartOpts {
    let options = options_in(input);
    StartOpts {
        id: flags.id.clone(),
        publish_binary: flags.publish_binary.clone(),
        address: flags.address.clone(),
        ttrpc_address: ttrpc_address.unwrap_or_default(),
        namespace: flags.namespace.clone(),
        debug: flags.debug,
        extensions: options.into_iter().collect(),
        ..Default::default()
    }
}

/// The answer to `start`. Errors: encoding.
pub(crate) fn answer(address: &str, dialect: Dialect) -> Result<Vec<u8>, BootstrapError> {
    match dialect {
        Dialect::BareAddress => Ok(address.as_bytes().to_vec()),
        Dialect::Protobuf => {
            let result = BootstrapResult {
                version: TASK_VERSION,
                address: address.to_owned(),
                protocol: "ttrpc".to_owned(),
                ..Default::default()
            };
            Ok(result.write_to_bytes()?)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags() -> Flags {
        Flags { id: "c1".to_owned(), namespace: "default".to_owned(), ..Default::default() }
    }

    fn params(id: &str) -> Vec<u8> {
        let params = BootstrapParams {
            instance_id: id.to_owned(),
            namespace: "default".to_owned(),
            containerd_ttrpc_address: "/run/t".to_owned(),
            ..Default::default()
        };
        params.write_to_bytes().unwrap()
    }

    #[test]
    fn parameters_for_this_container_are_answered_in_protobuf() {
        let (options, dialect) = parse(&params("c1"), &flags(), None).unwrap();
        assert_eq!((options.ttrpc_address.as_str(), dialect), ("/run/t", Dialect::Protobuf));
        // version = 3, address = "unix:///s", protocol = "ttrpc"
        let expected = b"\x08\x03\x12\x09unix:///s\x1a\x05ttrpc";
        assert_eq!(answer("unix:///s", dialect).unwrap(), expected);
    }

    #[test]
    fn parameters_for_another_container_are_refused() {
        let wrong = parse(&params("c2"), &flags(), None);
        assert!(matches!(wrong, Err(BootstrapError::OtherContainer { .. })));
    }

    /// Method: an `Any` of options, which decodes as `BootstrapParams` as well.
    #[test]
    fn options_on_stdin_mean_an_older_daemon() {
        let any = Any {
            type_url: "containerd.runc.v1.Options".to_owned(),
            value: b"2\x04crun".to_vec(),
            ..Default::default()
        };
        let input = any.write_to_bytes().unwrap();
        let (options, dialect) = parse(&input, &flags(), Some("/run/t".to_owned())).unwrap();
        assert_eq!(dialect, Dialect::BareAddress);
        assert_eq!(options.extensions, [any]);
        assert_eq!(answer("unix:///s", dialect).unwrap(), b"unix:///s");
    }

    #[test]
    fn nothing_on_stdin_is_an_older_daemon_and_needs_the_environment() {
        assert!(matches!(parse(b"", &flags(), None), Err(BootstrapError::NoAddress)));
        let (options, dialect) = parse(b"", &flags(), Some("/run/t".to_owned())).unwrap();
        assert_eq!((options.id.as_str(), dialect), ("c1", Dialect::BareAddress));
    }
}
