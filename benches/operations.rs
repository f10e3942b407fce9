//! The operation `attend`, forward and backward, in the plain form and in the backend's own.
//!
//! Before anything is timed, outputs and the gradients of all operands are compared.

use std::{hint::black_box, time::Duration};

use burn::tensor::{Tensor, Tolerance};
use burn_autodiff::Autodiff;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use mtla_benches::{HEADS, input};
use mtla_core::{
    ops::{AttendOperands, AttendProblem, AttentionBackend, KeyValue, Keys, Visibility, plain},
    testing::backends,
};

const ROWS: usize = 4;
/// Widths of the paper: 64 channels of a head and 32 of the shared rope key, values of 64.
const HEAD: usize = 64;
const SHARED: usize = 32;

type Attend<B> = fn(AttendOperands<B>, &AttendProblem) -> Tensor<B, 4>;

fn problem(tokens: usize, stride: usize) -> AttendProblem {
    AttendProblem {
        batch: ROWS,
        heads: HEADS,
        kv_heads: HEADS,
        queries: tokens,
        columns: tokens / stride,
        self_term: stride > 1,
        key_width: HEAD + SHARED,
        value_width: HEAD,
        visibility: Visibility::Causal {
            stride,
            offsets: vec![0; ROWS],
        },
        lengths: vec![tokens; ROWS],
        scale: ((HEAD + SHARED) as f64).powf(-0.5),
        dropout: None,
    }
}

/// Leaves of a graph.
fn operands<B: AttentionBackend>(
    tokens: usize,
    device: &B::Device,
) -> (AttendOperands<Autodiff<B>>, [Tensor<Autodiff<B>, 4>; 4]) {
    let leaf = |shape| Tensor::from_inner(input::<B, 4>(shape, device)).require_grad();
    let leaves = [
        leaf([ROWS, HEADS, tokens, HEAD + SHARED]),
        leaf([ROWS, HEADS, tokens, HEAD]),
        leaf([ROWS, 1, tokens, SHARED]),
        leaf([ROWS, HEADS, tokens, HEAD]),
    ];
    let [q, k, shared, v] = leaves.clone();
    let shared = Some(shared);
    let keys = Keys::Tokens(KeyValue { k, shared, v });
    (AttendOperands { q, keys }, leaves)
}

fn check<B: AttentionBackend>(stride: usize, device: &B::Device) {
    let (operands, leaves) = operands::<B>(301, device);
    let problem = problem(301, stride);
    let forms: [Attend<Autodiff<B>>; 2] = [plain::attend, Autodiff::<B>::attend];
    let [plain, own] = forms.map(|attend| {
        let y = attend(operands.clone(), &problem);
        let grads = (y.clone() * y.clone()).sum().backward();
        let grads = leaves
            .each_ref()
            .map(|x| x.grad(&grads).expect("a gradient"));
        [vec![y.inner()], grads.to_vec()].concat()
    });
    for (own, plain) in own.into_iter().zip(plain) {
        own.into_data()
            .assert_approx_eq::<f32>(&plain.into_data(), Tolerance::rel_abs(1e-3, 1e-3));
    }
}

fn attend<B: AttentionBackend>(c: &mut Criterion) {
    let device = B::Device::default();
    for stride in [1, 2, 4] {
        check::<B>(stride, &device);
        let mut group = c.benchmark_group(format!("{} attend, stride {stride}", B::name(&device)));
        group
            .sample_size(10)
            .measurement_time(Duration::from_secs(3));
        for tokens in [256, 1024] {
            group.throughput(Throughput::Elements((ROWS * tokens) as u64));
            let (operands, _) = operands::<B>(tokens, &device);
            let problem = problem(tokens, stride);
            let forms: [(&str, Attend<Autodiff<B>>); 2] =
                [("plain", plain::attend), ("own", Autodiff::<B>::attend)];
            for (name, attend) in forms {
                group.bench_function(BenchmarkId::new(name, tokens), |b| {
                    b.iter(|| {
                        black_box(attend(operands.clone(), &problem).sum().backward());
                        B::sync(&device).expect("the device works");
                    });
                });
            }
        }
        group.finish();
    }
}

/// Products of a few rows, as in decoding, with weights as they are made here (`[inputs, outputs]` in memory) and as
/// files have them (`[outputs, inputs]`).
fn product<B: AttentionBackend>(c: &mut Criterion) {
    let device = B::Device::default();
    let [inputs, outputs] = [768, 2048];
    let mut group = c.benchmark_group(format!(
        "{} product, {inputs} to {outputs}",
        B::name(&device)
    ));
    group
        .sample_size(10)
        .measurement_time(Duration::from_secs(2));
    // More than the caches hold, as the layers of a model are.
    let weights: Vec<_> = (0..20)
        .map(|_| input::<B, 2>([outputs, inputs], &device))
        .collect();
    for rows in [1, 2, 8, 16, 40, 64, 128] {
        let x = input::<B, 2>([rows, inputs], &device);
        let from_files: Vec<_> = weights.iter().map(|w| w.clone().transpose()).collect();
        let made_here: Vec<_> = from_files.iter().map(|w| w.clone().mul_scalar(1)).collect();
        let [a, b] = [&from_files, &made_here].map(|w| B::product(x.clone(), w[0].clone()));
        a.into_data()
            .assert_approx_eq::<f32>(&b.into_data(), Tolerance::rel_abs(1e-4, 1e-4));
        group.throughput(Throughput::Elements((20 * rows * inputs * outputs) as u64));
        for (name, weights) in [("made here", &made_here), ("from files", &from_files)] {
            group.bench_function(BenchmarkId::new(name, rows), |b| {
                b.iter(|| {
                    for weight in weights {
                        black_box(B::product(x.clone(), weight.clone()));
                    }
                    B::sync(&device).expect("the device works");
                });
            });
        }
    }
    group.finish();
}

fn all(c: &mut Criterion) {
    #[cfg(feature = "flex")]
    product::<backends::Flex>(c);
    #[cfg(feature = "flex")]
    attend::<backends::Flex>(c);
    #[cfg(feature = "ndarray")]
    attend::<backends::NdArray>(c);
    #[cfg(feature = "wgpu")]
    attend::<backends::Wgpu>(c);
    #[cfg(feature = "cuda")]
    attend::<backends::Cuda>(c);
    #[cfg(feature = "tch")]
    attend::<backends::LibTorch>(c);
}

criterion_group!(benches, all);
criterion_main!(benches);
