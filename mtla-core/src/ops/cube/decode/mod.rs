//! One token a row over the slot pool of a cache.
//!
//! * `kernel.rs` is the kernel, computed as in `units.rs` or, on tensor cores, as in `matrices.rs`, through tiles of
//!   slots as in `tile.rs`; `combine.rs` is the one after it where rows have several parts;
//! * `plan.rs` chooses teams, tiles and parts from problem and device, `shape.rs` the sizes that follow, and they know
//!   what cannot run;
//! * `launch.rs` makes room for results and launches;
//! * `tune.rs`, with the feature `autotune`, measures other plans as well and takes the fastest;
//! * `fusion.rs` is the same under Burn's fusion.

mod combine;
mod fusion;
mod kernel;
mod launch;
mod matrices;
mod plan;
mod shape;
mod tile;
#[cfg(all(feature = "autotune", not(target_family = "wasm")))]
mod tune;
mod units;

use burn::tensor::{Tensor, TensorPrimitive, backend::Backend};
use burn_cubecl::{BoolElement, CubeBackend, CubeRuntime, FloatElement, IntElement};

use super::{
    super::{DecodeOperands, DecodeProblem, plain},
    fallback::{self, KernelError, Unavailable},
};
use launch::{Step, launch};
use plan::DecodePlan;
use shape::Types;
#[cfg(all(feature = "autotune", not(target_family = "wasm")))]
use tune::Plans;

/// No other plan than the reckoned one.
#[cfg(not(all(feature = "autotune", not(target_family = "wasm"))))]
type Plans = DecodePlan;

pub(in super::super) use fusion::decode as decode_fused;
pub use plan::DECODE_PLANS;

/// The operands of a step as a backend has them.
#[derive(Debug, Clone, Copy)]
struct Operands<T> {
    q: T,
    row: T,
    rotary: Option<T>,
    gates: Option<T>,
    pool: T,
    table: T,
}

impl<T> Operands<T> {
    fn new<B>(operands: DecodeOperands<B>) -> Self
    where
        B: Backend<FloatTensorPrimitive = T, IntTensorPrimitive = T>,
    {
        Self {
            q: operands.q.into_primitive().tensor(),
            row: operands.row.into_primitive().tensor(),
            rotary: operands
                .rotary
                .map(|rotary| rotary.table.into_primitive().tensor()),
            gates: operands.gates.map(|gates| gates.into_primitive().tensor()),
            pool: operands.pool.into_primitive().tensor(),
            table: operands.table.into_primitive(),
        }
    }

    fn map<U>(self, mut f: impl FnMut(T) -> U) -> Operands<U> {
        Operands {
            q: f(self.q),
            row: f(self.row),
            rotary: self.rotary.map(&mut f),
            gates: self.gates.map(&mut f),
            pool: f(self.pool),
            table: f(self.table),
        }
    }
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
    Ok(run(operands, &plan, |step| plan.run(step)))
}

/// [`try_decode`] by the plan of this number in [`DECODE_PLANS`], to compare plans with each other. Nothing where it
/// would be the same as one before it.
///
/// # Errors
/// As [`try_decode`].
///
/// # Panics
/// If there is no plan of that number.
#[allow(clippy::type_complexity, reason = "a backend has four parameters")]
pub fn try_decode_by<R, F, I, BT>(
    number: usize,
    operands: DecodeOperands<CubeBackend<R, F, I, BT>>,
    problem: &DecodeProblem,
) -> Result<Option<Decoded<CubeBackend<R, F, I, BT>>>, KernelError>
where
    R: CubeRuntime,
    F: FloatElement,
    I: IntElement,
    BT: BoolElement,
{
    operands.validate(problem)?;
    let plan = plan::<R, _>(&operands, problem)?;
    let reckoned: &DecodePlan = &plan;
    let client = R::client(&operands.q.device());
    let plans = reckoned.variants(problem, client.properties());
    let plan = plans[number];
    let is_new = !plans[..number].contains(&plan);
    Ok(is_new.then(|| run(operands, &plan, |step| plan.run(step))))
}

pub(in super::super) fn decode<R, F, I, BT>(
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
        Some(plan) => run(operands, &plan, |step| plan.run(step)),
        None => plain::decode(operands, problem),
    }
}

fn plan<R: CubeRuntime, B: Backend<Device = R::Device>>(
    operands: &DecodeOperands<B>,
    problem: &DecodeProblem,
) -> Result<Plans, Unavailable> {
    let types = Types {
        float: operands.q.dtype(),
        row: operands.row.dtype(),
        rotary: operands.rotary.as_ref().map(|rotary| rotary.table.dtype()),
        gates: operands.gates.as_ref().map(Tensor::dtype),
        pool: operands.pool.dtype(),
        table: operands.table.dtype(),
    };
    let layout = operands.rotary.as_ref().map(|rotary| rotary.layout);
    let client = R::client(&operands.q.device());
    Plans::new(problem, layout, types, client.properties())
}

/// Where there is no plan, the plain form is to run, and that has been said.
///
/// # Panics
/// If the operands do not fit the problem, or a kernel is required and there is none.
fn plan_or_fall_back<R: CubeRuntime, B: Backend<Device = R::Device>>(
    operands: &DecodeOperands<B>,
    problem: &DecodeProblem,
) -> Option<Plans> {
    operands.check(problem);
    plan::<R, _>(operands, problem)
        .inspect_err(|reason| fallback::fall_back("decode", reason))
        .ok()
}

fn run<R, F, I, BT>(
    operands: DecodeOperands<CubeBackend<R, F, I, BT>>,
    plan: &DecodePlan,
    by: impl FnOnce(Step<R>),
) -> Decoded<CubeBackend<R, F, I, BT>>
where
    R: CubeRuntime,
    F: FloatElement,
    I: IntElement,
    BT: BoolElement,
{
    let [out, pool] = launch(Operands::new(operands), plan, by).map(TensorPrimitive::Float);
    (Tensor::from_primitive(out), Tensor::from_primitive(pool))
}
