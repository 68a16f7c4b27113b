//! Deriving the specification of a migrated container from this node's own rules.
//!
//! The source describes what its container looks like; it does not command. A fresh specification is built here
//! from that description: the process and its environment are taken over, privileges only as far as the configuration
//! admits them, and whatever is not understood is refused by name. Nothing is dropped silently: a container that came
//! up with less than it had would fail later and elsewhere.

use std::collections::HashSet;
use std::path::{Component, Path};

use godwit_protos::{ContainerRef, VolumeSource, annotation};
use oci_spec::runtime::{
    Capability, LinuxBuilder, LinuxCapabilities, LinuxDeviceCgroup, LinuxDeviceType,
    LinuxNamespaceType, Mount, ProcessBuilder, RootBuilder, Spec, SpecBuilder,
};

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
    /// Something that this node's configuration does not admit.
    #[error("this node does not admit {0}; see [admit] in its configuration")]
    NotAdmitted(String),
    /// Our own specification could not be put together.
    #[error("cannot put the specification together")]
    Build(#[from] oci_spec::OciSpecError),
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

/// Namespaces that a container must have of its own.
const OWN_NAMESPACES: [LinuxNamespaceType; 5] = [
    LinuxNamespaceType::Pid,
    LinuxNamespaceType::Mount,
    LinuxNamespaceType::Network,
    LinuxNamespaceType::Ipc,
    LinuxNamespaceType::Uts,
];

/// Paths that stay hidden whatever the source says; containerd's own list.
const MASKED_PATHS: [&str; 8] = [
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/sys/firmware",
];

/// Paths that stay read-only; containerd's own list.
const READ_ONLY_PATHS: [&str; 5] =
    ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Devices that every container may use, by major and minor: null, zero, full, random, urandom, tty, console, ptmx
/// and, with any minor, pseudo terminals. containerd's and runc's own list.
const USUAL_DEVICES: [(i64, Option<i64>); 9] = [
    (1, Some(3)),
    (1, Some(5)),
    (1, Some(7)),
    (1, Some(8)),
    (1, Some(9)),
    (5, Some(0)),
    (5, Some(1)),
    (5, Some(2)),
    (136, None),
];

/// Whether a rule of the device cgroup allows what not every container may do.
fn allows_more(rule: &LinuxDeviceCgroup) -> bool {
    let is_character = rule.typ() == Some(LinuxDeviceType::C);
    let (major, minor) = (rule.major().unwrap_or(-1), rule.minor().filter(|minor| *minor >= 0));
    let usual = USUAL_DEVICES
        .iter()
        .any(|(one, other)| *one == major && (other.is_none() || *other == minor));
    rule.allow() && !(is_character && usual)
}

/// The specification under which the container described by `description` may run here.
///
/// Errors: [`SpecError`] that names what is not admitted. Source: OCI runtime specification 1.2, "config".
pub fn derive(description: &str, admit: &Admit, wanted: &Wanted<'_>) -> Result<Spec, SpecError> {
    let from: Spec = serde_json::from_str(description)?;
    let none = |condition: bool, what: &str| {
        if condition { Err(SpecError::NotAdmitted(what.to_owned())) } else { Ok(()) }
    };
    let process = from.process().as_ref().ok_or(SpecError::Incomplete("process"))?;
    let linux = from.linux().as_ref().ok_or(SpecError::Incomplete("linux section"))?;
    none(from.hooks().is_some(), "hooks")?;
    none(linux.devices().as_ref().is_some_and(|devices| !devices.is_empty()), "devices")?;
    none(linux.uid_mappings().as_ref().is_some_and(|maps| !maps.is_empty()), "user namespaces")?;
    let rules = linux.resources().as_ref().and_then(|resources| resources.devices().as_ref());
    none(
        rules.is_some_and(|rules| rules.iter().any(allows_more)),
        "device rules beyond the usual",
    )?;
    none(linux.sysctl().as_ref().is_some_and(|sysctl| !sysctl.is_empty()), "sysctls")?;
    if let Some(held) = process.capabilities() {
        check_capabilities(held, admit)?;
    }
    let mounts = from.mounts().as_deref().unwrap_or_default();
    let mounts =
        mounts.iter().map(|mount| fresh_mount(mount, admit)).collect::<Result<Vec<_>, _>>()?;

    let mut fresh = ProcessBuilder::default()
        .terminal(process.terminal().unwrap_or(false))
        .user(process.user().clone())
        .args(process.args().clone().unwrap_or_default())
        .env(process.env().clone().unwrap_or_default())
        .cwd(process.cwd().clone())
        .no_new_privileges(process.no_new_privileges().unwrap_or(true));
    if let Some(held) = process.capabilities() {
        fresh = fresh.capabilities(held.clone());
    }
    if let Some(limits) = process.rlimits() {
        fresh = fresh.rlimits(limits.clone());
    }
    let read_only =
        from.root().as_ref().and_then(oci_spec::runtime::Root::readonly).unwrap_or(false);
    let mut spec = SpecBuilder::default()
        .version(from.version().clone())
        .process(fresh.build()?)
        .root(RootBuilder::default().path("rootfs").readonly(read_only).build()?)
        .mounts(mounts)
        .linux(fresh_linux(linux, wanted)?)
        .annotations(annotations(&from, wanted));
    if let Some(hostname) = from.hostname() {
        spec = spec.hostname(hostname.clone());
    }
    Ok(spec.build()?)
}

fn fresh_linux(
    from: &oci_spec::runtime::Linux,
    wanted: &Wanted<'_>,
) -> Result<oci_spec::runtime::Linux, SpecError> {
    let mut namespaces = Vec::new();
    for mut namespace in from.namespaces().clone().unwrap_or_default() {
        let is_network = namespace.typ() == LinuxNamespaceType::Network;
        if let (true, Some(netns)) = (is_network, wanted.netns) {
            namespace.set_path(Some(netns.to_owned()));
        }
        // A named network namespace is this node's own of that name; any other would join what is not the
        // container's.
        if let Some(path) = namespace.path()
            && !(is_network && is_named_netns(path))
        {
            let what = format!("{} namespace {}", namespace.typ(), path.display());
            return Err(SpecError::NotAdmitted(what));
        }
        namespaces.push(namespace);
    }
    for kind in OWN_NAMESPACES {
        if !namespaces.iter().any(|namespace| namespace.typ() == kind) {
            return Err(SpecError::NotAdmitted(format!(
                "a container in the host's {kind} namespace"
            )));
        }
    }
    let mut linux = LinuxBuilder::default().namespaces(namespaces);
    let container = wanted.container;
    linux = linux.cgroups_path(format!("/{}/{}", container.namespace(), container.id()));
    if let Some(resources) = from.resources() {
        linux = linux.resources(resources.clone());
    }
    if let Some(seccomp) = from.seccomp() {
        linux = linux.seccomp(seccomp.clone());
    }
    linux = linux.masked_paths(at_least(&MASKED_PATHS, from.masked_paths().as_deref()));
    linux = linux.readonly_paths(at_least(&READ_ONLY_PATHS, from.readonly_paths().as_deref()));
    Ok(linux.build()?)
}

/// `ours` and whatever of `theirs` is not among them.
fn at_least(ours: &[&str], theirs: Option<&[String]>) -> Vec<String> {
    let more = theirs.unwrap_or_default().iter().filter(|path| !ours.contains(&path.as_str()));
    ours.iter().map(|path| (*path).to_owned()).chain(more.cloned()).collect()
}

/// Whether `path` is where `ip netns` keeps the network namespaces of this node.
fn is_named_netns(path: &Path) -> bool {
    let parent = path.parent().unwrap_or(path);
    let known = [Path::new("/run/netns"), Path::new("/var/run/netns")];
    known.contains(&parent) && path.file_name().is_some()
}

fn annotations(from: &Spec, wanted: &Wanted<'_>) -> std::collections::HashMap<String, String> {
    let kept = from.annotations().clone().unwrap_or_default().into_iter();
    let is_kept = |key: &str| {
        [annotation::SERVICE, annotation::USER].contains(&key)
            || key.starts_with(annotation::CRIU_PREFIX)
    };
    let ours = |key: &str| key.starts_with("godwit.io/") && !is_kept(key);
    let mut fresh: std::collections::HashMap<String, String> =
        kept.filter(|(key, _)| !ours(key) && !key.starts_with("org.criu.")).collect();
    fresh.extend(wanted.annotations.iter().map(|(key, value)| ((*key).to_owned(), value.clone())));
    fresh
}

fn check_capabilities(held: &LinuxCapabilities, admit: &Admit) -> Result<(), SpecError> {
    let sets =
        [held.bounding(), held.effective(), held.permitted(), held.inheritable(), held.ambient()];
    let held: HashSet<Capability> =
        sets.into_iter().flatten().flat_map(|set| set.iter().copied()).collect();
    let mut held: Vec<String> =
        held.iter().map(|one| format!("CAP_{one}").replace("CAP_CAP_", "CAP_")).collect();
    held.sort_unstable();
    match held.iter().find(|one| !admit.capabilities.contains(one)) {
        Some(one) => Err(SpecError::NotAdmitted(format!("capability {one}"))),
        None => Ok(()),
    }
}

/// A mount with the options that this node insists on.
fn fresh_mount(mount: &Mount, admit: &Admit) -> Result<Mount, SpecError> {
    let kind = mount.typ().as_deref().unwrap_or("");
    let refuse = |what: String| Err(SpecError::NotAdmitted(what));
    let source = mount.source().as_deref().unwrap_or(Path::new(""));
    // The runtime bind-mounts whatever has such an option, of any type.
    let binds = |option: &String| option == "bind" || option == "rbind";
    let kind = if mount.options().iter().flatten().any(binds) { "bind" } else { kind };
    let required: &[&str] = match kind {
        "proc" => &["nosuid", "noexec", "nodev"],
        "sysfs" | "cgroup" => &["nosuid", "noexec", "nodev", "ro"],
        "tmpfs" | "devpts" | "mqueue" => &["nosuid"],
        "godwit" => match source.to_str().unwrap_or("").parse::<VolumeSource>() {
            Ok(_) => &[],
            Err(error) => return refuse(error.to_string()),
        },
        "bind" => {
            let plain = !source.components().any(|part| part == Component::ParentDir);
            if !plain || !admit.bind_sources.iter().any(|allowed| source.starts_with(allowed)) {
                return refuse(format!("the bind mount of {}", source.display()));
            }
            &[]
        }
        other => {
            let at = mount.destination().display();
            return refuse(format!("a mount of type {other:?} at {at}"));
        }
    };
    let mut options = mount.options().clone().unwrap_or_default();
    let opposite = |option: &String| required.contains(&"ro") && option == "rw";
    options.retain(|option| !opposite(option));
    let missing = required.iter().filter(|option| !options.iter().any(|has| has == *option));
    let missing: Vec<String> = missing.map(|option| (*option).to_owned()).collect();
    options.extend(missing);
    let mut fresh = mount.clone();
    fresh.set_options(Some(options));
    Ok(fresh)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

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

    fn derived(description: &Value, admit: &Admit) -> Result<Spec, SpecError> {
        let annotations = [
            (annotation::MIGRATE_FROM, "edge-a/default/cache".into()),
            (annotation::MODE, "traditional".into()),
        ];
        let container = ContainerRef::new("default", "cache").unwrap();
        let wanted = Wanted { container: &container, netns: None, annotations: &annotations };
        derive(&description.to_string(), admit, &wanted)
    }

    #[test]
    fn the_process_comes_over_and_the_settings_are_this_requests() {
        let spec = derived(&description(), &Admit::default()).unwrap();
        assert_eq!(spec.process().as_ref().unwrap().args().as_ref().unwrap(), &["redis-server"]);
        assert_eq!(spec.root().as_ref().unwrap().path(), Path::new("rootfs"));
        let annotations = spec.annotations().as_ref().unwrap();
        assert_eq!(annotations.get(annotation::MIGRATE_FROM).unwrap(), "edge-a/default/cache");
        assert_eq!(annotations.get(annotation::MODE).unwrap(), "traditional");
        assert_eq!(annotations.get(annotation::USER).unwrap(), "anna");
        // The shim checks its value again.
        assert_eq!(annotations.get("godwit.io/criu.link-remap").unwrap(), "no");
        assert!(!annotations.contains_key("org.criu.config"));
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
        refused("/linux/namespaces", json!([]), "pid");
        let mut with = description();
        with["linux"]["resources"] = json!({"devices": [
            {"allow": false, "access": "rwm"}, {"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rwm"}]});
        assert!(derived(&with, &Admit::default()).is_ok());
        with["linux"]["resources"] = json!({"devices": [{"allow": true, "access": "rwm"}]});
        assert!(
            derived(&with, &Admit::default()).unwrap_err().to_string().contains("device rules")
        );
        with["linux"]["resources"] = json!({"devices": [{"allow": true, "type": "b", "major": 1, "minor": 3, "access": "r"}]});
        assert!(
            derived(&with, &Admit::default()).unwrap_err().to_string().contains("device rules")
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
        let spec = derived(&with, &Admit::default()).unwrap();
        let linux = spec.linux().as_ref().unwrap();
        assert_eq!(linux.cgroups_path().as_deref(), Some(Path::new("/default/cache")));
        assert!(linux.masked_paths().as_ref().unwrap().iter().any(|path| path == "/proc/kcore"));
        let proc = &spec.mounts().as_ref().unwrap()[0];
        assert!(proc.options().as_ref().unwrap().iter().any(|option| option == "noexec"));
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
