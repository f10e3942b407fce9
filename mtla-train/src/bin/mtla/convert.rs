//! A Llama with dense attention becomes one with latent attention.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
};

use anyhow::{Context, ensure};
use clap::{Args, ValueEnum, error::ErrorKind};
use mtla_core::ops::AttentionBackend;
use mtla_models::{
    checkpoint::SaveOptions,
    convert::{Conversion, ConversionReport, convert_with},
    llama::{LatentSizes, Llama, LlamaConfig},
};
use mtla_train::{
    backend::{BackendKind, FloatKind, Program},
    data::tokenizer_files::TokenizerFiles,
    disk::replace,
    measure::environment,
    pretrained::Pretrained,
    progress::{bar, spinner},
};
use serde_json::json;

use crate::calibration::Calibration;

/// Turn the dense attention (MHA, MQA, GQA) of a Llama into MLA or MTLA.
///
/// What each layer sees on a text decides what of its keys and values is kept. The result is near the old model and
/// not equal to it: it has to be trained further, MTLA more than MLA. A table says how near each layer is;
/// conversion.json beside the weights keeps it.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mtla convert models/llama models/llama-mtla --text book.txt
  mtla convert models/llama models/llama-mtla --text book.txt --kv-lora-rank 256 --rope-dim 32 --down-rate 2
  mtla convert hub:owner/name models/mla --attention mla --dtype bf16")]
pub(crate) struct Convert {
    /// The Llama: a directory, or hub:owner/name[@revision].
    model: String,
    /// The directory to write.
    out: PathBuf,
    /// The attention to make.
    #[arg(long, value_enum, default_value = "mtla")]
    attention: Kind,
    /// Width of the latent that keys and values come from [4 heads, or what is exact if that is less].
    #[arg(long, value_name = "N")]
    kv_lora_rank: Option<usize>,
    /// Width of the rotary key, an even divisor of the head's width [half of it if possible].
    #[arg(long, value_name = "N")]
    rope_dim: Option<usize>,
    /// Tokens that share a cache slot (MTLA only) [2].
    #[arg(long, value_name = "N")]
    down_rate: Option<usize>,
    #[command(flatten)]
    calibration: Calibration,
    /// The numbers to write; those of the old model, unless given.
    #[arg(long, value_enum)]
    dtype: Option<FloatKind>,
    /// Write into a directory that is not empty: a model in it is replaced, other files stay.
    #[arg(long)]
    force: bool,
    /// Where to compute; the fastest backend that is compiled in, unless given.
    #[arg(long, value_enum)]
    backend: Option<BackendKind>,
}

/// The attention to make.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// Multi-head latent attention.
    Mla,
    /// Multi-head temporal latent attention.
    Mtla,
}

impl Convert {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        if self.attention == Kind::Mla && self.down_rate.is_some() {
            let message = "--down-rate is of --attention mtla; leave it out\n";
            clap::Error::raw(ErrorKind::ArgumentConflict, message).exit();
        }
        self.backend.unwrap_or_else(BackendKind::best).run(self)
    }

    /// The sizes that were asked for, or those that fit the model.
    fn conversion(&self, llama: &LlamaConfig) -> Conversion {
        let heads = llama.num_attention_heads;
        let width = llama.head_dim.unwrap_or(llama.hidden_size / heads);
        let keys_and_values = 2 * width * llama.num_key_value_heads.unwrap_or(heads);
        let usual = LatentSizes::for_head(width);
        let rope = match width / 2 {
            half if half > 0 && half.is_multiple_of(2) => half,
            _ => width,
        };
        let rank = usual
            .kv_lora_rank
            .min(keys_and_values)
            .min(llama.hidden_size);
        Conversion {
            kv_lora_rank: self.kv_lora_rank.unwrap_or(rank),
            qk_rope_head_dim: self.rope_dim.unwrap_or(rope),
            down_rate: (self.attention == Kind::Mtla).then(|| self.down_rate.unwrap_or(2)),
        }
    }

    /// The numbers that were asked for, or those of the old model.
    fn save_options(&self, old: &LlamaConfig, directory: &Path) -> anyhow::Result<SaveOptions> {
        let types = old.weights_summary(directory)?.types;
        let dtype = self.dtype.or_else(|| match &types[..] {
            [only] => FloatKind::from_str(only, true).ok(),
            _ => None,
        });
        Ok(SaveOptions {
            dtype: dtype.map(FloatKind::dtype),
            ..SaveOptions::default()
        })
    }

    /// Refuses to write where something is that would be lost.
    fn check_place(&self, directory: &Path) -> anyhow::Result<()> {
        let out = self.out.display();
        ensure!(
            self.out.file_name().is_some(),
            "{out} is no name for a new directory; give one, such as models/converted"
        );
        let unfinished = unfinished(&self.out);
        ensure!(
            !unfinished.exists(),
            "{} is left of another conversion; remove it if none is under way",
            unfinished.display()
        );
        if !self.out.exists() {
            return Ok(());
        }
        ensure!(
            self.out.is_dir(),
            "{out} is not a directory; give another name"
        );
        ensure!(
            self.out.canonicalize()? != directory.canonicalize()?,
            "{out} is the model itself; give another directory"
        );
        let empty = fs::read_dir(&self.out)?.next().is_none();
        ensure!(
            empty || self.force,
            "{out} is not empty; give another directory, or --force to replace the model in it"
        );
        Ok(())
    }
}

