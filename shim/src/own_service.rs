//! The shim's own service, for the node's daemon at the source of a migration: the daemon decides,
//! the container does.
//!
//! What was begun is finished although the daemon dies: ttrpc drops a call's future with its
//! connection, and a dump that nobody waits for would freeze the container again after a thaw, since
//! CRIU leaves the freezer as it found it. So calls run on their own, and a thaw waits for a dump.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use godwit_protos::shim::{ContainerRequest, Description, DumpRequest, Shim, Timing};
use ttrpc::r#async::TtrpcContext;

use crate::container::Container;
use crate::error::TaskError;
use crate::launch::upper_dir;
use crate::task::Containers;

/// See the module comment.
pub(crate) struct OwnService(pub(crate) Arc<Containers>);

fn timing(elapsed: Duration) -> Timing {
    let elapsed_us = u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX);
    Timing { elapsed_us, ..Default::default() }
}

impl OwnService {
    /// Runs `work` with the container to its end, whether or not the caller waits.
    async fn detached<T, F>(
        &self,
        id: &str,
        work: impl FnOnce(Arc<Container>) -> F,
    ) -> ttrpc::Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, TaskError>> + Send + 'static,
    {
        let done = tokio::spawn(work(self.0.get(id)?)).await;
        let interrupted = || TaskError::Invalid("interrupted".to_owned());
        Ok(done.unwrap_or_else(|_cause| Err(interrupted()))?)
    }
}

#[async_trait]
impl Shim for OwnService {
    async fn describe(&self, _: &TtrpcContext, r: ContainerRequest) -> ttrpc::Result<Description> {
        let container = self.0.get(&r.id)?;
        Ok(Description {
            bundle: container.bundle.display().to_string(),
            init_pid: container.init.pid(),
            status: container.init.phase().name().to_owned(),
            terminal: container.init.stdio.terminal,
            execs: container.running_execs(),
            rootfs_upper: upper_dir(&container),
            ..Default::default()
        })
    }

    async fn freeze(&self, _: &TtrpcContext, r: ContainerRequest) -> ttrpc::Result<Timing> {
        let elapsed = self.detached(&r.id, |one| async move { one.freeze().await }).await?;
        Ok(timing(elapsed))
    }

    async fn dump(&self, _: &TtrpcContext, r: DumpRequest) -> ttrpc::Result<Timing> {
        let begun = std::time::Instant::now();
        for path in [&r.image_path, &r.work_path] {
            if !Path::new(path).is_absolute() {
                return Err(TaskError::Invalid(format!("{path:?} is not an absolute path")).into());
            }
        }
        let (images, work) = (r.image_path, r.work_path);
        let dump =
            async move |one: Arc<Container>| one.dump(Path::new(&images), Path::new(&work)).await;
        self.detached(&r.id, dump).await?;
        Ok(timing(begun.elapsed()))
    }

    async fn thaw(&self, _: &TtrpcContext, r: ContainerRequest) -> ttrpc::Result<Timing> {
        let elapsed = self.detached(&r.id, |one| async move { one.thaw().await }).await?;
        Ok(timing(elapsed))
    }

    async fn let_go(&self, _: &TtrpcContext, r: ContainerRequest) -> ttrpc::Result<Timing> {
        let elapsed = self.detached(&r.id, |one| async move { one.let_go().await }).await?;
        Ok(timing(elapsed))
    }
}
