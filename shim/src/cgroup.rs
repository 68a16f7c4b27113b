//! Where a process's control groups lie, and what the shim does with them beside counting: freezing
//! and looking for stopped tasks. Works with version 1, version 2 and both side by side.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use criu_wrapper::held::Freezer;
use nix::sched::CpuSet;

/// Processors of the node, in the form of cpuset's files.
const ONLINE: &str = "/sys/devices/system/cpu/online";

/// Depth and number of groups below a container's own that are looked at.
const GROUPS_MAX: usize = 4096;

/// The control groups of one process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Cgroup {
    /// Directory by controller, for example `memory`, `name=systemd`.
    V1(HashMap<String, PathBuf>),
    /// The one directory.
    V2(PathBuf),
}

impl Cgroup {
    /// The groups of process `pid`. Errors: I/O; not found when the process is gone.
    pub(crate) fn of(pid: u32) -> io::Result<Self> {
        let membership = std::fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
        let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
        resolve(&membership, &mounts).ok_or_else(|| {
            io::Error::new(io::ErrorKind::NotFound, "no cgroup hierarchy is mounted")
        })
    }

    /// Directory that holds the files of `controller`.
    pub(crate) fn dir(&self, controller: &str) -> Option<&Path> {
        match self {
            Self::V1(dirs) => dirs.get(controller).map(PathBuf::as_path),
            Self::V2(dir) => Some(dir),
        }
    }

    /// The group that freezes its tasks. `None` without a freezer.
    pub(crate) fn freezer(&self) -> Option<Freezer> {
        match self {
            Self::V1(dirs) => Some(Freezer::new(dirs.get("freezer")?, false)),
            Self::V2(dir) => Some(Freezer::new(dir, true)),
        }
    }

    /// Every process in the group and in those below it, in the shim's pid namespace.
    pub(crate) fn processes(&self) -> BTreeSet<u32> {
        let dirs: Vec<&Path> = match self {
            // The runtime puts the processes into every controller's group alike.
            Self::V1(_) => ["pids", "freezer", "memory", "name=systemd"]
                .iter()
                .find_map(|controller| self.dir(controller))
                .into_iter()
                .collect(),
            Self::V2(dir) => vec![dir],
        };
        let mut pids = BTreeSet::new();
        let mut queue: Vec<PathBuf> = dirs.into_iter().map(Path::to_owned).collect();
        let mut seen = 0;
        while let Some(dir) = queue.pop().filter(|_| seen < GROUPS_MAX) {
            seen += 1;
            let text = std::fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
            pids.extend(text.lines().filter_map(|line| line.parse::<u32>().ok()));
            let below = std::fs::read_dir(&dir).into_iter().flatten().flatten();
            queue.extend(
                below.filter(|e| e.file_type().is_ok_and(|kind| kind.is_dir())).map(|e| e.path()),
            );
        }
        pids
    }

    /// Processes that a SIGSTOP holds. In a frozen version 1 group they make CRIU wait for ever.
    pub(crate) fn stopped_processes(&self) -> Vec<u32> {
        let is_stopped = |pid: &u32| {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            state_in(&stat) == Some('T')
        };
        self.processes().into_iter().filter(is_stopped).collect()
    }

    /// Whether a task waits in the kernel in a way that no signal and no freezer ends, as for a
    /// disk.
    pub(crate) fn waits_uninterruptibly(&self) -> bool {
        self.any_task(|task| {
            let stat = std::fs::read_to_string(task.join("stat")).unwrap_or_default();
            state_in(&stat) == Some('D')
        })
    }

    /// Whether a thread waits for a child that has its memory until execve(2) or the child's end,
    /// as after vfork(2).
    pub(crate) fn waits_in_vfork(&self) -> bool {
        self.any_task(|task| {
            let call = std::fs::read_to_string(task.join("syscall")).unwrap_or_default();
            let flags_at = |address| read_number(&task.join("mem"), address).unwrap_or(0);
            is_vfork(&call, flags_at)
        })
    }

