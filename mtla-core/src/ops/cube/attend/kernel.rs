//! The forward pass of attention: one cube for each row, key/value head and tile of queries.
//!
//! A tile has queries of all heads that share a key/value head, one after the other. A cube takes blocks of as many
//! columns in, one at a time, and of these only what some query of its tile can see. Its 64 units stand in a square, and
//! each computes a few scores, or sums, of every eighth query and every eighth column, or vector of channels:
//!
//! 1. *scores*: queries and keys are loaded a few channels at a time, and scores grow in registers;
//! 2. *weights*: a few units go over the scores of a query, against the largest that it has seen so far;
//! 3. *sums*: values are loaded a few channels at a time, and added to sums that stay in registers to the end.
//!
//! What a query sees of its own running chunk comes before all columns. Everything is in 32 bits. Loops with barriers
//! in them run equally often in all units, by numbers that come from the launch, as WebGPU demands.

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
    plan::{CHUNK, Own, SIDE, Shape, UNITS},
};

/// A line of a block in shared memory, in vectors: one more than there is, so that neighbours read from different
/// banks.
const LINE: usize = CHUNK + 1;

/// Where keys stand: column `c` is the last of `step` tokens `c · step ..`, and what query `i` sees of its own chunk is token
/// `own + i`, after the row's offset if the keys are those of tokens.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub(super) struct Places {
    pub(super) columns: u32,
    pub(super) step: u32,
    pub(super) own: u32,
    /// The largest offset or length of all rows.
    pub(super) furthest: u32,
}

/// Dropout's numbers: the seed's hash, how many hashes are dropped, and the factor of what is kept.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub(super) struct Kept {
    pub(super) seed: u32,
    pub(super) threshold: u32,
    pub(super) factor: f32,
}

