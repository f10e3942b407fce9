//! Half precision: a cache of 16-bit slots under 32-bit activations, and whole layers in 16 bits.
//!
//! Positions, chunk numbers and lengths are integers and angles are 32 bits, so a long sequence must not
//! end where the 16-bit types stop counting (bfloat16 at 256, float16 at 2048); the runs here are longer.
//!
//! A number rounded to a type of unit roundoff `u` (2⁻⁸ for bfloat16, 2⁻¹¹ for float16) moves by at most
//! `u` times itself. A slot is rounded once for each of its `s` tokens, which moves keys and values by
//! `δ ≤ s·u` of their size. A head's output then moves by at most `δ (1 + 2A)` times the largest value,
//! where `A` bounds `Σ |q_i k_i| · scale`, about 3 for the weights here; the errors of different elements
//! are independent, which leaves little of it: the bound here is `4 s·u`.
//!
//! Its own binary, because a process can set the default types of a device once, and here they are
//! `float16` and 32-bit integers.

#![cfg(feature = "flex")]

mod common;

use std::sync::Once;

use burn::{
    module::Module,
    tensor::{DType, FloatDType, Tensor, set_default_dtypes},
};
use burn_flex::Flex;
use common::{
    F32, Numbers, Precision, Tokens,
    layer::{Fill, Layer},
    rows_of, vectors,
};
use mtla_core::{
    attention::{AttentionConfig, AttentionInput, CrossAttentionConfig, CrossInput},
    cache::Cache,
};

type Device = <Flex as burn::tensor::backend::BackendTypes>::Device;

const HALF: [(DType, f64); 2] = [(DType::BF16, 1.0 / 256.0), (DType::F16, 1.0 / 2048.0)];

/// The device, with float16 and 32-bit integers as its default types.
fn device() -> Device {
    static TYPES: Once = Once::new();
    let device = Device::default();
    TYPES.call_once(|| set_default_dtypes::<Flex>(&device, FloatDType::F16, DType::I32).unwrap());
    device
}

fn forward(layer: &Layer<Flex>, rows: &[Tokens]) -> Vec<Tokens> {
    let lengths: Vec<usize> = rows.iter().map(Vec::len).collect();
    let input = AttentionInput::new(layer.padded(rows, common::longest(&lengths)));
    let output = layer.module.forward(input.with_lengths(lengths)).context;
    assert_eq!(output.dtype(), layer.precision.dtype);
    rows_of(output)
}

/// Prefills unequal prompts and decodes the rest; returns the outputs of all tokens.
fn cached(layer: &Layer<Flex>, rows: &[Tokens], prompts: &[usize], slots: DType) -> Vec<Tokens> {
    let spec = layer.module.cache_spec().with_dtype(slots);
    let mut cache = Cache::new(spec, 1, &device());
    let all: Vec<usize> = cache.join(rows.len()).collect();
    let prompt: Vec<Tokens> = rows
        .iter()
        .zip(prompts)
        .map(|(row, n)| row[..*n].to_vec())
        .collect();
    let plan = cache.extend(&all, prompts);
    let x = layer.padded(&prompt, common::longest(prompts));
    let mut found = rows_of(layer.module.prefill(x, &plan, cache.layer_mut(0)));
    for (found, n) in found.iter_mut().zip(prompts) {
        found.truncate(*n);
    }
    let left = |cache: &Cache<Flex>| -> Vec<usize> {
        all.iter()
            .copied()
            .filter(|row| cache.len(*row) < rows[*row].len())
            .collect()
    };
    let mut going = left(&cache);
    while !going.is_empty() {
        let next: Tokens = going
            .iter()
            .map(|row| rows[*row][cache.len(*row)].clone())
            .collect();
        let plan = cache.step(&going);
        let y = layer
            .module
            .step(layer.flat(&next), &plan, cache.layer_mut(0));
        assert_eq!(y.dtype(), layer.precision.dtype);
        for (row, y) in going.iter().zip(vectors(y)) {
            found[*row].push(y);
        }
        going = left(&cache);
    }
    assert_eq!(cache.layer(0).slots().dtype(), slots);
    for (row, tokens) in rows.iter().enumerate() {
        let slots = tokens.len().div_ceil(layer.stride);
        assert_eq!(cache.len(row), tokens.len());
        assert_eq!(
            cache.row_slots(row).len(),
            slots,
            "every token has its place"
        );
        let distinct: std::collections::HashSet<_> = cache.row_slots(row).iter().collect();
        assert_eq!(distinct.len(), slots);
    }
    let held: usize = rows
        .iter()
        .map(|row| row.len().div_ceil(layer.stride))
        .sum();
    let width = spec.layout.width();
    assert_eq!(cache.live_bytes(), held * width * 2, "two bytes an element");
    found
}

/// The largest difference, relative to the largest entry of `expected`.
fn distance(found: &[Tokens], expected: &[Tokens]) -> f64 {
    let largest = expected
        .iter()
        .flatten()
        .flatten()
        .fold(0.0, |a: f64, b| a.max(b.abs()));
    let mut worst: f64 = 0.0;
    for (found, expected) in found.iter().zip(expected) {
        assert!(found.len() >= expected.len());
        for (a, b) in found.iter().flatten().zip(expected.iter().flatten()) {
            assert!(a.is_finite());
            worst = worst.max((a - b).abs());
        }
    }
    worst / largest
}

