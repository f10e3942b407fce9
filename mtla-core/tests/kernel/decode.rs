//! Decoding. Everything of a pool that no row holds is NaN.

#[cfg(feature = "autotune")]
mod tune;

use std::{ops::Range, time::Instant};

use burn::tensor::{DType, Distribution, Int, Tensor, TensorData, Tolerance, backend::Backend};
use burn_autodiff::Autodiff;
use burn_cubecl::cubecl::{Runtime, ir::StorageType};
use burn_flex::{Flex, FlexDevice};
use burn_wgpu::{WgpuDevice, WgpuRuntime};
use mtla_core::{
    attention::{AttentionConfig, AttentionInput},
    cache::Cache,
    ops::{
        AttentionBackend, DecodeOperands, DecodeProblem, LaunchKind, ProblemError, SlotLayout,
        cube::{self, DECODE_PLANS, KernelError, Planes, Unavailable},
        launches, plain,
    },
    rope::{RotaryConfig, RotaryLayout},
    testing::backends::{Wgpu, WgpuBare},
};

use crate::{
    alone,
    common::{Numbers, common_slots, values},
};

/// A random step and its operands as numbers.
struct Case {
    problem: DecodeProblem,
    q: Vec<f64>,
    row: Vec<f64>,
    /// With one list of positions for all rows, or one for each.
    rotary: Option<(RotaryConfig, Vec<Vec<usize>>)>,
    gates: Option<(usize, Vec<f64>)>,
    slots: usize,
    pool: Vec<f64>,
    table: Vec<i64>,
}

/// How large cases may be: numbers of the pool, and multiplications; whether rows are always beams, and whether widths
/// are multiples of 16, and heads of a key at least 8.
struct Size {
    pool: usize,
    work: usize,
    beams: bool,
    even: bool,
}

const SMALL: Size = Size {
    pool: 200_000,
    work: 3_000_000,
    beams: false,
    even: false,
};
const LARGE: Size = Size {
    pool: 1_500_000,
    work: 20_000_000,
    beams: false,
    even: false,
};
const BEAMS: Size = Size {
    pool: 400_000,
    work: 20_000_000,
    beams: true,
    even: false,
};
const EVEN: Size = Size {
    even: true,
    ..SMALL
};
const EVEN_BEAMS: Size = Size {
    even: true,
    ..BEAMS
};

impl Case {
    fn new(seed: u64, size: &Size) -> Self {
        let mut n = Numbers::new(seed);
        let (layout, heads) = if size.even {
            even_widths(&mut n)
        } else {
            widths(&mut n)
        };
        let gated = matches!(layout, SlotLayout::Latent { .. }) && n.below(8) > 0;
        let stride = if gated { 1 + n.below(5) } else { 1 };
        let width = layout.width();

        // Long rows are few: all of them together stay within the size.
        let longest = (4097.0f64.powf(n.below(1000) as f64 / 999.0)) as usize;
        let longest = longest.min(stride * size.pool / width).max(1);
        let chunks = longest.div_ceil(stride);
        let most_rows = (size.work / (chunks * heads * width)).min(size.pool / (chunks * width));
        let rows = 1 + n.below(50.min(most_rows.max(1)));
        let beams = size.beams || n.below(3) == 0;
        let starts: Vec<usize> = (0..rows)
            .map(|row| match row {
                0 => longest - 1,
                // About as long as each other.
                _ if beams => longest - 1 - n.below(longest.min(8)),
                _ => n.below(longest),
            })
            .collect();

        let (slots, tables) = tables(&mut n, &starts, stride, beams);
        // What is common is a lower bound: now and then less is said than is true.
        let mut common = common_slots(&tables);
        if n.below(4) == 0 {
            for count in &mut common {
                *count = n.below(*count + 1);
            }
        }
        let max_slots = tables.iter().map(Vec::len).max().unwrap_or(1);
        let mut pool = vec![f64::NAN; slots * width];
        for (start, slots) in starts.iter().zip(&tables) {
            // A slot that is opened now holds what somebody else left there.
            let held = start.div_ceil(stride);
            for slot in &slots[..held] {
                let values = n.normals(width);
                pool[slot * width..][..width].copy_from_slice(&values);
            }
        }
        let mut table = Vec::new();
        for (start, slots) in starts.iter().zip(&tables) {
            table.push(*start as i64);
            let last = *slots.last().expect("at least the new token's");
            let filled = slots.iter().chain(std::iter::repeat(&last)).take(max_slots);
            table.extend(filled.map(|slot| *slot as i64));
        }
        let rank = layout.value_width();
        let gates = gated.then(|| {
            let lines = chunks + n.below(3);
            let scale = (rank as f64).powf(-0.5);
            let values = n.normals(lines * (rank + 1));
            (lines, values.iter().map(|x| x * scale).collect())
        });
        Self {
            q: n.normals(rows * heads * layout.key_width()),
            row: n.normals(rows * width),
            rotary: rotary(&mut n, layout, rows),
            gates,
            slots,
            pool,
            table,
            problem: DecodeProblem {
                heads,
                layout,
                stride,
                starts,
                max_slots,
                common,
                scale: (layout.key_width() as f64).powf(-0.5),
            },
        }
    }

