//! Language models over any attention variant of [`mtla_core`], and generation from them.
//!
//! * [`decoder`]: a decoder-only transformer, from one configuration to trainable logits and cached steps, and with the
//!   feature `store` from safetensors in memory;
//! * [`llama`]: Llamas with any attention, and with the feature `files` their Hugging Face checkpoints, read and
//!   written;
//! * [`generate`]: greedy search, sampling and beam search over ragged batches of prompts that come and go,
//!   for anything that is a [`LanguageModel`](generate::LanguageModel);
//! * `convert`, a feature: from trained dense attention to latent attention that begins near it;
//! * `tokenizer`, a feature: text to token ids and back with the tokenizer of a model directory, and chats as prompts;
//! * `hub`, a feature: models by their name on the Hugging Face hub.
//!
//! Everything is generic over Burn's backends and, but for files and the hub, works in a browser: no threads or
//! clocks, and what reads a tensor back is `async` (with a blocking form beside it).

pub mod checkpoint;
#[cfg(feature = "convert")]
pub mod convert;
pub mod decoder;
mod error;
pub mod generate;
#[cfg(feature = "hub")]
pub mod hub;
pub mod llama;
#[cfg(feature = "tokenizer")]
pub mod tokenizer;

pub use error::ConfigError;
