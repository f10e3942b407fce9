//! A checkpoint by its directory or its name on the hub, as programs take it from their users.

use std::path::{Path, PathBuf};

use burn::tensor::backend::Backend;
use mtla_core::ops::AttentionBackend;
use mtla_models::{
    checkpoint::CheckpointError,
    generate::{GenerationConfig, LanguageModel},
    hub::{HubError, ModelSource},
    llama::{Llama, LoadOptions},
    tokenizer::{Tokenizer, TokenizerError},
};

use crate::backend::FloatKind;

/// A Llama and where it came from.
#[derive(Debug)]
pub struct Pretrained<B: Backend> {
    /// The directory of its files.
    pub directory: PathBuf,
    /// The model.
    pub llama: Llama<B>,
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
    /// The defaults of generation cannot be understood.
    #[error("{}: {source}; correct this field", path.display())]
    Generation {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: serde_json::Error,
    },
    /// The hub.
    #[error(transparent)]
    Hub(#[from] HubError),
    /// The weights.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
}

/// The directory of `source`: a directory itself, or `hub:owner/name`, which is fetched if it has to be.
///
/// # Errors
/// [`PretrainedError`] if there is no such directory, or the hub does not give it.
pub fn directory(source: &str) -> Result<PathBuf, PretrainedError> {
    let path = ModelSource::parse(source)?.resolve()?;
    if path.is_dir() {
        return Ok(path);
    }
    Err(PretrainedError::NoDirectory { path })
}

impl<B: AttentionBackend> Pretrained<B> {
    /// Reads the model in `directory`, in the device's type of numbers unless `kind` is given.
    ///
    /// # Errors
    /// [`PretrainedError`] if the checkpoint cannot be read, or the backend does not have these numbers.
    pub fn load(
        directory: &Path,
        kind: Option<FloatKind>,
        device: &B::Device,
    ) -> Result<Self, PretrainedError> {
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
        Ok(Self {
            directory: directory.into(),
            llama: Llama::from_pretrained_with(directory, &options, device)?,
        })
    }

    /// Its tokenizer.
    ///
    /// # Errors
    /// [`PretrainedError`] if there is none, or it has tokens that the model does not know.
    pub fn tokenizer(&self) -> Result<Tokenizer, PretrainedError> {
        let tokenizer = Tokenizer::load(&self.directory)?;
        tokenizer.fits(self.llama.decoder.vocab_size())?;
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
        let mut config =
            self.llama
                .generation_config()
                .map_err(|source| PretrainedError::Generation {
                    path: self.directory.join("generation_config.json"),
                    source,
                })?;
        if config.eos_token_id.is_empty() {
            config.eos_token_id = tokenizer.eos().into_iter().collect();
        }
        Ok(config)
    }
}