fn check_slots(config: &AttentionConfig, lengths: &[usize], prompts: &[usize]) {
    let layer = Layer::<Flex>::new(config, 1, F32, &device());
    let rows = Numbers::new(2).rows(lengths, layer.d_model);
    let expected: Vec<Tokens> = forward(&layer, &rows)
        .into_iter()
        .zip(lengths)
        .map(|(row, n)| row[..*n].to_vec())
        .collect();
    for (dtype, u) in HALF {
        let found = cached(&layer, &rows, prompts, dtype);
        let (error, bound) = (
            distance(&found, &expected),
            4.0 * config.down_rate() as f64 * u,
        );
        println!("{dtype:?} slots, {lengths:?} tokens: {error:.2e}, bound {bound:.2e}");
        assert!(error < bound, "{dtype:?}: {error:e} is above {bound:e}");
        assert!(
            error > u / 64.0,
            "{dtype:?}: {error:e}: were the slots rounded at all?"
        );
    }
}

#[test]
fn slots_of_300_tokens() {
    for config in [
        AttentionConfig::gqa(16, 4, 2),
        AttentionConfig::mla(16, 2),
        AttentionConfig::mtla(16, 2).with_down_rate(1),
        AttentionConfig::mtla(16, 2).with_down_rate(3),
    ] {
        check_slots(&config, &[300, 290], &[7, 0]);
    }
}

#[test]
fn slots_of_2100_tokens() {
    check_slots(&AttentionConfig::mtla(16, 2), &[2100], &[5]);
}

#[test]
fn slots_of_2100_tokens_one_each() {
    check_slots(&AttentionConfig::mqa(8, 2), &[2100], &[5]);
}

/// Whole layers in 16 bits: every product is rounded too, so the bound is wider.
#[test]
fn whole_layers() {
    for config in [
        AttentionConfig::mha(16, 2).with_bias(true),
        AttentionConfig::mla(16, 2),
        AttentionConfig::mtla(16, 2).with_down_rate(3),
    ] {
        let full = Layer::<Flex>::new(&config, 1, F32, &device());
        let rows = Numbers::new(2).rows(&[300, 290], full.d_model);
        let expected: Vec<Tokens> = forward(&full, &rows)
            .into_iter()
            .zip(&rows)
            .map(|(found, row)| found[..row.len()].to_vec())
            .collect();
        for (dtype, u) in HALF {
            let precision = Precision { dtype, ..F32 };
            let layer = Layer::<Flex>::new(&config, 1, precision, &device());
            let bound = 8.0 * config.down_rate() as f64 * u;
            for found in [
                forward(&layer, &rows),
                cached(&layer, &rows, &[7, 2], dtype),
            ] {
                let error = distance(&found, &expected);
                println!("{dtype:?} throughout: {error:.2e}, bound {bound:.2e}");
                assert!(error < bound, "{dtype:?}: {error:e} is above {bound:e}");
            }
        }
    }
}

/// Layers and caches follow the default types of the device.
#[test]
fn defaults_of_the_device() {
    let config = AttentionConfig::mtla(16, 2);
    let module = config
        .init::<Flex>(&device())
        .unwrap()
        .map(&mut Fill::new(1, DType::F16));
    let mut cache = Cache::<Flex>::new(module.cache_spec(), 1, &device());
    assert_eq!(cache.layer(0).slots().dtype(), DType::F16);
    let rows = Numbers::new(2).rows(&[40], 16);
    let x: Tensor<Flex, 3> = common::padded(&rows, [40, 16], DType::F16, &device());
    cache.join(1);
    let plan = cache.extend(&[0], &[40]);
    let cached = rows_of(module.prefill(x.clone(), &plan, cache.layer_mut(0)));
    let full = Layer::<Flex>::new(&config, 1, F32, &device());
    assert!(distance(&cached, &forward(&full, &rows)) < 16.0 / 2048.0);
    assert_eq!(cache.live_bytes(), 20 * (32 + 4) * 2);

    let weights = module
        .forward(AttentionInput::new(x).with_weights())
        .weights
        .unwrap();
    let sums = common::values(weights.sum_dim(3));
    assert!(sums.iter().all(|sum| (sum - 1.0).abs() < 8.0 / 2048.0));
}

#[test]
fn cross_attention() {
    let config = CrossAttentionConfig::new(16, 2);
    let mut numbers = Numbers::new(3);
    let (query, source) = (numbers.rows(&[5], 16), numbers.rows(&[301], 16));
    let output = |dtype| {
        let module = config
            .init::<Flex>(&device())
            .unwrap()
            .map(&mut Fill::new(1, dtype));
        let tensor =
            |rows: &[Tokens]| common::padded::<Flex>(rows, [rows[0].len(), 16], dtype, &device());
        let whole = module.forward(CrossInput::new(tensor(&query), tensor(&source)));
        let mut cache = Cache::new(module.cache_spec().with_dtype(dtype), 1, &device());
        cache.join(1);
        let plan = cache.extend(&[0], &[301]);
        module.prefill_source(tensor(&source), &plan, cache.layer_mut(0));
        let x = common::flat(&query[0][..1], dtype, &device());
        let first = module.step(x, &cache.table(&[0]), cache.layer(0));
        (rows_of(whole), vec![vectors(first)])
    };
    let (expected, _) = output(DType::F32);
    for (dtype, u) in HALF {
        let (whole, first) = output(dtype);
        let error = distance(&whole, &expected).max(distance(&first, &[expected[0][..1].to_vec()]));
        println!(
            "{dtype:?} cross-attention: {error:.2e}, bound {:.2e}",
            16.0 * u
        );
        assert!(error < 16.0 * u, "{dtype:?}: {error:e}");
    }
}
