//! A bundle's `config.json`: read, changed in few places, written back.
//!
//! It is kept as JSON rather than as typed fields, so that whatever this shim does not know passes
//! through unharmed. What is changed: mounts of type `godwit` become bind mounts of the paths that
//! the node's daemon names, and an annotation tells runc and CRIU of the configuration file that
//! [`crate::criu`] writes. The file is replaced by rename, so a crash leaves the old or the new
//! one.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use godwit_protos::VolumeSource;
use godwit_protos::control::VolumeMount;
use serde_json::{Value, json};

/// Names the CRIU configuration file of one container to runc.
pub(crate) const CRIU_CONFIG: &str = "org.criu.config";
/// Containers with the same value share a shim: the CRI plugin's pods, and clients that ask for it
/// by hand.
const GROUPS: [&str; 2] = ["io.containerd.runc.v2.group", "io.kubernetes.cri.sandbox-id"];
/// Largest `config.json` that is read, in bytes.
const SPEC_BYTES_MAX: u64 = 16 << 20;

/// Why a specification cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SpecError {
    #[error("{path}")]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{path} is larger than {SPEC_BYTES_MAX} bytes")]
    TooLarge { path: PathBuf },
    #[error("{path} is not a runtime specification")]
    Json { path: PathBuf, source: serde_json::Error },
    #[error("no description of a process: {0}")]
    Process(String),
    #[error("volume mount on {destination}: {reason}")]
    Volume { destination: String, reason: String },
}

/// A `config.json` in memory.
#[derive(Debug)]
pub(crate) struct Spec {
    path: PathBuf,
    root: Value,
}

