//! Ctrl-C and termination signals stop a run after the step under way, with a checkpoint.
//!
//! A second one ends the process at once, after giving the terminal back.

use super::terminal;
use burn_train::Interrupter;
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

/// What a signal interrupts.
static RUNNING: Mutex<Option<Interrupter>> = Mutex::new(None);

fn running() -> MutexGuard<'static, Option<Interrupter>> {
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// While it lives, signals stop `interrupter`'s run.
pub(super) struct StopOnSignal;

impl StopOnSignal {
    /// A program that handles signals itself keeps its own handler.
    pub(super) fn new(interrupter: &Interrupter) -> Self {
        static INSTALL: Once = Once::new();
        INSTALL.call_once(|| drop(ctrlc::try_set_handler(on_signal)));
        *running() = Some(interrupter.clone());
        Self
    }
}

impl Drop for StopOnSignal {
    fn drop(&mut self) {
        *running() = None;
    }
}

fn on_signal() {
    match &*running() {
        Some(interrupter) if !interrupter.should_stop() => {
            interrupter.stop(Some("stopped by a signal"));
        }
        _ => {
            terminal::restore();
            std::process::exit(130);
        }
    }
}
