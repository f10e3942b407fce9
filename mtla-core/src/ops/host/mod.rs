//! [`attend`](super::AttentionBackend::attend) on the host: one operation with a backward of its own, for the
//! Flex backend.
//!
//! The plain form builds the whole matrix of scores and passes over it once for every tensor operation. Here
//! a tile of queries meets a block of columns at a time: two matrix products and one pass that masks, takes
//! exponentials and sums, all in cache. What a query cannot see is skipped rather than masked, and so is
//! padding. Only the outputs and one logarithm a query are kept for the backward pass, which computes the
//! weights again; memory is linear in the number of tokens.
//!
//! * `tile.rs` cuts a problem into tiles and blocks, and knows which query sees which column;
//! * `forward.rs`, `backward.rs` are the two passes over them;
//! * `matrix.rs` holds the views that matrix products are made of, and all unsafe code;
//! * `real.rs` has the vectorised passes over rows, with the exponential.
//!
//! Everything is computed in 32 bits for half-precision tensors, and in 64 bits for `f64`.

mod backward;
mod forward;
mod matrix;
mod real;
mod tile;

use burn::tensor::{DType, FloatDType, Tensor, TensorPrimitive};
use burn_flex::{Flex, FlexTensor};

use super::{
    AttendForward, AttendOperands, AttendProblem, KeyValue, LaunchKind, launches,
    plain::to_dtype,
};
use matrix::{Heads, NewHeads, in_rows};
use real::Real;
use tile::Plan;

/// Views of the operands of an attention.
struct Inputs<'a, R> {
    q: Heads<'a, R>,
    columns: Option<(Heads<'a, R>, Heads<'a, R>)>,
    own: Option<(Heads<'a, R>, Heads<'a, R>)>,
}

/// Views of what a backward pass needs beside them.
struct Saved<'a, R> {
    out: Heads<'a, R>,
    log_sum: Heads<'a, R>,
    grad: Heads<'a, R>,
}

/// The operands as Flex has them, in the type to compute in.
struct Operands {
    q: FlexTensor,
    columns: Option<(FlexTensor, FlexTensor)>,
    own: Option<(FlexTensor, FlexTensor)>,
}

impl Operands {
    fn new(operands: AttendOperands<Flex>) -> Self {
        let pair = |kv: KeyValue<Flex>| (primitive(kv.k), primitive(kv.v));
        Self {
            q: primitive(operands.q),
            columns: operands.columns.map(pair),
            own: operands.self_term.map(pair),
        }
    }

    fn view<R: Real>(&self) -> Inputs<'_, R> {
        fn pair<R: Real>(kv: &(FlexTensor, FlexTensor)) -> (Heads<'_, R>, Heads<'_, R>) {
            (Heads::new(&kv.0), Heads::new(&kv.1))
        }
        Inputs {
            q: Heads::new(&self.q),
            columns: self.columns.as_ref().map(pair),
            own: self.own.as_ref().map(pair),
        }
    }
}

/// The forward pass.
///
/// # Panics
/// If the operands do not fit the problem.
pub(super) fn forward(operands: AttendOperands<Flex>, problem: &AttendProblem) -> AttendForward<Flex> {
    operands.check(problem);
    launches::count(LaunchKind::HostAttend);
    let dtype = operands.q.dtype();
    let operands = Operands::new(operands);
    let plan = Plan { problem };
    let (out, log_sum) = match operands.q.dtype() {
        DType::F64 => tensors(forward::forward::<f64>(&plan, &operands.view())),
        _ => tensors(forward::forward::<f32>(&plan, &operands.view())),
    };
    AttendForward {
        out: to_dtype(tensor(out), dtype),
        log_sum: tensor(log_sum),
    }
}

/// The backward pass: the gradients of the operands.
///
/// # Panics
/// If the operands do not fit the problem.
pub(super) fn backward(
    operands: AttendOperands<Flex>,
    problem: &AttendProblem,
    forward: AttendForward<Flex>,
    grad: Tensor<Flex, 4>,
) -> AttendOperands<Flex> {
    operands.check(problem);
    launches::count(LaunchKind::HostAttendBackward);
    let dtype = operands.q.dtype();
    let operands = Operands::new(operands);
    let saved = [forward.out, forward.log_sum, grad].map(primitive);
    let plan = Plan { problem };
    match operands.q.dtype() {
        DType::F64 => gradients::<f64>(&plan, &operands, &saved, dtype),
        _ => gradients::<f32>(&plan, &operands, &saved, dtype),
    }
}

fn gradients<R: Real>(
    plan: &Plan<'_>,
    operands: &Operands,
    [out, log_sum, grad]: &[FlexTensor; 3],
    dtype: DType,
) -> AttendOperands<Flex> {
    let saved = Saved {
        out: Heads::new(out),
        log_sum: Heads::new(log_sum),
        grad: Heads::new(grad),
    };
    let gradients = backward::backward::<R>(plan, &operands.view(), &saved);
    let tensor = |x: NewHeads<R>| to_dtype(tensor(x.into_tensor()), dtype);
    let pair = |(k, v)| KeyValue {
        k: tensor(k),
        v: tensor(v),
    };
    AttendOperands {
        q: tensor(gradients.q),
        columns: gradients.columns.map(pair),
        self_term: gradients.own.map(pair),
    }
}

fn tensors<R: Real>(forward: forward::Forward<R>) -> (FlexTensor, FlexTensor) {
    (forward.out.into_tensor(), forward.log_sum.into_tensor())
}

fn tensor(x: FlexTensor) -> Tensor<Flex, 4> {
    Tensor::from_primitive(TensorPrimitive::Float(x))
}

/// The tensor in the type to compute in, its rows in one piece.
fn primitive(x: Tensor<Flex, 4>) -> FlexTensor {
    let x = match x.dtype() {
        DType::F64 | DType::F32 => x,
        _ => x.cast(FloatDType::F32),
    };
    in_rows(x.into_primitive().tensor())
}
