//! What is compiled: calls of this library that launch its kernels, in the sizes and types that matter.

use burn::tensor::{DType, Int, Tensor};
use mtla_core::{
    ops::{
        AttendOperands, AttendProblem, AttentionBackend, DecodeOperands, DecodeProblem, Dropout,
        HeadMatrices, KeyValue, Keys, LaunchKind, SlotLayout, Visibility,
        cube::{KernelError, try_attend, try_decode},
        launches,
    },
    rope::{RotaryConfig, RotaryLayout},
};

use crate::gpu::{Backend, Gpu};

/// A call that launches kernels.
pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) run: Run,
}

type Run = Box<dyn Fn(&Gpu) -> Result<(), KernelError>>;

/// All of them; a new kernel gets a function like [`decode`] and its line here.
pub(crate) fn all() -> Vec<Case> {
    let mut all = decode();
    all.extend(attend());
    all.extend(product());
    all
}

/// A decoding step. Types are those of queries and pool.
fn decode() -> Vec<Case> {
    let latent = |rank, rope_dim| SlotLayout::Latent { rank, rope_dim };
    let dense = |kv_heads, head_dim| SlotLayout::Dense { kv_heads, head_dim };
    let (pairs, halves) = (
        Some(RotaryLayout::Interleaved),
        Some(RotaryLayout::HalfSplit),
    );
    let variants = [
        // The paper's: width 512.
        ("mtla", 8, latent(256, 32), pairs, true),
        ("mla", 8, latent(256, 32), pairs, false),
        ("mha", 8, dense(8, 64), pairs, false),
        ("mtla-unrotated", 8, latent(256, 32), None, true),
        // Llama 3's, DeepSeek-V2-Lite's, and as many heads of such a width as the plan takes.
        ("gqa-llama", 32, dense(8, 128), halves, false),
        ("mla-deepseek-lite", 16, latent(512, 64), pairs, false),
        ("mla-64-heads", 64, latent(512, 64), pairs, false),
        // Vectors of one element.
        ("mtla-odd", 3, latent(45, 6), pairs, true),
        ("mtla-odd-halves", 3, latent(45, 6), halves, true),
    ];
    let types = [
        [DType::F32, DType::F32],
        [DType::F16, DType::F16],
        [DType::BF16, DType::BF16],
        [DType::F32, DType::F16],
        [DType::F32, DType::BF16],
    ];
    // Rows, slots, and how many of them rows share: many short rows are not divided into parts, and a long one is;
    // beams of a prompt read it together.
    let sizes = [
        ("", 1024, 64, 0),
        ("-parts", 1, 8192, 0),
        ("-beams", 1000, 64, 60),
    ];

    let mut cases = Vec::new();
    for (variant, heads, layout, rotary, gated) in variants {
        for (suffix, rows, max_slots, common) in sizes {
            // Teams of rows are what beams add, whatever the pool's type.
            let types = types
                .iter()
                .filter(|[float, pool]| common == 0 || float == pool);
            for &[float, pool] in types {
                let problem = DecodeProblem {
                    heads,
                    layout,
                    stride: if gated { 2 } else { 1 },
                    starts: vec![max_slots - 1; rows],
                    max_slots,
                    common: vec![common; rows],
                    scale: 1.0,
                };
                let name = format!("{variant}{suffix} {}/{}", float.name(), pool.name());
                let run = move |gpu: &Gpu| {
                    let operands = operands(gpu, &problem, rotary, gated, [float, pool]);
                    try_decode(operands, &problem).map(drop)
                };
                cases.push(Case {
                    name,
                    run: Box::new(run),
                });
            }
        }
    }
    cases
}

fn operands(
    gpu: &Gpu,
    problem: &DecodeProblem,
    rotary: Option<RotaryLayout>,
    gated: bool,
    [float, pool]: [DType; 2],
) -> DecodeOperands<Backend> {
    let (rows, slots, layout) = (problem.starts.len(), problem.max_slots, problem.layout);
    let matrix = |shape: [usize; 2], dtype| Tensor::empty(shape, (gpu, dtype));
    let positions = vec![vec![0]; rows];
    let rotary = rotary.map(|layout| RotaryConfig {
        layout,
        ..RotaryConfig::default()
    });
    DecodeOperands {
        q: Tensor::empty([rows, problem.heads, layout.key_width()], (gpu, float)),
        row: matrix([rows, layout.width()], float),
        rotary: rotary.map(|rope| rope.rotary(layout.rotated().len(), &positions, DType::F32, gpu)),
        gates: gated.then(|| matrix([slots, layout.value_width() + 1], float)),
        pool: matrix([rows * slots, layout.width()], pool),
        table: Tensor::<Backend, 2, Int>::empty([rows, 1 + slots], (gpu, DType::I32)),
    }
}

