//! What CRIU leaves out of its images although it can be read from outside and set again from
//! outside: memberships in multicast groups, options of sockets, attributes of threads, and names
//! of sockets in a tmpfs.
//!
//! ```text
//! source:       frozen tasks ──record──► Supplement ──save──► file beside CRIU's images
//! destination:  the file ──load──► Supplement ──apply──► restored tasks that are still held
//! ```
//!
//! 1. The source records while the container is frozen, so nothing changes under it ([`record`],
//!    [`Supplement::add_names`]).
//! 2. The file travels with CRIU's images; CRIU and runc ignore it.
//! 3. The destination applies it once CRIU has restored every task and none has run
//!    ([`Supplement::apply`]).
//!
//! Processes and threads are named by their ids inside the container's pid namespace, and sockets
//! by the number of a descriptor that refers to them: CRIU restores both as they were.
//!
//! The file comes from a peer, so `apply` trusts nothing in it. It touches only descendants of the
//! restored init process, sets only options in the tables of [`options`], and leaves out what an
//! unprivileged process could not have set. Memberships, and options that decide where packets go,
//! must be set again or the restore fails. Anything else that cannot be set is a warning.

mod interfaces;
mod multicast;
mod names;
mod options;
mod threads;

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sched::CpuSet;
use prost::Message as _;

use crate::sys;
pub use interfaces::{InterfaceUse, Survey, interface_name, packet_interface, source_address};
use multicast::{Groups, Membership};
use names::SocketName;
use options::Profile;
use threads::{Process, Thread};

/// Name of the file in an image directory.
pub const FILE_NAME: &str = "godwit-supplement";

/// Longest file, in bytes. A thread takes some 20 bytes and a socket some 10 beside its options,
/// which sockets of the same settings share.
const BYTES_MAX: u64 = 16 << 20;

/// Most processes of one container that are followed.
const PROCESSES_MAX: usize = 1 << 17;

/// Why a container's state cannot be recorded, carried or set again.
#[derive(Debug, thiserror::Error)]
pub enum SupplementError {
    /// The operating system refused.
    #[error("read {path}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A descriptor of a process cannot be taken.
    #[error("descriptor {fd} of process {pid} cannot be taken")]
    Descriptor {
        /// The process, in the container.
        pid: u32,
        /// The descriptor.
        fd: u32,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// The file is not one that [`Supplement::save`] wrote.
    #[error("{FILE_NAME} is damaged: {0}")]
    Damaged(String),
    /// The container has more of something than is followed.
    #[error("the container has more than {limit} {what}")]
    TooMany {
        /// What there are too many of.
        what: &'static str,
        /// How many there may be.
        limit: usize,
    },
    /// A group is filtered by more sources than can be read.
    #[error("the membership of process {pid} in multicast group {group} names too many sources")]
    Sources {
        /// The process, in the container.
        pid: u32,
        /// The group.
        group: String,
    },
    /// The destination has no such interface.
    #[error(
        "process {pid} is a member of multicast group {group} on interface {interface}: this node's \
         network namespace has no such interface; create it there and try again"
    )]
    NoInterface {
        /// The process, in the container.
        pid: u32,
        /// The group.
        group: String,
        /// The interface's name at the source.
        interface: String,
    },
    /// The kernel does not let a socket join again.
    #[error("process {pid} cannot join multicast group {group} on interface {interface} again")]
    Join {
        /// The process, in the container.
        pid: u32,
        /// The group.
        group: String,
        /// The interface's name here.
        interface: String,
        /// The kernel's reason.
        #[source]
        source: Errno,
    },
    /// The kernel does not take an option that decides where packets go.
    #[error("option {option} of descriptor {fd} of process {pid} cannot be set again")]
    Option {
        /// The process, in the container.
        pid: u32,
        /// The descriptor.
        fd: u32,
        /// The option's name.
        option: &'static str,
        /// The kernel's reason.
        #[source]
        source: Errno,
    },
}

impl SupplementError {
    fn io(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, source }
    }
}

/// What the images of one dump lack.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Supplement {
    #[prost(message, repeated, tag = "1")]
    processes: Vec<Process>,
    #[prost(message, repeated, tag = "2")]
    threads: Vec<Thread>,
    /// Sets of options, each shared by all sockets that refer to it.
    #[prost(message, repeated, tag = "3")]
    profiles: Vec<Profile>,
    #[prost(message, repeated, tag = "4")]
    sockets: Vec<Socket>,
    #[prost(message, repeated, tag = "5")]
    names: Vec<SocketName>,
}

