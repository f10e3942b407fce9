//! The decoding kernel: one cube for each row, key/value head and part of the row's slots.
//!
//! A cube goes through its slots a tile at a time. A tile is loaded into shared memory once and serves all heads
//! that share it; on the way the new token's slot is merged and written back. Between barriers the units of the
//! cube (its threads) divide the work anew each time:
//!
//! 1. *load*: a vector of the tile each;
//! 2. *compare*: a few slots with one head, by a handful of units (`lanes`) that add up their sums;
//! 3. *weigh*: one score each, against the largest that the head has seen so far;
//! 4. *sum*: some channels of some heads each, kept in registers to the end.
//!
//! All of it is in 32 bits. Loops with barriers in them run equally often in all units, by numbers that come from
//! the launch and not from a buffer, as WebGPU demands; a part that ends before others goes on with empty tiles.

#![allow(
    clippy::trivially_copy_pass_by_ref,
    clippy::used_underscore_binding,
    clippy::too_many_lines,
    clippy::too_many_arguments,
    reason = "kernels take tensors by reference, and their types by a parameter of this form"
)]

use burn_cubecl::cubecl;
use cubecl::prelude::*;

use super::{LOWEST, across, plan::Shape};

/// With one part a row, `out` is the result `[rows, heads, values]`; with several, what
/// [`combine`](super::combine) makes the result of: `[rows, parts, heads, values + 2]`, the last two vectors being
/// the largest score and the sum of the weights.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn decode_kernel<F: Float, P: Float, I: Int, O: Float, N: Size>(
    q: &Tensor<Vector<F, N>>,
    row: &Tensor<Vector<F, N>>,
    gates: &ComptimeOption<Tensor<F>>,
    pool: &mut Tensor<Vector<P, N>>,
    table: &Tensor<I>,
    out: &mut Tensor<Vector<O, N>>,
    stride: u32,
    scale: f32,
    #[comptime] shape: Shape,
    #[define(F, P, I, O)] _types: [StorageType; 4],
) {
    let unit = UNIT_POS as usize;
    let part = CUBE_POS_X as usize;
    let parts = CUBE_COUNT_X as usize;
    let batch = CUBE_POS_Y as usize;
    let kv_head = CUBE_POS_Z as usize;

    // The row's slots, and this cube's among them. Table entries are held within bounds.
    let max_slots = table.shape(1) - 1;
    let line = batch * (max_slots + 1);
    let start = usize::cast_from(table[line]);
    let stride = stride as usize;
    let newest = min(start / stride, max_slots - 1);
    let opens = start.is_multiple_of(stride);
    let slots = newest + 1;
    let length = slots.div_ceil(parts);
    let first = part * length;
    let end = min(first + length, slots);
    let tiles = max_slots.div_ceil(parts).div_ceil(shape.tile);

    let mut scratch = SharedMemory::<f32>::new(shape.scratch);
    let mut tile = SharedMemory::<Vector<P, N>>::new(comptime!(shape.tile * shape.tile_width));
    let mut scores = SharedMemory::<f32>::new(comptime!(shape.heads * shape.tile));
    let mut weights = SharedMemory::<f32>::new(comptime!(shape.heads * shape.tile));
    // The largest score of each head, before the tile and with it.
    let mut largest_before = SharedMemory::<f32>::new(shape.heads);
    let mut largest = SharedMemory::<f32>::new(shape.heads);

    let gate = gate::<F, N>(row, gates, batch, newest, &mut scratch, shape);
    for head in range_stepped(unit, shape.heads, shape.units) {
        largest[head] = LOWEST;
    }

    let owner = Owner::new(unit, shape);
    let mut sums = Array::<Vector<f32, N>>::new(comptime!(shape.sum_heads * shape.sum_vectors));
    let mut totals = Array::<f32>::new(shape.sum_heads);
    #[unroll]
    for h in 0..shape.sum_heads {
        totals[h] = 0.0;
        #[unroll]
        for v in 0..shape.sum_vectors {
            sums[h * shape.sum_vectors + v] = Vector::new(0.0);
        }
    }
    sync_cube();

    for number in 0..tiles {
        let begin = first + number * shape.tile;

        for head in range_stepped(unit, shape.heads, shape.units) {
            largest_before[head] = largest[head];
        }
        for i in range_stepped(unit, comptime!(shape.tile * shape.tile_width), shape.units) {
            let slot_number = begin + i / shape.tile_width;
            let channel = i % shape.tile_width;
            let mut held = Vector::<P, N>::new(P::from_int(0));
            if slot_number < end {
                let slot = usize::cast_from(table[line + 1 + slot_number]);
                let slot = min(slot, pool.shape(0) - 1);
                let column = column(channel, kv_head, shape);
                let place = slot * shape.slot_width + column;
                held = pool[place];
                if slot_number == newest {
                    let new = Vector::<f32, N>::cast_from(row[batch * shape.slot_width + column]);
                    let before = Vector::<f32, N>::cast_from(held);
                    held = Vector::cast_from(merge(new, before, gate, opens, channel, shape));
                    pool[place] = held;
                }
            }
            tile[i] = held;
        }
        sync_cube();

        compare(
            q,
            &tile,
            &mut scores,
            &mut scratch,
            batch,
            kv_head,
            scale,
            shape,
        );
        sync_cube();

        for i in range_stepped(unit, comptime!(shape.heads * shape.tile), shape.units) {
            let head = i / shape.tile;
            let slot = i % shape.tile;
            let mut now = largest_before[head];
            for other in 0..shape.tile {
                if begin + other < end {
                    now = max(now, scores[head * shape.tile + other]);
                }
            }
            let mut weight = 0.0f32;
            if begin + slot < end {
                weight = (scores[i] - now).exp();
            }
            weights[i] = weight;
            if slot == 0 {
                largest[head] = now;
            }
        }
        sync_cube();

        #[unroll]
        for h in 0..shape.sum_heads {
            let head = owner.head(h, shape);
            let factor = (largest_before[head] - largest[head]).exp();
            totals[h] *= factor;
            #[unroll]
            for v in 0..shape.sum_vectors {
                sums[h * shape.sum_vectors + v] *= Vector::new(factor);
            }
        }
        for slot in 0..shape.tile {
            #[unroll]
            for v in 0..shape.sum_vectors {
                let channel = shape.values_at + owner.vector(v, shape);
                let value = Vector::<f32, N>::cast_from(tile[slot * shape.tile_width + channel]);
                #[unroll]
                for h in 0..shape.sum_heads {
                    let weight = weights[owner.head(h, shape) * shape.tile + slot];
                    sums[h * shape.sum_vectors + v] += Vector::new(weight) * value;
                    if comptime!(v == 0) {
                        totals[h] += weight;
                    }
                }
            }
        }
        sync_cube();
    }

    #[unroll]
    for h in 0..shape.sum_heads {
        if owner.has_head(h, shape) {
            let local = owner.head(h, shape);
            let head = kv_head * shape.heads + local;
            let heads = comptime!(shape.heads * shape.kv_heads);
            #[unroll]
            for v in 0..shape.sum_vectors {
                if owner.has_vector(v, shape) {
                    let vector = owner.vector(v, shape);
                    let sum = sums[h * shape.sum_vectors + v];
                    if shape.parts {
                        let line = ((batch * parts + part) * heads + head)
                            * comptime!(shape.value_width + 2);
                        out[line + vector] = Vector::cast_from(sum);
                        if vector == 0 {
                            out[line + shape.value_width] =
                                Vector::cast_from(Vector::<f32, N>::new(largest[local]));
                            out[line + comptime!(shape.value_width + 1)] =
                                Vector::cast_from(Vector::<f32, N>::new(totals[h]));
                        }
                    } else {
                        let line = (batch * heads + head) * shape.value_width;
                        let mean = sum / Vector::new(totals[h]);
                        out[line + vector] = Vector::cast_from(mean);
                    }
                }
            }
        }
    }
}

