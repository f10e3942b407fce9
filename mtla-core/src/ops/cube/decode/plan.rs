//! How a decoding step is laid out on a device: sizes that are compiled into the kernel, and the number of cubes.

use std::ops::Range;

use burn::tensor::DType;
use burn_cubecl::cubecl;
use cubecl::ir::DeviceProperties;

use super::super::{
    super::{DecodeProblem, SlotLayout},
    device::{SUMS, is_float, is_usable, multiprocessors, plane_size, tensor_cores, vector},
    fallback::Unavailable,
};
use crate::rope::RotaryLayout;

/// Units of a cube, at most; WebGPU's default limit.
const UNITS: usize = 256;
/// Shared memory of a cube, at most, in bytes: WebGPU's default limit. Where there is more, more cubes share a
/// multiprocessor.
const SHARED_MEMORY: usize = 16 * 1024;
/// Slots of a tile, at most. Browsers clear shared memory before every launch, so there it is to be little.
const TILE: usize = if cfg!(target_family = "wasm") { 8 } else { 32 };
/// How much more shared memory a cube takes with tensor cores, whose queries stay in it, and if need be.
const MEMORY_OF_MATRICES: [usize; 2] = [4, 8];
/// Queries that are worth tensor cores, at least: with fewer, most of a product is computed for nothing.
const QUERIES: usize = 8;
/// Bytes that a matrix in shared memory is aligned to, and that its lines are an odd number of times apart: so lines
/// lie in different banks.
const LINE: usize = 32;
/// Slots that a unit compares at a time.
const BLOCK: usize = 4;
/// Units that share a comparison, at least: neighbours then read neighbouring channels, from different banks.
const LANES: usize = 8;
/// Cubes that keep a multiprocessor busy, and the slots that are worth a cube of their own.
const CUBES: usize = 4;
const SLOTS: usize = 64;
/// Rows of a team, where they share slots.
const TEAMS: [usize; 7] = [2, 3, 4, 5, 6, 8, 10];
/// Sums that a unit keeps for a team, at most: with more, few cubes find room on a multiprocessor.
const TEAM_SUMS: usize = SUMS / 2;

/// What the plans are called that a step may be laid out by: the reckoned one, and those that the feature `autotune`
/// measures beside it.
pub const DECODE_PLANS: [&str; 6] = [
    "reckoned",
    "half-tile",
    "double-tile",
    "half-parts",
    "double-parts",
    "other-team",
];

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
    fn new(channels: Range<usize>, layout: RotaryLayout, vector: usize) -> Self {
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
    const fn sums(&self) -> usize {
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

/// A step as it will be launched.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct DecodePlan {
    pub(super) shape: Shape,
    pub(super) types: Types,
    pub(super) rows: usize,
    pub(super) teams: usize,
    /// Parts that every team's tiles are divided into.
    pub(super) parts: usize,
    /// Tiles of slots that a team has in common, and of a row's own, in the team that has most.
    pub(super) tiles: [usize; 2],
    pub(super) stride: u32,
    pub(super) scale: f32,
}

impl DecodePlan {
    pub(super) fn new(
        problem: &DecodeProblem,
        rotary: Option<RotaryLayout>,
        types: Types,
        device: &DeviceProperties,
    ) -> Result<Self, Unavailable> {
        check_types(types, device)?;
        let (rows, kv_heads) = (problem.starts.len(), problem.layout.kv_heads());
        let (_, most_rows, most_heads) = device.hardware.max_cube_count;
        if rows == 0 || rows > most_rows as usize || kv_heads > most_heads as usize {
            return Err(Unavailable::Grid { rows, kv_heads });
        }
        let layout = problem.layout;
        let mut widths = vec![layout.key_width(), layout.value_width()];
        let mut bytes = types.float.size().max(types.pool.size());
        if let Some(table) = types.rotary {
            bytes = bytes.max(table.size());
        }
        if rotary == Some(RotaryLayout::HalfSplit) {
            widths.push(layout.rotated().len() / 2);
        }
        let vector = vector(&widths, bytes, device);
        let frame = Frame {
            problem,
            types,
            vector,
            turn: rotary.map(|rotary| Turn::new(layout.rotated(), rotary, vector)),
            device,
        };
        let alone = frame.plan(1, TILE, SHARED_MEMORY)?;
        // A tenth less, or it is not worth it.
        let team = frame
            .team()
            .filter(|team| team.work() * 10 < alone.work() * 9);
        Ok(team.unwrap_or(alone))
    }

    /// Plans of the same step that a device may like better, this one first. It stands in for those that are not to
    /// be had: with half and twice the tile, the latter in twice the memory if need be, half and twice the parts, and
    /// with a team where it has none or the reverse.
    pub(super) fn variants(
        self,
        problem: &DecodeProblem,
        device: &DeviceProperties,
    ) -> [Self; DECODE_PLANS.len()] {
        let Shape {
            team,
            tile,
            vector,
            turn,
            ..
        } = self.shape;
        let frame = Frame {
            problem,
            types: self.types,
            vector,
            turn,
            device,
        };
        let with_tile = |tile: usize, memory| {
            let plan = frame.plan(team, tile.max(1), memory);
            plan.unwrap_or(self)
        };
        let most = self.tiles[0] + team * self.tiles[1];
        let most = most.min(device.hardware.max_cube_count.0 as usize);
        let with_parts = |parts: usize| {
            let parts = parts.clamp(1, most);
            let shape = Shape {
                parts: parts > 1,
                ..self.shape
            };
            Self {
                shape,
                parts,
                ..self
            }
        };
        let other = if team > 1 {
            frame.plan(1, TILE, SHARED_MEMORY).ok()
        } else {
            frame.team()
        };
        [
            self,
            with_tile(tile / 2, SHARED_MEMORY),
            with_tile(2 * tile, 2 * SHARED_MEMORY),
            with_parts(self.parts / 2),
            with_parts(2 * self.parts),
            other.unwrap_or(self),
        ]
    }

    /// About how long all teams take: loading a slot costs as much as comparing it with the queries of two rows.
    fn work(&self) -> usize {
        let Shape { team, tile, .. } = self.shape;
        let [shared, own] = self.tiles;
        self.teams * tile * (shared * (2 + team) + own * team * 3)
    }
}

/// What all plans of a step have in common.
#[derive(Clone, Copy)]
struct Frame<'a> {
    problem: &'a DecodeProblem,
    types: Types,
    vector: usize,
    turn: Option<Turn>,
    device: &'a DeviceProperties,
}

