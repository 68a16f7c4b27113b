//! The Debian root that every node's overlay lies on. Made once per list of packages, then only
//! read.
//!
//! 1. take the lock `root.lock` (the second process waits and then finds the root);
//! 2. `debootstrap` Debian 13 with [`PACKAGES`] into `root/<key>.tmp`, packages cached in `debs`;
//! 3. install CRIU from forky: Debian 13's cannot dump a process with a socket on Linux >= 6.16;
//!    put containerd 2 from sid beside Debian 13's, and unpack Docker and what only images are made
//!    of;
//! 4. where the capability is missing, compile the preload library and put a wrapper before CRIU;
//! 5. rename to `root/<key>`.
//!
//! The key is a hash of everything above, so a changed list makes a new root. A root without step 5
//! is never used: the next call removes it and begins again.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};
use sha2::{Digest, Sha256};

use crate::command::{Invocation, host};
use crate::{mirror, need, place};

/// Debian release of the nodes.
pub const RELEASE: &str = "trixie";
/// Release that CRIU comes from.
pub const CRIU_RELEASE: &str = "forky";
/// Release that containerd 2 comes from.
pub const CONTAINERD_2_RELEASE: &str = "sid";
/// Where it lies in a node; its programs are below `usr/bin`.
pub const CONTAINERD_2: &str = "/opt/containerd-2";
/// What nodes have besides a minimal Debian.
pub const PACKAGES: &[&str] = &[
    "attr",
    "busybox-static",
    "containerd",
    "containernetworking-plugins",
    "crun",
    "docker-registry",
    "e2fsprogs",
    "etcd-server",
    "faketime",
    "iproute2",
    "iptables",
    "iputils-arping",
    "iputils-ping",
    "libicu76",
    "libpq5",
    "libxml2",
    "nftables",
    "procps",
    "redis-server",
    "redis-tools",
    "runc",
    "sqlite3",
    "strace",
    "tini",
    "xfsprogs",
];
/// Docker, and what only images are made of: unpacked, but not installed, as that would start
/// servers and take long.
pub const UNPACKED: &[&str] = &[
    "docker-cli",
    "docker.io",
    "openjdk-21-jre-headless",
    "postgresql-17",
    "postgresql-client-17",
];
/// Grows when this module makes a different root from the same packages.
const RECIPE: u32 = 1;
/// How long debootstrap or apt may take, on a slow mirror.
const INSTALL_TIMEOUT: Duration = Duration::from_secs(1800);
/// How long making a part of an image may take.
const WORK_TIMEOUT: Duration = Duration::from_secs(300);

const PRELOAD_SOURCE: &str = include_str!("../preload/criu-preload.c");
const CRIU_WRAPPER: &str = "#!/bin/sh
LD_PRELOAD=/usr/local/lib/godwit/criu-preload.so exec /usr/sbin/criu \"$@\"
";
const APT_CONFIGURATION: &str = "APT::Default-Release \"trixie\";
APT::Install-Recommends \"false\";
Acquire::Check-Valid-Until \"false\";
";

/// A finished Debian root. Nodes mount it as the lower layer of an overlay; nothing writes to it.
#[derive(Clone, Debug)]
pub struct Root {
    path: PathBuf,
}

impl Root {
    /// Opens the root, making it first if it is not there (about a minute with a near mirror).
    ///
    /// Errors: not root; no mirror; debootstrap, apt or the C compiler fail.
    pub fn open() -> Result<Self> {
        need::root()?;
        let roots = place::testbed().join("root");
        fs::create_dir_all(&roots).with_context(|| format!("create {}", roots.display()))?;
        let lock = fs::File::create(place::testbed().join("root.lock"))?;
        let _lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, errno)| errno)?;
        let path = path_of(may_raise_limits()?);
        if !path.is_dir() {
            build(&path).context("make the Debian root of the test nodes")?;
        }
        Ok(Self { path })
    }

    /// The root's directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Runs a command in a plain chroot of the root. For looking things up, not for changing it.
    pub fn look_up(&self, argv: &[&str]) -> Result<String> {
        chroot(&self.path, argv).ok()
    }

    /// Runs a line of shell in a chroot with `/proc` and with a directory of the host at each of
    /// `bound`, from which it may be changed.
    pub fn work(&self, bound: &[(&Path, &str)], script: &str) -> Result<String> {
        let root = self.path.display();
        let mut all = format!("mount -t proc proc {root}/proc\n");
        for (from, to) in bound {
            let _ = writeln!(all, "mount --bind {} {root}{to}", from.display());
        }
        all.push_str("exec chroot \"$0\" sh -e -c \"$1\"");
        let words =
            ["unshare", "-m", "sh", "-e", "-c", &all, &self.path.display().to_string(), script];
        Invocation::new(&words).timeout(WORK_TIMEOUT).ok()
    }
}

