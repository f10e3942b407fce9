//! Activation functions in vectorised passes: Flex's own call the C library's `erf` and `exp` for each number.

use burn::tensor::{Bytes, DType, Tensor, activation::sigmoid, ops::ActivationOps};
use burn_flex::{Flex, FlexTensor, Layout};

use super::{
    super::Activation,
    primitive,
    real::{Real, vectorised},
    tensor,
    threads::for_each_mut,
};

/// [`activate`](crate::ops::AttentionBackend::activate).
pub(in crate::ops) fn activate(x: Tensor<Flex, 2>, activation: Activation) -> Tensor<Flex, 2> {
    if x.dtype() != DType::F32 {
        return activation.plain(x);
    }
    match activation {
        Activation::Gelu => map([x], |[x]| x * Normal::at(x).below),
        Activation::Silu => map([x], |[x]| x * logistic(x)),
    }
}

/// The gradient of its input, from that and the gradient of its result.
pub(in crate::ops) fn activate_backward(
    x: Tensor<Flex, 2>,
    activation: Activation,
    grad: Tensor<Flex, 2>,
) -> Tensor<Flex, 2> {
    match (activation, x.dtype()) {
        (Activation::Gelu, DType::F32) => map([x, grad], |[x, grad]| {
            let normal = Normal::at(x);
            grad * (normal.below + x * normal.density)
        }),
        (Activation::Silu, DType::F32) => map([x, grad], |[x, grad]| {
            let s = logistic(x);
            grad * s * (1.0 + x * (1.0 - s))
        }),
        (Activation::Gelu, _) => {
            let [x, grad] = [x, grad].map(|x| x.into_primitive().tensor());
            tensor(Flex::gelu_backward(x, grad))
        }
        (Activation::Silu, _) => {
            let s = sigmoid(x.clone());
            grad * s.clone() * (1.0 + x * (1.0 - s))
        }
    }
}

/// The standard normal distribution.
struct Normal {
    /// `Φ(x)`, to 1e-7.
    below: f32,
    /// `Φ'(x)`.
    density: f32,
}

impl Normal {
    /// Abramowitz & Stegun 7.1.26 for `x ≥ 0`, and `Φ(−x) = 1 − Φ(x)`.
    #[inline(always)]
    fn at(x: f32) -> Self {
        const ROOT_HALF: f32 = std::f32::consts::FRAC_1_SQRT_2;
        const DENSITY_AT_0: f32 = 0.398_942_3;
        let exp = Real::exp(-0.5 * x * x);
        let t = 1.0 / (1.0 + 0.327_591_1 * ROOT_HALF * x.abs());
        let p = 1.061_405_4f32;
        let p = p * t - 1.453_152;
        let p = p * t + 1.421_413_7;
        let p = p * t - 0.284_496_74;
        let p = p * t + 0.254_829_6;
        let beyond = 0.5 * p * t * exp;
        Self {
            below: if x < 0.0 { beyond } else { 1.0 - beyond },
            density: DENSITY_AT_0 * exp,
        }
    }
}

#[inline(always)]
#[expect(
    clippy::inline_always,
    reason = "it has to be part of a vectorised caller"
)]
fn logistic(x: f32) -> f32 {
    // Where e^−x would overflow the result is 0 to 32 bits as well.
    let x = if x < -87.0 { -87.0 } else { x };
    1.0 / (1.0 + Real::exp(-x))
}

/// `f` of the entries of tensors of one shape.
fn map<const N: usize>(
    tensors: [Tensor<Flex, 2>; N],
    f: impl Fn([f32; N]) -> f32 + Sync + Send,
) -> Tensor<Flex, 2> {
    const PIECE: usize = 4096;
    // A function of this kind costs about as much as this many additions.
    const COST: usize = 8;
    let shape = tensors[0].dims();
    let tensors = tensors.map(|x| {
        assert_eq!(x.dims(), shape, "tensors of one shape");
        primitive(x).to_contiguous()
    });
    let inputs = tensors.each_ref().map(FlexTensor::storage::<f32>);
    let mut out = vec![0.0; shape[0] * shape[1]];
    let mut pieces: Vec<(usize, &mut [f32])> = out.chunks_mut(PIECE).enumerate().collect();
    let elements = COST * shape[0] * shape[1];
    for_each_mut(&mut pieces, elements, |(number, out)| {
        let inputs = inputs.map(|x| &x[*number * PIECE..][..out.len()]);
        vectorised(|| {
            for (i, out) in out.iter_mut().enumerate() {
                *out = f(inputs.map(|x| x[i]));
            }
        });
    });
    let layout = Layout::contiguous(shape.into());
    tensor(FlexTensor::new(Bytes::from_elems(out), layout, DType::F32))
}
