//! Crash points: the numbered steps of procedures on disk call [`reach`] before they are taken, and
//! a test may act there or stop.
//!
//! Without a hook, which only tests set, a step costs one look at a variable of the thread.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

type Hook = Box<dyn FnMut(&'static str)>;

thread_local! {
    static HOOK: RefCell<Option<Hook>> = const { RefCell::new(None) };
}

struct Stopped;

/// A step is about to be taken.
pub fn reach(step: &'static str) {
    // Taken out meanwhile, since it may unwind.
    if let Some(mut hook) = HOOK.take() {
        hook(step);
        HOOK.set(Some(hook));
    }
}

/// Runs `body` with `hook` called at every step that this thread reaches.
pub fn with_hook<T>(hook: impl FnMut(&'static str) + 'static, body: impl FnOnce() -> T) -> T {
    HOOK.set(Some(Box::new(hook)));
    let result = body();
    HOOK.take();
    result
}

/// Runs `body` up to `step` and no further: nothing after the step runs, no clean-up either.
/// Panics unless it was stopped there.
pub fn stop_before<T>(step: &'static str, body: impl FnOnce() -> T) {
    let stop = move |reached: &'static str| {
        if reached == step {
            resume_unwind(Box::new(Stopped));
        }
    };
    let result = catch_unwind(AssertUnwindSafe(|| with_hook(stop, body)));
    HOOK.take();
    match result {
        Ok(_) => panic!("{step} was not reached"),
        Err(reason) if reason.is::<Stopped>() => (),
        Err(other) => resume_unwind(other),
    }
}