    fn rows(&self) -> usize {
        self.problem.starts.len()
    }

    fn operands<B: Backend>(
        &self,
        device: &B::Device,
        [dtype, pool]: [DType; 2],
    ) -> DecodeOperands<B> {
        let p = &self.problem;
        let (rows, width) = (self.rows(), p.layout.width());
        let gates = self.gates.as_ref().map(|(lines, values)| {
            tensor(values, [*lines, p.layout.value_width() + 1], device, dtype)
        });
        let rotary = self.rotary.as_ref().map(|(rope, positions)| {
            rope.rotary(p.layout.rotated().len(), positions, dtype, device)
        });
        let table = TensorData::new(self.table.clone(), [rows, 1 + p.max_slots]);
        DecodeOperands {
            q: tensor(
                &self.q,
                [rows, p.heads, p.layout.key_width()],
                device,
                dtype,
            ),
            row: tensor(&self.row, [rows, width], device, dtype),
            rotary,
            gates,
            pool: tensor(&self.pool, [self.slots, width], device, pool),
            table: Tensor::<B, 2, Int>::from_data(table, device),
        }
    }

    /// The operands rounded to these types, computed with in 64 bits.
    fn expected(&self, types: [DType; 2]) -> Found {
        let wide = |x: Vec<f64>, dtype| -> Vec<f64> {
            let n = x.len();
            TensorData::new(x, [n])
                .convert_dtype(dtype)
                .iter::<f64>()
                .collect()
        };
        let rounded = Self {
            q: wide(self.q.clone(), types[0]),
            row: wide(self.row.clone(), types[0]),
            rotary: self.rotary.clone(),
            gates: self
                .gates
                .as_ref()
                .map(|(lines, x)| (*lines, wide(x.clone(), types[0]))),
            pool: wide(self.pool.clone(), types[1]),
            table: self.table.clone(),
            problem: self.problem.clone(),
            slots: self.slots,
        };
        let operands = rounded.operands::<Flex>(&FlexDevice, [DType::F64; 2]);
        found(plain::decode(operands, &self.problem))
    }
}

fn pick<T: Copy>(n: &mut Numbers, of: &[T]) -> T {
    of[n.below(of.len())]
}

/// A layout, and heads for it.
fn widths(n: &mut Numbers) -> (SlotLayout, usize) {
    let layout = match n.below(4) {
        0 => SlotLayout::Dense {
            kv_heads: pick(n, &[1, 2, 3, 4, 8]),
            head_dim: pick(n, &[7, 16, 30, 32, 64, 128]),
        },
        // Widths of every remainder, odd ones too.
        1 => SlotLayout::Latent {
            rank: 16 + n.below(200),
            rope_dim: n.below(65),
        },
        _ => SlotLayout::Latent {
            rank: pick(n, &[16, 32, 64, 128, 192, 256, 384, 512]),
            rope_dim: pick(n, &[8, 16, 32, 64]),
        },
    };
    let heads = layout.kv_heads() * pick(n, &[1, 1, 2, 3, 4, 5, 8, 12, 16, 32]);
    let heads = if heads > 32 { layout.kv_heads() } else { heads };
    (layout, heads)
}

