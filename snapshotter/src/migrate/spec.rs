//! Deriving the specification of a migrated container from this node's own rules.
//!
//! The source describes what its container looks like; it does not command. [`derive`] walks the
//! description field by field along the table in [`fields`]: a field is taken as it is, changed, or
//! refused by name, and so is one that the table does not have. Then it sets what is this node's
//! own. The walk is over JSON rather than over typed fields: types drop what they do not know and
//! give defaults to what is absent, and a container must come up after a restart here with exactly
//! what it had.
//!
//! Read next: [`checks`] for the privileges, paths and hardware that a value may ask for.

mod checks;
mod fields;
mod machine;

use std::collections::BTreeMap;
use std::path::Path;

use godwit_protos::{ContainerRef, annotation};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use self::checks::{Context, Why};
use self::fields::{FIELDS, Rule};
pub use self::machine::Machine;
use crate::config::Admit;

/// Why a container may not come here.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// The description is not a runtime specification.
    #[error("the source's description of the container is not an OCI specification")]
    Parse(#[from] serde_json::Error),
    /// A part that every container has is missing.
    #[error("the container's specification has no {0}")]
    Incomplete(&'static str),
    /// A field is of another type than the specification gives it.
    #[error("{0} of the container's specification is malformed")]
    Malformed(String),
    /// Something that this node's configuration does not admit.
    #[error("this node does not admit {what}; admit.{key} in its configuration can")]
    NotAdmitted {
        /// What the container asks for.
        what: String,
        /// The key of `[admit]` that could list it.
        key: &'static str,
    },
    /// A field that does not come along.
    #[error(
        "{field} of the container's specification is not taken over: {reason}; to move it, create the container here \
         yourself with the annotation {}",
        annotation::MIGRATE_FROM
    )]
    Refused {
        /// Its path.
        field: String,
        /// Why not.
        reason: String,
    },
    /// A field that this version does not know.
    #[error(
        "{0} of the container's specification is not known to this version of Godwit; update it, or start the \
         container without it"
    )]
    Unknown(String),
    /// A field asks for what this node does not have.
    #[error("{field} of the container's specification needs {what}")]
    Lacking {
        /// Its path.
        field: String,
        /// What is missing here.
        what: String,
    },
}

impl SpecError {
    fn new(field: &str, why: Why) -> Self {
        let field = field.to_owned();
        match why {
            Why::NotAdmitted(what, key) => Self::NotAdmitted { what, key },
            Why::Lacking(what) => Self::Lacking { field, what },
            Why::Refused(reason) => Self::Refused { field, reason },
            Why::Malformed => Self::Malformed(field),
        }
    }
}

/// What the request adds to the description.
#[derive(Clone, Debug)]
pub struct Wanted<'a> {
    /// The container, which keeps its name.
    pub container: &'a ContainerRef,
    /// Network namespace to join instead of the one that the source names.
    pub netns: Option<&'a Path>,
    /// Annotations that say where the state is and carry the request's settings.
    pub annotations: &'a [(&'static str, String)],
}

/// What Godwit itself reads of a specification, whatever else that has.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Outline {
    annotations: Option<BTreeMap<String, String>>,
    mounts: Option<Vec<OutlinedMount>>,
}

/// A mount of an [`Outline`].
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct OutlinedMount {
    /// Where the container has it.
    pub destination: String,
    #[serde(rename = "type")]
    kind: Option<String>,
    source: Option<String>,
    options: Option<Vec<String>>,
}

impl Outline {
    /// Reads a specification. Errors: it is none.
    pub fn parse(json: &[u8]) -> Result<Self, SpecError> {
        Ok(serde_json::from_slice(json)?)
    }

    /// The value of an annotation.
    pub fn annotation(&self, key: &str) -> Option<&str> {
        self.annotations.as_ref()?.get(key).map(String::as_str)
    }

    /// The mounts of volumes.
    pub fn volumes(&self) -> impl Iterator<Item = &OutlinedMount> {
        let is_volume = |mount: &&OutlinedMount| mount.kind.as_deref() == Some("godwit");
        self.mounts.iter().flatten().filter(is_volume)
    }
}

impl OutlinedMount {
    /// The volume, as the mount names it.
    pub fn source(&self) -> &str {
        self.source.as_deref().unwrap_or_default()
    }

    /// Whether it is mounted read-only.
    pub fn is_read_only(&self) -> bool {
        self.options.iter().flatten().any(|option| option == "ro")
    }
}

/// Namespaces that a container must have of its own.
const OWN_NAMESPACES: [&str; 5] = ["pid", "mount", "network", "ipc", "uts"];