/// Attention of whole sequences: with what queries see of their own chunks and without, with channels that heads share
/// and without.
fn attend() -> Vec<Case> {
    let mut cases = Vec::new();
    // Heads, key/value heads, channels of a key, those of them that all heads share, channels of a value, stride.
    for (variant, heads, kv_heads, key_width, shared, value_width, stride) in [
        ("mtla", 8, 8, 96, 32, 64, 2),
        ("mla", 8, 8, 96, 32, 64, 1),
        ("mha", 8, 8, 64, 0, 64, 1),
        ("gqa-llama", 32, 8, 128, 0, 128, 1),
        ("mla-deepseek", 128, 128, 192, 64, 128, 1),
        ("mtla-odd", 3, 3, 15, 5, 10, 3),
    ] {
        let dropout = Dropout {
            probability: 0.1,
            seed: 1,
        };
        // Short prompts get smaller tiles.
        for (dtype, dropout, tokens) in [
            (DType::F32, None, 512),
            (DType::F16, None, 512),
            (DType::BF16, None, 512),
            (DType::F32, Some(dropout), 512),
            (DType::F32, None, 40),
            (DType::F16, None, 7),
        ] {
            let problem = AttendProblem {
                batch: 2,
                heads,
                kv_heads,
                queries: tokens,
                columns: tokens / stride,
                self_term: stride > 1,
                key_width,
                value_width,
                visibility: Visibility::Causal {
                    stride,
                    offsets: vec![0; 2],
                },
                lengths: vec![tokens; 2],
                scale: 1.0,
                dropout,
            };
            let suffix = if dropout.is_some() { "-dropout" } else { "" };
            let run = move |gpu: &Gpu| {
                let new = |heads, width| {
                    Tensor::<Backend, 4>::empty([2, heads, tokens, width], (gpu, dtype))
                };
                let operands = AttendOperands {
                    q: new(heads, key_width),
                    keys: Keys::Tokens(KeyValue {
                        k: new(kv_heads, key_width - shared),
                        shared: (shared > 0).then(|| new(1, shared)),
                        v: new(kv_heads, value_width),
                    }),
                };
                try_attend(operands, &problem).map(drop)
            };
            cases.push(Case {
                name: format!("{variant}-{tokens}{suffix} {}", dtype.name()),
                run: Box::new(run),
            });
        }
    }
    cases
}

/// Products of few rows: with a weight as it is and the other way round, and of heads with matrices of their own, behind
/// which channels follow or do not.
fn product() -> Vec<Case> {
    let mut cases = Vec::new();
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for rows in [1, 8] {
            for (name, inputs, outputs) in [("wide", 512, 2048), ("odd", 45, 455)] {
                for transposed in [false, true] {
                    let run = move |gpu: &Gpu| {
                        let new = |shape| Tensor::<Backend, 2>::empty(shape, (gpu, dtype));
                        let weight = if transposed {
                            new([outputs, inputs]).transpose()
                        } else {
                            new([inputs, outputs])
                        };
                        counted(|| drop(Backend::product(new([rows, inputs]), weight)));
                        Ok(())
                    };
                    let suffix = if transposed { "-transposed" } else { "" };
                    cases.push(Case {
                        name: format!("{name}{suffix} rows={rows} {}", dtype.name()),
                        run: Box::new(run),
                    });
                }
            }
            for (name, heads, rest, columns, transposed) in [
                ("absorb", 8, 32, 0..64, true),
                ("expand", 8, 0, 64..128, false),
            ] {
                let run = move |gpu: &Gpu| {
                    let width = rest + if transposed { columns.len() } else { 256 };
                    let x = Tensor::<Backend, 3>::empty([rows, heads, width], (gpu, dtype));
                    let matrices = HeadMatrices {
                        weight: Tensor::empty([256, heads * 128], (gpu, dtype)),
                        heads,
                        columns: columns.clone(),
                        transposed,
                    };
                    counted(|| drop(Backend::multiply_heads(x, matrices)));
                    Ok(())
                };
                cases.push(Case {
                    name: format!("{name} rows={rows} {}", dtype.name()),
                    run: Box::new(run),
                });
            }
        }
    }
    cases
}

/// # Panics
/// If Burn's own product was taken.
fn counted(run: impl FnOnce()) {
    let before = launches(LaunchKind::CubeProduct);
    run();
    assert_eq!(launches(LaunchKind::CubeProduct), before + 1);
}
