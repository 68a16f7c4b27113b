//! Runs a test binary in a virtual machine under Debian's own kernel: cgroups of version 2 alone,
//! soft-dirty, and every capability. `make test-vm` has cargo call it in place of the binary.
//!
//! The machine is QEMU without hardware's help (one processor, some ten times slower): its first
//! disk is the nodes' Debian root with a kernel, made once; its second this build. In it the binary
//! starts test nodes as it does anywhere. Neither disk is written to: QEMU throws changes away. The
//! exit code is the binary's.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use godwit_tests::root::{self, Root};
use godwit_tests::{Invocation, need, place};

/// How long the machine may run.
const RUN_MAX: Duration = Duration::from_secs(3600);
/// How long making a disk may take.
const DISK_MAX: Duration = Duration::from_secs(900);
/// Size of either disk; sparse.
const DISK_SIZE: &str = "8G";
const MEMORY: &str = "4096";
const INIT: &str = include_str!("../../vm/init.sh");
/// Puts Debian's kernel for clouds into the root: its modules, and itself as `/vmlinuz`. It is
/// unpacked, not installed, since installing it would bring what makes an initial file system,
/// which is not used.
const ADD_KERNEL: &str = "
apt-get -q update
apt-get -q -y --no-install-recommends install kmod
package=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: //p' | head -n 1)
cd /tmp
apt-get -q download \"$package\"
dpkg-deb -x linux-image-*.deb /
rm linux-image-*.deb
mv /boot/vmlinuz-* /vmlinuz
depmod \"$(ls /usr/lib/modules)\"
rm -r /var/lib/apt/lists
";

fn main() -> Result<()> {
    need::root()?;
    let command: Vec<String> = std::env::args().skip(1).collect();
    if command.is_empty() {
        bail!("usage: vm TEST-BINARY [ARGUMENT...]");
    }
    let (kernel, system) = system()?;
    let build = build(&command)?;
    let code = boot(&kernel, &system, &build);
    fs::remove_file(&build)?;
    match code? {
        0 => Ok(()),
        code => bail!("in the virtual machine: exit code {code}"),
    }
}

/// The kernel and the first disk, made if they are not there.
fn system() -> Result<(PathBuf, PathBuf)> {
    let root = Root::open()?;
    let key = root.path().file_name().context("a root without a name")?;
    let home = place::testbed().join("vm");
    // A kernel wants the modules of its own disk.
    let [kernel, disk] = ["vmlinuz", "ext4"].map(|kind| home.join(key).with_extension(kind));
    if disk.is_file() {
        return Ok((kernel, disk));
    }
    eprintln!("vm: making a disk with Debian's kernel (once, some minutes)");
    fs::create_dir_all(&home)?;
    let scratch = tempfile::tempdir_in(&home)?;
    let (upper, work, merged) =
        (scratch.path().join("upper"), scratch.path().join("work"), scratch.path().join("merged"));
    for directory in [&upper, &work, &merged] {
        fs::create_dir(directory)?;
    }
    let init = upper.join("init");
    fs::write(&init, INIT)?;
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755))?;
    let unfinished = disk.with_extension("tmp");
    let script = "
        mount -t overlay overlay -o lowerdir=$1,upperdir=$2,workdir=$3 $4
        mount -t proc proc $4/proc
        chroot $4 sh -e -c \"$7\"
        umount $4/proc
        cp $4/vmlinuz $5
        mkfs.ext4 -q -F -d $4 $6 $8";
    let paths = [root.path(), &upper, &work, &merged, &kernel, &unfinished];
    let mut words = vec!["unshare", "-m", "sh", "-e", "-c", script, "make-disk"];
    let paths: Vec<String> = paths.iter().map(|path| path.display().to_string()).collect();
    words.extend(paths.iter().map(String::as_str));
    words.extend([ADD_KERNEL, DISK_SIZE]);
    Invocation::new(&words).timeout(DISK_MAX).ok()?;
    fs::rename(&unfinished, &disk)?;
    Ok((kernel, disk))
}

