//! Where volumes lie, and the steps by which they come and go.
//!
//! ```text
//! STATE/volumes/ID/data        a writable volume: a directory, or the image of a block volume
//! STATE/volumes/ID/new         one that is not journalled yet
//! STATE/volumes/ID/arriving    the session that brings the volume, until its container has run here
//! STATE/volumes/ID/removed     empty: the volume is being removed
//! STATE/content/HEX            the tree sha256:HEX laid out; never written to again
//! STATE/content/HEX.kept       empty: the tree was imported, and is whole in the store
//! STATE/content/NAME-N.tmp     one that is being laid out, or an archive that is being imported
//! STATE/trash/NAME-N           what was removed and still takes room
//! ```
//!
//! What has its final name is whole, whenever the machine stops. A volume is removed by moving it
//! to the trash, so its ID is free at once: however large it is, and whatever keeps it from being
//! deleted ([`Leftovers`]).
//!
//! On open, for each `ID`:
//!
//! - if there is `removed`, and the journal does not have the volume here, `ID` goes to the trash:
//!   the removal is finished. If the journal has it, `removed` is deleted: the removal never
//!   happened;
//! - if the journal has the volume here and there is no `data`, `new` becomes `data`: the arrival
//!   is finished;
//! - any other `new` goes to the trash, an `arriving` without a volume is deleted, and `ID` is
//!   removed if it is empty.
//!
//! Laid-out trees without their final names, and what lies in the trash, are removed. A `data` that
//! the journal does not have here is kept and reported ([`Places::contradictions`]), since the
//! journal may be an older copy. No single volume keeps the others from being opened: what cannot
//! be done is reported.

use std::collections::{BTreeSet, HashSet};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use godwit_protos::{Digest, VolumeId};

use super::VolumeError;
use crate::content::on;
use crate::error::chain;
use crate::ownership::journal::{Arriving, Journal, VolumeEntry};
use godwit_disk::leftovers::Leftovers;
use godwit_disk::step::reach;
use godwit_disk::sys::spread_out;

/// How often a removed volume is looked at until nothing has it mounted, and the pause between.
const UNMOUNTS_MAX: u32 = 30;
const UNMOUNT_PAUSE: Duration = Duration::from_millis(100);

/// The places of one node. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Places {
    state_dir: PathBuf,
    journal: Journal,
    /// Writable volumes that are coming or going.
    busy: Arc<Mutex<HashSet<VolumeId>>>,
    leftovers: Leftovers,
    /// Why volumes could not be recovered on open.
    unrecovered: Arc<Vec<String>>,
}

/// A removed volume that still takes room.
#[derive(Debug)]
#[must_use = "it takes room until it is deleted"]
pub struct Removed {
    place: Option<PathBuf>,
    leftovers: Leftovers,
}

impl Removed {
    /// Deletes it, which takes as long as the disk needs. What cannot be deleted, or is still
    /// mounted after a while, is reported by the node.
    pub fn delete(self) {
        if let Some(place) = self.place {
            // The mount namespaces of ended processes take a moment to go.
            for _ in 0..UNMOUNTS_MAX {
                if !is_in_use(&place) {
                    break;
                }
                std::thread::sleep(UNMOUNT_PAUSE);
            }
            self.leftovers.remove(&place);
        }
    }
}

/// Keeps others from a volume that is coming or going.
struct Busy<'a> {
    places: &'a Places,
    id: VolumeId,
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.places.busy().remove(&self.id);
    }
}

impl Places {
    /// Opens the places below `state_dir`, by the rules above.
    pub(super) fn open(state_dir: &Path, journal: Journal) -> Result<Self, VolumeError> {
        let mut places = Self {
            state_dir: state_dir.to_owned(),
            journal,
            busy: Arc::default(),
            leftovers: Leftovers::sparing(is_in_use),
            unrecovered: Arc::default(),
        };
        for name in ["volumes", "content", "trash"] {
            let path = state_dir.join(name);
            fs::create_dir_all(&path).map_err(on("make directory", &path))?;
            if name != "trash" {
                spread_out(&path);
            }
        }
        let ids = places.names("volumes")?.into_iter().filter_map(|name| name.parse().ok());
        let failed = |id: VolumeId| {
            let error = places.recover(&id).err()?;
            Some(format!("volume {id} could not be recovered: {}", chain(&error)))
        };
        places.unrecovered = Arc::new(ids.filter_map(failed).collect());
        let trash = places.names("trash")?.into_iter().map(|name| ("trash", name));
        let content = places.names("content")?.into_iter().map(|name| ("content", name));
        let unfinished = content.filter(|(_, name)| name.ends_with(".tmp"));
        for (directory, name) in trash.chain(unfinished) {
            places.leftovers.remove(&state_dir.join(directory).join(name));
        }
        for told in places.contradictions()? {
            tracing::warn!("{told}");
        }
        Ok(places)
    }

