//! The products of heads with matrices of their own, read where they lie in one weight.

use burn::tensor::{DType, Tensor};
use burn_flex::Flex;

use super::{
    super::{HeadMatrices, plain},
    matrix::{Matrix, NewHeads, in_order},
    primitive,
    real::Real,
    tensor,
    threads::for_each,
};

/// [`multiply_heads`](crate::ops::AttentionBackend::multiply_heads).
///
/// # Panics
/// If the matrices do not fit `x`.
pub(in crate::ops) fn multiply_heads(
    x: Tensor<Flex, 3>,
    matrices: HeadMatrices<Flex>,
) -> Tensor<Flex, 3> {
    matrices.check(&x);
    match (x.dtype(), matrices.weight.dtype()) {
        (DType::F32, DType::F32) => of::<f32>(x, matrices),
        (DType::F64, DType::F64) => of::<f64>(x, matrices),
        _ => plain::multiply_heads(x, matrices),
    }
}

fn of<R: Real>(x: Tensor<Flex, 3>, matrices: HeadMatrices<Flex>) -> Tensor<Flex, 3> {
    let [rows, heads, width] = x.dims();
    let ([inputs, outputs], block) = (matrices.widths(), matrices.block());
    let x = primitive(x).to_contiguous();
    let x = &x.storage::<R>()[x.layout().start_offset()..][..rows * heads * width];
    let weight = in_order(matrices.weight.into_primitive().tensor());
    let weight = Matrix::<R>::of(&weight);
    let mut out = NewHeads::zeros([1, heads, rows, outputs + width - inputs]);
    let writer = out.writer();
    for_each(heads, rows * heads * inputs * outputs, |head| {
        if rows == 0 {
            return;
        }
        let x = &x[head * width..];
        let inner = Matrix::new(x, rows, inputs, heads * width);
        let matrix = weight.columns(
            head * block + matrices.columns.start,
            matrices.columns.len(),
        );
        let matrix = if matrices.transposed {
            matrix.transposed()
        } else {
            matrix
        };
        // SAFETY: each head belongs to one task.
        unsafe { writer.head(0, head, inner, matrix) };
        for row in 0..rows {
            // SAFETY: as above.
            let out = unsafe { writer.row(0, head, row) };
            out[outputs..].copy_from_slice(&x[row * heads * width..][inputs..width]);
        }
    });
    tensor(out.into_tokens())
}
