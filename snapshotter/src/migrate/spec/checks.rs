//! What this node requires of the fields whose values matter: privileges, host paths, and hardware
//! that must be here.
//!
//! A value that the kernel lets a process set only with a capability is admitted where
//! `admit.capabilities` has that capability: a container that may hold it could set the value
//! itself.

use std::path::{Component, Path};

use godwit_protos::{VolumeSource, annotation};
use serde_json::{Map, Value};

use super::Wanted;
use super::machine::{self, Machine};
use crate::config::Admit;

/// What the checks compare a value with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Context<'a> {
    pub(super) admit: &'a Admit,
    pub(super) wanted: &'a Wanted<'a>,
    pub(super) machine: &'a Machine,
}

/// Why a value is not taken over.
#[derive(Debug)]
pub(super) enum Why {
    /// This key of `[admit]` does not list what the text names.
    NotAdmitted(String, &'static str),
    /// This node lacks something.
    Lacking(String),
    /// No configuration admits it.
    Refused(String),
    /// It is not of the type that the specification gives it.
    Malformed,
}

const CAPABILITIES: &str = "capabilities";

/// Kinds of namespaces that a container may have of its own. A user namespace is none of them.
const NAMESPACES: [&str; 7] = ["pid", "mount", "network", "ipc", "uts", "cgroup", "time"];

/// Files of a container's own cgroup that limits may be written to. Not `cgroup.*`: that moves and
/// kills processes.
const UNIFIED: [&str; 8] =
    ["cpu.", "cpuset.", "io.", "memory.", "pids.", "hugetlb.", "rdma.", "misc."];

/// Annotations that command a runtime: systemd properties of runc, hooks and handlers of crun.
const COMMANDS: [&str; 2] = ["org.systemd.property.", "run.oci."];

/// Devices that every container may use, by major and minor: null, zero, full, random, urandom,
/// tty, console, ptmx and, with any minor, pseudo terminals. containerd's and runc's own list.
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

fn text(value: &Value) -> Result<&str, Why> {
    value.as_str().ok_or(Why::Malformed)
}

fn integer(value: &Value) -> Result<i64, Why> {
    value.as_i64().ok_or(Why::Malformed)
}

/// A member that is text; "" if it is absent, which means the same.
fn member<'v>(object: &'v Map<String, Value>, key: &str) -> Result<&'v str, Why> {
    object.get(key).map_or(Ok(""), text)
}

/// Admits `what` where a container may hold `capability`.
fn takes(context: &Context<'_>, capability: &str, what: String) -> Result<(), Why> {
    if context.admit.capabilities.iter().any(|admitted| admitted == capability) {
        return Ok(());
    }
    Err(Why::NotAdmitted(format!("{what}, which takes {capability}"), CAPABILITIES))
}

pub(super) fn capabilities(value: &Value, context: &Context<'_>) -> Result<(), Why> {
    for one in value.as_array().ok_or(Why::Malformed)? {
        let one = text(one)?;
        if !context.admit.capabilities.iter().any(|admitted| admitted == one) {
            return Err(Why::NotAdmitted(format!("capability {one}"), CAPABILITIES));
        }
    }
    Ok(())
}

pub(super) fn oom_score_adj(value: &Value, context: &Context<'_>) -> Result<(), Why> {
    match integer(value)? {
        score if score < 0 => takes(context, "CAP_SYS_RESOURCE", format!("oomScoreAdj {score}")),
        _ => Ok(()),
    }
}

pub(super) fn io_priority_class(value: &Value, context: &Context<'_>) -> Result<(), Why> {
    match text(value)? {
        "IOPRIO_CLASS_BE" | "IOPRIO_CLASS_IDLE" => Ok(()),
        class => takes(context, "CAP_SYS_NICE", format!("I/O priority {class}")),
    }
}

pub(super) fn scheduler_policy(value: &Value, context: &Context<'_>) -> Result<(), Why> {
    match text(value)? {
        "SCHED_OTHER" | "SCHED_BATCH" | "SCHED_IDLE" => Ok(()),
        policy => takes(context, "CAP_SYS_NICE", format!("scheduler {policy}")),
    }
}

pub(super) fn nice(value: &Value, context: &Context<'_>) -> Result<(), Why> {
    match integer(value)? {
        nice if nice < 0 => takes(context, "CAP_SYS_NICE", format!("nice value {nice}")),
        _ => Ok(()),
    }
}

