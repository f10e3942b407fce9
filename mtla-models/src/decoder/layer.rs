//! One layer: attention and a feed-forward network, each behind a norm and added to what came in.

use burn::{
    module::Module,
    nn::{Linear, norm::Normalization},
    tensor::{Distribution, Tensor, activation::relu, backend::Backend},
};
use mtla_core::{
    attention::Attention,
    linear::project,
    ops::{Activation, AttentionBackend},
};

use super::FeedForwardKind;

/// A layer of a [`Decoder`](super::Decoder).
#[derive(Module, Debug)]
pub struct DecoderLayer<B: Backend> {
    /// Norm of the attention's input.
    pub attention_norm: Normalization<B>,
    /// The attention.
    pub attention: Attention<B>,
    /// Norm of the feed-forward network's input.
    pub feed_forward_norm: Normalization<B>,
    /// The feed-forward network.
    pub feed_forward: FeedForward<B>,
}

/// A feed-forward network of one hidden layer; see [`FeedForwardKind`].
#[derive(Module, Debug)]
pub struct FeedForward<B: Backend> {
    /// What it computes.
    pub kind: FeedForwardKind,
    /// `d_model → d_ff`, where the kind has a gate.
    pub gate: Option<Linear<B>>,
    /// `d_model → d_ff`.
    pub up: Linear<B>,
    /// `d_ff → d_model`.
    pub down: Linear<B>,
}

impl<B: AttentionBackend> DecoderLayer<B> {
    /// The layer around an attention call: `x [.., d_model]` → `[.., d_model]`, with the given dropout on
    /// what the sublayers add.
    pub(super) fn forward<const D: usize>(
        &self,
        x: Tensor<B, D>,
        dropout: Dropout,
        attend: impl FnOnce(&Attention<B>, Tensor<B, D>) -> Tensor<B, D>,
    ) -> Tensor<B, D> {
        let attended = attend(&self.attention, self.attention_norm.forward(x.clone()));
        self.feed_forward(x + dropout.apply(attended), dropout)
    }

    /// What the layer makes of `x` if its attention has given `attended`.
    #[cfg(feature = "convert")]
    pub(crate) fn after_attention<const D: usize>(
        &self,
        x: Tensor<B, D>,
        attended: Tensor<B, D>,
    ) -> Tensor<B, D> {
        self.feed_forward(x + attended, Dropout::NONE)
    }

    /// The second half of the layer alone.
    pub(super) fn feed_forward<const D: usize>(
        &self,
        x: Tensor<B, D>,
        dropout: Dropout,
    ) -> Tensor<B, D> {
        let y = self
            .feed_forward
            .forward(self.feed_forward_norm.forward(x.clone()));
        x + dropout.apply(y)
    }
}

impl<B: AttentionBackend> FeedForward<B> {
    /// `x [.., d_model]` → `[.., d_model]`.
    ///
    /// # Panics
    /// If the kind has a gate and there is none.
    pub fn forward<const D: usize>(&self, x: Tensor<B, D>) -> Tensor<B, D> {
        let up = project(&self.up, x.clone());
        let inner = match (self.kind, &self.gate) {
            (FeedForwardKind::Relu, _) => relu(up),
            (FeedForwardKind::Gelu, _) => activate(up, Activation::Gelu),
            (FeedForwardKind::SwiGlu, Some(gate)) => {
                activate(project(gate, x), Activation::Silu) * up
            }
            (FeedForwardKind::SwiGlu, None) => panic!("a SwiGLU network has a gate"),
        };
        project(&self.down, inner)
    }
}

fn activate<B: AttentionBackend, const D: usize>(
    x: Tensor<B, D>,
    activation: Activation,
) -> Tensor<B, D> {
    let shape = x.dims();
    let rows = shape[..D - 1].iter().product();
    B::activate(x.reshape([rows, shape[D - 1]]), activation).reshape(shape)
}

/// Dropout on activations, drawn from the backend's random numbers.
///
/// Burn's module of this name drops on autodiff backends and only there; here the caller says so.
#[derive(Debug, Clone, Copy)]
pub(super) struct Dropout(pub(super) f64);

impl Dropout {
    pub(super) const NONE: Self = Self(0.0);

    pub(super) fn apply<B: Backend, const D: usize>(self, x: Tensor<B, D>) -> Tensor<B, D> {
        if self.0 == 0.0 {
            return x;
        }
        let keep = 1.0 - self.0;
        let mask = x.random_like(Distribution::Bernoulli(keep));
        x * mask * (1.0 / keep)
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::module::Param;
    use burn_flex::{Flex, FlexDevice};

    use super::*;

    #[test]
    fn feed_forward_of_width_one() {
        let device = FlexDevice;
        let linear = |weight: f32| Linear::<Flex> {
            weight: Param::from_data([[weight]], &device),
            bias: None,
        };
        let forward = |kind, gate: Option<f32>| {
            let network = FeedForward {
                kind,
                gate: gate.map(linear),
                up: linear(2.0),
                down: linear(3.0),
            };
            network
                .forward(Tensor::<Flex, 1>::ones([1], &device))
                .into_scalar()
        };
        // gelu(2) = 2 Φ(2) and silu(-1) = -1 / (1 + e).
        let gelu = forward(FeedForwardKind::Gelu, None);
        assert!((gelu - 3.0 * 2.0 * 0.977_249_9).abs() < 1e-5);
        let relu = forward(FeedForwardKind::Relu, None);
        assert!((relu - 3.0 * 2.0).abs() < 1e-6);
        let swi_glu = forward(FeedForwardKind::SwiGlu, Some(-1.0));
        assert!((swi_glu + 3.0 * 2.0 * 0.268_941_4).abs() < 1e-5);
    }

    #[test]
    fn dropout_drops_the_asked_share_and_keeps_the_mean() {
        let device = FlexDevice;
        let x = Tensor::<Flex, 2>::full([100, 100], 3.0, &device);
        let values: Vec<f32> = Dropout(0.25).apply(x).into_data().iter().collect();
        let kept = values.iter().filter(|x| **x != 0.0).count();
        assert!((7_000..8_000).contains(&kept), "{kept} of 10000 kept");
        assert!(values.iter().all(|x| *x == 0.0 || (x - 4.0).abs() < 1e-5));
    }
}
