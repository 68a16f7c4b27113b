//! Where volumes lie, and the steps by which they come and go.
//!
//! ```text
//! STATE/volumes/ID/data        a writable volume: a directory, or the image of a block volume
//! STATE/volumes/ID/new         one that is not journalled yet
//! STATE/volumes/ID/gone        one that is being removed
//! STATE/content/HEX            the tree sha256:HEX laid out; never written to again
//! STATE/content/HEX.kept       empty: the tree was imported, and is whole in the store
//! STATE/content/NAME-N.tmp     one that is being laid out, or an archive that is being imported
//! STATE/trash/NAME             read-only content that is being removed
//! ```
//!
//! What has its final name is whole, whenever the machine stops, and what is not there takes no room: a volume is removed
//! only once it has another name, and what has such a name is seen to on open.
//!
//! On open, for each `ID`:
//!
//! - if the journal has the volume here and there is no `data`, then `new`, or else `gone`, becomes `data`: an arrival
//!   that was journalled is finished, a removal that was not is undone;
//! - `new` and `gone` that are left are removed, and `ID` if it is empty.
//!
//! A `data` that the journal does not have here is kept, and told ([`Places::contradictions`]): the journal may be an older
//! copy. Laid-out trees without their final names, and what lies in the trash, are removed.

use std::collections::{BTreeSet, HashSet};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use godwit_protos::{Digest, VolumeId};

use super::VolumeError;
use crate::content::{ContentError, on};
use crate::migrate::journal::{Journal, VolumeEntry};
use crate::step::reach;
use crate::sys::spread_out;
use crate::trees;

