//! Models to train on from, and models for others to load.
//!
//! A run goes on from a [`Source`]: an earlier run, or the directory of a Llama. One whose decoder is a Llama leaves
//! such a directory itself, [`LlamaFiles`], which Python loads too.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use burn::tensor::backend::Backend;
use mtla_models::{
    checkpoint::CheckpointError,
    decoder::{Decoder, DecoderConfig},
    llama::{Llama, LlamaConfig, ModelType},
};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::data::{codec::TextCodec, vocabulary::VocabularyError};

/// The folder of a run directory in which its Llama is.
pub const FOLDER: &str = "pretrained";

const CONFIG: &str = "config.json";

/// Why a model cannot be trained on from, or saved.
#[derive(Debug, thiserror::Error)]
pub enum FineTuneError {
    /// Neither a run nor a model.
    #[error(
        "{} is neither a run directory nor a model's: {reason}; give the directory of a run, of a model \
         (config.json, model.safetensors, tokenizer.json), or hub:owner/name",
        path.display()
    )]
    Neither {
        /// What was given.
        path: PathBuf,
        /// What it lacks.
        reason: String,
    },
    /// A model that is no Llama.
    #[error(
        "{} holds a model of the type {found:?}; only llama, llama-mla and llama-mtla can be trained on",
        path.display()
    )]
    OtherType {
        /// The directory.
        path: PathBuf,
        /// Its `model_type`.
        found: String,
    },
    /// The folder cannot be made.
    #[error("cannot make {}", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The model's files.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The tokenizer's files.
    #[error(transparent)]
    Vocabulary(#[from] VocabularyError),
}

/// What a run may go on from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// An earlier run.
    Run(PathBuf),
    /// The directory of a Llama.
    Llama(PathBuf),
}

impl Source {
    /// Tells by its `config.json` what a directory is: that of a run has `settings`, a model's a `model_type`.
    ///
    /// # Errors
    ///
    /// [`FineTuneError`] if it is neither, or a model of another kind.
    pub fn find(directory: impl Into<PathBuf>) -> Result<Self, FineTuneError> {
        let path = directory.into();
        let config = match read_config(&path) {
            Ok(config) => config,
            Err(reason) => return Err(FineTuneError::Neither { path, reason }),
        };
        if config.get("settings").is_some() {
            return Ok(Self::Run(path));
        }
        match config.get("model_type") {
            Some(found) if ModelType::deserialize(found).is_ok() => Ok(Self::Llama(path)),
            Some(found) => Err(FineTuneError::OtherType {
                found: found.as_str().unwrap_or_default().to_owned(),
                path,
            }),
            None => Err(FineTuneError::Neither {
                path,
                reason: "its config.json has neither `settings` nor `model_type`".into(),
            }),
        }
    }
}

fn read_config(directory: &Path) -> Result<Value, String> {
    let bytes = fs::read(directory.join(CONFIG))
        .map_err(|error| format!("config.json cannot be read ({error})"))?;
    serde_json::from_slice(&bytes)
        .map_err(|error| format!("config.json cannot be understood ({error})"))
}

/// What surrounds the weights of a Llama in its directory.
#[derive(Debug, Clone)]
pub struct LlamaFiles {
    /// `config.json`.
    pub config: LlamaConfig,
    /// `generation_config.json`, if there is one.
    pub generation: Option<Map<String, Value>>,
    /// The files of the tokenizer.
    pub codec: TextCodec,
}

impl LlamaFiles {
    /// The configuration and the tokenizer of a directory: all but its weights.
    ///
    /// # Errors
    ///
    /// If a file is missing or damaged, or the tokenizer has more tokens than the model.
    pub fn describe(directory: &Path) -> Result<(LlamaConfig, TextCodec), FineTuneError> {
        let neither = |reason| FineTuneError::Neither {
            path: directory.to_owned(),
            reason,
        };
        let config = read_config(directory).map_err(neither)?;
        let config = LlamaConfig::deserialize(config)
            .map_err(|error| neither(format!("config.json cannot be understood ({error})")))?;
        let id = |field| first_id(config.other.get(field)?);
        let codec = TextCodec::of_model(directory, id("bos_token_id"), id("eos_token_id"))?;
        codec.fits(config.vocab_size)?;
        Ok((config, codec))
    }

    /// Reads the weights of a directory whose tokenizer is known from [`describe`](Self::describe).
    ///
    /// # Errors
    ///
    /// If a file is missing or damaged.
    pub fn load<B: Backend>(
        directory: &Path,
        codec: TextCodec,
        device: &B::Device,
    ) -> Result<(Self, Decoder<B>), FineTuneError> {
        let llama = Llama::from_pretrained(directory, device)?;
        // A file that is made here would hide what `config.json` says of the end of a text.
        let end = llama.config.other.get("eos_token_id");
        let is_silent = llama.generation.is_none() && end.is_none_or(Value::is_null);
        let made = is_silent.then(|| generation(codec.start(), codec.end()));
        let this = Self {
            generation: llama.generation.or(made),
            config: llama.config,
            codec,
        };
        Ok((this, llama.decoder))
    }

    /// The files for a decoder trained on rows of `context` tokens; none if it is no Llama.
    pub fn of_decoder(decoder: &DecoderConfig, context: usize, codec: &TextCodec) -> Option<Self> {
        let mut config = LlamaConfig::from_decoder(decoder).ok()?;
        let generation = generation(codec.start(), codec.end());
        config.other.extend(generation.clone());
        config.max_position_embeddings = context;
        Some(Self {
            config,
            generation: Some(generation),
            codec: codec.clone(),
        })
    }

    /// Writes the directory, made if need be. `config.json` appears after the tokenizer and the weights.
    ///
    /// # Errors
    ///
    /// If a file cannot be written, or the decoder is not what the configuration says.
    pub fn save<B: Backend>(
        &self,
        decoder: &Decoder<B>,
        directory: &Path,
    ) -> Result<(), FineTuneError> {
        fs::create_dir_all(directory).map_err(|source| FineTuneError::Folder {
            path: directory.to_owned(),
            source,
        })?;
        self.codec.save_pretrained(directory)?;
        let llama = Llama {
            config: self.config.clone(),
            generation: self.generation.clone(),
            decoder: decoder.clone(),
        };
        Ok(llama.save_pretrained(directory)?)
    }
}

/// The fields that say which tokens begin and end a text.
fn generation(start: u32, end: u32) -> Map<String, Value> {
    let fields = [("bos_token_id", start), ("eos_token_id", end)];
    fields
        .into_iter()
        .map(|(field, id)| (field.to_owned(), json!(id)))
        .collect()
}

/// A token id, or the first of a list of them.
fn first_id(value: &Value) -> Option<u32> {
    let first = value.as_array().and_then(|list| list.first());
    first.unwrap_or(value).as_u64()?.try_into().ok()
}
