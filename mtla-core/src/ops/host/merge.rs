//! The gate and the running merge of temporal attention in one pass, and their backward pass:
//!
//! ```text
//! w_j = σ(g_t · c_j + β_t)      S_i = Σ_{j ≤ i in chunk t} w_j c_j
//!
//! G_j = Σ_{i ≥ j in chunk t} dS_i      a_j = w_j (1 − w_j) G_j · c_j
//! dc_j = w_j G_j + a_j g_t             dg_t = Σ_j a_j c_j             dβ_t = Σ_j a_j
//! ```

use burn::tensor::{Bytes, DType, Tensor};
use burn_flex::{Flex, FlexTensor, Layout};

use super::{
    super::plain::to_dtype,
    primitive,
    real::{Real, add_scaled, dot, vectorised},
    tensor,
    threads::for_each_mut,
};

/// [`gate_and_merge`](crate::ops::AttentionBackend::gate_and_merge).
///
/// # Panics
/// If there are fewer gates than chunks, or they have another rank.
pub(in crate::ops) fn gate_and_merge(
    latents: Tensor<Flex, 3>,
    gates: Tensor<Flex, 2>,
    stride: usize,
) -> Tensor<Flex, 3> {
    let shape = check(&latents, &gates, stride);
    let dtype = latents.dtype();
    let (latents, gates) = (rows(latents), rows(gates));
    let states = match latents.dtype() {
        DType::F64 => forward::<f64>(&latents, &gates, shape, stride),
        _ => forward::<f32>(&latents, &gates, shape, stride),
    };
    to_dtype(tensor(states), dtype)
}

/// The gradients of latents and gates.
///
/// # Panics
/// If there are fewer gates than chunks, or they have another rank.
pub(in crate::ops) fn gate_and_merge_backward(
    latents: Tensor<Flex, 3>,
    gates: Tensor<Flex, 2>,
    stride: usize,
    grad: Tensor<Flex, 3>,
) -> (Tensor<Flex, 3>, Tensor<Flex, 2>) {
    let shape = check(&latents, &gates, stride);
    let dtype = latents.dtype();
    let (latents, gates, grad) = (rows(latents), rows(gates), rows(grad));
    let (latents, gates) = match latents.dtype() {
        DType::F64 => backward::<f64>([&latents, &gates, &grad], shape, stride),
        _ => backward::<f32>([&latents, &gates, &grad], shape, stride),
    };
    (
        to_dtype(tensor(latents), dtype),
        to_dtype(tensor(gates), dtype),
    )
}

fn check(latents: &Tensor<Flex, 3>, gates: &Tensor<Flex, 2>, stride: usize) -> [usize; 3] {
    let [batch, tokens, rank] = latents.dims();
    let [chunks, width] = gates.dims();
    assert!(
        width == rank + 1 && chunks * stride >= tokens,
        "gates [{chunks}, {width}] do not fit {tokens} latents of rank {rank} in chunks of {stride}"
    );
    [batch, tokens, rank]
}

fn rows<const D: usize>(x: Tensor<Flex, D>) -> FlexTensor {
    primitive(x).to_contiguous()
}

fn new<R: Real>(values: Vec<R>, shape: &[usize]) -> FlexTensor {
    let layout = Layout::contiguous(shape.to_vec().into());
    FlexTensor::new(Bytes::from_elems(values), layout, R::dtype())
}

#[inline(always)]
#[expect(
    clippy::inline_always,
    reason = "it has to be part of a vectorised caller"
)]
pub(super) fn sigmoid<R: Real>(x: R) -> R {
    let one = R::of(1.0);
    if x > R::default() {
        one / (one + (R::default() - x).exp())
    } else {
        let e = x.exp();
        e / (one + e)
    }
}