/// The places of one node. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Places {
    state_dir: PathBuf,
    journal: Journal,
    /// Writable volumes that are coming or going.
    busy: Arc<Mutex<HashSet<VolumeId>>>,
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
        let places = Self { state_dir: state_dir.to_owned(), journal, busy: Arc::default() };
        for name in ["volumes", "content", "trash"] {
            let path = state_dir.join(name);
            fs::create_dir_all(&path).map_err(on("make directory", &path))?;
            if name != "trash" {
                spread_out(&path);
            }
        }
        for name in places.names("volumes")? {
            if let Ok(id) = name.parse() {
                places.recover(&id)?;
            }
        }
        for name in places.names("trash")? {
            remove(&state_dir.join("trash").join(name))?;
        }
        for name in places.names("content")?.iter().filter(|name| name.ends_with(".tmp")) {
            remove(&state_dir.join("content").join(name))?;
        }
        for told in places.contradictions()? {
            tracing::warn!("{told}");
        }
        Ok(places)
    }

    fn recover(&self, id: &VolumeId) -> Result<(), VolumeError> {
        let [data, new, gone] = ["data", "new", "gone"].map(|name| self.volume(id).join(name));
        if self.is_journalled(id)? && !is_there(&data)? {
            for found in [&new, &gone] {
                if is_there(found)? {
                    fs::rename(found, &data).map_err(on("move into place", &data))?;
                    sync(&self.volume(id))?;
                    break;
                }
            }
        }
        self.remove_rest(id)
    }

    /// Removes `new` and `gone`, and `ID` if nothing else is in it.
    fn remove_rest(&self, id: &VolumeId) -> Result<(), VolumeError> {
        let directory = self.volume(id);
        for rest in ["new", "gone"].map(|name| directory.join(name)) {
            if is_there(&rest)? {
                remove(&rest)?;
            }
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

    /// Whether the journal has it here.
    fn is_journalled(&self, id: &VolumeId) -> Result<bool, VolumeError> {
        Ok(self.journal.volume(id)?.is_some_and(|entry| entry.moved_to.is_none()))
    }

    /// What journal and disk say otherwise of each other, each in words that say what to do. Volumes that are coming or
    /// going are left out.
    pub(super) fn contradictions(&self) -> Result<Vec<String>, VolumeError> {
        let on_disk = self.names("volumes")?.into_iter().filter_map(|name| name.parse().ok());
        let journalled = self.journal.volumes()?.into_iter().map(|(id, _)| id);
        let mut found = Vec::new();
        for id in on_disk.chain(journalled).collect::<BTreeSet<VolumeId>>() {
            // Nobody begins meanwhile.
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
    /// 1. remove what is left of an earlier attempt, 2. make `new`, 3. fsync it, `ID` and `volumes`, 4. journal `entry`,
    /// 5. rename `new` to `data`, 6. fsync `ID`.
    ///
    /// One that arrives with a container is not synced: it is as good as not here until that has run, and before that is
    /// told to anybody, the file system is flushed.
    ///
    /// Errors: [`VolumeError::Unjournalled`] for a `data` that is there; [`VolumeError::Busy`]; what `make` says. Before
    /// step 4 there is no such volume then; after it, opening finishes.
    pub(super) fn put(
        &self,
        id: &VolumeId,
        entry: &VolumeEntry,
        make: impl FnOnce(&Path) -> Result<(), VolumeError>,
    ) -> Result<PathBuf, VolumeError> {
        let _busy = self.take(id)?;
        let (directory, data, is_durable) =
            (self.volume(id), self.data(id), entry.arriving.is_none());
        if is_there(&data)? {
            return Err(VolumeError::Unjournalled(data));
        }
        reach("put 1");
        self.remove_rest(id)?;
        reach("put 2");
        let new = directory.join("new");
        let made = fs::create_dir_all(&directory)
            .map_err(|error| on("make directory", &directory)(error).into())
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
    /// 1. rename `data` to `gone`, 2. fsync `ID`, 3. journal, 4. remove `gone` and `ID`.
    ///
    /// Errors: [`VolumeError::Busy`]; the disk's or the journal's. Opening goes back to before step 1, or on from step 3.
    /// Repeating it is safe.
    pub(super) fn remove(
        &self,
        id: &VolumeId,
        entry: Option<&VolumeEntry>,
    ) -> Result<(), VolumeError> {
        let _busy = self.take(id)?;
        let (data, gone) = (self.data(id), self.volume(id).join("gone"));
        reach("remove 1");
        if is_there(&data)? {
            if is_there(&gone)? {
                remove(&gone)?;
            }
            fs::rename(&data, &gone).map_err(on("remove", &data))?;
            reach("remove 2");
            sync(&self.volume(id))?;
        }
        reach("remove 3");
        self.journal.set_volume(id, entry)?;
        reach("remove 4");
        self.remove_rest(id)
    }

    /// Makes a directory that the next opening removes.
    pub(super) fn temporary(&self, name: &str) -> Result<PathBuf, VolumeError> {
        let path = self.state_dir.join("content").join(format!("{name}-{}.tmp", next()));
        fs::create_dir(&path).map_err(on("make directory", &path))?;
        Ok(path)
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

    /// Puts a laid-out tree into place, which `make` makes durable at the path that it is given. There already is success.
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
            remove(&partial)?;
            return Err(error);
        }
        reach("content 2");
        match fs::rename(&partial, &path) {
            Err(_) if path.is_dir() => remove(&partial)?,
            renamed => renamed.map_err(on("move into place", &path))?,
        }
        reach("content 3");
        sync(&self.state_dir.join("content"))?;
        Ok(path)
    }

    /// Puts another copy in the place of a tree that is laid out, which `make` makes durable at the path that it is given.
    ///
    /// 1. make `HEX-N.tmp`, 2. make `HEX.kept` as [`Self::keep`] does, since between steps 3 and 4 there is no `HEX`,
    /// 3. rename `HEX` to `trash/NAME`, 4. rename `HEX-N.tmp` to `HEX`, 5. fsync `trash` and `content`,
    /// 6. remove `trash/NAME`.
    ///
    /// Caller: the store has the tree whole. Errors: [`VolumeError::Mounted`], since whoever has it mounted would see its
    /// files go; what `make` says; the disk's. What is laid out is then as it was. Stopped between steps 3 and 4, it is
    /// laid out when it is next mounted.
    pub(super) fn replace_content(
        &self,
        digest: &Digest,
        make: impl FnOnce(&Path) -> Result<(), VolumeError>,
    ) -> Result<(), VolumeError> {
        let (path, name) = (self.content(digest), trash_name(digest));
        let [content, trash] = self.content_and_trash();
        let gone = trash.join(&name);
        if is_mounted("content", &digest.hex())? {
            return Err(VolumeError::Mounted(*digest));
        }
        reach("replace 1");
        let partial = self.temporary(&digest.hex())?;
        if let Err(error) = make(&partial) {
            remove(&partial)?;
            return Err(error);
        }
        reach("replace 2");
        self.keep(digest)?;
        reach("replace 3");
        fs::rename(&path, &gone).map_err(on("remove", &path))?;
        // Somebody may have mounted it by its old name until just now, and nobody can any more.
        if is_mounted("trash", &name)? {
            fs::rename(&gone, &path).map_err(on("move back", &path))?;
            remove(&partial)?;
            return Err(VolumeError::Mounted(*digest));
        }
        reach("replace 4");
        match fs::rename(&partial, &path) {
            // Somebody has laid it out meanwhile.
            Err(_) if path.is_dir() => remove(&partial)?,
            renamed => renamed.map_err(on("move into place", &path))?,
        }
        reach("replace 5");
        sync(&trash)?;
        sync(&content)?;
        reach("replace 6");
        Ok(remove(&gone)?)
    }

    /// Removes a tree, whether it is laid out or not.
    ///
    /// 1. remove `HEX.kept`, 2. rename `HEX` to `trash/NAME`, 3. fsync `trash` and `content`, 4. remove it.
    ///
    /// Errors: [`VolumeError::NoContent`]; the disk's.
    pub(super) fn remove_content(&self, digest: &Digest) -> Result<(), VolumeError> {
        if !self.has_content(digest) {
            return Err(VolumeError::NoContent(*digest));
        }
        let (path, kept) = (self.content(digest), self.kept(digest));
        let [content, trash] = self.content_and_trash();
        let gone = trash.join(trash_name(digest));
        reach("trash 1");
        if is_there(&kept)? {
            remove(&kept)?;
        }
        reach("trash 2");
        let is_laid_out = is_there(&path)?;
        if is_laid_out {
            fs::rename(&path, &gone).map_err(on("remove", &path))?;
        }
        reach("trash 3");
        sync(&trash)?;
        sync(&content)?;
        reach("trash 4");
        if is_laid_out { Ok(remove(&gone)?) } else { Ok(()) }
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

/// A number that this process has not used yet.
fn next() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

fn is_there(path: &Path) -> Result<bool, VolumeError> {
    Ok(fs::exists(path).map_err(on("look at", path))?)
}

fn trash_name(digest: &Digest) -> String {
    format!("{}-{}", digest.hex(), next())
}

/// Whether a process that we can see has the tree `directory/name` mounted, or what is in it. `name` has a digest in it, so
/// it is the same tree wherever that lies.
///
/// Source: proc(5), "mountinfo": the fourth field is the directory that is mounted, in its file system.
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

/// Removes a directory or file.
pub(super) fn remove(path: &Path) -> Result<(), ContentError> {
    let kind = fs::symlink_metadata(path).map_err(on("stat", path))?;
    let removed = if kind.is_dir() { trees::remove(path) } else { fs::remove_file(path) };
    removed.map_err(on("remove", path))
}
