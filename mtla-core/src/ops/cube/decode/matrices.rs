//! Decoding on tensor cores, where queries are many enough to fill their products: heads that share a key, in all rows
//! of a team.
//!
//! Queries are turned once and kept in shared memory, and planes, not units, compute: *compare* is a product of queries
//! and keys, and *sum* one of weights and values. Operands have 16 bits, so queries and weights are rounded to as many;
//! sums have 32.
//!
//! A product is a matrix of `m` queries and `n` slots, or channels of values. Sums of values stay in the registers of a
//! plane in an order that only the device knows. When the largest score of a query rises, its sums have to become
//! smaller, and pass through shared memory for it. That is why a score may exceed what it is compared with by a little
//! ([`RISE`]), so that it seldom happens.

#![allow(
    clippy::trivially_copy_pass_by_ref,
    clippy::used_underscore_binding,
    clippy::too_many_arguments,
    reason = "kernels take tensors by reference, and their types by a parameter of this form"
)]

use burn_cubecl::cubecl;
use cubecl::{
    cmma::{self, MatrixIdent, MatrixLayout},
    prelude::*,
};

use super::{
    super::LOWEST,
    shape::{LINE, Matrices, Shape},
    tile::{Team, TeamTiles, Tile, lanes_max, lanes_sum, turned},
};

/// By how much a score may exceed the one that weights are relative to: they are at most `e` to the power of this, about
/// 3000, which 16 bits hold as exactly as 1.
const RISE: f32 = 8.0;

/// The whole of [`decode_kernel`](super::kernel::decode_kernel), with a pool of the queries' type.
#[cube]
pub(super) fn decode_by_matrices<F: Float, P: Float, I: Int, O: Float, N: Size>(
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
    #[comptime] m: Matrices,
) {
    let unit = UNIT_POS as usize;
    let part = CUBE_POS_X as usize;
    let parts = CUBE_COUNT_X as usize;
    let rows = q.shape(0);

    // Sums on their way to and from the registers of a plane, and before that scores, a matrix for each split.
    let mut scratch = SharedMemory::<f32>::new_aligned(shape.scratch, LINE);
    let mut queries =
        SharedMemory::<Vector<P, N>>::new_aligned(comptime!(m.queries * m.query_line), LINE);
    let mut tile =
        SharedMemory::<Vector<P, N>>::new_aligned(comptime!(shape.tile * m.tile_line), LINE);
    let mut weights = SharedMemory::<P>::new_aligned(comptime!(m.queries * shape.tile), LINE);
    let mut gate_of = SharedMemory::<f32>::new(shape.team);
    let mut of = Weighing::new(m);

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
    for query in range_stepped(unit, m.queries, shape.units) {
        of.largest[query] = LOWEST;
        of.totals[query] = 0.0;
    }
    load_queries(q, rotary, &mut queries, &team, shape, m);
    let place = Place::new(unit, shape, m);
    let mut sums = Sequence::<cmma::Matrix<f32>>::new();
    #[unroll]
    for _ in 0..comptime!(shape.sum_queries * shape.sum_vectors) {
        sums.push(zeros(m));
    }
    sync_cube();

    let tiles_each = tiles.of_a_part(parts, shape);
    for number in 0..tiles_each {
        let at = Tile::new(part * tiles_each + number, &team, tiles, table, shape);
        for query in range_stepped(unit, m.queries, shape.units) {
            of.largest_before[query] = of.largest[query];
        }
        if unit == 0 {
            of.rises[0] = 0;
        }
        at.load(
            &team,
            row,
            rotary,
            pool,
            table,
            &gate_of,
            &mut tile,
            m.tile_line,
            shape,
        );
        sync_cube();

        compare(&queries, &tile, &mut scratch, &at, &place, shape, m);
        sync_cube();

        of.weigh(&scratch, &mut weights, &at, scale, shape, m);
        sync_cube();

        if of.rises[0] > 0 {
            rescale(&sums, &of.factors, &mut scratch, &place, shape, m);
        }
        sum(&sums, &weights, &tile, &at, &place, shape, m);
        sync_cube();
    }

    write(&sums, out, &mut scratch, &of, &team, &place, shape, m);
}

/// Which of the sums a plane keeps: matrices of the same channels and of every `sum_groups`-th lot of queries.
#[derive(CubeType, Clone, Copy)]
struct Place {
    plane: usize,
    /// Of the unit, in its plane.
    lane: usize,
    /// Its first matrix of channels.
    column: usize,
    /// Its first lot of queries.
    group: usize,
    /// Where in `scratch` it may put a matrix.
    scratch: usize,
}

