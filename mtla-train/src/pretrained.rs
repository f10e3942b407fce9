//! A checkpoint by its directory or its name on the hub, as programs take it from their users.

use std::path::PathBuf;

use mtla_core::ops::AttentionBackend;
use mtla_models::{
    checkpoint::CheckpointError,
    generate::GenerationConfig,
    hub::{HubError, ModelSource},
    llama::{Llama, LlamaConfig, LoadOptions},
    tokenizer::{Tokenizer, TokenizerError},
};

use crate::backend::FloatKind;

/// The directory of a Llama, of which no weights are read until [`load`](Self::load): whatever can be wrong with an
/// order is found before that.
#[derive(Debug, Clone)]
pub struct Pretrained {
    /// Where its files are.
    pub directory: PathBuf,
    /// Its `config.json`.
    pub config: LlamaConfig,
}

/// Why there is no model to work with.
#[derive(Debug, thiserror::Error)]
pub enum PretrainedError {
    /// The name of no directory.
    #[error("{} is no directory; give a model directory, or hub:owner/name", path.display())]
    NoDirectory {
        /// What was given.
        path: PathBuf,
    },
    /// The backend has no such numbers.
    #[error(
        "the backend {backend} does not compute with {dtype:?}; take another type, or another backend"
    )]
    Type {
        /// The backend.
        backend: String,
        /// The type.
        dtype: burn::tensor::DType,
    },
    /// The hub.
    #[error(transparent)]
    Hub(#[from] HubError),
    /// The configuration, the defaults of generation or the weights.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
}

impl Pretrained {
    /// Finds `source`: a directory, or `hub:owner/name`, which is fetched if it has to be.
    ///
    /// # Errors
    /// [`PretrainedError`] if there is no such directory, the hub does not give it, or its `config.json` is that of no
    /// Llama.
    pub fn open(source: &str) -> Result<Self, PretrainedError> {
        let directory = ModelSource::parse(source)?.resolve()?;
        if !directory.is_dir() {
            return Err(PretrainedError::NoDirectory { path: directory });
        }
        Ok(Self {
            config: LlamaConfig::from_pretrained(&directory)?,
            directory,
        })
    }

    /// Its tokenizer.
    ///
    /// # Errors
    /// [`PretrainedError`] if there is none, or it has tokens that the model does not know.
    pub fn tokenizer(&self) -> Result<Tokenizer, PretrainedError> {
        let tokenizer = Tokenizer::load(&self.directory)?;
        tokenizer.fits(self.config.vocab_size)?;
        Ok(tokenizer)
    }

    /// How it is to be continued, as its files say; the tokenizer knows the end of a text if they do not.
    ///
    /// # Errors
    /// [`PretrainedError`] if `generation_config.json` cannot be understood.
    pub fn generation_config(
        &self,
        tokenizer: &Tokenizer,
    ) -> Result<GenerationConfig, PretrainedError> {
        let mut config = self.config.generation_config(&self.directory)?;
        if config.eos_token_id.is_empty() {
            config.eos_token_id = tokenizer.eos().into_iter().collect();
        }
        Ok(config)
    }

    /// Reads the weights, in the device's type of numbers unless `kind` is given.
    ///
    /// # Errors
    /// [`PretrainedError`] if the checkpoint cannot be read, or the backend does not have these numbers.
    pub fn load<B: AttentionBackend>(
        &self,
        kind: Option<FloatKind>,
        device: &B::Device,
    ) -> Result<Llama<B>, PretrainedError> {
        let dtype = kind.map(FloatKind::dtype);
        if let Some(dtype) = dtype.filter(|dtype| !B::supports_dtype(device, *dtype)) {
            return Err(PretrainedError::Type {
                backend: B::name(device),
                dtype,
            });
        }
        let options = LoadOptions {
            dtype,
            ..LoadOptions::default()
        };
        Ok(Llama::from_pretrained_with(
            &self.directory,
            &options,
            device,
        )?)
    }
}
