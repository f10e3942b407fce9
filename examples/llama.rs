//! Loads a Llama, with MTLA or without, and chats with it or measures how fast it is.
//!
//! ```text
//! cargo run --release --example llama -- models/llama                    # a chat
//! cargo run --release --example llama -- models/llama --prompt 'The sea'
//! cargo run --release --example llama -- models/llama --benchmark
//! cargo run --release --example llama                                    # measures a random small model
//! ```
//!
//! Top to bottom: arguments → checkpoint and tokenizer → chat, or benchmark.

#[path = "llama/benchmark.rs"]
mod benchmark;
#[path = "llama/chat.rs"]
mod chat;

use anyhow::ensure;
use clap::Parser;
use mtla_core::ops::AttentionBackend;
use mtla_examples::{BackendKind, FloatKind, Program};
use mtla_models::llama::{LatentSizes, Llama, LlamaConfig};
use mtla_train::{pretrained::Pretrained, progress::spinner};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Chat with a Llama, or measure how fast it is.
///
/// Without a model it measures a small one with MTLA and random weights, which downloads nothing.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// A model directory, or hub:owner/name[@revision].
    model: Option<String>,
    /// Where to compute; the fastest backend that is compiled in, unless given.
    #[arg(long, value_enum)]
    backend: Option<BackendKind>,
    /// The numbers to compute with; those of the backend, unless given.
    #[arg(long, value_enum)]
    dtype: Option<FloatKind>,
    /// Measure speed and memory instead of chatting.
    #[arg(long)]
    benchmark: bool,
    #[command(flatten)]
    chat: chat::ChatOptions,
    #[command(flatten)]
    measure: benchmark::BenchmarkOptions,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    arguments
        .backend
        .unwrap_or_else(BackendKind::best)
        .run(arguments)
}

impl Program for Arguments {
    fn run<B: AttentionBackend>(self, device: B::Device) -> anyhow::Result<()> {
        let Some(source) = &self.model else {
            ensure!(
                !self.chat.is_given(),
                "there is no model to continue a prompt: name a directory, or hub:owner/name"
            );
            ensure!(
                self.dtype.is_none_or(|kind| kind == FloatKind::F32),
                "the random model has 32-bit numbers; name a model, or leave out --dtype"
            );
            eprintln!(
                "no model given: measuring a small MTLA Llama with random weights, whose text would mean nothing"
            );
            let llama = random::<B>(&device)?;
            return benchmark::run(&llama, &self.measure, &device);
        };
        let model = Pretrained::open(source)?;
        let chat = (!self.benchmark).then(|| self.chat.prepare(&model));
        let chat = chat.transpose()?;
        let reading = spinner(format!("reading {}", model.directory.display()));
        let llama = model.load::<B>(self.dtype, &device)?;
        reading.finish_and_clear();
        match chat {
            Some(chat) => chat.run(&llama),
            None => benchmark::run(&llama, &self.measure, &device),
        }
    }
}

/// About 60 million parameters: 8 layers of width 512, two tokens a slot.
fn random<B: AttentionBackend>(device: &B::Device) -> anyhow::Result<Llama<B>> {
    let config = LlamaConfig {
        hidden_size: 512,
        intermediate_size: 1536,
        num_hidden_layers: 8,
        num_attention_heads: 8,
        ..LlamaConfig::default()
    };
    let config = config.with_mtla(LatentSizes::for_head(64), 2)?;
    Ok(Llama::new(config, device)?)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use clap::CommandFactory;
    use mtla_train::data::{codec::TextCodec, vocabulary::Vocabulary};

    use super::*;

    /// The `config.json` of a small Llama, its tokenizer, and no weights.
    fn make(folder: &Path) {
        let codec = TextCodec::from(Vocabulary::train(["some words"], 300).unwrap());
        codec.save_pretrained(folder).unwrap();
        let config = format!(
            r#"{{"model_type": "llama", "vocab_size": {}, "hidden_size": 8, "intermediate_size": 8,
                 "num_hidden_layers": 1, "num_attention_heads": 2}}"#,
            codec.size()
        );
        std::fs::write(folder.join("config.json"), config).unwrap();
    }

    fn error(folder: &Path, more: &[&str]) -> String {
        let arguments = ["llama", folder.to_str().unwrap()];
        let arguments = Arguments::parse_from([&arguments[..], more].concat());
        let error = BackendKind::best().run(arguments).unwrap_err();
        format!("{error:#}")
    }

    #[test]
    fn arguments_do_not_clash() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn what_a_chat_needs_is_checked_before_weights_are_read() {
        let folder = tempfile::tempdir().unwrap();
        make(folder.path());
        let told = error(folder.path(), &["--temperature=-1"]);
        assert!(told.contains("temperature is -1"), "{told}");
        assert!(error(folder.path(), &[]).contains("neither model.safetensors"));

        std::fs::remove_file(folder.path().join("tokenizer.json")).unwrap();
        let told = error(folder.path(), &[]);
        assert!(
            told.contains("--benchmark") && told.contains("tokenizer.json"),
            "{told}"
        );
        let told = error(folder.path(), &["--benchmark"]);
        assert!(told.contains("neither model.safetensors"), "{told}");
    }
}
