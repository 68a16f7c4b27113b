//! A frozen container's difference goes before everything else that this node sends.
//!
//! While the source sends what changed last, its answers to peers pause between two batches:
//! the container of another migration runs while its bases are fetched, the frozen one does not. A
//! pause is bounded, and a peer that waits asks elsewhere (`peer::queue`); the simulation shows
//! what it is worth (docs/evaluation.md, "Downtime").

use std::time::Duration;

use tokio::sync::watch;

/// Longest pause before a batch: a hand-off that stalls must not stall everybody.
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// How many containers are frozen here until their difference is sent.
#[derive(Debug)]
pub struct FreezeGate(watch::Sender<usize>);

/// Held while a difference is being sent.
#[must_use]
#[derive(Debug)]
pub struct Urgent<'p>(&'p FreezeGate);

impl Default for FreezeGate {
    fn default() -> Self {
        Self(watch::Sender::new(0))
    }
}

impl FreezeGate {
    /// Goes before others until it is dropped.
    pub fn take(&self) -> Urgent<'_> {
        self.0.send_modify(|frozen| *frozen += 1);
        Urgent(self)
    }

    /// Waits until nothing urgent is being sent, [`PAUSE_MAX`] at most.
    pub async fn give_way(&self) {
        self.give_way_for(PAUSE_MAX).await;
    }

    async fn give_way_for(&self, most: Duration) {
        let mut frozen = self.0.subscribe();
        let none = frozen.wait_for(|frozen| *frozen == 0);
        // Late: the pause is over. An error: there is no such thing while `self` lives.
        let _ = tokio::time::timeout(most, none).await;
    }
}

impl Drop for Urgent<'_> {
    fn drop(&mut self) {
        self.0.0.send_modify(|frozen| *frozen -= 1);
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::task::Poll;

    use futures::poll;

    use super::*;

    #[tokio::test]
    async fn others_wait_for_the_last_that_is_frozen() {
        let freeze_gate = FreezeGate::default();
        freeze_gate.give_way().await;
        let (one, other) = (freeze_gate.take(), freeze_gate.take());
        let mut waits = std::pin::pin!(freeze_gate.give_way());
        assert!(is_pending(&mut waits).await);
        drop(one);
        assert!(is_pending(&mut waits).await);
        drop(other);
        waits.await;
    }

    #[tokio::test]
    async fn nobody_waits_for_ever() {
        let freeze_gate = FreezeGate::default();
        let _stalled = freeze_gate.take();
        freeze_gate.give_way_for(Duration::from_millis(10)).await;
    }

    async fn is_pending(future: &mut (impl Future<Output = ()> + Unpin)) -> bool {
        matches!(poll!(future), Poll::Pending)
    }
}
