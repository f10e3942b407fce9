//! Llamas from directories and into directories.

use std::{fs, io::ErrorKind, path::Path};

use burn::tensor::{DType, Tensor, backend::Backend};

use super::{
    Llama, LlamaConfig, generation_config,
    keys::{KEYS, NO_WEIGHTS},
};
use crate::{
    checkpoint::{
        CheckpointError, SaveOptions, WeightsSummary,
        files::{read_json, read_json_if_there, write_json},
        load::load,
        save::save,
        weights::Weights,
    },
    generate::GenerationConfig,
};

const CONFIG: &str = "config.json";
const GENERATION: &str = "generation_config.json";
const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// What becomes of a head that is in the files though `config.json` says that it is the embedding.
///
/// Python's MTLA trains such a head, because its constructor does not tie it, writes it, and drops it when it
/// reads the file again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SavedHead {
    /// It is the head, unless it has the numbers of the embedding: the model is the one that was saved.
    /// `tie_word_embeddings` is then false, so that Python reads it too once it is saved from here.
    #[default]
    Keep,
    /// It is dropped, as Python does.
    Drop,
}

/// How a checkpoint is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LoadOptions {
    /// The type of the weights; the device's default type of floats unless given.
    pub dtype: Option<DType>,
    /// What becomes of a head that should not be in the files.
    pub saved_head: SavedHead,
}

impl<B: Backend> Llama<B> {
    /// Reads a checkpoint of Hugging Face: `config.json`, the weights (one file or shards), and
    /// `generation_config.json` if there is one.
    ///
    /// Files are mapped into memory and weights converted one by one, so that little more is allocated than the
    /// model takes. Another process must not shorten the files meanwhile; replacing them by renaming is fine.
    ///
    /// # Errors
    /// [`CheckpointError`] names the file, what is wrong in it, and what to do.
    pub fn from_pretrained(
        directory: impl AsRef<Path>,
        device: &B::Device,
    ) -> Result<Self, CheckpointError> {
        Self::from_pretrained_with(directory, &LoadOptions::default(), device)
    }

    /// As [`from_pretrained`](Self::from_pretrained), in another way.
    ///
    /// # Errors
    /// As [`from_pretrained`](Self::from_pretrained).
    pub fn from_pretrained_with(
        directory: impl AsRef<Path>,
        options: &LoadOptions,
        device: &B::Device,
    ) -> Result<Self, CheckpointError> {
        let directory = directory.as_ref();
        let path = directory.join(CONFIG);
        let mut config = LlamaConfig::from_pretrained(directory)?;
        let generation = read_json_if_there(&directory.join(GENERATION))?;
        let weights = Weights::open(directory)?;
        check_layers(&config, &weights)?;

        let ignored = ignored(&mut config, &weights, options.saved_head);
        let decoder = config
            .decoder()
            .and_then(|decoder| decoder.init_lazy(device))
            .map_err(CheckpointError::config(&path))?;
        let dtype = options
            .dtype
            .unwrap_or_else(|| Tensor::<B, 1>::zeros([1], device).dtype());
        let decoder = load(decoder, KEYS, &ignored, &weights, dtype, device)?;
        Ok(Self {
            config,
            generation,
            decoder,
        })
    }

    /// Writes a checkpoint that Hugging Face reads: `config.json`, the weights, and `generation_config.json` if
    /// there is one. The directory is made if need be; other files in it stay, those of a tokenizer among them.
    ///
    /// Every file is written under a temporary name first. What is left of another model and would be read with
    /// this one is removed: weights of another number of shards, and a `generation_config.json` that this one lacks.
    ///
    /// # Errors
    /// [`CheckpointError`] if a file cannot be written, or the decoder is not what the configuration says.
    pub fn save_pretrained(&self, directory: impl AsRef<Path>) -> Result<(), CheckpointError> {
        self.save_pretrained_with(directory, &SaveOptions::default())
    }

