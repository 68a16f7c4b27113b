//! The cut: every subject of a container at one instant.
//!
//! 1. Freeze. 2. Dump with CRIU and read the file trees, at the same time ([`freeze_and_dump`]). 3. Read the dump
//! ([`read_dump`]). The container stays frozen: a hand-off goes on from there. [`take`] makes a consistent snapshot of it
//! instead, and thaws after step 2.
//!
//! On failure whoever has journalled the offer takes it back, which thaws ([`super::release::take_offer_back`]).

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::describe::{Described, mapped_inodes};
use super::subjects::{Subjects, Version};
use super::{MigrationError, blocking};
use crate::content::on;
use crate::node::Node;
use crate::store::Lease;

/// Subjects that a thread reads while others wait.
pub(super) type Shared = Arc<Mutex<Subjects>>;

/// How long the steps took.
pub(super) struct Times {
    pub(super) freeze: Duration,
    pub(super) dump: Duration,
}

/// Waits for the thread that captures.
pub(super) fn lock(subjects: &Mutex<Subjects>) -> MutexGuard<'_, Subjects> {
    subjects.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Steps 1 and 2. CRIU's images are in `directory/images` then.
pub(super) async fn freeze_and_dump(
    node: &Node,
    described: &Described,
    (subjects, lease): (&Shared, &Arc<Lease>),
    directory: &Path,
) -> Result<Times, MigrationError> {
    let container = &described.container;
    let begun = Instant::now();
    described.shim.freeze(container.id()).await?;
    let freeze = begun.elapsed();

    let begun = Instant::now();
    let (images, work) = (directory.join("images"), directory.join("work"));
    for directory in [&images, &work] {
        let made = tokio::fs::create_dir_all(directory).await;
        made.map_err(on("make directory", directory))?;
    }
    // Now that nothing runs: what is mapped at the cut, and what was at an earlier capture.
    let pids = node.containerd.pids(container.namespace(), container.id()).await?;
    let mut mapped = mapped_inodes(&pids);
    mapped.extend(&described.mapped_inodes);
    let (subjects, lease) = (subjects.clone(), lease.clone());
    let reading = tokio::task::spawn_blocking(move || {
        lock(&subjects).capture_trees(&lease, &mapped, &|_| true)
    });
    let dumped = described.shim.dump(container.id(), &images, &work).await;
    let trees = reading.await.map_err(|_cause| MigrationError::Interrupted)?;
    dumped?;
    trees?;
    Ok(Times { freeze, dump: begun.elapsed() })
}

/// Step 3. Returns all subjects as of the cut.
pub(super) async fn read_dump(
    (subjects, lease): (&Shared, &Arc<Lease>),
    directory: &Path,
) -> Result<Vec<Version>, MigrationError> {
    let (subjects, lease, images) = (subjects.clone(), lease.clone(), directory.join("images"));
    blocking(move || {
        let mut subjects = lock(&subjects);
        subjects.capture_dump(&lease, &images)?;
        Ok(subjects.versions())
    })
    .await
}
