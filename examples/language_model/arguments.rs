//! The command line, and what it changes in the settings.

use std::path::{Path, PathBuf};

use anyhow::{bail, ensure};
use clap::{Parser, ValueEnum};
use mtla_core::{
    attention::AttentionConfig,
    rope::{RotaryConfig, RotaryLayout},
};
use mtla_examples::BackendKind;
use mtla_models::{
    decoder::{DecoderConfig, FeedForwardKind, NormKind},
    generate::GenerationConfig,
};
use mtla_train::{Display, Length};

use crate::{init::Init, settings::Settings};

/// Train a language model, score it, and let it write.
///
/// Without arguments it learns short stories that this program makes up, with MTLA, in a few minutes on two
/// CPU cores. Run the same command again to go on with an interrupted run, or to look at a finished one.
#[derive(Debug, Parser)]
#[command(version)]
#[expect(clippy::struct_excessive_bools, reason = "flags of a command line")]
pub(crate) struct Arguments {
    /// The attention variant.
    #[arg(long, value_enum)]
    attention: Option<AttentionKind>,
    /// Tokens that share a cache slot (MTLA only).
    #[arg(long, value_name = "N")]
    down_rate: Option<usize>,
    /// Where to compute; the fastest backend that is compiled in, unless given.
    #[arg(long, value_enum)]
    backend: Option<BackendKind>,
    /// A text file, or a folder of text files, to learn from instead of stories.
    #[arg(long, value_name = "PATH")]
    data: Option<PathBuf>,
    /// What to train on from: a run directory, a Llama's directory (`config.json`, `model.safetensors`,
    /// `tokenizer.json`), or `hub:owner/name`. The run keeps it: with `--run` it need not be given again.
    #[arg(long, value_name = "MODEL")]
    init: Option<String>,
    /// Where to keep checkpoints, metrics and samples [default: `runs/<data>-<attention>`].
    #[arg(long, value_name = "DIR")]
    run: Option<PathBuf>,
    /// A TOML file of settings; `--show-settings` prints one.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print the settings that would be used, and stop.
    #[arg(long)]
    pub(crate) show_settings: bool,
    /// A decoder of Llama form, whose checkpoints Python loads: root mean square norms, `SwiGLU`, no biases.
    #[arg(long)]
    llama: bool,
    /// Optimizer steps.
    #[arg(long, value_name = "N")]
    steps: Option<usize>,
    /// Optimizer steps between validations.
    #[arg(long, value_name = "N")]
    validate_every: Option<usize>,
    /// Rows a batch; unless the settings say otherwise, a step is two batches.
    #[arg(long, value_name = "N")]
    batch_size: Option<usize>,
    /// Tokens a row, at most.
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// Highest learning rate; a Llama that comes from elsewhere has 1e-4 unless given.
    #[arg(long, value_name = "X")]
    learning_rate: Option<f64>,
    /// Number of layers.
    #[arg(long, value_name = "N")]
    layers: Option<usize>,
    /// Width of the model.
    #[arg(long, value_name = "N")]
    d_model: Option<usize>,
    /// Attention heads.
    #[arg(long, value_name = "N")]
    heads: Option<usize>,
    /// Dropout, on attention weights and activations.
    #[arg(long, value_name = "P")]
    dropout: Option<f64>,
    /// Size of the vocabulary.
    #[arg(long, value_name = "N")]
    vocabulary: Option<usize>,
    /// Seed of weights, data order, dropout, stories and samples.
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// What the model goes on from when it writes; may be given several times.
    #[arg(long, value_name = "TEXT")]
    pub(crate) prompt: Vec<String>,
    /// Temperature of the writing; 0 for the most probable tokens.
    #[arg(long, value_name = "X", default_value_t = 0.8)]
    temperature: f64,
    /// Write with the K most probable tokens only.
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Write with the most probable tokens that have this probability together.
    #[arg(long, value_name = "P")]
    top_p: Option<f64>,
    /// Longest text to write, in tokens.
    #[arg(long, value_name = "N", default_value_t = 200)]
    max_new_tokens: usize,
    /// Write the trained model into this folder too, for programs without Rust's records: `decoder.json`,
    /// `model.safetensors` (16-bit floats), `tokenizer.json`, and `report.json` with its scores.
    #[arg(long, value_name = "DIR")]
    pub(crate) export: Option<PathBuf>,
    /// Progress as plain lines even on a terminal.
    #[arg(long)]
    plain: bool,
    /// No progress at all.
    #[arg(long, conflicts_with = "plain")]
    quiet: bool,
}

