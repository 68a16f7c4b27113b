//! Container images without a registry: made from the Debian packages of the nodes' root.
//!
//! All images share their lowest layers, as real ones do: `base` (busybox and a skeleton), then
//! `libc`, then what is their own. Some layers are compressed and the last layer of redis removes a
//! file of `base`, so that every path of an unpacker is taken. Archives are made once and kept.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::fcntl::{Flock, FlockArg};

use crate::command::host;
use crate::node::Node;
use crate::oci::{self, Configuration, Layer, MTIME};
use crate::root::{Root, progress, remove_tree};
use crate::{need, pattern, place};

/// Grows when this module makes different images from the same packages.
const RECIPE: u32 = 1;
/// Where the packages of the root have PostgreSQL.
const POSTGRESQL: &str = "/usr/lib/postgresql/17";
const POSTGRESQL_SCRIPT: &str = include_str!("../images/postgresql.sh");
const LEDGER_SOURCE: &str = include_str!("../images/Ledger.java");
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
    /// The program `probe` of this crate. Three layers.
    Probe,
    /// PostgreSQL, which makes a cluster in `/data` and runs there as a user of its own
    /// (`images/postgresql.sh`).
    Postgresql,
    /// The `sqlite3` program, to be run by a shell of busybox.
    Sqlite,
    /// A JVM with the program `images/Ledger.java`.
    Jvm,
    /// What holds a pod's namespaces, and reaps what lost its parent. One layer, busybox's.
    Pause,
    /// Busybox and one layer of [`FILES`] small files.
    Files,
    /// Busybox and one layer of [`LARGE_BYTES`] that nothing compresses.
    Large,
    /// The same two layers the other way round, so that no chain ID is the same.
    Turned,
    /// Busybox and more layers, [`DEEP_LAYERS`] in all; layer N adds the file `/layers/N`.
    Deep,
}

/// How many layers: more, and some snapshotters and registries refuse an image.
pub const DEEP_LAYERS: usize = 128;

/// How many small files; each has up to two KiB, and a hundred share a directory.
pub const FILES: usize = 20_000;

/// How much, 200 MiB: in files of a tenth each.
pub const LARGE_BYTES: usize = 200 << 20;

/// What the pause container runs. The shell's `wait` takes in every child, its own or not.
const PAUSE: &str = "trap 'exit 0' TERM INT; while :; do sleep 3600 & wait; done";