/// The specification under which the container described by `description` may run here, as JSON.
///
/// Errors: [`SpecError`] that names what is not admitted. Source: OCI runtime specification 1.3,
/// "config".
pub fn derive(
    description: &str,
    admit: &Admit,
    machine: &Machine,
    wanted: &Wanted<'_>,
) -> Result<Value, SpecError> {
    let context = Context { admit, wanted, machine };
    let from: Map<String, Value> = serde_json::from_str(description)?;
    let mut spec = members("", from, &context)?;
    for part in ["process", "linux"] {
        if !spec.contains_key(part) {
            return Err(SpecError::Incomplete(part));
        }
    }
    require_own_namespaces(&spec)?;
    for (field, rule) in FIELDS {
        if let Rule::AtLeast(ours) = rule {
            let all = at(&mut spec, field);
            let theirs = all.as_array().map_or(&[][..], Vec::as_slice);
            let more = theirs.iter().filter(|path| !ours.iter().any(|one| *path == one));
            *all = ours.iter().map(|one| Value::from(*one)).chain(more.cloned()).collect();
        }
    }
    *at(&mut spec, "root.path") = "rootfs".into();
    let container = wanted.container;
    *at(&mut spec, "linux.cgroupsPath") =
        format!("/{}/{}", container.namespace(), container.id()).into();
    deny_devices(at(&mut spec, "linux.resources.devices"));
    annotate(at(&mut spec, "annotations"), wanted);
    Ok(spec.into())
}

/// Judges the members of the object at `path`.
fn members(
    path: &str,
    object: Map<String, Value>,
    context: &Context<'_>,
) -> Result<Map<String, Value>, SpecError> {
    let mut taken = Map::new();
    for (key, value) in object {
        let field = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
        if let Some(value) = judge(&field, value, context)? {
            taken.insert(key, value);
        }
    }
    Ok(taken)
}

/// What becomes of a field here; `None` if it is absent.
fn judge(field: &str, value: Value, context: &Context<'_>) -> Result<Option<Value>, SpecError> {
    // To a runtime, which decodes it in Go or C, null is an absent field.
    if value.is_null() {
        return Ok(None);
    }
    let malformed = || SpecError::Malformed(field.to_owned());
    let rule = fields::rule(field).ok_or_else(|| SpecError::Unknown(field.to_owned()))?;
    match (rule, value) {
        (Rule::Members, Value::Object(object)) => Ok(Some(members(field, object, context)?.into())),
        (Rule::Each(check), Value::Array(items)) => {
            let item = |item| {
                let Value::Object(object) = item else { return Err(malformed()) };
                let mut object = members(&format!("{field}[]"), object, context)?;
                check(&mut object, context).map_err(|why| SpecError::new(field, why))?;
                Ok(Value::from(object))
            };
            Ok(Some(items.into_iter().map(item).collect::<Result<Vec<_>, _>>()?.into()))
        }
        (Rule::Taken, value) if is_plain(&value) => Ok(Some(value)),
        (Rule::If(check), value) => {
            check(&value, context).map_err(|why| SpecError::new(field, why))?;
            Ok(Some(value))
        }
        (Rule::AtLeast(_), value @ Value::Array(_)) if is_plain(&value) => Ok(Some(value)),
        (Rule::Ours, _) => Ok(None),
        (Rule::Refused(_), value) if is_empty(&value) => Ok(None),
        (Rule::Refused(reason), _) => {
            Err(SpecError::Refused { field: field.to_owned(), reason: reason.to_owned() })
        }
        (Rule::Members | Rule::Each(_) | Rule::Taken | Rule::AtLeast(_), _) => Err(malformed()),
    }
}

/// Whether it is a single value or an array of such.
fn is_plain(value: &Value) -> bool {
    match value {
        Value::Array(items) => items.iter().all(|item| !item.is_array() && !item.is_object()),
        other => !other.is_object(),
    }
}

/// Whether a runtime takes it for an absent field.
fn is_empty(value: &Value) -> bool {
    match value {
        Value::Array(items) => items.is_empty(),
        Value::String(text) => text.is_empty(),
        _ => false,
    }
}

/// The member at a path; what lies on the way is made. Caller: what is there already are objects.
fn at<'v>(spec: &'v mut Map<String, Value>, path: &str) -> &'v mut Value {
    match path.split_once('.') {
        None => spec.entry(path).or_insert(Value::Null),
        Some((first, rest)) => {
            let inner = spec.entry(first).or_insert_with(|| json!({}));
            if !inner.is_object() {
                *inner = json!({});
            }
            match inner {
                Value::Object(inner) => at(inner, rest),
                other => other,
            }
        }
    }
}

