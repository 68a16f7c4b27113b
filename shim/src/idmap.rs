//! Root file systems whose files belong to other users than on disk: the mount options `uidmap=`
//! and `gidmap=` of containerd's overlayfs snapshotter, which the kernel does not know.
//!
//! containerd adds them for a container in a user namespace, so that one unpacked image serves
//! containers of any mapping. They mean an ID-mapped mount (`mount_setattr(2)`):
//!
//! - overlay: of the layers below. The directory that holds them all is mounted a second time,
//!   mapped and read-only, in the bundle; overlayfs keeps mounts of its own of what it is given,
//!   and so this one goes again at once.
//! - anything else: of the mount itself.
//!
//! A mapping is handed to the kernel as a user namespace that has it. The shim's own binary makes
//! one, and holds it until the mount is mapped.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};

use nix::sched::CloneFlags;

use crate::sys;

/// Tells the binary that it is to hold a user namespace.
const HOLDER_VARIABLE: &str = "GODWIT_HOLD_USER_NAMESPACE";

/// Two lists of ranges as `/proc/PID/uid_map` takes them.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Mapping {
    uids: String,
    gids: String,
}

impl Mapping {
    /// Takes the mapping out of `options`. `None` without one.
    ///
    /// Errors: a list that is none; only one of the two.
    pub(crate) fn take(options: &mut Vec<String>) -> io::Result<Option<Self>> {
        let (uids, gids) = (take_list(options, "uidmap=")?, take_list(options, "gidmap=")?);
        match (uids, gids) {
            (Some(uids), Some(gids)) => Ok(Some(Self { uids, gids })),
            (None, None) => Ok(None),
            _ => Err(invalid("uidmap and gidmap are needed together")),
        }
    }

    /// A user namespace with this mapping. Errors: the kernel's, `EPERM` without the right to map.
    pub(crate) fn user_namespace(&self) -> io::Result<OwnedFd> {
        let mut holder = Command::new(format!("/proc/{}/exe", std::process::id()))
            .env(HOLDER_VARIABLE, "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let namespace = self.map(&mut holder);
        // The end of its input ends it; the reaper takes care of the rest.
        drop(holder.stdin.take());
        namespace
    }

    fn map(&self, holder: &mut Child) -> io::Result<OwnedFd> {
        let mut ready = [0];
        let output = holder.stdout.as_mut().ok_or_else(|| invalid("no pipe from the holder"))?;
        output.read_exact(&mut ready).map_err(|_closed| {
            io::Error::new(io::ErrorKind::PermissionDenied, "cannot make a user namespace")
        })?;
        let proc = PathBuf::from(format!("/proc/{}", holder.id()));
        std::fs::write(proc.join("uid_map"), &self.uids)?;
        std::fs::write(proc.join("gid_map"), &self.gids)?;
        Ok(File::open(proc.join("ns/user"))?.into())
    }
}

fn invalid(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, why)
}

/// `0:1000:65535,70000:5:1`, inside, outside and length of each range, as lines.
fn take_list(options: &mut Vec<String>, key: &str) -> io::Result<Option<String>> {
    let Some(place) = options.iter().position(|option| option.starts_with(key)) else {
        return Ok(None);
    };
    let option = options.remove(place);
    let mut lines = String::new();
    for range in option[key.len()..].split(',') {
        let numbers: Result<Vec<u32>, _> = range.split(':').map(str::parse).collect();
        match numbers.as_deref() {
            Ok([inside, outside, length]) => lines += &format!("{inside} {outside} {length}\n"),
            _ => return Err(invalid(&format!("{option}: {range:?} is not INSIDE:OUTSIDE:LENGTH"))),
        }
    }
    Ok(Some(lines))
}

/// A mapped, read-only mount of the directory that holds all layers. Unmounted when dropped.
pub(crate) struct Layers {
    at: PathBuf,
}