/// A socket, found at a descriptor.
#[derive(Clone, PartialEq, prost::Message)]
struct Socket {
    #[prost(uint32, tag = "1")]
    pid: u32,
    #[prost(uint32, tag = "2")]
    fd: u32,
    /// Index in [`Supplement::profiles`].
    #[prost(uint32, tag = "3")]
    profile: u32,
    #[prost(message, repeated, tag = "4")]
    memberships: Vec<Membership>,
}

/// Reads the supplement of a frozen container from the tree of processes below `init`, a process id
/// here. `cpus` are the processors that its control group lets it use.
///
/// Call it before CRIU attaches: CRIU opens sockets of its own in the processes that it dumps.
/// Errors: [`SupplementError`]. The processes are not changed.
pub fn record(init: u32, cpus: &CpuSet) -> Result<Supplement, SupplementError> {
    let mut supplement = Supplement::default();
    let mut recorder = Recorder::default();
    for (id, pid) in descendants(init)? {
        threads::record(id, pid, cpus, &mut supplement)?;
        recorder.record_sockets(id, pid, &mut supplement)?;
    }
    Ok(supplement)
}

/// What has been seen of sockets while recording.
#[derive(Default)]
struct Recorder {
    /// Inodes of sockets: several descriptors may refer to one.
    seen: BTreeSet<u64>,
    profiles: HashMap<Vec<u8>, u32>,
    /// Groups that a network namespace has joined, by the namespace's inode.
    groups: HashMap<u64, Groups>,
}

impl Recorder {
    fn record_sockets(
        &mut self,
        id: u32,
        pid: u32,
        supplement: &mut Supplement,
    ) -> Result<(), SupplementError> {
        let mut process = None;
        for (fd, inode) in sockets_of(pid)? {
            if !self.seen.insert(inode) {
                continue;
            }
            let failed = |source| SupplementError::Descriptor { pid: id, fd, source };
            let process = match &process {
                Some(process) => process,
                None => process.insert(sys::pidfd_open(pid).map_err(failed)?),
            };
            let socket = sys::pidfd_getfd(process, fd).map_err(failed)?;
            let profile = options::read(&socket);
            let memberships = match self.groups(pid)? {
                groups if groups.is_empty() => Vec::new(),
                groups => multicast::read(&socket, id, groups)?,
            };
            let profile = self.profile(profile, supplement);
            supplement.sockets.push(Socket { pid: id, fd, profile, memberships });
        }
        Ok(())
    }

    fn groups(&mut self, pid: u32) -> Result<&Groups, SupplementError> {
        Ok(match self.groups.entry(namespace_inode(pid, "net")?) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(unknown) => unknown.insert(Groups::of(pid)?),
        })
    }

    fn profile(&mut self, profile: Profile, supplement: &mut Supplement) -> u32 {
        let next = u32::try_from(supplement.profiles.len()).unwrap_or(u32::MAX);
        *self.profiles.entry(profile.encode_to_vec()).or_insert_with(|| {
            supplement.profiles.push(profile);
            next
        })
    }
}

impl Supplement {
    /// Adds the names of sockets in each tmpfs that process `init` sees; the container is frozen.
    pub fn add_names(&mut self, init: u32) -> Result<(), SupplementError> {
        self.names = names::record(init)?;
        Ok(())
    }

    /// Writes it into the image directory of a finished dump. Errors: it is too long, or I/O.
    pub fn save(mut self, images: &Path) -> Result<(), SupplementError> {
        self.names.retain(|name| name.is_dumped(images));
        let bytes = self.encode_to_vec();
        if bytes.len() as u64 > BYTES_MAX {
            let limit = usize::try_from(BYTES_MAX).unwrap_or(usize::MAX);
            return Err(SupplementError::TooMany { what: "bytes of socket options", limit });
        }
        let path = images.join(FILE_NAME);
        fs::write(&path, bytes).map_err(SupplementError::io(&path))
    }