impl Program for Convert {
    fn run<B: AttentionBackend>(self, device: B::Device) -> anyhow::Result<()> {
        let model = Pretrained::open(&self.model)?;
        let directory = &model.directory;
        self.check_place(directory)?;
        let reading = spinner(format!("reading {}", directory.display()));
        let old = model.load::<B>(None, &device)?;
        reading.finish_and_clear();

        let decoder = old.config.decoder()?;
        let conversion = self.conversion(&old.config);
        let attention = conversion.attention(&decoder.attention)?;
        let config = new_config(&old.config, &conversion)?;
        ensure!(
            config.decoder()?.attention == attention,
            "{}: attention_bias is true, but the files of latent attention have no biases; \
             only models without them can be converted",
            directory.join("config.json").display()
        );
        let text = self.calibration.text(&model, &old, &device)?;
        let layers = bar("converting", decoder.n_layers);
        let converted = convert_with(&old.decoder, &decoder, &conversion, &text.batches, |_| {
            layers.inc(1);
        })?;
        drop(layers);

        let new = Llama {
            config,
            generation: old.generation.clone(),
            decoder: converted.model,
        };
        let description = json!({
            "source": self.model,
            "conversion": {
                "attention": attention.name(),
                "kv_lora_rank": conversion.kv_lora_rank,
                "qk_rope_head_dim": conversion.qk_rope_head_dim,
                "down_rate": conversion.down_rate,
            },
            "text": text.description,
            "report": converted.report,
            "model": new.config,
            "made_with": environment::<B>(&device),
        });
        let writing = spinner(format!("writing {}", self.out.display()));
        write(&self.out, |folder| {
            new.save_pretrained_with(folder, &self.save_options(&old.config, directory)?)?;
            TokenizerFiles::read(directory)?.write(folder)?;
            let path = folder.join("conversion.json");
            let text = serde_json::to_string_pretty(&description)? + "\n";
            replace(&path, text.as_bytes())
                .with_context(|| format!("cannot write {}", path.display()))
        })?;
        writing.finish_and_clear();
        eprintln!("wrote {}", self.out.display());
        // The last thing to do: whoever reads it may have had enough before its end.
        print(&converted.report)
    }
}

/// The `config.json` of the converted model.
fn new_config(old: &LlamaConfig, conversion: &Conversion) -> anyhow::Result<LlamaConfig> {
    let width = old
        .head_dim
        .unwrap_or(old.hidden_size / old.num_attention_heads);
    let sizes = LatentSizes {
        q_lora_rank: 0,
        kv_lora_rank: conversion.kv_lora_rank,
        qk_nope_head_dim: width,
        qk_rope_head_dim: conversion.qk_rope_head_dim,
        v_head_dim: width,
    };
    Ok(match conversion.down_rate {
        Some(down_rate) => old.with_mtla(sizes, down_rate)?,
        None => old.with_mla(sizes)?,
    })
}

/// How near each layer is.
fn print(report: &ConversionReport) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "relative errors on the text, by layer")?;
    writeln!(
        out,
        "{:>5} {:>9} {:>9} {:>9}",
        "layer", "keys", "values", "attention"
    )?;
    for (number, layer) in report.layers.iter().enumerate() {
        writeln!(
            out,
            "{number:>5} {:>9.4} {:>9.4} {:>9.4}",
            layer.keys, layer.values, layer.attention
        )?;
    }
    let divergence = report.divergence;
    writeln!(
        out,
        "divergence from the old model: {divergence:.4} nats a token"
    )?;
    Ok(())
}

/// Lets `fill` make a directory: a new one under a temporary name, which is renamed once it is whole; in one that
/// has files already, each file is replaced on its own.
fn write(out: &Path, fill: impl Fn(&Path) -> anyhow::Result<()>) -> anyhow::Result<()> {
    if out.is_dir() && fs::read_dir(out)?.next().is_some() {
        return fill(out);
    }
    let unfinished = unfinished(out);
    if let Some(parent) = unfinished.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::create_dir(&unfinished).with_context(|| format!("cannot make {}", unfinished.display()))?;
    let finish = || {
        fill(&unfinished)?;
        if out.is_dir() {
            fs::remove_dir(out)?;
        }
        fs::rename(&unfinished, out).with_context(|| format!("cannot make {}", out.display()))
    };
    finish().inspect_err(|_| {
        fs::remove_dir_all(&unfinished).ok();
    })
}

/// The name of a directory that is not whole.
fn unfinished(out: &Path) -> PathBuf {
    out.with_added_extension("tmp")
}
