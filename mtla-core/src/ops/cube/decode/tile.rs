//! Tiles of slots: which slots a tile has, who looks at it, and how it comes into shared memory with the new token
//! merged on the way.

#![allow(
    clippy::trivially_copy_pass_by_ref,
    clippy::used_underscore_binding,
    clippy::too_many_arguments,
    reason = "kernels take tensors by reference, and their types by a parameter of this form"
)]

use burn_cubecl::cubecl;
use cubecl::prelude::*;

use super::shape::Shape;

/// Tiles of slots that rows of a team have in common, and of a row's own, in the team that has most.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub(super) struct TeamTiles {
    pub(super) shared: u32,
    pub(super) own: u32,
}

#[cube]
impl TeamTiles {
    /// How many each of a team's parts has.
    pub(super) fn of_a_part(&self, parts: usize, #[comptime] shape: Shape) -> usize {
        let all = self.shared as usize + self.own as usize * shape.team;
        all.div_ceil(parts)
    }
}

/// The team of a cube, and its key/value head.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Team {
    first_row: usize,
    /// Of the whole step.
    pub(super) rows: usize,
    kv_head: usize,
    /// Slots that all its rows begin with, those of new tokens not among them.
    common: usize,
    /// Tokens of a slot.
    stride: usize,
}

#[cube]
impl Team {
    /// The cube's own; what gates its new tokens goes to `gate_of`.
    pub(super) fn new<F: Float, I: Int, N: Size>(
        row: &Tensor<Vector<F, N>>,
        gates: &ComptimeOption<Tensor<F>>,
        table: &Tensor<I>,
        rows: usize,
        tiles: &TeamTiles,
        stride: usize,
        gate_of: &mut SharedMemory<f32>,
        scratch: &mut SharedMemory<f32>,
        #[comptime] shape: Shape,
    ) -> Team {
        let first_row = CUBE_POS_Y as usize * shape.team;
        #[unroll]
        for member in 0..shape.team {
            let row_number = min(first_row + member, rows - 1);
            let newest = newest(table, row_number, stride);
            let gate = gate::<F, N>(row, gates, row_number, newest, scratch, shape);
            if UNIT_POS == 0 {
                gate_of[member] = gate;
            }
            sync_cube();
        }
        let mut common = 0usize.runtime();
        if comptime!(shape.team > 1) {
            let limit = tiles.shared as usize * shape.tile;
            common = common_slots(table, first_row, rows, stride, limit, scratch, shape);
        }
        Team {
            first_row,
            rows,
            kv_head: CUBE_POS_Z as usize,
            common,
            stride,
        }
    }

    /// The row and the head of a query.
    pub(super) fn row_of(&self, query: usize, #[comptime] shape: Shape) -> usize {
        self.first_row + query / shape.heads
    }

    pub(super) fn head_of(&self, query: usize, #[comptime] shape: Shape) -> usize {
        self.kv_head * shape.heads + query % shape.heads
    }

    /// Writes a vector of a query's weighted sum of values, relative to its largest score, where there is such a row.
    pub(super) fn write<O: Float, N: Size>(
        &self,
        out: &mut Tensor<Vector<O, N>>,
        query: usize,
        vector: usize,
        sum: Vector<f32, N>,
        largest: f32,
        total: f32,
        #[comptime] shape: Shape,
    ) {
        let row = self.row_of(query, shape);
        if row < self.rows {
            let heads = comptime!(shape.heads * shape.kv_heads);
            let head = self.head_of(query, shape);
            if shape.parts {
                let part = CUBE_POS_X as usize;
                let parts = CUBE_COUNT_X as usize;
                let line = ((row * parts + part) * heads + head) * comptime!(shape.value_width + 2);
                out[line + vector] = Vector::cast_from(sum);
                if vector == 0 {
                    out[line + shape.value_width] =
                        Vector::cast_from(Vector::<f32, N>::new(largest));
                    out[line + comptime!(shape.value_width + 1)] =
                        Vector::cast_from(Vector::<f32, N>::new(total));
                }
            } else {
                let line = (row * heads + head) * shape.value_width;
                out[line + vector] = Vector::cast_from(sum / Vector::new(total));
            }
        }
    }
}

/// Some slots, and the queries that look at them.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Tile {
    /// Whether all rows of the team look at it, and else which of them, and that row's number.
    pub(super) is_shared: bool,
    pub(super) member: usize,
    row: usize,
    /// The place of that row's new token, and whether it opens its slot.
    newest: usize,
    opens: bool,
    /// From which of a row's slots to which; none are left where `end` is not above `begin`.
    pub(super) begin: usize,
    pub(super) end: usize,
    pub(super) first_query: usize,
    pub(super) queries: usize,
}

