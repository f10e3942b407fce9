//! Joins what the parts of long rows have found.

#![allow(
    clippy::trivially_copy_pass_by_ref,
    clippy::used_underscore_binding,
    reason = "kernels take tensors by reference, and their types by a parameter of this form"
)]

use burn_cubecl::cubecl;
use cubecl::prelude::*;

/// `partial [rows, parts, heads, values + 2]` of the decoding kernel to `out [rows, heads, values]`, one vector a
/// unit.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn combine_kernel<F: Float, N: Size>(
    partial: &Tensor<Vector<f32, N>>,
    out: &mut Tensor<Vector<F, N>>,
    #[comptime] value_width: usize,
    #[define(F)] _type: StorageType,
) {
    if ABSOLUTE_POS >= out.len() {
        terminate!();
    }
    let vector = ABSOLUTE_POS % value_width;
    let row_head = ABSOLUTE_POS / value_width;
    let parts = partial.shape(1);
    let heads = partial.shape(2);
    let width = comptime!(value_width + 2);
    let first = (row_head / heads * parts * heads + row_head % heads) * width;
    let step = heads * width;

    let mut largest = partial[first + value_width];
    for part in 1..parts {
        largest = max(largest, partial[first + part * step + value_width]);
    }
    let mut sum = Vector::<f32, N>::new(0.0);
    let mut total = Vector::<f32, N>::new(0.0);
    for part in 0..parts {
        let line = first + part * step;
        let factor = (partial[line + value_width] - largest).exp();
        sum += factor * partial[line + vector];
        total += factor * partial[line + comptime!(value_width + 1)];
    }
    out[ABSOLUTE_POS] = Vector::cast_from(sum / total);
}
