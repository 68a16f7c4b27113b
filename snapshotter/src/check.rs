//! `godwit check`: is what this node keeps what it should be?
//!
//! Looking changes nothing:
//!
//! 1. every object of the store is read and hashed;
//! 2. from every cached snapshot and read-only volume all that hangs on it is walked: what is
//!    damaged or not there is lost to it;
//! 3. every laid-out read-only volume is compared with its name, and what lies where writable ones
//!    do with the journal;
//! 4. containerd's snapshots are compared with each other and with their directories.
//!
//! Repairing goes on: 5. what is damaged is quarantined, so that another copy can take its place,
//! and what could not be removed is tried again; 6. objects of a read-only volume are taken from
//! where it is laid out; 7. what is still lost is fetched from peers; 8. a read-only volume that is
//! damaged where it is laid out, but whole in the store, is laid out again, unless a container has
//! it mounted;
//! 9. a layer of containerd's that has lost its directory is unpacked again, from containerd's
//!    blob, the store or peers;
//! 10. all is looked at again. Stopping anywhere is safe: each step leaves the store as any other
//!     writer would, and can be
//! repeated.
//!
//! It goes through the daemon while it runs (the control socket), and opens the state itself while
//! it does not; then no peer can be asked, and steps 7 and 9 are left out. Opening is what the
//! daemon's start does: what was cut short is finished or taken back, and what it mends by itself
//! is not found any more.

use std::collections::HashSet;
use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use godwit_protos::{Digest, VolumeSource};
use serde::{Deserialize, Serialize};

use crate::config::Config;
use crate::content::object::{self, Kind};
use crate::error::chain;
use crate::layers::Layers;
use crate::migrate::{MigrationError, blocking};
use crate::node::Node;
use crate::ownership::journal::Journal;
use crate::peer::fetch::{Patience, fetch_from};
use crate::peer::neighbours::{HELLO_MAX, connect};
use crate::snapshots::Snapshotter;
use crate::store::{Options, Store, StoreError};
use crate::volumes::{VolumeError, Volumes};

/// How long what is looked at, and what is fetched, is kept from being swept.
const CHECK_MAX: Duration = Duration::from_secs(24 * 3600);

/// What was found. A field of a `--output json`; docs/protocol.md explains it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Objects that were read.
    pub objects: u64,
    /// What they take on disk.
    pub bytes: u64,
    /// containerd's snapshots that were looked at.
    pub layers: u64,
    /// Objects that are not what their names say.
    pub damaged: Vec<Damaged>,
    /// What cannot be read as a whole any more.
    pub lost: Vec<Lost>,
    /// What else is wrong, each with what to do.
    pub findings: Vec<String>,
    /// Objects that the repair quarantined.
    pub quarantined: u64,
    /// Objects that it fetched from peers.
    pub fetched: u64,
}

/// A damaged object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Damaged {
    /// `sha256:...`
    pub object: String,
    /// Number of its pack.
    pub pack: u32,
    /// Where its record begins, in bytes.
    pub offset: u32,
    /// What is wrong with it.
    pub reason: String,
}

/// A snapshot or volume of which objects are damaged or missing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lost {
    /// What it is of.
    pub name: String,
    /// How many objects of it are not there; those that hang on them are not known.
    pub objects: u64,
    /// How it can be given up.
    pub advice: String,
}

impl Report {
    /// Whether nothing is wrong.
    pub fn is_whole(&self) -> bool {
        self.damaged.is_empty() && self.lost.is_empty() && self.findings.is_empty()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { objects, bytes, layers, quarantined, fetched, .. } = self;
        write!(f, "{objects} objects ({bytes} bytes) and {layers} layers were read")?;
        if *quarantined + *fetched > 0 {
            write!(f, "\n{quarantined} objects quarantined, {fetched} fetched from peers")?;
        }
        for Damaged { object, pack, offset, reason } in &self.damaged {
            write!(f, "\ndamaged: {object} in pack {pack} at {offset}: {reason}")?;
        }
        for Lost { name, objects, advice } in &self.lost {
            write!(f, "\nlost: {objects} objects of {name}; {advice}")?;
        }
        for finding in &self.findings {
            write!(f, "\nwrong: {finding}")?;
        }
        if self.is_whole() { write!(f, "\nall is whole") } else { Ok(()) }
    }
}

