//! The decoding kernel on a GPU, or on Vulkan for CPUs: what a step launches, allocates and reads, and how long it takes
//! beside the plain form and beside a copy of as many bytes.
//!
//! ```text
//! cargo run --release -p mtla-benches --features wgpu --bin decode-steps
//! cargo run --release -p mtla-benches --features wgpu --bin decode-steps -- --paper
//! cargo run --release -p mtla-benches --features wgpu --bin decode-steps -- --kernels --tokens 512
//! cargo run --release -p mtla-benches --features wgpu --bin decode-steps -- --products
//! ```

mod kernels;
mod products;

use std::time::{Duration, Instant};

use burn::tensor::{DType, Distribution, Int, Tensor, TensorData, Tolerance, backend::Backend};
use burn_cubecl::cubecl::Runtime;
use burn_wgpu::{WgpuDevice, WgpuRuntime};
use clap::Parser;
use mtla_benches::{D_MODEL, HEADS};
use mtla_core::{
    ops::{
        AttentionBackend, DecodeOperands, DecodeProblem, LaunchKind, SlotLayout, cube, launches,
        plain,
    },
    rope::RotaryConfig,
    testing::backends::WgpuBare as B,
};

/// Measures steps of decoding, one line of JSON each.
#[derive(Parser)]
#[allow(
    clippy::struct_excessive_bools,
    reason = "each is a switch of the command line"
)]
struct Arguments {
    /// Tokens that each row holds.
    #[arg(long, value_delimiter = ',', default_value = "128,512,2048,8192")]
    tokens: Vec<usize>,
    /// Rows of a step.
    #[arg(long, value_delimiter = ',', default_value = "1,8,64")]
    rows: Vec<usize>,
    /// Pools above this many MiB are left out: Vulkan for CPUs takes no larger buffers.
    #[arg(long, default_value_t = 128)]
    most_mib: usize,
    /// Leaves the rotation of queries and new keys out.
    #[arg(long)]
    unrotated: bool,
    /// Measures nothing and prints how long reading and writing alone would take, on an H100 (3350 GB/s) and on a
    /// laptop's integrated GPU (60 GB/s).
    #[arg(long)]
    paper: bool,
    /// Measures nothing and counts the kernels that the device executes for a step of a whole attention layer, and for a
    /// token of a whole decoder.
    #[arg(long, conflicts_with = "paper")]
    kernels: bool,
    /// Measures the products around a step instead, beside Burn's own.
    #[arg(long, conflicts_with_all = ["paper", "kernels"])]
    products: bool,
}

/// Name, layout, tokens of a slot.
const VARIANTS: [(&str, SlotLayout, usize); 6] = [
    ("mha", dense(HEADS), 1),
    ("gqa2", dense(2), 1),
    ("mla", LATENT, 1),
    ("mtla2", LATENT, 2),
    ("mtla3", LATENT, 3),
    ("mtla4", LATENT, 4),
];

const LATENT: SlotLayout = SlotLayout::Latent {
    rank: 4 * D_MODEL / HEADS,
    rope_dim: D_MODEL / HEADS / 2,
};

const fn dense(kv_heads: usize) -> SlotLayout {
    SlotLayout::Dense {
        kv_heads,
        head_dim: D_MODEL / HEADS,
    }
}

struct Step {
    problem: DecodeProblem,
    gated: bool,
    rotated: bool,
}

impl Step {
    fn new((layout, stride): (SlotLayout, usize), rows: usize, tokens: usize) -> Self {
        let problem = DecodeProblem {
            heads: HEADS,
            layout,
            stride,
            starts: vec![tokens - 1; rows],
            max_slots: tokens.div_ceil(stride),
            common: vec![0; rows],
            scale: (layout.key_width() as f64).powf(-0.5),
        };
        Self {
            problem,
            gated: stride > 1,
            rotated: true,
        }
    }

    fn slots(&self) -> usize {
        self.problem.starts.len() * self.problem.max_slots
    }

    fn pool_bytes(&self) -> usize {
        4 * self.slots() * self.problem.layout.width()
    }

    /// What has to be read and written at least: all slots, the new rows, queries and results.
    fn bytes(&self) -> usize {
        let (p, layout) = (&self.problem, self.problem.layout);
        let row = 2 * layout.width() + p.heads * (layout.key_width() + layout.value_width());
        self.pool_bytes() + 4 * p.starts.len() * row
    }

    fn operands(&self, pool: Tensor<B, 2>, device: &WgpuDevice) -> DecodeOperands<B> {
        let (p, layout) = (&self.problem, self.problem.layout);
        let rows = p.starts.len();
        let normal = Distribution::Normal(0.0, 1.0);
        let table: Vec<i32> = (0..rows)
            .flat_map(|row| {
                let first = row * p.max_slots;
                let slots = (first..first + p.max_slots).map(|slot| slot as i32);
                std::iter::once(p.starts[row] as i32).chain(slots)
            })
            .collect();
        let table = TensorData::new(table, [rows, 1 + p.max_slots]);
        let positions: Vec<Vec<usize>> = p.starts.iter().map(|start| vec![*start]).collect();
        let gates = [p.max_slots, layout.value_width() + 1];
        DecodeOperands {
            q: Tensor::random([rows, p.heads, layout.key_width()], normal, device),
            row: Tensor::random([rows, layout.width()], normal, device),
            rotary: self.rotated.then(|| {
                let channels = layout.rotated().len();
                RotaryConfig::default().rotary(channels, &positions, DType::F32, device)
            }),
            gates: self
                .gated
                .then(|| Tensor::random(gates, normal, device) * 0.05),
            pool,
            table: Tensor::<B, 2, Int>::from_data(table, device),
        }
    }
}

