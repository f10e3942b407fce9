//! Heads that begin by looking a certain number of tokens back.
//!
//! A score's rotated part is a sum of `cos(f (i − j − o))` over the frequencies `f`, if the biases of query and
//! key are chosen so: with the key's bias `b` on one axis and the query's turned back by the angle `f o`, it is
//! largest for the token `o` before the query's, whatever the tokens are. Training can take it from there; a model
//! that is small or trained for a short time otherwise spends most of that time on finding such heads at all.

use burn::{
    module::Param,
    nn::Linear,
    tensor::{Tensor, TensorData, backend::Backend},
};

use super::{Attention, QueryProjection};
use crate::rope::{RotaryConfig, RotaryLayout};

impl<B: Backend> Attention<B> {
    /// Sets the biases of the rotated parts so that head `h` begins by attending to the token
    /// `offsets[h]` before its own (to the slot nearest to it, where tokens share slots), with a score of
    /// `score` there. Heads beyond the list begin without such a preference.
    ///
    /// # Panics
    /// If the layer has no biases, or fewer heads than there are offsets.
    pub fn look_back(&mut self, offsets: &[f64], score: f64) {
        match self {
            Self::Grouped(layer) => {
                let (rope, dim) = layer.rope();
                let (q, k) = biases(&rope, dim, dim, offsets, score);
                let heads = width(&layer.q_proj) / dim;
                set(&mut layer.q_proj, heads, 0, &q, dim);
                let kv_heads = width(&layer.k_proj) / dim;
                set(&mut layer.k_proj, kv_heads, 0, &vec![k; kv_heads], dim);
            }
            Self::Latent(layer) => {
                let (rope, dim) = layer.rope();
                let head = layer.head_width();
                let (q, k) = biases(&rope, dim, head, offsets, score);
                let wq = match &mut layer.wq {
                    QueryProjection::Full(wq) => wq,
                    QueryProjection::LowRank(q) => &mut q.wq_b,
                };
                let heads = width(wq) / head;
                set(wq, heads, head - dim, &q, dim);
                let rank = width(&layer.wkv_a) - dim;
                set(&mut layer.wkv_a, 1, rank, &[k], dim);
            }
        }
    }
}

fn width<B: Backend>(linear: &Linear<B>) -> usize {
    linear.weight.lazy_shape()[1]
}

/// Biases of the rotated parts: of each head's query, and of the key. Scores are divided by the root of
/// `head_width`.
fn biases(
    rope: &RotaryConfig,
    dim: usize,
    head_width: usize,
    offsets: &[f64],
    score: f64,
) -> (Vec<Vec<f64>>, Vec<f64>) {
    let frequencies = rope.frequencies(dim);
    let size = (score * (head_width as f64).sqrt() / frequencies.len() as f64).sqrt();
    let turned = |offset: f64| {
        let mut bias = vec![0.0; dim];
        for (pair, frequency) in frequencies.iter().enumerate() {
            let (a, b) = match rope.layout {
                RotaryLayout::Interleaved => (2 * pair, 2 * pair + 1),
                RotaryLayout::HalfSplit => (pair, pair + dim / 2),
            };
            bias[a] = size * (frequency * offset).cos();
            bias[b] = -size * (frequency * offset).sin();
        }
        bias
    };
    (
        offsets.iter().map(|offset| turned(*offset)).collect(),
        turned(0.0),
    )
}

/// Puts `values` into the biases of the first heads, from `start` on in each.
fn set<B: Backend>(
    linear: &mut Linear<B>,
    heads: usize,
    start: usize,
    values: &[Vec<f64>],
    dim: usize,
) {
    assert!(
        values.len() <= heads,
        "{} offsets for {heads} heads",
        values.len()
    );
    let bias = linear
        .bias
        .take()
        .expect("heads that look back need an attention with biases");
    let bias = bias.val();
    let head = bias.dims()[0] / heads;
    let (device, dtype) = (bias.device(), bias.dtype());
    let mut bias = bias.reshape([heads, head]);
    for (h, values) in values.iter().enumerate() {
        let data = TensorData::new(values.clone(), [1, dim]).convert_dtype(dtype);
        let values = Tensor::from_data(data, (&device, dtype));
        bias = bias.slice_assign([h..h + 1, start..start + dim], values);
    }
    // A leaf of its own: how it was put together is no part of a graph.
    linear.bias = Some(Param::from_tensor(bias.reshape([heads * head]).detach()));
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::tensor::Tensor;
    use burn_flex::{Flex, FlexDevice};

    use super::*;
    use crate::attention::{AttentionConfig, AttentionInput, LatentConfig};

    /// Which key each query of each head attends to most, where all tokens are alike.
    fn preferred(config: AttentionConfig, offsets: &[f64]) -> Vec<Vec<usize>> {
        let mut attention = config.with_bias(true).init::<Flex>(&FlexDevice).unwrap();
        attention.look_back(offsets, 50.0);
        let x = Tensor::<Flex, 3>::zeros([1, 20, 32], &FlexDevice);
        let weights = attention.forward(AttentionInput::new(x).with_weights());
        let weights = weights.weights.expect("they were asked for");
        let best: Vec<i64> = weights.argmax(3).into_data().iter::<i64>().collect();
        best.chunks(20)
            .map(|head| head.iter().map(|j| *j as usize).collect())
            .collect()
    }

    fn wide(config: LatentConfig) -> LatentConfig {
        LatentConfig {
            qk_rope_head_dim: 16,
            ..config
        }
    }

    #[test]
    fn heads_attend_to_the_token_so_far_back() {
        for layout in [RotaryLayout::Interleaved, RotaryLayout::HalfSplit] {
            let rope = RotaryConfig {
                theta: 20.0,
                layout,
                ..RotaryConfig::default()
            };
            for config in [
                AttentionConfig::mha(32, 2),
                AttentionConfig::mqa(32, 2),
                AttentionConfig::Mla(wide(LatentConfig::new(32, 2))),
                AttentionConfig::Mla(LatentConfig {
                    q_lora_rank: 8,
                    ..wide(LatentConfig::new(32, 2))
                }),
            ] {
                let found = preferred(config.clone().with_rope(rope), &[1.0, 4.0]);
                for (i, best) in found[0].iter().zip(&found[1]).enumerate().skip(4) {
                    assert_eq!(best, (&(i - 1), &(i - 4)), "{config:?}");
                }
            }
        }
    }

    #[test]
    fn where_tokens_share_slots_the_nearest_slot_is_meant() {
        let config = AttentionConfig::Mtla {
            down_rate: 2,
            latent: wide(LatentConfig::new(32, 2)),
        };
        let rope = RotaryConfig {
            theta: 20.0,
            ..RotaryConfig::default()
        };
        let found = preferred(config.with_rope(rope), &[1.5, 3.5]);
        for (i, best) in found[0].iter().zip(&found[1]).enumerate().skip(4) {
            // Chunks end at odd tokens.
            let back = |near: usize| {
                if (i - near) % 2 == 1 {
                    i - near
                } else {
                    i - near - 1
                }
            };
            assert_eq!(best, (&back(1), &back(3)));
        }
    }
}