impl Image {
    /// Reference by which containerd knows it.
    pub fn reference(self) -> &'static str {
        match self {
            Self::Busybox => "docker.io/library/busybox:test",
            Self::Redis => "docker.io/library/redis:test",
            Self::Memhog => "docker.io/library/memhog:test",
            Self::Probe => "docker.io/library/probe:test",
            Self::Postgresql => "docker.io/library/postgres:test",
            Self::Sqlite => "docker.io/library/sqlite:test",
            Self::Jvm => "docker.io/library/ledger:test",
            Self::Pause => "localhost/pause:test",
            Self::Files => "docker.io/library/files:test",
            Self::Large => "docker.io/library/large:test",
            Self::Turned => "docker.io/library/turned:test",
            Self::Deep => "docker.io/library/deep:test",
        }
    }

    fn file_stem(self) -> &'static str {
        match self {
            Self::Busybox => "busybox",
            Self::Redis => "redis",
            Self::Memhog => "memhog",
            Self::Probe => "probe",
            Self::Postgresql => "postgres",
            Self::Sqlite => "sqlite",
            Self::Jvm => "ledger",
            Self::Pause => "pause",
            Self::Files => "files",
            Self::Large => "large",
            Self::Turned => "turned",
            Self::Deep => "deep",
        }
    }

    fn configuration(self) -> Configuration<'static> {
        let (command, working_directory): (&[&str], _) = match self {
            Self::Busybox
            | Self::Sqlite
            | Self::Files
            | Self::Large
            | Self::Turned
            | Self::Deep => (&["/bin/sh"], "/"),
            Self::Redis => (
                &["redis-server", "--protected-mode", "no", "--save", "", "--dir", "/data"],
                "/data",
            ),
            Self::Memhog => (&["memhog"], "/"),
            Self::Probe => (&["probe", "idle"], "/"),
            Self::Postgresql => (&["postgresql.sh"], "/data"),
            Self::Jvm => {
                (&["java", "-Xmx64m", "-cp", "/app", "Ledger", "8080", "nobody", "1"], "/")
            }
            Self::Pause => (&["/bin/sh", "-c", PAUSE], "/"),
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

/// The platform of all images, as containerd's clients name it.
pub fn platform() -> String {
    format!("linux/{}", oci::architecture())
}

/// Imports an image into a node and unpacks it for `snapshotter`.
pub fn import(node: &Node, image: Image, snapshotter: &str) -> Result<()> {
    import_into("default", node, image, snapshotter)
}

/// The same where the CRI plugin looks for images.
pub fn import_for_pods(node: &Node, image: Image, snapshotter: &str) -> Result<()> {
    import_into("k8s.io", node, image, snapshotter)
}

fn import_into(namespace: &str, node: &Node, image: Image, snapshotter: &str) -> Result<()> {
    let archive = archive(image)?;
    node.command(&["ctr", "-n", namespace, "images", "import", "--snapshotter", snapshotter, "-"])
        .stdin_file(archive)
        .timeout(IMPORT_TIMEOUT)
        .ok()
        .map(drop)
}

fn key(image: Image, root: &Root) -> Result<String> {
    let root = root.path().file_name().unwrap_or_default().display();
    let mut text = format!("{RECIPE} {root}").into_bytes();
    match image {
        Image::Busybox
        | Image::Redis
        | Image::Turned
        | Image::Sqlite
        | Image::Files
        | Image::Large
        | Image::Deep => {}
        Image::Memhog | Image::Probe => {
            let program = image.file_stem();
            need::binaries(&[program])?;
            text.extend(fs::read(place::binary(program))?);
        }
        Image::Postgresql => text.extend(POSTGRESQL_SCRIPT.bytes()),
        Image::Jvm => text.extend(LEDGER_SOURCE.bytes()),
        Image::Pause => text.extend(PAUSE.bytes()),
    }
    Ok(oci::hex(&text)[..12].to_owned())
}

fn layers(image: Image, root: &Root, scratch: &Path) -> Result<Vec<Layer>> {
    let tree = |name: &str| scratch.join(name);
    stage_base(root, &tree("base"))?;
    let mut layers = vec![Layer { tree: tree("base"), gzip: false }];
    let own = tree("own");
    fs::create_dir_all(own.join("usr/bin"))?;
    let programs = match image {
        Image::Busybox | Image::Pause => return Ok(layers),
        Image::Files => {
            stage_files(&own)?;
            layers.push(Layer { tree: own, gzip: false });
            return Ok(layers);
        }
        Image::Large | Image::Turned => {
            stage_large(&own)?;
            layers.push(Layer { tree: own, gzip: true });
            if image == Image::Turned {
                layers.reverse();
            }
            return Ok(layers);
        }
        Image::Deep => {
            for number in 1..DEEP_LAYERS {
                let tree = tree(&number.to_string());
                fs::create_dir_all(tree.join("layers"))?;
                fs::write(tree.join("layers").join(number.to_string()), "")?;
                layers.push(Layer { tree, gzip: false });
            }
            return Ok(layers);
        }
        Image::Memhog | Image::Probe => {
            let program = image.file_stem();
            fs::copy(place::binary(program), own.join("usr/bin").join(program))?;
            fs::create_dir_all(own.join("data"))?;
            vec!["/usr/bin/redis-server".to_owned()]
        }
        Image::Redis => stage_redis(root, &own)?,
        Image::Sqlite => {
            let programs = ["/usr/bin/sqlite3"].map(str::to_owned);
            copy_from(root, &programs, &own)?;
            programs.to_vec()
        }
        Image::Postgresql => stage_postgresql(root, &own)?,
        Image::Jvm => stage_jvm(root, &own, &tree("app"))?,
    };
    let (libc, others): (Vec<String>, Vec<String>) =
        libraries(root, &programs)?.into_iter().partition(|path| is_libc(path));
    copy_from(root, &libc, &tree("libc"))?;
    layers.push(Layer { tree: tree("libc"), gzip: true });
    if !matches!(image, Image::Memhog | Image::Probe) {
        copy_from(root, &others, &own)?;
    }
    // Large ones are packed and unpacked often enough.
    layers.push(Layer {
        tree: own,
        gzip: matches!(image, Image::Redis | Image::Memhog | Image::Probe),
    });
    Ok(layers)
}

/// Stages what is redis's own; returns the programs whose libraries it needs.
fn stage_redis(root: &Root, own: &Path) -> Result<Vec<String>> {
    let programs = ["/usr/bin/redis-server", "/usr/bin/redis-cli"].map(str::to_owned);
    copy_from(root, &programs, own)?;
    fs::create_dir_all(own.join("data"))?;
    fs::create_dir_all(own.join("etc"))?;
    fs::write(own.join("etc/.wh.issue"), "")?;
    Ok(programs[..1].to_vec())
}

fn stage_postgresql(root: &Root, own: &Path) -> Result<Vec<String>> {
    let programs = ["initdb", "postgres", "psql"].map(|name| format!("{POSTGRESQL}/bin/{name}"));
    copy_from(root, &programs, own)?;
    let lib = format!("{POSTGRESQL}/lib");
    // Compiling queries would need another 130 MiB of libraries.
    let extensions = ["dict_snowball.so", "plpgsql.so"].map(|name| format!("{lib}/{name}"));
    copy_from(root, &extensions, own)?;
    copy_trees(root, &["usr/share/postgresql"], own)?;
    for (name, text) in [
        ("etc/passwd", "root:x:0:0:root:/root:/bin/sh\npostgres:x:70:70::/data:/bin/sh\n"),
        ("etc/group", "root:x:0:\npostgres:x:70:\n"),
        ("usr/bin/postgresql.sh", POSTGRESQL_SCRIPT),
    ] {
        fs::create_dir_all(own.join(name).parent().context("a directory")?)?;
        fs::write(own.join(name), text)?;
    }
    fs::set_permissions(own.join("usr/bin/postgresql.sh"), fs::Permissions::from_mode(0o755))?;
    symlink(
        format!("..{}/bin/psql", POSTGRESQL.trim_start_matches("/usr")),
        own.join("usr/bin/psql"),
    )?;
    Ok(programs.to_vec())
}

/// The archive of shared classes is made as the package does when it is installed. It holds the
/// time of `modules`, which is that of all files of a layer.
fn stage_jvm(root: &Root, own: &Path, app: &Path) -> Result<Vec<String>> {
    copy_trees(root, &["usr/lib/jvm", "etc/java-21-openjdk"], own)?;
    fs::create_dir_all(app)?;
    fs::create_dir_all(own.join("app"))?;
    fs::write(app.join("Ledger.java"), LEDGER_SOURCE)?;
    let script = format!(
        "cd /usr/lib/jvm/java-21-openjdk-*
         rm -rf legal man docs lib/server/classes*.jsa
         touch -d @{MTIME} lib/modules
         bin/java -Xshare:dump >/dev/null
         bin/java -m jdk.compiler/com.sun.tools.javac.Main -d /mnt /mnt/Ledger.java
         for library in $PWD/bin/java $PWD/lib/*.so $PWD/lib/server/libjvm.so; do echo $library; done"
    );
    let jvm = own.join("usr/lib/jvm");
    let programs = root.work(&[(&jvm, "/usr/lib/jvm"), (app, "/mnt")], &script)?;
    let programs: Vec<String> = programs.lines().map(str::to_owned).collect();
    fs::rename(app.join("Ledger.class"), own.join("app/Ledger.class"))?;
    let java = programs.first().context("no java")?;
    symlink(format!("..{}", java.trim_start_matches("/usr")), own.join("usr/bin/java"))?;
    Ok(programs)
}

fn stage_files(own: &Path) -> Result<()> {
    let mut state = 1;
    for number in 0..FILES {
        let directory = own.join(format!("data/{}", number / 100));
        fs::create_dir_all(&directory)?;
        let length = usize::try_from(pattern::next_random(&mut state) % 2048)?;
        let mut bytes = vec![0; length];
        pattern::fill(number as u64, 0, &mut bytes);
        fs::write(directory.join(number.to_string()), bytes)?;
    }
    Ok(())
}

fn stage_large(own: &Path) -> Result<()> {
    fs::create_dir_all(own.join("data"))?;
    let mut bytes = vec![0; LARGE_BYTES / 10];
    for number in 0..10 {
        pattern::fill(number, 3, &mut bytes);
        fs::write(own.join(format!("data/{number}")), &bytes)?;
    }
    Ok(())
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

/// Paths in the root of the libraries that programs are linked with, their loader included.
fn libraries(root: &Root, programs: &[String]) -> Result<BTreeSet<String>> {
    let words: Vec<&str> = ["ldd"].into_iter().chain(programs.iter().map(String::as_str)).collect();
    let text = root.look_up(&words)?;
    let found = text.lines().filter(|line| !line.ends_with(':'));
    let words = found.filter_map(|line| line.split_whitespace().find(|w| w.starts_with('/')));
    // /lib is a link to /usr/lib; an image must not have both.
    let paths = words
        .map(|path| format!("/usr/{}", path.trim_start_matches("/usr/").trim_start_matches('/')));
    // What a program brings along is copied with it.
    Ok(paths.filter(|path| !path.starts_with("/usr/lib/jvm/")).collect())
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

/// Copies whole trees of the root, as they are.
fn copy_trees(root: &Root, trees: &[&str], to: &Path) -> Result<()> {
    for tree in trees {
        let (from, to) = (root.path().join(tree), to.join(tree));
        fs::create_dir_all(&to)?;
        host(&["cp", "-a", &format!("{}/.", from.display()), &to.display().to_string()])?;
    }
    Ok(())
}
