//! The backends of Burn, each with the best form of the operations that it has.

use burn::tensor::{Int, Tensor};
use burn_autodiff::{Autodiff, checkpoint::strategy::CheckpointStrategy};

use super::{
    Activation, AttendOperands, AttendProblem, AttentionBackend, DecodeOperands, DecodeProblem,
    autodiff, plain,
};
use crate::rope::Rotary;

/// Records the inner backend's own operations where they have a backward pass, and traces the plain forms
/// where not. Decoding has no gradient and runs on the inner backend.
impl<B: AttentionBackend, C: CheckpointStrategy> AttentionBackend for Autodiff<B, C> {
    fn attend(operands: AttendOperands<Self>, problem: &AttendProblem) -> Tensor<Self, 4> {
        match B::derivatives() {
            Some(native) => autodiff::attend(operands, problem, native),
            None => plain::attend(operands, problem),
        }
    }

    fn product(a: Tensor<Self, 2>, b: Tensor<Self, 2>) -> Tensor<Self, 2> {
        autodiff::product(a, b)
    }

    fn activate(x: Tensor<Self, 2>, activation: Activation) -> Tensor<Self, 2> {
        match B::derivatives() {
            Some(native) => autodiff::activate(x, activation, native),
            None => activation.plain(x),
        }
    }

    fn rotate(x: Tensor<Self, 4>, rotary: &Rotary<Self>, first: usize) -> Tensor<Self, 4> {
        autodiff::rotate(x, rotary, first)
    }

    fn gate_and_merge(
        latents: Tensor<Self, 3>,
        gates: Tensor<Self, 2>,
        stride: usize,
    ) -> Tensor<Self, 3> {
        match B::derivatives() {
            Some(native) => autodiff::gate_and_merge(latents, gates, stride, native),
            None => plain::gate_and_merge(latents, gates, stride),
        }
    }

    fn decode(
        operands: DecodeOperands<Self>,
        problem: &DecodeProblem,
    ) -> (Tensor<Self, 3>, Tensor<Self, 2>) {
        let inner = DecodeOperands {
            q: operands.q.inner(),
            row: operands.row.inner(),
            rotary: operands.rotary.map(Rotary::inner),
            gates: operands.gates.map(Tensor::inner),
            pool: operands.pool.inner(),
            table: operands.table.inner(),
        };
        let (out, pool) = B::decode(inner, problem);
        (Tensor::from_inner(out), Tensor::from_inner(pool))
    }

    fn write_slots(
        pool: Tensor<Self, 2>,
        slots: Tensor<Self, 1, Int>,
        rows: Tensor<Self, 2>,
    ) -> Tensor<Self, 2> {
        Tensor::from_inner(B::write_slots(pool.inner(), slots.inner(), rows.inner()))
    }
}

#[cfg(feature = "ndarray")]
impl AttentionBackend for burn_ndarray::NdArray<f32> {}

#[cfg(feature = "ndarray")]
impl AttentionBackend for burn_ndarray::NdArray<f64> {}

#[cfg(feature = "tch")]
impl<E: burn_tch::TchElement> AttentionBackend for burn_tch::LibTorch<E> {}

#[cfg(feature = "cube")]
mod cube {
    use burn_cubecl::{BoolElement, CubeBackend, CubeRuntime, FloatElement, IntElement};
    use burn_fusion::Fusion;

    use super::{
        AttendOperands, AttendProblem, AttentionBackend, DecodeOperands, DecodeProblem, Tensor,
    };
    use crate::ops::{HeadMatrices, cube};

    impl<R, F, I, BT> AttentionBackend for CubeBackend<R, F, I, BT>
    where
        R: CubeRuntime,
        F: FloatElement,
        I: IntElement,
        BT: BoolElement,
    {
        fn attend(operands: AttendOperands<Self>, problem: &AttendProblem) -> Tensor<Self, 4> {
            cube::attend(operands, problem)
        }

        fn product(a: Tensor<Self, 2>, b: Tensor<Self, 2>) -> Tensor<Self, 2> {
            cube::product(a, b)
        }

        fn multiply_heads(x: Tensor<Self, 3>, matrices: HeadMatrices<Self>) -> Tensor<Self, 3> {
            cube::multiply_heads(x, matrices)
        }

        fn decode(
            operands: DecodeOperands<Self>,
            problem: &DecodeProblem,
        ) -> (Tensor<Self, 3>, Tensor<Self, 2>) {
            cube::decode(operands, problem)
        }
    }

