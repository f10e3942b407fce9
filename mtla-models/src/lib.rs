//! Language models over any attention variant of [`mtla_core`], and generation from them.
//!
//! * [`decoder`]: a decoder-only transformer, from one configuration to trainable logits and cached steps;
//! * [`generate`]: greedy search, sampling and beam search over ragged batches of prompts that come and go,
//!   for anything that is a [`LanguageModel`](generate::LanguageModel).
//!
//! Everything is generic over Burn's backends and works in a browser: no files, threads or clocks, and what
//! reads a tensor back is `async` (with a blocking form beside it).

pub mod decoder;
mod error;
pub mod generate;

pub use error::ConfigError;