#[cube]
impl Place {
    fn new(unit: usize, #[comptime] shape: Shape, #[comptime] m: Matrices) -> Place {
        let plane = unit / m.plane;
        Place {
            plane,
            lane: unit % m.plane,
            column: plane % shape.sum_columns,
            group: plane / shape.sum_columns,
            scratch: plane * comptime!(m.m * m.n),
        }
    }

    /// The first query of a matrix, held within bounds.
    fn query(
        &self,
        #[comptime] h: usize,
        #[comptime] shape: Shape,
        #[comptime] m: Matrices,
    ) -> usize {
        let query = (self.group + comptime!(h * shape.sum_groups)) * m.m;
        min(query, comptime!(m.queries - m.m))
    }

    fn column(&self, #[comptime] v: usize, #[comptime] shape: Shape) -> usize {
        self.column + comptime!(v * shape.sum_columns)
    }

    /// Whether the plane has this matrix of its own.
    fn has(
        &self,
        #[comptime] h: usize,
        #[comptime] v: usize,
        #[comptime] shape: Shape,
        #[comptime] m: Matrices,
    ) -> bool {
        let query = (self.group + comptime!(h * shape.sum_groups)) * m.m;
        let columns = comptime!(shape.value_width * shape.vector / m.n);
        self.group < shape.sum_groups && query < m.queries && self.column(v, shape) < columns
    }
}

/// Brings the queries of the team to shared memory, turned, with zeros behind them.
#[cube]
fn load_queries<F: Float, P: Float, N: Size>(
    q: &Tensor<Vector<F, N>>,
    rotary: &ComptimeOption<Tensor<Vector<f32, N>>>,
    queries: &mut SharedMemory<Vector<P, N>>,
    team: &Team,
    #[comptime] shape: Shape,
    #[comptime] m: Matrices,
) {
    let unit = UNIT_POS as usize;
    for i in range_stepped(unit, comptime!(m.queries * shape.key_width), shape.units) {
        let query = i / shape.key_width;
        let channel = i % shape.key_width;
        let mut held = Vector::<P, N>::new(P::from_int(0));
        if query < comptime!(shape.queries()) {
            let row = min(team.row_of(query, shape), team.rows - 1);
            let heads = comptime!(shape.heads * shape.kv_heads);
            let place = (row * heads + team.head_of(query, shape)) * shape.key_width;
            held = Vector::cast_from(turned(q, place + channel, row, channel, rotary, shape));
        }
        queries[query * m.query_line + channel] = held;
    }
}

/// Scores of the queries that look at a tile, before scaling: matrices of them, and of parts of their channels where
/// there are more planes than matrices.
#[cube]
fn compare<P: Float, N: Size>(
    queries: &SharedMemory<Vector<P, N>>,
    tile: &SharedMemory<Vector<P, N>>,
    scratch: &mut SharedMemory<f32>,
    at: &Tile,
    place: &Place,
    #[comptime] shape: Shape,
    #[comptime] m: Matrices,
) {
    let columns = comptime!(shape.tile / m.n);
    let steps = comptime!(shape.key_width * shape.vector / m.k);
    let steps_each = comptime!(steps.div_ceil(m.splits));
    let jobs = comptime!(m.queries / m.m * columns * m.splits);
    let of_queries = operand::<P>(MatrixIdent::A, MatrixLayout::RowMajor, m);
    let of_keys = operand::<P>(MatrixIdent::B, MatrixLayout::ColMajor, m);
    let sum = zeros(m);
    for job in range_stepped(place.plane, jobs, comptime!(shape.units / m.plane)) {
        let split = job % m.splits;
        let first_query = job / m.splits / columns * m.m;
        let first_slot = job / m.splits % columns * m.n;
        if at.is_looked_at_by(first_query, m.m) {
            cmma::fill(&sum, 0.0f32);
            let first_step = split * steps_each;
            for step in first_step..min(first_step + steps_each, steps) {
                let channel = step * comptime!(m.k / shape.vector);
                let from = first_query * m.query_line + channel;
                cmma::load(
                    &of_queries,
                    &queries.slice(from, from + comptime!(m.m * m.query_line)),
                    comptime!((m.query_line * shape.vector) as u32),
                );
                let from = first_slot * m.tile_line + channel;
                cmma::load(
                    &of_keys,
                    &tile.slice(from, from + comptime!(m.n * m.tile_line)),
                    comptime!((m.tile_line * shape.vector) as u32),
                );
                cmma::execute(&of_queries, &of_keys, &sum, &sum);
            }
            let from = (split * m.queries + first_query) * shape.tile + first_slot;
            cmma::store(
                &mut scratch.slice_mut(from, from + comptime!(m.m * shape.tile)),
                &sum,
                comptime!(shape.tile as u32),
                MatrixLayout::RowMajor,
            );
        }
    }
}

