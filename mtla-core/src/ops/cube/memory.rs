//! Tensors that kernels write to.

use std::sync::atomic::{AtomicBool, Ordering};

use burn::tensor::{DType, Shape};
use burn_cubecl::{
    CubeRuntime, cubecl,
    kernel::into_contiguous,
    ops::numeric::{empty_device_contiguous_dtype, full_device_dtype},
    tensor::CubeTensor,
};
use cubecl::prelude::*;

/// A tensor that can be written to: itself, or a copy where its memory is shared. Rows lie one after the other in
/// both, which not every device does by itself.
pub(super) fn own<R: CubeRuntime>(x: CubeTensor<R>) -> CubeTensor<R> {
    if x.can_mut() && x.is_nonoverlapping() {
        x
    } else {
        copy(&x)
    }
}

/// Its numbers elsewhere, rows one after the other.
pub(super) fn copy<R: CubeRuntime>(x: &CubeTensor<R>) -> CubeTensor<R> {
    into_contiguous(x.copy())
}

static POISON: AtomicBool = AtomicBool::new(false);

/// Whether, from now on and in the whole process, memory that a kernel is to write is filled with NaN before: what a
/// kernel leaves out then shows. For tests.
pub fn poison_outputs(poison: bool) {
    POISON.store(poison, Ordering::Relaxed);
}

/// A new tensor, its rows one after the other.
pub(super) fn empty<R: CubeRuntime>(
    client: &ComputeClient<R>,
    device: &R::Device,
    shape: Shape,
    dtype: DType,
) -> CubeTensor<R> {
    let (client, device) = (client.clone(), device.clone());
    if POISON.load(Ordering::Relaxed) {
        let nan = InputScalar::new(f32::NAN, dtype);
        return into_contiguous(full_device_dtype(client, shape, device, nan, dtype));
    }
    empty_device_contiguous_dtype(client, device, shape, dtype)
}