fn even_widths(n: &mut Numbers) -> (SlotLayout, usize) {
    let layout = match n.below(4) {
        0 => SlotLayout::Dense {
            kv_heads: pick(n, &[1, 2, 4]),
            head_dim: pick(n, &[16, 48, 64, 128]),
        },
        _ => SlotLayout::Latent {
            rank: pick(n, &[16, 48, 64, 128, 256, 512]),
            rope_dim: pick(n, &[0, 16, 32, 64]),
        },
    };
    let heads = layout.kv_heads() * pick(n, &[8, 8, 9, 12, 16, 32]);
    (layout, heads)
}

/// The rotation of most steps whose channels are pairs.
fn rotary(
    n: &mut Numbers,
    layout: SlotLayout,
    rows: usize,
) -> Option<(RotaryConfig, Vec<Vec<usize>>)> {
    let channels = layout.rotated().len();
    if channels == 0 || !channels.is_multiple_of(2) || n.below(5) == 0 {
        return None;
    }
    let rope = RotaryConfig {
        layout: pick(n, &[RotaryLayout::HalfSplit, RotaryLayout::Interleaved]),
        ..RotaryConfig::default()
    };
    let lists = pick(n, &[1, rows, rows, rows]);
    Some((rope, (0..lists).map(|_| vec![n.below(5000)]).collect()))
}

/// Slots of each row, and how many there are in all: rows share a prefix with the one before them or do not, or are
/// beams, which share most of theirs, and slots lie in runs or anywhere. The new token's slot belongs to its row alone.
fn tables(
    n: &mut Numbers,
    starts: &[usize],
    stride: usize,
    beams: bool,
) -> (usize, Vec<Vec<usize>>) {
    let share = n.below(2) == 1;
    let of_a_prompt = pick(n, &[2, 3, 4, 5, 7, 8, 10, 12]);
    let mut count = 0;
    let mut tables: Vec<Vec<usize>> = Vec::new();
    for start in starts {
        let length = start / stride + 1;
        // Completed chunks only: an open slot is copied before it is continued.
        let prefix: Vec<usize> = match tables.last() {
            Some(before) if beams && !tables.len().is_multiple_of(of_a_prompt) => {
                let common = (length - 1).min(before.len() - 1);
                before[..common - n.below(common.min(3) + 1)].to_vec()
            }
            Some(before) if share && !beams => {
                let common = (length - 1).min(before.len() - 1);
                before[..n.below(common + 1)].to_vec()
            }
            _ => Vec::new(),
        };
        let own = length - prefix.len();
        tables.push([prefix, (count..count + own).collect()].concat());
        count += own;
    }
    let slots = count + n.below(20);
    if n.below(2) == 1 {
        // A permutation of the pool.
        let mut place: Vec<usize> = (0..slots).collect();
        for i in (1..slots).rev() {
            place.swap(i, n.below(i + 1));
        }
        for slot in tables.iter_mut().flatten() {
            *slot = place[*slot];
        }
    }
    (slots, tables)
}

fn tensor<B: Backend, const D: usize>(
    values: &[f64],
    shape: [usize; D],
    device: &B::Device,
    dtype: DType,
) -> Tensor<B, D> {
    let data = TensorData::new(values.to_vec(), shape).convert_dtype(dtype);
    Tensor::from_data(data, (device, dtype))
}

/// Result and pool.
type Found = [Vec<f64>; 2];

fn found<B: Backend>((out, pool): (Tensor<B, 3>, Tensor<B, 2>)) -> Found {
    [values(out), values(pool)]
}