impl Frame<'_> {
    /// Of these sizes at most, as [`shape`] has them.
    fn plan(&self, team: usize, tile: usize, memory: usize) -> Result<DecodePlan, Unavailable> {
        let problem = self.problem;
        let mut shape = shape(self, team, tile, memory)?;
        let tiles = tiles(problem, &shape);
        let cubes = CUBES * multiprocessors(self.device);
        let rows = problem.starts.len();
        let teams = rows.div_ceil(team);
        let tiles_of_all = tiles[0] + team * tiles[1];
        let most = (tiles_of_all * shape.tile)
            .div_ceil(SLOTS)
            .min(tiles_of_all);
        let parts = (cubes / (teams * shape.kv_heads)).clamp(1, most);
        shape.parts = parts > 1;
        Ok(DecodePlan {
            shape,
            types: self.types,
            rows,
            teams,
            parts,
            tiles,
            stride: problem.stride as u32,
            scale: problem.scale as f32,
        })
    }

    /// The quickest of the plans with several rows a team, where rows share slots.
    fn team(&self) -> Option<DecodePlan> {
        let (rows, common) = (self.problem.starts.len(), &self.problem.common);
        TEAMS
            .into_iter()
            .filter(|team| *team <= rows && common.iter().any(|n| *n > 0))
            .filter_map(|team| self.plan(team, TILE, SHARED_MEMORY).ok())
            .filter(|plan| plan.shape.sums() <= TEAM_SUMS)
            .min_by_key(DecodePlan::work)
    }
}

/// Tiles of slots that a team has in common, and of a row's own: the most that any team or row has.
fn tiles(problem: &DecodeProblem, shape: &Shape) -> [usize; 2] {
    let (mut shared, mut own) = (0, 1);
    let rows = problem.starts.len();
    for first in (0..rows).step_by(shape.team) {
        let team = first..rows.min(first + shape.team);
        let of_all = problem.shared(team.clone());
        let longest = team.map(|row| problem.slots(row)).max().unwrap_or_default();
        shared = shared.max(of_all.div_ceil(shape.tile));
        own = own.max((longest - of_all).div_ceil(shape.tile));
    }
    [shared, own]
}

fn check_types(types: Types, device: &DeviceProperties) -> Result<(), Unavailable> {
    let float = |dtype| is_float(dtype, device);
    let missing = |operand, dtype| Err(Unavailable::Type { operand, dtype });
    match types {
        Types { float: dtype, .. } if !float(dtype) => missing("queries", dtype),
        Types { row, .. } if row != types.float => missing("new rows", row),
        Types { pool, .. } if !float(pool) => missing("a pool", pool),
        Types { table, .. } if !is_usable(table, device) => missing("a table", table),
        Types {
            gates: Some(gates), ..
        } if gates != types.float => missing("gates", gates),
        Types {
            rotary: Some(rotary),
            ..
        } if rotary != DType::F32 => missing("a rotation", rotary),
        _ => Ok(()),
    }
}

