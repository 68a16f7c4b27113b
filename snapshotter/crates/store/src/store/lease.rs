//! Leases: while one is live, nothing is swept.
//!
//! A caller that writes objects that no snapshot names yet, or relies on objects being there, holds
//! a lease. It ends when it is dropped or when its time runs out, so a caller that hangs delays
//! sweeping but does not prevent it for ever. Leases live in memory: after a restart there are
//! none, and nothing sweeps before the interrupted work has taken its own again.
//!
//! The rule that everything rests on: a sweep removes objects only under [`Leases::exclusive`],
//! that is, when no lease is live now and none was taken since it began to mark. So a lease that
//! has been live without a gap since an object was seen or written proves that it is still there.
//!
//! All leases end when the index is reopened after a failure: what was written under them, and was
//! not yet durable, is gone ([`super::index`]).

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::StoreError;

#[derive(Default)]
pub(super) struct Leases {
    state: Mutex<State>,
    /// How often the index was reopened.
    reopened: Arc<AtomicU64>,
}

#[derive(Default)]
pub(super) struct State {
    live: HashMap<u64, Live>,
    next_id: u64,
    /// Grows whenever something happens that a running sweep has not taken into account.
    generation: u64,
}

struct Live {
    name: String,
    expires: Instant,
    /// How often the index had been reopened when it was taken.
    reopened: u64,
}

/// What a lease and the writers under it share.
pub(super) struct Token {
    id: u64,
    name: String,
    ttl: Duration,
}

/// Keeps the store from being swept until dropped or expired.
pub struct Lease {
    pub(super) token: Arc<Token>,
    leases: Arc<Leases>,
}

impl Lease {
    /// Lets the lease run for its full time again. Errors: [`StoreError::LeaseExpired`] if it is
    /// too late.
    pub fn renew(&self) -> Result<(), StoreError> {
        self.leases.renew(&self.token)
    }

    /// The name it was taken under, for messages.
    pub fn name(&self) -> &str {
        &self.token.name
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.leases.lock().live.remove(&self.token.id);
    }
}

impl Leases {
    /// Leases that end when `reopened`, a count of the index, grows.
    pub(super) fn new(reopened: Arc<AtomicU64>) -> Self {
        Self { state: Mutex::default(), reopened }
    }

    /// Without those that have ended.
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing in here panics between two writes that belong together.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (now, reopened) = (Instant::now(), self.reopened.load(Ordering::SeqCst));
        state.live.retain(|_, live| live.expires > now && live.reopened == reopened);
        state
    }

    pub(super) fn take(self: &Arc<Self>, name: &str, ttl: Duration) -> Lease {
        let mut state = self.lock();
        let id = state.next_id;
        state.next_id += 1;
        state.generation += 1;
        let reopened = self.reopened.load(Ordering::SeqCst);
        state.live.insert(id, Live { name: name.to_owned(), expires: after(ttl), reopened });
        let token = Arc::new(Token { id, name: name.to_owned(), ttl });
        Lease { token, leases: Arc::clone(self) }
    }

    /// Also how a writer proves that its lease has been live all along.
    pub(super) fn renew(&self, token: &Token) -> Result<(), StoreError> {
        let mut state = self.lock();
        let Some(live) = state.live.get_mut(&token.id) else {
            return Err(StoreError::LeaseExpired(token.name.clone()));
        };
        live.expires = after(token.ttl);
        Ok(())
    }

    /// Names of the live leases, sorted.
    pub(super) fn names(&self) -> Vec<String> {
        let mut names: Vec<String> =
            self.lock().live.values().map(|live| live.name.clone()).collect();
        names.sort();
        names
    }

    /// Tells a running sweep that its roots are out of date.
    pub(super) fn disturb(&self) {
        self.lock().generation += 1;
    }

    pub(super) fn generation(&self) -> u64 {
        self.lock().generation
    }

    /// Keeps leases from being taken while the guard lives; `None` if one is live, or something has
    /// happened since `generation`.
    pub(super) fn exclusive(&self, generation: u64) -> Option<MutexGuard<'_, State>> {
        let state = self.lock();
        (state.live.is_empty() && state.generation == generation).then_some(state)
    }
}

fn after(ttl: Duration) -> Instant {
    let now = Instant::now();
    // A lease of centuries is a caller's way to say "until dropped".
    now.checked_add(ttl).unwrap_or(now + Duration::from_secs(86_400 * 365))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(3600);

    #[test]
    fn a_lease_is_live_until_it_is_dropped_or_expires() {
        let leases = Arc::new(Leases::default());
        let first = leases.take("first", LONG);
        let second = leases.take("second", Duration::ZERO);
        assert_eq!(leases.names(), ["first"]);
        assert!(matches!(second.renew(), Err(StoreError::LeaseExpired(name)) if name == "second"));
        first.renew().unwrap();
        drop(first);
        assert!(leases.names().is_empty());
    }

    #[test]
    fn exclusive_needs_no_live_lease_and_none_since() {
        let leases = Arc::new(Leases::default());
        let before = leases.generation();
        assert!(leases.exclusive(before).is_some());
        let lease = leases.take("pull", LONG);
        assert!(leases.exclusive(leases.generation()).is_none());
        drop(lease);
        assert!(leases.exclusive(before).is_none(), "one came and went");
        assert!(leases.exclusive(leases.generation()).is_some());
    }

    #[test]
    fn a_lease_without_end_does_not_overflow() {
        let leases = Arc::new(Leases::default());
        let _lease = leases.take("for ever", Duration::MAX);
        assert_eq!(leases.names(), ["for ever"]);
    }
}