    /// Whether `is_such` holds for the directory below `/proc` of a task of the group.
    fn any_task(&self, is_such: impl Fn(&Path) -> bool) -> bool {
        self.processes().into_iter().any(|pid| {
            let tasks = std::fs::read_dir(format!("/proc/{pid}/task"));
            tasks.into_iter().flatten().flatten().any(|task| is_such(&task.path()))
        })
    }

    /// Processes that the kernel killed in this group for lack of memory.
    pub(crate) fn oom_kills(&self) -> u64 {
        let file = match self {
            Self::V1(_) => "memory.oom_control",
            Self::V2(_) => "memory.events",
        };
        let text = self.dir("memory").and_then(|dir| std::fs::read_to_string(dir.join(file)).ok());
        let text = text.unwrap_or_default();
        let count = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        count.and_then(|count| count.trim().parse().ok()).unwrap_or(0)
    }

    /// Processors that the group may use; without a limit those of the node.
    pub(crate) fn processors(&self) -> CpuSet {
        let files = match self {
            Self::V1(_) => ["cpuset.effective_cpus", "cpuset.cpus"],
            Self::V2(_) => ["cpuset.cpus.effective", "cpuset.cpus"],
        };
        let dir = self.dir("cpuset").unwrap_or(Path::new(""));
        let paths = files.map(|file| dir.join(file)).into_iter().chain([PathBuf::from(ONLINE)]);
        let mut texts = paths.filter_map(|path| std::fs::read_to_string(path).ok());
        processors_in(&texts.find(|text| !text.trim().is_empty()).unwrap_or_default())
    }

    /// Lets a frozen group run on, past the runtime. Errors: I/O; there is no freezer.
    pub(crate) fn thaw(&self) -> io::Result<()> {
        let missing = || io::Error::new(io::ErrorKind::NotFound, "the container has no freezer");
        let (file, word) = self.thaw_switch().ok_or_else(missing)?;
        std::fs::write(file, word)
    }

    /// The freezer's file, and what to write there to thaw the group. `None` without a freezer.
    pub(crate) fn thaw_switch(&self) -> Option<(PathBuf, &'static str)> {
        match self {
            Self::V1(dirs) => Some((dirs.get("freezer")?.join("freezer.state"), "THAWED")),
            Self::V2(dir) => Some((dir.join("cgroup.freeze"), "0")),
        }
    }
}

/// Directories of the groups of process `pid` in all hierarchies, but none that holds a group of
/// this process. Errors: I/O; not found when the process is gone.
pub(crate) fn groups_apart(pid: u32) -> io::Result<Vec<String>> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    let theirs = std::fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let ours = directories(&std::fs::read_to_string("/proc/self/cgroup")?, &mounts);
    let is_apart = |dir: &PathBuf| !ours.iter().any(|our| our.starts_with(dir));
    let apart = directories(&theirs, &mounts).into_iter().filter(is_apart);
    Ok(apart.map(|dir| dir.to_string_lossy().into_owned()).collect())
}

/// The directory of each line of `/proc/PID/cgroup` whose hierarchy is mounted.
fn directories(membership: &str, mountinfo: &str) -> Vec<PathBuf> {
    let mounts: Vec<CgroupMount<'_>> = mountinfo.lines().filter_map(cgroup_mount).collect();
    let directory = |line: &str| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, path) = (parts.next()?, parts.next()?);
        let holds = |mount: &&CgroupMount<'_>| match controllers {
            "" => mount.is_v2,
            named => !mount.is_v2 && named.split(',').all(|name| mount.has(name)),
        };
        mounts.iter().find(holds).map(|mount| mount.dir_of(path))
    };
    membership.lines().filter_map(directory).collect()
}