/// The names of the attention variants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum AttentionKind {
    /// Multi-head attention.
    Mha,
    /// Multi-query attention.
    Mqa,
    /// Grouped-query attention, two sets of keys and values.
    Gqa,
    /// Multi-head latent attention.
    Mla,
    /// Multi-head temporal latent attention.
    Mtla,
}

impl Arguments {
    /// The backend to run on.
    pub(crate) fn backend(&self) -> BackendKind {
        self.backend.unwrap_or_else(BackendKind::best)
    }

    /// How progress is shown.
    pub(crate) fn display(&self) -> Display {
        match (self.quiet, self.plain) {
            (true, _) => Display::Quiet,
            (_, true) => Display::Lines,
            _ => Display::Auto,
        }
    }

    /// How the model writes when it is trained.
    pub(crate) fn sampling(&self) -> anyhow::Result<GenerationConfig> {
        let mut config = GenerationConfig::new(self.max_new_tokens)
            .with_temperature(self.temperature)
            .with_seed(self.seed.unwrap_or_default());
        config.top_k = self.top_k;
        config.top_p = self.top_p;
        config.validate()?;
        Ok(config)
    }

    /// Where the run is kept.
    pub(crate) fn run_directory(&self, settings: &Settings) -> PathBuf {
        self.run.clone().unwrap_or_else(|| {
            let data = settings.data.path.as_ref().map_or_else(
                || "stories".to_owned(),
                |path| {
                    let path = path.canonicalize().unwrap_or_else(|_| path.clone());
                    path.file_stem()
                        .unwrap_or_default()
                        .to_string_lossy()
                        .into_owned()
                },
            );
            let attention = match &settings.model.attention {
                AttentionConfig::Mha(_) => "mha".to_owned(),
                AttentionConfig::Mqa(_) => "mqa".to_owned(),
                AttentionConfig::Gqa { n_kv_heads, .. } => format!("gqa-g{n_kv_heads}"),
                AttentionConfig::Mla(_) => "mla".to_owned(),
                AttentionConfig::Mtla { down_rate, .. } => format!("mtla-s{down_rate}"),
            };
            let form = if self.llama { "-llama" } else { "" };
            let tuned = if settings.init.is_some() {
                "-tuned"
            } else {
                ""
            };
            PathBuf::from("runs").join(format!("{data}-{attention}{form}{tuned}"))
        })
    }

    /// Puts the settings together.
    pub(crate) fn settings(&self) -> anyhow::Result<(Settings, Option<Init>)> {
        ensure!(
            self.config.is_none() || self.init.is_none(),
            "give either --config or --init: both name a model"
        );
        let mut settings = match &self.config {
            Some(path) => Settings::read(path)?,
            None => Settings::new(self.data.clone()),
        };
        if let Some(source) = self.init_of_run()? {
            settings.init = Some(source);
        }
        let init = match settings.init.clone() {
            Some(source) => {
                self.refuse_other_model(&source)?;
                Some(self.find_init(&source, &mut settings)?)
            }
            None => None,
        };
        self.override_model(&mut settings.model)?;
        self.override_rest(&mut settings);
        if settings.model.dropout > 0.0 {
            // Its masks come from the backend's random numbers, of which threads would draw in any order.
            settings.trainer.workers = 1;
        }
        settings.model.validate()?;
        settings.trainer.validate()?;
        Ok((settings, init))
    }

    /// What the run starts from: the source that is given, or else the one that it was begun with.
    fn init_of_run(&self) -> anyhow::Result<Option<String>> {
        if let Some(given) = &self.init {
            // Without a slash at the end.
            let given: PathBuf = Path::new(given).components().collect();
            return Ok(Some(given.to_string_lossy().into_owned()));
        }
        match &self.run {
            Some(run) if self.config.is_none() && run.join("config.json").exists() => {
                Ok(Settings::of_run(run)?.init)
            }
            _ => Ok(None),
        }
    }

    /// Finds the model to start from. A file of settings decides whatever the shape of the weights does not.
    fn find_init(&self, source: &str, settings: &mut Settings) -> anyhow::Result<Init> {
        let written = settings.clone();
        let init = Init::find(source, settings)?;
        if let Some(path) = &self.config {
            let shape = |model: &DecoderConfig| set_dropout(model.clone(), 0.0);
            ensure!(
                shape(&settings.model) == shape(&written.model),
                "the model in {} is not that of {source}, which it names as `init`",
                path.display()
            );
            *settings = written;
        }
        Ok(init)
    }

