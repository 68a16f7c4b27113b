//! Crash points: the numbered steps of the store's procedures call [`reach`], and a test may act
//! there.
//!
//! Outside tests this is nothing.

use super::StoreError;

#[cfg(not(test))]
#[inline]
#[expect(clippy::unnecessary_wraps, reason = "in tests it can fail")]
pub(super) fn reach(_step: &'static str) -> Result<(), StoreError> {
    Ok(())
}

#[cfg(test)]
pub(super) use in_tests::{reach, with_hook};

#[cfg(test)]
mod in_tests {
    use std::cell::RefCell;

    use super::StoreError;

    type Hook = Box<dyn FnMut(&'static str)>;

    thread_local! {
        static HOOK: RefCell<Option<Hook>> = const { RefCell::new(None) };
    }

    #[expect(clippy::unnecessary_wraps, reason = "same shape as outside tests")]
    pub(in super::super) fn reach(step: &'static str) -> Result<(), StoreError> {
        HOOK.with_borrow_mut(|hook| hook.as_mut().map(|act| act(step)));
        Ok(())
    }

    /// Runs `body` with `hook` called at every step that this thread reaches.
    pub(in super::super) fn with_hook<T>(
        hook: impl FnMut(&'static str) + 'static,
        body: impl FnOnce() -> T,
    ) -> T {
        HOOK.set(Some(Box::new(hook)));
        let result = body();
        HOOK.take();
        result
    }
}
