//! Attention of whole sequences.
//!
//! * `kernel.rs` is the kernel;
//! * `plan.rs` chooses sizes from problem and device, and knows what cannot run;
//! * `launch.rs` makes room for the result and launches;
//! * `fusion.rs` is the same under Burn's fusion.

mod fusion;
mod kernel;
mod launch;
mod plan;

use burn::tensor::{Int, Tensor, TensorData, TensorPrimitive, backend::Backend};
use burn_cubecl::{
    BoolElement, CubeBackend, CubeRuntime, FloatElement, IntElement, tensor::CubeTensor,
};

use super::{
    super::{AttendOperands, AttendProblem, KeyValue, Keys, Visibility, plain},
    fallback::{self, KernelError, Unavailable},
};
use launch::{Numbers, launch};
use plan::{AttendPlan, Own};

pub(in super::super) use fusion::attend as attend_fused;

/// Keys of columns, and of what queries see of their own chunks, in one tensor each.
struct Placed<B: Backend> {
    keys: KeyValue<B>,
    /// How many columns there are, and that column `c` is the last of `step` tokens `c · step ..`.
    columns: usize,
    step: usize,
    own: Own,
    /// Where the first of what queries see of their own chunks is.
    own_at: usize,
}

impl<B: Backend> Placed<B> {
    fn new(keys: Keys<B>, problem: &AttendProblem) -> Self {
        let of_columns = |keys| Self {
            keys,
            columns: problem.columns,
            step: 1,
            own: Own::None,
            own_at: 0,
        };
        match (keys, &problem.visibility) {
            (Keys::Tokens(keys), Visibility::Causal { stride, .. }) => Self {
                step: *stride,
                own: if problem.self_term {
                    Own::OfToken
                } else {
                    Own::None
                },
                ..of_columns(keys)
            },
            (Keys::Tokens(keys), Visibility::Prefix { .. }) => of_columns(keys),
            (Keys::Columns { columns, own: None }, _) => {
                of_columns(columns.expect("the problem was validated"))
            }
            (
                Keys::Columns {
                    columns: None,
                    own: Some(keys),
                },
                _,
            ) => Self {
                columns: 0,
                own: Own::OfQuery,
                ..of_columns(keys)
            },
            (
                Keys::Columns {
                    columns: Some(keys),
                    own: Some(after),
                },
                _,
            ) => Self {
                own: Own::OfQuery,
                own_at: problem.columns,
                ..of_columns(plain::join_keys(keys).followed_by(plain::join_keys(after)))
            },
        }
    }
}

/// Operands as a backend has them, and as the kernel takes them.
#[derive(Debug, Clone, Copy)]
struct Operands<T> {
    q: T,
    k: T,
    shared: Option<T>,
    v: T,
    rows: T,
}

impl<T> Operands<T> {
    fn map<U>(self, mut f: impl FnMut(T) -> U) -> Operands<U> {
        Operands {
            q: f(self.q),
            k: f(self.k),
            shared: self.shared.map(&mut f),
            v: f(self.v),
            rows: f(self.rows),
        }
    }
}

/// An attention that can be launched.
struct Prepared<T> {
    operands: Operands<T>,
    plan: AttendPlan,
    numbers: Numbers,
}

impl<T: Clone> Prepared<T> {
    /// Of operands that fit the problem.
    fn new<R: CubeRuntime, B>(
        operands: &AttendOperands<B>,
        problem: &AttendProblem,
    ) -> Result<Self, Unavailable>
    where
        B: Backend<Device = R::Device, FloatTensorPrimitive = T, IntTensorPrimitive = T>,
    {
        let q = operands.q.clone();
        let device = q.device();
        let placed = Placed::new(operands.keys.clone(), problem);
        let keys = placed.keys;
        let mut dtypes = vec![
            ("queries", q.dtype()),
            ("keys", keys.k.dtype()),
            ("values", keys.v.dtype()),
        ];
        dtypes.extend(keys.shared.as_ref().map(|x| ("shared channels", x.dtype())));
        let properties = R::client(&device);
        let properties = properties.properties();
        let head_width = keys.k.dims()[3];
        let plan = AttendPlan::new(problem, head_width, placed.own, &dtypes, properties)?;

        let rows: Vec<i64> = plan.rows.iter().map(|n| *n as i64).collect();
        let rows = TensorData::new(rows, [problem.batch]);
        let rows = Tensor::<B, 1, Int>::from_data(rows, &device);
        let furthest = plan.rows.iter().max().copied().unwrap_or_default();
        let numbers = Numbers {
            columns: placed.columns as u32,
            step: placed.step as u32,
            own: placed.own_at as u32,
            furthest: furthest as u32,
            scale: problem.scale as f32,
            dropout: problem.dropout.map(|dropout| dropout.numbers()),
        };
        let float = |x: Tensor<B, 4>| x.into_primitive().tensor();
        let operands = Operands {
            q: float(q),
            k: float(keys.k),
            shared: keys.shared.map(float),
            v: float(keys.v),
            rows: rows.into_primitive(),
        };
        Ok(Self {
            operands,
            plan,
            numbers,
        })
    }

    /// `None` where the plain form is to run, which has been said then.
    ///
    /// # Panics
    /// If the operands do not fit the problem, or a kernel is required and there is none.
    fn or_fall_back<R: CubeRuntime, B>(
        operands: &AttendOperands<B>,
        problem: &AttendProblem,
    ) -> Option<Self>
    where
        B: Backend<Device = R::Device, FloatTensorPrimitive = T, IntTensorPrimitive = T>,
    {
        operands.check(problem);
        Self::new::<R, _>(operands, problem)
            .inspect_err(|reason| fallback::fall_back("attend", reason))
            .ok()
    }
}

/// [`attend`](crate::ops::AttentionBackend::attend) by the kernel, or not at all.
///
/// # Errors
/// [`KernelError`] says whether the operands do not fit, or the kernel cannot run them.
pub fn try_attend<R, F, I, BT>(
    operands: AttendOperands<CubeBackend<R, F, I, BT>>,
    problem: &AttendProblem,
) -> Result<Tensor<CubeBackend<R, F, I, BT>, 4>, KernelError>
where
    R: CubeRuntime,
    F: FloatElement,
    I: IntElement,
    BT: BoolElement,
{
    operands.validate(problem)?;
    let prepared = Prepared::new::<R, _>(&operands, problem)?;
    drop(operands);
    Ok(run(prepared))
}

pub(in super::super) fn attend<R, F, I, BT>(
    operands: AttendOperands<CubeBackend<R, F, I, BT>>,
    problem: &AttendProblem,
) -> Tensor<CubeBackend<R, F, I, BT>, 4>
where
    R: CubeRuntime,
    F: FloatElement,
    I: IntElement,
    BT: BoolElement,
{
    let Some(prepared) = Prepared::or_fall_back::<R, _>(&operands, problem) else {
        return plain::attend(operands, problem);
    };
    drop(operands);
    run(prepared)
}

fn run<R, F, I, BT>(prepared: Prepared<CubeTensor<R>>) -> Tensor<CubeBackend<R, F, I, BT>, 4>
where
    R: CubeRuntime,
    F: FloatElement,
    I: IntElement,
    BT: BoolElement,
{
    let (out, _) = launch(prepared.operands, &prepared.plan, &prepared.numbers);
    Tensor::from_primitive(TensorPrimitive::Float(out)).swap_dims(1, 2)
}