/// Whether a system call, as `/proc/PID/syscall` has it (proc_pid_syscall(5)), waits like vfork(2).
/// `flags_at` reads the first number of a structure of the process.
fn is_vfork(call: &str, flags_at: impl Fn(u64) -> u64) -> bool {
    const VFORK: u64 = libc::CLONE_VFORK as u64;
    let mut words = call.split_ascii_whitespace();
    // A task that runs, or is in no call, has a word or -1.
    let Some(number) = words.next().and_then(|word| word.parse::<libc::c_long>().ok()) else {
        return false;
    };
    let first = words.next().and_then(|word| word.strip_prefix("0x"));
    let first = first.and_then(|digits| u64::from_str_radix(digits, 16).ok()).unwrap_or(0);
    #[cfg(target_arch = "x86_64")]
    if number == libc::SYS_vfork {
        return true;
    }
    match number {
        libc::SYS_clone => first & VFORK != 0,
        // `struct clone_args` begins with its flags (clone(2)).
        libc::SYS_clone3 => flags_at(first) & VFORK != 0,
        _ => false,
    }
}

/// The number at an address of a process, by its `/proc/PID/mem`.
fn read_number(mem: &Path, address: u64) -> io::Result<u64> {
    let mut bytes = [0; 8];
    std::fs::File::open(mem)?.read_exact_at(&mut bytes, address)?;
    Ok(u64::from_ne_bytes(bytes))
}

/// State letter in `/proc/PID/stat`; the name before it may hold anything, parentheses too.
fn state_in(stat: &str) -> Option<char> {
    stat.rsplit_once(')')?.1.trim_start().chars().next()
}

/// `0-3,8`; what is not understood is left out.
fn processors_in(list: &str) -> CpuSet {
    let mut set = CpuSet::new();
    for range in list.trim().split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (Ok(first), Ok(last)) = (first.parse::<usize>(), last.parse::<usize>()) else {
            continue;
        };
        for cpu in first..=last.min(CpuSet::count() - 1) {
            // A set holds as many processors as the loop goes through.
            let _ = set.set(cpu);
        }
    }
    set
}

/// Joins `/proc/PID/cgroup` with `/proc/self/mountinfo`.
fn resolve(membership: &str, mountinfo: &str) -> Option<Cgroup> {
    let mounts: Vec<CgroupMount<'_>> = mountinfo.lines().filter_map(cgroup_mount).collect();
    let mut v1 = HashMap::new();
    let mut v2 = None;
    for line in membership.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next())
        else {
            continue;
        };
        if controllers.is_empty() {
            v2 = mounts.iter().find(|mount| mount.is_v2).map(|mount| mount.dir_of(path));
            continue;
        }
        let named: Vec<&str> = controllers.split(',').collect();
        let holds = |mount: &&CgroupMount<'_>| {
            !mount.is_v2 && named.iter().all(|name| mount.options.split(',').any(|o| o == *name))
        };
        if let Some(mount) = mounts.iter().find(holds) {
            v1.extend(named.iter().map(|name| ((*name).to_owned(), mount.dir_of(path))));
        }
    }
    // Side by side the controllers are with version 1; the second hierarchy is empty.
    let has_controllers = v1.keys().any(|name| !name.starts_with("name="));
    if has_controllers { Some(Cgroup::V1(v1)) } else { v2.map(Cgroup::V2) }
}

struct CgroupMount<'a> {
    root: &'a str,
    dir: &'a str,
    options: &'a str,
    is_v2: bool,
}

impl CgroupMount<'_> {
    fn has(&self, controller: &str) -> bool {
        self.options.split(',').any(|option| option == controller)
    }

    fn dir_of(&self, path: &str) -> PathBuf {
        let below = path.strip_prefix(self.root.trim_end_matches('/')).unwrap_or(path);
        Path::new(self.dir).join(below.trim_start_matches('/'))
    }
}

/// `36 35 0:31 ROOT DIR opts [optional]... - TYPE SOURCE SUPER_OPTIONS`
fn cgroup_mount(line: &str) -> Option<CgroupMount<'_>> {
    let (left, right) = line.split_once(" - ")?;
    let mut left = left.split(' ').skip(3);
    let (root, dir) = (left.next()?, left.next()?);
    let mut right = right.split(' ');
    let kind = right.next()?;
    let options = right.nth(1)?;
    let is_v2 = kind == "cgroup2";
    (is_v2 || kind == "cgroup").then_some(CgroupMount { root, dir, options, is_v2 })
}

