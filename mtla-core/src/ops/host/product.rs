//! The matrix product. Flex's own writes its result once more, into memory of another alignment, which costs as
//! much as reading both factors.

use burn::tensor::{Bytes, DType, Tensor};
use burn_flex::{Flex, FlexTensor, Layout};

use super::{
    few_rows,
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
        (DType::F32, DType::F32) if shape_a[0] <= few_rows::MOST && lies_in_columns(&b) => {
            of_few_rows(a, b)
        }
        (DType::F32, DType::F32) => of::<f32>(a, b),
        (DType::F64, DType::F64) => of::<f64>(a, b),
        _ => a.matmul(b),
    }
}

fn of<R: Real>(a: Tensor<Flex, 2>, b: Tensor<Flex, 2>) -> Tensor<Flex, 2> {
    let shape = [a.dims()[0], b.dims()[1]];
    let [a, b] = [a, b].map(|x| in_order(x.into_primitive().tensor()));
    let values = Matrix::<R>::of(&a).product(Matrix::of(&b));
    result(values, shape)
}

fn of_few_rows(a: Tensor<Flex, 2>, b: Tensor<Flex, 2>) -> Tensor<Flex, 2> {
    let ([m, k], [_, n]) = (a.dims(), b.dims());
    let x = a.into_primitive().tensor().to_contiguous();
    let weight = b.transpose().into_primitive().tensor().to_contiguous();
    let values = few_rows::product(in_memory(&x), in_memory(&weight), [m, k, n]);
    result(values, [m, n])
}

/// Whether its columns are one after the other in memory.
fn lies_in_columns(b: &Tensor<Flex, 2>) -> bool {
    let turned = b.clone().transpose().into_primitive().tensor();
    turned.is_contiguous()
}

/// The entries of a tensor that lies in order.
fn in_memory(tensor: &FlexTensor) -> &[f32] {
    let layout = tensor.layout();
    &tensor.storage()[layout.start_offset()..][..layout.num_elements()]
}

fn result<R: Real>(values: Vec<R>, shape: [usize; 2]) -> Tensor<Flex, 2> {
    tensor(FlexTensor::new(
        Bytes::from_elems(values),
        Layout::contiguous(shape.into()),
        R::dtype(),
    ))
}