impl Spec {
    /// Reads `bundle/config.json`. Errors: I/O, size, syntax.
    pub(crate) fn load(bundle: &Path) -> Result<Self, SpecError> {
        use std::io::Read as _;
        let path = bundle.join("config.json");
        let wrong = |source| SpecError::Io { path: path.clone(), source };
        let mut bytes = Vec::new();
        let file = std::fs::File::open(&path).map_err(wrong)?;
        file.take(SPEC_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(wrong)?;
        if bytes.len() as u64 > SPEC_BYTES_MAX {
            return Err(SpecError::TooLarge { path });
        }
        match serde_json::from_slice(&bytes) {
            Ok(root) => Ok(Self { path, root }),
            Err(source) => Err(SpecError::Json { path, source }),
        }
    }

    /// Replaces the file. Errors: I/O.
    pub(crate) fn save(&self) -> Result<(), SpecError> {
        let wrong = |source| SpecError::Io { path: self.path.clone(), source };
        let bytes = serde_json::to_vec(&self.root)
            .map_err(|source| SpecError::Json { path: self.path.clone(), source })?;
        let fresh = self.path.with_extension("json.new");
        let mut file = std::fs::File::create(&fresh).map_err(wrong)?;
        file.write_all(&bytes).map_err(wrong)?;
        std::fs::rename(&fresh, &self.path).map_err(wrong)
    }

    /// Value of an annotation.
    pub(crate) fn annotation(&self, key: &str) -> Option<&str> {
        self.root.get("annotations")?.get(key)?.as_str()
    }

    /// All annotations that are text.
    pub(crate) fn annotations(&self) -> impl Iterator<Item = (&str, &str)> {
        let annotations = self.root.get("annotations").and_then(Value::as_object);
        annotations
            .into_iter()
            .flatten()
            .filter_map(|(key, value)| Some((key.as_str(), value.as_str()?)))
    }

    /// Sets an annotation.
    pub(crate) fn annotate(&mut self, key: &str, value: &str) {
        let Some(root) = self.root.as_object_mut() else { return };
        let annotations = root.entry("annotations").or_insert_with(|| json!({}));
        if !annotations.is_object() {
            *annotations = json!({});
        }
        annotations[key] = Value::from(value);
    }

    /// The group whose containers share one shim.
    pub(crate) fn group(&self) -> Option<&str> {
        GROUPS.iter().find_map(|key| self.annotation(key)).filter(|group| !group.is_empty())
    }

    /// Whether killing the init process ends every process of the container.
    pub(crate) fn has_own_pid_namespace(&self) -> bool {
        let namespaces = self.root.pointer("/linux/namespaces").and_then(Value::as_array);
        namespaces.into_iter().flatten().any(|namespace| {
            namespace.get("type").and_then(Value::as_str) == Some("pid")
                && namespace.get("path").and_then(Value::as_str).unwrap_or_default().is_empty()
        })
    }

    /// The network namespace that the container joins. `None`: it gets one of its own, or has the
    /// node's.
    pub(crate) fn network(&self) -> Option<&Path> {
        let namespaces = self.root.pointer("/linux/namespaces").and_then(Value::as_array);
        let is_network =
            |namespace: &&Value| namespace.get("type").and_then(Value::as_str) == Some("network");
        let network = namespaces.into_iter().flatten().find(is_network)?;
        let path = network.get("path").and_then(Value::as_str)?;
        (!path.is_empty()).then(|| Path::new(path))
    }

    /// The container's limit on memory, in bytes.
    pub(crate) fn memory_limit(&self) -> Option<u64> {
        self.root.pointer("/linux/resources/memory/limit").and_then(Value::as_u64)
    }

    /// The volumes that the container mounts, in the order of its mounts.
    ///
    /// Errors: [`SpecError::Volume`] for a source that is neither a volume id nor a digest, and for
    /// content by digest that is to be writable.
    pub(crate) fn volumes(&self) -> Result<Vec<VolumeMount>, SpecError> {
        self.mounts().iter().filter(|mount| is_volume(mount)).map(volume_of).collect()
    }

    /// Turns the volume mounts into bind mounts of `paths`, one for each of [`Spec::volumes`] in
    /// order.
    ///
    /// Errors: [`SpecError::Volume`] when the numbers differ or a path is not absolute; nothing is
    /// changed then.
    pub(crate) fn bind_volumes(&mut self, paths: &[String]) -> Result<(), SpecError> {
        let volumes = self.volumes()?;
        let wrong = |reason: String| SpecError::Volume { destination: "-".to_owned(), reason };
        if volumes.len() != paths.len() {
            return Err(wrong(format!("{} paths for {} volumes", paths.len(), volumes.len())));
        }
        if let Some(path) = paths.iter().find(|path| !path.starts_with('/')) {
            return Err(wrong(format!("{path:?} is not an absolute path")));
        }
        let mounts = self.root.get_mut("mounts").and_then(Value::as_array_mut);
        let targets = mounts.into_iter().flatten().filter(|mount| is_volume(mount));
        for ((mount, volume), path) in targets.zip(volumes).zip(paths) {
            mount["type"] = Value::from("bind");
            mount["source"] = Value::from(path.as_str());
            mount["options"] = json!(["rbind", if volume.read_only { "ro" } else { "rw" }]);
        }
        Ok(())
    }

    fn mounts(&self) -> &[Value] {
        self.root.get("mounts").and_then(Value::as_array).map_or(&[], Vec::as_slice)
    }
}

/// The description of a process to be added. Whether it has a terminal is what the call says,
/// whatever the description does: streams are set up by the call.
///
/// Errors: [`SpecError::Process`].
pub(crate) fn process(json: &[u8], terminal: bool) -> Result<Vec<u8>, SpecError> {
    let wrong = |error: serde_json::Error| SpecError::Process(error.to_string());
    let mut process: serde_json::Map<String, Value> =
        serde_json::from_slice(json).map_err(wrong)?;
    process.insert("terminal".to_owned(), Value::from(terminal));
    serde_json::to_vec(&process).map_err(wrong)
}

fn is_volume(mount: &Value) -> bool {
    mount.get("type").and_then(Value::as_str) == Some("godwit")
}

fn volume_of(mount: &Value) -> Result<VolumeMount, SpecError> {
    let text = |key: &str| mount.get(key).and_then(Value::as_str).unwrap_or_default();
    let wrong =
        |reason: String| SpecError::Volume { destination: text("destination").to_owned(), reason };
    let options = mount.get("options").and_then(Value::as_array);
    let has = |name: &str| options.into_iter().flatten().any(|option| option == name);
    let source: VolumeSource = text("source").parse().map_err(|error| wrong(format!("{error}")))?;
    let read_only = match source {
        VolumeSource::Writable(_) => has("ro"),
        VolumeSource::Content(_) if has("rw") => {
            return Err(wrong("content named by digest is read-only".to_owned()));
        }
        VolumeSource::Content(_) => true,
    };
    Ok(VolumeMount { volume: source.to_string(), read_only, ..Default::default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(root: Value) -> Spec {
        Spec { path: PathBuf::new(), root }
    }

    #[test]
    fn volumes_become_bind_mounts_and_the_rest_stays() {
        let digest = format!("sha256:{}", "0".repeat(64));
        let mut spec = spec(json!({
            "hostname": "h", "x-unknown": [1, 2],
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/data", "type": "godwit", "source": "redis-data", "options": ["rw"]},
                {"destination": "/model", "type": "godwit", "source": digest},
                {"destination": "/cfg", "type": "godwit", "source": "cfg", "options": ["ro"]},
            ],
        }));
        let volumes = spec.volumes().unwrap();
        let listed: Vec<_> = volumes.iter().map(|v| (v.volume.as_str(), v.read_only)).collect();
        assert_eq!(listed, [("redis-data", false), (digest.as_str(), true), ("cfg", true)]);

        spec.bind_volumes(&["/v/1".into(), "/v/2".into(), "/v/3".into()]).unwrap();
        let expected = json!({
            "hostname": "h", "x-unknown": [1, 2],
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/data", "type": "bind", "source": "/v/1", "options": ["rbind", "rw"]},
                {"destination": "/model", "type": "bind", "source": "/v/2", "options": ["rbind", "ro"]},
                {"destination": "/cfg", "type": "bind", "source": "/v/3", "options": ["rbind", "ro"]},
            ],
        });
        assert_eq!(spec.root, expected);
        assert!(spec.volumes().unwrap().is_empty());
    }

    #[test]
    fn sources_that_name_no_volume_are_refused() {
        let digest = format!("sha256:{}", "0".repeat(64));
        for (source, option) in [("../x", "rw"), ("/host", "rw"), ("", "ro"), (&digest, "rw")] {
            let mount = json!({"destination": "/d", "type": "godwit", "source": source,
                "options": [option]});
            let refused = spec(json!({ "mounts": [mount] })).volumes();
            assert!(matches!(refused, Err(SpecError::Volume { .. })), "{source}");
        }
    }

    #[test]
    fn an_answer_that_does_not_fit_changes_nothing() {
        let before = json!({"mounts": [{"destination": "/d", "type": "godwit", "source": "v"}]});
        let mut spec = spec(before.clone());
        assert!(spec.bind_volumes(&[]).is_err());
        assert!(spec.bind_volumes(&["relative".to_owned()]).is_err());
        assert_eq!(spec.root, before);
    }

    #[test]
    fn groups_and_pid_namespaces() {
        let pod = spec(json!({"annotations": {"io.kubernetes.cri.sandbox-id": "p1"},
            "linux": {"namespaces": [{"type": "pid", "path": "/proc/1/ns/pid"}]}}));
        assert_eq!((pod.group(), pod.has_own_pid_namespace()), (Some("p1"), false));
        let own = spec(json!({"linux": {"namespaces": [{"type": "net"}, {"type": "pid"}]}}));
        assert_eq!((own.group(), own.has_own_pid_namespace()), (None, true));
    }

    #[test]
    fn a_saved_specification_reads_back() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), r#"{"ociVersion":"1.1.0"}"#).unwrap();
        let mut spec = Spec::load(dir.path()).unwrap();
        spec.annotate("a/b", "c");
        spec.save().unwrap();
        assert_eq!(Spec::load(dir.path()).unwrap().annotation("a/b"), Some("c"));
    }
}