pub(super) fn realtime_runtime(value: &Value, context: &Context<'_>) -> Result<(), Why> {
    match integer(value)? {
        0 => Ok(()),
        _ => takes(context, "CAP_SYS_NICE", "processor time for real-time tasks".to_owned()),
    }
}

/// RLIMIT_RTPRIO and RLIMIT_NICE let processes raise their priority without a capability
/// (getrlimit(2)).
pub(super) fn rlimit(limit: &mut Map<String, Value>, context: &Context<'_>) -> Result<(), Why> {
    let kind = member(limit, "type")?;
    let unprivileged = match kind {
        "RLIMIT_RTPRIO" => 0,
        "RLIMIT_NICE" => 20,
        _ => return Ok(()),
    };
    for value in ["soft", "hard"].iter().filter_map(|key| limit.get(*key)) {
        let value = value.as_u64().ok_or(Why::Malformed)?;
        if value > unprivileged {
            takes(context, "CAP_SYS_NICE", format!("{kind} of {value}"))?;
        }
    }
    Ok(())
}

/// A shared root would carry mounts out of the container.
pub(super) fn rootfs_propagation(value: &Value, context: &Context<'_>) -> Result<(), Why> {
    match text(value)? {
        "" | "private" | "rprivate" | "slave" | "rslave" | "unbindable" | "runbindable" => Ok(()),
        other => takes(context, "CAP_SYS_ADMIN", format!("rootfsPropagation {other}")),
    }
}

pub(super) fn processors(value: &Value, context: &Context<'_>) -> Result<(), Why> {
    listed(value, &context.machine.processors, "processors")
}

pub(super) fn memory_nodes(value: &Value, context: &Context<'_>) -> Result<(), Why> {
    listed(value, &context.machine.memory_nodes, "memory nodes")
}

/// Whether a list such as "0-2,7" is part of what this node has.
fn listed(value: &Value, here: &machine::Numbers, what: &str) -> Result<(), Why> {
    let wanted = text(value)?;
    let numbers: machine::Numbers = wanted.parse().map_err(|_cause| Why::Malformed)?;
    if here.contains(&numbers) {
        return Ok(());
    }
    Err(Why::Lacking(format!("{what} {wanted}, this node has {here}")))
}

pub(super) fn huge_page_limit(
    limit: &mut Map<String, Value>,
    context: &Context<'_>,
) -> Result<(), Why> {
    let size = member(limit, "pageSize")?;
    if context.machine.huge_pages.iter().any(|here| here == size) {
        return Ok(());
    }
    Err(Why::Lacking(format!("huge pages of {size}")))
}

pub(super) fn apparmor_profile(value: &Value, context: &Context<'_>) -> Result<(), Why> {
    let profile = text(value)?;
    let is_none = ["", "unconfined"].contains(&profile);
    if is_none || context.machine.apparmor_profiles.iter().any(|loaded| loaded == profile) {
        return Ok(());
    }
    Err(Why::Lacking(format!("the AppArmor profile {profile}; load it here")))
}

pub(super) fn unified(value: &Value, _: &Context<'_>) -> Result<(), Why> {
    for (file, value) in value.as_object().ok_or(Why::Malformed)? {
        text(value)?;
        if file.contains('/') || !UNIFIED.iter().any(|controller| file.starts_with(controller)) {
            return Err(Why::Refused(format!("{file} of a cgroup is no limit")));
        }
    }
    Ok(())
}

pub(super) fn annotations(value: &Value, _: &Context<'_>) -> Result<(), Why> {
    for (key, value) in value.as_object().ok_or(Why::Malformed)? {
        text(value)?;
        if COMMANDS.iter().any(|command| key.starts_with(command)) {
            return Err(Why::Refused(format!("the annotation {key} commands the runtime")));
        }
    }
    Ok(())
}

/// Whether an annotation that passed [`annotations`] comes along. The settings of an earlier
/// migration do not, nor a configuration of CRIU by path.
pub(super) fn is_kept(key: &str) -> bool {
    let is_ours = key.starts_with("godwit.io/");
    let is_lasting = [annotation::SERVICE, annotation::USER, annotation::MPTCP].contains(&key)
        || key.starts_with(annotation::CRIU_PREFIX);
    (!is_ours || is_lasting) && !key.starts_with("org.criu.")
}

