//! Sizes that the kernel is compiled for, from problem and device: what units of a cube do, or planes on tensor cores.

use std::ops::Range;

use burn::tensor::DType;
use burn_cubecl::cubecl;
use cubecl::ir::DeviceProperties;

use super::super::{
    super::{DecodeProblem, SlotLayout},
    device::{SUMS, plane_size, tensor_cores},
    fallback::Unavailable,
};
use crate::rope::RotaryLayout;

/// Units of a cube, at most; WebGPU's default limit.
const UNITS: usize = 256;
/// How much more shared memory a cube takes with tensor cores, whose queries stay in it, and if need be.
const MEMORY_OF_MATRICES: [usize; 2] = [4, 8];
/// Queries that are worth tensor cores, at least: with fewer, most of a product is computed for nothing.
const QUERIES: usize = 8;
/// Bytes that a matrix in shared memory is aligned to, and that its lines are an odd number of times apart: so lines
/// lie in different banks.
pub(super) const LINE: usize = 32;
/// Slots that a unit compares at a time.
const BLOCK: usize = 4;
/// Units that share a comparison, at least: neighbours then read neighbouring channels, from different banks.
const LANES: usize = 8;

/// Sizes that the kernel is compiled for. All widths are in vectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Shape {
    /// Elements of a vector.
    pub(super) vector: usize,
    /// Query heads of one key/value head.
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    /// Rows of a team.
    pub(super) team: usize,
    pub(super) key_width: usize,
    pub(super) value_width: usize,
    /// A slot in the pool.
    pub(super) slot_width: usize,
    /// What of a slot one key/value head needs, and where in that its values start: at 0 in a latent, which is
    /// key and value at once, and after the keys in a dense slot.
    pub(super) tile_width: usize,
    pub(super) values_at: usize,
    /// Whether the new token is gated and merged.
    pub(super) gated: bool,
    pub(super) turn: Option<Turn>,
    /// Units of a cube, a power of two.
    pub(super) units: usize,
    /// Slots of a tile.
    pub(super) tile: usize,
    /// Slots that are compared together, and units that share the work: with tensor cores, that of weighing the scores of
    /// a query.
    pub(super) block: usize,
    pub(super) lanes: usize,
    /// Whether those units add up by plane operations, and else through this many floats of shared memory.
    pub(super) planes: bool,
    pub(super) scratch: usize,
    /// Units side by side on the channels of a value, and how many such lines of units there are; planes, with tensor
    /// cores.
    pub(super) sum_columns: usize,
    pub(super) sum_groups: usize,
    /// Queries and vectors of channels that a unit sums; rows and columns of matrices of both that a plane does.
    pub(super) sum_queries: usize,
    pub(super) sum_vectors: usize,
    /// Products on tensor cores.
    pub(super) matrices: Option<Matrices>,
    /// Whether a row has several parts, so that partial results are written.
    pub(super) parts: bool,
}

/// A rotary embedding of queries and new keys. Widths are in vectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Turn {
    /// Its first channels, and how many there are.
    pub(super) first: usize,
    pub(super) width: usize,
    /// From one channel of a pair to the other; 0 where they are neighbours in a vector.
    pub(super) distance: usize,
}

impl Turn {
    /// Of vectors of this many elements.
    pub(super) fn new(channels: Range<usize>, layout: RotaryLayout, vector: usize) -> Self {
        let width = channels.len() / vector;
        Self {
            first: channels.start / vector,
            width,
            distance: match layout {
                RotaryLayout::HalfSplit => width / 2,
                RotaryLayout::Interleaved => usize::from(vector == 1),
            },
        }
    }
}

impl Shape {
    /// Heads of all rows of a team.
    pub(super) const fn queries(&self) -> usize {
        self.team * self.heads
    }

    /// Sums that a unit keeps.
    pub(super) const fn sums(&self) -> usize {
        let each = match self.matrices {
            Some(matrices) => matrices.m * matrices.n / matrices.plane,
            None => self.vector,
        };
        self.sum_queries * self.sum_vectors * each
    }
}