/// What weights are relative to, and what they come to; a line for each query.
#[derive(CubeType)]
struct Weighing {
    largest: SharedMemory<f32>,
    largest_before: SharedMemory<f32>,
    /// What sums so far are to be multiplied with.
    factors: SharedMemory<f32>,
    totals: SharedMemory<f32>,
    /// One number, above 0 where some factor is not 1.
    rises: SharedMemory<u32>,
}

#[cube]
impl Weighing {
    fn new(#[comptime] m: Matrices) -> Weighing {
        Weighing {
            largest: SharedMemory::<f32>::new(m.queries),
            largest_before: SharedMemory::<f32>::new(m.queries),
            factors: SharedMemory::<f32>::new(m.queries),
            totals: SharedMemory::<f32>::new(m.queries),
            rises: SharedMemory::<u32>::new(1usize),
        }
    }

    /// Weights of a tile's slots, 0 for queries that do not look at it. A query's `lanes` units are neighbours, and each
    /// takes every `lanes`-th slot.
    fn weigh<P: Float>(
        &mut self,
        scratch: &SharedMemory<f32>,
        weights: &mut SharedMemory<P>,
        at: &Tile,
        scale: f32,
        #[comptime] shape: Shape,
        #[comptime] m: Matrices,
    ) {
        let unit = UNIT_POS as usize;
        let lane = unit % shape.lanes;
        let slots = comptime!(shape.tile / shape.lanes);
        let at_once = comptime!(shape.units / shape.lanes);
        for round in 0..comptime!(m.queries.div_ceil(at_once)) {
            let query = round * at_once + unit / shape.lanes;
            let is_query = query < m.queries;
            let query = min(query, comptime!(m.queries - 1));
            let looks = query >= at.first_query && query < at.first_query + at.queries;
            let mut scores = Array::<f32>::new(slots);
            let mut most = LOWEST.runtime();
            #[unroll]
            for s in 0..slots {
                let slot = lane + comptime!(s * shape.lanes);
                let mut score = LOWEST.runtime();
                if looks && at.begin + slot < at.end {
                    let mut sum = 0.0f32;
                    #[unroll]
                    for split in 0..m.splits {
                        sum += scratch[(comptime!(split * m.queries) + query) * shape.tile + slot];
                    }
                    score = sum * scale;
                }
                scores[s] = score;
                most = max(most, score);
            }
            most = lanes_max(most, shape.lanes);
            let before = self.largest_before[query];
            let mut now = before;
            if most > before + RISE {
                now = most;
            }
            let mut total = 0.0f32;
            #[unroll]
            for s in 0..slots {
                let slot = lane + comptime!(s * shape.lanes);
                let mut weight = 0.0f32;
                if scores[s] > LOWEST {
                    weight = (scores[s] - now).exp();
                }
                total += weight;
                if is_query {
                    weights[query * shape.tile + slot] = P::cast_from(weight);
                }
            }
            total = lanes_sum(total, shape.lanes);
            if lane == 0 && is_query {
                let factor = (before - now).exp();
                self.largest[query] = now;
                self.factors[query] = factor;
                self.totals[query] = self.totals[query] * factor + total;
                // Before the first tile there are no sums.
                if before > LOWEST && now > before {
                    self.rises[0] = 1;
                }
            }
        }
    }
}

/// Multiplies all sums with the factors of their queries.
#[cube]
fn rescale(
    sums: &Sequence<cmma::Matrix<f32>>,
    factors: &SharedMemory<f32>,
    scratch: &mut SharedMemory<f32>,
    place: &Place,
    #[comptime] shape: Shape,
    #[comptime] m: Matrices,
) {
    #[unroll]
    for h in 0..shape.sum_queries {
        #[unroll]
        for v in 0..shape.sum_vectors {
            let from = place.scratch;
            let to = from + comptime!(m.m * m.n);
            let sum = sums.index(comptime!(h * shape.sum_vectors + v));
            cmma::store(
                &mut scratch.slice_mut(from, to),
                sum,
                comptime!(m.n as u32),
                MatrixLayout::RowMajor,
            );
            sync_cube();
            for i in range_stepped(place.lane, comptime!(m.m * m.n), m.plane) {
                scratch[from + i] *= factors[place.query(h, shape, m) + i / m.n];
            }
            sync_cube();
            cmma::load_with_layout(
                sum,
                &scratch.slice(from, to),
                comptime!(m.n as u32),
                MatrixLayout::RowMajor,
            );
            sync_cube();
        }
    }
}

