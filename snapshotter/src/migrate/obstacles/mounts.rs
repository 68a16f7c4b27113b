//! Mounts of the container that stand in the way, and bind mounts, whose sources the destination
//! must have.

use std::fs;
use std::path::Path;

use oci_spec::runtime::{LinuxNamespaceType, Mount};

use super::{Bind, Container, Findings};

/// User namespaces and ID-mapped mounts: CRIU would restore the mounts without the mapping.
pub(super) fn user_namespace(container: &Container, found: &mut Findings) {
    let linux = container.spec.linux().as_ref();
    let namespaces = linux.and_then(|linux| linux.namespaces().as_deref()).unwrap_or_default();
    if namespaces.iter().any(|one| one.typ() == LinuxNamespaceType::User) {
        found.obstacle(
            "the container has a user namespace",
            "files of its ID-mapped root file system cannot be restored",
            "start it without --uidmap and --gidmap",
        );
    }
}

/// Bind mounts whose source was removed or replaced on the host since the container started: it
/// still has the old one, which has no path any more. The others are listed for the destination.
pub(super) fn removed_sources(container: &Container, found: &mut Findings) {
    let mounts = container.init().map(|init| init.mounts.as_slice()).unwrap_or_default();
    for bind in container.spec.mounts().iter().flatten().filter(|mount| is_bind(mount)) {
        let point = bind.destination();
        let source = bind.source().as_deref().unwrap_or(Path::new(""));
        // The last of those that lie on each other is the one that is seen.
        let mounted = mounts.iter().rfind(|mount| mount.point == *point);
        if mounted.is_some_and(|mount| mount.root.ends_with("//deleted")) {
            let (source, point) = (source.display(), point.display());
            found.obstacle(
                format!("the source of the bind mount {source} at {point} was removed or replaced"),
                "the container still has the old one, of which the host has no path any more",
                "start the container again, so that it mounts the new one",
            );
        } else if !source.as_os_str().is_empty() {
            found.binds.push(Bind {
                source: source.to_string_lossy().into_owned(),
                point: point.to_string_lossy().into_owned(),
                is_directory: fs::metadata(source).is_ok_and(|metadata| metadata.is_dir()),
            });
        }
    }
}

fn is_bind(mount: &Mount) -> bool {
    let has_option = |option: &String| option == "bind" || option == "rbind";
    mount.typ().as_deref() == Some("bind") || mount.options().iter().flatten().any(has_option)
}