/// Which sums a unit keeps: the same channels of every `sum_groups`-th head, so that a value read from the tile
/// serves several heads. Where there are more units than that, or the last round of heads or channels is not
/// full, places are repeated, and only those that are had are written.
#[derive(CubeType, Clone, Copy)]
struct Owner {
    /// Its first vector of channels.
    vector: usize,
    /// Its first head.
    group: usize,
}

#[cube]
impl Owner {
    fn new(unit: usize, #[comptime] shape: Shape) -> Self {
        Owner {
            vector: unit % shape.sum_columns,
            group: unit / shape.sum_columns,
        }
    }

    fn head(&self, #[comptime] h: usize, #[comptime] shape: Shape) -> usize {
        let head = self.group + comptime!(h * shape.sum_groups);
        min(head, comptime!(shape.heads - 1))
    }

    fn has_head(&self, #[comptime] h: usize, #[comptime] shape: Shape) -> bool {
        self.group < shape.sum_groups && self.group + comptime!(h * shape.sum_groups) < shape.heads
    }

    fn vector(&self, #[comptime] v: usize, #[comptime] shape: Shape) -> usize {
        let vector = self.vector + comptime!(v * shape.sum_columns);
        min(vector, comptime!(shape.value_width - 1))
    }

    fn has_vector(&self, #[comptime] v: usize, #[comptime] shape: Shape) -> bool {
        self.vector + comptime!(v * shape.sum_columns) < shape.value_width
    }
}

/// Where in a slot of the pool a channel of the tile stands.
#[cube]
fn column(channel: usize, kv_head: usize, #[comptime] shape: Shape) -> usize {
    if shape.tile_width == shape.key_width {
        channel
    } else {
        // Keys of all heads, then values of all heads.
        let is_value = channel / shape.values_at;
        (is_value * shape.kv_heads + kv_head) * shape.values_at + channel % shape.values_at
    }
}

