//! How a decoding step is laid out on a device: rows of a team, slots of a tile, and the number of cubes.

use burn::tensor::DType;
use burn_cubecl::cubecl;
use cubecl::ir::DeviceProperties;

use super::{
    super::{
        super::DecodeProblem,
        device::{SUMS, is_float, is_usable, multiprocessors, vector},
        fallback::Unavailable,
    },
    shape::{Frame, Shape, Turn, Types, shape},
};
use crate::rope::RotaryLayout;

/// Shared memory of a cube, at most, in bytes: WebGPU's default limit. Where there is more, more cubes share a
/// multiprocessor.
const SHARED_MEMORY: usize = 16 * 1024;
/// Slots of a tile, at most. Browsers clear shared memory before every launch, so there it is to be little.
const TILE: usize = if cfg!(target_family = "wasm") { 8 } else { 32 };
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

#[cfg(test)]
mod tests {
    use super::{super::super::super::SlotLayout, *};
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