/// Queries `[batch, heads, queries, key_width]`, keys of `[batch, kv_heads, tokens, ..]`, and for each row of the batch
/// its offset, or how many columns it sees. The result is `[batch, queries, heads, value_width]`.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn attend_kernel<F: Float, I: Int, N: Size>(
    q: &Tensor<Vector<F, N>>,
    k: &Tensor<Vector<F, N>>,
    shared: &ComptimeOption<Tensor<Vector<F, N>>>,
    v: &Tensor<Vector<F, N>>,
    rows: &Tensor<I>,
    out: &mut Tensor<Vector<F, N>>,
    log_sum: &mut Tensor<f32>,
    places: Places,
    kept: Kept,
    stride: u32,
    scale: f32,
    #[comptime] shape: Shape,
    #[define(F, I)] _types: [StorageType; 2],
) {
    // Of the tile: a line of scores, and units for the scores of a query.
    let each = comptime!(shape.each);
    let tile = comptime!(shape.tile());
    let line_of_scores = comptime!(tile + 1);
    let peers = comptime!(UNITS / tile);

    let unit = UNIT_POS as usize;
    let (x, y) = (unit % SIDE, unit / SIDE);
    let batch = CUBE_POS_Y as usize;
    let kv_head = CUBE_POS_Z as usize;
    let begin = CUBE_POS_X as usize * tile;
    let queries = q.shape(2);
    let stride = stride as usize;
    let columns = places.columns as usize;
    let offset = usize::cast_from(rows[batch]);

    let last = min((begin + (tile - 1)) / shape.group, queries - 1);
    let most = visible(last, places.furthest as usize, columns, stride, shape);
    let blocks = most.div_ceil(tile);

    let mut left = SharedMemory::<Vector<f32, N>>::new(comptime!(tile * LINE));
    let mut right = SharedMemory::<Vector<f32, N>>::new(comptime!(tile * LINE));
    let mut scores = SharedMemory::<f32>::new(comptime!(tile * line_of_scores));
    let mut scratch = SharedMemory::<f32>::new(UNITS);
    // Of each query: the largest score so far, the sum of its weights, what sums are to be multiplied by.
    let mut largest = SharedMemory::<f32>::new(tile);
    let mut total = SharedMemory::<f32>::new(tile);
    let mut factor = SharedMemory::<f32>::new(tile);

    // The query that the unit goes over the scores of, with its neighbours.
    let mine = unit / peers;
    let peer = unit % peers;
    let place = Place::new(begin + mine, kv_head, queries, shape);
    let seen = visible(place.query, offset, columns, stride, shape);
    let hash = row_hash(&place, batch, queries, kept.seed, shape);

    let mut sums = Array::<Vector<f32, N>>::new(comptime!(each * shape.value_chunks()));
    #[unroll]
    for s in 0..comptime!(each * shape.value_chunks()) {
        sums[s] = Vector::new(0.0);
    }
    if comptime!(shape.own != Own::None) {
        let token = own_token(place.query, offset, &places, k.shape(2), shape);
        let mut product = Vector::<f32, N>::new(0.0);
        for channel in range_stepped(peer, shape.key_width, peers) {
            let query = Vector::<f32, N>::cast_from(q[query_at(q, &place, batch, channel)]);
            product += query * key(k, shared, batch, kv_head, token, channel, shape);
        }
        scratch[unit] = across(product);
        sync_cube();
        if peer == 0 {
            let mut score = 0.0f32;
            #[unroll]
            for other in 0..peers {
                score += scratch[unit + other];
            }
            let sees = sees_itself(place.query, offset, stride, shape);
            largest[mine] = select(sees, score * scale, LOWEST);
            total[mine] = select(sees, 1.0f32, 0.0f32);
            factor[mine] = select(sees, dropped(hash, columns, &kept, shape), 0.0f32);
        }
        sync_cube();
        #[unroll]
        for i in 0..each {
            let local = y + comptime!(i * SIDE);
            let place = Place::new(begin + local, kv_head, queries, shape);
            let token = own_token(place.query, offset, &places, k.shape(2), shape);
            #[unroll]
            for chunk in 0..comptime!(shape.value_chunks()) {
                let channel = min(
                    x + comptime!(chunk * CHUNK),
                    comptime!(shape.value_width - 1),
                );
                let value = Vector::<f32, N>::cast_from(v[at(v, batch, kv_head, token, channel)]);
                sums[comptime!(chunk * each + i)] = value * Vector::new(factor[local]);
            }
        }
    } else if peer == 0 {
        largest[mine] = LOWEST;
        total[mine] = 0.0;
    }
    sync_cube();

    for block in 0..blocks {
        let column = block * tile;

        let mut products = Array::<Vector<f32, N>>::new(comptime!(each * each));
        #[unroll]
        for p in 0..comptime!(each * each) {
            products[p] = Vector::new(0.0);
        }
        for chunk in 0..comptime!(shape.key_width.div_ceil(CHUNK)) {
            for i in range_stepped(unit, comptime!(tile * CHUNK), UNITS) {
                let (line, c) = (i / CHUNK, i % CHUNK);
                let channel = chunk * CHUNK + c;
                let mut query = Vector::<f32, N>::new(0.0);
                let mut other = Vector::<f32, N>::new(0.0);
                if channel < shape.key_width {
                    let place = Place::new(begin + line, kv_head, queries, shape);
                    query = Vector::cast_from(q[query_at(q, &place, batch, channel)]);
                    if column + line < columns {
                        let token = column_token(column + line, &places);
                        other = key(k, shared, batch, kv_head, token, channel, shape);
                    }
                }
                left[line * LINE + c] = query;
                right[line * LINE + c] = other;
            }
            sync_cube();
            for c in 0..CHUNK {
                let mut keys = Array::<Vector<f32, N>>::new(each);
                #[unroll]
                for j in 0..each {
                    keys[j] = right[(x + comptime!(j * SIDE)) * LINE + c];
                }
                #[unroll]
                for i in 0..each {
                    let query = left[(y + comptime!(i * SIDE)) * LINE + c];
                    #[unroll]
                    for j in 0..each {
                        products[comptime!(i * each + j)] += query * keys[j];
                    }
                }
            }
            sync_cube();
        }
        #[unroll]
        for i in 0..each {
            #[unroll]
            for j in 0..each {
                let place = (y + comptime!(i * SIDE)) * line_of_scores + x + comptime!(j * SIDE);
                scores[place] = across(products[comptime!(i * each + j)]) * scale;
            }
        }
        sync_cube();

        let before = largest[mine];
        let mut now = before;
        for j in range_stepped(peer, tile, peers) {
            if column + j < seen {
                now = max(now, scores[mine * line_of_scores + j]);
            }
        }
        scratch[unit] = now;
        sync_cube();
        #[unroll]
        for other in 0..peers {
            now = max(now, scratch[mine * peers + other]);
        }
        let mut weights = 0.0f32;
        for j in range_stepped(peer, tile, peers) {
            let mut weight = 0.0f32;
            if column + j < seen {
                weight = (scores[mine * line_of_scores + j] - now).exp();
                weights += weight;
                weight *= dropped(hash, column + j, &kept, shape);
            }
            scores[mine * line_of_scores + j] = weight;
        }
        sync_cube();
        scratch[unit] = weights;
        sync_cube();
        if peer == 0 {
            let again = (before - now).exp();
            let mut sum = total[mine] * again;
            #[unroll]
            for other in 0..peers {
                sum += scratch[unit + other];
            }
            total[mine] = sum;
            factor[mine] = again;
            largest[mine] = now;
        }

        #[unroll]
        for chunk in 0..comptime!(shape.value_chunks()) {
            for i in range_stepped(unit, comptime!(tile * CHUNK), UNITS) {
                let (line, c) = (i / CHUNK, i % CHUNK);
                let channel = c + comptime!(chunk * CHUNK);
                let mut value = Vector::<f32, N>::new(0.0);
                if channel < shape.value_width && column + line < columns {
                    let token = column_token(column + line, &places);
                    value = Vector::cast_from(v[at(v, batch, kv_head, token, channel)]);
                }
                right[line * LINE + c] = value;
            }
            sync_cube();
            #[unroll]
            for i in 0..each {
                sums[comptime!(chunk * each + i)] *= Vector::new(factor[y + comptime!(i * SIDE)]);
            }
            for line in 0..tile {
                let value = right[line * LINE + x];
                #[unroll]
                for i in 0..each {
                    let weight = scores[(y + comptime!(i * SIDE)) * line_of_scores + line];
                    sums[comptime!(chunk * each + i)] += Vector::new(weight) * value;
                }
            }
            sync_cube();
        }
    }

    #[unroll]
    for i in 0..each {
        let local = y + comptime!(i * SIDE);
        let place = Place::new(begin + local, kv_head, queries, shape);
        if place.exists {
            let line = (batch * queries + place.query) * comptime!(shape.group * shape.kv_heads)
                + place.head;
            // A query that sees nothing gets 0.
            let total = max(total[local], f32::MIN_POSITIVE);
            #[unroll]
            for chunk in 0..comptime!(shape.value_chunks()) {
                let channel = x + comptime!(chunk * CHUNK);
                if channel < shape.value_width {
                    let mean = sums[comptime!(chunk * each + i)] / Vector::new(total);
                    out[line * shape.value_width + channel] = Vector::cast_from(mean);
                }
            }
            if x == 0 {
                log_sum[line] = largest[local] + total.ln();
            }
        }
    }
}