    fn recover(&self, id: &VolumeId) -> Result<(), VolumeError> {
        let [data, new, mark] = ["data", "new", "removed"].map(|name| self.volume(id).join(name));
        if is_there(&mark)? {
            if !self.is_journalled(id)? {
                return self.finish_removal(id).map(Removed::delete);
            }
            fs::remove_file(&mark).map_err(on("remove", &mark))?;
        }
        if self.is_journalled(id)? && !is_there(&data)? && is_there(&new)? {
            fs::rename(&new, &data).map_err(on("move into place", &data))?;
            sync(&self.volume(id))?;
        }
        self.remove_rest(id)
    }

    /// Removes `new`, the mark of a volume that is not there, and `ID` if nothing else is in it.
    fn remove_rest(&self, id: &VolumeId) -> Result<(), VolumeError> {
        let directory = self.volume(id);
        let new = directory.join("new");
        if is_there(&new)? {
            self.leftovers.remove(&self.to_trash(&new, id.as_str())?);
        }
        if !is_there(&self.data(id))? {
            self.unmark(id)?;
        }
        match fs::remove_dir(&directory) {
            Err(error)
                if !matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty
                ) =>
            {
                Err(on("remove", &directory)(error).into())
            }
            _ => Ok(()),
        }
    }

    /// Moves what was removed to the trash. Returns its place there.
    fn to_trash(&self, path: &Path, name: &str) -> Result<PathBuf, VolumeError> {
        let trash = self.state_dir.join("trash");
        loop {
            // An earlier daemon may have left something under the same number.
            let place = trash.join(format!("{name}-{}", next()));
            if is_there(&place)? {
                continue;
            }
            fs::rename(path, &place).map_err(on("remove", path))?;
            return Ok(place);
        }
    }

    /// Step 4 of [`Self::remove`].
    fn finish_removal(&self, id: &VolumeId) -> Result<Removed, VolumeError> {
        let directory = self.volume(id);
        let place = if is_there(&directory)? {
            let place = self.to_trash(&directory, id.as_str())?;
            sync(&self.state_dir.join("volumes"))?;
            Some(place)
        } else {
            None
        };
        Ok(Removed { place, leftovers: self.leftovers.clone() })
    }

    fn mark(&self, id: &VolumeId) -> PathBuf {
        self.volume(id).join("arriving")
    }

    /// Whether the volume carries the mark of `session`.
    pub(super) fn is_marked(&self, id: &VolumeId, session: &str) -> Result<bool, VolumeError> {
        let mark = self.mark(id);
        match fs::read(&mark) {
            Ok(found) => Ok(found == session.as_bytes()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(on("read", &mark)(error).into()),
        }
    }

    /// Takes the mark from a volume. Repeating it is safe.
    pub(super) fn unmark(&self, id: &VolumeId) -> Result<(), VolumeError> {
        let mark = self.mark(id);
        match fs::remove_file(&mark) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(on("remove", &mark)(error).into())
            }
            _ => Ok(()),
        }
    }

    /// What could not be removed so far.
    pub(super) fn leftovers(&self) -> &Leftovers {
        &self.leftovers
    }

    /// Checks that [`Self::put`] could put a volume into place now.
    ///
    /// Errors: [`VolumeError::Unjournalled`]; [`VolumeError::Busy`]; why an earlier volume of this
    /// name cannot be moved away.
    pub(super) fn check_free(&self, id: &VolumeId) -> Result<(), VolumeError> {
        let _busy = self.take(id)?;
        if is_there(&self.volume(id).join("removed"))? {
            self.finish_removal(id)?.delete();
        }
        let data = self.data(id);
        if is_there(&data)? { Err(VolumeError::Unjournalled(data)) } else { Ok(()) }
    }

    /// Whether the journal has it here.
    fn is_journalled(&self, id: &VolumeId) -> Result<bool, VolumeError> {
        Ok(self.journal.volume(id)?.is_some_and(|entry| entry.moved_to.is_none()))
    }

    /// What journal and disk say otherwise of each other, each in words that say what to do.
    /// Volumes that are coming or going are left out.
    pub(super) fn contradictions(&self) -> Result<Vec<String>, VolumeError> {
        let on_disk = self.names("volumes")?.into_iter().filter_map(|name| name.parse().ok());
        let journalled = self.journal.volumes()?.into_iter().map(|(id, _)| id);
        let mut found = self.unrecovered.to_vec();
        for id in on_disk.chain(journalled).collect::<BTreeSet<VolumeId>>() {
            // No caller begins meanwhile.
            let busy = self.busy();
            if busy.contains(&id) {
                continue;
            }
            let data = self.data(&id);
            let at = data.display();
            match (self.is_journalled(&id)?, is_there(&data)?) {
                (true, true) | (false, false) => {}
                (false, true) => found.push(VolumeError::Unjournalled(data).to_string()),
                (true, false) => found.push(format!(
                    "volume {id} is lost, {at} is missing: restore it, or `godwit volume rm {id}`"
                )),
            }
        }
        Ok(found)
    }

    /// Puts a writable volume into place, which `make` makes at the path that it is given.
    ///
    /// 1. remove what is left of an earlier volume or attempt,
    /// 2. make `arriving`, if the volume arrives, and `new`,
    /// 3. fsync `new`, `ID` and `volumes`,
    /// 4. journal `entry`,
    /// 5. rename `new` to `data`,
    /// 6. fsync `ID`.
    ///
    /// One that arrives with a container is not synced: it is as good as not here until that has
    /// run, and before that is reported, the file system is flushed.
    ///
    /// Errors: [`VolumeError::Unjournalled`] for a `data` that is there; [`VolumeError::Busy`];
    /// what `make` says. Before step 4 there is no such volume then; after it, opening finishes.
    pub(super) fn put(
        &self,
        id: &VolumeId,
        entry: &VolumeEntry,
        make: impl FnOnce(&Path) -> Result<(), VolumeError>,
    ) -> Result<PathBuf, VolumeError> {
        self.check_free(id)?;
        let _busy = self.take(id)?;
        let (directory, data, is_durable) =
            (self.volume(id), self.data(id), entry.arriving.is_none());
        reach("put 1");
        self.remove_rest(id)?;
        reach("put 2");
        let new = directory.join("new");
        let made = fs::create_dir_all(&directory)
            .map_err(|error| on("make directory", &directory)(error).into())
            .and_then(|()| match &entry.arriving {
                Some(Arriving { session, .. }) => {
                    let mark = self.mark(id);
                    Ok(fs::write(&mark, session).map_err(on("write", &mark))?)
                }
                None => Ok(()),
            })
            .and_then(|()| make(&new))
            .and_then(|()| {
                reach("put 3");
                let places = [&new, &directory, &self.state_dir.join("volumes")];
                places.into_iter().filter(|_| is_durable).try_for_each(|path| sync(path))
            });
        if let Err(error) = made {
            if let Err(error) = self.remove_rest(id) {
                tracing::warn!(%error, "what is left of volume {id} is removed on open");
            }
            return Err(error);
        }
        reach("put 4");
        self.journal.set_volume(id, Some(entry))?;
        reach("put 5");
        fs::rename(&new, &data).map_err(on("move into place", &data))?;
        reach("put 6");
        if is_durable {
            sync(&directory)?;
        }
        Ok(data)
    }

    /// Removes a writable volume, of which the journal then says `entry`. It need not be there.
    ///
    /// 1. make `removed`, 2. fsync `ID`, 3. journal, 4. rename `ID` to `trash/ID-N` and fsync
    ///    `volumes`. The caller deletes it there.
    ///
    /// Errors: [`VolumeError::Busy`]; the disk's or the journal's. Opening goes back to before step
    /// 1, or on from step 3. Repeating it is safe.
    pub(super) fn remove(
        &self,
        id: &VolumeId,
        entry: Option<&VolumeEntry>,
    ) -> Result<Removed, VolumeError> {
        let _busy = self.take(id)?;
        reach("remove 1");
        if is_there(&self.volume(id))? {
            let mark = self.volume(id).join("removed");
            match File::create(&mark) {
                // Removing must work on a full disk. Without the mark, a volume of which step 4 was
                // not reached is kept and reported.
                Err(error) if error.kind() == io::ErrorKind::StorageFull => {}
                made => made.map(drop).map_err(on("make", &mark))?,
            }
            reach("remove 2");
            sync(&self.volume(id))?;
        }
        reach("remove 3");
        self.journal.set_volume(id, entry)?;
        reach("remove 4");
        self.finish_removal(id)
    }

    /// Makes a directory that the next opening removes.
    pub(super) fn temporary(&self, name: &str) -> Result<PathBuf, VolumeError> {
        loop {
            let path = self.state_dir.join("content").join(format!("{name}-{}.tmp", next()));
            match fs::create_dir(&path) {
                // What an earlier daemon left and could not be removed.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                made => {
                    return Ok(made.map(|()| path.clone()).map_err(on("make directory", &path))?);
                }
            }
        }
    }

    /// Notes that the store has a tree whole, and durably.
    ///
    /// 1. make `HEX.kept`, 2. fsync `content`.
    pub(super) fn keep(&self, digest: &Digest) -> Result<(), VolumeError> {
        let kept = self.kept(digest);
        reach("keep 1");
        File::create(&kept).map_err(on("make", &kept))?;
        reach("keep 2");
        sync(&self.state_dir.join("content"))
    }

    /// Puts a laid-out tree into place, which `make` makes durable at the path that it is given.
    /// There already is success.
    ///
    /// 1. make `HEX-N.tmp`, 2. rename it to `HEX`, 3. fsync `content`.
    ///
    /// Two at once do not meet: the one that comes second drops its own.
    pub(super) fn put_content(
        &self,
        digest: &Digest,
        make: impl FnOnce(&Path) -> Result<(), VolumeError>,
    ) -> Result<PathBuf, VolumeError> {
        let path = self.content(digest);
        if path.is_dir() {
            return Ok(path);
        }
        reach("content 1");
        let partial = self.temporary(&digest.hex())?;
        if let Err(error) = make(&partial) {
            self.leftovers.remove(&partial);
            return Err(error);
        }
        reach("content 2");
        match fs::rename(&partial, &path) {
            Err(_) if path.is_dir() => self.leftovers.remove(&partial),
            renamed => renamed.map_err(on("move into place", &path))?,
        }
        reach("content 3");
        sync(&self.state_dir.join("content"))?;
        Ok(path)
    }

    /// Puts another copy in the place of a tree that is laid out, which `make` makes durable at the
    /// path that it is given.
    ///
    /// 1. make `HEX-N.tmp`, 2. make `HEX.kept` as [`Self::keep`] does, since between steps 3 and 4
    ///    there is no `HEX`,
    /// 3. rename `HEX` to `trash/NAME`, 4. rename `HEX-N.tmp` to `HEX`, 5. fsync `trash` and
    ///    `content`,
    /// 6. remove `trash/NAME`.
    ///
    /// Caller: the store has the tree whole. Errors: [`VolumeError::Mounted`], since a container
    /// that has it mounted would see its files go; what `make` says; the disk's. What is laid out
    /// is then as it was. Stopped between steps 3 and 4, it is laid out when it is next mounted.
    pub(super) fn replace_content(
        &self,
        digest: &Digest,
        make: impl FnOnce(&Path) -> Result<(), VolumeError>,
    ) -> Result<(), VolumeError> {
        let path = self.content(digest);
        let [content, trash] = self.content_and_trash();
        if is_mounted("content", &digest.hex())? {
            return Err(VolumeError::Mounted(*digest));
        }
        reach("replace 1");
        let partial = self.temporary(&digest.hex())?;
        if let Err(error) = make(&partial) {
            self.leftovers.remove(&partial);
            return Err(error);
        }
        reach("replace 2");
        self.keep(digest)?;
        reach("replace 3");
        let gone = self.to_trash(&path, &digest.hex())?;
        // A caller may have mounted it by its old name until just now; none can any more.
        if is_mounted("trash", &gone.file_name().unwrap_or_default().to_string_lossy())? {
            fs::rename(&gone, &path).map_err(on("move back", &path))?;
            self.leftovers.remove(&partial);
            return Err(VolumeError::Mounted(*digest));
        }
        reach("replace 4");
        match fs::rename(&partial, &path) {
            // Another caller has laid it out meanwhile.
            Err(_) if path.is_dir() => self.leftovers.remove(&partial),
            renamed => renamed.map_err(on("move into place", &path))?,
        }
        reach("replace 5");
        sync(&trash)?;
        sync(&content)?;
        reach("replace 6");
        self.leftovers.remove(&gone);
        Ok(())
    }

    /// Removes a tree, whether it is laid out or not.
    ///
    /// 1. remove `HEX.kept`, 2. rename `HEX` to `trash/NAME`, 3. fsync `trash` and `content`, 4.
    ///    remove it.
    ///
    /// Errors: [`VolumeError::NoContent`]; the disk's.
    pub(super) fn remove_content(&self, digest: &Digest) -> Result<(), VolumeError> {
        if !self.has_content(digest) {
            return Err(VolumeError::NoContent(*digest));
        }
        let (path, kept) = (self.content(digest), self.kept(digest));
        let [content, trash] = self.content_and_trash();
        reach("trash 1");
        if is_there(&kept)? {
            fs::remove_file(&kept).map_err(on("remove", &kept))?;
        }
        reach("trash 2");
        let gone = if is_there(&path)? { Some(self.to_trash(&path, &digest.hex())?) } else { None };
        reach("trash 3");
        sync(&trash)?;
        sync(&content)?;
        reach("trash 4");
        if let Some(gone) = gone {
            self.leftovers.remove(&gone);
        }
        Ok(())
    }

    /// Where a writable volume is, if it is here.
    pub(super) fn data(&self, id: &VolumeId) -> PathBuf {
        self.volume(id).join("data")
    }

    /// Where a laid-out tree is, if it is here.
    pub(super) fn content(&self, digest: &Digest) -> PathBuf {
        self.state_dir.join("content").join(digest.hex())
    }

    /// The digests of the trees that are here: whole in the store, and perhaps laid out.
    pub(super) fn contents(&self) -> Result<BTreeSet<Digest>, VolumeError> {
        let names = self.names("content")?;
        let hex = names.iter().map(|name| name.strip_suffix(".kept").unwrap_or(name));
        Ok(hex.filter_map(|hex| format!("sha256:{hex}").parse().ok()).collect())
    }

    /// Whether [`Self::contents`] has it.
    pub(super) fn has_content(&self, digest: &Digest) -> bool {
        self.content(digest).is_dir() || self.kept(digest).exists()
    }

    fn content_and_trash(&self) -> [PathBuf; 2] {
        ["content", "trash"].map(|name| self.state_dir.join(name))
    }

    fn kept(&self, digest: &Digest) -> PathBuf {
        self.content(digest).with_extension("kept")
    }

    fn volume(&self, id: &VolumeId) -> PathBuf {
        self.state_dir.join("volumes").join(id.as_str())
    }

    fn names(&self, directory: &str) -> Result<Vec<String>, VolumeError> {
        let path = self.state_dir.join(directory);
        let entries: io::Result<Vec<_>> = fs::read_dir(&path).and_then(Iterator::collect);
        let names = entries.map_err(on("list", &path))?.into_iter();
        Ok(names.filter_map(|entry| entry.file_name().into_string().ok()).collect())
    }

    fn busy(&self) -> MutexGuard<'_, HashSet<VolumeId>> {
        self.busy.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, id: &VolumeId) -> Result<Busy<'_>, VolumeError> {
        if self.busy().insert(id.clone()) {
            Ok(Busy { places: self, id: id.clone() })
        } else {
            Err(VolumeError::Busy(id.clone()))
        }
    }
}

