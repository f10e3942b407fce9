//! Products of a few rows, as decoding and short prompts have them.
//!
//! * `kernel.rs` is the kernel;
//! * `launch.rs` chooses sizes, and launches;
//! * `fusion.rs` is the same under Burn's fusion.
//!
//! Where there is no kernel for a product, Burn's own is taken: it is no lesser form, but the one for many rows.

mod fusion;
mod kernel;
mod launch;

use burn::tensor::{Tensor, TensorPrimitive, backend::Backend};
use burn_cubecl::{BoolElement, CubeBackend, CubeRuntime, FloatElement, IntElement};

use super::super::{HeadMatrices, plain};
use launch::{Matrices, ProductPlan};

pub(in super::super) use fusion::{
    multiply_heads as multiply_heads_fused, product as product_fused,
};

fn plan_product<R: CubeRuntime, B: Backend<Device = R::Device>>(
    a: &Tensor<B, 2>,
    b: &Tensor<B, 2>,
) -> Option<ProductPlan> {
    let ([rows, inputs], [lines, outputs]) = (a.dims(), b.dims());
    let matrices = Matrices {
        heads: 1,
        inputs,
        outputs,
        first: 0,
        block: 0,
        transposed: false,
    };
    let client = R::client(&a.device());
    (inputs == lines).then_some(())?;
    ProductPlan::new(
        matrices,
        [rows, inputs],
        [a.dtype(), b.dtype()],
        client.properties(),
    )
}

fn plan_heads<R: CubeRuntime, B: Backend<Device = R::Device>>(
    x: &Tensor<B, 3>,
    matrices: &HeadMatrices<B>,
) -> Option<ProductPlan> {
    let ([inputs, outputs], [rows, heads, width]) = (matrices.widths(), x.dims());
    let lie = Matrices {
        heads,
        inputs,
        outputs,
        first: matrices.columns.start,
        block: matrices.block(),
        transposed: matrices.transposed,
    };
    let client = R::client(&x.device());
    ProductPlan::new(
        lie,
        [rows, width],
        [x.dtype(), matrices.weight.dtype()],
        client.properties(),
    )
}

/// What `x [rows, heads, width]` becomes.
fn new_dims<B: Backend>(x: &Tensor<B, 3>, matrices: &HeadMatrices<B>) -> [usize; 3] {
    let ([inputs, outputs], [rows, heads, width]) = (matrices.widths(), x.dims());
    [rows, heads, outputs + width - inputs]
}

pub(in super::super) fn product<R, F, I, BT>(
    a: Tensor<CubeBackend<R, F, I, BT>, 2>,
    b: Tensor<CubeBackend<R, F, I, BT>, 2>,
) -> Tensor<CubeBackend<R, F, I, BT>, 2>
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
    let [a, b] = [a, b].map(|x| x.into_primitive().tensor());
    Tensor::from_primitive(TensorPrimitive::Float(plan.launch(a, b, &dims)))
}

pub(in super::super) fn multiply_heads<R, F, I, BT>(
    x: Tensor<CubeBackend<R, F, I, BT>, 3>,
    matrices: HeadMatrices<CubeBackend<R, F, I, BT>>,
) -> Tensor<CubeBackend<R, F, I, BT>, 3>
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
    let weight = matrices.weight.into_primitive().tensor();
    Tensor::from_primitive(TensorPrimitive::Float(plan.launch(x, weight, &dims)))
}
