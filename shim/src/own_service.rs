//! The shim's own service, for the node's daemon at the source of a migration: the daemon decides,
//! the container does.
//!
//! What was begun is finished although the daemon dies: ttrpc drops a call's future with its
//! connection, and a dump without a caller would freeze the container again after a thaw,
//! since CRIU leaves the freezer as it found it. So calls run on their own, and a thaw waits for a
//! dump.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use godwit_protos::shim::{ContainerRequest, Description, DumpRequest, Shim, Timing};
use ttrpc::r#async::TtrpcContext;

use crate::detached::finished;
use crate::error::TaskError;
use crate::launch::upper_dir;
use crate::task::Containers;

/// See the module comment.
pub(crate) struct OwnService(pub(crate) Arc<Containers>);

fn timing(elapsed: Duration) -> Timing {
    let elapsed_us = u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX);
    Timing { elapsed_us, ..Default::default() }
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
        let container = self.0.get(&r.id)?;
        finished("freeze", async move { Ok(timing(container.freeze().await?)) }).await
    }

    async fn dump(&self, _: &TtrpcContext, r: DumpRequest) -> ttrpc::Result<Timing> {
        let container = self.0.get(&r.id)?;
        for path in [&r.image_path, &r.work_path] {
            if !Path::new(path).is_absolute() {
                return Err(TaskError::Invalid(format!("{path:?} is not an absolute path")).into());
            }
        }
        let dump = async move {
            let begun = Instant::now();
            let limit = (r.limit_ms > 0).then(|| Duration::from_millis(r.limit_ms));
            container.dump(Path::new(&r.image_path), Path::new(&r.work_path), limit).await?;
            Ok(timing(begun.elapsed()))
        };
        finished("dump", dump).await
    }

    async fn thaw(&self, _: &TtrpcContext, r: ContainerRequest) -> ttrpc::Result<Timing> {
        let container = self.0.get(&r.id)?;
        finished("thaw", async move { Ok(timing(container.thaw().await?)) }).await
    }

    async fn let_go(&self, _: &TtrpcContext, r: ContainerRequest) -> ttrpc::Result<Timing> {
        let container = self.0.get(&r.id)?;
        finished("let_go", async move { Ok(timing(container.let_go().await?)) }).await
    }
}