/// Asserts that results are within `tolerance` of the expected ones, relative to the largest, and that slots nobody
/// holds are as they were, which is NaN. Returns the largest error.
#[track_caller]
fn assert_close(found: &Found, expected: &Found, tolerance: [f64; 2], what: &str) -> f64 {
    let mut worst = 0.0f64;
    for (which, (found, expected)) in found.iter().zip(expected).enumerate() {
        let name = ["result", "pool"][which];
        assert_eq!(found.len(), expected.len(), "{what}: {name}");
        let numbers = expected.iter().filter(|x| !x.is_nan());
        let largest = numbers.fold(1.0, |a: f64, b| a.max(b.abs()));
        for (i, (a, b)) in found.iter().zip(expected).enumerate() {
            assert_eq!(
                a.is_nan(),
                b.is_nan(),
                "{what}: {name}[{i}] is {a}, not {b}"
            );
            let error = (a - b).abs() / largest;
            assert!(
                error <= tolerance[which] || a.is_nan(),
                "{what}: {name}[{i}] is {a}, not {b}, off by {error:e}"
            );
            worst = worst.max(if a.is_nan() { 0.0 } else { error });
        }
    }
    worst
}

/// Runs cases on a backend and says how many there were. Returns how many were divided into parts, and in how many
/// rows that share slots read them together.
fn compare<B: AttentionBackend<Device = WgpuDevice>>(
    name: &str,
    seeds: Range<u64>,
    size: &Size,
    types: [DType; 2],
    tolerance: [f64; 2],
) -> [u64; 2] {
    let device = WgpuDevice::default();
    let start = Instant::now();
    let (mut worst, mut in_parts, mut longest, mut rows) = (0.0f64, 0, 0, 0);
    let teams = launches(LaunchKind::CubeDecodeTeams);
    for seed in seeds.clone() {
        let case = Case::new(seed, size);
        let operands = case.operands::<B>(&device, types);
        let before = counts();
        let found = found(B::decode(operands, &case.problem));
        let [first, second] = counts();
        assert_eq!(first, before[0] + 1);
        assert!(second <= before[1] + 1);
        in_parts += second - before[1];
        longest = longest.max(case.problem.starts[0] + 1);
        rows = rows.max(case.rows());
        let what = format!("{name}, seed {seed}: {:?}", case.problem);
        let expected = case.expected(types);
        worst = worst.max(assert_close(&found, &expected, tolerance, &what));
    }
    let teams = launches(LaunchKind::CubeDecodeTeams) - teams;
    println!(
        "{name}: {} cases, {in_parts} in parts, {teams} with teams of rows, up to {longest} tokens and {rows} rows, largest error {worst:.1e}, {:.1?}",
        seeds.end - seeds.start,
        start.elapsed(),
    );
    [in_parts, teams]
}

/// Launches of the two kernels.
fn counts() -> [u64; 2] {
    [LaunchKind::CubeDecode, LaunchKind::CubeDecodeCombine].map(launches)
}

const F32: [DType; 2] = [DType::F32; 2];
/// In 32 bits: results to 1e-5, and a pool, which is written once, to a few roundings.
const CLOSE: [f64; 2] = [1e-5, 1e-6];
/// In 16 bits: a result is rounded once, after the new slot was, which moves its score and value.
const ROUNDED: [f64; 2] = [2e-3, 5e-4];

#[test]
#[cfg_attr(feature = "autotune", ignore = "measures every case")]
fn decode_is_the_plain_one() {
    let _alone = alone();
    let [in_parts, _] = compare::<WgpuBare>("bare", 0..180, &SMALL, F32, CLOSE);
    assert!((20..200).contains(&in_parts), "both ways are taken");
    let [_, teams] = compare::<WgpuBare>("bare, beams", 2000..2060, &BEAMS, F32, CLOSE);
    assert!(teams >= 15, "{teams} of 60 read what rows share together");
    compare::<WgpuBare>("bare, large", 1000..1030, &LARGE, F32, CLOSE);
}

