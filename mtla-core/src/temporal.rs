//! Temporal compression: the gate and the running merge of MTLA.
//!
//! Token `j` of a row belongs to chunk `t = j div s`. Its latent `c_j` enters the chunk's slot with one
//! scalar weight, computed by a small hyper-network from the latent and from the chunk's number:
//!
//! ```text
//! w_j = sigmoid( fc_c(PE(t)) · fc_p(c_j) )            S_i = Σ_{j ≤ i, j in the chunk of i} w_j c_j
//! ```
//!
//! (Deng & Woodland 2025, §4.2). The weight depends on `j` alone, so `S` is a cumulative sum inside chunks
//! and nothing of size T×T is ever built. For decoding the gate folds further, into one dot product with a
//! row of a table over chunk numbers: `w_j = sigmoid(g_t · c_j + β_t)` with `g_t = W_pᵀ fc_c(PE(t))` and
//! `β_t = b_p · fc_c(PE(t))`.

use burn::{
    module::Module,
    nn::{Linear, LinearConfig},
    tensor::{DType, Tensor, TensorData, activation::sigmoid, backend::Backend},
};

use crate::{
    linear::{multiply, project},
    ops::AttentionBackend,
};

/// The hyper-network that gates latents (`fc_c`, `fc_p`: linear maps to `rank / 4` with bias).
#[derive(Module, Debug)]
pub struct TemporalGate<B: Backend> {
    /// Applied to the sinusoidal encoding of the chunk number.
    pub fc_c: Linear<B>,
    /// Applied to the normalised latent.
    pub fc_p: Linear<B>,
}

impl<B: Backend> TemporalGate<B> {
    /// A gate for latents of width `rank`.
    pub fn new(rank: usize, device: &B::Device) -> Self {
        let linear = || LinearConfig::new(rank, rank / 4).init(device);
        Self {
            fc_c: linear(),
            fc_p: linear(),
        }
    }

    /// Gated latents: `latents [rows, chunks, s, rank]`, where row entry `k` is chunk number `k`, each
    /// multiplied by its weight.
    pub fn forward(&self, latents: Tensor<B, 4>) -> Tensor<B, 4> {
        let [rows, chunks, s, rank] = latents.dims();
        let (width, numbers) = (rank / 4, (0..chunks).collect::<Vec<_>>());
        let code = chunk_encoding(&numbers, rank, latents.dtype(), &latents.device());
        // Every token gets its chunk's code; then the product is over plain rows.
        let code = self.fc_c.forward(code).reshape([chunks, 1, width]);
        let code = code.repeat_dim(1, s).reshape([1, chunks * s * width]);
        let tokens = self.fc_p.forward(latents.clone());
        let logit = (tokens.reshape([rows, chunks * s * width]) * code)
            .reshape([rows, chunks, s, width])
            .sum_dim(3);
        latents * sigmoid(logit)
    }
}

impl<B: AttentionBackend> TemporalGate<B> {
    /// The folded gate of chunks `0..chunks`: `[chunks, rank + 1]`, `g_t` then `β_t`.
    pub fn table(&self, chunks: usize) -> Tensor<B, 2> {
        let weight = self.fc_p.weight.val();
        let [rank, width] = weight.dims();
        let numbers: Vec<usize> = (0..chunks).collect();
        let code = chunk_encoding(&numbers, rank, weight.dtype(), &weight.device());
        let code = project(&self.fc_c, code);
        let bias = match &self.fc_p.bias {
            Some(bias) => (code.clone() * bias.val().reshape([1, width])).sum_dim(1),
            None => code.clone().sum_dim(1).zeros_like(),
        };
        Tensor::cat(vec![multiply(code, weight.transpose()), bias], 1)
    }
}

/// The gates `[n, 1]` of tokens at any place: `latents [n, rank]`, each with its row of the
/// [table](TemporalGate::table), `gates [n, rank + 1]`.
pub fn folded_gates<B: Backend>(latents: Tensor<B, 2>, gates: Tensor<B, 2>) -> Tensor<B, 2> {
    let rank = latents.dims()[1];
    let bias = gates.clone().narrow(1, rank, 1);
    sigmoid((gates.narrow(1, 0, rank) * latents).sum_dim(1) + bias)
}

/// Gated latents of tokens at any place: `latents [n, rank]`, each times its [gate](folded_gates).
pub fn apply_folded_gate<B: Backend>(latents: Tensor<B, 2>, gates: Tensor<B, 2>) -> Tensor<B, 2> {
    latents.clone() * folded_gates(latents, gates)
}

/// Running merge inside chunks: `[rows, chunks, s, rank]`, the cumulative sum over the third axis.
pub fn running_merge<B: Backend>(gated: Tensor<B, 4>) -> Tensor<B, 4> {
    if gated.dims()[2] == 1 {
        return gated;
    }
    gated.cumsum(2)
}

/// Sinusoidal encoding of chunk numbers, `[numbers, rank]`: sines on even, cosines on odd columns, base
/// 10000.
fn chunk_encoding<B: Backend>(
    numbers: &[usize],
    rank: usize,
    dtype: DType,
    device: &B::Device,
) -> Tensor<B, 2> {
    let values: Vec<f64> = numbers
        .iter()
        .flat_map(|number| {
            (0..rank).map(move |column| {
                let pair = (column / 2 * 2) as f64;
                let angle = *number as f64 * 10_000f64.powf(-pair / rank as f64);
                if column % 2 == 0 {
                    angle.sin()
                } else {
                    angle.cos()
                }
            })
        })
        .collect();
    let data = TensorData::new(values, [numbers.len(), rank]).convert_dtype(dtype);
    Tensor::from_data(data, (device, dtype))
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use burn::tensor::{Distribution, Tolerance};
    use burn_flex::Flex;

    #[test]
    fn folded_table_equals_the_hyper_network() {
        let device = Default::default();
        let gate = TemporalGate::<Flex>::new(10, &device);
        let (rows, chunks, s) = (2, 5, 3);
        let x = Tensor::<Flex, 4>::random(
            [rows, chunks, s, 10],
            Distribution::Normal(0.0, 1.0),
            &device,
        );
        let whole = gate.forward(x.clone());
        let table = gate.table(chunks);
        let per_token = table
            .reshape([1, chunks, 1, 11])
            .expand([rows, chunks, s, 11])
            .reshape([rows * chunks * s, 11]);
        let folded = apply_folded_gate(x.reshape([rows * chunks * s, 10]), per_token);
        folded
            .reshape([rows, chunks, s, 10])
            .into_data()
            .assert_approx_eq::<f32>(&whole.into_data(), Tolerance::absolute(1e-5));
    }

    #[test]
    fn merge_starts_anew_in_each_chunk() {
        let device = Default::default();
        let x = Tensor::<Flex, 4>::from_data([[[[1.0], [2.0]], [[3.0], [4.0]]]], &device);
        running_merge(x).into_data().assert_eq(
            &TensorData::from([[[[1.0f32], [3.0]], [[3.0], [7.0]]]]),
            true,
        );
    }
}