/// How products are computed on tensor cores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Matrices {
    /// Rows, columns and depth of a product: queries, slots and channels where scores are computed, and queries, channels
    /// and slots where values are summed.
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) k: usize,
    /// Units that compute a product together.
    pub(super) plane: usize,
    /// Queries, and those that fill the last product up.
    pub(super) queries: usize,
    /// From one query, or slot of the tile, to the next, in vectors.
    pub(super) query_line: usize,
    pub(super) tile_line: usize,
    /// Planes that share the scores of the same queries and slots.
    pub(super) splits: usize,
}

/// The element types of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Types {
    /// Queries and results.
    pub(super) float: DType,
    /// New rows, and gates: as queries, or there is no kernel.
    pub(super) row: DType,
    pub(super) gates: Option<DType>,
    /// 32 bits, or there is no kernel.
    pub(super) rotary: Option<DType>,
    pub(super) pool: DType,
    pub(super) table: DType,
}

/// What all sizes of a step have in common.
#[derive(Clone, Copy)]
pub(super) struct Frame<'a> {
    pub(super) problem: &'a DecodeProblem,
    pub(super) types: Types,
    pub(super) vector: usize,
    pub(super) turn: Option<Turn>,
    pub(super) device: &'a DeviceProperties,
}

/// Sizes for this many rows a team, and at most this many slots a tile and bytes of shared memory.
pub(super) fn shape(
    frame: &Frame,
    team: usize,
    tile: usize,
    memory: usize,
) -> Result<Shape, Unavailable> {
    let (layout, vector) = (frame.problem.layout, frame.vector);
    let kv_heads = layout.kv_heads();
    let heads = frame.problem.heads / kv_heads;
    let [key_width, value_width, slot_width] =
        [layout.key_width(), layout.value_width(), layout.width()].map(|width| width / vector);
    let (tile_width, values_at) = match layout {
        SlotLayout::Dense { .. } => (2 * key_width, key_width),
        SlotLayout::Latent { .. } => (key_width, 0),
    };

    let most_units = frame.device.hardware.max_units_per_cube as usize;
    let shape = Shape {
        vector,
        heads,
        kv_heads,
        team,
        key_width,
        value_width,
        slot_width,
        tile_width,
        values_at,
        turn: frame.turn,
        gated: frame.types.gates.is_some() && matches!(layout, SlotLayout::Latent { .. }),
        units: UNITS.min(most_units),
        tile,
        block: 1,
        lanes: 1,
        planes: true,
        scratch: 0,
        sum_columns: 1,
        sum_groups: 1,
        sum_queries: 1,
        sum_vectors: 1,
        matrices: None,
        parts: false,
    };
    match with_matrices(shape, frame, memory) {
        Some(shape) => Ok(shape),
        None => with_units(shape, frame, memory),
    }
}

/// The same with sums of their own for all units.
fn with_units(shape: Shape, frame: &Frame, memory: usize) -> Result<Shape, Unavailable> {
    let Shape {
        vector,
        team,
        key_width,
        value_width,
        tile_width,
        mut tile,
        ..
    } = shape;
    let queries = shape.queries();
    let units = (queries * value_width)
        .next_power_of_two()
        .clamp(32, shape.units);
    let sum_columns = value_width.min(units);
    let sum_groups = units / sum_columns;
    let (sum_queries, sum_vectors) = (
        queries.div_ceil(sum_groups),
        value_width.div_ceil(sum_columns),
    );
    let sums = sum_queries * sum_vectors * vector;
    if sums > SUMS {
        return Err(Unavailable::Sums { sums, limit: SUMS });
    }

    let available = memory.min(frame.device.hardware.max_shared_memory_size);
    let plane = plane_size(frame.device);
    let with_tile = |tile: usize| {
        let block = BLOCK.min(tile);
        let tasks = queries * tile / block;
        let most = key_width.next_power_of_two().min(32);
        let lanes = (units / tasks.next_power_of_two()).clamp(LANES.min(most), most);
        let planes = plane > 1 && lanes <= plane;
        // Without planes a unit of a task's adds up the sums of a slot.
        let lanes = if planes { lanes } else { lanes.max(block) };
        let scratch = if planes { units } else { block * units };
        let floats = scratch + 2 * queries * tile + 2 * queries + team;
        let bytes = 4 * floats + tile * tile_width * vector * frame.types.pool.size();
        (block, lanes, planes, scratch, bytes)
    };
    while tile > 1 && with_tile(tile).4 > available {
        tile /= 2;
    }
    let (block, lanes, planes, scratch, needed) = with_tile(tile);
    if needed > available {
        return Err(Unavailable::SharedMemory { needed, available });
    }
    Ok(Shape {
        units,
        tile,
        block,
        lanes,
        planes,
        scratch,
        sum_columns,
        sum_groups,
        sum_queries,
        sum_vectors,
        ..shape
    })
}