/// Where a query of a tile stands. Those after the last repeat it, and are not written.
#[derive(CubeType, Clone, Copy)]
struct Place {
    query: usize,
    head: usize,
    exists: bool,
}

#[cube]
impl Place {
    fn new(number: usize, kv_head: usize, queries: usize, #[comptime] shape: Shape) -> Self {
        let query = number / shape.group;
        Place {
            query: min(query, queries - 1),
            head: kv_head * shape.group + number % shape.group,
            exists: query < queries,
        }
    }
}

/// Columns that a query sees.
#[cube]
fn visible(
    query: usize,
    offset: usize,
    columns: usize,
    stride: usize,
    #[comptime] shape: Shape,
) -> usize {
    if shape.causal {
        min((offset + query + 1) / stride, columns)
    } else {
        min(offset, columns)
    }
}

/// Whether a query sees its own running chunk. The end of a chunk is a column.
#[cube]
fn sees_itself(query: usize, offset: usize, stride: usize, #[comptime] shape: Shape) -> bool {
    if shape.causal {
        !(offset + query + 1).is_multiple_of(stride)
    } else {
        true.runtime()
    }
}

#[cube]
fn column_token(column: usize, places: &Places) -> usize {
    (column + 1) * places.step as usize - 1
}

#[cube]
fn own_token(
    query: usize,
    offset: usize,
    places: &Places,
    tokens: usize,
    #[comptime] shape: Shape,
) -> usize {
    let mut token = places.own as usize + query;
    if comptime!(shape.own == Own::OfToken) {
        token += offset;
    }
    min(token, tokens - 1)
}

