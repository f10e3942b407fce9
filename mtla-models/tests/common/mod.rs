//! Models and token sequences for the tests.

#![allow(dead_code, reason = "not every test uses all of it")]

pub(crate) mod cached;

use burn::{
    module::{Module, ModuleMapper, Param},
    tensor::{Int, Tensor, TensorData, backend::Backend},
};
use mtla_core::attention::AttentionConfig;
use mtla_models::{
    decoder::{Decoder, DecoderConfig, FeedForwardKind, NormKind},
    llama::{LatentSizes, LlamaConfig},
};
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng, SeedableRng},
};

pub(crate) const VOCAB: usize = 23;

/// Every attention variant, at width 16.
pub(crate) fn variants() -> Vec<AttentionConfig> {
    vec![
        AttentionConfig::mha(16, 4),
        AttentionConfig::mqa(16, 4),
        AttentionConfig::gqa(16, 4, 2),
        AttentionConfig::mla(16, 4),
        AttentionConfig::mtla(16, 4),
        AttentionConfig::mtla(16, 4).with_down_rate(1),
        AttentionConfig::mtla(16, 4).with_down_rate(3),
    ]
}

/// A small decoder of every attention variant, one of the other kinds of norm, feed-forward network and head, and
/// Llamas of each kind.
pub(crate) fn configs() -> Vec<DecoderConfig> {
    let mut configs: Vec<DecoderConfig> = variants()
        .into_iter()
        .map(|attention| DecoderConfig::new(VOCAB, 2, attention).with_tied_embeddings(false))
        .collect();
    configs.push(
        DecoderConfig::new(VOCAB, 3, AttentionConfig::mtla(16, 4))
            .with_norm(NormKind::RmsNorm)
            .with_feed_forward(FeedForwardKind::SwiGlu),
    );
    let llamas = [
        llama(),
        llama().with_mla(latent_sizes()).unwrap(),
        llama().with_mtla(latent_sizes(), 1).unwrap(),
        llama().with_mtla(latent_sizes(), 2).unwrap(),
    ];
    configs.extend(llamas.map(|llama| llama.decoder().unwrap()));
    configs
}

/// A Llama of two layers of width 24.
pub(crate) fn llama() -> LlamaConfig {
    LlamaConfig {
        vocab_size: VOCAB,
        hidden_size: 24,
        intermediate_size: 20,
        num_hidden_layers: 2,
        num_attention_heads: 3,
        max_position_embeddings: 64,
        ..LlamaConfig::default()
    }
}

/// A low-rank query, and no two sizes that are equal, nor a head as wide as in the Llama.
pub(crate) fn latent_sizes() -> LatentSizes {
    LatentSizes {
        q_lora_rank: 10,
        kv_lora_rank: 12,
        qk_nope_head_dim: 14,
        qk_rope_head_dim: 4,
        v_head_dim: 6,
    }
}

/// A decoder with the same weights on every backend and in every run, far from uniform in its predictions.
pub(crate) fn model<B: Backend>(config: &DecoderConfig, device: &B::Device) -> Decoder<B> {
    let model = config.init::<B>(device).unwrap();
    model.map(&mut Redraw(ChaCha8Rng::seed_from_u64(1)))
}

/// Draws all parameters anew: vectors around 1, matrices with standard deviation `2 / √inputs`.
struct Redraw(ChaCha8Rng);

impl<B: Backend> ModuleMapper<B> for Redraw {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        param.map(|old| {
            let shape = old.shape();
            let uniform = || self.0.next_u32() as f32 / u32::MAX as f32 - 0.5;
            let values = std::iter::repeat_with(uniform).take(shape.num_elements());
            let data = TensorData::new(values.collect::<Vec<_>>(), shape);
            let drawn = Tensor::from_data(data, &old.device());
            if D == 1 {
                drawn + 1.0
            } else {
                drawn * (2.0 * (12.0 / old.dims()[0] as f64).sqrt())
            }
        })
    }
}

/// Rows of token ids as a tensor, filled up with `padding`.
pub(crate) fn batch<B: Backend>(
    rows: &[Vec<u32>],
    padding: u32,
    device: &B::Device,
) -> Tensor<B, 2, Int> {
    let longest = rows.iter().map(Vec::len).max().unwrap();
    let padded = rows.iter().flat_map(|row| {
        let padding = std::iter::repeat_n(&padding, longest - row.len());
        row.iter().chain(padding).map(|token| i64::from(*token))
    });
    let data = TensorData::new(padded.collect::<Vec<_>>(), [rows.len(), longest]);
    Tensor::from_data(data, device)
}

/// `count` token ids without much order.
pub(crate) fn tokens(count: usize, seed: usize) -> Vec<u32> {
    (0..count)
        .map(|i| ((7 * i * i + 3 * i + 5 * seed) % VOCAB) as u32)
        .collect()
}