    fn refuse_other_model(&self, source: &str) -> anyhow::Result<()> {
        let given = [
            ("--attention", self.attention.is_some()),
            ("--down-rate", self.down_rate.is_some()),
            ("--layers", self.layers.is_some()),
            ("--d-model", self.d_model.is_some()),
            ("--heads", self.heads.is_some()),
            ("--vocabulary", self.vocabulary.is_some()),
            ("--llama", self.llama),
        ];
        match given.iter().find(|(_, given)| *given) {
            Some((flag, _)) => {
                bail!(
                    "{flag} cannot be changed: the weights come from {source} and are of one shape"
                )
            }
            None => Ok(()),
        }
    }

    fn override_model(&self, model: &mut DecoderConfig) -> anyhow::Result<()> {
        if let Some(layers) = self.layers {
            model.n_layers = layers;
        }
        if self.attention.is_some() || self.d_model.is_some() || self.heads.is_some() {
            let d_model = self.d_model.unwrap_or(model.d_model());
            let heads = self.heads.unwrap_or(model.attention.n_heads());
            ensure!(heads > 0, "--heads is 0, expected at least 1");
            let kind = self.attention.unwrap_or(kind(&model.attention));
            let rate = model.attention.down_rate().max(2);
            let (rope, bias) = (model.attention.rope(), model.attention.bias());
            model.attention = match kind {
                AttentionKind::Mha => AttentionConfig::mha(d_model, heads),
                AttentionKind::Mqa => AttentionConfig::mqa(d_model, heads),
                AttentionKind::Gqa => AttentionConfig::gqa(d_model, heads, heads.div_ceil(2)),
                AttentionKind::Mla => AttentionConfig::mla(d_model, heads),
                AttentionKind::Mtla => AttentionConfig::mtla(d_model, heads).with_down_rate(rate),
            }
            .with_rope(rope)
            .with_bias(bias);
        }
        if self.llama {
            make_llama(model);
        }
        model.look_back.truncate(model.n_layers);
        for layer in &mut model.look_back {
            layer.truncate(model.attention.n_heads());
        }
        if let Some(rate) = self.down_rate {
            ensure!(
                matches!(model.attention, AttentionConfig::Mtla { .. }),
                "--down-rate is for --attention mtla: other variants have one token a slot"
            );
            model.attention = model.attention.clone().with_down_rate(rate);
        }
        if let Some(dropout) = self.dropout {
            *model = set_dropout(model.clone(), dropout);
        }
        Ok(())
    }

    fn override_rest(&self, settings: &mut Settings) {
        fn set<T: Clone>(field: &mut T, value: Option<&T>) {
            if let Some(value) = value {
                *field = value.clone();
            }
        }
        let Settings { data, trainer, .. } = settings;
        if self.data.is_some() {
            data.path.clone_from(&self.data);
        }
        set(&mut data.vocabulary, self.vocabulary.as_ref());
        set(&mut data.context, self.context.as_ref());
        set(&mut data.seed, self.seed.as_ref());
        set(&mut trainer.seed, self.seed.as_ref());
        set(&mut trainer.batch_size, self.batch_size.as_ref());
        set(&mut trainer.learning_rate.peak, self.learning_rate.as_ref());
        set(&mut trainer.validate_every, self.validate_every.as_ref());
        if let Some(steps) = self.steps {
            trainer.length = Length::Steps(steps);
            // A short run has a short warm-up.
            trainer.learning_rate.warmup = trainer.learning_rate.warmup.min(steps / 4);
        }
    }
}

fn set_dropout(model: DecoderConfig, dropout: f64) -> DecoderConfig {
    DecoderConfig {
        dropout,
        attention: model.attention.with_dropout(dropout),
        ..model
    }
}

/// Changes what a Llama does not have; the sizes stay.
fn make_llama(model: &mut DecoderConfig) {
    let rope = RotaryConfig {
        layout: RotaryLayout::HalfSplit,
        ..model.attention.rope()
    };
    model.attention = model.attention.clone().with_rope(rope).with_bias(false);
    model.look_back.clear();
    model.norm = NormKind::RmsNorm;
    model.feed_forward = FeedForwardKind::SwiGlu;
}

fn kind(attention: &AttentionConfig) -> AttentionKind {
    match attention {
        AttentionConfig::Mha(_) => AttentionKind::Mha,
        AttentionConfig::Mqa(_) => AttentionKind::Mqa,
        AttentionConfig::Gqa { .. } => AttentionKind::Gqa,
        AttentionConfig::Mla(_) => AttentionKind::Mla,
        AttentionConfig::Mtla { .. } => AttentionKind::Mtla,
    }
}
