//! The products around a step, by the kernel for few rows and by Burn's own.

use std::time::Duration;

use burn::tensor::{Distribution, Tensor};
use burn_wgpu::WgpuDevice;
use mtla_benches::D_MODEL;
use mtla_core::{ops::AttentionBackend, testing::backends::WgpuBare as B};

use crate::time;

/// Rows of a step with one row, with beams, and of short prompts.
const ROWS: [usize; 8] = [1, 2, 4, 8, 16, 40, 64, 128];
/// Of a projection, and of both halves of a feed-forward network.
const SHAPES: [[usize; 2]; 3] = [
    [D_MODEL, D_MODEL],
    [D_MODEL, 4 * D_MODEL],
    [4 * D_MODEL, D_MODEL],
];

/// Prints a line of JSON for each shape and number of rows.
pub(crate) fn measure(device: &WgpuDevice) {
    for [inputs, outputs] in SHAPES {
        let weight = random([inputs, outputs], device);
        for rows in ROWS {
            let x = random([rows, inputs], device);
            let kernel = time(device, || drop(B::product(x.clone(), weight.clone())));
            let burn = time(device, || drop(x.clone().matmul(weight.clone())));
            let us = |time: Duration| (time.as_secs_f64() * 1e6).round();
            println!(
                "{{\"inputs\": {inputs}, \"outputs\": {outputs}, \"rows\": {rows}, \"kernel_us\": {}, \"burn_us\": {}, \
                 \"ratio\": {:.2}}}",
                us(kernel),
                us(burn),
                burn.as_secs_f64() / kernel.as_secs_f64(),
            );
        }
    }
}

fn random(shape: [usize; 2], device: &WgpuDevice) -> Tensor<B, 2> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), device)
}
