//! What the property tests share: seeded numbers, layers of any shape with an oracle beside them, and
//! the way between rows of vectors and padded tensors.
//!
//! Strategies draw shapes and a seed; values come from the seed, so that a failing case stays readable
//! and shrinks quickly.

#![allow(dead_code, reason = "every test binary uses its own part")]

#[cfg(feature = "flex")]
pub(crate) mod attend;
pub(crate) mod layer;
pub(crate) mod oracle;

use burn::tensor::{DType, Tensor, TensorData, backend::Backend};
use proptest::{
    strategy::Strategy,
    test_runner::{RngAlgorithm, TestRng, TestRunner},
};

pub(crate) use oracle::Tokens;

/// Runs `property` on `cases` values of `strategy`, the same ones in every run; `PROPTEST_CASES`
/// multiplies them for a longer search.
pub(crate) fn check<S: Strategy>(cases: u32, strategy: S, property: impl Fn(S::Value)) {
    let factor = std::env::var("PROPTEST_CASES")
        .ok()
        .and_then(|x| x.parse().ok());
    let config = proptest::prelude::ProptestConfig {
        failure_persistence: None,
        cases: cases * factor.unwrap_or(1),
        ..Default::default()
    };
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    TestRunner::new_with_rng(config, rng)
        .run(&strategy, |value| {
            property(value);
            Ok(())
        })
        .unwrap_or_else(|error| panic!("{error}"));
}

/// The element type of a test and how far its results may be from 64-bit ones, relative to the largest.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Precision {
    pub(crate) dtype: DType,
    pub(crate) tolerance: f64,
}

/// The norms here run over as few as three numbers, and some backends take a variance as `E[x²] − E[x]²`:
/// rounding errors grow a thousandfold before they reach an output.
pub(crate) const F32: Precision = Precision {
    dtype: DType::F32,
    tolerance: 3e-4,
};
/// Burn's sigmoid works in 32 bits on some backends; on others the results agree to 1e-12.
pub(crate) const F64: Precision = Precision {
    dtype: DType::F64,
    tolerance: 1e-6,
};

impl Precision {
    /// The precision that a drawn case is computed in: 64 bits for odd seeds, where the backend has them,
    /// and else 32.
    pub(crate) fn drawn<B: Backend>(seed: u64, device: &B::Device) -> Self {
        let wide = !seed.is_multiple_of(2) && B::supports_dtype(device, DType::F64);
        if wide { F64 } else { F32 }
    }
}

/// A stream of numbers that depends on the seed alone (splitmix64).
#[derive(Debug, Clone)]
pub(crate) struct Numbers(u64);

impl Numbers {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    pub(crate) fn below(&mut self, end: usize) -> usize {
        (self.bits() % end as u64) as usize
    }

    fn uniform(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Standard normal, exact in 32 bits.
    pub(crate) fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        f64::from((radius * (std::f64::consts::TAU * self.uniform()).cos()) as f32)
    }

    pub(crate) fn normals(&mut self, count: usize) -> Vec<f64> {
        (0..count).map(|_| self.normal()).collect()
    }

    pub(crate) fn tokens(&mut self, count: usize, width: usize) -> Tokens {
        (0..count)
            .map(|_| (0..width).map(|_| self.normal()).collect())
            .collect()
    }

    pub(crate) fn rows(&mut self, lengths: &[usize], width: usize) -> Vec<Tokens> {
        lengths
            .iter()
            .map(|length| self.tokens(*length, width))
            .collect()
    }
}

/// Rows as one padded tensor `[rows, longest, width]`. Padding is large, so that its influence shows.
pub(crate) fn padded<B: Backend>(
    rows: &[Tokens],
    [longest, width]: [usize; 2],
    dtype: DType,
    device: &B::Device,
) -> Tensor<B, 3> {
    let mut values = Vec::new();
    for row in rows {
        values.extend(row.iter().flatten());
        let missing = (longest - row.len()) * width;
        values.extend((0..missing).map(|i| if i % 3 == 0 { 90.0 } else { -70.0 }));
    }
    let data = TensorData::new(values, [rows.len(), longest, width]);
    Tensor::from_data(data.convert_dtype(dtype), (device, dtype))
}

/// One token a row as a tensor `[rows, width]`.
pub(crate) fn flat<B: Backend>(
    tokens: &[Vec<f64>],
    dtype: DType,
    device: &B::Device,
) -> Tensor<B, 2> {
    let data = TensorData::new(tokens.concat(), [tokens.len(), tokens[0].len()]);
    Tensor::from_data(data.convert_dtype(dtype), (device, dtype))
}

/// Slots that each row begins with as the row before it does.
pub(crate) fn common_slots(tables: &[Vec<usize>]) -> Vec<usize> {
    let before = std::iter::once(&[][..]).chain(tables.iter().map(Vec::as_slice));
    let alike =
        |(a, b): (&[usize], &Vec<usize>)| a.iter().zip(b).take_while(|(a, b)| a == b).count();
    before.zip(tables).map(alike).collect()
}

/// All elements in 64 bits.
pub(crate) fn values<B: Backend, const D: usize>(x: Tensor<B, D>) -> Vec<f64> {
    x.into_data().iter::<f64>().collect()
}

/// `[n, width]` as vectors.
pub(crate) fn vectors<B: Backend>(x: Tensor<B, 2>) -> Tokens {
    let width = x.dims()[1];
    values(x).chunks(width).map(<[f64]>::to_vec).collect()
}

/// `[rows, tokens, width]` as rows of vectors.
pub(crate) fn rows_of<B: Backend>(x: Tensor<B, 3>) -> Vec<Tokens> {
    let [rows, tokens, width] = x.dims();
    let all = vectors(x.reshape([rows * tokens, width]));
    all.chunks(tokens).map(<[Vec<f64>]>::to_vec).collect()
}

/// The longest of the lengths.
pub(crate) fn longest(lengths: &[usize]) -> usize {
    lengths.iter().copied().max().unwrap_or(0)
}

/// Asserts that the first vectors of `found` are `expected`, up to `tolerance` times the largest entry
/// (or 1).
#[track_caller]
pub(crate) fn assert_close(found: &[Vec<f64>], expected: &[Vec<f64>], tolerance: f64, what: &str) {
    let largest = expected
        .iter()
        .flatten()
        .fold(1.0, |a: f64, b| a.max(b.abs()));
    assert!(
        found.len() >= expected.len(),
        "{what}: {} vectors",
        found.len()
    );
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert_eq!(found.len(), expected.len(), "{what}: width of vector {i}");
        for (column, (a, b)) in found.iter().zip(expected).enumerate() {
            let error = (a - b).abs() / largest;
            assert!(
                error <= tolerance,
                "{what}: vector {i}, entry {column} is {a}, expected {b} (off by {error:e})"
            );
        }
    }
}
