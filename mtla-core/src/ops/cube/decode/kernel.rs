//! The decoding kernel: one cube for each team of rows, key/value head and part of the slots.
//!
//! A team is a few neighbouring rows that begin with the same slots, as the beams of a prompt do; often it is one row.
//! First come tiles of the slots that all its rows have in common, then those of each row's own.
//!
//! A cube goes through its slots a tile at a time. A tile is loaded into shared memory once and serves all heads
//! that share it, in all rows of the team that have it; on the way the new token's slot is merged and written back.
//! Between barriers the units of the cube (its threads) divide the work anew each time:
//!
//! 1. *load*: a vector of the tile each;
//! 2. *compare*: scores of the tile's slots;
//! 3. *weigh*: against the largest score that the query has seen so far;
//! 4. *sum*: weighted values, kept in registers to the end.
//!
//! A *query* is a head of a row of the team, and `head` without more is one of the heads of a row that share a key.
//!
//! Loops with barriers in them run equally often in all units, by numbers that come from the launch and not from a
//! buffer, as WebGPU demands; a part that ends before others goes on with empty tiles.

#![allow(
    clippy::trivially_copy_pass_by_ref,
    clippy::used_underscore_binding,
    clippy::too_many_arguments,
    reason = "kernels take tensors by reference, and their types by a parameter of this form"
)]

use burn_cubecl::cubecl;
use cubecl::prelude::*;

use super::{matrices::decode_by_matrices, shape::Shape, tile::TeamTiles, units::decode_by_units};

/// With one part a row, `out` is the result `[rows, heads, values]`; with several, what
/// [`combine`](super::combine) makes the result of: `[rows, parts, heads, values + 2]`, the last two vectors being
/// the largest score and the sum of the weights.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn decode_kernel<F: Float, P: Float, I: Int, O: Float, N: Size>(
    q: &Tensor<Vector<F, N>>,
    row: &Tensor<Vector<F, N>>,
    rotary: &ComptimeOption<Tensor<Vector<f32, N>>>,
    gates: &ComptimeOption<Tensor<F>>,
    pool: &mut Tensor<Vector<P, N>>,
    table: &Tensor<I>,
    out: &mut Tensor<Vector<O, N>>,
    tiles: TeamTiles,
    stride: u32,
    scale: f32,
    #[comptime] shape: Shape,
    #[define(F, P, I, O)] _types: [StorageType; 4],
) {
    let stride = stride as usize;
    #[comptime]
    match shape.matrices {
        Some(m) => decode_by_matrices::<F, P, I, O, N>(
            q, row, rotary, gates, pool, table, out, &tiles, stride, scale, shape, m,
        ),
        None => decode_by_units::<F, P, I, O, N>(
            q, row, rotary, gates, pool, table, out, &tiles, stride, scale, shape,
        ),
    }
}