/// Where a channel, counted in vectors, of a token is in memory.
#[cube]
fn at<F: Float, N: Size>(
    x: &Tensor<Vector<F, N>>,
    batch: usize,
    head: usize,
    token: usize,
    channel: usize,
) -> usize {
    (batch * x.stride(0) + head * x.stride(1) + token * x.stride(2)) / N::value() + channel
}

#[cube]
fn query_at<F: Float, N: Size>(
    q: &Tensor<Vector<F, N>>,
    place: &Place,
    batch: usize,
    channel: usize,
) -> usize {
    at(q, batch, place.head, place.query, channel)
}

/// A channel of a key, be it its head's own or one that all heads share.
#[cube]
fn key<F: Float, N: Size>(
    k: &Tensor<Vector<F, N>>,
    shared: &ComptimeOption<Tensor<Vector<F, N>>>,
    batch: usize,
    kv_head: usize,
    token: usize,
    channel: usize,
    #[comptime] shape: Shape,
) -> Vector<f32, N> {
    #[comptime]
    match shared {
        ComptimeOption::None => Vector::cast_from(k[at(k, batch, kv_head, token, channel)]),
        ComptimeOption::Some(shared) => {
            if channel < shape.head_width {
                Vector::cast_from(k[at(k, batch, kv_head, token, channel)])
            } else {
                let channel = channel - shape.head_width;
                Vector::cast_from(shared[at(shared, batch, 0, token, channel)])
            }
        }
    }
}

/// The hash of a row of weights; see [`Dropout`](crate::ops::Dropout).
#[cube]
fn row_hash(
    place: &Place,
    batch: usize,
    queries: usize,
    seed: u32,
    #[comptime] shape: Shape,
) -> u32 {
    let heads = comptime!(shape.group * shape.kv_heads);
    let row = (batch * heads + place.head) * queries + place.query;
    mix(u32::cast_from(row) ^ seed)
}

/// What dropout multiplies a weight by.
#[cube]
fn dropped(hash: u32, column: usize, kept: &Kept, #[comptime] shape: Shape) -> f32 {
    if shape.dropout {
        let keeps = mix(u32::cast_from(column) ^ hash) >= kept.threshold;
        select(keeps, kept.factor, 0.0f32)
    } else {
        1.0f32.runtime()
    }
}

/// The hash of `dropout.rs`.
#[cube]
fn mix(x: u32) -> u32 {
    let x = x + 0x9e37_79b9u32;
    let x = (x ^ (x >> 16)) * 0x7feb_352du32;
    let x = (x ^ (x >> 15)) * 0x846c_a68bu32;
    x ^ (x >> 16)
}