/// Vulkan on the CPU has planes of 8 units, and CubeCL does not report planes of CPUs.
#[test]
#[cfg_attr(feature = "autotune", ignore = "measures every case")]
fn with_and_without_planes_as_well() {
    let _alone = alone();
    cube::use_planes(Planes::Never);
    compare::<WgpuBare>("without planes", 0..30, &SMALL, F32, CLOSE);
    let client = WgpuRuntime::client(&WgpuDevice::default());
    let planes = client.properties().hardware.plane_size_min;
    println!("planes of {planes}");
    assert!(
        planes.is_power_of_two() && planes >= 8,
        "there would be none"
    );
    cube::use_planes(Planes::Always);
    compare::<WgpuBare>("with planes", 0..40, &SMALL, F32, CLOSE);
}

#[test]
#[cfg_attr(feature = "autotune", ignore = "measures every case")]
fn under_fusion_and_autodiff_as_well() {
    let _alone = alone();
    compare::<Wgpu>("fusion", 0..40, &SMALL, F32, CLOSE);
    compare::<Autodiff<WgpuBare>>("autodiff", 60..80, &SMALL, F32, CLOSE);
    compare::<Autodiff<Wgpu>>("autodiff of fusion", 80..100, &SMALL, F32, CLOSE);
}

#[test]
#[cfg_attr(feature = "autotune", ignore = "measures every case")]
fn half_precision_is_rounded_once() {
    let _alone = alone();
    if !WgpuBare::supports_dtype(&WgpuDevice::default(), DType::F16) {
        println!("this device has no f16");
        return;
    }
    let half = [DType::F16; 2];
    let pool = [DType::F32, DType::F16];
    compare::<WgpuBare>("f16", 100..130, &SMALL, half, ROUNDED);
    compare::<WgpuBare>("f16 pool", 130..150, &SMALL, pool, ROUNDED);
}

/// On tensor cores queries and weights are rounded to 16 bits, too.
#[test]
#[cfg_attr(feature = "autotune", ignore = "measures every case")]
fn tensor_cores_round_operands() {
    let _alone = alone();
    cube::use_planes(Planes::Always);
    let client = WgpuRuntime::client(&WgpuDevice::default());
    let sizes = &client.properties().features.matmul.cmma;
    let half = StorageType::from(DType::F16);
    if !sizes.iter().any(|size| size.a_type == half) {
        println!("this device has no tensor cores for f16, or the feature `vulkan` is off");
        return;
    }
    let used = || launches(LaunchKind::CubeDecodeTensorCores);
    let half = [DType::F16; 2];
    let before = used();
    compare::<WgpuBare>("tensor cores", 4000..4040, &EVEN, half, ROUNDED);
    compare::<WgpuBare>(
        "tensor cores, beams",
        4100..4130,
        &EVEN_BEAMS,
        half,
        ROUNDED,
    );
    compare::<Wgpu>("tensor cores, fusion", 4200..4210, &EVEN, half, ROUNDED);
    let cases = used() - before;
    println!("{cases} of 80 on tensor cores");
    assert!(cases >= 50, "{cases} of 80");
    // Other types have none, and they can be switched off.
    let before = used();
    let pool = [DType::F32, DType::F16];
    compare::<WgpuBare>("f16 pool", 4300..4305, &EVEN, pool, ROUNDED);
    cube::use_tensor_cores(false);
    compare::<WgpuBare>("without tensor cores", 4300..4305, &EVEN, half, ROUNDED);
    assert_eq!(used(), before);
}

/// Which memory a pool has, wherever on the device that is now.
fn memory(pool: &Tensor<WgpuBare, 2>) -> (String, Option<u64>) {
    let pool = pool.clone().into_primitive().tensor();
    let memory = format!("{:?}", pool.handle.memory);
    let (id, _) = memory.split_once("location").expect("its debug form");
    (id.to_owned(), pool.handle.offset_start)
}