impl Layers {
    /// Mounts the layers of `options` at `at` and makes `options` name them there.
    ///
    /// Errors: the kernel's, `EINVAL` for a file system without ID-mapped mounts; no layers.
    pub(crate) fn mount(
        options: &mut [String],
        at: &Path,
        namespace: &OwnedFd,
    ) -> io::Result<Self> {
        const KEY: &str = "lowerdir=";
        let option = options.iter_mut().find(|option| option.starts_with(KEY));
        let option = option.ok_or_else(|| invalid("an overlay without lowerdir"))?;
        let layers: Vec<&Path> = option[KEY.len()..].split(':').map(Path::new).collect();
        let common = common_directory(&layers)
            .ok_or_else(|| invalid("the layers have no directory in common"))?;
        let mapped: Vec<String> = layers
            .iter()
            .map(|layer| at.join(layer.strip_prefix(&common).unwrap_or(layer)))
            .map(|layer| layer.display().to_string())
            .collect();
        std::fs::create_dir_all(at)?;
        let mounted = Self { at: at.to_owned() };
        sys::mount_mapped(&common, at, namespace, sys::Access::ReadOnly)?;
        *option = format!("{KEY}{}", mapped.join(":"));
        Ok(mounted)
    }
}

impl Drop for Layers {
    fn drop(&mut self) {
        if let Err(error) = crate::rootfs::unmount(&self.at) {
            tracing::error!("{}", crate::error::chain(&error));
            return;
        }
        let _ = std::fs::remove_dir(&self.at);
    }
}

/// The deepest directory that holds all of `paths`; none of them, and not the root.
fn common_directory(paths: &[&Path]) -> Option<PathBuf> {
    let mut common = paths.first()?.parent()?;
    while !paths.iter().all(|path| path.starts_with(common) && *path != common) {
        common = common.parent()?;
    }
    (common.parent().is_some()).then(|| common.to_owned())
}

/// Whether this process is the holder.
pub(crate) fn is_holder() -> bool {
    std::env::var_os(HOLDER_VARIABLE).is_some()
}

/// The holder: makes a user namespace, says so, and ends with its input.
pub(crate) fn holder_main() -> ExitCode {
    use std::io::Write as _;
    if nix::sched::unshare(CloneFlags::CLONE_NEWUSER).is_err()
        || io::stdout().write_all(b"\n").and_then(|()| io::stdout().flush()).is_err()
    {
        return ExitCode::FAILURE;
    }
    let _ = io::copy(&mut io::stdin(), &mut io::sink());
    ExitCode::SUCCESS
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(list: &[&str]) -> Vec<String> {
        list.iter().map(|option| (*option).to_owned()).collect()
    }

    #[test]
    fn mappings_are_taken_out_of_the_options() {
        let mut both =
            options(&["index=off", "uidmap=0:1000:65535,70000:5:1", "gidmap=0:2000:65535"]);
        let mapping = Mapping::take(&mut both).unwrap().unwrap();
        assert_eq!(mapping.uids, "0 1000 65535\n70000 5 1\n");
        assert_eq!(mapping.gids, "0 2000 65535\n");
        assert_eq!(both, ["index=off"]);
        assert_eq!(Mapping::take(&mut both).unwrap(), None);
        for wrong in [&["uidmap=0:1:2"][..], &["uidmap=0:1", "gidmap=0:1:2"], &["gidmap=x"]] {
            assert!(Mapping::take(&mut options(wrong)).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn the_common_directory_holds_all_layers() {
        let common =
            |paths: &[&str]| common_directory(&paths.iter().map(Path::new).collect::<Vec<_>>());
        assert_eq!(common(&["/s/12/fs", "/s/13/fs"]), Some("/s".into()));
        assert_eq!(common(&["/s/12/fs"]), Some("/s/12".into()));
        assert_eq!(common(&["/s/1", "/s/1/fs"]), Some("/s".into()));
        assert_eq!(common(&["/a/fs", "/b/fs"]), None);
        assert_eq!(common(&["relative"]), None);
    }
}
