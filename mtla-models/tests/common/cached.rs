//! Logits through a cache.

use burn::tensor::Tensor;
use mtla_core::{cache::Cache, ops::AttentionBackend};
use mtla_models::{decoder::Decoder, generate::LanguageModel};

/// Prompts in pieces of the given lengths, then one token at a time: the logits of the prompt's last token and of
/// all later ones, `[batch, tokens, vocab]`, and the cache after them.
pub(crate) fn cached_logits<B: AttentionBackend>(
    model: &Decoder<B>,
    rows: &[Vec<usize>],
    pieces: &[usize],
) -> (Tensor<B, 3>, Cache<B>) {
    let (batch, length) = (rows.len(), rows[0].len());
    let device = model.device();
    let part = |from: usize, to: usize| {
        let part: Vec<Vec<u32>> = rows
            .iter()
            .map(|row| row[from..to].iter().map(|id| *id as u32).collect())
            .collect();
        super::batch::<B>(&part, 0, &device)
    };
    let mut cache = model.new_cache();
    let all: Vec<usize> = cache.join(batch).collect();
    let (mut held, mut outputs) = (0, Vec::new());
    for count in pieces {
        let plan = cache.extend(&all, &vec![*count; batch]);
        let logits = model.prefill(part(held, held + count), &plan, &mut cache);
        outputs = vec![logits.unsqueeze_dim(1)];
        held += count;
    }
    for place in held..length {
        let plan = cache.step(&all);
        let tokens = part(place, place + 1).reshape([batch]);
        outputs.push(model.step(tokens, &plan, &mut cache).unsqueeze_dim(1));
    }
    (Tensor::cat(outputs, 1), cache)
}
