//! Attention under Burn's fusion.

use burn::tensor::{Shape, Tensor, TensorPrimitive};
use burn_cubecl::{BoolElement, CubeBackend, CubeRuntime, FloatElement, IntElement};
use burn_fusion::Fusion;

use super::{
    super::{
        super::{AttendOperands, AttendProblem, plain},
        fusion::custom,
    },
    Prepared,
    launch::launch,
};

pub(in super::super::super) fn attend<R, F, I, BT>(
    operands: AttendOperands<Fusion<CubeBackend<R, F, I, BT>>>,
    problem: &AttendProblem,
) -> Tensor<Fusion<CubeBackend<R, F, I, BT>>, 4>
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
    let (plan, numbers) = (prepared.plan, prepared.numbers);
    let p = problem;
    let shape = Shape::from([p.batch, p.queries, p.heads, p.value_width]);
    let mut inputs = Vec::new();
    let places = prepared.operands.map(|input| {
        inputs.push(input);
        inputs.len() - 1
    });
    let outputs = [(shape, plan.dtype)];
    let [out] = custom("mtla::attend", inputs, outputs, move |input| {
        [launch(places.map(input), &plan, &numbers).0]
    });
    Tensor::from_primitive(TensorPrimitive::Float(out)).swap_dims(1, 2)
}
