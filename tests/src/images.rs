//! Container images without a registry: made from the Debian packages of the nodes' root.
//!
//! All images share their lowest layers, as real ones do: `base` (busybox and a skeleton), then
//! `libc`, then what is their own. Some layers are compressed and the last layer of redis removes a
//! file of `base`, so that every path of an unpacker is taken. Archives are made once and kept.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::fcntl::{Flock, FlockArg};

use crate::node::Node;
use crate::oci::{self, Configuration, Layer};
use crate::root::{Root, progress, remove_tree};
use crate::{need, place};

/// Grows when this module makes different images from the same packages.
const RECIPE: u32 = 1;
/// How long an import may take.
const IMPORT_TIMEOUT: Duration = Duration::from_secs(180);

/// An image that the suites use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Image {
    /// Static busybox with all its names; runs `sh`. One layer.
    Busybox,
    /// redis-server listening on every address, without persistence unless told so. Three layers.
    Redis,
    /// The program `memhog` of this crate. Three layers.
    Memhog,
}

impl Image {
    /// Reference by which containerd knows it.
    pub fn reference(self) -> &'static str {
        match self {
            Self::Busybox => "docker.io/library/busybox:test",
            Self::Redis => "docker.io/library/redis:test",
            Self::Memhog => "docker.io/library/memhog:test",
        }
    }

    fn file_stem(self) -> &'static str {
        match self {
            Self::Busybox => "busybox",
            Self::Redis => "redis",
            Self::Memhog => "memhog",
        }
    }

    fn configuration(self) -> Configuration<'static> {
        let (command, working_directory): (&[&str], _) = match self {
            Self::Busybox => (&["/bin/sh"], "/"),
            Self::Redis => (
                &["redis-server", "--protected-mode", "no", "--save", "", "--dir", "/data"],
                "/data",
            ),
            Self::Memhog => (&["memhog"], "/"),
        };
        Configuration { command, working_directory }
    }
}

/// Path of an image's archive, which is made first if need be.
pub fn archive(image: Image) -> Result<PathBuf> {
    let root = Root::open()?;
    let images = place::testbed().join("images");
    fs::create_dir_all(&images)?;
    let lock = Flock::lock(fs::File::create(images.join("lock"))?, FlockArg::LockExclusive);
    let _lock = lock.map_err(|(_, errno)| errno)?;
    let path = images.join(format!("{}-{}.tar", image.file_stem(), key(image, &root)?));
    if !path.is_file() {
        progress(&format!("making image {}", image.reference()));
        let scratch = images.join("scratch");
        remove_tree(&scratch)?;
        fs::create_dir_all(scratch.join("image"))?;
        let layers = layers(image, &root, &scratch)?;
        let (unfinished, image_directory) = (scratch.join("archive"), scratch.join("image"));
        let configuration = image.configuration();
        oci::write_archive(
            image.reference(),
            &layers,
            &configuration,
            &image_directory,
            &unfinished,
        )?;
        fs::rename(&unfinished, &path)?;
        remove_tree(&scratch)?;
    }
    Ok(path)
}

/// Imports an image into a node and unpacks it for `snapshotter`.
pub fn import(node: &Node, image: Image, snapshotter: &str) -> Result<()> {
    let archive = archive(image)?;
    node.command(&["ctr", "images", "import", "--snapshotter", snapshotter, "-"])
        .stdin_file(archive)
        .timeout(IMPORT_TIMEOUT)
        .ok()
        .map(drop)
}

fn key(image: Image, root: &Root) -> Result<String> {
    let root = root.path().file_name().unwrap_or_default().display();
    let mut text = format!("{RECIPE} {root}").into_bytes();
    if image == Image::Memhog {
        need::binaries(&["memhog"])?;
        text.extend(fs::read(place::binary("memhog"))?);
    }
    Ok(oci::hex(&text)[..12].to_owned())
}

fn layers(image: Image, root: &Root, scratch: &Path) -> Result<Vec<Layer>> {
    let tree = |name: &str| scratch.join(name);
    stage_base(root, &tree("base"))?;
    let mut layers = vec![Layer { tree: tree("base"), gzip: false }];
    if image == Image::Busybox {
        return Ok(layers);
    }
    let libraries = libraries(root, "/usr/bin/redis-server")?;
    let (libc, others): (Vec<String>, Vec<String>) =
        libraries.into_iter().partition(|path| is_libc(path));
    copy_from(root, &libc, &tree("libc"))?;
    layers.push(Layer { tree: tree("libc"), gzip: true });
    let own = tree("own");
    if image == Image::Redis {
        copy_from(root, &others, &own)?;
        copy_from(root, &["/usr/bin/redis-server".into(), "/usr/bin/redis-cli".into()], &own)?;
        fs::create_dir_all(own.join("data"))?;
        fs::create_dir_all(own.join("etc"))?;
        fs::write(own.join("etc/.wh.issue"), "")?;
    } else {
        fs::create_dir_all(own.join("usr/bin"))?;
        fs::copy(place::binary("memhog"), own.join("usr/bin/memhog"))?;
        fs::create_dir_all(own.join("data"))?;
    }
    layers.push(Layer { tree: own, gzip: true });
    Ok(layers)
}

fn stage_base(root: &Root, tree: &Path) -> Result<()> {
    for directory in ["data", "dev", "etc", "proc", "root", "run", "sys", "tmp", "var", "usr/bin"] {
        fs::create_dir_all(tree.join(directory))?;
    }
    fs::set_permissions(tree.join("tmp"), fs::Permissions::from_mode(0o1777))?;
    for name in ["lib", "lib64", "sbin"] {
        fs::create_dir_all(tree.join("usr").join(name))?;
        symlink(format!("usr/{name}"), tree.join(name))?;
    }
    symlink("usr/bin", tree.join("bin"))?;
    fs::write(
        tree.join("etc/passwd"),
        "root:x:0:0:root:/root:/bin/sh\nredis:x:101:101::/:/bin/sh\n",
    )?;
    fs::write(tree.join("etc/group"), "root:x:0:\nredis:x:101:\n")?;
    fs::write(tree.join("etc/issue"), "a file that a higher layer removes\n")?;
    copy_from(root, &["/usr/bin/busybox".into()], tree)?;
    for name in root.look_up(&["busybox", "--list"])?.lines().filter(|&name| name != "busybox") {
        symlink("busybox", tree.join("usr/bin").join(name))?;
    }
    Ok(())
}

/// Paths in the root of the libraries that a program is linked with, its loader included.
fn libraries(root: &Root, program: &str) -> Result<Vec<String>> {
    let text = root.look_up(&["ldd", program])?;
    let words =
        text.lines().filter_map(|line| line.split_whitespace().find(|w| w.starts_with('/')));
    // /lib is a link to /usr/lib; an image must not have both.
    Ok(words
        .map(|path| format!("/usr/{}", path.trim_start_matches("/usr/").trim_start_matches('/')))
        .collect())
}

fn is_libc(path: &str) -> bool {
    ["ld-linux", "libc.so", "libm.so", "libgcc_s.so"].iter().any(|name| path.contains(name))
}

/// Copies files of the root, by their paths in it; a link becomes the file that it leads to.
fn copy_from(root: &Root, paths: &[String], tree: &Path) -> Result<()> {
    for path in paths {
        let from = root.path().join(path.trim_start_matches('/'));
        let to = tree.join(path.trim_start_matches('/'));
        fs::create_dir_all(to.parent().context("a path without a parent")?)?;
        fs::copy(&from, &to).with_context(|| format!("copy {}", from.display()))?;
    }
    Ok(())
}
