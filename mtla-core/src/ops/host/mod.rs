//! The operations of attention on the host, each with a backward pass of its own, for the Flex backend.
//!
//! The plain form of [`attend`](super::AttentionBackend::attend) builds the whole matrix of scores and passes over it once for every tensor operation. Here
//! a tile of queries meets a block of columns at a time: two matrix products and one pass that masks, takes
//! exponentials and sums, all in cache. What a query cannot see is skipped rather than masked, and so is
//! padding. Only the outputs and one logarithm a query are kept for the backward pass, which computes the
//! weights again; memory is linear in the number of tokens.
//!
//! * `tile.rs` cuts a problem into tiles and blocks, and knows which query sees which column;
//! * `attend_forward.rs`, `attend_backward.rs` are the two passes over them;
//! * `decode.rs` is the decoding step;
//! * `softmax.rs` is the online softmax of both;
//! * `keys.rs` knows how keys are put together, and where their gradients go;
//! * `rotate.rs` and `merge.rs` are what happens to queries and latents before, one pass each;
//! * `activation.rs` has the activation functions of feed-forward networks;
//! * `product.rs` is the product of two matrices, of projections; `heads.rs` those of heads with matrices of their own;
//! * `matrix.rs` holds the views that matrix products are made of, and all unsafe code;
//! * `threads.rs` gives them to the cores;
//! * `real.rs` has the vectorised passes over rows, with the exponential.
//!
//! Everything is computed in 32 bits for half-precision tensors, and in 64 bits for `f64`.

mod activation;
mod attend_backward;
mod attend_forward;
mod decode;
mod few_rows;
mod heads;
mod keys;
mod matrix;
mod merge;
mod product;
mod real;
mod rotate;
mod softmax;
mod threads;
mod tile;

use burn::tensor::{DType, FloatDType, Tensor, TensorPrimitive};
use burn_flex::{Flex, FlexTensor};

use super::{
    AttendForward, AttendOperands, AttendProblem, KeyValue, Keys, LaunchKind, launches,
    plain::to_dtype,
};
use keys::{KeyGradients, KeyView};
use matrix::{Heads, NewHeads, in_rows};
use real::Real;
use tile::Plan;

pub(super) use activation::{activate, activate_backward};
pub(super) use decode::decode;
pub(super) use heads::multiply_heads;
pub(super) use merge::{gate_and_merge, gate_and_merge_backward};
pub(super) use product::product;
pub(super) use rotate::rotate;

/// Views of the operands of an attention.
struct Inputs<'a, R> {
    q: Heads<'a, R>,
    columns: Option<KeyView<'a, R>>,
    own: Option<KeyView<'a, R>>,
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
    keys: HostKeys,
}

#[cfg_attr(
    target_pointer_width = "64",
    expect(clippy::large_enum_variant, reason = "there is one at a time")
)]
enum HostKeys {
    Tokens(HostKeyValue),
    Columns(Option<HostKeyValue>, Option<HostKeyValue>),
}

struct HostKeyValue {
    k: FlexTensor,
    shared: Option<FlexTensor>,
    v: FlexTensor,
}

impl HostKeyValue {
    fn new(kv: KeyValue<Flex>) -> Self {
        Self {
            k: primitive(kv.k),
            shared: kv.shared.map(primitive),
            v: primitive(kv.v),
        }
    }

    fn view<R: Real>(&self) -> KeyView<'_, R> {
        KeyView {
            k: Heads::new(&self.k),
            shared: self.shared.as_ref().map(Heads::new),
            v: Heads::new(&self.v),
        }
    }
}

impl Operands {
    fn new(operands: AttendOperands<Flex>) -> Self {
        let keys = match operands.keys {
            Keys::Tokens(kv) => HostKeys::Tokens(HostKeyValue::new(kv)),
            Keys::Columns { columns, own } => {
                HostKeys::Columns(columns.map(HostKeyValue::new), own.map(HostKeyValue::new))
            }
        };
        Self {
            q: primitive(operands.q),
            keys,
        }
    }

    fn plan<'a>(&self, problem: &'a AttendProblem) -> Plan<'a> {
        let tokens = match &self.keys {
            HostKeys::Tokens(kv) => Some(kv.v.layout().shape()[2]),
            HostKeys::Columns(..) => None,
        };
        Plan { problem, tokens }
    }

    fn view<R: Real>(&self, plan: &Plan<'_>) -> Inputs<'_, R> {
        let (columns, own) = match &self.keys {
            HostKeys::Tokens(kv) => {
                let tokens = kv.view();
                (Some(tokens.chunk_ends(plan.stride())), Some(tokens))
            }
            HostKeys::Columns(columns, own) => (
                columns.as_ref().map(HostKeyValue::view),
                own.as_ref().map(HostKeyValue::view),
            ),
        };
        Inputs {
            q: Heads::new(&self.q),
            columns: columns.filter(|_| plan.problem.columns > 0),
            own: own.filter(|_| plan.problem.self_term),
        }
    }
}

/// The forward pass of attention.
///
/// # Panics
/// If the operands do not fit the problem.
pub(super) fn attend(
    operands: AttendOperands<Flex>,
    problem: &AttendProblem,
) -> AttendForward<Flex> {
    operands.check(problem);
    launches::count(LaunchKind::HostAttend);
    let dtype = operands.q.dtype();
    let operands = Operands::new(operands);
    let plan = operands.plan(problem);
    let (out, log_sum) = match operands.q.dtype() {
        DType::F64 => tensors(attend_forward::forward::<f64>(&plan, &operands.view(&plan))),
        _ => tensors(attend_forward::forward::<f32>(&plan, &operands.view(&plan))),
    };
    AttendForward {
        out: to_dtype(tensor(out), dtype),
        log_sum: tensor(log_sum),
    }
}

/// The backward pass of attention: the gradients of the operands.
///
/// # Panics
/// If the operands do not fit the problem.
pub(super) fn attend_backward(
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
    let plan = operands.plan(problem);
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
    let gradients = attend_backward::backward::<R>(plan, &operands.view(plan), &saved);
    let tensor = |x: NewHeads<R>| to_dtype(tensor(x.into_tensor()), dtype);
    let key_value = |kv: KeyGradients<R>| KeyValue {
        k: tensor(kv.k),
        shared: kv.shared.map(tensor),
        v: tensor(kv.v),
    };
    let keys = match operands.keys {
        HostKeys::Tokens(_) => Keys::Tokens(key_value(
            gradients.keys.expect("there are columns or a self term"),
        )),
        HostKeys::Columns(..) => Keys::Columns {
            columns: gradients.keys.map(key_value),
            own: gradients.own.map(key_value),
        },
    };
    AttendOperands {
        q: tensor(gradients.q),
        keys,
    }
}

fn tensors<R: Real>(forward: attend_forward::Forward<R>) -> (FlexTensor, FlexTensor) {
    (forward.out.into_tensor(), forward.log_sum.into_tensor())
}

fn tensor<const D: usize>(x: FlexTensor) -> Tensor<Flex, D> {
    Tensor::from_primitive(TensorPrimitive::Float(x))
}

/// The tensor in the type to compute in, its rows in one piece.
fn primitive<const D: usize>(x: Tensor<Flex, D>) -> FlexTensor {
    let x = match x.dtype() {
        DType::F64 | DType::F32 => x,
        _ => x.cast(FloatDType::F32),
    };
    in_rows(x.into_primitive().tensor())
}