/// Every plan that the feature `autotune` may choose gives the same result.
#[test]
fn every_plan_is_the_plain_one() {
    let _alone = alone();
    let device = WgpuDevice::default();
    let start = Instant::now();
    let mut tried = [0; DECODE_PLANS.len()];
    let mut worst = 0.0f64;
    let seeds = (3000..3012).map(|seed| (seed, &SMALL));
    for (seed, size) in seeds.chain((3100..3112).map(|seed| (seed, &BEAMS))) {
        let case = Case::new(seed, size);
        let expected = case.expected(F32);
        for (number, name) in DECODE_PLANS.into_iter().enumerate() {
            let operands = case.operands::<WgpuBare>(&device, F32);
            let decoded = cube::try_decode_by(number, operands, &case.problem);
            let Some(decoded) = decoded.expect("the reckoned plan fits") else {
                continue;
            };
            let what = format!("{name}, seed {seed}: {:?}", case.problem);
            worst = worst.max(assert_close(&found(decoded), &expected, CLOSE, &what));
            tried[number] += 1;
        }
    }
    println!(
        "{DECODE_PLANS:?}: {tried:?} cases, largest error {worst:.1e}, {:.1?}",
        start.elapsed()
    );
    assert!(tried.iter().all(|cases| *cases >= 8), "{tried:?}");
}

/// A pool that nobody else holds keeps its place in memory, and one that somebody holds does not.
#[test]
fn a_pool_of_ones_own_is_written_in_place() {
    let _alone = alone();
    let case = Case::new(7, &SMALL);
    for shared in [false, true] {
        let operands = case.operands::<WgpuBare>(&WgpuDevice::default(), F32);
        let before = memory(&operands.pool);
        let held = shared.then(|| operands.pool.clone());
        let (_, pool) = WgpuBare::decode(operands, &case.problem);
        assert_eq!(memory(&pool) != before, shared);
        drop(held);
    }
}

/// Gates that a dense layout has no use for are left alone, as by the plain form.
#[test]
fn dense_slots_are_not_gated() {
    let _alone = alone();
    let mut n = Numbers::new(3);
    let layout = SlotLayout::Dense {
        kv_heads: 2,
        head_dim: 16,
    };
    let case = Case {
        q: n.normals(4 * 16),
        row: n.normals(layout.width()),
        rotary: None,
        gates: Some((3, n.normals(3 * 17))),
        slots: 3,
        pool: n.normals(3 * layout.width()),
        table: vec![2, 2, 0, 1],
        problem: DecodeProblem {
            heads: 4,
            layout,
            stride: 1,
            starts: vec![2],
            max_slots: 3,
            common: vec![0],
            scale: 0.3,
        },
    };
    let found = found(WgpuBare::decode(
        case.operands::<WgpuBare>(&WgpuDevice::default(), F32),
        &case.problem,
    ));
    assert_close(&found, &case.expected(F32), CLOSE, "dense slots with gates");
}

/// A pool that somebody else holds stays as it was.
#[test]
fn a_shared_pool_is_copied() {
    fn on<B: AttentionBackend<Device = WgpuDevice>>() {
        let case = Case::new(7, &SMALL);
        let operands = case.operands::<B>(&WgpuDevice::default(), F32);
        let held = operands.pool.clone();
        let found = found(B::decode(operands, &case.problem));
        assert_close(&found, &case.expected(F32), CLOSE, "from a copy");
        let same = |(a, b): (&f64, &f64)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
        assert!(values(held).iter().zip(&case.pool).all(same));
    }
    let _alone = alone();
    on::<WgpuBare>();
    on::<Wgpu>();
}

