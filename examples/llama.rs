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
use mtla_train::{
    pretrained::{self, Pretrained},
    progress::spinner,
};

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
    chat: chat::Options,
    #[command(flatten)]
    measure: benchmark::Options,
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
        let directory = pretrained::directory(source)?;
        let reading = spinner(format!("reading {}", directory.display()));
        let model = Pretrained::<B>::load(&directory, self.dtype, &device)?;
        reading.finish_and_clear();
        if self.benchmark {
            benchmark::run(&model.llama, &self.measure, &device)
        } else {
            chat::run(&model, &self.chat)
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