/// Refuses a rule of the device cgroup that allows what not every container may do.
pub(super) fn device_rule(rule: &mut Map<String, Value>, _: &Context<'_>) -> Result<(), Why> {
    let number = |key: &str| rule.get(key).map_or(Ok(-1), integer);
    let (major, minor) = (number("major")?, number("minor")?);
    let is_usual = USUAL_DEVICES
        .iter()
        .any(|(one, other)| *one == major && other.is_none_or(|other| other == minor));
    let allows = rule.get("allow").is_some_and(|allow| allow != &Value::Bool(false));
    if !allows || (is_usual && member(rule, "type")? == "c") {
        return Ok(());
    }
    let rule = Value::from(rule.clone());
    Err(Why::Refused(format!("the rule {rule} allows more than every container may do")))
}

/// A namespace of the container's own, or a network namespace of this node.
pub(super) fn namespace(
    namespace: &mut Map<String, Value>,
    context: &Context<'_>,
) -> Result<(), Why> {
    let kind = member(namespace, "type")?.to_owned();
    if !NAMESPACES.contains(&kind.as_str()) {
        return Err(Why::Refused(format!("containers with {kind} namespaces cannot be migrated")));
    }
    let is_network = kind == "network";
    if let (true, Some(netns)) = (is_network, context.wanted.netns) {
        namespace.insert("path".to_owned(), netns.to_string_lossy().into());
    }
    let path = member(namespace, "path")?;
    // A named network namespace is this node's own of that name; any other would join what is not
    // the container's.
    if path.is_empty() || (is_network && is_named_netns(Path::new(path))) {
        return Ok(());
    }
    Err(Why::Refused(format!("the {kind} namespace {path} is not the container's own")))
}

/// Whether `path` is where `ip netns` keeps the network namespaces of this node.
fn is_named_netns(path: &Path) -> bool {
    let parent = path.parent().unwrap_or(path);
    let known = [Path::new("/run/netns"), Path::new("/var/run/netns")];
    known.contains(&parent) && path.file_name().is_some()
}

/// A mount with the options that this node insists on.
pub(super) fn mount(mount: &mut Map<String, Value>, context: &Context<'_>) -> Result<(), Why> {
    let source = member(mount, "source")?;
    let options = mount.get("options").map_or(Ok(&[][..]), |options| {
        options.as_array().map(Vec::as_slice).ok_or(Why::Malformed)
    })?;
    let mut options = options.iter().map(text).collect::<Result<Vec<_>, _>>()?;
    let is_mapped = |option: &&&str| {
        ["idmap", "ridmap", "uidmap", "gidmap"].iter().any(|map| option.starts_with(map))
    };
    if let Some(option) = options.iter().find(is_mapped) {
        return Err(Why::Refused(format!("CRIU cannot restore ID-mapped mounts ({option})")));
    }
    // The runtime bind-mounts whatever has such an option, of any type.
    let binds = options.iter().any(|option| ["bind", "rbind"].contains(option));
    let kind = if binds { "bind" } else { member(mount, "type")? };
    let required: &[&str] = match kind {
        "proc" => &["nosuid", "noexec", "nodev"],
        "sysfs" | "cgroup" => &["nosuid", "noexec", "nodev", "ro"],
        "tmpfs" | "devpts" | "mqueue" => &["nosuid"],
        "godwit" => match source.parse::<VolumeSource>() {
            Ok(_) => &[],
            Err(error) => return Err(Why::Refused(error.to_string())),
        },
        "bind" => {
            let source = Path::new(source);
            let plain = !source.components().any(|part| part == Component::ParentDir);
            let admitted = &context.admit.bind_sources;
            if !plain || !admitted.iter().any(|allowed| source.starts_with(allowed)) {
                let what = format!("the bind mount of {}", source.display());
                return Err(Why::NotAdmitted(what, "bind_sources"));
            }
            &[]
        }
        other => {
            let at = member(mount, "destination")?;
            return Err(Why::Refused(format!("a mount of type {other:?} at {at}")));
        }
    };
    options.retain(|option| !required.iter().any(|required| is_opposite(option, required)));
    let missing = required.iter().filter(|required| !options.contains(required));
    let all: Vec<Value> =
        options.iter().chain(missing).map(|option| Value::from(*option)).collect();
    if !all.is_empty() {
        mount.insert("options".to_owned(), all.into());
    }
    Ok(())
}

/// Whether a mount option undoes a required one; the runtime goes by the last.
fn is_opposite(option: &str, required: &str) -> bool {
    let option = option.strip_prefix('r').filter(|rest| OPPOSITES.contains(rest)).unwrap_or(option);
    match required {
        "ro" => option == "rw",
        _ => required.strip_prefix("no") == Some(option),
    }
}

/// Mount options that may be written with an "r" in front for all mounts below.
const OPPOSITES: [&str; 4] = ["rw", "suid", "exec", "dev"];
