//! The matrix product. Flex's own writes its result once more, into memory of another alignment, which costs as
//! much as reading both factors.

use burn::tensor::{Bytes, DType, Tensor};
use burn_flex::{Flex, FlexTensor, Layout};

use super::{
    matrix::{Matrix, in_order},
    real::Real,
    tensor,
};

/// [`product`](crate::ops::AttentionBackend::product).
///
/// # Panics
/// If the shapes do not fit each other.
pub(in crate::ops) fn product(a: Tensor<Flex, 2>, b: Tensor<Flex, 2>) -> Tensor<Flex, 2> {
    let (shape_a, shape_b) = (a.dims(), b.dims());
    assert!(
        shape_a[1] == shape_b[0],
        "product of {shape_a:?} and {shape_b:?}: the inner lengths differ"
    );
    match (a.dtype(), b.dtype()) {
        (DType::F32, DType::F32) => of::<f32>(a, b),
        (DType::F64, DType::F64) => of::<f64>(a, b),
        _ => a.matmul(b),
    }
}

fn of<R: Real>(a: Tensor<Flex, 2>, b: Tensor<Flex, 2>) -> Tensor<Flex, 2> {
    let shape = [a.dims()[0], b.dims()[1]];
    let [a, b] = [a, b].map(|x| in_order(x.into_primitive().tensor()));
    let values = Matrix::<R>::of(&a).product(Matrix::of(&b));
    let layout = Layout::contiguous(shape.into());
    tensor(FlexTensor::new(
        Bytes::from_elems(values),
        layout,
        R::dtype(),
    ))
}
