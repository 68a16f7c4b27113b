//! The shim's own service, for the node's daemon at the source of a migration: the daemon decides,
//! the container does.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use godwit_protos::shim::{ContainerRequest, Description, DumpRequest, Shim, Timing};
use ttrpc::r#async::TtrpcContext;

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
        Ok(timing(self.0.get(&r.id)?.freeze().await?))
    }

    async fn dump(&self, _: &TtrpcContext, r: DumpRequest) -> ttrpc::Result<Timing> {
        let container = self.0.get(&r.id)?;
        let begun = std::time::Instant::now();
        for path in [&r.image_path, &r.work_path] {
            if !Path::new(path).is_absolute() {
                return Err(TaskError::Invalid(format!("{path:?} is not an absolute path")).into());
            }
        }
        container.dump(Path::new(&r.image_path), Path::new(&r.work_path)).await?;
        Ok(timing(begun.elapsed()))
    }

    async fn thaw(&self, _: &TtrpcContext, r: ContainerRequest) -> ttrpc::Result<Timing> {
        Ok(timing(self.0.get(&r.id)?.thaw().await?))
    }

    async fn let_go(&self, _: &TtrpcContext, r: ContainerRequest) -> ttrpc::Result<Timing> {
        Ok(timing(self.0.get(&r.id)?.let_go().await?))
    }
}