/// Sizes for this many rows a team, and at most this many slots a tile and bytes of shared memory.
fn shape(frame: &Frame, team: usize, tile: usize, memory: usize) -> Result<Shape, Unavailable> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use cubecl::{
        features::{Features, MmaConfig, Plane, TypeUsage},
        ir::{HardwareProperties, MemoryDeviceProperties, StorageType},
        profile::TimingMethod,
    };

    /// A device with the default limits of WebGPU and nothing more.
    fn webgpu() -> DeviceProperties {
        let hardware = HardwareProperties {
            load_width: 128,
            plane_size_min: 32,
            plane_size_max: 32,
            max_bindings: 8,
            max_shared_memory_size: 16 * 1024,
            max_cube_count: (65_535, 65_535, 65_535),
            max_units_per_cube: 256,
            max_cube_dim: (256, 256, 64),
            num_streaming_multiprocessors: None,
            num_cpu_cores: None,
            num_tensor_cores: None,
            min_tensor_cores_dim: None,
            max_vector_size: 4,
        };
        let memory = MemoryDeviceProperties {
            max_page_size: 128 << 20,
            alignment: 256,
        };
        let mut device =
            DeviceProperties::new(Features::default(), memory, hardware, TimingMethod::System);
        for dtype in [DType::F32, DType::I32] {
            device.register_type_usage(StorageType::from(dtype), TypeUsage::all());
        }
        device
    }

    const TYPES: Types = Types {
        float: DType::F32,
        row: DType::F32,
        gates: None,
        rotary: None,
        pool: DType::F32,
        table: DType::I32,
    };

    fn problem(layout: SlotLayout, heads: usize, rows: usize, max_slots: usize) -> DecodeProblem {
        DecodeProblem {
            heads,
            layout,
            stride: 1,
            starts: vec![max_slots - 1; rows],
            max_slots,
            common: vec![0; rows],
            scale: 1.0,
        }
    }

    /// A plan, and those that are measured beside it.
    fn plans(problem: &DecodeProblem, device: &DeviceProperties) -> Vec<DecodePlan> {
        let plan = DecodePlan::new(problem, None, TYPES, device).unwrap();
        #[cfg(all(feature = "autotune", not(target_family = "wasm")))]
        return plan.variants(problem, device).to_vec();
        #[cfg(not(all(feature = "autotune", not(target_family = "wasm"))))]
        vec![plan]
    }

    fn assert_is_inside_the_limits_of_webgpu(plan: &DecodePlan) {
        let s = plan.shape;
        let floats = s.scratch + 2 * s.queries() * (s.tile + 1) + s.team;
        let floats = floats + s.tile * s.tile_width * s.vector;
        assert!(4 * floats <= 16 * 1024, "{s:?}");
        assert!(s.units <= 256 && s.units.is_power_of_two());
        assert!(s.tile.is_multiple_of(s.block) && s.units.is_multiple_of(s.lanes));
        assert!(s.planes && s.lanes <= 32 || s.scratch >= s.block * s.units);
        assert!(s.sum_queries * s.sum_groups >= s.queries());
        assert!(s.sum_vectors * s.sum_columns >= s.value_width);
        assert!((1..=1000).contains(&plan.parts) && s.parts == (plan.parts > 1));
    }

    #[test]
    fn plans_are_inside_the_limits_of_webgpu() {
        let mut device = webgpu();
        for planes in [false, true] {
            if planes {
                device.features.plane.insert(Plane::Ops);
            }
            for heads in 1..=32 {
                for width in 1..=128 {
                    let layouts = [
                        SlotLayout::Latent {
                            rank: 4 * width,
                            rope_dim: 64,
                        },
                        SlotLayout::Latent {
                            rank: width,
                            rope_dim: 0,
                        },
                        SlotLayout::Dense {
                            kv_heads: 1,
                            head_dim: width,
                        },
                    ];
                    for layout in layouts {
                        let problem = problem(layout, heads, 3, 1000);
                        plans(&problem, &device)
                            .iter()
                            .for_each(assert_is_inside_the_limits_of_webgpu);
                    }
                }
            }
        }
    }

    /// A device with planes of 32, tensor cores for 16 bits, and more shared memory.
    fn nvidia() -> DeviceProperties {
        let mut device = webgpu();
        device.features.plane.insert(Plane::Ops);
        device.hardware.max_shared_memory_size = 227 * 1024;
        let [half, float] = [DType::F16, DType::F32].map(StorageType::from);
        device.register_type_usage(half, TypeUsage::all());
        for (m, n, k) in [(16, 16, 16), (32, 8, 16), (8, 32, 16)] {
            device.features.matmul.cmma.insert(MmaConfig {
                a_type: half,
                b_type: half,
                cd_type: float,
                m,
                n,
                k,
            });
        }
        device
    }

    fn half(problem: &DecodeProblem) -> Result<DecodePlan, Unavailable> {
        let types = Types {
            float: DType::F16,
            row: DType::F16,
            pool: DType::F16,
            ..TYPES
        };
        DecodePlan::new(problem, None, types, &nvidia())
    }

    #[test]
    fn many_queries_are_computed_on_tensor_cores() {
        let latent = |rank, rope_dim| SlotLayout::Latent { rank, rope_dim };
        let size = |heads, layout| {
            let plan = half(&problem(layout, heads, 3, 1000)).unwrap();
            plan.shape.matrices.map(|m| [m.m, m.n, m.k])
        };
        // As few rows for nothing as may be, and then squares.
        assert_eq!(size(8, latent(256, 32)), Some([8, 32, 16]));
        assert_eq!(size(16, latent(512, 64)), Some([16, 16, 16]));
        assert_eq!(size(17, latent(256, 32)), Some([8, 32, 16]));
        // Values of 48 channels are not whole matrices of 32 columns.
        assert_eq!(size(8, latent(48, 16)), Some([16, 16, 16]));
        // Too few heads of a key, and widths that leave something over.
        let dense = SlotLayout::Dense {
            kv_heads: 8,
            head_dim: 128,
        };
        assert_eq!(size(32, dense), None);
        assert_eq!(size(8, latent(250, 32)), None);
        // 32 bits are computed with as they are.
        let wide = problem(latent(256, 32), 8, 3, 1000);
        let plan = DecodePlan::new(&wide, None, TYPES, &nvidia()).unwrap();
        assert_eq!(plan.shape.matrices, None);
    }

    #[test]
    fn products_fit_each_other_and_the_memory() {
        let mut count = 0;
        for heads in 1..=64 {
            for rank in (16..=512).step_by(16) {
                let layouts = [
                    SlotLayout::Latent { rank, rope_dim: 32 },
                    SlotLayout::Dense {
                        kv_heads: 1,
                        head_dim: rank,
                    },
                ];
                for layout in layouts {
                    let beams = DecodeProblem {
                        common: [&[0][..], &[900; 9]].concat(),
                        ..problem(layout, heads, 10, 1000)
                    };
                    let Ok(plan) = half(&beams) else { continue };
                    let s = plan.shape;
                    let Some(m) = s.matrices else { continue };
                    count += 1;
                    let [keys, values, values_at] =
                        [s.key_width, s.value_width, s.values_at].map(|width| width * s.vector);
                    assert!(keys.is_multiple_of(m.k) && values.is_multiple_of(m.n));
                    assert!(values_at.is_multiple_of(m.n));
                    assert!(s.tile.is_multiple_of(m.n) && s.tile.is_multiple_of(m.k));
                    assert!(m.queries >= s.queries() && m.queries.is_multiple_of(m.m));
                    assert!(m.query_line >= s.key_width && m.tile_line >= s.tile_width);
                    let bytes = [m.query_line, m.tile_line].map(|line| 2 * s.vector * line);
                    assert!(bytes.iter().all(|line| line % 64 == 32), "{bytes:?}");
                    let planes = s.units / m.plane;
                    assert!(s.sum_queries * s.sum_groups * m.m >= m.queries);
                    assert!(s.sum_vectors * s.sum_columns * m.n >= values);
                    assert!(s.sum_groups * s.sum_columns <= planes);
                    assert!(s.scratch >= planes * m.m * m.n && s.scratch >= s.units);
                    assert!(s.scratch >= m.splits * m.queries * s.tile);
                    assert!(m.splits >= 1 && m.splits * m.k <= keys);
                    assert!(s.lanes <= m.plane && s.tile.is_multiple_of(s.lanes));
                    assert!(s.sums() <= SUMS, "{s:?}");
                    let halves = (m.queries * m.query_line + s.tile * m.tile_line) * s.vector;
                    let halves = halves + m.queries * s.tile;
                    let words = s.scratch + 4 * m.queries + 1 + s.team;
                    assert!(2 * halves + 4 * words <= 128 * 1024, "{s:?}");
                }
            }
        }
        assert!(count > 1000, "{count}");
    }

    #[test]
    fn few_long_rows_are_divided_and_many_are_not() {
        let layout = SlotLayout::Latent {
            rank: 256,
            rope_dim: 32,
        };
        let parts = |rows, max_slots| {
            let problem = problem(layout, 8, rows, max_slots);
            DecodePlan::new(&problem, None, TYPES, &webgpu())
                .unwrap()
                .parts
        };
        let cubes = CUBES * multiprocessors(&webgpu());
        assert_eq!(parts(1, 1), 1);
        assert_eq!(parts(1, 10_000), cubes);
        assert_eq!(parts(40, 10_000), cubes / 40);
        assert_eq!(parts(500, 10_000), 1);
    }

    #[test]
    fn rows_that_share_most_of_their_slots_are_a_team() {
        let layout = SlotLayout::Latent {
            rank: 256,
            rope_dim: 32,
        };
        let plan = |common: &[usize], max_slots| {
            let problem = DecodeProblem {
                common: common.to_vec(),
                ..problem(layout, 8, common.len(), max_slots)
            };
            DecodePlan::new(&problem, None, TYPES, &webgpu()).unwrap()
        };
        let beams = [0, 200, 200, 200, 200, 200, 200, 200];
        let two_prompts = [&beams[..], &beams].concat();
        let team = plan(&two_prompts, 230).shape.team;
        assert!(team > 1 && 8 % team == 0, "{team}");
        let tile = plan(&two_prompts, 230).shape.tile;
        let [shared, own] = [200usize.div_ceil(tile), 30usize.div_ceil(tile)];
        assert_eq!(plan(&two_prompts, 230).tiles, [shared, own]);
        // The newest slot is each row's own, whatever is said of it.
        let all = plan(&[0, 200, 200, 200], 200);
        assert_eq!(all.tiles, [199usize.div_ceil(all.shape.tile), 1]);
        for little in [&[0; 8][..], &[0, 3, 3, 3, 3, 3, 3, 3]] {
            assert_eq!(plan(little, 230).shape.team, 1);
            assert_eq!(plan(little, 230).tiles[0], 0);
        }
    }

    #[cfg(all(feature = "autotune", not(target_family = "wasm")))]
    #[test]
    fn variants_depart_from_the_reckoned_plan_in_one_size() {
        let layout = SlotLayout::Latent {
            rank: 64,
            rope_dim: 0,
        };
        let mut device = webgpu();
        device.hardware.max_shared_memory_size = 32 * 1024;
        let beams = DecodeProblem {
            common: [&[0][..], &[9_000; 7]].concat(),
            ..problem(layout, 8, 8, 10_000)
        };
        let all: [DecodePlan; 6] = plans(&beams, &device).try_into().unwrap();
        let [
            plan,
            half_tile,
            double_tile,
            half_parts,
            double_parts,
            other_team,
        ] = all;
        let Shape { team, tile, .. } = plan.shape;
        assert!(team > 1 && other_team.shape.team == 1);
        assert_eq!(
            [half_tile, double_tile].map(|p| p.shape.tile),
            [tile / 2, 2 * tile]
        );
        assert_eq!([half_tile, double_tile].map(|p| p.shape.team), [team; 2]);
        assert_eq!(half_parts.parts, plan.parts / 2);
        assert_eq!(double_parts.parts, 2 * plan.parts);
        // One row of one slot leaves nothing to divide, and no other row to read with.
        let [plan, _, _, half_parts, double_parts, other_team] =
            plans(&problem(layout, 8, 1, 1), &device)
                .try_into()
                .unwrap();
        assert_eq!([half_parts, double_parts, other_team], [plan; 3]);
    }

    #[test]
    fn what_a_device_lacks_is_said() {
        let layout = SlotLayout::Latent {
            rank: 64,
            rope_dim: 8,
        };
        let problem = problem(layout, 2, 1, 1);
        let half = DType::F16;
        let lacking = [
            (
                "a pool",
                Types {
                    pool: half,
                    ..TYPES
                },
            ),
            ("new rows", Types { row: half, ..TYPES }),
            (
                "gates",
                Types {
                    gates: Some(half),
                    ..TYPES
                },
            ),
        ];
        for (operand, types) in lacking {
            let dtype = half;
            let missing = Unavailable::Type { operand, dtype };
            assert_eq!(
                DecodePlan::new(&problem, None, types, &webgpu()),
                Err(missing)
            );
        }
    }
}
