//! The table of the fields that a specification may have, and what becomes of each at the
//! destination.
//!
//! Paths are written with dots, and `[]` for the items of an array. A field is judged by the row of
//! its own path; a field without a row is refused by name. The last test compares the table with
//! the JSON schema of the OCI runtime specification (`protos/vendor/runtime-spec`), so a field that
//! a newer version adds must be decided on here.

use serde_json::{Map, Value};

use super::checks::{self, Context, Why};

/// What becomes of a field that the source's container has. A field that it does not have stays
/// absent, except where a row says that this node sets it.
#[derive(Clone, Copy)]
pub(super) enum Rule {
    /// An object whose members have rows of their own.
    Members,
    /// An array of objects whose members have rows of their own; each object is then checked or
    /// changed as a whole.
    Each(fn(&mut Map<String, Value>, &Context<'_>) -> Result<(), Why>),
    /// A value or an array of values, taken as it is.
    Taken,
    /// Taken if the function finds no reason against it.
    If(fn(&Value, &Context<'_>) -> Result<(), Why>),
    /// An array of text that has at least these entries here, whatever the source says.
    AtLeast(&'static [&'static str]),
    /// This node sets it, whatever the source says.
    Ours,
    /// Not taken over, for this reason.
    Refused(&'static str),
}

use Rule::{AtLeast, Each, If, Members, Ours, Refused, Taken};

const ITEMS: Rule = Each(|_, _| Ok(()));
const DEVICE_NUMBERS: Rule = Refused("device numbers stand for other devices on another node");
const OTHER_SYSTEM: Rule = Refused("it belongs to another operating system");
const ID_MAPPED: Rule = Refused("CRIU cannot restore ID-mapped mounts");
const USER_NAMESPACE: Rule = Refused("containers with user namespaces cannot be migrated");
const SELINUX: Rule = Refused("SELinux labels refer to the source's policy");

/// Paths that stay hidden whatever the source says; containerd's own list.
const MASKED_PATHS: &[&str] = &[
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
const READ_ONLY_PATHS: &[&str] =
    &["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Every field of OCI runtime specification 1.3, and those that other systems have.
pub(super) const FIELDS: &[(&str, Rule)] = &[
    ("ociVersion", Taken),
    ("hostname", Taken),
    ("domainname", Taken),
    ("hooks", Refused("hooks run programs of the node outside the container")),
    // Without those that are Godwit's and CRIU's, with those of this request.
    ("annotations", If(checks::annotations)),
    ("root", Members),
    ("root.path", Ours),
    ("root.readonly", Taken),
    // The mount options that this node insists on are added.
    ("mounts", Each(checks::mount)),
    ("mounts[].destination", Taken),
    ("mounts[].source", Taken),
    ("mounts[].type", Taken),
    ("mounts[].options", Taken),
    ("mounts[].uidMappings", ID_MAPPED),
    ("mounts[].gidMappings", ID_MAPPED),
    ("process", Members),
    ("process.terminal", Taken),
    ("process.consoleSize", Members),
    ("process.consoleSize.height", Taken),
    ("process.consoleSize.width", Taken),
    ("process.user", Members),
    ("process.user.uid", Taken),
    ("process.user.gid", Taken),
    ("process.user.umask", Taken),
    ("process.user.additionalGids", Taken),
    ("process.user.username", OTHER_SYSTEM),
    ("process.args", Taken),
    ("process.commandLine", OTHER_SYSTEM),
    ("process.env", Taken),
    ("process.cwd", Taken),
    ("process.capabilities", Members),
    ("process.capabilities.bounding", If(checks::capabilities)),
    ("process.capabilities.permitted", If(checks::capabilities)),
    ("process.capabilities.effective", If(checks::capabilities)),
    ("process.capabilities.inheritable", If(checks::capabilities)),
    ("process.capabilities.ambient", If(checks::capabilities)),
    ("process.noNewPrivileges", Taken),
    ("process.rlimits", Each(checks::rlimit)),
    ("process.rlimits[].type", Taken),
    ("process.rlimits[].soft", Taken),
    ("process.rlimits[].hard", Taken),
    ("process.apparmorProfile", If(checks::apparmor_profile)),
    ("process.selinuxLabel", SELINUX),
    ("process.oomScoreAdj", If(checks::oom_score_adj)),
    ("process.ioPriority", Members),
    ("process.ioPriority.class", If(checks::io_priority_class)),
    ("process.ioPriority.priority", Taken),
    ("process.scheduler", Members),
    ("process.scheduler.policy", If(checks::scheduler_policy)),
    ("process.scheduler.nice", If(checks::nice)),
    ("process.scheduler.priority", Taken),
    ("process.scheduler.flags", Taken),
    ("process.scheduler.runtime", Taken),
    ("process.scheduler.deadline", Taken),
    ("process.scheduler.period", Taken),
    ("process.execCPUAffinity", Members),
    ("process.execCPUAffinity.initial", If(checks::processors)),
    ("process.execCPUAffinity.final", If(checks::processors)),
    ("linux", Members),
    ("linux.namespaces", Each(checks::namespace)),
    ("linux.namespaces[].type", Taken),
    // Another network namespace if the request names one.
    ("linux.namespaces[].path", Taken),
    ("linux.uidMappings", USER_NAMESPACE),
    ("linux.gidMappings", USER_NAMESPACE),
    ("linux.timeOffsets", Members),
    ("linux.timeOffsets.boottime", Members),
    ("linux.timeOffsets.boottime.secs", Taken),
    ("linux.timeOffsets.boottime.nanosecs", Taken),
    ("linux.timeOffsets.monotonic", Members),
    ("linux.timeOffsets.monotonic.secs", Taken),
    ("linux.timeOffsets.monotonic.nanosecs", Taken),
    ("linux.devices", Refused("devices of one node are not those of another")),
    ("linux.netDevices", Refused("network devices of one node are not those of another")),
    ("linux.cgroupsPath", Ours),
    ("linux.sysctl", Refused("no kernel parameters are set for a container from another node")),
    ("linux.maskedPaths", AtLeast(MASKED_PATHS)),
    ("linux.readonlyPaths", AtLeast(READ_ONLY_PATHS)),
    ("linux.mountLabel", SELINUX),
    ("linux.rootfsPropagation", If(checks::rootfs_propagation)),
    ("linux.intelRdt", Refused("its classes are the source's own")),
    ("linux.personality", Members),
    ("linux.personality.domain", Taken),
    ("linux.personality.flags", Taken),
    ("linux.memoryPolicy", Members),
    ("linux.memoryPolicy.mode", Taken),
    ("linux.memoryPolicy.nodes", If(checks::memory_nodes)),
    ("linux.memoryPolicy.flags", Taken),
    ("linux.seccomp", Members),
    ("linux.seccomp.defaultAction", Taken),
    ("linux.seccomp.defaultErrnoRet", Taken),
    ("linux.seccomp.flags", Taken),
    ("linux.seccomp.architectures", Taken),
    ("linux.seccomp.listenerPath", Refused("seccomp agents are the source's own")),
    ("linux.seccomp.listenerMetadata", Refused("seccomp agents are the source's own")),
    ("linux.seccomp.syscalls", ITEMS),
    ("linux.seccomp.syscalls[].names", Taken),
    ("linux.seccomp.syscalls[].action", Taken),
    ("linux.seccomp.syscalls[].errnoRet", Taken),
    ("linux.seccomp.syscalls[].args", ITEMS),
    ("linux.seccomp.syscalls[].args[].index", Taken),
    ("linux.seccomp.syscalls[].args[].value", Taken),
    ("linux.seccomp.syscalls[].args[].valueTwo", Taken),
    ("linux.seccomp.syscalls[].args[].op", Taken),
    ("linux.resources", Members),
    // The first rule denies all devices, whatever the source says.
    ("linux.resources.devices", Each(checks::device_rule)),
    ("linux.resources.devices[].allow", Taken),
    ("linux.resources.devices[].type", Taken),
    ("linux.resources.devices[].major", Taken),
    ("linux.resources.devices[].minor", Taken),
    ("linux.resources.devices[].access", Taken),
    ("linux.resources.unified", If(checks::unified)),
    ("linux.resources.pids", Members),
    ("linux.resources.pids.limit", Taken),
    ("linux.resources.memory", Members),
    ("linux.resources.memory.kernel", Taken),
    ("linux.resources.memory.kernelTCP", Taken),
    ("linux.resources.memory.limit", Taken),
    ("linux.resources.memory.reservation", Taken),
    ("linux.resources.memory.swap", Taken),
    ("linux.resources.memory.swappiness", Taken),
    ("linux.resources.memory.disableOOMKiller", Taken),
    ("linux.resources.memory.useHierarchy", Taken),
    ("linux.resources.memory.checkBeforeUpdate", Taken),
    ("linux.resources.cpu", Members),
    ("linux.resources.cpu.cpus", If(checks::processors)),
    ("linux.resources.cpu.mems", If(checks::memory_nodes)),
    ("linux.resources.cpu.shares", Taken),
    ("linux.resources.cpu.period", Taken),
    ("linux.resources.cpu.quota", Taken),
    ("linux.resources.cpu.burst", Taken),
    ("linux.resources.cpu.idle", Taken),
    ("linux.resources.cpu.realtimePeriod", Taken),
    ("linux.resources.cpu.realtimeRuntime", If(checks::realtime_runtime)),
    ("linux.resources.hugepageLimits", Each(checks::huge_page_limit)),
    ("linux.resources.hugepageLimits[].pageSize", Taken),
    ("linux.resources.hugepageLimits[].limit", Taken),
    ("linux.resources.blockIO", Members),
    ("linux.resources.blockIO.weight", Taken),
    ("linux.resources.blockIO.leafWeight", Taken),
    ("linux.resources.blockIO.weightDevice", DEVICE_NUMBERS),
    ("linux.resources.blockIO.throttleReadBpsDevice", DEVICE_NUMBERS),
    ("linux.resources.blockIO.throttleWriteBpsDevice", DEVICE_NUMBERS),
    ("linux.resources.blockIO.throttleReadIOPSDevice", DEVICE_NUMBERS),
    ("linux.resources.blockIO.throttleWriteIOPSDevice", DEVICE_NUMBERS),
    ("linux.resources.network", Members),
    ("linux.resources.network.classID", Refused("traffic classes are the source's own")),
    ("linux.resources.network.priorities", Refused("network interfaces are the source's own")),
    ("linux.resources.rdma", Refused("RDMA devices are the source's own")),
    ("solaris", OTHER_SYSTEM),
    ("windows", OTHER_SYSTEM),
    ("vm", OTHER_SYSTEM),
    ("zos", OTHER_SYSTEM),
    ("freebsd", OTHER_SYSTEM),
];

/// The row of a field.
pub(super) fn rule(field: &str) -> Option<Rule> {
    FIELDS.iter().find(|(path, _)| *path == field).map(|(_, rule)| *rule)
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};
    use std::path::Path;

    use godwit_protos::ContainerRef;
    use serde_json::json;

    use super::*;
    use crate::config::Admit;
    use crate::migrate::spec::{Machine, SpecError, Wanted, derive};

    /// The schema, by the names of its files.
    const SCHEMA: [(&str, &str); 4] = [
        (
            "config-schema.json",
            include_str!("../../../../protos/vendor/runtime-spec/config-schema.json"),
        ),
        (
            "config-linux.json",
            include_str!("../../../../protos/vendor/runtime-spec/config-linux.json"),
        ),
        ("defs.json", include_str!("../../../../protos/vendor/runtime-spec/defs.json")),
        ("defs-linux.json", include_str!("../../../../protos/vendor/runtime-spec/defs-linux.json")),
    ];

    /// For each row whose values are checked: one that is taken, and one that is not with a word of
    /// the reason.
    const EXAMPLES: &[(&str, &str, &str, &str)] = &[
        ("annotations", r#"{"a": "b"}"#, r#"{"run.oci.handler": "wasm"}"#, "run.oci.handler"),
        (
            "mounts",
            r#"[{"destination": "/t", "type": "tmpfs", "options": ["nosuid"]}]"#,
            r#"[{"destination": "/t", "type": "tmpfs", "options": ["nosuid", "idmap"]}]"#,
            "ID-mapped",
        ),
        (
            "process.capabilities.bounding",
            r#"["CAP_KILL"]"#,
            r#"["CAP_SYS_ADMIN"]"#,
            "admit.capabilities",
        ),
        (
            "process.capabilities.permitted",
            r#"["CAP_KILL"]"#,
            r#"["CAP_SYS_ADMIN"]"#,
            "CAP_SYS_ADMIN",
        ),
        (
            "process.capabilities.effective",
            r#"["CAP_KILL"]"#,
            r#"["CAP_SYS_ADMIN"]"#,
            "CAP_SYS_ADMIN",
        ),
        (
            "process.capabilities.inheritable",
            r#"["CAP_KILL"]"#,
            r#"["CAP_SYS_ADMIN"]"#,
            "CAP_SYS_ADMIN",
        ),
        ("process.capabilities.ambient", "[]", r#"["cap_kill"]"#, "cap_kill"),
        (
            "process.rlimits",
            r#"[{"type": "RLIMIT_NICE", "soft": 20, "hard": 20}]"#,
            r#"[{"type": "RLIMIT_RTPRIO", "soft": 0, "hard": 1}]"#,
            "CAP_SYS_NICE",
        ),
        ("process.apparmorProfile", r#""here""#, r#""elsewhere""#, "elsewhere"),
        ("process.oomScoreAdj", "500", "-1", "CAP_SYS_RESOURCE"),
        (
            "process.ioPriority.class",
            r#""IOPRIO_CLASS_IDLE""#,
            r#""IOPRIO_CLASS_RT""#,
            "CAP_SYS_NICE",
        ),
        ("process.scheduler.policy", r#""SCHED_BATCH""#, r#""SCHED_FIFO""#, "CAP_SYS_NICE"),
        ("process.scheduler.nice", "19", "-1", "CAP_SYS_NICE"),
        ("process.execCPUAffinity.initial", r#""0-1""#, r#""2""#, "processors 2"),
        ("process.execCPUAffinity.final", r#""1""#, r#""0,7""#, "processors 0,7"),
        (
            "linux.namespaces",
            r#"[{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"},
            {"type": "network"}, {"type": "time"}]"#,
            r#"[{"type": "user"}]"#,
            "user namespaces",
        ),
        ("linux.rootfsPropagation", r#""rslave""#, r#""shared""#, "CAP_SYS_ADMIN"),
        ("linux.memoryPolicy.nodes", r#""0""#, r#""1""#, "memory nodes 1"),
        (
            "linux.seccomp.syscalls",
            r#"[{"names": ["read"], "action": "SCMP_ACT_ALLOW"}]"#,
            "{}",
            "malformed",
        ),
        (
            "linux.seccomp.syscalls[].args",
            r#"[{"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}]"#,
            "1",
            "malformed",
        ),
        (
            "linux.resources.devices",
            r#"[{"allow": false, "access": "rwm"}, {"allow": true, "type": "c", "major": 136}]"#,
            r#"[{"allow": true, "type": "b", "major": 1, "minor": 3}]"#,
            r#""type":"b""#,
        ),
        (
            "linux.resources.unified",
            r#"{"memory.high": "1"}"#,
            r#"{"cgroup.procs": "1"}"#,
            "cgroup.procs",
        ),
        ("linux.resources.cpu.cpus", r#""0""#, r#""0-2""#, "processors 0-2, this node has 0-1"),
        ("linux.resources.cpu.mems", r#""0""#, r#""0-1""#, "memory nodes 0-1"),
        ("linux.resources.cpu.realtimeRuntime", "0", "1", "CAP_SYS_NICE"),
        (
            "linux.resources.hugepageLimits",
            r#"[{"pageSize": "2MB", "limit": 1}]"#,
            r#"[{"pageSize": "1GB", "limit": 1}]"#,
            "1GB",
        ),
    ];

    fn derived(description: &Value) -> Result<Value, SpecError> {
        let container = ContainerRef::new("default", "cache").unwrap();
        let wanted = Wanted { container: &container, netns: None, annotations: &[] };
        let machine = Machine {
            processors: "0-1".parse().unwrap(),
            memory_nodes: "0".parse().unwrap(),
            huge_pages: vec!["2MB".to_owned()],
            apparmor_profiles: vec!["here".to_owned()],
        };
        derive(&description.to_string(), &Admit::default(), &machine, &wanted)
    }

    /// A specification that has nothing but what it must.
    fn bare() -> Value {
        let own = ["pid", "mount", "network", "ipc", "uts"].map(|kind| json!({"type": kind}));
        json!({"process": {}, "linux": {"namespaces": own}})
    }

    /// The leaves of the schema below a node of it, each with a value of its type.
    fn leaves(file: &str, node: &Value, path: &str, found: &mut BTreeMap<String, Value>) {
        if let Some(reference) = node.get("$ref").and_then(Value::as_str) {
            let (other, pointer) = reference.split_once('#').unwrap();
            let other = if other.is_empty() { file } else { other };
            match SCHEMA.iter().find(|(name, _)| *name == other) {
                Some((_, text)) => {
                    let text: Value = serde_json::from_str(text).unwrap();
                    let pointer = format!("/{}", pointer.trim_start_matches('/'));
                    leaves(other, text.pointer(&pointer).unwrap(), path, found);
                }
                // A section of another operating system.
                None => drop(found.insert(path.to_owned(), json!({"x": 1}))),
            }
            return;
        }
        for part in ["allOf", "anyOf"].iter().filter_map(|key| node.get(*key)?.as_array()).flatten()
        {
            leaves(file, part, path, found);
        }
        if let Some(properties) = node.get("properties").and_then(Value::as_object) {
            for (name, property) in properties {
                let dot = if path.is_empty() { "" } else { "." };
                leaves(file, property, &format!("{path}{dot}{name}"), found);
            }
            return;
        }
        let kind = node.get("type").and_then(Value::as_str);
        let first = node.get("enum").and_then(|all| all.get(0)).cloned();
        let value = match kind {
            Some("array") => {
                let mut items = BTreeMap::new();
                leaves(file, &node["items"], &format!("{path}[]"), &mut items);
                match items.remove(&format!("{path}[]")) {
                    Some(item) => json!([item]),
                    None => return found.extend(items),
                }
            }
            Some("string") => first.unwrap_or(json!("x")),
            Some("integer") => json!(1),
            Some("boolean") => json!(true),
            Some("object") => json!({"x": "y"}),
            _ => return,
        };
        found.insert(path.to_owned(), value);
    }

    fn schema() -> BTreeMap<String, Value> {
        let mut found = BTreeMap::new();
        let text: Value = serde_json::from_str(SCHEMA[0].1).unwrap();
        leaves(SCHEMA[0].0, &text, "", &mut found);
        found
    }

    /// The path itself and those of what it lies in, outermost first.
    fn prefixes(path: &str) -> impl Iterator<Item = &str> {
        let ends = path.match_indices(['.', '[']).map(|(at, _)| at);
        ends.chain([path.len()]).map(|end| path[..end].trim_end_matches("[]"))
    }

    /// The row that decides on a leaf.
    fn deciding(path: &str) -> Option<(&str, Rule)> {
        let is_outer = |rule: &Rule| matches!(rule, Members | Each(_));
        let rows = prefixes(path).map(|prefix| (prefix, rule(prefix)));
        for (prefix, rule) in rows {
            match rule {
                Some(rule) if is_outer(&rule) && prefix != path => {}
                other => return other.map(|rule| (prefix, rule)),
            }
        }
        None
    }

    /// `spec` with `value` at a path; an array on the way gets one item.
    fn set(spec: &mut Value, path: &str, value: Value) {
        let (first, rest) = path.split_once('.').map_or((path, None), |(a, b)| (a, Some(b)));
        let Some(rest) = rest else { return spec[first] = value };
        match first.strip_suffix("[]") {
            Some(first) => {
                let mut item = example_item(first);
                set(&mut item, rest, value);
                spec[first] = json!([item]);
            }
            None => {
                if !spec[first].is_object() {
                    spec[first] = json!({});
                }
                set(&mut spec[first], rest, value);
            }
        }
    }

    /// What an item has besides the member that is tried.
    fn example_item(array: &str) -> Value {
        match array {
            "mounts" => json!({"destination": "/t", "type": "tmpfs", "options": ["nosuid"]}),
            "hugepageLimits" => json!({"pageSize": "2MB"}),
            _ => json!({}),
        }
    }

    /// The value of that member in the example that the row of a whole array needs, if the schema's
    /// will not do.
    fn member(path: &str) -> Option<Value> {
        Some(match path {
            "mounts[].type" => json!("mqueue"),
            "mounts[].options" => json!(["rw", "nosuid"]),
            "linux.resources.devices[].allow" => json!(false),
            "linux.resources.hugepageLimits[].pageSize" => json!("2MB"),
            _ => return None,
        })
    }

    fn value_at<'v>(spec: &'v Value, path: &str) -> Option<&'v Value> {
        path.split('.').try_fold(spec, |value, part| match part.strip_suffix("[]") {
            Some(part) => value.get(part)?.as_array()?.last(),
            None => value.get(part),
        })
    }

    #[test]
    fn the_table_has_every_field_of_the_schema_and_no_other() {
        let leaves = schema();
        assert!(leaves.len() > 120, "{leaves:?}");
        let missing: Vec<_> = leaves.keys().filter(|path| deciding(path).is_none()).collect();
        assert!(missing.is_empty(), "no row for {missing:?}");
        let known: BTreeSet<&str> = leaves.keys().flat_map(|path| prefixes(path)).collect();
        for (path, _) in FIELDS {
            assert!(known.contains(path), "{path} is not in the schema");
            assert_eq!(FIELDS.iter().filter(|(other, _)| other == path).count(), 1, "{path}");
        }
    }

    /// Method: a specification with nothing else but each field of the schema in turn.
    #[test]
    fn every_field_has_the_outcome_that_its_row_says() {
        for (path, value) in schema() {
            // An item without a kind of namespace is none; the examples have them.
            if path.starts_with("linux.namespaces[]") {
                continue;
            }
            let (row, rule) = deciding(&path).unwrap();
            let value = member(&path).unwrap_or(value);
            let mut with = bare();
            set(&mut with, &path, value.clone());
            match (rule, derived(&with)) {
                (Taken, Ok(spec)) => assert_eq!(value_at(&spec, &path), Some(&value), "{path}"),
                (AtLeast(ours), Ok(spec)) => {
                    let all = value_at(&spec, &path).unwrap().as_array().unwrap();
                    assert!(
                        ours.iter().chain(&["x"]).all(|one| all.contains(&json!(one))),
                        "{path}"
                    );
                }
                (Ours, Ok(spec)) => assert_ne!(value_at(&spec, &path).unwrap(), &value, "{path}"),
                (Refused(reason), Err(error)) => {
                    let error = error.to_string();
                    assert!(error.contains(reason) && error.contains(row), "{path}: {error}");
                }
                // Tried with their examples below.
                (If(_) | Each(_), _) => {}
                (_, outcome) => panic!("{path}: {outcome:?}"),
            }
        }
    }

    #[test]
    fn every_checked_field_is_taken_and_refused_as_its_examples_say() {
        for (path, rule) in FIELDS {
            let is_checked = matches!(rule, If(_) | Each(_));
            let examples = EXAMPLES.iter().filter(|(of, ..)| of == path);
            assert_eq!(examples.count(), usize::from(is_checked), "{path}");
        }
        for (path, right, wrong, word) in EXAMPLES {
            let with = |value: &str| {
                let (mut with, value) = (bare(), serde_json::from_str(value).unwrap());
                set(&mut with, path, value);
                with
            };
            let right = with(right);
            let spec = derived(&right).unwrap();
            assert_eq!(value_at(&spec, path), value_at(&right, path), "{path}");
            let error = derived(&with(wrong)).unwrap_err().to_string();
            assert!(error.contains(word), "{path}: {error}");
        }
    }

    #[test]
    fn what_takes_a_capability_is_admitted_with_it() {
        let container = ContainerRef::new("default", "cache").unwrap();
        let netns = Some(Path::new("/run/netns/cache"));
        let wanted = Wanted { container: &container, netns, annotations: &[] };
        let mut admit = Admit::default();
        admit.capabilities.extend(["CAP_SYS_NICE", "CAP_SYS_RESOURCE"].map(str::to_owned));
        let mut with = bare();
        set(&mut with, "process.oomScoreAdj", json!(-999));
        set(&mut with, "process.scheduler", json!({"policy": "SCHED_RR", "priority": 1}));
        let spec = derive(&with.to_string(), &admit, &Machine::default(), &wanted).unwrap();
        assert_eq!(spec["process"], with["process"]);
        assert_eq!(spec["linux"]["namespaces"][2]["path"], "/run/netns/cache");
    }
}