/// Why nothing can be said.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// The disk failed, or another process works on the state.
    #[error("cannot look at the store")]
    Store(#[from] StoreError),
    /// Volumes cannot be listed.
    #[error("cannot look at the volumes")]
    Volumes(#[from] VolumeError),
    /// The snapshots of containerd cannot be looked at.
    #[error("cannot look at containerd's snapshots")]
    Snapshots(#[from] crate::snapshots::SnapshotError),
    /// Something is in use, by a daemon whose socket does not answer.
    #[error("the state is in use, but no daemon answers")]
    InUse(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The daemon stops.
    #[error(transparent)]
    Interrupted(#[from] MigrationError),
}

/// All that is checked. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Kept {
    store: Store,
    volumes: Volumes,
    snapshots: Arc<Snapshotter>,
}

/// A root, and what is lost of it.
struct Loss {
    root: (Kind, Digest),
    lost: Lost,
}

impl Kept {
    /// What a running node keeps.
    pub fn of(node: &Node, snapshots: Arc<Snapshotter>) -> Self {
        Self { store: node.store.clone(), volumes: node.volumes.clone(), snapshots }
    }

    /// Steps 1 to 4.
    fn look(&self) -> Result<(Report, Vec<Loss>), CheckError> {
        let _lease = self.store.lease("check", CHECK_MAX);
        let examined = self.store.examine()?;
        let damaged: HashSet<Digest> = examined.damaged.iter().map(|one| one.digest).collect();
        let mut walk = Walk { store: &self.store, damaged, whole: HashSet::new() };
        let mut losses = Vec::new();
        let (layers, mut findings) = self.snapshots.check()?;
        for (id, snapshot) in self.store.all_snapshots()? {
            let name = format!("{id} of {}", snapshot.subject);
            let advice = format!("`godwit snapshot delete {}` gives it up", id.0);
            let Ok(kind) = Kind::try_from(snapshot.root_kind) else {
                findings
                    .push(format!("{name} is of a kind that this version cannot read; {advice}"));
                continue;
            };
            losses.extend(walk.loss((kind, snapshot.root), name, advice)?);
        }
        for digest in self.volumes.contents()? {
            let name = format!("volume {digest}");
            let advice = format!("`godwit volume rm {digest}`, and import it again");
            losses.extend(walk.loss((Kind::Tree, digest), name, advice)?);
        }
        findings.extend(self.snapshots.failure().map(|reason| {
            format!(
                "the database of containerd's snapshots failed: {reason}; the daemon ends and opens it again \
                 once the disk takes writes"
            )
        }));
        findings.extend(self.damaged_packs());
        findings.extend(self.volumes.contradictions()?);
        findings.extend(self.volumes.leftovers().reasons());
        findings.extend(self.store.leftovers().reasons());
        for digest in self.volumes.laid_out()? {
            match self.volumes.compare(&digest) {
                Ok(()) => {}
                Err(error @ VolumeError::Damaged { .. }) => findings.push(error.to_string()),
                Err(error) => return Err(error.into()),
            }
        }
        let damaged = examined.damaged.iter().map(|one| Damaged {
            object: one.digest.to_string(),
            pack: one.pack,
            offset: one.offset,
            reason: one.why.to_string(),
        });
        let report = Report {
            objects: examined.objects,
            bytes: examined.bytes,
            layers,
            damaged: damaged.collect(),
            lost: losses.iter().map(|loss| loss.lost.clone()).collect(),
            findings,
            ..Report::default()
        };
        Ok((report, losses))
    }

    /// Packs that were not whole when the store was opened; what hung on them is among what is
    /// lost.
    fn damaged_packs(&self) -> Vec<String> {
        let missing = self.store.damage().iter().filter(|damage| damage.objects_lost > 0);
        let text = missing.map(|damage| {
            let (pack, lost) = (damage.pack, damage.objects_lost);
            format!("pack {pack} was not whole when it was opened: {lost} objects were quarantined")
        });
        text.collect()
    }

    /// Steps 5 and 6. How many objects were quarantined.
    fn quarantine(&self) -> Result<u64, CheckError> {
        let mut quarantined = 0;
        for damaged in self.store.examine()?.damaged {
            match self.store.verify(&damaged.digest) {
                Err(StoreError::Corrupt { .. }) => quarantined += 1,
                other => drop(other?),
            }
        }
        for digest in self.volumes.laid_out()? {
            match self.volumes.verify(&VolumeSource::Content(digest)) {
                Ok(()) | Err(VolumeError::Damaged { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.snapshots.mend()?;
        self.volumes.leftovers().retry();
        self.store.leftovers().retry();
        self.store.sync()?;
        Ok(quarantined)
    }

    /// Step 8. The next look reports what cannot be laid out again.
    fn lay_out_again(&self) -> Result<(), VolumeError> {
        for digest in self.volumes.laid_out()? {
            if !matches!(self.volumes.compare(&digest), Err(VolumeError::Damaged { .. })) {
                continue;
            }
            if let Err(error) = self.volumes.lay_out_again(&digest) {
                tracing::info!(%digest, error = chain(&error), "not laid out again");
            }
        }
        Ok(())
    }
}

/// From roots to all that hangs on them.
struct Walk<'a> {
    store: &'a Store,
    damaged: HashSet<Digest>,
    /// What is whole with all below it.
    whole: HashSet<(Kind, Digest)>,
}

impl Walk<'_> {
    fn loss(
        &mut self,
        root: (Kind, Digest),
        name: String,
        advice: String,
    ) -> Result<Option<Loss>, StoreError> {
        let mut lost = HashSet::new();
        if self.is_whole(root, &mut lost)? {
            return Ok(None);
        }
        let objects = lost.len() as u64;
        Ok(Some(Loss { root, lost: Lost { name, objects, advice } }))
    }

    /// Whether all below `one` is there; what is not goes into `lost`. As deep as trees nest, which
    /// has a limit.
    fn is_whole(
        &mut self,
        one: (Kind, Digest),
        lost: &mut HashSet<Digest>,
    ) -> Result<bool, StoreError> {
        let (kind, digest) = one;
        if self.whole.contains(&one) {
            return Ok(true);
        }
        if self.damaged.contains(&digest) || !self.store.contains(&digest)? {
            lost.insert(digest);
            return Ok(false);
        }
        if kind.is_leaf() {
            return Ok(true);
        }
        let bytes = self.store.get(&digest)?.unwrap_or_default();
        let Ok(children) = object::children(kind, &bytes) else {
            lost.insert(digest);
            return Ok(false);
        };
        let mut is_whole = true;
        for child in children {
            is_whole &= self.is_whole(child, lost)?;
        }
        if is_whole {
            self.whole.insert(one);
        }
        Ok(is_whole)
    }
}

/// Checks what a running node keeps. Errors: [`CheckError`] when nothing can be said.
pub async fn online(node: &Arc<Node>, kept: Kept, repair: bool) -> Result<Report, CheckError> {
    let look = async |kept: &Kept| {
        let kept = kept.clone();
        blocking(move || Ok(kept.look())).await?
    };
    let (report, _) = look(&kept).await?;
    if !repair || report.is_whole() {
        return Ok(report);
    }
    let here = kept.clone();
    let quarantined = blocking(move || Ok(here.quarantine())).await??;
    let lease = Arc::new(node.store.lease("repair", CHECK_MAX));
    let (peers, _) = connect(&node.config, &node.links, HELLO_MAX, &[]).await;
    let mut fetched = 0;
    for loss in look(&kept).await?.1 {
        let (peers, patience) = (peers.clone(), Patience::USUAL.source);
        let brought =
            fetch_from(&node.store, &node.links, peers, loss.root, &lease, patience).await;
        match brought {
            Ok(brought) => fetched += brought.values().map(|(objects, _)| objects).sum::<u64>(),
            Err(error) => {
                let error = chain(&error);
                tracing::info!(name = loss.lost.name, error, "not repaired");
            }
        }
    }
    let here = kept.clone();
    blocking(move || Ok(here.store.sync())).await??;
    let here = kept.clone();
    blocking(move || Ok(here.lay_out_again())).await??;
    Layers::new(node.clone(), kept.snapshots.clone()).put_back().await?;
    let (report, _) = look(&kept).await?;
    Ok(Report { quarantined, fetched, ..report })
}

/// Checks the state that `config` names while no daemon works on it.
///
/// A database that cannot be opened is a finding. Errors: [`CheckError`] when nothing can be said.
pub fn offline(config: &Config, repair: bool) -> Result<Report, CheckError> {
    let kept = match open(config) {
        Ok(kept) => kept,
        Err(OpenError { error, in_use: true }) => return Err(CheckError::InUse(error)),
        Err(OpenError { error, .. }) => {
            let findings = vec![chain(&*error)];
            return Ok(Report { findings, ..Report::default() });
        }
    };
    let (report, _) = kept.look()?;
    if !repair || report.is_whole() {
        return Ok(report);
    }
    let quarantined = kept.quarantine()?;
    kept.lay_out_again()?;
    let (report, _) = kept.look()?;
    Ok(Report { quarantined, ..report })
}

struct OpenError {
    error: Box<dyn std::error::Error + Send + Sync>,
    in_use: bool,
}

/// As the daemon's start does it, with all that it does about leftovers.
fn open(config: &Config) -> Result<Kept, OpenError> {
    fn failed<E: std::error::Error + Send + Sync + 'static>(in_use: bool, error: E) -> OpenError {
        OpenError { error: Box::new(error), in_use }
    }
    use crate::{snapshots, store};
    let state = &config.state_dir;
    let snapshots = Snapshotter::open(&state.join("snapshots"))
        .map_err(|error| failed(matches!(error, snapshots::OpenError::Locked(_)), error))?;
    let store = Store::open(&state.join("store"), Options::default())
        .map_err(|error| failed(matches!(error, store::OpenError::InUse(_)), error))?;
    let journal = Journal::open(&state.join("node.redb"), Path::new(godwit_protos::path::FENCES))
        .map_err(|error| failed(false, error))?;
    let volumes =
        Volumes::open(state, journal, store.clone()).map_err(|error| failed(false, error))?;
    Ok(Kept { store, volumes, snapshots: Arc::new(snapshots) })
}
