//! What a model is.

use std::io::Write;

use clap::Args;
use mtla_core::{attention::AttentionConfig, cache::CacheSpec, ops::AttentionBackend};
use mtla_models::{decoder::DecoderConfig, tokenizer::Tokenizer};
use mtla_train::{
    backend::{BackendKind, Program},
    measure::bytes,
    pretrained::Pretrained,
};

/// Say what a model is and what its cache costs. No weights are read.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mtla info models/llama
  mtla info hub:owner/name@v1.0")]
pub(crate) struct Info {
    /// A model directory, or hub:owner/name[@revision].
    model: String,
}

impl Info {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        BackendKind::best().run(self)
    }
}

impl Program for Info {
    fn run<B: AttentionBackend>(self, device: B::Device) -> anyhow::Result<()> {
        let Pretrained { directory, config } = Pretrained::open(&self.model)?;
        let decoder = config.decoder()?;
        let weights = config.weights_summary(&directory)?;
        let cache = decoder.attention.init::<B>(&device)?.cache_spec();
        let tokenizer = if directory.join("tokenizer.json").exists() {
            let tokenizer = Tokenizer::load(&directory)?;
            let chat = if tokenizer.has_chat_template() {
                ", with a chat template"
            } else {
                ""
            };
            let fits = match tokenizer.fits(decoder.vocab_size) {
                Ok(()) => "",
                Err(_) => ", which do not fit the model's vocabulary",
            };
            format!("{} tokens{fits}{chat}", tokenizer.size())
        } else {
            "none".into()
        };

        let model_type = serde_json::to_value(config.model_type)?;
        let lines = [
            ("model type", model_type.as_str().unwrap_or_default().into()),
            ("attention", attention(&decoder)),
            ("layers", decoder.n_layers.to_string()),
            ("width", decoder.d_model().to_string()),
            ("vocabulary", decoder.vocab_size.to_string()),
            ("parameters", weights.parameters.to_string()),
            (
                "weights",
                format!(
                    "{}, {}",
                    weights.types.join(" and "),
                    bytes(weights.bytes as f64)
                ),
            ),
            ("cache, bytes a token", cache_bytes(&cache, &decoder)),
            ("context length", config.max_position_embeddings.to_string()),
            ("tokenizer", tokenizer),
        ];
        let mut out = std::io::stdout().lock();
        for (name, value) in lines {
            writeln!(out, "{name:<22}{value}")?;
        }
        Ok(())
    }
}

fn attention(decoder: &DecoderConfig) -> String {
    let attention = &decoder.attention;
    let heads = attention.n_heads();
    match attention {
        AttentionConfig::Gqa { n_kv_heads, .. } if *n_kv_heads == heads => {
            format!("mha, {heads} heads")
        }
        AttentionConfig::Gqa { n_kv_heads, .. } => {
            let name = if *n_kv_heads == 1 { "mqa" } else { "gqa" };
            format!("{name}, {heads} heads, keys and values of {n_kv_heads}")
        }
        AttentionConfig::Mtla { down_rate, .. } => {
            format!("mtla, {heads} heads, {down_rate} tokens a slot")
        }
        other => format!("{}, {heads} heads", other.name()),
    }
}

/// With 32 and with 16 bits a number.
fn cache_bytes(cache: &CacheSpec, decoder: &DecoderConfig) -> String {
    let numbers = (cache.layout.width() * decoder.n_layers) as f64 / cache.stride as f64;
    format!("{} (f32), {} (f16, bf16)", 4.0 * numbers, 2.0 * numbers)
}
