//! Data, training and metrics for models built on [Burn](burn).
//!
//! [`Trainer`] trains any model that implements [`Objective`], in a run directory that can be
//! watched, and that can be resumed exactly after the process was killed. [`data`] makes batches of
//! text for it; [`metric`] judges what comes out. What programs share is in [`backend`], [`pretrained`],
//! [`measure`], [`progress`] and [`disk`].
//!
//! ```text
//! data ── Batches ──▶ Trainer ── checkpoints, metrics.jsonl, loss.svg ──▶ run directory
//!                        ▲
//!            model: Objective (batch → Loss)
//! ```

pub mod backend;
pub mod data;
pub mod disk;
pub mod fine_tune;
pub mod language_model;
pub mod measure;
pub mod metric;
pub mod pretrained;
pub mod progress;

mod loss;
mod plot;
mod schedule;
mod seed;
mod trainer;

pub use loss::{Loss, Objective, next_token_loss};
pub use plot::{Curve, PlotError, loss_curve, loss_curves};
pub use schedule::{Decay, Schedule};
pub use trainer::{
    Best, Display, Interrupter, Length, MetricLine, Optimizer, RunDir, TrainError, TrainMetrics,
    Trained, Trainer, TrainerConfig, ValidBatches, ValidMetrics, Validated, best_checkpoint,
    load_weights, read_metrics,
};
