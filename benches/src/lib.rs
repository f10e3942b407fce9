//! What the benchmarks share: layers of the paper's size and random input.

#![warn(missing_docs)]

pub mod peer;

use burn::tensor::{Distribution, Tensor, backend::Backend};
use mtla_core::attention::AttentionConfig;

/// Width of the model.
pub const D_MODEL: usize = 512;
/// Attention heads.
pub const HEADS: usize = 8;

/// The variants, by name.
pub fn variants() -> Vec<(&'static str, AttentionConfig)> {
    vec![
        ("mha", AttentionConfig::mha(D_MODEL, HEADS)),
        ("mqa", AttentionConfig::mqa(D_MODEL, HEADS)),
        ("gqa2", AttentionConfig::gqa(D_MODEL, HEADS, 2)),
        ("mla", AttentionConfig::mla(D_MODEL, HEADS)),
        ("mtla2", AttentionConfig::mtla(D_MODEL, HEADS)),
        (
            "mtla3",
            AttentionConfig::mtla(D_MODEL, HEADS).with_down_rate(3),
        ),
        (
            "mtla4",
            AttentionConfig::mtla(D_MODEL, HEADS).with_down_rate(4),
        ),
    ]
}

/// Normally distributed input.
pub fn input<B: Backend, const D: usize>(shape: [usize; D], device: &B::Device) -> Tensor<B, D> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), device)
}