#[cube]
impl Tile {
    /// The tile of this number: first those that all rows share, then each row's own.
    pub(super) fn new<I: Int>(
        number: usize,
        team: &Team,
        tiles: &TeamTiles,
        table: &Tensor<I>,
        #[comptime] shape: Shape,
    ) -> Tile {
        let (shared_tiles, own_tiles) = (tiles.shared as usize, tiles.own as usize);
        let mut is_shared = false.runtime();
        let mut own_number = number;
        if comptime!(shape.team > 1) {
            is_shared = number < shared_tiles;
            own_number = select(is_shared, 0, number - shared_tiles);
        }
        let member = own_number / own_tiles;
        let row = min(team.first_row + member, team.rows - 1);
        let start = usize::cast_from(table[row * table.shape(1)]);
        let newest = newest(table, row, team.stride);
        let mut begin = team.common + own_number % own_tiles * shape.tile;
        let mut end = newest + 1;
        let mut first_query = member * shape.heads;
        let mut queries = shape.heads.runtime();
        if comptime!(shape.team > 1) && is_shared {
            begin = number * shape.tile;
            end = team.common;
            first_query = 0;
            queries = comptime!(shape.queries()).runtime();
        } else if member >= shape.team || team.first_row + member >= team.rows {
            end = 0;
        }
        Tile {
            is_shared,
            member: min(member, comptime!(shape.team - 1)),
            row,
            newest,
            opens: start.is_multiple_of(team.stride),
            begin,
            end,
            first_query: min(first_query, comptime!(shape.queries() - shape.heads)),
            queries,
        }
    }

    /// Whether any of this many queries from this one on looks at it.
    pub(super) fn is_looked_at_by(&self, first_query: usize, #[comptime] queries: usize) -> bool {
        first_query < self.first_query + self.queries && first_query + queries > self.first_query
    }

    /// Brings the slots to shared memory, the rows of `line` vectors there, and writes the new token's slot, merged,
    /// to the pool as well. Entries of the table are held within the pool.
    pub(super) fn load<F: Float, P: Float, I: Int, N: Size>(
        &self,
        team: &Team,
        row: &Tensor<Vector<F, N>>,
        rotary: &ComptimeOption<Tensor<Vector<f32, N>>>,
        pool: &mut Tensor<Vector<P, N>>,
        table: &Tensor<I>,
        gate_of: &SharedMemory<f32>,
        tile: &mut SharedMemory<Vector<P, N>>,
        #[comptime] line: usize,
        #[comptime] shape: Shape,
    ) {
        let unit = UNIT_POS as usize;
        for i in range_stepped(unit, comptime!(shape.tile * shape.tile_width), shape.units) {
            let number = i / shape.tile_width;
            let slot_number = self.begin + number;
            let channel = i % shape.tile_width;
            let mut held = Vector::<P, N>::new(P::from_int(0));
            if slot_number < self.end {
                let slot = usize::cast_from(table[self.row * table.shape(1) + 1 + slot_number]);
                let slot = min(slot, pool.shape(0) - 1);
                let column = column(channel, team.kv_head, shape);
                let place = slot * shape.slot_width + column;
                held = pool[place];
                if slot_number == self.newest && !self.is_shared {
                    let new = self.row * shape.slot_width + column;
                    let new = turned(row, new, self.row, channel, rotary, shape);
                    let before = Vector::<f32, N>::cast_from(held);
                    let gate = gate_of[self.member];
                    held = Vector::cast_from(merge(new, before, gate, self.opens, channel, shape));
                    pool[place] = held;
                }
            }
            tile[number * line + channel] = held;
        }
    }
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
pub(super) fn turned<F: Float, N: Size>(
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

/// The sum over `lanes` neighbouring units of a plane, in each of them.
#[cube]
pub(super) fn lanes_sum(x: f32, #[comptime] lanes: usize) -> f32 {
    let mut sum = x;
    #[unroll]
    for step in 0..comptime!(lanes.ilog2()) {
        sum += plane_shuffle_xor(sum, comptime!(1u32 << step));
    }
    sum
}

/// The largest of `lanes` neighbouring units of a plane, in each of them.
#[cube]
pub(super) fn lanes_max(x: f32, #[comptime] lanes: usize) -> f32 {
    let mut most = x;
    #[unroll]
    for step in 0..comptime!(lanes.ilog2()) {
        most = max(most, plane_shuffle_xor(most, comptime!(1u32 << step)));
    }
    most
}
