//! The image: a container goes on on the one that it was made of, whatever the name has come to
//! stand for.

use anyhow::{Result, ensure};
use godwit_tests::images::{self, Image};
use godwit_tests::{Node, workload};

use crate::bed::{self, destination, probe, source};
use crate::table::rows;

rows! {
    a_name_with_newer_content_moves_with_the_old: "an image whose name got other content since the start", Moves,
        "on the container's own image, kept at the destination by digest" => was_renamed();
    a_name_that_is_taken_at_the_destination_stays: "an image whose name stands for another one at the destination",
        Warned, "that name keeps its content; the container's own is kept by digest" => is_taken();
    an_image_that_is_gone_is_refused: "an image that the source's containerd no longer has", Refused,
        "pull or import it again, under any name" => is_gone();
    a_root_file_system_by_hand_is_refused: "a root file system that is a directory of the node (`ctr run --rootfs`)",
        Refused, "" => has_directory();
    another_image_by_annotation_is_refused: "a container at the destination that was made of another image, by annotation",
        Refused, "when its session begins" => differs();
}

/// Another name for the probe's image.
fn tag(at: &Node, image: Image, name: &str) -> Result<()> {
    at.ok(&["ctr", "images", "tag", "--force", image.reference(), name]).map(drop)
}

/// Starts a probe from the image of that name.
fn start_from(image: &str, name: &str) -> Result<()> {
    let run = ["ctr", "run", "-d", "--runtime", workload::RUNTIME, "--snapshotter", "godwit"];
    source().ok(&[&run[..], &[image, name, "probe", "idle"]].concat())?;
    bed::status_becomes(source(), name, |line| line.starts_with("beats")).map(drop)
}

/// Digest that a name stands for; "" if for none.
fn stands_for(at: &Node, name: &str) -> Result<String> {
    let listed = at.ok(&["ctr", "images", "ls", &format!("name=={name}")])?;
    let line = listed.lines().find(|line| line.starts_with(name)).unwrap_or_default();
    Ok(line.split_whitespace().nth(2).unwrap_or_default().to_owned())
}

fn was_renamed() -> Result<()> {
    let (name, image) = ("renamed", "docker.io/library/renamed:latest");
    tag(source(), Image::Probe, image)?;
    start_from(image, name)?;
    tag(source(), Image::Busybox, image)?;
    bed::moved(name)?;
    // It runs, and its image's file is there to be started again.
    destination().ok(&["ctr", "tasks", "rm", "-f", name])?;
    destination().ok(&["ctr", "tasks", "start", "-d", name])?;
    bed::status_becomes(destination(), name, |line| line.starts_with("beats"))?;
    ensure!(stands_for(destination(), image)?.is_empty(), "the name came along");
    let digest = stands_for(source(), Image::Probe.reference())?;
    let by_digest = format!("docker.io/library/renamed@{digest}");
    ensure!(stands_for(destination(), &by_digest)? == digest, "no image {by_digest}");
    source().ok(&["ctr", "images", "rm", image])?;
    bed::remove(destination(), name)
}

fn is_taken() -> Result<()> {
    let (name, image) = ("taken", "docker.io/library/taken:latest");
    tag(source(), Image::Probe, image)?;
    images::import(destination(), Image::Busybox, "godwit")?;
    tag(destination(), Image::Busybox, image)?;
    start_from(image, name)?;
    let plan = ["godwit", "plan", name, "--from", "edge-a", "--to", "edge-b"];
    let plan = source().ok(&plan)?;
    ensure!(plan.contains("taken@sha256:"), "plan does not warn: {plan}");
    bed::moved(name)?;
    bed::status_becomes(destination(), name, |line| line.starts_with("beats"))?;
    let theirs = stands_for(destination(), Image::Busybox.reference())?;
    ensure!(stands_for(destination(), image)? == theirs, "the name was given other content");
    for at in [source(), destination()] {
        at.ok(&["ctr", "images", "rm", image])?;
    }
    bed::remove(destination(), name)
}

fn is_gone() -> Result<()> {
    let name = "gone";
    images::import(source(), Image::Sqlite, "godwit")?;
    let command = ["sh", "-c", "while :; do sleep 1; done"];
    workload::Container::new(name, Image::Sqlite).command(&command).start(source())?;
    source().ok(&["ctr", "images", "rm", "--sync", Image::Sqlite.reference()])?;
    bed::is_refused(name, &[Image::Sqlite.reference(), "chain ID", "pull or import"])?;
    bed::remove(source(), name)
}

fn has_directory() -> Result<()> {
    let name = "directory";
    let root = "/tmp/directory";
    source().sh(&format!("mkdir -p {root}/bin && cp $(command -v busybox) {root}/bin/busybox"))?;
    let run = ["ctr", "run", "-d", "--runtime", workload::RUNTIME, "--rootfs", root, name];
    source().ok(&[&run[..], &["/bin/busybox", "sleep", "1000"]].concat())?;
    bed::is_refused(name, &["no snapshotter holds"])?;
    bed::remove(source(), name)
}

fn differs() -> Result<()> {
    let name = "differs";
    bed::start(&probe(name, &["idle"]))?;
    images::import(destination(), Image::Busybox, "godwit")?;
    let container = workload::Container::new(name, Image::Busybox)
        .command(&["probe", "idle"])
        .annotation("godwit.io/migrate-from", &format!("edge-a/default/{name}"));
    let refused = container.start(destination()).expect_err("it was started on another image");
    let refused = format!("{refused:#}");
    ensure!(refused.contains("another image"), "{refused}");
    let state = workload::task(source(), name)?;
    ensure!(state.as_deref() == Some("RUNNING"), "{name} is {state:?} at the source");
    destination().sh(&format!("ctr tasks rm -f {name}; ctr containers rm {name}; true"))?;
    bed::remove(source(), name)
}
