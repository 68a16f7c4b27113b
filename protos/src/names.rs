//! Names that users type and peers send: containers, volumes, subjects, the migrate-from
//! annotation.
//!
//! Each is parsed once, here. A parsed name holds no slash, no control character and no `..`, so
//! that it can be part of a path below a directory of ours without leaving it.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::Digest;

/// Longest name of a node, namespace, container, volume or user, in bytes. containerd's own limit
/// for identifiers is 76; Kubernetes names reach 253.
const NAME_BYTES_MAX: usize = 253;

/// Longest name of a service, in bytes: an image reference with its tag.
const SERVICE_BYTES_MAX: usize = 512;

/// Why a text is not a name of its kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a {kind}: expected {expected}")]
pub struct ParseNameError {
    /// What was to be parsed.
    pub kind: &'static str,
    /// The text, cut to a readable length.
    pub text: String,
    /// The grammar in words.
    pub expected: &'static str,
}

fn bad(kind: &'static str, text: &str, expected: &'static str) -> ParseNameError {
    ParseNameError { kind, text: text.chars().take(120).collect(), expected }
}

/// Whether this can name a node, namespace, container or volume: a letter or digit, then letters,
/// digits, `_`, `.` and `-`.
pub fn is_name(text: &str) -> bool {
    text.len() <= NAME_BYTES_MAX
        && text.starts_with(|first: char| first.is_ascii_alphanumeric())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte))
}

/// Escapes what a subject's textual form must not hold, so that any image name fits in one segment.
fn is_service(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= SERVICE_BYTES_MAX
        && text.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'|')
}

/// A container of one containerd namespace.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ContainerRef {
    namespace: String,
    id: String,
}

impl ContainerRef {
    /// Errors: [`ParseNameError`] when either part is not an identifier in containerd's sense.
    pub fn new(namespace: &str, id: &str) -> Result<Self, ParseNameError> {
        for (kind, text) in [("containerd namespace", namespace), ("container id", id)] {
            if !is_name(text) {
                return Err(bad(kind, text, "letters, digits, '_', '.' and '-'"));
            }
        }
        Ok(Self { namespace: namespace.to_owned(), id: id.to_owned() })
    }

    /// containerd's namespace, for example `default`.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The container's id within its namespace.
    pub fn id(&self) -> &str {
        &self.id
    }
}

impl fmt::Display for ContainerRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.id)
    }
}

/// Value of the migrate-from annotation: `NODE/CONTAINERD-NAMESPACE/CONTAINER`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MigrateFrom {
    /// Name of the source node.
    pub node: String,
    /// The container there.
    pub container: ContainerRef,
}

impl FromStr for MigrateFrom {
    type Err = ParseNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || bad("migrate-from annotation", text, "NODE/CONTAINERD-NAMESPACE/CONTAINER");
        let parts: Vec<&str> = text.split('/').collect();
        let &[node, namespace, id] = parts.as_slice() else { return Err(wrong()) };
        if !is_name(node) {
            return Err(wrong());
        }
        Ok(Self { node: node.to_owned(), container: ContainerRef::new(namespace, id)? })
    }
}

impl fmt::Display for MigrateFrom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.node, self.container)
    }
}

/// Identity of a writable volume; it does not depend on the content.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VolumeId(String);

impl VolumeId {
    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for VolumeId {
    type Err = ParseNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if is_name(text) {
            Ok(Self(text.to_owned()))
        } else {
            Err(bad("volume id", text, "letters, digits, '_', '.' and '-'"))
        }
    }
}

impl fmt::Display for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// File system that a block volume's image holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FileSystem {
    /// ext4.
    Ext4,
    /// XFS.
    Xfs,
}

impl FileSystem {
    /// As `mount(2)` and users call it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
        }
    }
}

impl FromStr for FileSystem {
    type Err = ParseNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let known = [Self::Ext4, Self::Xfs].into_iter().find(|one| one.as_str() == text);
        known.ok_or_else(|| bad("file system of a block volume", text, "ext4 or xfs"))
    }
}

impl fmt::Display for FileSystem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What the `src` of a `type=godwit` mount names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VolumeSource {
    /// A writable volume by identity.
    Writable(VolumeId),
    /// Read-only content by the digest of its manifest.
    Content(Digest),
}

impl FromStr for VolumeSource {
    type Err = ParseNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.starts_with("sha256:") {
            let wrong = |_| bad("volume source", text, "sha256: and 64 hexadecimal digits");
            return text.parse().map(Self::Content).map_err(wrong);
        }
        text.parse().map(Self::Writable)
    }
}

impl fmt::Display for VolumeSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Writable(id) => id.fmt(f),
            Self::Content(digest) => digest.fmt(f),
        }
    }
}

/// What a snapshot is *of*. The identity does not depend on the content.
///
/// Text form, parts parted by `|` because image names hold slashes and colons: `volume|ID`,
/// `layer|NAMESPACE|CONTAINER`, `memory|NAMESPACE|SERVICE|USER`, `container|NAMESPACE|CONTAINER`,
/// `image-layer|DIFF-ID`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Subject {
    /// A writable volume.
    Volume(VolumeId),
    /// A container's writable layer.
    Layer(ContainerRef),
    /// The memory of a container: a service used by a user, within one containerd namespace.
    Memory {
        /// containerd's namespace: memory is never looked up across it.
        namespace: String,
        /// Image name and tag, or what the service annotation says.
        service: String,
        /// The container's id, or what the user annotation says.
        user: String,
    },
    /// A whole container at one instant: its memory, layer and volumes.
    Container(ContainerRef),
    /// A layer of an image, by the digest of its uncompressed bytes, its diff ID.
    ImageLayer(Digest),
}

