//! Decoding under Burn's fusion.

use burn::tensor::{Shape, Tensor, TensorPrimitive};
use burn_cubecl::{BoolElement, CubeBackend, CubeRuntime, FloatElement, IntElement};
use burn_fusion::Fusion;

use super::{
    super::{
        super::{DecodeOperands, DecodeProblem, plain},
        fusion::custom,
    },
    Decoded, Operands,
    launch::launch,
    plan_or_fall_back,
};

pub(in super::super::super) fn decode<R, F, I, BT>(
    operands: DecodeOperands<Fusion<CubeBackend<R, F, I, BT>>>,
    problem: &DecodeProblem,
) -> Decoded<Fusion<CubeBackend<R, F, I, BT>>>
where
    R: CubeRuntime,
    F: FloatElement,
    I: IntElement,
    BT: BoolElement,
{
    let Some(plan) = plan_or_fall_back::<R, _>(&operands, problem) else {
        return plain::decode(operands, problem);
    };
    let [rows, heads, _] = operands.q.dims();
    let outputs = [
        (
            Shape::from([rows, heads, problem.layout.value_width()]),
            plan.types.float,
        ),
        (Shape::from(operands.pool.dims()), plan.types.pool),
    ];
    let mut inputs = Vec::new();
    let places = Operands::new(operands).map(|input| {
        inputs.push(input);
        inputs.len() - 1
    });
    let tensors = custom("mtla::decode", inputs, outputs, move |input| {
        launch(places.map(input), &plan, |step| plan.run(step))
    });
    let [out, pool] = tensors.map(TensorPrimitive::Float);
    (Tensor::from_primitive(out), Tensor::from_primitive(pool))
}