/// Where the root of a machine lies: it depends on whether it has CAP_SYS_RESOURCE.
pub fn path_of(may_raise_limits: bool) -> PathBuf {
    let mut hash = Sha256::new();
    hash.update(format!(
        "{RECIPE} {RELEASE} {CRIU_RELEASE} {CONTAINERD_2_RELEASE} {PACKAGES:?} {UNPACKED:?} {APT_CONFIGURATION}"
    ));
    if !may_raise_limits {
        hash.update(PRELOAD_SOURCE);
        hash.update(CRIU_WRAPPER);
    }
    let key: String = hash.finalize().iter().take(6).map(|byte| format!("{byte:02x}")).collect();
    place::testbed().join("root").join(key)
}

/// Whether this process has CAP_SYS_RESOURCE, without which CRIU needs the preload library.
fn may_raise_limits() -> Result<bool> {
    const CAP_SYS_RESOURCE: u32 = 24;
    let status = fs::read_to_string("/proc/self/status")?;
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.context("/proc/self/status has no CapEff line")?;
    Ok(u64::from_str_radix(effective.trim(), 16)? & (1 << CAP_SYS_RESOURCE) != 0)
}

fn build(path: &Path) -> Result<()> {
    let mirror = mirror::address()?;
    let unfinished = path.with_extension("tmp");
    if unfinished.exists() {
        remove_tree(&unfinished)?;
    }
    let debs = place::testbed().join("debs");
    fs::create_dir_all(&debs)?;
    progress(&format!("making a Debian {RELEASE} root from {mirror} (once, about a minute)"));
    let include = format!("--include={}", PACKAGES.join(","));
    let cache = format!("--cache-dir={}", debs.display());
    let target = unfinished.display().to_string();
    let command = ["debootstrap", "--variant=minbase", &cache, &include, RELEASE, &target, &mirror];
    Invocation::new(&command).timeout(INSTALL_TIMEOUT).ok()?;

    progress(&format!("installing CRIU from {CRIU_RELEASE}"));
    install_criu(&unfinished, &debs, &mirror)?;
    progress(&format!("unpacking containerd 2 from {CONTAINERD_2_RELEASE}"));
    unpack_containerd_2(&unfinished, &mirror)?;
    unpack(&unfinished, UNPACKED, "/").context("unpack Docker and what images are made of")?;
    if !may_raise_limits()? {
        progress("no CAP_SYS_RESOURCE here: putting a preload library before CRIU");
        install_preload(&unfinished)?;
    }
    let version = chroot(&unfinished, &["criu", "--version"]).ok()?;
    for cached in ["var/cache/apt/archives", "var/lib/apt/lists"] {
        empty_directory(&unfinished.join(cached))?;
    }
    fs::rename(&unfinished, path)?;
    progress(&format!("root is ready: {} (CRIU {})", path.display(), version.trim()));
    Ok(())
}

fn install_criu(root: &Path, debs: &Path, mirror: &str) -> Result<()> {
    let archives = root.join("var/cache/apt/archives");
    fs::create_dir_all(root.join("etc/apt/sources.list.d"))?;
    fs::write(
        root.join("etc/apt/sources.list.d/criu.list"),
        format!("deb {mirror} {CRIU_RELEASE} main\n"),
    )?;
    fs::write(root.join("etc/apt/apt.conf.d/90test-node"), APT_CONFIGURATION)?;
    copy_debs(debs, &archives)?;
    let apt = |arguments: &[&str]| chroot(root, arguments).timeout(INSTALL_TIMEOUT).ok();
    apt(&["apt-get", "-q", "update"])?;
    apt(&["apt-get", "-q", "-y", "install", "-t", CRIU_RELEASE, "criu"])?;
    copy_debs(&archives, debs)
}