fn forward<R: Real>(
    latents: &FlexTensor,
    gates: &FlexTensor,
    [batch, tokens, rank]: [usize; 3],
    stride: usize,
) -> FlexTensor {
    let (latents, gates) = (latents.storage::<R>(), gates.storage::<R>());
    let mut states = vec![R::default(); batch * tokens * rank];
    let mut chunks: Vec<_> = states
        .chunks_mut(tokens * rank)
        .zip(latents.chunks(tokens * rank))
        .flat_map(|(states, latents)| {
            let chunks = states.chunks_mut(stride * rank);
            chunks.zip(latents.chunks(stride * rank)).enumerate()
        })
        .collect();
    for_each_mut(
        &mut chunks,
        batch * tokens * rank,
        |(t, (states, latents))| {
            let (g, beta) = gates[*t * (rank + 1)..][..=rank].split_at(rank);
            vectorised(|| {
                let mut before: Option<&[R]> = None;
                let tokens = states
                    .chunks_exact_mut(rank)
                    .zip(latents.chunks_exact(rank));
                for (state, latent) in tokens {
                    let weight = sigmoid(dot(g, latent) + beta[0]);
                    if let Some(before) = before {
                        state.copy_from_slice(before);
                    }
                    add_scaled(state, weight, latent);
                    before = Some(state);
                }
            });
        },
    );
    new(states, &[batch, tokens, rank])
}

fn backward<R: Real>(
    [latents, gates, grad]: [&FlexTensor; 3],
    [batch, tokens, rank]: [usize; 3],
    stride: usize,
) -> (FlexTensor, FlexTensor) {
    let table = gates.layout().shape()[0];
    let (latents, gates) = (latents.storage::<R>(), gates.storage::<R>());
    let grad = grad.storage::<R>();
    let mut grad_latents = vec![R::default(); batch * tokens * rank];
    let mut grad_gates = vec![R::default(); table * (rank + 1)];
    // All rows of the batch share a chunk's gate: a task is a chunk of all of them.
    let mut pieces: Vec<Vec<&mut [R]>> = (0..tokens.div_ceil(stride)).map(|_| Vec::new()).collect();
    for row in grad_latents.chunks_mut(tokens * rank) {
        for (piece, chunk) in pieces.iter_mut().zip(row.chunks_mut(stride * rank)) {
            piece.push(chunk);
        }
    }
    let mut tasks: Vec<_> = pieces
        .into_iter()
        .zip(grad_gates.chunks_exact_mut(rank + 1))
        .enumerate()
        .collect();
    for_each_mut(
        &mut tasks,
        batch * tokens * rank,
        |(t, (pieces, grad_gate))| {
            let (g, beta) = gates[*t * (rank + 1)..][..=rank].split_at(rank);
            let (grad_g, grad_beta) = grad_gate.split_at_mut(rank);
            vectorised(|| {
                for (row, piece) in pieces.iter_mut().enumerate() {
                    let start = (row * tokens + *t * stride) * rank;
                    piece.copy_from_slice(&grad[start..][..piece.len()]);
                    // What a state gets goes to all latents before it in the chunk.
                    for i in (1..piece.len() / rank).rev() {
                        let (before, later) = piece.split_at_mut(i * rank);
                        add_scaled(&mut before[(i - 1) * rank..], R::of(1.0), &later[..rank]);
                    }
                    let latents = latents[start..][..piece.len()].chunks_exact(rank);
                    for (target, latent) in piece.chunks_exact_mut(rank).zip(latents) {
                        let weight = sigmoid(dot(g, latent) + beta[0]);
                        let slope = weight * (R::of(1.0) - weight) * dot(target, latent);
                        for (x, g) in target.iter_mut().zip(g) {
                            *x = weight * *x + slope * *g;
                        }
                        add_scaled(grad_g, slope, latent);
                        grad_beta[0] += slope;
                    }
                }
            });
        },
    );
    (
        new(grad_latents, &[batch, tokens, rank]),
        new(grad_gates, &[table, rank + 1]),
    )
}
