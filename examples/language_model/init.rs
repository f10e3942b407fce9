//! What a run goes on from.

use std::path::{Path, PathBuf};

use anyhow::Context;
use burn::tensor::backend::Backend;
use mtla_models::{decoder::Decoder, hub::ModelSource};
use mtla_train::{
    best_checkpoint,
    data::{codec::TextCodec, vocabulary::Vocabulary},
    fine_tune::{FOLDER, LlamaFiles, Source},
    load_weights,
};

use crate::settings::Settings;

/// The highest learning rate for a Llama that comes from elsewhere: it has more to lose than a fresh model.
const LLAMA_LEARNING_RATE: f64 = 1e-4;

/// A model to go on from, but for its weights.
pub(crate) struct Init {
    pub(crate) codec: TextCodec,
    weights: Weights,
}

/// Where weights are.
enum Weights {
    Checkpoint(PathBuf),
    Llama(PathBuf),
}

/// A model to go on from.
pub(crate) struct Start<B: Backend> {
    pub(crate) decoder: Decoder<B>,
    /// The files that it came with, if it is a Llama.
    pub(crate) llama: Option<LlamaFiles>,
}

impl Init {
    /// Finds a model, and puts what it decides into the settings.
    pub(crate) fn find(model: &str, settings: &mut Settings) -> anyhow::Result<Self> {
        let directory = ModelSource::parse(model)?.resolve()?;
        match Source::find(directory)? {
            Source::Llama(directory) => {
                settings.trainer.learning_rate.peak = LLAMA_LEARNING_RATE;
                Self::llama(directory, settings)
            }
            Source::Run(run) => {
                let earlier = Settings::of_run(&run)?;
                settings.data.context = earlier.data.context;
                let llama = run.join(FOLDER);
                if llama.join("config.json").exists() {
                    let init = Self::llama(llama, settings)?;
                    settings.model.dropout = earlier.model.dropout;
                    return Ok(init);
                }
                settings.model = earlier.model;
                Self::run(&run)
            }
        }
    }

    /// The vocabulary and the best weights of an earlier run.
    fn run(run: &Path) -> anyhow::Result<Self> {
        let vocabulary = Vocabulary::load(run.join("tokenizer.json"))?;
        let checkpoint = best_checkpoint(run)?
            .with_context(|| format!("{} has no validated checkpoint yet", run.display()))?;
        Ok(Self {
            codec: vocabulary.into(),
            weights: Weights::Checkpoint(checkpoint),
        })
    }

    fn llama(directory: PathBuf, settings: &mut Settings) -> anyhow::Result<Self> {
        let (config, codec) = LlamaFiles::describe(&directory)?;
        let longest = config.max_position_embeddings;
        settings.data.context = settings.data.context.min(longest);
        settings.model = config
            .decoder()
            .with_context(|| format!("{}/config.json", directory.display()))?;
        Ok(Self {
            codec,
            weights: Weights::Llama(directory),
        })
    }

    /// Reads the weights. A Llama's tell whether its embedding is its head too.
    pub(crate) fn load<B: Backend>(
        self,
        settings: &mut Settings,
        device: &B::Device,
    ) -> anyhow::Result<Start<B>> {
        match self.weights {
            Weights::Checkpoint(path) => Ok(Start {
                decoder: load_weights(&path, settings.model.init(device)?, device)?,
                llama: None,
            }),
            Weights::Llama(directory) => {
                let (llama, decoder) = LlamaFiles::load(&directory, self.codec, device)?;
                settings.model.tie_embeddings = llama.config.tie_word_embeddings;
                Ok(Start {
                    decoder,
                    llama: Some(llama),
                })
            }
        }
    }
}
