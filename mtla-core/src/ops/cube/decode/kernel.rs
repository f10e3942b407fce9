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
//! 2. *compare*: a few slots with one query, by a handful of units (`lanes`) that add up their sums;
//! 3. *weigh*: one score each, against the largest that the query has seen so far;
//! 4. *sum*: some channels of some queries each, kept in registers to the end.
//!
//! A *query* is a head of a row of the team, and `head` without more is one of the heads of a row that share a key.
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

use super::{
    super::{LOWEST, across},
    plan::Shape,
};

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
    let unit = UNIT_POS as usize;
    let part = CUBE_POS_X as usize;
    let parts = CUBE_COUNT_X as usize;
    let kv_head = CUBE_POS_Z as usize;
    let first_row = CUBE_POS_Y as usize * shape.team;
    let rows = q.shape(0);
    let line = table.shape(1);
    let (shared_tiles, own_tiles) = (tiles.shared as usize, tiles.own as usize);
    let stride = stride as usize;

    let mut scratch = SharedMemory::<f32>::new(shape.scratch);
    let mut tile = SharedMemory::<Vector<P, N>>::new(comptime!(shape.tile * shape.tile_width));
    let mut scores = SharedMemory::<f32>::new(comptime!(shape.queries() * shape.tile));
    let mut weights = SharedMemory::<f32>::new(comptime!(shape.queries() * shape.tile));
    // The largest score of each query, before the tile and with it.
    let mut largest_before = SharedMemory::<f32>::new(comptime!(shape.queries()));
    let mut largest = SharedMemory::<f32>::new(comptime!(shape.queries()));
    let mut gate_of = SharedMemory::<f32>::new(shape.team);

    #[unroll]
    for member in 0..shape.team {
        let row_number = min(first_row + member, rows - 1);
        let newest = newest(table, row_number, stride);
        let gate = gate::<F, N>(row, gates, row_number, newest, &mut scratch, shape);
        if unit == 0 {
            gate_of[member] = gate;
        }
        sync_cube();
    }
    let mut common = 0usize.runtime();
    if comptime!(shape.team > 1) {
        let limit = shared_tiles * shape.tile;
        common = common_slots(table, first_row, rows, stride, limit, &mut scratch, shape);
    }
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

    let all_tiles = shared_tiles + own_tiles * shape.team;
    let tiles_each = all_tiles.div_ceil(parts);
    for number in 0..tiles_each {
        // Which slots, by whose line of the table, and who sees them. Table entries are held within bounds.
        let number = part * tiles_each + number;
        let mut is_shared = false.runtime();
        let mut own_number = number;
        if comptime!(shape.team > 1) {
            is_shared = number < shared_tiles;
            own_number = select(is_shared, 0, number - shared_tiles);
        }
        let member = own_number / own_tiles;
        let row_number = min(first_row + member, rows - 1);
        let start = usize::cast_from(table[row_number * line]);
        let newest = newest(table, row_number, stride);
        let opens = start.is_multiple_of(stride);
        let mut begin = common + own_number % own_tiles * shape.tile;
        let mut end = newest + 1;
        let mut first_query = member * shape.heads;
        let mut queries = shape.heads.runtime();
        if comptime!(shape.team > 1) && is_shared {
            begin = number * shape.tile;
            end = common;
            first_query = 0;
            queries = comptime!(shape.queries()).runtime();
        } else if member >= shape.team || first_row + member >= rows {
            end = 0;
        }

        for query in range_stepped(unit, comptime!(shape.queries()), shape.units) {
            largest_before[query] = largest[query];
        }
        for i in range_stepped(unit, comptime!(shape.tile * shape.tile_width), shape.units) {
            let slot_number = begin + i / shape.tile_width;
            let channel = i % shape.tile_width;
            let mut held = Vector::<P, N>::new(P::from_int(0));
            if slot_number < end {
                let slot = usize::cast_from(table[row_number * line + 1 + slot_number]);
                let slot = min(slot, pool.shape(0) - 1);
                let column = column(channel, kv_head, shape);
                let place = slot * shape.slot_width + column;
                held = pool[place];
                if slot_number == newest && !is_shared {
                    let new = row_number * shape.slot_width + column;
                    let new = turned(row, new, row_number, channel, rotary, shape);
                    let before = Vector::<f32, N>::cast_from(held);
                    let gate = gate_of[min(member, comptime!(shape.team - 1))];
                    held = Vector::cast_from(merge(new, before, gate, opens, channel, shape));
                    pool[place] = held;
                }
            }
            tile[i] = held;
        }
        sync_cube();

        let first_query = min(first_query, comptime!(shape.queries() - shape.heads));
        let looking = Looking {
            first_row,
            first_query,
            queries,
        };
        compare(
            q,
            rotary,
            &tile,
            &mut scores,
            &mut scratch,
            &looking,
            kv_head,
            scale,
            shape,
        );
        sync_cube();

        for i in range_stepped(unit, queries * shape.tile, shape.units) {
            let query = first_query + i / shape.tile;
            let slot = i % shape.tile;
            let mut now = largest_before[query];
            for other in 0..shape.tile {
                if begin + other < end {
                    now = max(now, scores[query * shape.tile + other]);
                }
            }
            let mut weight = 0.0f32;
            if begin + slot < end {
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
        if comptime!(shape.team == 1) || is_shared {
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
                if query / shape.heads == member {
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
        let batch = first_row + query / shape.heads;
        if owner.has_query(h, shape) && batch < rows {
            let head = kv_head * shape.heads + query % shape.heads;
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
                                Vector::cast_from(Vector::<f32, N>::new(largest[query]));
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

/// Tiles of slots that rows of a team have in common, and of a row's own, in the team that has most.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub(super) struct TeamTiles {
    pub(super) shared: u32,
    pub(super) own: u32,
}

/// The place of the new token's slot in a row's line of the table.
#[cube]
fn newest<I: Int>(table: &Tensor<I>, row: usize, stride: usize) -> usize {
    let line = table.shape(1);
    min(usize::cast_from(table[row * line]) / stride, line - 2)
}

/// How many slots all rows of the team begin with, the slots of new tokens not among them, and `limit` at most; in
/// every unit.
#[cube]
fn common_slots<I: Int>(
    table: &Tensor<I>,
    first_row: usize,
    rows: usize,
    stride: usize,
    limit: usize,
    scratch: &mut SharedMemory<f32>,
    #[comptime] shape: Shape,
) -> usize {
    let unit = UNIT_POS as usize;
    let line = table.shape(1);
    let mut most = limit;
    #[unroll]
    for member in 0..shape.team {
        most = min(
            most,
            newest(table, min(first_row + member, rows - 1), stride),
        );
    }
    // The first place where a row differs. Places are far below 2^24, so that 32-bit floats hold them.
    let mut differs = most;
    for place in range_stepped(unit, most, shape.units) {
        let slot = table[first_row * line + 1 + place];
        #[unroll]
        for member in 1..shape.team {
            let row = min(first_row + member, rows - 1);
            if table[row * line + 1 + place] != slot {
                differs = min(differs, place);
            }
        }
    }
    scratch[unit] = f32::cast_from(differs);
    sync_cube();
    let mut half = comptime!(shape.units / 2).runtime();
    while half > 0 {
        if unit < half {
            scratch[unit] = min(scratch[unit], scratch[unit + half]);
        }
        sync_cube();
        half /= 2;
    }
    usize::cast_from(scratch[0])
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

/// The channels at `place` of queries or new tokens, turned by the angles of their row if they are among those of a
/// key, where they are number `channel`, that are.
#[cube]
fn turned<F: Float, N: Size>(
    x: &Tensor<Vector<F, N>>,
    place: usize,
    row: usize,
    channel: usize,
    rotary: &ComptimeOption<Tensor<Vector<f32, N>>>,
    #[comptime] shape: Shape,
) -> Vector<f32, N> {
    let mut own = Vector::<f32, N>::cast_from(x[place]);
    #[comptime]
    match rotary {
        ComptimeOption::None => own,
        ComptimeOption::Some(rotary) => {
            let turn = comptime!(shape.turn.expect("there is one with its table"));
            if channel >= turn.first && channel < comptime!(turn.first + turn.width) {
                let channel = channel - turn.first;
                let cos = min(row, rotary.shape(1) - 1) * turn.width + channel;
                let sin = cos + rotary.shape(1) * turn.width;
                let mut quarter = Vector::<f32, N>::new(0.0);
                if comptime!(turn.distance == 0) {
                    #[unroll]
                    for pair in 0..comptime!(shape.vector / 2) {
                        quarter[2 * pair] = -own[2 * pair + 1];
                        quarter[2 * pair + 1] = own[2 * pair];
                    }
                } else {
                    let is_first = channel % comptime!(2 * turn.distance) < turn.distance;
                    let other = select(is_first, place + turn.distance, place - turn.distance);
                    let sign = select(is_first, -1.0f32, 1.0f32);
                    quarter = Vector::new(sign) * Vector::cast_from(x[other]);
                }
                own = own * rotary[cos] + quarter * rotary[sin];
            }
            own
        }
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

/// The queries that look at a tile, of those of a team.
#[derive(CubeType, Clone, Copy)]
struct Looking {
    first_row: usize,
    first_query: usize,
    queries: usize,
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
    looking: &Looking,
    kv_head: usize,
    scale: f32,
    #[comptime] shape: Shape,
) {
    let unit = UNIT_POS as usize;
    let lane = unit % shape.lanes;
    let blocks = comptime!(shape.tile / shape.block);
    let tasks_at_once = comptime!(shape.units / shape.lanes);
    let tasks = looking.queries * blocks;

    for round in 0..tasks.div_ceil(tasks_at_once) {
        let task = round * tasks_at_once + unit / shape.lanes;
        let is_task = task < tasks;
        let task = min(task, tasks - 1);
        let query = looking.first_query + task / blocks;
        let slot = task % blocks * shape.block;
        // Rows after the last are not written; their queries are the last one's.
        let batch = min(looking.first_row + query / shape.heads, q.shape(0) - 1);
        let head = kv_head * shape.heads + query % shape.heads;
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
