//! What a capture remembers of a tree, and a look at what of that still holds.
//!
//! A capture that remembers an earlier one begins with a *look* ([`look`]): all processors compare
//! the directories that are remembered with what is there, by one `stat` for each file. What is
//! equal everywhere below a directory then costs nothing more: its object is the one that the
//! earlier capture stored. So what a capture costs while the container is frozen is that `stat` and
//! what has changed.
//!
//! Entries are equal by the rule in [`super::capture`]. The names of a directory are taken as they
//! were if its own times are equal, since making, renaming and removing an entry sets these.
//!
//! The look is best effort: where it fails, the reader lists the directory itself, and reports what
//! is wrong.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use godwit_protos::Digest;
use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::libc::{S_IFDIR, S_IFMT};
use nix::sys::stat::{FileStat, Mode, fstat, fstatat};
use rayon::prelude::*;

use super::capture::DEPTH_MAX;
use super::object::{Entry, Node};
use super::{ContentError, on};

/// A change time younger than this may hide a second change: file systems read a clock that
/// advances every 10 ms or more often. Twice that, so that a clock that was set by a little is
/// covered too.
pub(super) const CLOCK_TICK: Duration = Duration::from_millis(20);

/// Entries that one processor looks at in one go.
const SLICE: usize = 256;

/// How a directory is opened.
pub(super) const DIRECTORY: OFlag =
    OFlag::O_RDONLY.union(OFlag::O_DIRECTORY).union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);

/// Device and inode.
pub(super) type Inode = (u64, u64);

pub(super) fn inode_of(stat: &FileStat) -> Inode {
    (stat.st_dev, stat.st_ino)
}

/// What a capture knows from the one before, so that it need not read what did not change.
#[derive(Debug, Default)]
pub struct Unchanged {
    pub(super) directories: HashMap<Inode, Remembered>,
    /// How far the clock was ahead of the time since boot when the oldest of them was recorded.
    pub(super) clock: i128,
}

/// What changes when a file or directory does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Marks {
    size: i64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Marks {
    pub(super) fn of(stat: &FileStat) -> Self {
        Self {
            size: stat.st_size,
            modified: (stat.st_mtime, stat.st_mtime_nsec),
            changed: (stat.st_ctime, stat.st_ctime_nsec),
        }
    }

    /// Whether a change that begins at `now` or later is sure to get another change time. `now` is
    /// read before the marks are.
    fn are_past(&self, now: Duration) -> bool {
        let seconds = u64::try_from(self.changed.0).unwrap_or(0);
        let changed = Duration::new(seconds, u32::try_from(self.changed.1).unwrap_or(0));
        changed + CLOCK_TICK < now
    }
}

/// How an entry of a directory was when it was read.
#[derive(Debug, Clone, Copy)]
pub(super) struct Mark {
    pub(super) inode: Inode,
    /// Its marks, if it is recorded.
    pub(super) recorded: Option<Marks>,
    /// Whether it has other names.
    pub(super) is_linked: bool,
}

/// A directory as a capture found it.
#[derive(Debug)]
pub(super) struct Remembered {
    /// Its object.
    pub(super) digest: Digest,
    /// Its own marks, if it has the same names while they are equal.
    pub(super) listed: Option<Marks>,
    /// Ascending by name.
    pub(super) entries: Vec<Entry>,
    /// One for each entry.
    pub(super) marks: Vec<Mark>,
    /// Places of the directories among the entries.
    pub(super) directories: Vec<usize>,
    pub(super) sums: Sums,
    has_links: bool,
    /// What a look found.
    pub(super) look: OnceLock<Look>,
}

impl Remembered {
    pub(super) fn new(
        digest: Digest,
        listed: Option<Marks>,
        entries: Vec<Entry>,
        marks: Vec<Mark>,
    ) -> Self {
        let is_directory = |place: &usize| matches!(entries[*place].node, Node::Directory(_));
        Self {
            digest,
            listed,
            directories: (0..entries.len()).filter(is_directory).collect(),
            sums: Sums::of(&entries),
            has_links: marks.iter().any(|mark| mark.is_linked),
            entries,
            marks,
            look: OnceLock::new(),
        }
    }
}

/// What a tree says of all its entries.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Sums {
    /// Sizes of regular files.
    pub(super) bytes: u64,
    /// Union of the flags.
    pub(super) flags: u32,
    pub(super) has_projects: bool,
}

impl Sums {
    /// Of the entries of one directory, without what is below them.
    fn of(entries: &[Entry]) -> Self {
        let mut sums = Self::default();
        for Entry { attributes, node, .. } in entries {
            if let Node::File(bytes, _) = node {
                sums.bytes += bytes;
            }
            if let Some(attributes) = attributes {
                sums.flags |= attributes.flags;
                sums.has_projects |= attributes.project != 0;
            }
        }
        sums
    }

    pub(super) fn add(&mut self, other: Self) {
        self.bytes += other.bytes;
        self.flags |= other.flags;
        self.has_projects |= other.has_projects;
    }
}

/// What has become of a remembered directory.
#[derive(Debug)]
pub(super) enum Look {
    /// It has the same entries; below its directories there may be changes.
    Same,
    /// Something else.
    Listed(Listing),
}

/// The entries of a directory, ascending by name.
#[derive(Debug)]
pub(super) struct Listing {
    pub(super) found: Vec<Found>,
    /// As [`Remembered::listed`].
    pub(super) listed: Option<Marks>,
}

#[derive(Debug)]
pub(super) enum Found {
    /// The remembered entry at this place, unchanged.
    Same(usize),
    Other(Box<Other>),
}

/// An entry that is to be read.
#[derive(Debug)]
pub(super) struct Other {
    pub(super) name: Vec<u8>,
    pub(super) stat: FileStat,
    /// Whether a change after this look is sure to change its marks.
    pub(super) is_past: bool,
}

