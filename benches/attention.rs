//! One attention layer of every variant: forward, forward with backward, and a decoding step.
//!
//! Before anything is timed, the cached path is compared with the whole-sequence path.

use std::{hint::black_box, time::Duration};

use burn::tensor::{Tensor, Tolerance};
use burn_autodiff::Autodiff;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use mtla_benches::{D_MODEL, input, variants};
use mtla_core::{
    attention::{Attention, AttentionInput},
    cache::Cache,
    ops::AttentionBackend,
    testing::backends,
};

/// Rows of the batch.
const ROWS: usize = 4;

/// A cache of `rows` rows that hold `tokens` tokens each, made in one piece.
fn warm<B: AttentionBackend>(
    attention: &Attention<B>,
    x: Tensor<B, 3>,
    device: &B::Device,
) -> Cache<B> {
    let [rows, tokens, _] = x.dims();
    let mut cache = Cache::new(attention.cache_spec(), 1, device);
    cache.reserve(rows, tokens + 1024);
    cache.join(rows);
    let all: Vec<usize> = (0..rows).collect();
    let plan = cache.extend(&all, &vec![tokens; rows]);
    attention.prefill_keys(x, &plan, cache.layer_mut(0));
    cache
}

fn check<B: AttentionBackend>(attention: &Attention<B>, device: &B::Device) {
    let x = input::<B, 3>([ROWS, 17, D_MODEL], device);
    let whole = attention.forward(AttentionInput::new(x.clone())).context;
    let mut cache = warm(attention, x.clone().narrow(1, 0, 16), device);
    let plan = cache.step(&[0, 1, 2, 3]);
    let last = x.narrow(1, 16, 1).squeeze_dim(1);
    let step = attention.step(last, &plan, cache.layer_mut(0));
    step.into_data().assert_approx_eq::<f32>(
        &whole.narrow(1, 16, 1).squeeze_dim::<2>(1).into_data(),
        Tolerance::absolute(1e-4),
    );
}

fn layer<B: AttentionBackend>(c: &mut Criterion) {
    let device = B::Device::default();
    for (name, config) in variants() {
        let attention = config.init::<B>(&device).expect("a valid configuration");
        check(&attention, &device);

        let mut group = c.benchmark_group(format!("{} {name}", B::name(&device)));
        group
            .sample_size(10)
            .measurement_time(Duration::from_secs(3));
        for tokens in [256, 1024] {
            let x = input::<B, 3>([ROWS, tokens, D_MODEL], &device);
            group.throughput(Throughput::Elements((ROWS * tokens) as u64));
            group.bench_function(BenchmarkId::new("forward", tokens), |b| {
                b.iter(|| {
                    black_box(attention.forward(AttentionInput::new(x.clone())));
                    B::sync(&device).expect("the device works");
                });
            });
            let training = config
                .init::<Autodiff<B>>(&device)
                .expect("a valid configuration");
            let x = Tensor::from_inner(x).require_grad();
            group.bench_function(BenchmarkId::new("forward and backward", tokens), |b| {
                b.iter(|| {
                    let y = training.forward(AttentionInput::new(x.clone())).context;
                    black_box(y.sum().backward());
                    B::sync(&device).expect("the device works");
                });
            });
        }
        let tokens = 1020; // a multiple of every down rate
        group.throughput(Throughput::Elements(ROWS as u64));
        group.bench_function(BenchmarkId::new("step after", tokens), |b| {
            let x = input::<B, 3>([ROWS, tokens, D_MODEL], &device);
            let mut cache = warm(&attention, x, &device);
            let token = input::<B, 2>([ROWS, D_MODEL], &device);
            b.iter(|| {
                let plan = cache.step(&[0, 1, 2, 3]);
                black_box(attention.step(token.clone(), &plan, cache.layer_mut(0)));
                B::sync(&device).expect("the device works");
                // Back to the same length, so that every step does the same work.
                for row in 0..ROWS {
                    cache.truncate(row, tokens).expect("the end of a chunk");
                }
            });
        });
        group.finish();
    }
}

fn all(c: &mut Criterion) {
    #[cfg(feature = "flex")]
    layer::<backends::Flex>(c);
    #[cfg(feature = "ndarray")]
    layer::<backends::NdArray>(c);
    #[cfg(feature = "wgpu")]
    layer::<backends::Wgpu>(c);
    #[cfg(feature = "cuda")]
    layer::<backends::Cuda>(c);
    #[cfg(feature = "tch")]
    layer::<backends::LibTorch>(c);
}

criterion_group!(benches, all);
criterion_main!(benches);
