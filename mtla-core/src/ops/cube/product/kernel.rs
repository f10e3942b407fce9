//! The product of a few rows with a matrix, or of every head with its own: one cube for each head, a few rows and
//! neighbouring columns of the result.
//!
//! Such products only read the matrix: each of its vectors is read once a cube, in the order that it has in memory, and
//! serves all rows. Units share the sum of a column, which is put together in shared memory at the end. Everything is in
//! 32 bits.

#![allow(
    clippy::trivially_copy_pass_by_ref,
    clippy::used_underscore_binding,
    clippy::too_many_lines,
    clippy::too_many_arguments,
    reason = "kernels take tensors by reference, and their types by a parameter of this form"
)]

use burn_cubecl::cubecl;
use cubecl::prelude::*;

use super::{super::across, launch::Shape};

/// Where things are. What is counted in the weight is counted in its vectors.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub(super) struct Places {
    pub(super) rows: u32,
    /// Channels of a head.
    pub(super) width: u32,
    /// Those that are multiplied, in the vectors of `x`, and columns of the result before others follow, in its own.
    pub(super) inputs: u32,
    pub(super) columns: u32,
    /// The first element of the first head's matrix, from a head's to the next one's, from a column to the next, and
    /// from an input.
    pub(super) first: u32,
    pub(super) by_head: u32,
    pub(super) by_column: u32,
    pub(super) by_input: u32,
}

/// `x [rows, heads, width]` and a weight to `out [rows, heads, outputs]`; if `rest` is there, it is `x` again, and what
/// comes behind its inputs follows the products.
///
/// Where neighbours in the weight are columns, `x` has vectors of one element; where they are inputs, `out` has.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn product_kernel<F: Float, M: Size, N: Size, O: Size>(
    x: &Tensor<Vector<F, M>>,
    weight: &Tensor<Vector<F, N>>,
    rest: &ComptimeOption<Tensor<F>>,
    out: &mut Tensor<Vector<F, O>>,
    places: Places,
    #[comptime] shape: Shape,
    #[define(F)] _type: StorageType,
) {
    let unit = UNIT_POS as usize;
    let heads = CUBE_COUNT_Z as usize;
    let head = CUBE_POS_Z as usize;
    let first_row = CUBE_POS_Y as usize * shape.rows;
    let rows = places.rows as usize;
    let first_column = CUBE_POS_X as usize * shape.columns;
    let columns = places.columns as usize;
    let inputs = places.inputs as usize;
    let width = places.width as usize;

    // Neighbouring units read neighbouring vectors of the weight.
    let mut mine = unit / shape.parts;
    let mut part = unit % shape.parts;
    if comptime!(shape.along_columns) {
        mine = unit % shape.columns;
        part = unit / shape.columns;
    }
    let column = min(first_column + mine, columns - 1);
    let of_column =
        (places.first + CUBE_POS_Z * places.by_head) as usize + column * places.by_column as usize;

    let mut sums = Array::<Vector<f32, N>>::new(shape.rows);
    #[unroll]
    for r in 0..shape.rows {
        sums[r] = Vector::new(0.0);
    }
    for input in range_stepped(part, inputs, shape.parts) {
        let factor = weight[of_column + input * places.by_input as usize];
        let factor = Vector::<f32, N>::cast_from(factor);
        #[unroll]
        for r in 0..shape.rows {
            let row = min(first_row + r, rows - 1);
            let value = x[(row * heads + head) * width / M::value() + input];
            if comptime!(shape.along_columns) {
                sums[r] += Vector::new(f32::cast_from(value[0])) * factor;
            } else {
                sums[r] += Vector::cast_from(value) * factor;
            }
        }
    }

    // One row after the other in the same memory, of which a cube then needs little.
    let mut partial = SharedMemory::<Vector<f32, N>>::new(shape.units);
    let all = out.len() / (rows * heads);
    #[unroll]
    for r in 0..shape.rows {
        let row = first_row + r;
        partial[unit] = sums[r];
        sync_cube();
        if unit < shape.columns && first_column + unit < all && row < rows {
            let column = first_column + unit;
            let head = row * heads + head;
            let mut found = Vector::<F, O>::new(F::from_int(0));
            if column < columns {
                let mut sum = Vector::<f32, N>::new(0.0);
                for part in 0..shape.parts {
                    let mut other = unit * shape.parts + part;
                    if comptime!(shape.along_columns) {
                        other = part * shape.columns + unit;
                    }
                    sum += partial[other];
                }
                if comptime!(shape.along_columns) {
                    // As many elements in both.
                    #[unroll]
                    for e in 0..O::value() {
                        found[e] = F::cast_from(sum[e]);
                    }
                } else {
                    found = Vector::new(F::cast_from(across(sum)));
                }
            } else {
                found = behind(rest, (head + 1) * width, (all - column) * O::value());
            }
            out[head * all + column] = found;
        }
        sync_cube();
    }
}

/// The vector of what is not multiplied that begins `before` elements before `end`.
#[cube]
fn behind<F: Float, O: Size>(
    rest: &ComptimeOption<Tensor<F>>,
    end: usize,
    before: usize,
) -> Vector<F, O> {
    let mut found = Vector::<F, O>::new(F::from_int(0));
    #[comptime]
    match rest {
        ComptimeOption::None => {}
        ComptimeOption::Some(rest) =>
        {
            #[unroll]
            for e in 0..O::value() {
                found[e] = rest[end - before + e];
            }
        }
    }
    found
}
