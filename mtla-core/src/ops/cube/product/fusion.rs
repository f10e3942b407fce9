//! Products under Burn's fusion.

use burn::tensor::{Shape, Tensor, TensorPrimitive};
use burn_cubecl::{BoolElement, CubeBackend, CubeRuntime, FloatElement, IntElement};
use burn_fusion::Fusion;

use super::{
    super::{
        super::{HeadMatrices, plain},
        fusion::{Fused, custom},
    },
    launch::ProductPlan,
    new_dims, plan_heads, plan_product,
};

pub(in super::super::super) fn product<R, F, I, BT>(
    a: Tensor<Fusion<CubeBackend<R, F, I, BT>>, 2>,
    b: Tensor<Fusion<CubeBackend<R, F, I, BT>>, 2>,
) -> Tensor<Fusion<CubeBackend<R, F, I, BT>>, 2>
where
    R: CubeRuntime,
    F: FloatElement,
    I: IntElement,
    BT: BoolElement,
{
    let Some(plan) = plan_product::<R, _>(&a, &b) else {
        return a.matmul(b);
    };
    let dims = [a.dims()[0], b.dims()[1]];
    let operands = [a, b].map(|x| x.into_primitive().tensor());
    Tensor::from_primitive(TensorPrimitive::Float(record(plan, operands, dims)))
}

pub(in super::super::super) fn multiply_heads<R, F, I, BT>(
    x: Tensor<Fusion<CubeBackend<R, F, I, BT>>, 3>,
    matrices: HeadMatrices<Fusion<CubeBackend<R, F, I, BT>>>,
) -> Tensor<Fusion<CubeBackend<R, F, I, BT>>, 3>
where
    R: CubeRuntime,
    F: FloatElement,
    I: IntElement,
    BT: BoolElement,
{
    matrices.check(&x);
    let Some(plan) = plan_heads::<R, _>(&x, &matrices) else {
        return plain::multiply_heads(x, matrices);
    };
    let dims = new_dims(&x, &matrices);
    let x = x.into_primitive().tensor();
    let operands = [x, matrices.weight.into_primitive().tensor()];
    Tensor::from_primitive(TensorPrimitive::Float(record(plan, operands, dims)))
}

/// Has the product run when fusion comes to it.
fn record<R: CubeRuntime, const D: usize>(
    plan: ProductPlan,
    operands: [Fused<R>; 2],
    dims: [usize; D],
) -> Fused<R> {
    let outputs = [(Shape::from(dims), plan.dtype)];
    let [out] = custom("mtla::product", operands.into(), outputs, move |input| {
        let (x, weight) = (input(0), input(1));
        [plan.launch(x, weight, &dims)]
    });
    out
}
