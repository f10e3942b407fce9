//! This library's side of `compare.py llama`: a Hugging Face checkpoint, prefilled and continued by the engine, on the
//! Flex backend.
//!
//! Speaks lines on standard input and output, as `torch_llama.py` does: `check FILE` writes the logits after the prompt
//! and after each of a few given tokens, `run NEW_TOKENS` continues greedily and answers the milliseconds of the
//! prompt, those of the other tokens, and the bytes of the cache; `peak` answers the peak memory in KiB.

use std::{path::Path, time::Instant};

use anyhow::{Context, bail, ensure};
use burn::tensor::{Int, Tensor, TensorData, try_read_sync};
use burn_flex::{Flex, FlexDevice};
use mtla_benches::peer::{answer_commands, peak, write_tensors};
use mtla_models::{
    generate::{Engine, EventKind, GenerationConfig, LanguageModel, Request},
    llama::Llama,
};
use safetensors::SafeTensors;

/// Keeps the memory of tensors and maps it in large pages, as allocators of deep-learning frameworks do.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Tokens of a row after the prompt.
const FORCED: usize = 6;

fn prompt(row: &[u32]) -> &[u32] {
    &row[..row.len() - FORCED]
}

struct Peer {
    llama: Llama<Flex>,
    /// The prompt of each row, and some tokens to go on with.
    rows: Vec<Vec<u32>>,
}

impl Peer {
    /// The checkpoint and its tokens, as `compare.py` wrote them.
    fn load(directory: &Path) -> anyhow::Result<Self> {
        let llama = Llama::from_pretrained(directory, &FlexDevice)?;
        let bytes = std::fs::read(directory.join("tokens.safetensors"))?;
        let file = SafeTensors::deserialize(&bytes)?;
        let tokens = file.tensor("tokens")?;
        let &[_, length] = tokens.shape() else {
            bail!("tokens of shape {:?}", tokens.shape());
        };
        let ids: Vec<u32> = tokens
            .data()
            .chunks_exact(8)
            .map(|id| i64::from_le_bytes(id.try_into().expect("8 bytes")) as u32)
            .collect();
        let rows = ids.chunks_exact(length).map(<[u32]>::to_vec).collect();
        Ok(Self { llama, rows })
    }

    /// Writes logits `[1 + FORCED, rows, vocab_size]`.
    fn check(&self, path: &Path) -> anyhow::Result<()> {
        let decoder = &self.llama.decoder;
        let mut cache = decoder.new_cache();
        let all: Vec<usize> = cache.join(self.rows.len()).collect();
        let length = self.rows[0].len() - FORCED;
        let plan = cache.extend(&all, &vec![length; all.len()]);
        let prompts: Vec<u32> = self
            .rows
            .iter()
            .flat_map(|row| prompt(row).to_vec())
            .collect();
        let prompts = TensorData::new(prompts, [all.len(), length]);
        let prompts = Tensor::<Flex, 2, Int>::from_data(prompts, &FlexDevice);
        let mut logits = vec![decoder.prefill(prompts, &plan, &mut cache)];
        for place in 0..FORCED {
            let tokens: Vec<u32> = self.rows.iter().map(|row| row[length + place]).collect();
            let tokens = TensorData::new(tokens, [all.len()]);
            let tokens = Tensor::<Flex, 1, Int>::from_data(tokens, &FlexDevice);
            let plan = cache.step(&all);
            logits.push(decoder.step(tokens, &plan, &mut cache));
        }
        let logits = Tensor::stack::<3>(logits, 0).into_data();
        write_tensors(path, [("logits", logits)])
    }

    fn run(&self, new_tokens: usize) -> anyhow::Result<String> {
        let mut engine = Engine::new(&self.llama.decoder);
        let config = GenerationConfig::new(new_tokens);
        for row in &self.rows {
            engine.submit(Request::new(prompt(row), config.clone()))?;
        }
        let start = Instant::now();
        let mut begun = None;
        while !engine.is_idle() {
            let events = try_read_sync(engine.advance()).context("a native target")??;
            ensure!(
                !events
                    .iter()
                    .any(|event| matches!(event.kind, EventKind::Failed(_)))
            );
            begun.get_or_insert_with(Instant::now);
        }
        let begun = begun.context("no tokens")?;
        let (prefill, decode) = (begun.duration_since(start), begun.elapsed());
        let ms = |time: std::time::Duration| time.as_secs_f64() * 1e3;
        let bytes = engine.peak_bytes();
        Ok(format!("{} {} {bytes}", ms(prefill), ms(decode)))
    }
}

fn main() -> anyhow::Result<()> {
    let directory = std::env::args()
        .nth(1)
        .context("usage: peer-llama DIRECTORY")?;
    let peer = Peer::load(Path::new(&directory))?;
    answer_commands(|command, argument| {
        Ok(match command {
            "check" => {
                peer.check(Path::new(argument))?;
                "done".into()
            }
            "run" => peer.run(argument.parse()?)?,
            "peak" => peak()?.to_string(),
            other => bail!("unknown command {other}"),
        })
    })
}