fn stat(directory: &OwnedFd, name: &[u8]) -> Result<FileStat, Errno> {
    fstatat(directory, OsStr::from_bytes(name), AtFlags::AT_SYMLINK_NOFOLLOW)
}

/// The clock that files get their times from.
pub(super) fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

impl Listing {
    /// Lists an open directory, beside what is remembered of it. Names that vanish meanwhile are
    /// left out.
    pub(super) fn read(
        directory: &OwnedFd,
        path: &Path,
        before: Option<&Remembered>,
    ) -> Result<Self, ContentError> {
        let now = now();
        let marks = Marks::of(&fstat(directory).map_err(on("stat", path))?);
        let listed = marks.are_past(now).then_some(marks);
        let found = match before {
            Some(before) if before.listed == Some(marks) => {
                let places: Vec<usize> = (0..before.entries.len()).collect();
                in_slices(&places, |place, now| {
                    let name = &before.entries[*place].name;
                    compare((directory, path), name, Some((before, *place)), now)
                })
            }
            _ => {
                let names = names(directory).map_err(on("list", path))?;
                let place = |name: &[u8]| {
                    let before = before?;
                    let found = before.entries.binary_search_by(|entry| (**entry.name).cmp(name));
                    found.ok().map(|place| (before, place))
                };
                in_slices(&names, |name, now| compare((directory, path), name, place(name), now))
            }
        };
        Ok(Self { found: found?, listed })
    }

    fn is_same(&self, before: &Remembered) -> bool {
        self.found.len() == before.entries.len()
            && self.listed == before.listed
            && !before.has_links
            && self.found.iter().all(|found| matches!(found, Found::Same(_)))
    }
}

/// Looks at many on several processors. `look` gets a moment before.
fn in_slices<T: Sync>(
    all: &[T],
    look: impl Fn(&T, Duration) -> Result<Option<Found>, ContentError> + Sync,
) -> Result<Vec<Found>, ContentError> {
    let slice = |slice: &[T]| {
        let now = now();
        slice.iter().filter_map(|one| look(one, now).transpose()).collect()
    };
    if all.len() <= SLICE {
        return slice(all);
    }
    let slices: Result<Vec<Vec<Found>>, _> = all.par_chunks(SLICE).map(slice).collect();
    Ok(slices?.into_iter().flatten().collect())
}

/// Looks at an entry, of which may be remembered what is in that place. `None` if there is none of
/// the name.
fn compare(
    (directory, path): (&OwnedFd, &Path),
    name: &[u8],
    before: Option<(&Remembered, usize)>,
    now: Duration,
) -> Result<Option<Found>, ContentError> {
    let stat = match stat(directory, name) {
        Ok(stat) => stat,
        // The container has removed it.
        Err(Errno::ENOENT) => return Ok(None),
        Err(errno) => return Err(on("stat", &path.join(OsStr::from_bytes(name)))(errno)),
    };
    let marks = Marks::of(&stat);
    let is_same = |(before, place): &(&Remembered, usize)| {
        let Mark { inode, recorded, .. } = before.marks[*place];
        inode == inode_of(&stat) && recorded == Some(marks)
    };
    Ok(Some(match before.filter(is_same) {
        Some((_, place)) => Found::Same(place),
        None => {
            let is_past = marks.are_past(now);
            Found::Other(Box::new(Other { name: name.to_vec(), stat, is_past }))
        }
    }))
}

/// All names in a directory, ascending.
fn names(directory: &OwnedFd) -> Result<Vec<Vec<u8>>, Errno> {
    // Another open file, so that each listing begins at the first name.
    let mut names = Vec::new();
    for entry in Dir::openat(directory, ".", DIRECTORY, Mode::empty())?.iter() {
        let entry = entry?;
        if ![c".", c".."].contains(&entry.file_name()) {
            names.push(entry.file_name().to_bytes().to_vec());
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// Looks at every remembered directory of the tree below `root`.
pub(super) fn look(root: OwnedFd, known: &HashMap<Inode, Remembered>) {
    rayon::scope(|scope| look_below(scope, known, root, 0));
}

fn look_below<'a>(
    scope: &rayon::Scope<'a>,
    known: &'a HashMap<Inode, Remembered>,
    directory: OwnedFd,
    depth: usize,
) {
    let Some(before) = fstat(&directory).ok().and_then(|stat| known.get(&inode_of(&stat))) else {
        return;
    };
    // What fails here fails for the reader too, which knows the path.
    let Ok(listing) = Listing::read(&directory, Path::new(""), Some(before)) else { return };
    let is_same = listing.is_same(before);
    let directory = Arc::new(directory);
    let go_on = |name: &[u8]| {
        let (above, name) = (directory.clone(), name.to_vec());
        scope.spawn(move |scope| {
            let below = openat(&*above, OsStr::from_bytes(&name), DIRECTORY, Mode::empty());
            drop(above);
            if let Ok(below) = below {
                look_below(scope, known, below, depth + 1);
            }
        });
    };
    if depth >= DEPTH_MAX {
        return;
    }
    if is_same {
        before.directories.iter().for_each(|place| go_on(&before.entries[*place].name));
    } else {
        for found in &listing.found {
            match found {
                Found::Same(place) => {
                    if let Entry { name, node: Node::Directory(_), .. } = &before.entries[*place] {
                        go_on(name);
                    }
                }
                Found::Other(other) => {
                    if other.stat.st_mode & S_IFMT == S_IFDIR {
                        go_on(&other.name);
                    }
                }
            }
        }
    }
    let look = if is_same { Look::Same } else { Look::Listed(listing) };
    // A directory that is mounted inside itself comes twice.
    let _ = before.look.set(look);
}