/// Whether a process has a directory of the trash mounted, or whether that cannot be told: its
/// files are that process's.
fn is_in_use(path: &Path) -> bool {
    let is_trash = path.parent().is_some_and(|parent| parent.ends_with("trash"));
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    is_trash && is_mounted("trash", &name).unwrap_or(true)
}

/// A number that this process has not used yet.
fn next() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

fn is_there(path: &Path) -> Result<bool, VolumeError> {
    Ok(fs::exists(path).map_err(on("look at", path))?)
}

/// Whether a process that we can see has the tree `directory/name` mounted, or what is in it.
/// `name` has a digest in it, so it is the same tree wherever that lies.
///
/// Source: proc(5), "mountinfo": the fourth field is the directory that is mounted, in its file
/// system.
fn is_mounted(directory: &str, name: &str) -> Result<bool, VolumeError> {
    let (itself, below) = (format!("/{directory}/{name}"), format!("/{directory}/{name}/"));
    let all = Path::new("/proc");
    let mut seen = HashSet::new();
    for process in fs::read_dir(all).map_err(on("list", all))? {
        let process = process.map_err(on("list", all))?.path();
        // Not a process, or one that has ended.
        let Ok(namespace) = fs::read_link(process.join("ns/mnt")) else { continue };
        if seen.contains(&namespace) {
            continue;
        }
        let Ok(mounts) = fs::read_to_string(process.join("mountinfo")) else { continue };
        let mut mounted = mounts.lines().filter_map(|line| line.split(' ').nth(3));
        if mounted.any(|root| root.ends_with(&itself) || root.contains(&below)) {
            return Ok(true);
        }
        seen.insert(namespace);
    }
    Ok(false)
}

fn sync(path: &Path) -> Result<(), VolumeError> {
    let synced = File::open(path).and_then(|opened| opened.sync_all());
    Ok(synced.map_err(on("sync", path))?)
}
