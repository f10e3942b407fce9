//! The attention variants: MHA, MQA, GQA, MLA and MTLA behind one configuration and one module.
//!
//! Every variant has three entry points, which agree with each other:
//!
//! * [`forward`](Attention::forward): whole sequences, trainable;
//! * [`prefill`](Attention::prefill): several tokens a row into a [cache](crate::cache), empty or warm
//!   ([`prefill_last`](Attention::prefill_last) computes only each row's last output,
//!   [`prefill_keys`](Attention::prefill_keys) none);
//! * [`step`](Attention::step): one token a row.
//!
//! [`CrossAttention`] is the variant that attends to the compressed states of another sequence.

mod config;
mod cross;
mod expansion;
mod grouped;
mod input;
mod latent;
mod look_back;
mod query;

use burn::{
    module::Module,
    tensor::{Tensor, backend::Backend},
};

use crate::{
    cache::{CacheSpec, LayerPool, PrefillPlan, StepPlan},
    ops::AttentionBackend,
    rope::Rotary,
};

pub use config::{AttentionConfig, ConfigError, DenseConfig, LatentConfig};
pub use cross::{CrossAttention, CrossAttentionConfig, CrossInput};
pub use expansion::LatentExpansion;
pub use grouped::GroupedAttention;
pub use input::{AttentionInput, AttentionOutput, RotaryPair};
pub use latent::LatentAttention;
pub use query::{LowRankQuery, QueryProjection};

/// An attention layer of any variant. Made by [`AttentionConfig::init`].
#[derive(Module, Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "a handful per model, and tensors are handles"
)]
pub enum Attention<B: Backend> {
    /// MHA, MQA and GQA.
    Grouped(GroupedAttention<B>),
    /// MLA and MTLA.
    Latent(LatentAttention<B>),
}

impl<B: Backend> Attention<B> {
    /// The cache that this layer needs.
    pub fn cache_spec(&self) -> CacheSpec {
        match self {
            Self::Grouped(x) => x.cache_spec(),
            Self::Latent(x) => x.cache_spec(),
        }
    }

    /// The rotations of `input`, to be shared by layers of one shape through
    /// [`AttentionInput::with_rotary`].
    pub fn rotary(&self, input: &AttentionInput<B>) -> RotaryPair<B> {
        match self {
            Self::Grouped(x) => x.rotary(input),
            Self::Latent(x) => x.rotary(input),
        }
    }

    /// The rotations of a step, to be shared through [`StepPlan::with_rotary`].
    pub fn step_rotary(&self, plan: &StepPlan<B>, x: &Tensor<B, 2>) -> Rotary<B> {
        self.plan_rotary(&plan.positions, x)
    }

    /// The rotations of a prefill, to be shared through [`PrefillPlan::with_rotary`].
    pub fn prefill_rotary(&self, plan: &PrefillPlan<B>, x: &Tensor<B, 3>) -> Rotary<B> {
        self.plan_rotary(&plan.positions, x)
    }

    fn plan_rotary<const D: usize>(&self, positions: &[Vec<usize>], x: &Tensor<B, D>) -> Rotary<B> {
        let (rope, dim) = match self {
            Self::Grouped(x) => x.rope(),
            Self::Latent(x) => x.rope(),
        };
        rope.rotary(dim, positions, x.dtype(), &x.device())
    }
}

impl<B: AttentionBackend> Attention<B> {
    /// Attention over whole sequences, causal, trainable.
    ///
    /// # Shapes
    /// queries `[batch, queries, d_model]`, keys `[batch, keys, d_model]` → `[batch, queries, d_model]`.
    ///
    /// Computes `y_i = W_o concat_h( Σ_j softmax_j( q_i·k_j · d^-½ ) v_j )` over the visible `j`; for MTLA
    /// keys and values are read from merged latents (Deng & Woodland 2025, Eq. 9 ff.; see
    /// [`temporal`](crate::temporal)).
    ///
    /// # Panics
    /// If the parts of the input do not fit together.
    pub fn forward(&self, input: AttentionInput<B>) -> AttentionOutput<B> {
        match self {
            Self::Grouped(x) => x.forward(input),
            Self::Latent(x) => x.forward(input),
        }
    }

    /// Appends `x [rows, longest, d_model]` to the rows of the plan and returns the outputs of all new
    /// tokens, `[rows, longest, d_model]`; rows shorter than the longest are padded at their end, where outputs carry
    /// no meaning.
    ///
    /// Not for training: the pool carries no gradient, so neither does the result. [`forward`](Self::forward) does.
    ///
    /// # Panics
    /// If `x` or the pool does not fit the plan, or the pool is of another kind of layer.
    pub fn prefill(
        &self,
        x: Tensor<B, 3>,
        plan: &PrefillPlan<B>,
        pool: &mut LayerPool<B>,
    ) -> Tensor<B, 3> {
        pool.begin(self.cache_spec());
        match self {
            Self::Grouped(layer) => layer.prefill(x, plan, pool),
            Self::Latent(layer) => layer.prefill(x, plan, pool),
        }
        .detach()
    }

    /// As [`prefill`](Self::prefill), but only the output of each row's last new token: `[rows, d_model]`. That of a
    /// row without a new token carries no meaning.
    ///
    /// # Panics
    /// As [`prefill`](Self::prefill).
    pub fn prefill_last(
        &self,
        x: Tensor<B, 3>,
        plan: &PrefillPlan<B>,
        pool: &mut LayerPool<B>,
    ) -> Tensor<B, 2> {
        pool.begin(self.cache_spec());
        match self {
            Self::Grouped(layer) => layer.prefill_last(x, plan, pool),
            Self::Latent(layer) => layer.prefill_last(x, plan, pool),
        }
        .detach()
    }

    /// Appends `x [rows, longest, d_model]` as keys only: a source prefix that later tokens attend to.
    ///
    /// # Panics
    /// As [`prefill`](Self::prefill).
    pub fn prefill_keys(&self, x: Tensor<B, 3>, plan: &PrefillPlan<B>, pool: &mut LayerPool<B>) {
        pool.begin(self.cache_spec());
        match self {
            Self::Grouped(layer) => layer.prefill_keys(x, plan, pool),
            Self::Latent(layer) => layer.prefill_keys(x, plan, pool),
        }
    }

    /// Appends one token a row, `x [rows, d_model]`, and returns its output `[rows, d_model]`, without gradient.
    ///
    /// # Panics
    /// As [`prefill`](Self::prefill).
    pub fn step(
        &self,
        x: Tensor<B, 2>,
        plan: &StepPlan<B>,
        pool: &mut LayerPool<B>,
    ) -> Tensor<B, 2> {
        pool.begin(self.cache_spec());
        match self {
            Self::Grouped(layer) => layer.step(x, plan, pool),
            Self::Latent(layer) => layer.step(x, plan, pool),
        }
        .detach()
    }
}

/// The output of attention heads `[batch, heads, tokens, width]` as `[batch, tokens, heads · width]`.
fn join_heads<B: Backend>(x: Tensor<B, 4>) -> Tensor<B, 3> {
    let [batch, heads, tokens, width] = x.dims();
    x.swap_dims(1, 2).reshape([batch, tokens, heads * width])
}
