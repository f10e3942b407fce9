//! The operations of attention as CubeCL kernels, for every backend that CubeCL compiles for.
//!
//! * `attend` is the attention of whole sequences;
//! * `decode.rs` is the decoding kernel, `combine.rs` the one after it where rows have several parts;
//! * `plan.rs` chooses sizes from problem and device, and knows what cannot run;
//! * `launch.rs` makes room for results and launches;
//! * `fusion.rs` is the same under Burn's fusion, as a custom operation;
//! * `fallback.rs` is for when there is no kernel.

mod attend;
mod combine;
mod decode;
mod fallback;
mod fusion;
mod launch;
mod plan;

use burn::tensor::{Tensor, TensorPrimitive, backend::Backend};
use burn_cubecl::{
    BoolElement, CubeBackend, CubeRuntime, FloatElement, IntElement, tensor::CubeTensor,
};

use super::{DecodeOperands, DecodeProblem, plain};
use burn_cubecl::cubecl;
use cubecl::prelude::*;
pub use fallback::{KernelError, Unavailable, require_kernel};
pub use launch::poison_outputs;
use launch::{Operands, launch};
use plan::{DecodePlan, Types};
pub use plan::{Planes, use_planes};

/// Below any score, and finite.
const LOWEST: f32 = -1e30;

/// The sum of a vector's entries.
#[cube]
fn across<N: Size>(x: Vector<f32, N>) -> f32 {
    let mut sum = 0.0f32;
    #[unroll]
    for e in 0..N::value() {
        sum += x[e];
    }
    sum
}

/// What a step gives: the result `[rows, heads, value_width]`, and the pool.
pub type Decoded<B> = (Tensor<B, 3>, Tensor<B, 2>);

/// [`decode`](crate::ops::AttentionBackend::decode) by the kernel, or not at all.
///
/// # Errors
/// [`KernelError`] says whether the operands do not fit, or the kernel cannot run them.
pub fn try_decode<R, F, I, BT>(
    operands: DecodeOperands<CubeBackend<R, F, I, BT>>,
    problem: &DecodeProblem,
) -> Result<Decoded<CubeBackend<R, F, I, BT>>, KernelError>
where
    R: CubeRuntime,
    F: FloatElement,
    I: IntElement,
    BT: BoolElement,
{
    operands.validate(problem)?;
    let plan = plan::<R, _>(&operands, problem)?;
    Ok(run(operands, &plan))
}

pub(super) fn decode<R, F, I, BT>(
    operands: DecodeOperands<CubeBackend<R, F, I, BT>>,
    problem: &DecodeProblem,
) -> Decoded<CubeBackend<R, F, I, BT>>
where
    R: CubeRuntime,
    F: FloatElement,
    I: IntElement,
    BT: BoolElement,
{
    match plan_or_fall_back::<R, _>(&operands, problem) {
        Some(plan) => run(operands, &plan),
        None => plain::decode(operands, problem),
    }
}

pub use attend::try_attend;
pub(super) use attend::{attend, attend_fused};
pub(super) use fusion::decode as decode_fused;

fn plan<R: CubeRuntime, B: Backend<Device = R::Device>>(
    operands: &DecodeOperands<B>,
    problem: &DecodeProblem,
) -> Result<DecodePlan, Unavailable> {
    let types = Types {
        float: operands.q.dtype(),
        row: operands.row.dtype(),
        gates: operands.gates.as_ref().map(Tensor::dtype),
        pool: operands.pool.dtype(),
        table: operands.table.dtype(),
    };
    DecodePlan::new(problem, types, R::client(&operands.q.device()).properties())
}

/// Where there is no plan, the plain form is to run, and that has been said.
///
/// # Panics
/// If the operands do not fit the problem, or a kernel is required and there is none.
fn plan_or_fall_back<R: CubeRuntime, B: Backend<Device = R::Device>>(
    operands: &DecodeOperands<B>,
    problem: &DecodeProblem,
) -> Option<DecodePlan> {
    operands.check(problem);
    plan::<R, _>(operands, problem)
        .inspect_err(|reason| fallback::fall_back("decode", reason))
        .ok()
}

fn run<R, F, I, BT>(
    operands: DecodeOperands<CubeBackend<R, F, I, BT>>,
    plan: &DecodePlan,
) -> Decoded<CubeBackend<R, F, I, BT>>
where
    R: CubeRuntime,
    F: FloatElement,
    I: IntElement,
    BT: BoolElement,
{
    let operands = Operands::<R> {
        q: operands.q.into_primitive().tensor(),
        row: operands.row.into_primitive().tensor(),
        gates: operands.gates.map(|gates| gates.into_primitive().tensor()),
        pool: operands.pool.into_primitive().tensor(),
        table: operands.table.into_primitive(),
    };
    let (out, pool) = launch(operands, plan);
    let tensor = |x: CubeTensor<R>| TensorPrimitive::Float(x);
    (
        Tensor::from_primitive(tensor(out)),
        Tensor::from_primitive(tensor(pool)),
    )
}
