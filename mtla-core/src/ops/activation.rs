//! Activation functions.

use burn::tensor::{
    Tensor,
    activation::{gelu, silu},
    backend::Backend,
};

/// An activation function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x Φ(x)`, with the normal distribution's `Φ` (Hendrycks & Gimpel 2016).
    Gelu,
    /// `x σ(x)` (Elfwing et al. 2018), which is also called Swish.
    Silu,
}

impl Activation {
    /// The function in tensor operations.
    pub(super) fn plain<B: Backend, const D: usize>(self, x: Tensor<B, D>) -> Tensor<B, D> {
        match self {
            Self::Gelu => gelu(x),
            Self::Silu => silu(x),
        }
    }
}
