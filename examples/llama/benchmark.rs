//! How fast a model is, and how much memory it takes.

use std::time::Instant;

use burn::{
    module::Module,
    tensor::{Int, Tensor, TensorData},
};
use clap::Args;
use mtla_core::ops::AttentionBackend;
use mtla_models::{generate::LanguageModel, llama::Llama};
use mtla_train::{
    measure::{bytes, environment, peak_memory},
    progress::bar,
};
use serde::Serialize;

#[derive(Debug, Clone, Args, Serialize)]
pub(crate) struct BenchmarkOptions {
    /// Benchmark: rows computed together.
    #[arg(long, value_name = "N", default_value = "1", value_parser = positive)]
    batch: usize,
    /// Benchmark: tokens of each prompt.
    #[arg(long, value_name = "N", default_value = "512", value_parser = positive)]
    prompt_tokens: usize,
    /// Benchmark: tokens after each prompt.
    #[arg(long, value_name = "N", default_value = "128", value_parser = positive)]
    new_tokens: usize,
    /// Benchmark: runs that are measured, after one that is not; medians count.
    #[arg(long, value_name = "N", default_value = "3", value_parser = positive)]
    repeat: usize,
    /// Benchmark: print a line of JSON too.
    #[arg(long)]
    #[serde(skip)]
    json: bool,
}

fn positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(n) if n > 0 => Ok(n),
        _ => Err("give a number of at least 1".into()),
    }
}

/// One prompt with its continuation.
struct Run {
    prompt_seconds: f64,
    decode_seconds: f64,
    live_bytes: usize,
    allocated_bytes: usize,
}

#[derive(Serialize)]
struct Report {
    prompt_tokens_per_second: f64,
    decode_tokens_per_second: f64,
    cache_bytes_per_token: f64,
    allocated_cache_bytes_per_token: f64,
    parameters: usize,
    weights_bytes: usize,
    peak_memory_bytes: Option<u64>,
}

/// Measures the model, and prints what came out.
pub(crate) fn run<B: AttentionBackend>(
    llama: &Llama<B>,
    options: &BenchmarkOptions,
    device: &B::Device,
) -> anyhow::Result<()> {
    let progress = bar("measuring", options.repeat + 1);
    let mut runs = Vec::new();
    for _ in 0..=options.repeat {
        runs.push(once(llama, options, device)?);
        progress.inc(1);
    }
    drop(progress);
    // The first one warms up.
    let runs = &runs[1..];
    let last = &runs[runs.len() - 1];
    let held = (options.batch * (options.prompt_tokens + options.new_tokens)) as f64;
    let parameters = llama.decoder.num_params();
    let rate = |tokens: usize, seconds: fn(&Run) -> f64| {
        (options.batch * tokens) as f64 / median(runs.iter().map(seconds).collect())
    };
    let report = Report {
        prompt_tokens_per_second: rate(options.prompt_tokens, |run| run.prompt_seconds),
        decode_tokens_per_second: rate(options.new_tokens, |run| run.decode_seconds),
        cache_bytes_per_token: last.live_bytes as f64 / held,
        allocated_cache_bytes_per_token: last.allocated_bytes as f64 / held,
        parameters,
        weights_bytes: parameters * llama.decoder.embedding.weight.dtype().size(),
        peak_memory_bytes: peak_memory(),
    };
    report.print();
    if options.json {
        let mut line = environment::<B>(device);
        line["settings"] = serde_json::to_value(options)?;
        line["model"] = serde_json::to_value(&llama.config)?;
        line["result"] = serde_json::to_value(&report)?;
        println!("{line}");
    }
    Ok(())
}

/// Takes a prompt into a fresh cache and decodes greedily. Reading the chosen tokens back waits for the device.
fn once<B: AttentionBackend>(
    llama: &Llama<B>,
    options: &BenchmarkOptions,
    device: &B::Device,
) -> anyhow::Result<Run> {
    let (model, rows) = (&llama.decoder, options.batch);
    let vocabulary = model.vocab_size();
    let ids: Vec<i64> = (0..rows * options.prompt_tokens)
        .map(|place| (place * 7919 % vocabulary) as i64)
        .collect();
    let prompts = TensorData::new(ids, [rows, options.prompt_tokens]);
    let prompts = Tensor::<B, 2, Int>::from_data(prompts, device);
    let mut cache = model.new_cache();
    let all: Vec<usize> = cache.join(rows).collect();
    let choose = |logits: Tensor<B, 2>| -> anyhow::Result<Tensor<B, 1, Int>> {
        let tokens = logits.argmax(1).reshape([rows]);
        tokens.to_data();
        Ok(tokens)
    };

    let start = Instant::now();
    let plan = cache.extend(&all, &vec![options.prompt_tokens; rows]);
    let mut tokens = choose(model.prefill(prompts, &plan, &mut cache))?;
    let prompt_seconds = start.elapsed().as_secs_f64();

    let start = Instant::now();
    for _ in 0..options.new_tokens {
        let plan = cache.step(&all);
        tokens = choose(model.step(tokens, &plan, &mut cache))?;
    }
    Ok(Run {
        prompt_seconds,
        decode_seconds: start.elapsed().as_secs_f64(),
        live_bytes: cache.live_bytes(),
        allocated_bytes: cache.allocated_bytes(),
    })
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 {
        values[middle]
    } else {
        f64::midpoint(values[middle - 1], values[middle])
    }
}

impl Report {
    fn print(&self) {
        let peak = self.peak_memory_bytes;
        let lines = [
            (
                "prompt, tokens/s",
                format!("{:.1}", self.prompt_tokens_per_second),
            ),
            (
                "decoding, tokens/s",
                format!("{:.1}", self.decode_tokens_per_second),
            ),
            ("cache a token, held", bytes(self.cache_bytes_per_token)),
            (
                "cache a token, allocated",
                bytes(self.allocated_cache_bytes_per_token),
            ),
            ("parameters", self.parameters.to_string()),
            ("weights", bytes(self.weights_bytes as f64)),
            (
                "peak memory",
                peak.map_or("unknown".into(), |peak| bytes(peak as f64)),
            ),
        ];
        for (name, value) in lines {
            println!("{name:<26}{value:>12}");
        }
    }
}
