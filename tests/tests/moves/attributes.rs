//! What files have besides their bytes: flags of chattr(1), projects for quotas, several names; and
//! what keeps a volume from being removed once it has left.

use anyhow::{Result, ensure};
use godwit_tests::Node;
use godwit_tests::command::wait_until;
use godwit_tests::workload;

use crate::bed::{self, SOON, destination, init, moved, probe, remove, source};
use crate::table::rows;

rows! {
    flags_of_files_move: "files that are immutable, append-only, without access times (chattr)", Moves,
        "in volumes and the writable layer; the way back is free" => flags();
    special_files_with_several_names_move: "pipes and symbolic links with several names", Moves, "" => names();
    projects_that_the_destination_cannot_keep_are_refused: "project IDs for quotas", Refused,
        "where the destination's file system has none; otherwise they move" => projects();
    what_is_mounted_in_a_volume_stays_and_the_volume_moves: "something mounted in a volume, on the node", Moves,
        "as files; the mount stays behind, `godwit status` names it until it is unmounted" => mounted();
}

/// Where a node has a volume.
fn data(id: &str) -> String {
    format!("/var/lib/godwit/volumes/{id}/data")
}

/// Starts an idle probe at the source with a tree volume of its name, in which `script` makes
/// files.
fn start(name: &'static str, script: &str) -> Result<()> {
    source().ok(&["godwit", "volume", "create", name])?;
    source().sh(&format!("cd {} && {script}", data(name)))?;
    bed::start(&probe(name, &["idle"]).volume(name, "/data", "rw"))
}

/// Removes container and volume.
fn end(at: &Node, name: &str) -> Result<()> {
    remove(at, name)?;
    at.ok(&["godwit", "volume", "rm", name]).map(drop)
}

/// The flags of what lies in a directory, a line for each.
fn flags_at(at: &Node, directory: &str) -> Result<String> {
    let lines = at.sh(&format!("cd {directory} && lsattr -R . | sed 's/e/-/' | sort"))?;
    ensure!(lines.contains('i'), "{}: {lines}", at.name());
    Ok(lines)
}

fn flags() -> Result<()> {
    let name = "flags";
    let files = "echo fixed >fixed && echo one >log && mkdir -p dir/sub below && echo in >dir/in && ln fixed below/linked \
                 && chattr +A dir/sub && chattr +a log && chattr +i fixed dir";
    start(name, files)?;
    let root = |at: &Node| Ok::<_, anyhow::Error>(format!("/proc/{}/root", init(at, name)?));
    let layer = root(source())?;
    source().sh(&format!(
        "cd {layer} && mkdir etc-like && echo x >etc-like/fixed && chattr +i etc-like/fixed"
    ))?;
    let before = flags_at(source(), &data(name))?;
    let before_layer = flags_at(source(), &format!("{layer}/etc-like"))?;
    moved(name)?;
    ensure!(flags_at(destination(), &data(name))? == before, "another at the destination");
    let layer = root(destination())?;
    ensure!(flags_at(destination(), &format!("{layer}/etc-like"))? == before_layer, "in the layer");
    // An append-only file takes more, and nothing else.
    destination().sh(&format!("cd {} && echo two >>log && ! echo three >log", data(name)))?;
    workload::migrated(source(), name, destination(), source(), &[])?;
    ensure!(flags_at(source(), &data(name))? == before, "another back at the source");
    ensure!(source().sh(&format!("cat {}/log", data(name)))? == "one\ntwo\n");
    let left = "cd /var/lib/godwit && ls -d trash/flags-* volumes/flags 2>/dev/null | wc -l";
    let gone = || Ok(destination().sh(left)?.trim() == "0");
    wait_until("nothing of the volume is left", SOON, gone)?;
    end(source(), name)
}

fn names() -> Result<()> {
    let name = "names";
    let files = "mkfifo pipe && mkdir d && ln pipe d/pipe && ln -s target link && ln -P link d/link && mknod null c 1 3 \
                 && ln null d/null";
    start(name, files)?;
    moved(name)?;
    let same = "[ pipe -ef d/pipe ] && [ null -ef d/null ] && [ $(stat -c %i link) = $(stat -c %i d/link) ] \
                && [ $(readlink d/link) = target ] && stat -c '%F %t %T' d/pipe d/null";
    let kinds = destination().sh(&format!("cd {} && {same}", data(name)))?;
    ensure!(kinds == "fifo 0 0\ncharacter special file 1 3\n", "{kinds}");
    end(destination(), name)
}

/// Method: the source has a file system with projects mounted where the volume lies; the
/// destination's has none.
fn projects() -> Result<()> {
    let name = "projects";
    let image = "/var/lib/godwit-projects.img";
    source().ok(&["godwit", "volume", "create", name])?;
    let at = data(name);
    source().sh(&format!(
        "truncate -s 512M {image} && mkfs.xfs -q {image} && mount -o loop {image} {at} && touch {at}/file && \
         chattr -p 300 {at}/file"
    ))?;
    bed::start(&probe(name, &["idle"]).volume(name, "/data", "rw"))?;
    bed::is_refused(name, &["volume|projects", "project IDs", "chattr"])?;
    source().sh(&format!("chattr -p 0 {at}/file"))?;
    moved(name)?;
    let told = || Ok(source().ok(&["godwit", "status"])?.contains("unmount it"));
    wait_until("what is mounted is reported", SOON, told)?;
    // The daemon starts with it, and the volume may come back.
    source().stop_daemon()?;
    source().start_daemon()?;
    ensure!(told()?, "it is not reported any more");
    wait_until("containerd reaches the daemon again", SOON, || {
        let listed = source().run(&["ctr", "snapshots", "--snapshotter", "godwit", "ls"])?;
        Ok(listed.succeeded())
    })?;
    let check = source().sh("godwit check || true")?;
    ensure!(check.contains("unmount it"), "{check}");
    workload::migrated(source(), name, destination(), source(), &[])?;
    source().sh(&format!("umount /var/lib/godwit/trash/projects-*/data && rm {image}"))?;
    source().run(&["godwit", "check", "--repair"])?;
    ensure!(!told()?, "it is reported still");
    end(source(), name)
}

fn mounted() -> Result<()> {
    let name = "mounted";
    start(name, "mkdir sub && echo y >file")?;
    source().sh(&format!("cd {} && mount -t tmpfs none sub && echo x >sub/file", data(name)))?;
    moved(name)?;
    ensure!(destination().sh(&format!("cat {}/sub/file", data(name)))? == "x\n");
    let told = || {
        Ok(source()
            .ok(&["godwit", "status"])?
            .contains("/data/sub: a file system is mounted there"))
    };
    wait_until("what is mounted is reported", SOON, told)?;
    ensure!(
        source().sh("cat /var/lib/godwit/trash/mounted-*/data/sub/file")? == "x\n",
        "it was emptied"
    );
    workload::migrated(source(), name, destination(), source(), &[])?;
    source().sh("umount /var/lib/godwit/trash/mounted-*/data/sub")?;
    source().run(&["godwit", "check", "--repair"])?;
    ensure!(!told()?, "it is reported still");
    end(source(), name)
}
