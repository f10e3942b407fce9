//! The text that a conversion looks at: a file's, or what the model itself writes.

use std::path::PathBuf;

use anyhow::{Context, ensure};
use burn::tensor::{Int, Tensor, TensorData};
use clap::Args;
use mtla_core::ops::AttentionBackend;
use mtla_models::{
    generate::{Generation, GenerationConfig},
    llama::Llama,
    tokenizer::Tokenizer,
};
use mtla_train::{pretrained::Pretrained, progress::bar};
use serde_json::{Value, json};

use crate::text;

/// Tokens a row, at most.
const ROW: usize = 256;
/// Rows that the model writes together, at most.
const TOGETHER: usize = 16;
/// Tokens of the last word of a part of a text, at most.
const LAST_WORD: usize = 16;
/// Logits of a batch, at most, as long as it has more than one row.
const BATCH: usize = 1 << 24;

#[derive(Debug, Args)]
pub(crate) struct Calibration {
    /// A text to look at, like those that the model is for; without it the model writes one itself.
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Tokens of the text to look at, at most [4096, or twice the model's width if that is more].
    #[arg(long, value_name = "N")]
    tokens: Option<usize>,
    /// Seed of the text that the model writes, and of new weights.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
}

pub(crate) struct Text<B: AttentionBackend> {
    pub(crate) batches: Vec<Tensor<B, 2, Int>>,
    /// What it was, as JSON.
    pub(crate) description: Value,
}

impl Calibration {
    /// The text as rows of tokens, in batches.
    pub(crate) fn text<B: AttentionBackend>(
        &self,
        model: &Pretrained,
        llama: &Llama<B>,
        device: &B::Device,
    ) -> anyhow::Result<Text<B>> {
        B::seed(device, self.seed);
        let config = &model.config;
        let width = config.hidden_size;
        let tokens = self.tokens.unwrap_or(4096.max(2 * width));
        ensure!(
            tokens > width,
            "--tokens is {tokens}, expected more than the model's width of {width}"
        );
        let (count, length) = rows(tokens, ROW.min(config.max_position_embeddings.max(2)));
        ensure!(
            count * length > width,
            "--tokens is {tokens}, which are {count} rows of {length} and no more than the model's width of {width}; \
             {} are enough",
            tokens + count
        );
        let rows = match &self.text {
            Some(_) => self.rows_of_file(model, count, length)?,
            None => self.rows_of_model(llama, count, length)?,
        };
        let together = (BATCH / (length * config.vocab_size)).clamp(1, 8);
        let batches = rows
            .chunks(together)
            .map(|rows| {
                let ids: Vec<i64> = rows.iter().flatten().map(|id| i64::from(*id)).collect();
                Tensor::from_data(TensorData::new(ids, [rows.len(), length]), device)
            })
            .collect();
        let source = match &self.text {
            Some(path) => path.display().to_string(),
            None => "written by the model".into(),
        };
        Ok(Text {
            batches,
            description: json!({
                "source": source,
                "rows": rows.len(),
                "tokens_a_row": length,
                "seed": self.seed,
            }),
        })
    }

    /// Rows of a file's text, each with the token before it that begins a text.
    fn rows_of_file(
        &self,
        model: &Pretrained,
        count: usize,
        length: usize,
    ) -> anyhow::Result<Vec<Vec<u32>>> {
        let path = self.text.as_deref().context("no file")?;
        let text = text::read(path)?;
        let tokenizer = model.tokenizer()?;
        let begin = tokenizer
            .bos()
            .filter(|bos| tokenizer.encode("").is_ok_and(|ids| ids.contains(bos)));
        let begin: Vec<u32> = begin.into_iter().collect();
        let own = length - begin.len();
        let ids = beginning(&tokenizer, &text, count * own)?;
        let rows: Vec<Vec<u32>> = ids
            .chunks_exact(own)
            .take(count)
            .map(|ids| [&begin[..], ids].concat())
            .collect();
        let (found, width) = (rows.len() * length, model.config.hidden_size);
        ensure!(
            found > width,
            "{} has {} tokens, which is too few: give a text of at least {}",
            path.display(),
            ids.len(),
            (width + 1).next_multiple_of(length)
        );
        Ok(rows)
    }

    /// Rows that the model writes at temperature 1.
    fn rows_of_model<B: AttentionBackend>(
        &self,
        llama: &Llama<B>,
        count: usize,
        length: usize,
    ) -> anyhow::Result<Vec<Vec<u32>>> {
        let other = &llama.config.other;
        let begin = other.get("bos_token_id").and_then(Value::as_u64);
        let begin = begin.unwrap_or_default() as u32;
        let batches = count.div_ceil(TOGETHER);
        let written = bar("writing a text", batches * (length - 1));
        let mut texts = vec![vec![begin]; count];
        for (number, texts) in texts.chunks_mut(TOGETHER).enumerate() {
            let sampling = GenerationConfig::new(length - 1)
                .with_temperature(1.0)
                .with_seed(self.seed.wrapping_add(number as u64))
                .with_num_return_sequences(texts.len());
            for events in Generation::new(&llama.decoder, &[[begin]], &sampling)? {
                for event in events? {
                    texts[event.sample].push(event.token);
                }
                written.inc(1);
            }
        }
        Ok(texts)
    }
}

/// The number and length of rows that have nearly `tokens` tokens and no more. A row has two at least, because one
/// alone has nothing before it, and `longest` at most.
fn rows(tokens: usize, longest: usize) -> (usize, usize) {
    let count = tokens.div_ceil(longest).min(tokens / 2);
    (count, longest.min(tokens / count))
}

/// The first tokens of a text: more than `count` of them if it has as many. No more of it is encoded than need be.
fn beginning(tokenizer: &Tokenizer, text: &str, count: usize) -> anyhow::Result<Vec<u32>> {
    // A token rarely has more bytes.
    let mut bytes = count.saturating_mul(8);
    loop {
        let part = &text[..text.floor_char_boundary(bytes)];
        let ids = tokenizer.encode_bare(part)?;
        // Only the last word of a part may be encoded in another way than in the text.
        if part.len() == text.len() || ids.len() > count + LAST_WORD {
            return Ok(ids);
        }
        bytes = bytes.saturating_mul(2);
    }
}

#[cfg(test)]
mod tests {
    use super::rows;

    #[test]
    fn rows_have_no_more_tokens_than_asked_for() {
        assert_eq!(rows(4096, 256), (16, 256));
        assert_eq!(rows(100, 256), (1, 100));
        for longest in 2..20 {
            for tokens in 2..200 {
                let (count, length) = rows(tokens, longest);
                assert!((2..=longest).contains(&length));
                assert!(count * length <= tokens && count * (length + 1) >= tokens);
            }
        }
    }
}