/// What the new token's slot holds from now on: gated latents add up, and the newest rope key wins.
#[cube]
fn merge<N: Size>(
    new: Vector<f32, N>,
    before: Vector<f32, N>,
    gate: f32,
    opens: bool,
    channel: usize,
    #[comptime] shape: Shape,
) -> Vector<f32, N> {
    let mut merged = new;
    if shape.gated && channel < shape.value_width {
        merged = Vector::new(gate) * new;
        if !opens {
            merged += before;
        }
    }
    merged
}

/// `sigmoid(g·c + β)` of the row's new latent, with its chunk's line of the table; in every unit.
#[cube]
fn gate<F: Float, N: Size>(
    row: &Tensor<Vector<F, N>>,
    gates: &ComptimeOption<Tensor<F>>,
    batch: usize,
    chunk: usize,
    scratch: &mut SharedMemory<f32>,
    #[comptime] shape: Shape,
) -> f32 {
    #[comptime]
    match gates {
        ComptimeOption::None => 1.0f32,
        ComptimeOption::Some(gates) => {
            let unit = UNIT_POS as usize;
            let rank = comptime!(shape.value_width * shape.vector);
            let line = min(chunk, gates.shape(0) - 1) * (rank + 1);
            let mut sum = 0.0f32;
            for i in range_stepped(unit, shape.value_width, shape.units) {
                let latent = row[batch * shape.slot_width + i];
                #[unroll]
                for e in 0..shape.vector {
                    let factor = gates[line + i * shape.vector + e];
                    sum += f32::cast_from(latent[e]) * f32::cast_from(factor);
                }
            }
            scratch[unit] = sum;
            sync_cube();
            let mut half = comptime!(shape.units / 2).runtime();
            while half > 0 {
                if unit < half {
                    scratch[unit] += scratch[unit + half];
                }
                sync_cube();
                half /= 2;
            }
            let logit = scratch[0] + f32::cast_from(gates[line + rank]);
            1.0f32 / (1.0f32 + (-logit).exp())
        }
    }
}

/// Scores of the slots of a tile with all heads. A task is `block` slots and one head; its `lanes` units are
/// neighbours, and each takes every `lanes`-th vector of channels.
#[cube]
fn compare<F: Float, P: Float, N: Size>(
    q: &Tensor<Vector<F, N>>,
    tile: &SharedMemory<Vector<P, N>>,
    scores: &mut SharedMemory<f32>,
    scratch: &mut SharedMemory<f32>,
    batch: usize,
    kv_head: usize,
    scale: f32,
    #[comptime] shape: Shape,
) {
    let unit = UNIT_POS as usize;
    let lane = unit % shape.lanes;
    let blocks = comptime!(shape.tile / shape.block);
    let tasks = comptime!(shape.heads * blocks);
    let tasks_at_once = comptime!(shape.units / shape.lanes);
    let heads = comptime!(shape.heads * shape.kv_heads);
    let queries = (batch * heads + kv_head * shape.heads) * shape.key_width;

    for round in 0..comptime!(tasks.div_ceil(tasks_at_once)) {
        let task = round * tasks_at_once + unit / shape.lanes;
        let is_task = task < tasks;
        let task = min(task, comptime!(tasks - 1));
        let head = task / blocks;
        let slot = task % blocks * shape.block;

        let mut products = Array::<Vector<f32, N>>::new(shape.block);
        #[unroll]
        for b in 0..shape.block {
            products[b] = Vector::new(0.0);
        }
        for channel in range_stepped(lane, shape.key_width, shape.lanes) {
            let query = Vector::<f32, N>::cast_from(q[queries + head * shape.key_width + channel]);
            #[unroll]
            for b in 0..shape.block {
                let key = tile[(slot + b) * shape.tile_width + channel];
                products[b] += query * Vector::cast_from(key);
            }
        }

        let place = head * shape.tile + slot;
        if shape.planes {
            #[unroll]
            for b in 0..shape.block {
                let sum = lanes_sum(across(products[b]), shape.lanes);
                if lane == 0 && is_task {
                    scores[place + b] = sum * scale;
                }
            }
        } else {
            #[unroll]
            for b in 0..shape.block {
                scratch[b * shape.units + unit] = across(products[b]);
            }
            sync_cube();
            if lane < shape.block && is_task {
                let sums = lane * shape.units + unit - lane;
                let mut sum = 0.0f32;
                for l in 0..shape.lanes {
                    sum += scratch[sums + l];
                }
                scores[place + lane] = sum * scale;
            }
            sync_cube();
        }
    }
}

/// The sum over `lanes` neighbouring units of a plane, in each of them.
#[cube]
fn lanes_sum(x: f32, #[comptime] lanes: usize) -> f32 {
    let mut sum = x;
    #[unroll]
    for step in 0..comptime!(lanes.ilog2()) {
        sum += plane_shuffle_xor(sum, comptime!(1u32 << step));
    }
    sum
}