/// The second disk: the programs of this build and what is to be run.
fn build(command: &[String]) -> Result<PathBuf> {
    let scratch = tempfile::tempdir_in(place::testbed())?;
    let below = |path: &Path| -> Result<PathBuf> {
        let inside = path
            .strip_prefix(place::workspace())
            .with_context(|| format!("{} does not lie in the workspace", path.display()))?;
        let to = scratch.path().join(inside);
        fs::create_dir_all(to.parent().context("a path without a parent")?)?;
        Ok(to)
    };
    let test = PathBuf::from(&command[0]);
    let programs = ["containerd-shim-godwit-v1", "godwit-snapshotter", "godwit", "memhog"];
    for file in programs.map(place::binary).iter().chain([&test]) {
        fs::copy(file, below(file)?).with_context(|| format!("copy {}", file.display()))?;
    }
    for tree in [place::workspace().join("docs/deploy"), place::testbed().join("images")] {
        let to = below(&tree)?;
        Invocation::new(&["cp".as_ref(), "-a".as_ref(), tree.as_os_str(), to.as_os_str()]).ok()?;
    }
    let words: Vec<String> = command.iter().map(|word| quoted(word)).collect();
    let settings = format!(
        "WORKSPACE={}\nROOT={}\nRUN={}\n",
        quoted(&place::workspace().display().to_string()),
        quoted(&root::path_of(true).display().to_string()),
        quoted(&words.join(" ")),
    );
    fs::write(scratch.path().join("godwit-vm"), settings)?;
    let disk = place::testbed().join(format!("vm/build-{}.ext4", std::process::id()));
    let [from, to] = [scratch.path(), &disk].map(|path| path.display().to_string());
    let mkfs = ["mkfs.ext4", "-q", "-F", "-d", &from, &to, DISK_SIZE];
    Invocation::new(&mkfs).timeout(DISK_MAX).ok()?;
    Ok(disk)
}

/// As one word of shell.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', "'\\''"))
}

/// Runs the machine, shows what it says, and returns the exit code that it names.
fn boot(kernel: &Path, system: &Path, build: &Path) -> Result<i32> {
    let drive = |path: &Path, id: &str| {
        format!("file={},if=none,format=raw,snapshot=on,id={id}", path.display())
    };
    // Other processors and more than one of them crash the guest under emulation.
    let machine = ["-accel", "tcg", "-cpu", "Westmere,-cx16", "-smp", "1", "-m", MEMORY];
    let quiet = ["-display", "none", "-serial", "stdio", "-monitor", "none", "-nic", "none"];
    let line = "root=/dev/nvme0n1 rw init=/init console=ttyS0 quiet panic=-1 random.trust_cpu=on";
    let mut child = Command::new("timeout")
        .arg(RUN_MAX.as_secs().to_string())
        .arg("qemu-system-x86_64")
        .args(machine)
        .args(quiet)
        .arg("-no-reboot")
        .arg("-kernel")
        .arg(kernel)
        .args(["-append", line])
        .args(["-drive", &drive(system, "system"), "-device", "nvme,drive=system,serial=system"])
        .args(["-drive", &drive(build, "build"), "-device", "nvme,drive=build,serial=build"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("start qemu-system-x86_64")?;
    let said = BufReader::new(child.stdout.take().context("the machine's console")?);
    let (mut code, mut out) = (None, std::io::stdout().lock());
    for line in said.split(b'\n') {
        let line = line?;
        out.write_all(&line)?;
        out.write_all(b"\n")?;
        let text = String::from_utf8_lossy(&line);
        if let Some(named) = text.trim().strip_prefix("godwit-vm: exit code ") {
            code = named.parse().ok();
        }
    }
    let ended = child.wait()?;
    code.with_context(|| format!("the machine said no exit code; it {ended}"))
}
