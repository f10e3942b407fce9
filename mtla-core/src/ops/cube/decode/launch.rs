//! From tensors to launches.

use burn::tensor::DType;
use burn_cubecl::{CubeRuntime, cubecl, kernel::into_contiguous, tensor::CubeTensor};
use cubecl::{calculate_cube_count_elemwise, prelude::*};

use super::{
    super::{
        super::{LaunchKind, launches},
        memory::{empty, own},
    },
    Operands,
    combine::combine_kernel,
    kernel::{TeamTilesLaunch, decode_kernel},
    plan::DecodePlan,
};

/// The result `[rows, heads, value_width]`, and the pool, in place if nobody else holds it.
pub(super) fn launch<R: CubeRuntime>(
    operands: Operands<CubeTensor<R>>,
    plan: &DecodePlan,
) -> [CubeTensor<R>; 2] {
    let Operands {
        q,
        row,
        rotary,
        gates,
        pool,
        table,
    } = operands;
    let DecodePlan {
        shape, types, rows, ..
    } = *plan;
    let (client, device) = (q.client.clone(), q.device.clone());
    let pool = own(into_contiguous(pool));
    let address = pool.required_address_type();
    let (heads, width) = (
        shape.heads * shape.kv_heads,
        shape.value_width * shape.vector,
    );
    let new = |shape: Vec<usize>, dtype| empty(&client, &device, shape.into(), dtype);
    let out = new(vec![rows, heads, width], types.float);
    let partial = shape.parts.then(|| {
        let width = width + 2 * shape.vector;
        new(vec![rows, plan.parts, heads, width], DType::F32)
    });
    let target = partial.as_ref().unwrap_or(&out).clone();
    let target_type = target.dtype;

    let cubes = CubeCount::Static(plan.parts as u32, plan.teams as u32, shape.kv_heads as u32);
    launches::count(LaunchKind::CubeDecode);
    if plan.tiles[0] > 0 {
        launches::count(LaunchKind::CubeDecodeTeams);
    }
    // SAFETY: what the kernel reads and writes lies within its operands, whose shapes were checked against the
    // problem, and entries of the table are held within the pool.
    unsafe {
        decode_kernel::launch_unchecked::<R>(
            &client,
            cubes,
            CubeDim::new_1d(shape.units as u32),
            address,
            shape.vector,
            into_contiguous(q).into_tensor_arg(),
            into_contiguous(row).into_tensor_arg(),
            rotary
                .map(|rotary| into_contiguous(rotary).into_tensor_arg())
                .into(),
            gates
                .map(|gates| into_contiguous(gates).into_tensor_arg())
                .into(),
            pool.clone().into_tensor_arg(),
            into_contiguous(table).into_tensor_arg(),
            target.into_tensor_arg(),
            TeamTilesLaunch::new(plan.tiles[0] as u32, plan.tiles[1] as u32),
            plan.stride,
            plan.scale,
            shape,
            [
                types.float.into(),
                types.pool.into(),
                types.table.into(),
                target_type.into(),
            ],
        );
    }
    if let Some(partial) = partial {
        combine(partial, &out, plan);
    }
    [out, pool]
}

/// Puts the parts of every row together into `out`.
fn combine<R: CubeRuntime>(partial: CubeTensor<R>, out: &CubeTensor<R>, plan: &DecodePlan) {
    let DecodePlan {
        shape, types, rows, ..
    } = *plan;
    let client = &out.client;
    let vectors = rows * shape.heads * shape.kv_heads * shape.value_width;
    let units = CubeDim::new(client, vectors);
    launches::count(LaunchKind::CubeDecodeCombine);
    // SAFETY: there is a unit for each vector of `out`, and `partial` has all parts of each.
    unsafe {
        combine_kernel::launch_unchecked::<R>(
            client,
            calculate_cube_count_elemwise(client, vectors, units),
            units,
            partial.required_address_type(),
            shape.vector,
            partial.into_tensor_arg(),
            out.clone().into_tensor_arg(),
            shape.value_width,
            types.float.into(),
        );
    }
}
