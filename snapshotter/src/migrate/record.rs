//! What of containerd's record of a container comes along when `godwit migrate` makes it at the
//! destination.
//!
//! | field | at the destination |
//! |---|---|
//! | id | the same |
//! | labels | the same; refused if containerd would act on one outside it ([`check_labels`]) |
//! | image | the same name, whatever it stands for there; [`super::image`] keeps the content |
//! | runtime.name | `io.containerd.runc.v2` stays, with the path of this node's shim; else ours |
//! | runtime.options | the destination's defaults; a warning names those that differ ([`survey`]) |
//! | spec | derived ([`super::spec`]) |
//! | snapshotter | the same; refused if the destination does not have it |
//! | snapshot_key | the id; labels of the snapshot concern user namespaces, which do not move |
//! | created_at, updated_at | containerd sets them |
//! | extensions, sandbox | refused: they belong to the container's client ([`survey`]) |

use std::collections::HashMap;

use prost::Message;

use super::MigrationError;
use super::obstacles::Findings;
use crate::containerd::{Container, Runtime};

/// Labels on which containerd acts: where its restart monitor writes a container's output, which
/// may be a program's input, and what garbage collection must keep.
const ACTING_LABELS: [&str; 3] =
    ["containerd.io/restart.loguri", "containerd.io/restart.logpath", "containerd.io/gc."];

/// `containerd.runc.v1.Options`; containerd's api/types/runc/options/oci.proto.
#[derive(Clone, PartialEq, Message)]
struct Options {
    #[prost(bool, tag = "1")]
    no_pivot_root: bool,
    #[prost(bool, tag = "2")]
    no_new_keyring: bool,
    #[prost(string, tag = "3")]
    shim_cgroup: String,
    #[prost(uint32, tag = "4")]
    io_uid: u32,
    #[prost(uint32, tag = "5")]
    io_gid: u32,
    #[prost(string, tag = "6")]
    binary_name: String,
    #[prost(string, tag = "7")]
    root: String,
    #[prost(bool, tag = "9")]
    systemd_cgroup: bool,
}

/// Looks at the record at its source for what does not come along.
pub(super) fn survey(record: &Container, findings: &mut Findings) {
    let clients: Vec<&str> =
        record.extensions.iter().chain(&record.sandbox).map(String::as_str).collect();
    if !clients.is_empty() {
        findings.obstacle(
            format!("the container belongs to another client of containerd ({})", clients.join(", ")),
            "`godwit migrate` cannot make it as that client does",
            "have that client create it at the destination with the annotation godwit.io/migrate-from",
        );
    }
    let options = options(&record.runtime);
    if !options.is_empty() {
        findings.warning(
            format!("runtime options do not move: {}", options.join(", ")),
            "the container gets the destination's own",
            "set them there in containerd's configuration if they matter",
        );
    }
}

/// The runtime options that are not the defaults.
fn options(runtime: &Runtime) -> Vec<String> {
    let Some(any) = runtime.options.as_ref().filter(|any| !any.value.is_empty()) else {
        return Vec::new();
    };
    let kind = any.type_url.rsplit('/').next().unwrap_or_default();
    let ("containerd.runc.v1.Options", Ok(options)) = (kind, Options::decode(&any.value[..]))
    else {
        return vec![format!("those of type {kind}")];
    };
    let flags = [
        ("no_pivot_root", options.no_pivot_root),
        ("no_new_keyring", options.no_new_keyring),
        ("systemd_cgroup", options.systemd_cgroup),
    ];
    let values = [
        ("shim_cgroup", options.shim_cgroup),
        ("binary_name", options.binary_name),
        ("root", options.root),
        ("io_uid", number(options.io_uid)),
        ("io_gid", number(options.io_gid)),
    ];
    let flags = flags.iter().filter(|(_, is_set)| *is_set).map(|(name, _)| (*name).to_owned());
    let values = values.iter().filter(|(_, value)| !value.is_empty());
    flags.chain(values.map(|(name, value)| format!("{name} {value}"))).collect()
}

fn number(value: u32) -> String {
    if value == 0 { String::new() } else { value.to_string() }
}

/// Errors: [`MigrationError::Label`] for a label with which a hostile source would act on this
/// node.
pub(super) fn check_labels(labels: &HashMap<String, String>) -> Result<(), MigrationError> {
    let acts = |label: &&String| ACTING_LABELS.iter().any(|acting| label.starts_with(acting));
    match labels.keys().find(acts) {
        Some(label) => Err(MigrationError::Label(label.clone())),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost_types::Any;

    #[test]
    fn what_stays_behind_is_named() {
        let set = Options {
            binary_name: "crun".to_owned(),
            systemd_cgroup: true,
            io_uid: 7,
            ..Options::default()
        };
        let named = |type_url: &str, value: Vec<u8>| {
            options_of(Some(Any { type_url: type_url.to_owned(), value }))
        };
        let runc = "types.containerd.io/containerd.runc.v1.Options";
        assert_eq!(named(runc, Vec::new()), Vec::<String>::new());
        assert_eq!(
            named(runc, set.encode_to_vec()),
            ["systemd_cgroup", "binary_name crun", "io_uid 7"]
        );
        assert_eq!(named("other.Options", vec![8, 1]), ["those of type other.Options"]);
        assert_eq!(options_of(None), Vec::<String>::new());

        let mut findings = Findings::default();
        survey(&Container::default(), &mut findings);
        assert_eq!(findings, Findings::default());
        let record = Container {
            extensions: vec!["io.cri-containerd.container.metadata".to_owned()],
            sandbox: Some("pod".to_owned()),
            ..Container::default()
        };
        survey(&record, &mut findings);
        assert!(findings.obstacles[0].contains("(io.cri-containerd.container.metadata, pod)"));
    }

    fn options_of(given: Option<Any>) -> Vec<String> {
        options(&Runtime { name: String::new(), options: given })
    }

    #[test]
    fn labels_on_which_containerd_acts_are_refused() {
        let check = |label: &str| check_labels(&[(label.to_owned(), String::new())].into());
        assert!(check("containerd.io/restart.status").is_ok());
        assert!(check("app").is_ok());
        for label in ["containerd.io/restart.loguri", "containerd.io/gc.ref.content.x"] {
            assert!(check(label).unwrap_err().to_string().contains(label));
        }
    }
}