/// The same with tensor cores, where the device has them for such queries and slots.
fn with_matrices(shape: Shape, frame: &Frame, memory: usize) -> Option<Shape> {
    let Types { float, pool, .. } = frame.types;
    let queries = shape.queries();
    if float != pool || queries < QUERIES {
        return None;
    }
    let mut sizes = tensor_cores(pool, frame.device);
    // Few rows for nothing, and then about as many rows as columns.
    sizes.sort_by_key(|[m, n, _]| (queries.next_multiple_of(*m), m.abs_diff(*n)));
    MEMORY_OF_MATRICES.into_iter().find_map(|factor| {
        sizes
            .iter()
            .find_map(|size| with_matrices_of(*size, shape, frame, factor * memory))
    })
}

/// With products of this size, in at most this much memory.
fn with_matrices_of(
    [m, n, k]: [usize; 3],
    shape: Shape,
    frame: &Frame,
    memory: usize,
) -> Option<Shape> {
    let Shape { vector, units, .. } = shape;
    let bytes = frame.types.pool.size();
    let [keys, values, values_at] =
        [shape.key_width, shape.value_width, shape.values_at].map(|width| width * vector);
    let fits = keys.is_multiple_of(k)
        && [values, values_at]
            .iter()
            .all(|width| width.is_multiple_of(n))
        && [n, k].iter().all(|size| size.is_multiple_of(vector));
    if !fits {
        return None;
    }

    let line = |width: usize| {
        let elements = LINE / bytes;
        let lines = width.div_ceil(elements);
        (lines + 1 - lines % 2) * elements / vector
    };
    let (query_line, tile_line) = (line(keys), line(shape.tile_width * vector));
    let available = memory.min(frame.device.hardware.max_shared_memory_size);
    let queries = shape.queries().next_multiple_of(m);
    let plane = frame.device.hardware.plane_size_min as usize;
    let (planes, rows, columns) = (units / plane, queries / m, values / n);
    let with_tile = |tile: usize| {
        let splits = (planes / (rows * (tile / n))).clamp(1, keys / k);
        let scratch = units.max(planes * m * n).max(splits * queries * tile);
        let halves = (queries * query_line + tile * tile_line) * vector + queries * tile;
        let words = scratch + 4 * queries + 1 + shape.team;
        (splits, scratch, halves * bytes + 4 * words)
    };
    let tile = (0..=shape.tile.ilog2())
        .rev()
        .map(|bits| 1 << bits)
        .filter(|tile: &usize| tile.is_multiple_of(n) && tile.is_multiple_of(k))
        .find(|tile| with_tile(*tile).2 <= available)?;
    let (splits, scratch, _) = with_tile(tile);
    let sum_columns = columns.min(planes);
    let sum_groups = planes / sum_columns;
    let shape = Shape {
        tile,
        lanes: (units / queries.next_power_of_two()).clamp(1, tile.min(plane)),
        scratch,
        sum_columns,
        sum_groups,
        sum_queries: rows.div_ceil(sum_groups),
        sum_vectors: columns.div_ceil(sum_columns),
        matrices: Some(Matrices {
            m,
            n,
            k,
            plane,
            queries,
            query_line,
            tile_line,
            splits,
        }),
        ..shape
    };
    (shape.sums() <= SUMS).then_some(shape)
}