/// Puts containerd 2 beside the installed one. Nothing else of its release comes along.
fn unpack_containerd_2(root: &Path, mirror: &str) -> Result<()> {
    let sources = root.join("etc/apt/sources.list.d/containerd-2.list");
    fs::write(&sources, format!("deb {mirror} {CONTAINERD_2_RELEASE} main\n"))?;
    unpack(root, &[&format!("containerd/{CONTAINERD_2_RELEASE}")], CONTAINERD_2)?;
    Ok(fs::remove_file(&sources)?)
}

/// Unpacks the files of packages below `to`, without what they depend on.
fn unpack(root: &Path, packages: &[&str], to: &str) -> Result<()> {
    let script = "apt-get -q update && mkdir -p \"$1\" /var/unpack && cd /var/unpack && to=$1 && shift \
         && apt-get -q download \"$@\" && for package in *.deb; do dpkg-deb -x \"$package\" \"$to\"; done \
         && rm -r /var/unpack";
    let command = [&["sh", "-e", "-c", script, "unpack", to], packages].concat();
    chroot(root, &command).timeout(INSTALL_TIMEOUT).ok().map(drop)
}

/// Copies the packages that are in `from` and not in `to`.
fn copy_debs(from: &Path, to: &Path) -> Result<()> {
    for entry in fs::read_dir(from)? {
        let source = entry?.path();
        let Some(name) = source.file_name() else { continue };
        let is_deb = source.extension().is_some_and(|extension| extension == "deb");
        if is_deb && !to.join(name).exists() {
            fs::copy(&source, to.join(name))?;
        }
    }
    Ok(())
}

fn install_preload(root: &Path) -> Result<()> {
    let library = root.join("usr/local/lib/godwit");
    fs::create_dir_all(&library)?;
    let source = library.join("criu-preload.c");
    fs::write(&source, PRELOAD_SOURCE)?;
    compile_library(&source, &library.join("criu-preload.so"))?;
    let wrapper = root.join("usr/local/bin/criu");
    fs::write(&wrapper, CRIU_WRAPPER)?;
    fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

/// Makes a library to be loaded before the others. Errors: the C compiler fails.
pub(crate) fn compile_library(source: &Path, object: &Path) -> Result<()> {
    let mut words = ["cc", "-O2", "-Wall", "-shared", "-fPIC", "-o"].map(OsStr::new).to_vec();
    words.extend([object.as_os_str(), source.as_os_str(), OsStr::new("-ldl")]);
    Invocation::new(&words).ok().map(drop)
}

fn chroot(root: &Path, argv: &[&str]) -> Invocation {
    let mut command = vec!["chroot".to_owned(), root.display().to_string()];
    command.extend(argv.iter().map(|&word| word.to_owned()));
    Invocation::new(&command).environment(&[
        ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
        ("HOME", "/root"),
        ("LC_ALL", "C.UTF-8"),
        ("DEBIAN_FRONTEND", "noninteractive"),
    ])
}

fn empty_directory(directory: &Path) -> Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Removes a directory tree, unmounting first what is mounted in it (debootstrap mounts /proc).
///
/// Errors: a mount stays, or the tree spans file systems: better left than half the host removed.
pub(crate) fn remove_tree(tree: &Path) -> Result<()> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let prefix = format!("{}/", tree.display());
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(4));
    for point in points.rev().filter(|point| point.starts_with(&prefix)) {
        host(&["umount", "--lazy", point])?;
    }
    if !tree.exists() {
        return Ok(());
    }
    let parent = tree.parent().context("a tree without a parent")?;
    if fs::symlink_metadata(tree)?.dev() != fs::symlink_metadata(parent)?.dev() {
        bail!("{} is a file system of its own, not removing it", tree.display());
    }
    let tree_words = tree.display().to_string();
    let remove = ["rm", "-r", "-f", "--one-file-system", "--", &tree_words];
    if host(&remove).is_err() {
        // A test that failed may have left immutable files.
        let _ = host(&["chattr", "-R", "-f", "-i", "-a", &tree_words]);
        host(&remove)?;
    }
    Ok(())
}

/// Says what takes so long, on standard error.
pub(crate) fn progress(text: &str) {
    eprintln!("testbed: {text}");
}