#[cfg(test)]
mod tests {
    use super::*;

    const V1_MOUNTS: &str = "\
24 1 0:22 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
29 24 0:30 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid - cgroup cgroup rw,cpu,cpuacct
30 24 0:31 /node /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory
31 24 0:32 / /sys/fs/cgroup/systemd rw - cgroup systemd rw,xattr,name=systemd
32 24 0:33 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate
";

    #[test]
    fn calls_that_wait_like_vfork_are_told_from_others() {
        let flags_at = |address| if address == 0x7000 { 0x4100 } else { 0x11 };
        let is_vfork = |call: &str| super::is_vfork(call, flags_at);
        let (clone, clone3) = (libc::SYS_clone, libc::SYS_clone3);
        assert!(is_vfork(&format!("{clone} 0x4111 0x0 0x0 0x0 0x0 0x0 0x7ffe 0x7f00")));
        assert!(is_vfork(&format!("{clone3} 0x7000 0x58 0x0 0x0 0x0 0x0 0x7ffe 0x7f00")));
        for other in ["running", "", "-1 0x7ffe 0x7f00", "0 0x4111", &format!("{clone} 0x11")] {
            assert!(!is_vfork(other), "{other}");
        }
        assert!(!is_vfork(&format!("{clone3} 0x8000 0x58")));
    }

    #[test]
    fn version_1_by_controller_and_relative_to_the_mount() {
        let membership = "4:cpu,cpuacct:/default/c\n3:memory:/node/default/c\n\
                          2:name=systemd:/s\n0::/";
        let Some(Cgroup::V1(dirs)) = resolve(membership, V1_MOUNTS) else { panic!("not v1") };
        let dir = |name: &str| dirs[name].to_str().unwrap();
        assert_eq!(dir("cpuacct"), "/sys/fs/cgroup/cpu,cpuacct/default/c");
        assert_eq!(dir("memory"), "/sys/fs/cgroup/memory/default/c");
        assert_eq!(dir("name=systemd"), "/sys/fs/cgroup/systemd/s");
    }

    #[test]
    fn every_hierarchy_has_a_directory_of_the_group() {
        let membership = "4:cpu,cpuacct:/default/c\n3:memory:/node/default/c\n\
                          2:name=systemd:/s\n1:pids:/not/mounted\n0::/default/c\n";
        let found = directories(membership, V1_MOUNTS);
        let expected =
            ["cpu,cpuacct/default/c", "memory/default/c", "systemd/s", "unified/default/c"];
        assert_eq!(found, expected.map(|dir| Path::new("/sys/fs/cgroup").join(dir)));
        assert_eq!(groups_apart(std::process::id()).unwrap(), [""; 0], "our own");
    }

    #[test]
    fn version_2() {
        let mounts = "32 24 0:33 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
        let found = resolve("0::/system.slice/c", mounts);
        assert_eq!(found, Some(Cgroup::V2("/sys/fs/cgroup/system.slice/c".into())));
        assert_eq!(resolve("0::/", ""), None);
    }

    #[test]
    fn lists_of_processors() {
        let cpus = |list: &str| {
            let set = processors_in(list);
            (0..CpuSet::count()).filter(|cpu| set.is_set(*cpu).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(cpus("0-2,7\n"), [0, 1, 2, 7]);
        assert_eq!(cpus(""), [0; 0]);
        assert_eq!(cpus("1,x,3-99999999999").len(), CpuSet::count() - 2);
    }

    #[test]
    fn the_state_follows_the_last_parenthesis() {
        assert_eq!(state_in("12 (a) T b) S 1 12"), Some('S'));
        assert_eq!(state_in("12 (sleep) T 1 12"), Some('T'));
        assert_eq!(state_in(""), None);
    }
}
