//! Products of few rows.

use std::{ops::Range, time::Instant};

use burn::tensor::{DType, Tensor, TensorData, backend::Backend};
use burn_autodiff::Autodiff;
use burn_flex::{Flex, FlexDevice};
use burn_wgpu::WgpuDevice;
use mtla_core::{
    ops::{AttentionBackend, HeadMatrices, LaunchKind, launches},
    testing::backends::{Wgpu, WgpuBare},
};

use crate::{
    alone,
    common::{Numbers, values},
};

/// How a matrix lies in memory.
#[derive(Debug, Clone, Copy)]
enum Lie {
    Rows,
    Columns,
    /// Rows of a wider matrix, from a column on.
    Part,
}

#[derive(Debug)]
struct Case {
    rows: usize,
    heads: usize,
    /// Channels that are multiplied, that they become, and that stay.
    inputs: usize,
    outputs: usize,
    rest: usize,
    lies: [Lie; 2],
    transposed: bool,
    /// Columns of a head's block before its matrix, and behind it.
    around: [usize; 2],
    seed: u64,
}

impl Case {
    fn new(seed: u64) -> Self {
        let mut n = Numbers::new(seed);
        let mut pick = |of: &[usize]| of[n.below(of.len())];
        let lies = [Lie::Rows, Lie::Columns, Lie::Part];
        Self {
            rows: pick(&[1, 1, 1, 2, 3, 4, 5, 7, 10, 12, 17, 24]),
            heads: pick(&[1, 2, 3, 4, 8]),
            inputs: pick(&[1, 2, 7, 16, 30, 64, 96, 257, 512]),
            outputs: pick(&[1, 3, 6, 8, 33, 64, 80, 455, 1024]),
            rest: pick(&[0, 0, 1, 8, 32]),
            lies: [lies[pick(&[0, 0, 1, 2])], lies[pick(&[0, 0, 1, 2])]],
            transposed: pick(&[0, 1]) == 1,
            around: [pick(&[0, 3, 16]), pick(&[0, 5, 16])],
            seed,
        }
    }

    /// The product of two matrices.
    fn product<B: AttentionBackend>(&self, device: &B::Device, dtype: DType) -> Tensor<B, 2> {
        let mut n = Numbers::new(self.seed);
        let a = matrix(
            &mut n,
            [self.rows, self.inputs],
            self.lies[0],
            device,
            dtype,
        );
        let b = matrix(
            &mut n,
            [self.inputs, self.outputs],
            self.lies[1],
            device,
            dtype,
        );
        B::product(a, b)
    }

    /// The product of heads with matrices of their own.
    fn heads<B: AttentionBackend>(&self, device: &B::Device, dtype: DType) -> Tensor<B, 3> {
        let mut n = Numbers::new(self.seed);
        let width = self.inputs + self.rest;
        let x = matrix::<B>(
            &mut n,
            [self.rows, self.heads * width],
            self.lies[0],
            device,
            dtype,
        );
        let (rank, columns) = if self.transposed {
            (self.outputs, self.inputs)
        } else {
            (self.inputs, self.outputs)
        };
        let [before, behind] = self.around;
        let block = before + columns + behind;
        let matrices = HeadMatrices {
            weight: matrix(
                &mut n,
                [rank, self.heads * block],
                self.lies[1],
                device,
                dtype,
            ),
            heads: self.heads,
            columns: before..before + columns,
            transposed: self.transposed,
        };
        B::multiply_heads(x.reshape([self.rows, self.heads, width]), matrices)
    }
}

fn matrix<B: Backend>(
    n: &mut Numbers,
    [lines, width]: [usize; 2],
    lie: Lie,
    device: &B::Device,
    dtype: DType,
) -> Tensor<B, 2> {
    let scale = (width as f64).powf(-0.5);
    let mut new = |shape: [usize; 2]| {
        let values: Vec<f64> = n.normals(shape[0] * shape[1]);
        let values: Vec<f64> = values.iter().map(|x| x * scale).collect();
        // All types see what the narrowest of them can hold.
        let data = TensorData::new(values, shape).convert_dtype(DType::F16);
        Tensor::<B, 2>::from_data(data.convert_dtype(dtype), (device, dtype))
    };
    match lie {
        Lie::Rows => new([lines, width]),
        Lie::Columns => new([width, lines]).transpose(),
        Lie::Part => new([lines, width + 5]).narrow(1, 4, width),
    }
}

/// Runs cases on a backend, of whose two operations `kernels` have one; `tolerance` is relative to the largest number.
fn compare<B: AttentionBackend<Device = WgpuDevice>>(
    name: &str,
    seeds: Range<u64>,
    kernels: u64,
    dtype: DType,
    tolerance: f64,
) {
    let start = Instant::now();
    let device = WgpuDevice::default();
    let mut worst = 0.0f64;
    for seed in seeds.clone() {
        let case = Case::new(seed);
        let count = || launches(LaunchKind::CubeProduct);
        let before = count();
        let found = [
            values(case.product::<B>(&device, dtype)),
            values(case.heads::<B>(&device, dtype)),
        ];
        assert_eq!(count(), before + kernels, "{name}: {case:?}");
        let expected = [
            values(case.product::<Flex>(&FlexDevice, DType::F64)),
            values(case.heads::<Flex>(&FlexDevice, DType::F64)),
        ];
        for (found, expected) in found.iter().zip(&expected) {
            assert_eq!(found.len(), expected.len());
            let largest = expected.iter().fold(1.0, |a: f64, b| a.max(b.abs()));
            for (i, (a, b)) in found.iter().zip(expected).enumerate() {
                let error = (a - b).abs() / largest;
                assert!(error <= tolerance, "{name}: {a}, not {b} at {i}: {case:?}");
                worst = worst.max(error);
            }
        }
    }
    println!(
        "{name}: {} cases, largest error {worst:.1e}, {:.1?}",
        2 * (seeds.end - seeds.start),
        start.elapsed()
    );
}

#[test]
fn products_are_the_plain_ones() {
    let _alone = alone();
    compare::<WgpuBare>("bare", 0..100, 2, DType::F32, 1e-5);
    compare::<Wgpu>("fusion", 150..180, 2, DType::F32, 1e-5);
    // Autodiff traces the plain form of the second.
    compare::<Autodiff<WgpuBare>>("autodiff", 200..210, 1, DType::F32, 1e-5);
    if WgpuBare::supports_dtype(&WgpuDevice::default(), DType::F16) {
        compare::<WgpuBare>("f16", 220..240, 2, DType::F16, 1e-3);
    }
}

#[test]
fn many_rows_are_left_to_burn() {
    let _alone = alone();
    let device = WgpuDevice::default();
    let before = launches(LaunchKind::CubeProduct);
    let case = Case {
        rows: 25,
        ..Case::new(1)
    };
    let found = values(case.product::<WgpuBare>(&device, DType::F32));
    let expected = values(case.product::<Flex>(&FlexDevice, DType::F64));
    for (a, b) in found.iter().zip(&expected) {
        assert!((a - b).abs() < 1e-4, "{a}, not {b}");
    }
    assert_eq!(launches(LaunchKind::CubeProduct), before);
}
