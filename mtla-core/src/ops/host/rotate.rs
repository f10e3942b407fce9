//! Rotary embedding in one pass, in place where nobody else holds the tensor.

use burn::tensor::{DType, Tensor, TensorPrimitive};
use burn_flex::{Flex, FlexTensor};

use super::{
    super::plain,
    real::{Real, vectorised},
    threads::for_each_mut,
};
use crate::rope::{Rotary, RotaryLayout};

/// [`rotate`](crate::ops::AttentionBackend::rotate).
///
/// # Panics
/// If the table does not fit `x`.
pub(in crate::ops) fn rotate(
    x: Tensor<Flex, 4>,
    rotary: &Rotary<Flex>,
    first: usize,
) -> Tensor<Flex, 4> {
    let shape = x.dims();
    let [rows, tokens, _, width] = shape;
    let [_, from, length, dim] = rotary.table.dims();
    assert!(
        length == tokens && first + dim == width && (from == 1 || from == rows),
        "rotary table [{from}, {length}, {dim}] does not fit channels {first}.. of x {shape:?}"
    );
    match x.dtype() {
        DType::F32 => in_place::<f32>(x, rotary, shape, first),
        DType::F64 => in_place::<f64>(x, rotary, shape, first),
        _ => plain::rotate(x, rotary, first),
    }
}

fn in_place<R: Real>(
    x: Tensor<Flex, 4>,
    rotary: &Rotary<Flex>,
    [rows, tokens, heads, width]: [usize; 4],
    first: usize,
) -> Tensor<Flex, 4> {
    let [_, from, ..] = rotary.table.dims();
    let table = rotary.table.clone().into_primitive().tensor();
    let table = table.to_contiguous();
    let table = table.storage::<R>();
    let (cos, sin) = table.split_at(table.len() / 2);
    let dim = width - first;
    let mut x = owned(x.into_primitive().tensor());
    // The storage may go on behind the tensor, which may be the first rows of a larger one.
    let memory = &mut x.storage_mut::<R>()[..rows * tokens * heads * width];
    // So many tokens at a time that a piece fits the nearest cache.
    let piece = (4096 / (heads * width)).clamp(1, tokens);
    let mut pieces: Vec<(usize, &mut [R])> = Vec::new();
    for (row, memory) in memory.chunks_exact_mut(tokens * heads * width).enumerate() {
        // One row of the table serves all rows where there is only one.
        let line = if from == 1 { 0 } else { row * tokens };
        let starts = (line..line + tokens).step_by(piece);
        pieces.extend(starts.zip(memory.chunks_mut(piece * heads * width)));
    }
    for_each_mut(
        &mut pieces,
        rows * tokens * heads * width,
        |(start, memory)| {
            vectorised(|| {
                for (i, token) in memory.chunks_exact_mut(heads * width).enumerate() {
                    let line = (*start + i) * dim..(*start + i + 1) * dim;
                    let (cos, sin) = (&cos[line.clone()], &sin[line]);
                    for head in token.chunks_exact_mut(width) {
                        turn(&mut head[first..], cos, sin, rotary.layout);
                    }
                }
            });
        },
    );
    Tensor::from_primitive(TensorPrimitive::Float(x))
}

/// Turns the pairs of `x`.
#[inline(always)]
#[expect(
    clippy::inline_always,
    reason = "it has to be part of a vectorised caller"
)]
fn turn<R: Real>(x: &mut [R], cos: &[R], sin: &[R], layout: RotaryLayout) {
    match layout {
        RotaryLayout::Interleaved => {
            let pairs = x.as_chunks_mut::<2>().0.iter_mut();
            let angles = cos.as_chunks::<2>().0.iter().zip(sin.as_chunks::<2>().0);
            for ([a, b], ([cos, _], [sin, _])) in pairs.zip(angles) {
                (*a, *b) = (*a * *cos - *b * *sin, *b * *cos + *a * *sin);
            }
        }
        RotaryLayout::HalfSplit => {
            let half = x.len() / 2;
            let (a, b) = x.split_at_mut(half);
            for (((a, b), cos), sin) in a.iter_mut().zip(b).zip(&cos[..half]).zip(&sin[..half]) {
                (*a, *b) = (*a * *cos - *b * *sin, *b * *cos + *a * *sin);
            }
        }
    }
}

/// The tensor in one piece that nobody else holds.
fn owned(x: FlexTensor) -> FlexTensor {
    if x.is_contiguous() && x.layout().start_offset() == 0 {
        return x;
    }
    x.to_contiguous()
}