    /// As [`save_pretrained`](Self::save_pretrained), in another way.
    ///
    /// # Errors
    /// As [`save_pretrained`](Self::save_pretrained).
    pub fn save_pretrained_with(
        &self,
        directory: impl AsRef<Path>,
        options: &SaveOptions,
    ) -> Result<(), CheckpointError> {
        let directory = directory.as_ref();
        let path = directory.join(CONFIG);
        let device = self.decoder.embedding.weight.device();
        let like = self
            .config
            .decoder()
            .and_then(|decoder| decoder.init_lazy(&device))
            .map_err(CheckpointError::config(&path))?;
        fs::create_dir_all(directory).map_err(CheckpointError::io("make", directory))?;
        save(&self.decoder, &like, KEYS, directory, options)?;

        let mut config = self.config.clone();
        config.set_architecture();
        let dtype = options
            .dtype
            .unwrap_or(self.decoder.embedding.weight.dtype());
        if let Some(name) = python_type(dtype) {
            config.other.insert("torch_dtype".into(), name.into());
        }
        write_json(&path, &config)?;
        let path = directory.join(GENERATION);
        match &self.generation {
            Some(generation) => write_json(&path, generation),
            None => match fs::remove_file(&path) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    Err(CheckpointError::io("remove", &path)(error))
                }
                _ => Ok(()),
            },
        }
    }
}

impl LlamaConfig {
    /// Reads the `config.json` of a checkpoint alone.
    ///
    /// # Errors
    /// [`CheckpointError`] if it cannot be read, or is that of no Llama.
    pub fn from_pretrained(directory: impl AsRef<Path>) -> Result<Self, CheckpointError> {
        let path = directory.as_ref().join(CONFIG);
        let config: Self = read_json(&path)?;
        config.validate().map_err(CheckpointError::config(&path))?;
        Ok(config)
    }

    /// How the checkpoint in a directory with this `config.json` is to be continued; what
    /// [`Llama::generation_config`] says, without the weights.
    ///
    /// # Errors
    /// [`CheckpointError`] if its `generation_config.json` cannot be understood.
    pub fn generation_config(
        &self,
        directory: impl AsRef<Path>,
    ) -> Result<GenerationConfig, CheckpointError> {
        let path = directory.as_ref().join(GENERATION);
        let generation = read_json_if_there(&path)?;
        generation_config(self, generation).map_err(CheckpointError::json(&path))
    }

    /// What the weights in a directory are that [`Llama::from_pretrained`] reads with this `config.json`; their
    /// numbers are not read.
    ///
    /// # Errors
    /// [`CheckpointError`] if there are none, or a file is damaged.
    pub fn weights_summary(
        &self,
        directory: impl AsRef<Path>,
    ) -> Result<WeightsSummary, CheckpointError> {
        let weights = Weights::open(directory.as_ref())?;
        let ignored = ignored(&mut self.clone(), &weights, SavedHead::Keep);
        Ok(WeightsSummary::new(&weights, &ignored))
    }
}

/// Forms of names that may be in the files and are not read. A head that is read is no longer tied.
fn ignored(
    config: &mut LlamaConfig,
    weights: &Weights,
    saved_head: SavedHead,
) -> Vec<&'static str> {
    let mut ignored = NO_WEIGHTS.to_vec();
    if config.tie_word_embeddings {
        if keeps_head(weights, saved_head) {
            config.tie_word_embeddings = false;
        } else {
            ignored.push(HEAD);
        }
    }
    ignored
}

/// Refuses layers of which the files have nothing before anything is made for them.
fn check_layers(config: &LlamaConfig, weights: &Weights) -> Result<(), CheckpointError> {
    let in_every_layer = KEYS
        .iter()
        .map(|key| key.file)
        .filter(|name| name.contains("{}") && !name.contains("self_attn"));
    for layer in 0..config.num_hidden_layers {
        for name in in_every_layer.clone() {
            let name = name.replace("{}", &layer.to_string());
            if weights.get(&name).is_none() {
                return Err(CheckpointError::missing(weights.directory(), name));
            }
        }
    }
    Ok(())
}

fn keeps_head(weights: &Weights, saved_head: SavedHead) -> bool {
    match (weights.get(HEAD), weights.get(EMBEDDING)) {
        (Some(head), Some(embedding)) => saved_head == SavedHead::Keep && !head.is_same(&embedding),
        _ => false,
    }
}

fn python_type(dtype: DType) -> Option<&'static str> {
    match dtype {
        DType::F32 => Some("float32"),
        DType::F16 => Some("float16"),
        DType::BF16 => Some("bfloat16"),
        _ => None,
    }
}
