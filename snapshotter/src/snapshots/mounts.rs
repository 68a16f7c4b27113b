//! What containerd mounts to see a snapshot.

use std::fs;
use std::path::PathBuf;

use containerd_client::types::Mount;

use super::metadata::Chain;
use super::{Kind, Snapshotter};

impl Snapshotter {
    /// overlayfs needs two trees at least, so a single one is bound.
    pub(super) fn mounts_of(&self, chain: &Chain) -> Vec<Mount> {
        let text = |path: PathBuf| path.to_string_lossy().into_owned();
        let own = chain.row.number;
        let writable = chain.row.kind == Kind::Active;
        let single = match chain.parents.as_slice() {
            [] => Some(own),
            [parent] if !writable => Some(*parent),
            _ => None,
        };
        if let Some(number) = single {
            return vec![Mount {
                r#type: "bind".to_owned(),
                source: text(self.upper(number)),
                target: String::new(),
                options: vec![if writable { "rw" } else { "ro" }.to_owned(), "rbind".to_owned()],
            }];
        }
        let lower: Vec<_> = chain.parents.iter().map(|parent| text(self.upper(*parent))).collect();
        let mut options = Vec::new();
        if writable {
            options.push(format!("workdir={}", text(self.tree(own).join("work"))));
            options.push(format!("upperdir={}", text(self.upper(own))));
        }
        options.push(format!("lowerdir={}", lower.join(":")));
        options.extend_from_slice(&self.overlay_options);
        let overlay = || "overlay".to_owned();
        vec![Mount { r#type: overlay(), source: overlay(), target: String::new(), options }]
    }
}

/// Options of every overlay, on this kernel and where this process runs.
pub(super) fn overlay_options() -> Vec<String> {
    let has_index = fs::exists("/sys/module/overlay/parameters/index").unwrap_or(false);
    overlay_options_for(has_index, &fs::read_to_string("/proc/self/uid_map").unwrap_or_default())
}

/// Options of every overlay, by whether the kernel knows `index`, and the process's `uid_map`.
/// docs/snapshotter.md says why these and no others.
fn overlay_options_for(has_index: bool, ids: &str) -> Vec<String> {
    // The first user namespace maps all ids to themselves (user_namespaces(7)).
    let in_user_namespace = !ids.is_empty() && !ids.split_whitespace().eq(["0", "0", "4294967295"]);
    let options = [("index=off", has_index), ("userxattr", in_user_namespace)];
    let wanted = options.into_iter().filter(|(_, is_wanted)| *is_wanted);
    wanted.map(|(option, _)| option.to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlays_get_what_the_kernel_and_the_user_namespace_ask_for_and_no_more() {
        let first = "         0          0 4294967295\n";
        let other = "         0     100000      65536\n";
        assert_eq!(overlay_options_for(true, first), ["index=off"]);
        assert_eq!(overlay_options_for(true, other), ["index=off", "userxattr"]);
        assert_eq!(overlay_options_for(false, other), ["userxattr"]);
        assert!(overlay_options_for(false, first).is_empty());
    }
}
