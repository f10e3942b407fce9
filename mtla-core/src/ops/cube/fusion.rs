//! Decoding under Burn's fusion: one custom operation, which fusion keeps in order with those around it.

use std::marker::PhantomData;

use burn::tensor::{Shape, Tensor, TensorPrimitive};
use burn_cubecl::{
    BoolElement, CubeBackend, CubeRuntime, FloatElement, IntElement, fusion::FusionCubeRuntime,
};
use burn_cubecl_fusion::CubeFusionHandle;
use burn_fusion::{
    Fusion, FusionTensor,
    stream::{Operation, OperationStreams},
};
use burn_ir::{CustomOpIr, HandleContainer, OperationIr, TensorIr};

use super::{
    super::{DecodeOperands, DecodeProblem, plain},
    Decoded,
    launch::{Operands, launch},
    plan::DecodePlan,
    plan_or_fall_back,
};

pub(in super::super) fn decode<R, F, I, BT>(
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
    let out_shape = Shape::from([rows, heads, problem.layout.value_width()]);
    let pool_shape = Shape::from(operands.pool.dims());

    let mut inputs = vec![
        operands.q.into_primitive().tensor(),
        operands.row.into_primitive().tensor(),
        operands.pool.into_primitive().tensor(),
        operands.table.into_primitive(),
    ];
    inputs.extend(operands.gates.map(|gates| gates.into_primitive().tensor()));
    let client = inputs[0].client.clone();
    let streams = OperationStreams::with_inputs(&inputs);
    let types = [plan.types.float, plan.types.pool];
    let outputs = [(out_shape, types[0]), (pool_shape, types[1])]
        .map(|(shape, dtype)| TensorIr::uninit(client.create_empty_handle(), shape, dtype));
    let inputs: Vec<TensorIr> = inputs.into_iter().map(FusionTensor::into_ir).collect();
    let description = CustomOpIr::new("mtla::decode", &inputs, &outputs);
    let operation = Decode::<CubeBackend<R, F, I, BT>> {
        description: description.clone(),
        plan,
        backend: PhantomData,
    };
    let [out, pool] = client
        .register(streams, OperationIr::Custom(description), operation)
        .try_into()
        .expect("as many outputs as were described");
    (
        Tensor::from_primitive(TensorPrimitive::Float(out)),
        Tensor::from_primitive(TensorPrimitive::Float(pool)),
    )
}

#[derive(Debug)]
struct Decode<B> {
    description: CustomOpIr,
    plan: DecodePlan,
    backend: PhantomData<B>,
}

impl<R, F, I, BT> Operation<FusionCubeRuntime<R>> for Decode<CubeBackend<R, F, I, BT>>
where
    R: CubeRuntime,
    F: FloatElement,
    I: IntElement,
    BT: BoolElement,
{
    fn execute(&self, handles: &mut HandleContainer<CubeFusionHandle<R>>) {
        type Bare<R, F, I, BT> = CubeBackend<R, F, I, BT>;
        let inputs = &self.description.inputs;
        let mut float = |i: usize| handles.get_float_tensor::<Bare<R, F, I, BT>>(&inputs[i]);
        let operands = Operands {
            q: float(0),
            row: float(1),
            pool: float(2),
            gates: (inputs.len() > 4).then(|| float(4)),
            table: handles.get_int_tensor::<Bare<R, F, I, BT>>(&inputs[3]),
        };
        let (out, pool) = launch(operands, &self.plan);
        let outputs = &self.description.outputs;
        handles.register_float_tensor::<Bare<R, F, I, BT>>(&outputs[0].id, out);
        handles.register_float_tensor::<Bare<R, F, I, BT>>(&outputs[1].id, pool);
    }
}