#[test]
fn what_cannot_be_run_says_why() {
    let _alone = alone();
    let device = WgpuDevice::default();
    let step = |rank: usize, heads: usize| {
        let layout = SlotLayout::Latent { rank, rope_dim: 8 };
        Case {
            q: vec![0.5; heads * layout.key_width()],
            row: vec![0.25; layout.width()],
            rotary: None,
            gates: None,
            slots: 3,
            pool: vec![0.125; 3 * layout.width()],
            table: vec![2, 2, 0, 1],
            problem: DecodeProblem {
                heads,
                layout,
                stride: 1,
                starts: vec![2],
                max_slots: 3,
                common: vec![0],
                scale: 0.1,
            },
        }
    };
    let run = |case: &Case, problem: &DecodeProblem| {
        let operands = case.operands::<WgpuBare>(&device, F32);
        cube::try_decode(operands, problem).map(found)
    };

    let many = step(512, 70);
    let sums = Unavailable::Sums {
        // Two groups of 128 units, one for each vector of four: 35 heads each.
        sums: 35 * 4,
        limit: 128,
    };
    let found_error = run(&many, &many.problem).err();
    assert_eq!(found_error, Some(KernelError::Unavailable(sums)));
    let wide = step(8000, 1);
    assert!(matches!(
        run(&wide, &wide.problem),
        Err(KernelError::Unavailable(Unavailable::SharedMemory { .. }))
    ));
    let right = step(16, 2);
    let wrong = DecodeProblem {
        max_slots: 4,
        ..right.problem.clone()
    };
    let invalid = run(&right, &wrong);
    assert!(matches!(invalid, Err(KernelError::Invalid(_))));
    let late = DecodeProblem {
        starts: vec![3],
        ..right.problem.clone()
    };
    let missing = ProblemError::MissingSlots {
        row: 0,
        needed: 4,
        slots: 3,
    };
    let found_error = run(&right, &late).err();
    assert_eq!(found_error, Some(KernelError::Invalid(missing)));

    // The plain form runs instead, unless the kernel is required.
    let decode = || {
        let operands = many.operands::<WgpuBare>(&device, F32);
        found(WgpuBare::decode(operands, &many.problem))
    };
    let before = counts();
    assert!(std::panic::catch_unwind(decode).is_err());
    cube::require_kernel(false);
    assert_close(&decode(), &many.expected(F32), CLOSE, "the plain form");
    assert_eq!(counts(), before);
}

/// Rows that grow a token a step, in slots that were reserved, on the device and on the host.
struct Stream<B: Backend> {
    numbers: Numbers,
    problem: DecodeProblem,
    /// Slots of a row.
    room: usize,
    device: B::Device,
    gates: Vec<f64>,
    pool: Option<Tensor<B, 2>>,
    host: Option<Tensor<Flex, 2>>,
}

impl<B: AttentionBackend> Stream<B> {
    fn new(seed: u64, room: usize, device: B::Device) -> Self {
        let layout = SlotLayout::Latent {
            rank: 32,
            rope_dim: 8,
        };
        let mut numbers = Numbers::new(seed);
        let (rows, width) = (3, layout.width());
        Self {
            gates: numbers.normals(room * 33),
            numbers,
            problem: DecodeProblem {
                heads: 4,
                layout,
                stride: 2,
                starts: vec![0; rows],
                max_slots: 1,
                common: vec![0; rows],
                scale: 0.2,
            },
            room,
            pool: Some(Tensor::zeros([rows * room, width], &device)),
            host: Some(Tensor::zeros([rows * room, width], &FlexDevice)),
            device,
        }
    }

    fn operands<C: Backend>(
        &self,
        [q, row]: [&[f64]; 2],
        pool: Tensor<C, 2>,
        device: &C::Device,
    ) -> DecodeOperands<C> {
        let p = &self.problem;
        let rows = p.starts.len();
        let mut table = Vec::new();
        for (row, start) in p.starts.iter().enumerate() {
            table.push(*start as i64);
            table.extend((0..p.max_slots).map(|slot| (row * self.room + slot) as i64));
        }
        let table = TensorData::new(table, [rows, 1 + p.max_slots]);
        let positions: Vec<Vec<usize>> = p.starts.iter().map(|start| vec![*start]).collect();
        DecodeOperands {
            rotary: Some(RotaryConfig::default().rotary(8, &positions, DType::F32, device)),
            q: tensor(q, [rows, p.heads, 40], device, DType::F32),
            row: tensor(row, [rows, 40], device, DType::F32),
            gates: Some(tensor(&self.gates, [self.room, 33], device, DType::F32)),
            pool,
            table: Tensor::from_data(table, device),
        }
    }

