//! From latents to keys and values of every head, in two equal forms.
//!
//! The *expanded* form turns latents into keys and values, as dense attention does. The *absorbed* form
//! moves `W_UK` to the query and `W_UV` behind the sum, and attends to the latents themselves as if they
//! were one wide key/value head; it wins where there are few queries, above all for one.

use burn::{
    module::{Module, Param},
    nn::LinearConfig,
    tensor::{Tensor, backend::Backend},
};

use crate::ops::{AttendOperands, AttendProblem, AttentionBackend, KeyValue, Keys, plain};

/// The expansion of latents: per head `W_UK` (keys) and `W_UV` (values).
#[derive(Module, Debug)]
pub struct LatentExpansion<B: Backend> {
    /// `[rank, heads · (key + value)]`; per head its key columns, then its value columns.
    pub weight: Param<Tensor<B, 2>>,
    heads: usize,
    key: usize,
    value: usize,
}

/// Latents, with the rope keys that belong to them: `[batch, n, rank]` and `[batch, n, rope]`.
#[derive(Debug, Clone)]
pub(super) struct Latents<B: Backend> {
    pub(super) state: Tensor<B, 3>,
    pub(super) rope: Option<Tensor<B, 3>>,
}

impl<B: Backend> Latents<B> {
    pub(super) fn map(&self, f: impl Fn(Tensor<B, 3>) -> Tensor<B, 3>) -> Self {
        Self {
            state: f(self.state.clone()),
            rope: self.rope.clone().map(f),
        }
    }
}

/// The latents that queries attend to; see [`Keys`].
pub(super) enum LatentKeys<B: Backend> {
    /// Of all tokens.
    Tokens(Latents<B>),
    /// Of columns, and of each query's own chunk.
    Columns(Latents<B>, Option<Latents<B>>),
}

impl<B: Backend> LatentExpansion<B> {
    pub(super) fn new([rank, heads, key, value]: [usize; 4], device: &B::Device) -> Self {
        let linear = LinearConfig::new(rank, heads * (key + value)).init(device);
        Self {
            weight: linear.weight,
            heads,
            key,
            value,
        }
    }

    fn rank(&self) -> usize {
        self.weight.dims()[0]
    }

    /// `W_UK [heads, key, rank]`.
    fn keys(&self) -> Tensor<B, 3> {
        self.per_head().narrow(2, 0, self.key).permute([1, 2, 0])
    }

    /// `W_UV [heads, rank, value]`.
    fn values(&self) -> Tensor<B, 3> {
        self.per_head()
            .narrow(2, self.key, self.value)
            .swap_dims(0, 1)
    }

    fn per_head(&self) -> Tensor<B, 3> {
        self.weight
            .val()
            .reshape([self.rank(), self.heads, self.key + self.value])
    }

    /// The latents as one key/value head.
    fn absorb(latents: Latents<B>) -> KeyValue<B> {
        let state = latents.state.unsqueeze_dim::<4>(1);
        KeyValue {
            k: state.clone(),
            shared: latents.rope.map(|rope| rope.unsqueeze_dim(1)),
            v: state,
        }
    }

    /// `q W_UK` with the rope part as it is: `[batch, tokens, heads, key + rope]` →
    /// `[batch, tokens, heads, rank + rope]`.
    pub(super) fn absorb_query(&self, q: Tensor<B, 4>) -> Tensor<B, 4> {
        let [batch, tokens, heads, width] = q.dims();
        let latent = q
            .clone()
            .narrow(3, 0, self.key)
            .permute([2, 0, 1, 3])
            .reshape([heads, batch * tokens, self.key])
            .matmul(self.keys())
            .reshape([heads, batch, tokens, self.rank()])
            .permute([1, 2, 0, 3]);
        if width == self.key {
            return latent;
        }
        Tensor::cat(vec![latent, q.narrow(3, self.key, width - self.key)], 3)
    }

