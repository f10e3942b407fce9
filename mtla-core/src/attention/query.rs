//! The query projection of latent attention.

use burn::{
    module::Module,
    nn::{LayerNorm, LayerNormConfig, Linear, LinearConfig},
    tensor::{Tensor, backend::Backend},
};

use crate::{linear::project, ops::AttentionBackend};

/// One linear map, or a low-rank one (`q_lora_rank > 0`).
#[derive(Module, Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "a handful per model, and tensors are handles"
)]
pub enum QueryProjection<B: Backend> {
    /// `d_model → n_heads · width`.
    Full(Linear<B>),
    /// Through a latent.
    LowRank(LowRankQuery<B>),
}

/// Two linear maps with a norm in between.
#[derive(Module, Debug)]
pub struct LowRankQuery<B: Backend> {
    /// `d_model → q_lora_rank`.
    pub wq_a: Linear<B>,
    /// Norm of the query latent.
    pub q_norm: LayerNorm<B>,
    /// `q_lora_rank → n_heads · width`.
    pub wq_b: Linear<B>,
}

impl<B: Backend> QueryProjection<B> {
    pub(super) fn new([d_model, rank, width]: [usize; 3], bias: bool, device: &B::Device) -> Self {
        let linear = |from, to| LinearConfig::new(from, to).with_bias(bias).init(device);
        if rank == 0 {
            return Self::Full(linear(d_model, width));
        }
        Self::LowRank(LowRankQuery {
            wq_a: linear(d_model, rank),
            q_norm: LayerNormConfig::new(rank).init(device),
            wq_b: linear(rank, width),
        })
    }
}

impl<B: AttentionBackend> QueryProjection<B> {
    pub(super) fn forward<const D: usize>(&self, x: Tensor<B, D>) -> Tensor<B, D> {
        match self {
            Self::Full(wq) => project(wq, x),
            Self::LowRank(q) => project(&q.wq_b, q.q_norm.forward(project(&q.wq_a, x))),
        }
    }
}
