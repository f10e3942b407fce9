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
    kernel::decode_kernel,
    plan::DecodePlan,
    tile::TeamTilesLaunch,
};

/// A step whose results have their places: `out`, and the pool itself.
#[derive(Clone)]
pub(super) struct Step<R: CubeRuntime> {
    pub(super) operands: Operands<CubeTensor<R>>,
    pub(super) out: CubeTensor<R>,
}

/// The result `[rows, heads, value_width]`, and the pool, in place if nobody else holds it; `run` is given the step.
pub(super) fn launch<R: CubeRuntime>(
    operands: Operands<CubeTensor<R>>,
    plan: &DecodePlan,
    run: impl FnOnce(Step<R>),
) -> [CubeTensor<R>; 2] {
    let shape = plan.shape;
    let pool = own(into_contiguous(operands.pool));
    let dims = [
        plan.rows,
        shape.heads * shape.kv_heads,
        shape.value_width * shape.vector,
    ];
    let out = empty(&pool.client, &pool.device, dims.into(), plan.types.float);
    let operands = Operands {
        pool: pool.clone(),
        ..operands
    };
    run(Step {
        operands,
        out: out.clone(),
    });
    [out, pool]
}

impl DecodePlan {
    /// Launches the step, and counts it.
    pub(super) fn run<R: CubeRuntime>(&self, step: Step<R>) {
        launches::count(LaunchKind::CubeDecode);
        if self.tiles[0] > 0 {
            launches::count(LaunchKind::CubeDecodeTeams);
        }
        if self.shape.matrices.is_some() {
            launches::count(LaunchKind::CubeDecodeTensorCores);
        }
        if self.shape.parts {
            launches::count(LaunchKind::CubeDecodeCombine);
        }
        self.launch(step);
    }

    pub(super) fn launch<R: CubeRuntime>(&self, step: Step<R>) {
        let Step { operands, out } = step;
        let Operands {
            q,
            row,
            rotary,
            gates,
            pool,
            table,
        } = operands;
        let Self { shape, types, .. } = *self;
        let client = out.client.clone();
        let partial = shape.parts.then(|| {
            let width = (shape.value_width + 2) * shape.vector;
            let dims = [self.rows, self.parts, shape.heads * shape.kv_heads, width];
            empty(&client, &out.device, dims.into(), DType::F32)
        });
        let target = partial.as_ref().unwrap_or(&out).clone();
        let target_type = target.dtype;
        let cubes = CubeCount::Static(self.parts as u32, self.teams as u32, shape.kv_heads as u32);
        // SAFETY: what the kernel reads and writes lies within its operands, whose shapes were checked against the
        // problem, and entries of the table are held within the pool.
        unsafe {
            decode_kernel::launch_unchecked::<R>(
                &client,
                cubes,
                CubeDim::new_1d(shape.units as u32),
                pool.required_address_type(),
                shape.vector,
                into_contiguous(q).into_tensor_arg(),
                into_contiguous(row).into_tensor_arg(),
                rotary
                    .map(|rotary| into_contiguous(rotary).into_tensor_arg())
                    .into(),
                gates
                    .map(|gates| into_contiguous(gates).into_tensor_arg())
                    .into(),
                pool.into_tensor_arg(),
                into_contiguous(table).into_tensor_arg(),
                target.into_tensor_arg(),
                TeamTilesLaunch::new(self.tiles[0] as u32, self.tiles[1] as u32),
                self.stride,
                self.scale,
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
            combine(partial, &out, self);
        }
    }
}

/// Puts the parts of every row together into `out`.
fn combine<R: CubeRuntime>(partial: CubeTensor<R>, out: &CubeTensor<R>, plan: &DecodePlan) {
    let DecodePlan {
        shape, types, rows, ..
    } = *plan;
    let client = &out.client;
    let vectors = rows * shape.heads * shape.kv_heads * shape.value_width;
    let units = CubeDim::new(client, vectors);
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
