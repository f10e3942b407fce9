//! The settings of a run: defaults, or a file.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::Context;
use mtla_core::{
    attention::{AttentionConfig, LatentConfig},
    rope::RotaryConfig,
};
use mtla_models::decoder::{DecoderConfig, FeedForwardKind};
use mtla_train::{Length, Optimizer, Schedule, TrainerConfig, data::Packing};
use serde::{Deserialize, Serialize};

/// Everything that decides what comes out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Settings {
    /// What the weights come from, as [`Init::find`](crate::init::Init::find) takes it; fresh ones unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) init: Option<String>,
    /// The text.
    #[serde(default)]
    pub(crate) data: DataSettings,
    /// The model. Its vocabulary is as large as the text allows, up to `data.vocabulary`.
    pub(crate) model: DecoderConfig,
    /// The training.
    #[serde(default)]
    pub(crate) trainer: TrainerConfig,
}

/// The text to learn from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct DataSettings {
    /// A file or a folder; stories if there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) path: Option<PathBuf>,
    /// Stories to train on, where there is no path.
    pub(crate) stories: usize,
    /// Stories to validate on, and as many to hold out.
    pub(crate) held_out_stories: usize,
    /// Seed of the stories, or of the choice of held-out documents.
    pub(crate) seed: u64,
    /// Most tokens in the vocabulary.
    pub(crate) vocabulary: usize,
    /// Tokens a row, at most.
    pub(crate) context: usize,
}

impl Default for DataSettings {
    fn default() -> Self {
        Self {
            path: None,
            stories: 30_000,
            held_out_stories: 300,
            seed: 42,
            vocabulary: 512,
            context: 256,
        }
    }
}

impl DataSettings {
    /// Stories are kept apart; other text is one stream.
    pub(crate) fn packing(&self) -> Packing {
        if self.path.is_none() {
            Packing::Documents
        } else {
            Packing::Stream
        }
    }
}

impl Settings {
    /// Defaults, sized for a few minutes on two CPU cores.
    pub(crate) fn new(data: Option<PathBuf>) -> Self {
        let stories = data.is_none();
        let model = if stories {
            small_model()
        } else {
            DecoderConfig::new(2048, 4, AttentionConfig::mtla(128, 4))
                .with_feed_forward(FeedForwardKind::SwiGlu)
        };
        let trainer = TrainerConfig {
            length: Length::Steps(if stories { 3000 } else { 1500 }),
            batch_size: 8,
            accumulation: 2,
            workers: 2,
            optimizer: Optimizer {
                beta_2: 0.98,
                weight_decay: 0.01,
                ..Optimizer::default()
            },
            learning_rate: Schedule {
                peak: 3e-3,
                warmup: 100,
                ..Schedule::default()
            },
            log_every: 20,
            validate_every: 300,
            checkpoint_every: 300,
            ..TrainerConfig::default()
        };
        let data = DataSettings {
            path: data,
            vocabulary: if stories { 512 } else { 2048 },
            ..DataSettings::default()
        };
        Self {
            init: None,
            data,
            model,
            trainer,
        }
    }

    pub(crate) fn read(path: &Path) -> anyhow::Result<Self> {
        let text = fs::read_to_string(path)
            .with_context(|| format!("cannot read the settings {}", path.display()))?;
        toml::from_str(&text)
            .with_context(|| format!("the settings {} cannot be understood", path.display()))
    }

    /// The settings of an earlier run, out of its `config.json`.
    pub(crate) fn of_run(run: &Path) -> anyhow::Result<Self> {
        #[derive(Deserialize)]
        struct Description {
            settings: Kept,
        }
        #[derive(Deserialize)]
        struct Kept {
            model: Settings,
        }
        let path = run.join("config.json");
        let text = fs::read_to_string(&path).with_context(|| {
            format!(
                "{} is not a run directory: cannot read config.json",
                run.display()
            )
        })?;
        let description: Description = serde_json::from_str(&text)
            .with_context(|| format!("{} is no description of a language model", path.display()))?;
        Ok(description.settings.model)
    }
}

/// The model for stories: three narrow layers. The rotated part of a head is as wide as the rest and turns fast,
/// and some heads of the first layers begin by looking a few tokens back, so that what a sentence says of whom is
/// found early.
fn small_model() -> DecoderConfig {
    let (d_model, n_heads) = (64, 4);
    let attention = AttentionConfig::Mtla {
        down_rate: 2,
        latent: LatentConfig {
            qk_rope_head_dim: 16,
            bias: true,
            rope: RotaryConfig {
                theta: 20.0,
                ..RotaryConfig::default()
            },
            ..LatentConfig::new(d_model, n_heads)
        },
    };
    DecoderConfig::new(512, 3, attention)
        .with_look_back(vec![vec![1.5, 3.5, 5.5], vec![1.5, 3.5]])
        .with_tied_embeddings(false)
}