    /// Reads it from an image directory; one without it has nothing to add.
    ///
    /// Errors: I/O; [`SupplementError::Damaged`].
    pub fn load(images: &Path) -> Result<Self, SupplementError> {
        let path = images.join(FILE_NAME);
        let file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            other => other.map_err(SupplementError::io(&path))?,
        };
        let mut bytes = Vec::new();
        file.take(BYTES_MAX + 1).read_to_end(&mut bytes).map_err(SupplementError::io(&path))?;
        if bytes.len() as u64 > BYTES_MAX {
            return Err(SupplementError::Damaged(format!("it is longer than {BYTES_MAX} bytes")));
        }
        Self::decode(&bytes[..]).map_err(|error| SupplementError::Damaged(error.to_string()))
    }

    /// Sets everything on restored tasks that have not run yet; `init` is their init process here.
    ///
    /// Returns warnings about what this node does not have or does not allow. Errors: a membership
    /// cannot be joined again, or the supplement names what the container does not have. The caller
    /// then undoes the restore.
    pub fn apply(&self, init: u32) -> Result<Vec<String>, SupplementError> {
        let ascends = |one: &Socket, next: &Socket| (one.pid, one.fd) < (next.pid, next.fd);
        if !self.sockets.is_sorted_by(ascends) {
            // So a hostile list is not longer than the container's descriptors are many.
            return Err(SupplementError::Damaged("sockets do not ascend".to_owned()));
        }
        let processes = descendants(init)?;
        let mut warnings = BTreeSet::new();
        threads::apply(&self.processes, &self.threads, &processes, &mut warnings)?;
        let mut opened: HashMap<u32, OwnedFd> = HashMap::new();
        for socket in &self.sockets {
            let Socket { pid: id, fd, .. } = *socket;
            let failed = |source| SupplementError::Descriptor { pid: id, fd, source };
            let pid = *processes.get(&id).ok_or_else(|| no_such("process", id))?;
            let process = match opened.entry(id) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(unknown) => unknown.insert(sys::pidfd_open(pid).map_err(failed)?),
            };
            let there = sys::pidfd_getfd(process, fd).map_err(failed)?;
            let profile = usize::try_from(socket.profile).unwrap_or(usize::MAX);
            let profile =
                self.profiles.get(profile).ok_or_else(|| no_such("profile", socket.profile))?;
            options::apply(there.as_fd(), (id, fd), profile, &mut warnings)?;
            for membership in &socket.memberships {
                membership.join(there.as_fd(), id)?;
            }
        }
        if !self.names.is_empty() {
            let path = PathBuf::from(format!("/proc/{init}/root"));
            let root = File::open(&path).map_err(SupplementError::io(&path))?;
            self.names.iter().for_each(|name| name.make(&root, &mut warnings));
        }
        Ok(warnings.into_iter().collect())
    }
}

fn no_such(what: &str, id: u32) -> SupplementError {
    SupplementError::Damaged(format!("it names {what} {id}, which the container does not have"))
}

