//! containerd's contract for snapshotters, as one body of checks over three: ours as containerd
//! asks it, ours through containerd, and containerd's own overlayfs, which shows that the checks
//! ask for what containerd means.
//!
//! What is checked follows containerd's suite for snapshotters (`core/snapshots/testsuite`) and its
//! `Snapshotter` interface. Each check runs among a real node's mounts, removes what it has made,
//! and must leave as many directories as it found.

use std::sync::LazyLock;
use std::time::Duration;

use anyhow::{Result, ensure};
use godwit_tests::command::wait_until;
use godwit_tests::node::{CONTAINERD_SOCKET, SNAPSHOTTER_SOCKET};
use godwit_tests::{Bed, BedOptions, Node};

use client::{Snapshotter, Subject, mounted};

#[path = "snapshots/calls.rs"]
mod calls;
#[path = "snapshots/client.rs"]
mod client;
#[path = "snapshots/layers.rs"]
mod layers;

static BED: LazyLock<Bed> = LazyLock::new(|| start().expect("the test node starts"));

/// How long containerd may take to reach a daemon that was started again.
const SOON: Duration = Duration::from_secs(10);

const OUR_TREES: &str = "/var/lib/godwit/snapshots/fs";

const GODWIT: Subject = Subject {
    socket: SNAPSHOTTER_SOCKET,
    snapshotter: "godwit",
    through_containerd: false,
    trees: OUR_TREES,
};
const GODWIT_IN_CONTAINERD: Subject =
    Subject { socket: CONTAINERD_SOCKET, through_containerd: true, ..GODWIT };
const OVERLAYFS: Subject = Subject {
    socket: CONTAINERD_SOCKET,
    snapshotter: "overlayfs",
    through_containerd: true,
    trees: "/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots",
};

fn start() -> Result<Bed> {
    let bed = Bed::start(&BedOptions::nodes(1).generation(godwit_tests::Containerd::of_suite()))?;
    bed.node(0).ok(&["ctr", "leases", "create", "--id", "conformance"])?;
    Ok(bed)
}

fn node() -> &'static Node {
    BED.node(0)
}

fn session<T: Send>(
    subject: &'static Subject,
    name: &str,
    work: impl FnOnce(&mut Snapshotter) -> Result<T> + Send,
) -> Result<T> {
    node().in_mounts(|| work(&mut Snapshotter::connect(subject, name)?))
}

/// Runs a check; then everything that it has made must be removable, and leave nothing.
fn run(
    subject: &'static Subject,
    name: &str,
    check: impl FnOnce(&mut Snapshotter) -> Result<()> + Send,
) -> Result<()> {
    session(subject, name, |snapshotter| {
        let before = snapshotter.directories()?;
        let checked = check(snapshotter);
        // Otherwise one that fails would make others fail.
        let removed = snapshotter.remove_all();
        checked.and(removed)?;
        let after = snapshotter.directories()?;
        ensure!(after == before, "{after} directories are left, there were {before}");
        Ok(())
    })
}

/// Method: what a check has made must be the same after its server was stopped and started, usable,
/// and removable.
fn nothing_changes_over_a_restart(subject: &'static Subject) -> Result<()> {
    let name = "restart";
    let before = session(subject, name, |s| {
        s.layer("base", "", |top| Ok(std::fs::write(top.join("file"), "base")?))?;
        s.layer("next", "base", |top| Ok(std::fs::remove_file(top.join("file"))?))?;
        s.prepare_labelled("active", "next", &[("l", "1")])?;
        mounted(&s.mounts("active")?, |top| Ok(std::fs::write(top.join("written"), "kept")?))?;
        s.view("view", "base")?;
        Ok((s.list(&[])?, s.mounts("active")?, s.usage("next")?, s.directories()?))
    })?;
    // In the order in which systemd stops them, and in the order in which it starts them.
    node().stop_containerd()?;
    node().stop_daemon()?;
    node().start_daemon()?;
    node().start_containerd()?;
    wait_until("it answers", SOON, || Ok(session(subject, name, |s| Ok(s.list(&[])?)).is_ok()))?;
    session(subject, name, |s| {
        let after = (s.list(&[])?, s.mounts("active")?, s.usage("next")?, s.directories()?);
        ensure!(after == before, "{after:?}\nwas before: {before:?}");
        mounted(&s.mounts("active")?, |top| {
            ensure!(std::fs::read(top.join("written"))? == b"kept" && !top.join("file").exists());
            Ok(())
        })?;
        s.commit("committed", "active")?;
        s.prepare("later", "committed")?;
        s.remove_all()
    })
}

/// The checks, for one snapshotter.
macro_rules! conformance {
    ($subject:ident as $module:ident: $($file:ident::$check:ident),* $(,)?) => {
        mod $module {
            $(#[test]
            fn $check() -> anyhow::Result<()> {
                super::run(&super::$subject, stringify!($check), |s| super::$file::$check(s))
            })*

            #[test]
            fn nothing_changes_over_a_restart() -> anyhow::Result<()> {
                super::nothing_changes_over_a_restart(&super::$subject)
            }
        }
    };
}

/// The checks, for every snapshotter. What the layers hold is the same through containerd as
/// without.
macro_rules! conformance_of_all {
    (calls: $($call:ident),* $(,)?; layers: $($layer:ident),* $(,)?) => {
        conformance!(GODWIT as godwit: $(calls::$call),* $(, layers::$layer)*);
        conformance!(GODWIT_IN_CONTAINERD as godwit_in_containerd: $(calls::$call),*);
        conformance!(OVERLAYFS as overlayfs: $(calls::$call),* $(, layers::$layer)*);
    };
}

conformance_of_all! {
    calls:
        each_kind_is_what_stat_and_list_say,
        a_snapshot_of_nothing_is_empty_and_its_root_is_open_to_all,
        mounts_are_those_that_prepare_and_view_gave,
        a_view_is_read_only_and_does_not_see_what_others_write,
        an_active_snapshot_keeps_what_was_written_between_mounts,
        keys_and_names_share_one_space,
        only_what_is_committed_can_be_a_parent,
        only_what_is_active_can_be_committed_and_once,
        a_commit_gives_labels_and_a_time_of_its_own,
        what_is_mounted_can_be_committed,
        a_parent_stays_as_long_as_it_has_children,
        what_was_removed_can_be_made_anew,
        labels_change_as_the_fields_say_and_nothing_else_does,
        a_label_that_is_too_long_is_refused,
        lists_can_be_filtered,
        what_is_listed_can_be_looked_at_meanwhile,
        usage_is_what_a_snapshot_adds_to_its_parents,
        of_many_that_prepare_one_key_one_succeeds,
        id_mapping_labels_give_the_root_to_the_mapped_root,
        what_was_removed_gives_its_space_back,
        cleanup_frees_what_nothing_refers_to,
        labels_for_garbage_collection_are_respected;
    layers:
        files_are_replaced_changed_and_removed,
        whiteouts_and_opaque_directories_hide_what_is_below,
        directories_are_renamed_and_removed_across_layers,
        a_directory_of_a_lower_layer_is_not_renamed_in_place,
        files_are_renamed_over_files_of_lower_layers,
        owners_change_down_a_path_and_of_what_is_made_anew,
        files_move_between_directories_of_several_layers,
        hard_links_stay_linked,
        modes_owners_times_and_special_files_are_kept,
        extended_attributes_are_kept,
        chains_of_128_layers_can_be_mounted,
        a_layer_may_have_many_files,
}
