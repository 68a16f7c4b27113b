//! What stands between redb and a database's file: it notes the first failure, and lets nothing
//! through after it.
//!
//! redb rejects all writes after one that failed. But it makes its last change durable when it is
//! closed, and counts some failed writes as none. Behind a gate that is shut neither happens: the
//! file stays at the last change that was made durable before the failure.

use std::fmt::{Debug, Display};
use std::io;
use std::ops::Bound;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use redb::{BackendError, StorageBackend};

/// Says whether a database failed. Cheap to clone; all clones are one.
#[derive(Clone, Debug, Default)]
pub struct Failure(Arc<(AtomicBool, OnceLock<String>)>);

impl Failure {
    /// The first failure.
    pub fn reason(&self) -> Option<String> {
        let reason = || self.0.1.get().cloned().unwrap_or_else(|| "it failed".to_owned());
        self.has_happened().then(reason)
    }

    /// Whether there was one.
    pub fn has_happened(&self) -> bool {
        self.0.0.load(Ordering::SeqCst)
    }

    /// Shuts the gate. The first reason counts.
    pub fn note(&self, reason: impl Display) {
        self.0.1.get_or_init(|| reason.to_string());
        self.0.0.store(true, Ordering::SeqCst);
    }
}

/// A file that nothing reaches any more once it has failed.
#[derive(Debug)]
pub(super) struct Gate<B> {
    inner: B,
    failure: Failure,
}

impl<B: StorageBackend> Gate<B> {
    pub(super) fn new(inner: B) -> (Self, Failure) {
        let failure = Failure::default();
        (Self { inner, failure: failure.clone() }, failure)
    }

    fn pass<T>(&self, work: impl FnOnce(&B) -> io::Result<T>) -> io::Result<T> {
        if let Some(reason) = self.failure.reason() {
            return Err(io::Error::other(format!("closed after a failure: {reason}")));
        }
        let done = work(&self.inner);
        if let Err(error) = &done {
            self.failure.note(error);
        }
        done
    }
}

impl<B: StorageBackend> StorageBackend for Gate<B> {
    fn len(&self) -> io::Result<u64> {
        self.pass(B::len)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.pass(|inner| inner.read(offset, out))
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.pass(|inner| inner.set_len(len))
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.pass(|inner| inner.write(offset, data))
    }

    fn sync_data(&self) -> io::Result<()> {
        self.pass(B::sync_data)
    }

    fn close(&self) -> io::Result<()> {
        self.inner.close()
    }

    // Locks are no failures of the disk, and are let go of also when the gate is shut.
    fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.inner.try_lock_range(start, end)
    }

    fn try_lock_shared_range(
        &self,
        start: Bound<u64>,
        end: Bound<u64>,
    ) -> Result<bool, BackendError> {
        self.inner.try_lock_shared_range(start, end)
    }

    fn lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.inner.lock_range(start, end)
    }

    fn lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.inner.lock_shared_range(start, end)
    }

    fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.inner.unlock_range(start, end)
    }

    fn query_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.inner.query_lock_range(start, end)
    }
}
