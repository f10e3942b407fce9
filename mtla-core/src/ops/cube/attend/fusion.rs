//! Attention under Burn's fusion: one custom operation, which fusion keeps in order with those around it.

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
    super::super::{AttendOperands, AttendProblem, plain},
    Prepared,
    launch::{Numbers, Operands, launch},
    plan::AttendPlan,
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
    let Some(prepared) = Prepared::or_fall_back::<R>(&operands, problem) else {
        return plain::attend(operands, problem);
    };
    drop(operands);
    let Prepared {
        q,
        keys,
        rows,
        plan,
        numbers,
    } = prepared;
    let [batch, heads, queries, _] = q.dims();
    let shape = Shape::from([batch, queries, heads, problem.value_width]);

    let float = |x: Tensor<_, 4>| x.into_primitive().tensor();
    let mut inputs = vec![
        float(q),
        float(keys.k),
        float(keys.v),
        rows.into_primitive(),
    ];
    inputs.extend(keys.shared.map(float));
    let client = inputs[0].client.clone();
    let streams = OperationStreams::with_inputs(&inputs);
    let output = TensorIr::uninit(client.create_empty_handle(), shape, plan.dtype);
    let inputs: Vec<TensorIr> = inputs.into_iter().map(FusionTensor::into_ir).collect();
    let description = CustomOpIr::new("mtla::attend", &inputs, &[output]);
    let operation = Attend::<CubeBackend<R, F, I, BT>> {
        description: description.clone(),
        plan,
        numbers,
        backend: PhantomData,
    };
    let [out] = client
        .register(streams, OperationIr::Custom(description), operation)
        .try_into()
        .expect("as many outputs as were described");
    Tensor::from_primitive(TensorPrimitive::Float(out)).swap_dims(1, 2)
}

#[derive(Debug)]
struct Attend<B> {
    description: CustomOpIr,
    plan: AttendPlan,
    numbers: Numbers,
    backend: PhantomData<B>,
}

impl<R, F, I, BT> Operation<FusionCubeRuntime<R>> for Attend<CubeBackend<R, F, I, BT>>
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
            k: float(1),
            v: float(2),
            shared: (inputs.len() > 4).then(|| float(4)),
            rows: handles.get_int_tensor::<Bare<R, F, I, BT>>(&inputs[3]),
        };
        let (out, _) = launch(operands, &self.plan, &self.numbers);
        let output = &self.description.outputs[0];
        handles.register_float_tensor::<Bare<R, F, I, BT>>(&output.id, out);
    }
}
