//! Language models over any attention variant of [`mtla_core`], and generation from them.
//!
//! * [`llama`]: Llamas with any attention, read from Hugging Face checkpoints and written as such (feature
//!   `files`, on by default);
//! * [`decoder`]: a decoder-only transformer, from one configuration to trainable logits and cached steps;
//! * `convert` (feature): from trained dense attention to latent attention that begins near it;
//! * [`generate`]: greedy search and sampling over ragged batches of prompts, for anything that is a
//!   [`LanguageModel`](generate::LanguageModel).
//! * [`generate`]: greedy search, sampling and beam search over ragged batches of prompts that come and go,
//!   for anything that is a [`LanguageModel`](generate::LanguageModel).
//!
//! Everything is generic over Burn's backends and, but for files, works in a browser: no threads or clocks, and what
//! reads a tensor back is `async` (with a blocking form beside it).
//!   [`LanguageModel`](generate::LanguageModel);
//! * `tokenizer`, with the cargo feature of this name: text to token ids and back with the tokenizer of a
//!   model directory, and chats as prompts;
//! * `hub`, with the cargo feature of this name: models by their name on the Hugging Face hub.
//!
//! Everything but the last two is generic over Burn's backends and works in a browser: no files, threads or
//! clocks, and what reads a tensor back is `async` (with a blocking form beside it).

#[cfg(feature = "convert")]
pub mod convert;
pub mod checkpoint;
pub mod decoder;
mod error;
pub mod generate;
pub mod llama;
#[cfg(feature = "hub")]
pub mod hub;
#[cfg(feature = "tokenizer")]
pub mod tokenizer;

pub use error::ConfigError;
