//! Llamas with any attention, and their Hugging Face checkpoints.
//!
//! A [`Llama`] is a [`Decoder`] with root mean square norms, `SwiGLU`, and rotary positions in halves, made from
//! the published `config.json` ([`LlamaConfig`]): `llama` (MHA, MQA, GQA), `llama-mtla` (MTLA, the files of
//! Python's package `mtla`) and `llama-mla` (MLA in the same form).
//!
//! With the feature `files` it is read from a directory and written to one, where [`KEYS`] says which weight is
//! which:
//!
//! ```
//! # #[cfg(all(feature = "flex", feature = "files"))] {
//! use burn_flex::Flex;
//! use mtla_models::llama::{LatentSizes, Llama, LlamaConfig};
//!
//! let device = Default::default();
//! let small = LlamaConfig {
//!     vocab_size: 100,
//!     hidden_size: 32,
//!     intermediate_size: 48,
//!     num_hidden_layers: 2,
//!     num_attention_heads: 4,
//!     ..Default::default()
//! };
//! let config = small.with_mtla(LatentSizes::for_head(8), 2).unwrap();
//! let llama = Llama::<Flex>::new(config, &device).unwrap();
//!
//! let folder = tempfile::tempdir().unwrap();
//! llama.save_pretrained(folder.path()).unwrap();
//! let again = Llama::<Flex>::from_pretrained(folder.path(), &device).unwrap();
//! assert_eq!(again.config.decoder(), llama.config.decoder());
//! # }
//! ```

mod config;
mod describe;
mod keys;
#[cfg(feature = "files")]
mod pretrained;
mod rope;

use burn::tensor::backend::Backend;
use serde_json::{Map, Value};

use crate::{decoder::Decoder, error::ConfigError, generate::GenerationConfig};
pub use config::{LatentSizes, LlamaConfig, ModelType};
pub use keys::KEYS;
#[cfg(feature = "files")]
pub use pretrained::{LoadOptions, SavedHead};
pub use rope::RopeScaling;

/// A decoder with the configuration that its files have.
#[derive(Debug, Clone)]
pub struct Llama<B: Backend> {
    /// What `config.json` says.
    pub config: LlamaConfig,
    /// What `generation_config.json` says, if there is one.
    pub generation: Option<Map<String, Value>>,
    /// The model.
    pub decoder: Decoder<B>,
}

impl<B: Backend> Llama<B> {
    /// A Llama with fresh weights.
    ///
    /// # Errors
    /// [`ConfigError`] names a field that cannot be.
    pub fn new(mut config: LlamaConfig, device: &B::Device) -> Result<Self, ConfigError> {
        let decoder = config.decoder()?.init(device)?;
        config.set_architecture();
        Ok(Self {
            config,
            generation: None,
            decoder,
        })
    }

    /// How the checkpoint is to be continued: its `generation_config.json`, and where that names no end of a text,
    /// the one of `config.json`.
    ///
    /// # Errors
    /// If a field of `generation_config.json` cannot be understood.
    pub fn generation_config(&self) -> Result<GenerationConfig, serde_json::Error> {
        generation_config(&self.config, self.generation.clone())
    }
}

fn generation_config(
    config: &LlamaConfig,
    generation: Option<Map<String, Value>>,
) -> Result<GenerationConfig, serde_json::Error> {
    let mut fields = generation.unwrap_or_default();
    if let Some(end) = config.other.get("eos_token_id") {
        fields.entry("eos_token_id").or_insert_with(|| end.clone());
    }
    serde_json::from_value(fields.into())
}
