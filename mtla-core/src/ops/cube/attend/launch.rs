//! From tensors to a launch.

use burn::tensor::DType;
use burn_cubecl::{CubeRuntime, cubecl, kernel::into_contiguous, tensor::CubeTensor};
use cubecl::prelude::*;

use super::{
    super::{
        super::{LaunchKind, dropout::DropoutNumbers, launches},
        memory::empty,
    },
    Operands,
    kernel::{KeptLaunch, PlacesLaunch, attend_kernel},
    plan::{AttendPlan, UNITS},
};

/// What differs from launch to launch of a kernel.
#[derive(Debug, Clone, Copy)]
pub(super) struct Numbers {
    pub(super) columns: u32,
    pub(super) step: u32,
    pub(super) own: u32,
    pub(super) furthest: u32,
    pub(super) scale: f32,
    pub(super) dropout: Option<DropoutNumbers>,
}

/// The result `[batch, queries, heads, value_width]`, and for each query `ln Σ e^score`, `[batch, queries, heads, 1]`.
pub(super) fn launch<R: CubeRuntime>(
    operands: Operands<CubeTensor<R>>,
    plan: &AttendPlan,
    numbers: &Numbers,
) -> (CubeTensor<R>, CubeTensor<R>) {
    let shape = plan.shape;
    let Operands {
        q,
        k,
        shared,
        v,
        rows,
    } = operands;
    let rows = into_contiguous(rows);
    let [q, k, v] = [q, k, v].map(|x| in_vectors(x, shape.vector));
    let shared = shared.map(|x| in_vectors(x, shape.vector));
    let (client, device) = (q.client.clone(), q.device.clone());
    let (batch, heads, queries) = (q.meta.shape()[0], q.meta.shape()[1], q.meta.shape()[2]);
    let new = |width, dtype| {
        let shape = vec![batch, queries, heads, width];
        empty(&client, &device, shape.into(), dtype)
    };
    let out = new(shape.value_width * shape.vector, plan.dtype);
    let log_sum = new(1, DType::F32);
    let address = [Some(&q), Some(&k), shared.as_ref(), Some(&v), Some(&out)]
        .into_iter()
        .flatten()
        .map(CubeTensor::required_address_type)
        .max()
        .expect("there are some");
    let dropout = numbers.dropout.unwrap_or_default();
    let [tiles, rows_of, heads_of] = plan.cubes;
    launches::count(LaunchKind::CubeAttend);
    // SAFETY: what the kernel reads and writes lies within its operands, whose shapes were checked against the
    // problem; tokens are held within the keys.
    unsafe {
        attend_kernel::launch_unchecked::<R>(
            &client,
            CubeCount::Static(tiles, rows_of, heads_of),
            CubeDim::new_1d(UNITS as u32),
            address,
            shape.vector,
            q.into_tensor_arg(),
            k.into_tensor_arg(),
            shared.map(CubeTensor::into_tensor_arg).into(),
            v.into_tensor_arg(),
            rows.clone().into_tensor_arg(),
            out.clone().into_tensor_arg(),
            log_sum.clone().into_tensor_arg(),
            PlacesLaunch::new(numbers.columns, numbers.step, numbers.own, numbers.furthest),
            KeptLaunch::new(dropout.seed, dropout.threshold, dropout.factor),
            plan.stride,
            numbers.scale,
            shape,
            [plan.dtype.into(), rows.dtype.into()],
        );
    }
    (out, log_sum)
}

/// A tensor that can be read in vectors of this many elements: itself, or a copy.
fn in_vectors<R: CubeRuntime>(x: CubeTensor<R>, vector: usize) -> CubeTensor<R> {
    let (last, outer) = x.meta.strides().split_last().expect("four dimensions");
    let begins = x.handle.offset_start.unwrap_or_default() as usize;
    let is_aligned = outer.iter().all(|stride| stride.is_multiple_of(vector))
        && begins.is_multiple_of(vector * x.dtype.size());
    if *last == 1 && is_aligned {
        x
    } else {
        into_contiguous(x)
    }
}
