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

use crate::ops::{
    AttendOperands, AttendProblem, AttentionBackend, HeadMatrices, KeyValue, Keys, plain,
};

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
    /// `q W_UK` with the rope part as it is: `[rows, heads, key + rope]` → `[rows, heads, rank + rope]`.
    pub(super) fn absorb_query(&self, q: Tensor<B, 3>) -> Tensor<B, 3> {
        let matrices = HeadMatrices {
            weight: self.weight.val(),
            heads: self.heads,
            columns: 0..self.key,
            transposed: true,
        };
        B::multiply_heads(q, matrices)
    }

    /// `context W_UV`: `[rows, heads, rank]` → `[rows, heads, value]`.
    pub(super) fn expand_context(&self, context: Tensor<B, 3>) -> Tensor<B, 3> {
        let matrices = HeadMatrices {
            weight: self.weight.val(),
            heads: self.heads,
            columns: self.key..self.key + self.value,
            transposed: false,
        };
        B::multiply_heads(context, matrices)
    }

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
        let q = if absorbed {
            every_token(q, |q| self.absorb_query(q))
        } else {
            q
        };
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
            every_token(context.swap_dims(1, 2), |x| self.expand_context(x)).swap_dims(1, 2)
        } else {
            context
        };
        (heads, weights)
    }
}

/// Applies `f` to the heads of all tokens `[batch, tokens, heads, width]` as rows.
fn every_token<B: Backend>(
    x: Tensor<B, 4>,
    f: impl FnOnce(Tensor<B, 3>) -> Tensor<B, 3>,
) -> Tensor<B, 4> {
    let [batch, tokens, heads, width] = x.dims();
    let y = f(x.reshape([batch * tokens, heads, width]));
    let width = y.dims()[2];
    y.reshape([batch, tokens, heads, width])
}
