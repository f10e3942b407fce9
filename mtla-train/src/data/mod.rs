//! From text on disk to batches on a device.
//!
//! ```text
//! corpus (or story) ── documents ──▶ vocabulary ── tokens ──▶ TokenBlocks ── rows ──▶ Batches
//! ```

mod batches;
mod blocks;
pub mod codec;
pub mod corpus;
pub mod story;
pub mod tokenizer_files;
pub mod vocabulary;

pub use batches::{Batches, Plan};
pub use blocks::{Block, BlockError, Packing, TextBatch, TextBatcher, TokenBlocks};