impl FromStr for Subject {
    type Err = ParseNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const FORMS: &str = "volume|ID, layer|NAMESPACE|CONTAINER, memory|NAMESPACE|SERVICE|USER, \
            container|NAMESPACE|CONTAINER or image-layer|DIFF-ID";
        let parts: Vec<&str> = text.split('|').collect();
        match parts.as_slice() {
            ["volume", id] => id.parse().map(Self::Volume),
            ["layer", namespace, id] => ContainerRef::new(namespace, id).map(Self::Layer),
            ["container", namespace, id] => ContainerRef::new(namespace, id).map(Self::Container),
            &["memory", namespace, service, user]
                if is_name(namespace) && is_service(service) && is_service(user) =>
            {
                let (service, user) = (service.to_owned(), user.to_owned());
                Ok(Self::Memory { namespace: namespace.to_owned(), service, user })
            }
            ["image-layer", diff_id] => {
                let wrong = |_error| bad("subject", text, FORMS);
                diff_id.parse().map(Self::ImageLayer).map_err(wrong)
            }
            _ => Err(bad("subject", text, FORMS)),
        }
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Volume(id) => write!(f, "volume|{id}"),
            Self::Layer(container) => write!(f, "layer|{}|{}", container.namespace, container.id),
            Self::Memory { namespace, service, user } => {
                write!(f, "memory|{namespace}|{service}|{user}")
            }
            Self::Container(container) => {
                write!(f, "container|{}|{}", container.namespace, container.id)
            }
            Self::ImageLayer(diff_id) => write!(f, "image-layer|{diff_id}"),
        }
    }
}

/// A service in one containerd namespace: what the memory of all its users is of. Text form:
/// `NAMESPACE|SERVICE`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceRef {
    namespace: String,
    service: String,
}

impl ServiceRef {
    /// The service whose memory this is, if it is memory.
    pub fn of(subject: &Subject) -> Option<Self> {
        match subject {
            Subject::Memory { namespace, service, .. } => {
                Some(Self { namespace: namespace.clone(), service: service.clone() })
            }
            Subject::Volume(_)
            | Subject::Layer(_)
            | Subject::Container(_)
            | Subject::ImageLayer(_) => None,
        }
    }
}

impl FromStr for ServiceRef {
    type Err = ParseNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once('|') {
            Some((namespace, service)) if is_name(namespace) && is_service(service) => {
                Ok(Self { namespace: namespace.to_owned(), service: service.to_owned() })
            }
            _ => Err(bad("service", text, "NAMESPACE|SERVICE")),
        }
    }
}

impl fmt::Display for ServiceRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}|{}", self.namespace, self.service)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_annotation_names_node_namespace_and_container() {
        let from: MigrateFrom = "edge-a/default/cache".parse().unwrap();
        assert_eq!((from.node.as_str(), from.container.id()), ("edge-a", "cache"));
        assert_eq!(from.to_string(), "edge-a/default/cache");
    }

    #[test]
    fn names_that_would_leave_a_directory_are_refused() {
        for text in ["a/b", "a/../c", "../default/x", "a/default/..", "a/default/x/y", "", "a//b"] {
            assert!(text.parse::<MigrateFrom>().is_err(), "{text}");
        }
        for text in ["", ".", "..", "../x", "a/b", "-a", "a\n", "ä", &"x".repeat(254)] {
            assert!(text.parse::<VolumeId>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_mount_source_is_an_identity_or_a_digest() {
        let digest = Digest::of(b"content");
        assert_eq!(digest.to_string().parse(), Ok(VolumeSource::Content(digest)));
        assert!(matches!("redis-data".parse(), Ok(VolumeSource::Writable(_))));
        assert!("sha256:12".parse::<VolumeSource>().is_err());
    }

    #[test]
    fn a_subject_keeps_an_image_name_with_slashes_and_colons() {
        let text = "memory|default|docker.io/library/redis:7|cache";
        assert_eq!(text.parse::<Subject>().unwrap().to_string(), text);
    }

    #[test]
    fn a_service_is_of_one_namespace() {
        let memory: Subject = "memory|default|docker.io/library/redis:7|cache".parse().unwrap();
        let service = ServiceRef::of(&memory).unwrap();
        assert_eq!(service.to_string(), "default|docker.io/library/redis:7");
        assert_eq!(service.to_string().parse(), Ok(service));
        assert_eq!(ServiceRef::of(&"volume|data".parse().unwrap()), None);
        for text in ["redis:7", "|redis:7", "default|", "a/b|redis:7", "default|redis|7"] {
            assert!(text.parse::<ServiceRef>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn parsing_never_panics_and_what_parses_prints_the_same(text in "[a-z|/:.]{0,40}") {
            if let Ok(subject) = text.parse::<Subject>() {
                prop_assert_eq!(subject.to_string(), text);
            }
        }
    }
}
