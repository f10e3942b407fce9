//! Decoding by the units of a cube, each with sums of its own, all of it in 32 bits:
//!
//! 1. *compare*: a few slots with one query, by a handful of units (`lanes`) that add up their sums;
//! 2. *weigh*: one score each;
//! 3. *sum*: some channels of some queries each.

#![allow(
    clippy::trivially_copy_pass_by_ref,
    clippy::used_underscore_binding,
    clippy::too_many_lines,
    clippy::too_many_arguments,
    reason = "kernels take tensors by reference, and their types by a parameter of this form"
)]

use burn_cubecl::cubecl;
use cubecl::prelude::*;

use super::{
    super::{LOWEST, across},
    shape::Shape,
    tile::{Team, TeamTiles, Tile, lanes_sum, turned},
};

/// The whole of [`decode_kernel`](super::kernel::decode_kernel).
#[cube]
pub(super) fn decode_by_units<F: Float, P: Float, I: Int, O: Float, N: Size>(
    q: &Tensor<Vector<F, N>>,
    row: &Tensor<Vector<F, N>>,
    rotary: &ComptimeOption<Tensor<Vector<f32, N>>>,
    gates: &ComptimeOption<Tensor<F>>,
    pool: &mut Tensor<Vector<P, N>>,
    table: &Tensor<I>,
    out: &mut Tensor<Vector<O, N>>,
    tiles: &TeamTiles,
    stride: usize,
    scale: f32,
    #[comptime] shape: Shape,
) {
    let unit = UNIT_POS as usize;
    let part = CUBE_POS_X as usize;
    let parts = CUBE_COUNT_X as usize;
    let rows = q.shape(0);

    let mut scratch = SharedMemory::<f32>::new(shape.scratch);
    let mut tile = SharedMemory::<Vector<P, N>>::new(comptime!(shape.tile * shape.tile_width));
    let mut scores = SharedMemory::<f32>::new(comptime!(shape.queries() * shape.tile));
    let mut weights = SharedMemory::<f32>::new(comptime!(shape.queries() * shape.tile));
    // The largest score of each query, before the tile and with it.
    let mut largest_before = SharedMemory::<f32>::new(comptime!(shape.queries()));
    let mut largest = SharedMemory::<f32>::new(comptime!(shape.queries()));
    let mut gate_of = SharedMemory::<f32>::new(shape.team);

    let team = Team::new::<F, I, N>(
        row,
        gates,
        table,
        rows,
        tiles,
        stride,
        &mut gate_of,
        &mut scratch,
        shape,
    );
    for query in range_stepped(unit, comptime!(shape.queries()), shape.units) {
        largest[query] = LOWEST;
    }

    let owner = Owner::new(unit, shape);
    let mut sums = Array::<Vector<f32, N>>::new(comptime!(shape.sum_queries * shape.sum_vectors));
    let mut totals = Array::<f32>::new(shape.sum_queries);
    #[unroll]
    for h in 0..shape.sum_queries {
        totals[h] = 0.0;
        #[unroll]
        for v in 0..shape.sum_vectors {
            sums[h * shape.sum_vectors + v] = Vector::new(0.0);
        }
    }
    sync_cube();

    let tiles_each = tiles.of_a_part(parts, shape);
    for number in 0..tiles_each {
        let at = Tile::new(part * tiles_each + number, &team, tiles, table, shape);
        for query in range_stepped(unit, comptime!(shape.queries()), shape.units) {
            largest_before[query] = largest[query];
        }
        at.load(
            &team,
            row,
            rotary,
            pool,
            table,
            &gate_of,
            &mut tile,
            shape.tile_width,
            shape,
        );
        sync_cube();

        compare(
            q,
            rotary,
            &tile,
            &mut scores,
            &mut scratch,
            &at,
            &team,
            scale,
            shape,
        );
        sync_cube();

        for i in range_stepped(unit, at.queries * shape.tile, shape.units) {
            let query = at.first_query + i / shape.tile;
            let slot = i % shape.tile;
            let mut now = largest_before[query];
            for other in 0..shape.tile {
                if at.begin + other < at.end {
                    now = max(now, scores[query * shape.tile + other]);
                }
            }
            let mut weight = 0.0f32;
            if at.begin + slot < at.end {
                weight = (scores[query * shape.tile + slot] - now).exp();
            }
            weights[query * shape.tile + slot] = weight;
            if slot == 0 {
                largest[query] = now;
            }
        }
        sync_cube();

        #[unroll]
        for h in 0..shape.sum_queries {
            let query = owner.query(h, shape);
            let factor = (largest_before[query] - largest[query]).exp();
            totals[h] *= factor;
            #[unroll]
            for v in 0..shape.sum_vectors {
                sums[h * shape.sum_vectors + v] *= Vector::new(factor);
            }
        }
        if comptime!(shape.team == 1) || at.is_shared {
            for slot in 0..shape.tile {
                #[unroll]
                for v in 0..shape.sum_vectors {
                    let channel = shape.values_at + owner.vector(v, shape);
                    let value =
                        Vector::<f32, N>::cast_from(tile[slot * shape.tile_width + channel]);
                    #[unroll]
                    for h in 0..shape.sum_queries {
                        let weight = weights[owner.query(h, shape) * shape.tile + slot];
                        sums[h * shape.sum_vectors + v] += Vector::new(weight) * value;
                        if comptime!(v == 0) {
                            totals[h] += weight;
                        }
                    }
                }
            }
        } else {
            #[unroll]
            for h in 0..shape.sum_queries {
                let query = owner.query(h, shape);
                if query / shape.heads == at.member {
                    for slot in 0..shape.tile {
                        let weight = weights[query * shape.tile + slot];
                        totals[h] += weight;
                        #[unroll]
                        for v in 0..shape.sum_vectors {
                            let channel = shape.values_at + owner.vector(v, shape);
                            let value = tile[slot * shape.tile_width + channel];
                            sums[h * shape.sum_vectors + v] +=
                                Vector::new(weight) * Vector::<f32, N>::cast_from(value);
                        }
                    }
                }
            }
        }
        sync_cube();
    }

    #[unroll]
    for h in 0..shape.sum_queries {
        let query = owner.query(h, shape);
        #[unroll]
        for v in 0..shape.sum_vectors {
            if owner.has_query(h, shape) && owner.has_vector(v, shape) {
                team.write(
                    out,
                    query,
                    owner.vector(v, shape),
                    sums[h * shape.sum_vectors + v],
                    largest[query],
                    totals[h],
                    shape,
                );
            }
        }
    }
}

