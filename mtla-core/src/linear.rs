//! Linear maps of tokens.

use burn::{nn::Linear, tensor::Tensor};

use crate::ops::AttentionBackend;

/// `x [.., inputs] · weight [inputs, outputs]`, which is `[.., outputs]`.
///
/// Burn's own product of a batch is one of each row, and adds up as many gradients of the weight; here it is one
/// [`product`](AttentionBackend::product) of all rows.
///
/// # Panics
/// If `x` has another width.
pub fn multiply<B: AttentionBackend, const D: usize>(
    x: Tensor<B, D>,
    weight: Tensor<B, 2>,
) -> Tensor<B, D> {
    let mut shape = x.dims();
    let rows = shape[..D - 1].iter().product();
    let [inputs, outputs] = weight.dims();
    assert!(
        shape[D - 1] == inputs,
        "an input of shape {shape:?} for a linear map from width {inputs} to {outputs}"
    );
    shape[D - 1] = outputs;
    B::product(x.reshape([rows, inputs]), weight).reshape(shape)
}

/// `linear` of the last axis of `x [.., inputs]`, which is `[.., outputs]`; see [`multiply`].
///
/// # Panics
/// If `x` has another width.
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::{nn::LinearConfig, tensor::Tensor};
/// use burn_flex::Flex;
/// use mtla_core::linear::project;
///
/// let device = Default::default();
/// let linear = LinearConfig::new(4, 6).init::<Flex>(&device);
/// let y = project(&linear, Tensor::ones([2, 3, 4], &device));
/// assert_eq!(y.dims(), [2, 3, 6]);
/// # }
/// ```
pub fn project<B: AttentionBackend, const D: usize>(
    linear: &Linear<B>,
    x: Tensor<B, D>,
) -> Tensor<B, D> {
    let y = multiply(x, linear.weight.val());
    match &linear.bias {
        Some(bias) => y + bias.val().unsqueeze(),
        None => y,
    }
}
