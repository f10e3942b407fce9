//! Language models over any attention variant of [`mtla_core`], and generation from them.
//!
//! * [`decoder`]: a decoder-only transformer, from one configuration to trainable logits and cached steps;
//! * [`generate`]: greedy search and sampling over ragged batches of prompts, for anything that is a
//!   [`LanguageModel`](generate::LanguageModel);
//! * `tokenizer`, with the cargo feature of this name: text to token ids and back with the tokenizer of a
//!   model directory, and chats as prompts;
//! * `hub`, with the cargo feature of this name: models by their name on the Hugging Face hub.
//!
//! Everything but the last two is generic over Burn's backends and works in a browser: no files, threads or
//! clocks, and what reads a tensor back is `async` (with a blocking form beside it).

pub mod decoder;
mod error;
pub mod generate;
#[cfg(feature = "hub")]
pub mod hub;
#[cfg(feature = "tokenizer")]
pub mod tokenizer;

pub use error::ConfigError;
