//! The nodes of fault runs: each has its state on a disk of its own that can be filled, and a
//! witness in its network.

use std::fs;

use anyhow::Result;
use godwit_tests::images::Image;
use godwit_tests::ledger::Witness;
use godwit_tests::{Bed, BedOptions, Node, place};

/// Where a node's disk lies, and where it is mounted.
const DISK: &str = "/var/lib/containerd/godwit-disk";
pub(crate) const STATE: &str = "/var/lib/godwit";
const DISK_BYTES: &str = "1G";
/// Logs of a node that are kept.
const LOGS: [&str; 3] = ["containerd", "daemon", "init"];

fn configuration(_node: &str) -> String {
    "[cache]\nschedule = false\nmin_free_mib = 16\n[admit]\nfile_systems = [\"ext4\"]\n".to_owned()
}

/// Three nodes: source, destination, and one for second destinations.
pub(crate) struct Site {
    witness: Witness,
    bed: Bed,
}

impl Site {
    /// Starts the nodes.
    pub(crate) fn start() -> Result<Self> {
        let options = BedOptions::nodes(3).config(configuration).bare();
        let bed = Bed::start(&options)?;
        for node in bed.nodes() {
            node.sh(&format!("truncate -s {DISK_BYTES} {DISK}; mkfs.ext4 -q -m 0 {DISK}"))?;
        }
        let witness = Witness::start(&bed)?;
        let site = Self { witness, bed };
        for node in site.nodes() {
            begin_services(node)?;
        }
        site.bed.import(Image::Probe, "godwit")?;
        Ok(site)
    }

    pub(crate) fn bed(&self) -> &Bed {
        &self.bed
    }

    pub(crate) fn nodes(&self) -> &[Node] {
        self.bed.nodes()
    }

    pub(crate) fn node(&self, index: usize) -> &Node {
        self.bed.node(index)
    }

    pub(crate) fn witness(&self) -> &Witness {
        &self.witness
    }

    /// Copies the nodes' logs. Returns where they are.
    pub(crate) fn keep_logs(&self, seed: u64) -> Result<String> {
        let kept = place::target().join("faults").join(seed.to_string());
        let _ = fs::remove_dir_all(&kept);
        for node in self.nodes() {
            fs::create_dir_all(kept.join(node.name()))?;
            let of_run = ["migrate", "migrate-again", "watch"].map(|log| format!("{log}-{seed}"));
            for log in LOGS.into_iter().chain(of_run.iter().map(String::as_str)) {
                let text = node.log(log);
                if !text.is_empty() {
                    fs::write(kept.join(node.name()).join(log), text)?;
                }
            }
        }
        Ok(kept.display().to_string())
    }
}

/// Mounts a node's disk and starts its services, as a boot does.
pub(crate) fn begin_services(node: &Node) -> Result<()> {
    node.sh(&format!("mount -o loop {DISK} {STATE}; chmod 700 {STATE}"))?;
    node.start_daemon()?;
    node.start_containerd()
}
