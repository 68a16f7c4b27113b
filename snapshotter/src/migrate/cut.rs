//! The cut: every subject of a container at one instant.
//!
//! 1. Freeze; fail if the kernel may go on with requests of the frozen processes
//!    ([`super::obstacles`]).
//! 2. Dump with CRIU, and at the same time hash the pages that it writes and read the file trees
//!    ([`freeze_and_dump`]); where the images refer to names that CRIU made for the dump only, read
//!    the trees again with those ([`super::links`]).
//! 3. Read the rest of the dump ([`read_dump`]). The container stays frozen: a hand-off goes on
//!    from there. [`take`] makes a consistent snapshot of it instead, and thaws after step 2.
//!
//! On failure the caller, which has journalled the offer, takes it back, which thaws
//! ([`super::release::take_offer_back`]).

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use criu_wrapper::links::link_remaps;
use criu_wrapper::timers;
use godwit_protos::{ContainerRef, Subject};
use prost::Message as _;

use super::deletion::incarnation;
use super::describe::{Described, describe};
use super::links::Links;
use super::obstacles::check_frozen_aio;
use super::release::take_offer_back;
use super::subjects::{SNAPSHOT_MAX, Subjects, Taken, Version, newest};
use super::{MigrationError, blocking};
use crate::content::memory::DumpReader;
use crate::content::object::{Cut, Kind, Part};
use crate::content::{ContentError, on, put_object};
use crate::node::Node;
use crate::ownership::leases::{Lease as Hold, Leased, Purpose};
use crate::ownership::{Epoch, Event};
use crate::retention::record;
use crate::store::{Lease, Snapshot, SnapshotId};

/// Subjects that a thread reads while others wait.
pub type Shared = Arc<Mutex<Subjects>>;

/// A dump that CRIU has written.
pub(super) struct Dumped {
    /// How long the freeze took, step 2, and of that CRIU's dump.
    pub(super) freeze: Duration,
    pub(super) dump: Duration,
    pub(super) criu: Duration,
    /// What reads the memory; the pages are hashed as far as that was possible beside CRIU.
    reader: DumpReader,
}

/// Waits for the thread that captures.
pub fn lock(subjects: &Mutex<Subjects>) -> MutexGuard<'_, Subjects> {
    subjects.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a session dumps into. Removed with its last owner, however the session ends.
#[derive(Debug)]
pub(super) struct DumpDirectory(PathBuf);

impl DumpDirectory {
    /// Of the session of this name, which is never used again. Made by the dump.
    pub(super) fn of(node: &Node, session: &str) -> Self {
        Self(node.config.state_dir.join("dump").join(session))
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for DumpDirectory {
    fn drop(&mut self) {
        let path = std::mem::take(&mut self.0);
        // It may be as large as the container's memory.
        let remove = move || match fs::remove_dir_all(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                let path = path.display();
                tracing::warn!(%path, %error, "a dump stays until the daemon starts again");
            }
            _ => {}
        };
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(remove)),
            Err(_) => remove(),
        }
    }
}

/// Steps 1 and 2. CRIU's images are in `directory/images` then.
pub(super) async fn freeze_and_dump(
    node: &Node,
    described: &Described,
    (subjects, lease): (&Shared, &Arc<Lease>),
    directory: &Path,
) -> Result<Dumped, MigrationError> {
    let container = &described.container;
    let (images, work) = (directory.join("images"), directory.join("work"));
    for directory in [&images, &work] {
        let made = tokio::fs::create_dir_all(directory).await;
        made.map_err(on("make directory", directory))?;
    }
    let (of, into) = (subjects.clone(), images.clone());
    let reader = blocking(move || lock(&of).begin_dump(&into)).await?;
    let frozen = Instant::now();
    described.shim.freeze(container.id()).await?;
    let freeze = frozen.elapsed();

    let begun = Instant::now();
    let pids = node.containerd.pids(container.namespace(), container.id()).await?;
    let pids = blocking(move || {
        check_frozen_aio(&pids)?;
        timers::settle(&pids);
        Ok(pids)
    })
    .await?;
    let (of, held) = (subjects.clone(), lease.clone());
    let reading = tokio::task::spawn_blocking(move || lock(&of).capture_trees(&held, &|_| true));
    let limit = node.config.freeze_max().saturating_sub(frozen.elapsed());
    let dumped = described.shim.dump(container.id(), &images, &work, limit).await;
    let criu = begun.elapsed();
    let trees = reading.await.map_err(|_cause| MigrationError::Interrupted)?;
    dumped?;
    trees?;
    let remaps = blocking(move || Ok(link_remaps(&images).map_err(ContentError::from)?)).await?;
    if !remaps.is_empty() {
        let (subjects, lease) = (subjects.clone(), lease.clone());
        blocking(move || {
            let _links = Links::make(&remaps, &pids)?;
            lock(&subjects).capture_trees(&lease, &|_| true)
        })
        .await?;
    }
    Ok(Dumped { freeze, dump: begun.elapsed(), criu, reader })
}

