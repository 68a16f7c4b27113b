//! The example pod, as a kubelet would ask for it.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use godwit_tests::images::{self, Image};
use godwit_tests::place;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::{GODWIT, NamespaceMode, Pod, node};

#[derive(Deserialize)]
struct PodDocument {
    metadata: Metadata,
    spec: Spec,
}

#[derive(Deserialize)]
struct Metadata {
    name: String,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Spec {
    runtime_class_name: String,
    containers: Vec<ContainerDocument>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ContainerDocument {
    name: String,
    image: String,
    args: Vec<String>,
}

#[derive(Deserialize)]
struct RuntimeClass {
    metadata: Metadata,
    handler: String,
}

#[test]
fn the_example_pod_runs_under_the_handler_of_the_runtime_class() -> Result<()> {
    let class: RuntimeClass = document("docs/deploy/runtimeclass.yaml")?;
    let pod: PodDocument = document("examples/pod/redis.yaml")?;
    ensure!(pod.spec.runtime_class_name == class.metadata.name && class.handler == GODWIT.name);
    let [container] = &pod.spec.containers[..] else { anyhow::bail!("not one container") };

    images::import_for_pods(node(), Image::Redis, "godwit")?;
    node().ok(&[
        "ctr",
        "-n",
        "k8s.io",
        "images",
        "tag",
        Image::Redis.reference(),
        &container.image,
    ])?;
    let sandbox = Pod::run(GODWIT, &pod.metadata.name, NamespaceMode::Pod)?;
    let member = sandbox.create_as(&container.name, "", |config| {
        config.image.get_or_insert_default().image.clone_from(&container.image);
        config.command.clear();
        config.args.clone_from(&container.args);
        config.annotations = pod.metadata.annotations.clone().into_iter().collect();
    })?;
    member.start()?;
    let told =
        member.exec("until redis-cli ping; do sleep 0.1; done; redis-cli config get appendonly")?;
    ensure!(told.contains("PONG") && told.ends_with("yes\n"), "{told}");
    Ok(())
}

fn document<T: DeserializeOwned>(path: &str) -> Result<T> {
    let text = std::fs::read_to_string(place::workspace().join(path)).context(path.to_owned())?;
    serde_saphyr::from_str(&text).with_context(|| path.to_owned())
}
