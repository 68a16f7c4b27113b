//! Calls that are finished although their caller goes away.
//!
//! ttrpc drops the future of a call with its connection. A containerd that is killed during a
//! Create or Delete would leave a container half made or half removed; containerd's own shim goes
//! on to the end, and so does this one. Calls that only look or wait end with their caller.

use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim::protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
    CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
    PauseRequest, PidsRequest, PidsResponse, ResizePtyRequest, ResumeRequest, ShutdownRequest,
    StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest, StatsResponse,
    UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim::protos::shim_async::Task;
use containerd_shim::{TtrpcContext, TtrpcResult};
use ttrpc::{Code, get_status};

/// Runs a call to its end, whether or not its caller waits. Errors: its own, or that it panicked.
pub(crate) async fn finished<T: Send + 'static>(
    what: &str,
    call: impl Future<Output = TtrpcResult<T>> + Send + 'static,
) -> TtrpcResult<T> {
    let gone = |_cause| {
        Err(ttrpc::Error::RpcStatus(get_status(Code::INTERNAL, format!("{what} panicked"))))
    };
    tokio::spawn(call).await.unwrap_or_else(gone)
}

/// A Task service whose calls are finished.
pub(crate) struct Detached<T>(pub(crate) Arc<T>);

macro_rules! task {
    (
        finish { $($call:ident($request:ty) -> $response:ty;)* }
        pass { $($seen:ident($asked:ty) -> $answer:ty;)* }
    ) => {
        #[async_trait]
        impl<T: Task + Send + Sync + 'static> Task for Detached<T> {
            $(async fn $call(&self, _: &TtrpcContext, r: $request) -> TtrpcResult<$response> {
                let service = Arc::clone(&self.0);
                let call = async move { service.$call(&TtrpcContext::default(), r).await };
                finished(stringify!($call), call).await
            })*
            $(async fn $seen(&self, context: &TtrpcContext, r: $asked) -> TtrpcResult<$answer> {
                self.0.$seen(context, r).await
            })*
        }
    };
}

task! {
    finish {
        create(CreateTaskRequest) -> CreateTaskResponse;
        start(StartRequest) -> StartResponse;
        delete(DeleteRequest) -> DeleteResponse;
        exec(ExecProcessRequest) -> Empty;
        kill(KillRequest) -> Empty;
        pause(PauseRequest) -> Empty;
        resume(ResumeRequest) -> Empty;
        checkpoint(CheckpointTaskRequest) -> Empty;
        update(UpdateTaskRequest) -> Empty;
        resize_pty(ResizePtyRequest) -> Empty;
        close_io(CloseIORequest) -> Empty;
        shutdown(ShutdownRequest) -> Empty;
    }
    pass {
        state(StateRequest) -> StateResponse;
        pids(PidsRequest) -> PidsResponse;
        stats(StatsRequest) -> StatsResponse;
        connect(ConnectRequest) -> ConnectResponse;
        wait(WaitRequest) -> WaitResponse;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tokio::sync::Notify;

    /// Waits in every pause for the word to go on, and tells when it has ended.
    #[derive(Default)]
    struct Slow {
        goes_on: Notify,
        ended: Notify,
    }

    #[async_trait]
    impl Task for Slow {
        async fn pause(&self, _: &TtrpcContext, _: PauseRequest) -> TtrpcResult<Empty> {
            self.goes_on.notified().await;
            self.ended.notify_one();
            Ok(Empty::new())
        }
    }

    #[tokio::test]
    async fn a_call_whose_caller_went_away_is_finished() {
        let slow = Arc::new(Slow::default());
        let service = Detached(Arc::clone(&slow));
        let context = TtrpcContext::default();
        let call = service.pause(&context, PauseRequest::new());
        assert!(tokio::time::timeout(Duration::from_millis(10), call).await.is_err());
        slow.goes_on.notify_one();
        tokio::time::timeout(Duration::from_secs(5), slow.ended.notified()).await.unwrap();
    }
}