    impl<R, F, I, BT> AttentionBackend for Fusion<CubeBackend<R, F, I, BT>>
    where
        R: CubeRuntime,
        F: FloatElement,
        I: IntElement,
        BT: BoolElement,
    {
        fn attend(operands: AttendOperands<Self>, problem: &AttendProblem) -> Tensor<Self, 4> {
            cube::attend_fused(operands, problem)
        }

        fn product(a: Tensor<Self, 2>, b: Tensor<Self, 2>) -> Tensor<Self, 2> {
            cube::product_fused(a, b)
        }

        fn multiply_heads(x: Tensor<Self, 3>, matrices: HeadMatrices<Self>) -> Tensor<Self, 3> {
            cube::multiply_heads_fused(x, matrices)
        }

        fn decode(
            operands: DecodeOperands<Self>,
            problem: &DecodeProblem,
        ) -> (Tensor<Self, 3>, Tensor<Self, 2>) {
            cube::decode_fused(operands, problem)
        }
    }
}

#[cfg(feature = "flex")]
mod flex {
    use burn::tensor::{DType, Element, TensorPrimitive};
    use burn_flex::{Flex, FlexTensor};

    use super::Rotary;
    use super::{
        Activation, AttendOperands, AttendProblem, AttentionBackend, DecodeOperands, DecodeProblem,
        Int, Tensor,
    };
    use crate::ops::{Derivatives, HeadMatrices, host};

    impl AttentionBackend for Flex {
        fn attend(operands: AttendOperands<Self>, problem: &AttendProblem) -> Tensor<Self, 4> {
            host::attend(operands, problem).out
        }

        fn derivatives() -> Option<Derivatives<Self>> {
            Some(Derivatives {
                attend: host::attend,
                attend_backward: host::attend_backward,
                activate_backward: host::activate_backward,
                gate_and_merge_backward: host::gate_and_merge_backward,
            })
        }

        fn product(a: Tensor<Self, 2>, b: Tensor<Self, 2>) -> Tensor<Self, 2> {
            host::product(a, b)
        }

        fn multiply_heads(x: Tensor<Self, 3>, matrices: HeadMatrices<Self>) -> Tensor<Self, 3> {
            host::multiply_heads(x, matrices)
        }

        fn activate(x: Tensor<Self, 2>, activation: Activation) -> Tensor<Self, 2> {
            host::activate(x, activation)
        }

        fn rotate(x: Tensor<Self, 4>, rotary: &Rotary<Self>, first: usize) -> Tensor<Self, 4> {
            host::rotate(x, rotary, first)
        }

        fn gate_and_merge(
            latents: Tensor<Self, 3>,
            gates: Tensor<Self, 2>,
            stride: usize,
        ) -> Tensor<Self, 3> {
            host::gate_and_merge(latents, gates, stride)
        }

        fn decode(
            operands: DecodeOperands<Self>,
            problem: &DecodeProblem,
        ) -> (Tensor<Self, 3>, Tensor<Self, 2>) {
            host::decode(operands, problem)
        }

        /// Writes rows straight into the pool's storage: Flex's own scatter copies the whole pool.
        fn write_slots(
            pool: Tensor<Self, 2>,
            slots: Tensor<Self, 1, Int>,
            rows: Tensor<Self, 2>,
        ) -> Tensor<Self, 2> {
            let [_, width] = pool.dims();
            let pool = pool.into_primitive().tensor();
            let rows = rows.into_primitive().tensor().to_contiguous();
            let slots = slots.into_primitive().to_contiguous();
            let slots: Vec<usize> = match slots.dtype() {
                DType::I64 => slots.storage::<i64>().iter().map(|x| *x as usize).collect(),
                _ => slots.storage::<i32>().iter().map(|x| *x as usize).collect(),
            };
            let pool = match rows.dtype() {
                DType::F64 => write::<f64>(pool, &slots, &rows, width),
                DType::F16 => write::<burn::tensor::f16>(pool, &slots, &rows, width),
                DType::BF16 => write::<burn::tensor::bf16>(pool, &slots, &rows, width),
                _ => write::<f32>(pool, &slots, &rows, width),
            };
            Tensor::from_primitive(TensorPrimitive::Float(pool))
        }
    }

    fn write<E: Element + bytemuck::Pod>(
        pool: FlexTensor,
        slots: &[usize],
        rows: &FlexTensor,
        width: usize,
    ) -> FlexTensor {
        let mut pool = pool.to_contiguous();
        let target = pool.storage_mut::<E>();
        for (slot, row) in slots.iter().zip(rows.storage::<E>().chunks_exact(width)) {
            target[slot * width..][..width].copy_from_slice(row);
        }
        pool
    }
}
