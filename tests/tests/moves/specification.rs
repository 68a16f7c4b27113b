//! The specification: what a container comes up with after it has moved and is started again at the
//! destination.

use anyhow::{Context, Result, ensure};
use containerd_client::services::v1::containers_client::ContainersClient;
use containerd_client::services::v1::{Container as Record, UpdateContainerRequest};
use godwit_tests::command::wait_until;
use godwit_tests::{Node, workload};
use prost_types::{Any, FieldMask};
use serde_json::{Value, json};

use crate::bed::{self, SOON, destination, probe, source};
use crate::table::rows;

rows! {
    a_bare_specification_is_the_same_after_a_restart: "fields that a specification does not have, or has with unusual \
        values", Moves, "the same after a restart at the destination" => stays_bare();
    what_names_or_commands_the_source_is_refused: "kernel parameters, hooks, devices, user namespaces, a negative \
        `oomScoreAdj`, fields unknown to this version, labels by which containerd runs programs", Refused,
        "each by name; what a key of `[admit]` can allow is said so" => is_not_taken();
}

/// Without any of the fields to which typed specifications give defaults.
fn stays_bare() -> Result<()> {
    let name = "bare";
    run(name, |spec| {
        let _ = spec.as_object_mut().and_then(|spec| spec.remove("hostname"));
        for field in ["capabilities", "rlimits", "noNewPrivileges"] {
            let _ = spec["process"].as_object_mut().and_then(|process| process.remove(field));
        }
        let _ = spec["linux"].as_object_mut().and_then(|linux| linux.remove("resources"));
        spec["process"]["oomScoreAdj"] = json!(321);
        spec["linux"]["rootfsPropagation"] = json!("private");
    })?;
    let (there, seen_there) = (specification(source(), name)?, seen(source(), name)?);
    bed::moved(name)?;
    let here = specification(destination(), name)?;
    for field in ["process", "hostname", "domainname", "mounts"] {
        ensure!(here.get(field) == there.get(field), "{field}: {here:#}\ninstead of\n{there:#}");
    }
    ensure!(here["linux"]["rootfsPropagation"] == "private", "{here:#}");
    ensure!(seen(destination(), name)? == seen_there, "moved: {}", seen(destination(), name)?);
    destination().ok(&["ctr", "tasks", "rm", "-f", name])?;
    destination().ok(&["ctr", "tasks", "start", "-d", name])?;
    wait_until("it has started", SOON, || Ok(bed::status(destination(), name).is_ok()))?;
    let after = seen(destination(), name)?;
    ensure!(after == seen_there, "restarted:\n{after}\ninstead of\n{seen_there}");
    bed::remove(destination(), name)
}

fn is_not_taken() -> Result<()> {
    let name = "refused";
    run(name, |_| {})?;
    let usual = specification(source(), name)?;
    let cases: [(&str, Value, &[&str]); 3] = [
        (
            "/linux/sysctl",
            json!({"net.ipv4.ip_forward": "0"}),
            &["linux.sysctl", "godwit.io/migrate-from"],
        ),
        (
            "/process/oomScoreAdj",
            json!(-1),
            &["oomScoreAdj -1", "CAP_SYS_RESOURCE", "admit.capabilities"],
        ),
        (
            "/linux/warpDrive",
            json!({"speed": 9}),
            &["linux.warpDrive", "not known to this version"],
        ),
    ];
    for (path, value, words) in cases {
        edit(source(), name, |spec| {
            spec.clone_from(&usual);
            let (section, field) = path.rsplit_once('/').unwrap_or_default();
            if let Some(section) = spec.pointer_mut(section) {
                section[field] = value;
            }
        })?;
        bed::is_refused(name, words)?;
    }
    edit(source(), name, |spec| *spec = usual)?;
    let label = "containerd.io/restart.loguri";
    source().ok(&["ctr", "containers", "label", name, &format!("{label}=binary:///bin/true")])?;
    bed::is_refused(name, &[label])?;
    bed::remove(source(), name)
}

/// Starts an idle probe at the source under its usual specification with an edit.
fn run(name: &str, change: impl FnOnce(&mut Value)) -> Result<()> {
    run_probe(name, &["idle"], change)
}

/// Starts a probe at the source under its usual specification with an edit.
pub(crate) fn run_probe(name: &str, words: &[&str], change: impl FnOnce(&mut Value)) -> Result<()> {
    let container = probe(name, words);
    let reference = container.image.reference();
    let create =
        ["ctr", "containers", "create", "--runtime", workload::RUNTIME, "--snapshotter", "godwit"];
    let rest = [reference, name, "probe"];
    source().ok(&[&create[..], &rest, words].concat())?;
    edit(source(), name, change)?;
    source().ok(&["ctr", "tasks", "start", "-d", name])?;
    wait_until("the probe reports", SOON, || Ok(bed::status(source(), name).is_ok()))
}

/// What the specification comes to, as the kernel tells it of the init process.
fn seen(at: &Node, name: &str) -> Result<String> {
    let pid = bed::init(at, name)?;
    let script = "grep -E 'Cap|NoNewPrivs|Seccomp:' /proc/PID/status; cat /proc/PID/oom_score_adj; \
        grep -E 'open files|processes' /proc/PID/limits";
    at.sh(&script.replace("PID", &pid.to_string()))
}

fn specification(at: &Node, name: &str) -> Result<Value> {
    let info: Value = serde_json::from_str(&at.ok(&["ctr", "containers", "info", name])?)?;
    Ok(info["Spec"].clone())
}

/// Changes the specification in containerd's record, for which `ctr` has no command.
fn edit(at: &Node, name: &str, change: impl FnOnce(&mut Value)) -> Result<()> {
    let mut spec = specification(at, name)?;
    change(&mut spec);
    let spec = Any {
        type_url: "types.containerd.io/opencontainers/runtime-spec/1/Spec".to_owned(),
        value: serde_json::to_vec(&spec)?,
    };
    let container = Record { id: name.to_owned(), spec: Some(spec), ..Record::default() };
    let update_mask = Some(FieldMask { paths: vec!["spec".to_owned()] });
    let message = UpdateContainerRequest { container: Some(container), update_mask };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let socket = at.path("/run/containerd/containerd.sock");
        let channel = containerd_client::connect(socket).await?;
        let mut request = tonic::Request::new(message);
        request.metadata_mut().insert("containerd-namespace", "default".parse()?);
        let updated = ContainersClient::new(channel).update(request).await;
        updated.map(drop).context("update the container")
    })
}