/// Step 3. Returns all subjects as of the cut.
pub(super) async fn read_dump(
    (subjects, lease): (&Shared, &Arc<Lease>),
    dumped: Dumped,
) -> Result<Vec<Version>, MigrationError> {
    let (subjects, lease) = (subjects.clone(), lease.clone());
    blocking(move || {
        let mut subjects = lock(&subjects);
        subjects.finish_dump(&lease, dumped.reader)?;
        Ok(subjects.versions())
    })
    .await
}

/// Takes a consistent snapshot of a running container, which is frozen meanwhile, and records it:
/// every subject, and the whole as one [`Cut`] from which `godwit snapshot restore` can start it
/// elsewhere.
///
/// The freeze is journalled as an offer to this node itself, so that whatever happens ends in a
/// thaw. On open: the offer is taken back. Cancel: the work goes on.
///
/// Errors: [`MigrationError`]; the container runs.
pub async fn take(
    node: &Arc<Node>,
    container: &ContainerRef,
) -> Result<Vec<(SnapshotId, Snapshot)>, MigrationError> {
    Ok(take_after(node, container, None).await?.1)
}

/// [`take`] on top of earlier captures and the snapshots as which they were recorded. Tells too
/// what had changed since.
pub async fn take_after(
    node: &Arc<Node>,
    container: &ContainerRef,
    before: Option<(Shared, Vec<SnapshotId>)>,
) -> Result<Taken, MigrationError> {
    let (node, container) = (node.clone(), container.clone());
    let taken = tokio::spawn(async move { take_here(&node, &container, before).await });
    taken.await.map_err(|_cause| MigrationError::Interrupted)?
}

async fn take_here(
    node: &Arc<Node>,
    container: &ContainerRef,
    before: Option<(Shared, Vec<SnapshotId>)>,
) -> Result<Taken, MigrationError> {
    let described = describe(node, container).await?;
    described.check_movable(node)?;
    described.survey(node).await?.check()?;
    let leased = [Leased::Container(container.clone())];
    let purpose = Hold::new(&node.new_id(), Purpose::Captured, container, &node.config.node);
    let named = node.journal.hold_lease(&leased, &purpose)?;
    let lease = Arc::new(node.store.lease("snapshot", SNAPSHOT_MAX));
    let fresh = || (Arc::new(Mutex::new(Subjects::of(node, &described, true))), Vec::new());
    let (subjects, last) = before.unwrap_or_else(fresh);
    let pids = node.containerd.pids(container.namespace(), container.id()).await?;
    // Once while it runs, so that little is left to read while it is frozen.
    let (reading, held) = (subjects.clone(), lease.clone());
    let changed = blocking(move || {
        let mut subjects = lock(&reading);
        subjects.rely_on(&last)?;
        subjects.capture_live(&held, &pids, &|_| true)?;
        Ok(subjects.versions())
    })
    .await?;
    // Again: the capture may have taken minutes.
    let findings = described.survey(node).await?;
    findings.check()?;
    let description = described.response(node, findings).encode_to_vec();
    let directory = DumpDirectory::of(node, &node.new_id());
    let to_itself = format!("{}/{container}", node.config.node);
    let offer = Event::Offer(to_itself, Epoch::default());
    let incarnation = incarnation(node, container).await?;
    let offered = node.journal.apply(container, &offer, |entry| {
        entry.incarnation = Some(incarnation);
        entry.frozen = true;
    });
    let epoch = offered?;
    let shared = (&subjects, &lease);
    let frozen = freeze_and_dump(node, &described, shared, directory.path()).await;
    take_offer_back(node, container, epoch).await;
    drop(named);
    let versions = match frozen {
        Ok(dumped) => read_dump(shared, dumped).await,
        Err(error) => Err(error),
    };
    let (node, container) = (node.clone(), container.clone());
    blocking(move || {
        drop(directory);
        let mut versions = versions?;
        let mut parts: Vec<Part> = versions.iter().map(part).collect();
        parts.sort_unstable_by(|one, next| one.subject.cmp(&next.subject));
        let cut = Cut {
            container: container.to_string(),
            node: node.config.node.clone(),
            architecture: std::env::consts::ARCH.to_owned(),
            epoch: epoch.0,
            description,
            parts,
        };
        let mut writer = node.store.writer(&lease);
        versions.push(Version {
            subject: Subject::Container(container),
            kind: Kind::Cut,
            root: put_object(&mut writer, &cut)?,
            size_bytes: versions.iter().map(|version| version.size_bytes).sum(),
            changed_bytes: 0,
        });
        writer.flush()?;
        let snapshots = newest(&node.store, &versions, &node.config.node)?;
        let ids = record(&node, &snapshots)?;
        Ok((changed, ids.into_iter().zip(snapshots).collect()))
    })
    .await
}

fn part(version: &Version) -> Part {
    let (subject, kind) = (version.subject.to_string(), version.kind as u8);
    Part { subject, kind, root: version.root }
}
