//! Checkpoints in directories, as Hugging Face lays them out: `model.safetensors`, or several shards with
//! `model.safetensors.index.json`.
//!
//! What a file says is never trusted: nothing is allocated for a weight before the file is known to hold all of
//! its bytes, nothing outside the directory is opened, and no code is run. Reading maps the files into memory and
//! converts one weight at a time; writing makes whole files under temporary names first.

#[cfg(feature = "files")]
mod convert;
#[cfg(feature = "files")]
mod error;
#[cfg(feature = "files")]
pub(crate) mod files;
#[cfg(feature = "files")]
mod index;
mod keys;
#[cfg(feature = "files")]
pub(crate) mod load;
#[cfg(feature = "files")]
pub(crate) mod save;
#[cfg(feature = "files")]
mod summary;
#[cfg(feature = "files")]
mod visit;
#[cfg(feature = "files")]
pub(crate) mod weights;

#[cfg(feature = "files")]
pub use error::{CheckpointError, Names};
pub use keys::{Key, Layout, file_name};
#[cfg(feature = "files")]
pub use save::SaveOptions;
#[cfg(feature = "files")]
pub use summary::WeightsSummary;