    /// A step on both; the results are compared if asked for.
    fn step(&mut self, look: bool) {
        self.problem.max_slots = self.problem.starts[0] / 2 + 1;
        let [q, row] = [3 * 4 * 40, 3 * 40].map(|n| self.numbers.normals(n));
        let pool = self.pool.take().expect("the step before put it back");
        let host = self.host.take().expect("the step before put it back");
        let operands = self.operands::<B>([&q, &row], pool, &self.device);
        let (out, pool) = B::decode(operands, &self.problem);
        let operands = self.operands::<Flex>([&q, &row], host, &FlexDevice);
        let (expected, host) = Flex::decode(operands, &self.problem);
        if look {
            let found = [values(out), values(pool.clone())];
            let expected = [values(expected), values(host.clone())];
            assert_close(&found, &expected, [1e-5; 2], "a stream");
        }
        (self.pool, self.host) = (Some(pool), Some(host));
        for start in &mut self.problem.starts {
            *start += 1;
        }
    }
}

#[test]
fn a_thousand_steps_allocate_nothing_new() {
    fn on<B: AttentionBackend<Device = WgpuDevice>>(name: &str) {
        let device = WgpuDevice::default();
        let mut stream = Stream::<B>::new(1, 500, device.clone());
        let reserved = || {
            let usage = WgpuRuntime::client(&device).memory_usage();
            usage.expect("it can be asked").bytes_reserved
        };
        let before = counts();
        let mut at_100 = 0;
        for step in 1..=1000 {
            stream.step(step % 100 == 0);
            if step == 100 {
                at_100 = reserved();
            }
        }
        let now = counts();
        let [first, second] = [0, 1].map(|i| now[i] - before[i]);
        let at_1000 = reserved();
        println!(
            "{name}: 1000 steps, {first} launches and {second} to combine; {at_100} bytes reserved after 100 steps, {at_1000} at the end",
        );
        assert_eq!(first, 1000);
        assert_eq!(at_1000, at_100);
    }
    let _alone = alone();
    cube::poison_outputs(false);
    on::<WgpuBare>("bare");
    on::<Wgpu>("fusion");
}

#[test]
fn threads_do_not_disturb_each_other() {
    fn on<B: AttentionBackend<Device = WgpuDevice>>() {
        std::thread::scope(|scope| {
            for seed in 0..4 {
                scope.spawn(move || {
                    let mut stream = Stream::<B>::new(seed, 40, WgpuDevice::default());
                    (0..60).for_each(|step| stream.step(step % 7 == seed));
                    // Under fusion a step runs when somebody looks, and is counted then.
                    stream.step(true);
                });
            }
        });
    }
    let _alone = alone();
    on::<WgpuBare>();
    on::<Wgpu>();
}

/// Every variant decodes by the kernel, with at most two launches a layer and step, as it computes whole sequences.
#[test]
#[cfg_attr(feature = "autotune", ignore = "measures products of Burn's")]
fn layers_decode_with_the_kernel() {
    let _alone = alone();
    let device = WgpuDevice::default();
    for config in [
        AttentionConfig::mha(32, 4),
        AttentionConfig::mqa(32, 4),
        AttentionConfig::gqa(32, 4, 2),
        AttentionConfig::mla(32, 4),
        AttentionConfig::mtla(32, 4),
        AttentionConfig::mtla(32, 4).with_down_rate(3),
    ] {
        let attention = config.init::<Wgpu>(&device).expect("a sound configuration");
        let mut cache = Cache::new(attention.cache_spec(), 1, &device);
        cache.join(3);
        let x = Tensor::random([3, 5, 32], Distribution::Default, &device);
        let whole = attention.forward(AttentionInput::new(x.clone())).context;
        let before = counts();
        for step in 0..5 {
            let plan = cache.step(&[0, 1, 2]);
            let token = |x: &Tensor<Wgpu, 3>| x.clone().narrow(1, step, 1).squeeze_dim::<2>(1);
            let y = attention.step(token(&x), &plan, cache.layer_mut(0));
            y.into_data()
                .assert_approx_eq::<f32>(&token(&whole).into_data(), Tolerance::absolute(1e-5));
        }
        let now = counts();
        assert_eq!(now[0], before[0] + 5, "{config:?}");
        assert!(now[1] <= before[1] + 5);
    }
}
