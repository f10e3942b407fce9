//! Kernels under Burn's fusion: custom operations, which fusion keeps in order with those around them.

use std::fmt;

use burn::tensor::{DType, Shape};
use burn_cubecl::{CubeBackend, CubeRuntime, fusion::FusionCubeRuntime, tensor::CubeTensor};
use burn_cubecl_fusion::CubeFusionHandle;
use burn_fusion::{
    FusionTensor,
    stream::{Operation, OperationStreams},
};
use burn_ir::{CustomOpIr, HandleContainer, OperationIr, TensorIr};

/// A tensor as fusion has it.
pub(super) type Fused<R> = FusionTensor<FusionCubeRuntime<R>>;

/// Tensors do not depend on the backend's element types.
type Bare<R> = CubeBackend<R, f32, i32, u32>;

/// Has `launch` run when fusion comes to it, and returns what it will give. It gets the tensors of `inputs` by their
/// numbers, each once, so that one which nobody else holds may be written to.
pub(super) fn custom<R: CubeRuntime, L, const N: usize>(
    name: &'static str,
    inputs: Vec<Fused<R>>,
    outputs: [(Shape, DType); N],
    launch: L,
) -> [Fused<R>; N]
where
    L: Fn(&mut dyn FnMut(usize) -> CubeTensor<R>) -> [CubeTensor<R>; N] + Send + Sync + 'static,
{
    let client = inputs[0].client.clone();
    let streams = OperationStreams::with_inputs(&inputs);
    let outputs =
        outputs.map(|(shape, dtype)| TensorIr::uninit(client.create_empty_handle(), shape, dtype));
    let inputs: Vec<TensorIr> = inputs.into_iter().map(FusionTensor::into_ir).collect();
    let description = CustomOpIr::new(name, &inputs, &outputs);
    let operation = Custom::<L, N> {
        description: description.clone(),
        launch,
    };
    client
        .register(streams, OperationIr::Custom(description), operation)
        .try_into()
        .expect("as many outputs as were described")
}

struct Custom<L, const N: usize> {
    description: CustomOpIr,
    launch: L,
}

impl<L, const N: usize> fmt::Debug for Custom<L, N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.description.fmt(f)
    }
}

impl<R: CubeRuntime, L, const N: usize> Operation<FusionCubeRuntime<R>> for Custom<L, N>
where
    L: Fn(&mut dyn FnMut(usize) -> CubeTensor<R>) -> [CubeTensor<R>; N] + Send + Sync,
{
    fn execute(&self, handles: &mut HandleContainer<CubeFusionHandle<R>>) {
        let CustomOpIr {
            inputs, outputs, ..
        } = &self.description;
        let found = (self.launch)(&mut |i| handles.get_float_tensor::<Bare<R>>(&inputs[i]));
        for (output, tensor) in outputs.iter().zip(found) {
            handles.register_float_tensor::<Bare<R>>(&output.id, tensor);
        }
    }
}