/// The shortest of a few runs, each to its end, of at least this long in all.
fn time(device: &WgpuDevice, mut run: impl FnMut()) -> Duration {
    run();
    let sync = || B::sync(device).expect("a device that goes on");
    sync();
    let (mut best, begin) = (Duration::MAX, Instant::now());
    while begin.elapsed() < Duration::from_millis(300) {
        let start = Instant::now();
        run();
        sync();
        best = best.min(start.elapsed());
    }
    best
}

fn measure(name: &str, step: &Step, device: &WgpuDevice) {
    let p = &step.problem;
    let shape = [step.slots(), p.layout.width()];
    let pool = Tensor::random(shape, Distribution::Normal(0.0, 1.0), device);
    let operands = step.operands(pool, device);
    // Right before fast: a pool of their own for each.
    let with = |pool: Tensor<B, 2>| DecodeOperands {
        pool,
        ..operands.clone()
    };
    let own = || operands.pool.clone() + 0.0;
    let (expected, _) = plain::decode(with(own()), p);
    let (found, _) = B::decode(with(own()), p);
    found
        .into_data()
        .assert_approx_eq::<f32>(&expected.into_data(), Tolerance::absolute(1e-4));

    let kinds = [LaunchKind::CubeDecode, LaunchKind::CubeDecodeCombine];
    let counts = || kinds.map(launches).iter().sum::<u64>();
    let client = WgpuRuntime::client(device);
    let reserved = || {
        client
            .memory_usage()
            .map_or(0, |usage| usage.bytes_reserved)
    };
    let in_use = || client.memory_usage().map_or(0, |usage| usage.bytes_in_use);
    let mut held = Some(own());
    let mut kernel_step = || {
        let pool = held.take().expect("the step before put it back");
        let (_, pool) = B::decode(with(pool), p);
        held = Some(pool);
    };
    kernel_step();
    B::sync(device).expect("a device that goes on");
    let (before, used, room) = (counts(), in_use(), reserved());
    kernel_step();
    B::sync(device).expect("a device that goes on");
    let (launched, grown) = (counts() - before, in_use().saturating_sub(used));
    let kernel = time(device, kernel_step);
    let grown_room = reserved().saturating_sub(room);
    let mut held = Some(own());
    let plain = time(device, || {
        let pool = held.take().expect("the step before put it back");
        held = Some(plain::decode(with(pool), p).1);
    });
    // A copy reads and writes: half as many numbers are as many bytes.
    let half = Tensor::<B, 1>::ones([step.bytes() / 8], device);
    let copy = time(device, || drop(half.clone() + 0.0));
    let us = |time: Duration| (time.as_secs_f64() * 1e6).round();
    println!(
        "{{\"variant\": \"{name}\", \"tokens\": {}, \"rows\": {}, \"launches\": {launched}, \"in_use_grown\": {grown}, \
         \"reserved_grown\": {grown_room}, \"bytes\": {}, \"kernel_us\": {}, \"plain_us\": {}, \"ratio\": {:.2}, \
         \"copy_us\": {}, \"of_copy\": {:.2}}}",
        p.starts[0] + 1,
        p.starts.len(),
        step.bytes(),
        us(kernel),
        us(plain),
        plain.as_secs_f64() / kernel.as_secs_f64(),
        us(copy),
        copy.as_secs_f64() / kernel.as_secs_f64(),
    );
}

fn main() {
    let arguments = Arguments::parse();
    if arguments.kernels {
        kernels::count(&arguments.tokens, &arguments.rows);
        return;
    }
    let device = WgpuDevice::default();
    if arguments.products {
        products::measure(&device);
        return;
    }
    if !arguments.paper {
        cube::require_kernel(true);
    }
    for (name, layout, stride) in VARIANTS {
        for &tokens in &arguments.tokens {
            for &rows in &arguments.rows {
                let step = Step {
                    rotated: !arguments.unrotated,
                    ..Step::new((layout, stride), rows, tokens)
                };
                if arguments.paper {
                    let us = |gigabytes: f64| step.bytes() as f64 / gigabytes / 1e3;
                    println!(
                        "{{\"variant\": \"{name}\", \"tokens\": {tokens}, \"rows\": {rows}, \"bytes\": {}, \
                         \"h100_us\": {:.2}, \"laptop_us\": {:.1}}}",
                        step.bytes(),
                        us(3350.0),
                        us(60.0),
                    );
                } else if step.pool_bytes() <= arguments.most_mib << 20 {
                    measure(name, &step, &device);
                    // The next one's memory is not what this one leaves.
                    B::memory_cleanup(&device);
                }
            }
        }
    }
}