/// Adds the tile's values to the sums of the queries that look at it.
#[cube]
fn sum<P: Float, N: Size>(
    sums: &Sequence<cmma::Matrix<f32>>,
    weights: &SharedMemory<P>,
    tile: &SharedMemory<Vector<P, N>>,
    at: &Tile,
    place: &Place,
    #[comptime] shape: Shape,
    #[comptime] m: Matrices,
) {
    let of_weights = operand::<P>(MatrixIdent::A, MatrixLayout::RowMajor, m);
    let of_values = operand::<P>(MatrixIdent::B, MatrixLayout::RowMajor, m);
    #[unroll]
    for v in 0..shape.sum_vectors {
        let channel = shape.values_at + place.column(v, shape) * comptime!(m.n / shape.vector);
        for step in 0..comptime!(shape.tile / m.k) {
            if place.has(0usize, v, shape, m) {
                let from = step * comptime!(m.k * m.tile_line) + channel;
                cmma::load(
                    &of_values,
                    &tile.slice(from, from + comptime!(m.k * m.tile_line)),
                    comptime!((m.tile_line * shape.vector) as u32),
                );
                #[unroll]
                for h in 0..shape.sum_queries {
                    let first_query = place.query(h, shape, m);
                    if place.has(h, v, shape, m) && at.is_looked_at_by(first_query, m.m) {
                        let sum = sums.index(comptime!(h * shape.sum_vectors + v));
                        let from = first_query * shape.tile + step * m.k;
                        cmma::load(
                            &of_weights,
                            &weights.slice(from, from + comptime!(m.m * shape.tile)),
                            comptime!(shape.tile as u32),
                        );
                        cmma::execute(&of_weights, &of_values, sum, sum);
                    }
                }
            }
        }
    }
}

/// Writes the sums of all queries.
#[cube]
fn write<O: Float, N: Size>(
    sums: &Sequence<cmma::Matrix<f32>>,
    out: &mut Tensor<Vector<O, N>>,
    scratch: &mut SharedMemory<f32>,
    of: &Weighing,
    team: &Team,
    place: &Place,
    #[comptime] shape: Shape,
    #[comptime] m: Matrices,
) {
    let vectors = comptime!(m.n / shape.vector);
    #[unroll]
    for h in 0..shape.sum_queries {
        #[unroll]
        for v in 0..shape.sum_vectors {
            let from = place.scratch;
            cmma::store(
                &mut scratch.slice_mut(from, from + comptime!(m.m * m.n)),
                sums.index(comptime!(h * shape.sum_vectors + v)),
                comptime!(m.n as u32),
                MatrixLayout::RowMajor,
            );
            sync_cube();
            if place.has(h, v, shape, m) {
                for i in range_stepped(place.lane, comptime!(m.m * vectors), m.plane) {
                    let query = place.query(h, shape, m) + i / vectors;
                    let vector = place.column(v, shape) * vectors + i % vectors;
                    let mut found = Vector::<f32, N>::new(0.0);
                    #[unroll]
                    for e in 0..shape.vector {
                        found[e] = scratch[from + i * shape.vector + e];
                    }
                    if query < comptime!(shape.queries()) {
                        let (largest, total) = (of.largest[query], of.totals[query]);
                        team.write(out, query, vector, found, largest, total, shape);
                    }
                }
            }
            sync_cube();
        }
    }
}

/// A matrix that something is to be loaded into.
#[cube]
fn operand<P: Float>(
    #[comptime] ident: MatrixIdent,
    #[comptime] layout: MatrixLayout,
    #[comptime] m: Matrices,
) -> cmma::Matrix<P> {
    // SAFETY: it is loaded before it is used.
    unsafe { cmma::Matrix::<P>::uninitialized(ident, m.m, m.n, m.k, layout) }
}

/// A matrix of sums.
#[cube]
fn zeros(#[comptime] m: Matrices) -> cmma::Matrix<f32> {
    cmma::Matrix::<f32>::from_value(
        MatrixIdent::Accumulator,
        m.m,
        m.n,
        m.k,
        MatrixLayout::Undefined,
        0.0f32,
    )
}