fn require_own_namespaces(spec: &Map<String, Value>) -> Result<(), SpecError> {
    let namespaces = spec.get("linux").and_then(|linux| linux.get("namespaces"));
    let namespaces = namespaces.and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    let has = |kind: &&str| namespaces.iter().any(|namespace| namespace["type"] == **kind);
    match OWN_NAMESPACES.iter().find(|kind| !has(kind)) {
        None => Ok(()),
        Some(kind) => {
            let why = Why::Refused(format!("the container is in the host's {kind} namespace"));
            Err(SpecError::new("linux.namespaces", why))
        }
    }
}

/// Puts the rule first that denies all devices; the others allow what every container may use.
fn deny_devices(rules: &mut Value) {
    let deny = json!({"allow": false, "access": "rwm"});
    let theirs = rules.as_array().map_or(&[][..], Vec::as_slice);
    if theirs.first() != Some(&deny) {
        *rules = std::iter::once(&deny).chain(theirs).cloned().collect();
    }
}

/// Leaves the annotations that come along, and adds the request's.
fn annotate(annotations: &mut Value, wanted: &Wanted<'_>) {
    let theirs = annotations.as_object().into_iter().flatten();
    let mut all: Map<String, Value> = theirs
        .filter(|(key, _)| checks::is_kept(key))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    let ours = wanted.annotations.iter();
    all.extend(ours.map(|(key, value)| ((*key).to_owned(), value.clone().into())));
    *annotations = all.into();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn description() -> Value {
        let capabilities = json!(["CAP_CHOWN", "CAP_KILL"]);
        json!({
            "ociVersion": "1.1.0",
            "process": {
                "user": {"uid": 0, "gid": 0}, "args": ["redis-server"], "env": ["A=b"], "cwd": "/",
                "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
            },
            "root": {"path": "/anywhere"},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/data", "type": "godwit", "source": "redis-data", "options": ["rw"]},
            ],
            "annotations": {"godwit.io/user": "anna", "godwit.io/mode": "x", "godwit.io/criu.link-remap": "no",
                "org.criu.config": "/evil"},
            "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "network", "path": "/run/netns/r"}, {"type": "ipc"}, {"type": "uts"}]},
        })
    }

    fn derived(description: &Value, admit: &Admit) -> Result<Value, SpecError> {
        let annotations = [
            (annotation::MIGRATE_FROM, "edge-a/default/cache".into()),
            (annotation::MODE, "traditional".into()),
        ];
        let container = ContainerRef::new("default", "cache").unwrap();
        let wanted = Wanted { container: &container, netns: None, annotations: &annotations };
        derive(&description.to_string(), admit, &Machine::default(), &wanted)
    }

    #[test]
    fn the_process_comes_over_and_the_settings_are_this_requests() {
        let spec = derived(&description(), &Admit::default()).unwrap();
        let expected = json!({
            "ociVersion": "1.1.0",
            "process": description()["process"],
            "root": {"path": "rootfs"},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
                {"destination": "/data", "type": "godwit", "source": "redis-data", "options": ["rw"]},
            ],
            // Of CRIU's options, the shim checks the values again.
            "annotations": {"godwit.io/user": "anna", "godwit.io/mode": "traditional",
                "godwit.io/migrate-from": "edge-a/default/cache", "godwit.io/criu.link-remap": "no"},
            "linux": {
                "namespaces": description()["linux"]["namespaces"],
                "cgroupsPath": "/default/cache",
                "maskedPaths": spec["linux"]["maskedPaths"],
                "readonlyPaths": spec["linux"]["readonlyPaths"],
                "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            },
        });
        assert_eq!(spec, expected);
    }

    #[test]
    fn what_the_node_does_not_admit_is_refused_by_name() {
        let refused = |path: &str, value: Value, name: &str| {
            let mut description = description();
            *description.pointer_mut(path).unwrap() = value;
            let error = derived(&description, &Admit::default()).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
        };
        refused("/process/capabilities/bounding", json!(["CAP_SYS_ADMIN"]), "CAP_SYS_ADMIN");
        refused(
            "/mounts/0",
            json!({"destination": "/h", "type": "bind", "source": "/"}),
            "bind mount of /",
        );
        refused(
            "/mounts/0",
            json!({"destination": "/h", "type": "ext4", "source": "/dev/sda"}),
            "ext4",
        );
        let disguised =
            json!({"destination": "/h", "type": "tmpfs", "source": "/", "options": ["rbind"]});
        refused("/mounts/0", disguised, "bind mount of /");
        refused("/mounts/1/source", json!("../../etc"), "volume id");
        refused("/linux/namespaces/2/path", json!("/proc/1/ns/net"), "/proc/1/ns/net");
        refused("/linux/namespaces/2/path", json!("/run/netns/../x"), "netns/../x");
        refused("/linux/namespaces/0", json!({"type": "user"}), "user namespaces");
        refused("/linux/namespaces", json!([]), "pid");
        let mut with = description();
        with["linux"]["resources"] = json!({"devices": [
            {"allow": false, "access": "rwm"}, {"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rwm"}]});
        assert!(derived(&with, &Admit::default()).is_ok());
        with["linux"]["resources"] = json!({"devices": [{"allow": true, "access": "rwm"}]});
        assert!(
            derived(&with, &Admit::default()).unwrap_err().to_string().contains("every container")
        );
        with["linux"]["resources"] = json!({"devices": [{"allow": true, "type": "b", "major": 1, "minor": 3, "access": "r"}]});
        assert!(
            derived(&with, &Admit::default()).unwrap_err().to_string().contains("every container")
        );
        let mut with = description();
        with["hooks"] = json!({"prestart": [{"path": "/bin/sh"}]});
        assert!(derived(&with, &Admit::default()).unwrap_err().to_string().contains("hooks"));
        let mut with = description();
        with["linux"]["devices"] =
            json!([{"path": "/dev/sda", "type": "b", "major": 8, "minor": 0}]);
        assert!(derived(&with, &Admit::default()).unwrap_err().to_string().contains("devices"));
    }

    #[test]
    fn what_keeps_a_container_in_is_this_nodes_own() {
        let mut with = description();
        with["linux"]["cgroupsPath"] = json!("/system.slice/sshd.service");
        with["mounts"][0]["options"] = json!(["rw"]);
        with["linux"]["maskedPaths"] = json!(["/proc/mine", "/proc/keys"]);
        with["mounts"][0]["options"] = json!(["exec", "rsuid", "rw", "nodev", "dev"]);
        let spec = derived(&with, &Admit::default()).unwrap();
        let linux = &spec["linux"];
        assert_eq!(linux["cgroupsPath"], "/default/cache");
        let masked = linux["maskedPaths"].as_array().unwrap();
        assert_eq!((masked.len(), masked.last().unwrap()), (9, &json!("/proc/mine")));
        assert_eq!(linux["resources"]["devices"][0], json!({"allow": false, "access": "rwm"}));
        assert_eq!(spec["mounts"][0]["options"], json!(["rw", "nodev", "nosuid", "noexec"]));
        with["mounts"][0]["type"] = json!("sysfs");
        let spec = derived(&with, &Admit::default()).unwrap();
        assert_eq!(spec["mounts"][0]["options"], json!(["nodev", "nosuid", "noexec", "ro"]));
    }

    /// Containers that each lacked something which typed fields gave a default to.
    #[test]
    fn what_is_absent_stays_absent() {
        let bare = json!({
            "ociVersion": "1.1.0",
            "process": {"user": {"uid": 1, "gid": 1}, "cwd": "/", "env": null},
            "linux": {"namespaces": description()["linux"]["namespaces"]},
        });
        let spec = derived(&bare, &Admit::default()).unwrap();
        let process = json!({"user": {"uid": 1, "gid": 1}, "cwd": "/"});
        assert_eq!(spec["process"], process);
        assert_eq!(spec["root"], json!({"path": "rootfs"}));
        assert_eq!((spec.get("hostname"), spec.get("mounts")), (None, None));
        let linux = spec["linux"].as_object().unwrap();
        let set = ["cgroupsPath", "maskedPaths", "namespaces", "readonlyPaths", "resources"];
        assert!(linux.keys().eq(set), "{linux:?}");
    }

    #[test]
    fn an_unknown_field_is_refused_wherever_it_is() {
        for path in ["", "/process", "/process/user", "/linux", "/mounts/0", "/linux/namespaces/1"]
        {
            let mut with = description();
            // Go's decoder would take it for "hooks".
            with.pointer_mut(path).unwrap()["Hooks"] = json!({});
            let error = derived(&with, &Admit::default()).unwrap_err().to_string();
            assert!(error.contains("Hooks") && error.contains("not known"), "{error}");
        }
        for (path, value) in
            [("/process/args", json!([["a"]])), ("/process/cwd", json!({})), ("/mounts", json!({}))]
        {
            let mut with = description();
            *with.pointer_mut(path).unwrap() = value;
            let error = derived(&with, &Admit::default()).unwrap_err();
            assert!(matches!(error, SpecError::Malformed(_)), "{error}");
        }
    }

    #[test]
    fn a_bind_mount_is_admitted_below_a_configured_path_only() {
        let mut with = description();
        with["mounts"][0] = json!({"destination": "/h", "type": "bind", "source": "/srv/data/x"});
        let admit = Admit { bind_sources: vec!["/srv/data".into()], ..Admit::default() };
        assert!(derived(&with, &admit).is_ok());
        with["mounts"][0]["source"] = json!("/srv/data/../x");
        assert!(derived(&with, &admit).is_err());
    }
}