/// Which sums a unit keeps: the same channels of every `sum_groups`-th query, so that a value read from the tile
/// serves several queries. Where there are more units than that, or the last round of queries or channels is not
/// full, places are repeated, and only those that are had are written.
#[derive(CubeType, Clone, Copy)]
struct Owner {
    /// Its first vector of channels.
    vector: usize,
    /// Its first query.
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

    fn query(&self, #[comptime] h: usize, #[comptime] shape: Shape) -> usize {
        let query = self.group + comptime!(h * shape.sum_groups);
        min(query, comptime!(shape.queries() - 1))
    }

    fn has_query(&self, #[comptime] h: usize, #[comptime] shape: Shape) -> bool {
        let query = self.group + comptime!(h * shape.sum_groups);
        self.group < shape.sum_groups && query < comptime!(shape.queries())
    }

    fn vector(&self, #[comptime] v: usize, #[comptime] shape: Shape) -> usize {
        let vector = self.vector + comptime!(v * shape.sum_columns);
        min(vector, comptime!(shape.value_width - 1))
    }

    fn has_vector(&self, #[comptime] v: usize, #[comptime] shape: Shape) -> bool {
        self.vector + comptime!(v * shape.sum_columns) < shape.value_width
    }
}

/// Scores of the slots of a tile with those who look at it. A task is `block` slots and one query; its `lanes` units
/// are neighbours, and each takes every `lanes`-th vector of channels.
#[cube]
fn compare<F: Float, P: Float, N: Size>(
    q: &Tensor<Vector<F, N>>,
    rotary: &ComptimeOption<Tensor<Vector<f32, N>>>,
    tile: &SharedMemory<Vector<P, N>>,
    scores: &mut SharedMemory<f32>,
    scratch: &mut SharedMemory<f32>,
    at: &Tile,
    team: &Team,
    scale: f32,
    #[comptime] shape: Shape,
) {
    let unit = UNIT_POS as usize;
    let lane = unit % shape.lanes;
    let blocks = comptime!(shape.tile / shape.block);
    let tasks_at_once = comptime!(shape.units / shape.lanes);
    let tasks = at.queries * blocks;

    for round in 0..tasks.div_ceil(tasks_at_once) {
        let task = round * tasks_at_once + unit / shape.lanes;
        let is_task = task < tasks;
        let task = min(task, tasks - 1);
        let query = at.first_query + task / blocks;
        let slot = task % blocks * shape.block;
        // Rows after the last are not written; their queries are the last one's.
        let batch = min(team.row_of(query, shape), q.shape(0) - 1);
        let head = team.head_of(query, shape);
        let heads = comptime!(shape.heads * shape.kv_heads);
        let queries = (batch * heads + head) * shape.key_width;

        let mut products = Array::<Vector<f32, N>>::new(shape.block);
        #[unroll]
        for b in 0..shape.block {
            products[b] = Vector::new(0.0);
        }
        for channel in range_stepped(lane, shape.key_width, shape.lanes) {
            let query = turned(q, queries + channel, batch, channel, rotary, shape);
            #[unroll]
            for b in 0..shape.block {
                let key = tile[(slot + b) * shape.tile_width + channel];
                products[b] += query * Vector::cast_from(key);
            }
        }

        let place = query * shape.tile + slot;
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