    /// `context W_UV`: `[batch, heads, tokens, rank]` → `[batch, heads, tokens, value]`.
    pub(super) fn expand_context(&self, context: Tensor<B, 4>) -> Tensor<B, 4> {
        let [batch, heads, tokens, rank] = context.dims();
        context
            .swap_dims(0, 1)
            .reshape([heads, batch * tokens, rank])
            .matmul(self.values())
            .reshape([heads, batch, tokens, self.value])
            .swap_dims(0, 1)
    }

    /// Which form needs fewer multiplications a row, of which `latents` are to be expanded.
    fn absorbed_is_cheaper(&self, problem: &AttendProblem, latents: usize, rope: usize) -> bool {
        let (queries, columns) = (problem.queries, problem.columns);
        let widen = self.rank() * (self.key + self.value);
        // The expansion serves all heads at once, as does everything else here: a common factor.
        let expanded = latents * widen + queries * columns * (self.key + rope + self.value);
        let absorbed = queries * widen + queries * columns * (2 * self.rank() + rope);
        absorbed < expanded
    }
}

impl<B: AttentionBackend> LatentExpansion<B> {
    /// Keys and values of every head.
    fn expand(&self, latents: Latents<B>) -> KeyValue<B> {
        let [batch, n, rank] = latents.state.dims();
        let state = latents.state.reshape([batch * n, rank]);
        // Two products, so that keys and values lie for themselves and none is cut out of the other.
        let part = |start, width| {
            let weight = self.per_head().narrow(2, start, width);
            let weight = weight.reshape([rank, self.heads * width]);
            B::product(state.clone(), weight)
                .reshape([batch, n, self.heads, width])
                .swap_dims(1, 2)
        };
        KeyValue {
            k: part(0, self.key),
            shared: latents.rope.map(|rope| rope.unsqueeze_dim(1)),
            v: part(self.key, self.value),
        }
    }

    /// Attention from `q [batch, tokens, heads, key + rope]` in the cheaper of the two forms: heads' outputs
    /// `[batch, heads, queries, value]`, and the weights if they are wanted.
    ///
    /// Key/value heads and widths of the problem are set here, since they follow from the form.
    pub(super) fn attend(
        &self,
        q: Tensor<B, 4>,
        keys: LatentKeys<B>,
        mut problem: AttendProblem,
        bias: Option<plain::Bias<B>>,
        want_weights: bool,
    ) -> (Tensor<B, 4>, Option<Tensor<B, 4>>) {
        let rope = q.dims()[3] - self.key;
        let length = |latents: &Latents<B>| latents.state.dims()[1];
        let latents = match &keys {
            LatentKeys::Tokens(tokens) => length(tokens),
            LatentKeys::Columns(columns, own) => length(columns) + own.as_ref().map_or(0, length),
        };
        let absorbed = self.absorbed_is_cheaper(&problem, latents, rope);
        let key_value = |latents| {
            if absorbed {
                Self::absorb(latents)
            } else {
                self.expand(latents)
            }
        };
        let q = if absorbed { self.absorb_query(q) } else { q };
        let operands = AttendOperands {
            q: q.swap_dims(1, 2),
            keys: match keys {
                LatentKeys::Tokens(tokens) => Keys::Tokens(key_value(tokens)),
                LatentKeys::Columns(columns, own) => Keys::Columns {
                    columns: Some(key_value(columns)),
                    own: own.map(key_value),
                },
            },
        };
        (problem.kv_heads, problem.key_width, problem.value_width) = if absorbed {
            (1, self.rank() + rope, self.rank())
        } else {
            (self.heads, self.key + rope, self.value)
        };
        let (context, weights) = if bias.is_some() || want_weights {
            let (context, weights) = plain::attend_with(operands, &problem, bias);
            (context, want_weights.then_some(weights))
        } else {
            (B::attend(operands, &problem), None)
        };
        let heads = if absorbed {
            self.expand_context(context)
        } else {
            context
        };
        (heads, weights)
    }
}