/// The processes below `init` and itself: their ids in the container, each with its id here.
/// Zombies have nothing left that could be set.
fn descendants(init: u32) -> Result<BTreeMap<u32, u32>, SupplementError> {
    let mut found = BTreeMap::new();
    let mut queue = vec![init];
    while let Some(pid) = queue.pop() {
        if found.len() >= PROCESSES_MAX {
            return Err(SupplementError::TooMany { what: "processes", limit: PROCESSES_MAX });
        }
        let directory = PathBuf::from(format!("/proc/{pid}"));
        let Some((id, is_zombie)) = ns_id(&directory)? else { continue };
        if !is_zombie {
            found.insert(id, pid);
        }
        for thread in threads::ids(pid)? {
            let path = PathBuf::from(format!("/proc/{pid}/task/{thread}/children"));
            let text = match fs::read_to_string(&path) {
                Err(error) if is_gone(&error) => continue,
                other => other.map_err(SupplementError::io(&path))?,
            };
            queue.extend(text.split_ascii_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
        }
    }
    Ok(found)
}

/// Id of a process or thread in its innermost pid namespace, and whether it is a zombie; `None` if
/// it has ended.
fn ns_id(directory: &Path) -> Result<Option<(u32, bool)>, SupplementError> {
    let path = directory.join("status");
    let bytes = match fs::read(&path) {
        Err(error) if is_gone(&error) => return Ok(None),
        other => other.map_err(SupplementError::io(&path))?,
    };
    let text = String::from_utf8_lossy(&bytes);
    let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    let id = field("NSpid:").and_then(|ids| ids.split_ascii_whitespace().last()?.parse().ok());
    let is_zombie = field("State:").is_some_and(|state| state.starts_with(['Z', 'X']));
    Ok(id.map(|id| (id, is_zombie)))
}

/// Descriptors of a process that are sockets, each with the socket's inode.
pub(crate) fn sockets_of(pid: u32) -> Result<Vec<(u32, u64)>, SupplementError> {
    let path = PathBuf::from(format!("/proc/{pid}/fd"));
    let listed = match fs::read_dir(&path) {
        Err(error) if is_gone(&error) => return Ok(Vec::new()),
        other => other.map_err(SupplementError::io(&path))?,
    };
    let mut found = Vec::new();
    for entry in listed {
        let entry = entry.map_err(SupplementError::io(&path))?;
        let Ok(target) = fs::read_link(entry.path()) else { continue };
        let target = target.to_string_lossy();
        let inode = target.strip_prefix("socket:[").and_then(|rest| rest.strip_suffix(']'));
        let fd = entry.file_name().to_string_lossy().parse();
        if let (Some(Ok(inode)), Ok(fd)) = (inode.map(str::parse), fd) {
            found.push((fd, inode));
        }
    }
    found.sort_unstable();
    Ok(found)
}

fn namespace_inode(pid: u32, kind: &str) -> Result<u64, SupplementError> {
    use std::os::unix::fs::MetadataExt as _;
    let path = PathBuf::from(format!("/proc/{pid}/ns/{kind}"));
    Ok(fs::metadata(&path).map_err(SupplementError::io(&path))?.ino())
}

/// Whether the error says that the process has ended.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sched::{sched_getaffinity, sched_setaffinity};
    use nix::unistd::Pid;
    use std::net::{Ipv4Addr, UdpSocket};
    use std::process::{Child, Command};

    /// A process that waits, and is ended with the test.
    struct Sleeper(Child);

    impl Sleeper {
        fn start() -> Self {
            Self(Command::new("sleep").arg("600").spawn().unwrap())
        }

        fn cpus(&self) -> CpuSet {
            sched_getaffinity(Pid::from_raw(self.0.id().cast_signed())).unwrap()
        }
    }

    impl Drop for Sleeper {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    fn only(cpu: usize) -> CpuSet {
        let mut set = CpuSet::new();
        set.set(cpu).unwrap();
        set
    }

    /// Method: a process that chose nothing, the same after it chose, and another process with the
    /// first one's ids that is given what was recorded.
    #[test]
    fn attributes_of_threads_are_recorded_once_chosen_and_set_again() {
        let dir = tempfile::tempdir().unwrap();
        let sleeper = Sleeper::start();
        let pid = sleeper.0.id();
        let usual = sleeper.cpus();
        assert_eq!(record(pid, &usual).unwrap().threads, []);

        let first = (0..CpuSet::count()).find(|cpu| usual.is_set(*cpu).unwrap()).unwrap();
        let id = Pid::from_raw(pid.cast_signed());
        sched_setaffinity(id, &only(first)).unwrap();
        fs::write(format!("/proc/{pid}/timerslack_ns"), "123456").unwrap();
        fs::write(format!("/proc/{pid}/coredump_filter"), "0x7").unwrap();
        const IDLE: u32 = 3 << 13;
        sys::set_io_priority(pid, IDLE).unwrap();
        // On a machine with one processor there is nothing to choose.
        let mut more = usual;
        more.set(CpuSet::count() - 1).unwrap();
        let recorded = record(pid, &more).unwrap();
        recorded.clone().save(dir.path()).unwrap();
        assert_eq!(Supplement::load(dir.path()).unwrap(), recorded);

        sched_setaffinity(id, &usual).unwrap();
        fs::write(format!("/proc/{pid}/timerslack_ns"), "50000").unwrap();
        fs::write(format!("/proc/{pid}/coredump_filter"), "0x33").unwrap();
        sys::set_io_priority(pid, 0).unwrap();
        assert_eq!(recorded.apply(pid).unwrap(), Vec::<String>::new());
        assert_eq!(sleeper.cpus(), only(first));
        let text = |name: &str| fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap();
        assert_eq!(text("timerslack_ns").trim(), "123456");
        assert_eq!(text("coredump_filter").trim(), "00000007");
        assert_eq!(sys::io_priority(pid).unwrap(), IDLE);
    }

    #[test]
    fn sockets_join_their_groups_again_and_get_their_options_back() {
        let group = Ipv4Addr::new(239, 7, 7, 7);
        let socket = UdpSocket::bind(("127.0.0.1", 0)).unwrap();
        socket.join_multicast_v4(&group, &Ipv4Addr::LOCALHOST).unwrap();
        socket.set_multicast_ttl_v4(7).unwrap();
        let groups = Groups::of(std::process::id()).unwrap();
        let memberships = multicast::read(&socket, 1, &groups).unwrap();
        assert_eq!(memberships.len(), 1, "{memberships:?}");
        let profile = options::read(&socket);

        let other = UdpSocket::bind(("127.0.0.1", 0)).unwrap();
        assert_eq!(multicast::read(&other, 1, &groups).unwrap(), []);
        for membership in &memberships {
            membership.join(other.as_fd(), 1).unwrap();
            membership.join(other.as_fd(), 1).unwrap();
        }
        assert_eq!(multicast::read(&other, 1, &groups).unwrap(), memberships);
        // As the program joined, so it can leave.
        other.leave_multicast_v4(&group, &Ipv4Addr::LOCALHOST).unwrap();
        let mut warnings = BTreeSet::new();
        options::apply(other.as_fd(), (1, 3), &profile, &mut warnings).unwrap();
        assert_eq!(warnings, BTreeSet::new());
        assert_eq!(other.multicast_ttl_v4().unwrap(), 7);
        assert_eq!(options::read(&other), profile);
    }

    /// Method: a membership that receives from one source, and one that does not.
    #[test]
    fn filters_by_source_are_recorded_and_set_again() {
        let socket = UdpSocket::bind(("127.0.0.1", 0)).unwrap();
        let group = Ipv4Addr::new(239, 8, 8, 8).octets();
        let (here, source) = (Ipv4Addr::LOCALHOST.octets(), [10, 0, 0, 9]);
        // `struct ip_mreq_source`: group, interface, source.
        let request = [group, here, source].concat();
        let set = |option| sys::setsockopt(&socket, libc::SOL_IP, option, &request).unwrap();
        let restored = |is_first: bool| {
            let groups = Groups::of(std::process::id()).unwrap();
            let mut found = multicast::read(&socket, 1, &groups).unwrap();
            assert_eq!(found.len(), 1, "{is_first}: {found:?}");
            let found = found.remove(0);
            let other = UdpSocket::bind(("127.0.0.1", 0)).unwrap();
            found.join(other.as_fd(), 1).unwrap();
            let again = multicast::read(&other, 1, &groups).unwrap();
            assert_eq!(again, std::slice::from_ref(&found));
        };
        set(libc::IP_ADD_SOURCE_MEMBERSHIP);
        restored(true);
        set(libc::IP_DROP_SOURCE_MEMBERSHIP);
        socket.join_multicast_v4(&group.into(), &Ipv4Addr::LOCALHOST).unwrap();
        set(libc::IP_BLOCK_SOURCE);
        restored(false);
    }

    #[test]
    fn a_supplement_of_a_hostile_peer_is_refused() {
        let sleeper = Sleeper::start();
        let pid = sleeper.0.id();
        let (id, _) = ns_id(Path::new(&format!("/proc/{pid}"))).unwrap().unwrap();
        let socket = |pid, fd| Socket { pid, fd, profile: 0, memberships: Vec::new() };
        let refused = |sockets: Vec<Socket>| {
            let hostile =
                Supplement { sockets, profiles: vec![Profile::default()], ..Default::default() };
            hostile.apply(pid).unwrap_err()
        };
        let damaged = |error: SupplementError| matches!(error, SupplementError::Damaged(_));
        assert!(damaged(refused(vec![socket(1, 0)])), "not of this container");
        assert!(damaged(refused(vec![socket(id, 2), socket(id, 1)])), "not in order");
        assert!(damaged(refused(vec![socket(id, 0)])), "not a socket");
        let absent = refused(vec![socket(id, 4000)]);
        assert!(matches!(absent, SupplementError::Descriptor { fd: 4000, .. }), "{absent}");

        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(FILE_NAME), b"\xff\xff\xff").unwrap();
        assert!(damaged(Supplement::load(dir.path()).unwrap_err()));
        let file = File::create(dir.path().join(FILE_NAME)).unwrap();
        file.set_len(BYTES_MAX + 1).unwrap();
        assert!(damaged(Supplement::load(dir.path()).unwrap_err()));
    }

    #[test]
    fn an_interface_that_is_not_here_is_named() {
        let bytes = b"\x0a\x04\xef\x01\x01\x01\x12\x05gone0";
        let membership = Membership::decode(&bytes[..]).unwrap();
        let socket = UdpSocket::bind(("127.0.0.1", 0)).unwrap();
        let error = membership.join(socket.as_fd(), 7).unwrap_err().to_string();
        assert!(error.contains("process 7") && error.contains("239.1.1.1"), "{error}");
        assert!(error.contains("interface gone0"), "{error}");
    }
}
