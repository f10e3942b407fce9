//! What can go wrong in a training run, and what to do about it.

use std::io;
use std::path::{Path, PathBuf};

/// A training run that cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// A value in the configuration that cannot be.
    #[error("training configuration: `{field}` is {value}, but must be {rule}")]
    Config {
        /// The field, as it is written in a configuration file.
        field: &'static str,
        /// Its value.
        value: String,
        /// What it must be.
        rule: &'static str,
    },
    /// A file that cannot be read or written.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The system gives no more threads.
    #[error("cannot start the threads of the workers: {0}; train with fewer workers")]
    Threads(rayon::ThreadPoolBuildError),
    /// Another process trains in the run directory.
    #[error("{} is in use by another process; stop that one or choose another run directory",
        path.display())]
    Locked {
        /// The run directory.
        path: PathBuf,
    },
    /// The run directory belongs to a run with other settings.
    #[error("{} was written by a run with other settings ({differences}); \
        restore them to resume it or choose another run directory", path.display())]
    OtherRun {
        /// The file that says so.
        path: PathBuf,
        /// Each setting with its value then and now.
        differences: String,
    },
    /// The weights in a checkpoint are not those of the model.
    #[error("the weights in {} do not fit the model: {differences}", path.display())]
    OtherModel {
        /// The checkpoint.
        path: PathBuf,
        /// Each parameter that differs.
        differences: String,
    },
    /// A file of the run directory is not what was written.
    #[error("{} is damaged: {reason}; {cure}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
        /// What to do.
        cure: String,
    },
    /// There is nothing to train or to validate on.
    #[error("there are no {split} batches; give a data set that is not empty")]
    NoBatches {
        /// Which data.
        split: &'static str,
    },
    /// The data set ended before its plan.
    #[error(
        "epoch {epoch} ended after {got} of {planned} batches: \
        the data set gave no item for an index below its length"
    )]
    DataEnded {
        /// The epoch, counted from 0.
        epoch: usize,
        /// Batches that came.
        got: usize,
        /// Batches that were planned.
        planned: usize,
    },
    /// A batch with nothing in it to learn.
    #[error("a batch has no tokens at step {step}; leave empty items out of the data set")]
    EmptyBatch {
        /// The step, counted from 1.
        step: usize,
    },
    /// The training has diverged.
    #[error("the {quantity} became {value} at step {step}; a lower learning rate, a longer warm-up \
        or a smaller clip_norm may help. {}", last_good(checkpoint.as_deref()))]
    NotFinite {
        /// The step, counted from 1.
        step: usize,
        /// What is not finite.
        quantity: &'static str,
        /// Its value.
        value: f64,
        /// The newest checkpoint, written before that step.
        checkpoint: Option<PathBuf>,
    },
    /// The loss curve cannot be drawn.
    #[error(transparent)]
    Plot(#[from] crate::plot::PlotError),
    /// The caller's work after a validation failed.
    #[error("after the validation at step {step}: {source}")]
    AfterValidation {
        /// The step, counted from 1.
        step: usize,
        /// What the caller reported.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl TrainError {
    /// For `map_err` on what the operating system refuses.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }
}

fn last_good(checkpoint: Option<&Path>) -> String {
    match checkpoint {
        Some(path) => format!("The last good checkpoint is {}", path.display()),
        None => "There is no checkpoint yet".into(),
    }
}
