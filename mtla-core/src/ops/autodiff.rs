//! Operations with a backward of their own, as nodes of Burn's autodiff graph.

use std::{fmt, marker::PhantomData, sync::Arc};

use burn::tensor::{
    Tensor, TensorPrimitive,
    backend::{Backend, BackendTypes},
};
use burn_autodiff::{
    Autodiff,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};

use super::{
    Activation, AttendOperands, AttendProblem, AttentionBackend, Derivatives, KeyValue, Keys,
};
use crate::rope::Rotary;

type Float<B> = <B as BackendTypes>::FloatTensorPrimitive;

/// [`attend`](AttentionBackend::attend) by `native`.
pub(super) fn attend<B: AttentionBackend, C: CheckpointStrategy>(
    operands: AttendOperands<Autodiff<B, C>>,
    problem: &AttendProblem,
    native: Derivatives<B>,
) -> Tensor<Autodiff<B, C>, 4> {
    let device = operands.q.device();
    let inner = operands.clone().inner();
    let forward = (native.attend)(inner.clone(), problem);
    let (out, problem) = (primitive(forward.out.clone()), problem.clone());
    // A node has a fixed number of parents: what is absent is stood in for by a constant.
    let parents = parts(operands).map(|part| {
        let part = part.unwrap_or_else(|| Tensor::from_inner(Tensor::empty([1; 4], &device)));
        primitive(part)
    });
    let backward = move |grad, _| {
        let (inner, forward) = (inner.clone(), forward.clone());
        parts((native.attend_backward)(
            inner,
            &problem,
            forward,
            tensor(grad),
        ))
        .map(|grad| grad.map(primitive))
    };
    tensor(record::<B, C, 7>(parents, |_| out, backward))
}

/// The tensors of the operands, in a fixed order.
fn parts<B: Backend>(operands: AttendOperands<B>) -> [Option<Tensor<B, 4>>; 7] {
    let of = |kv: Option<KeyValue<B>>| {
        kv.map_or([None, None, None], |kv| [Some(kv.k), kv.shared, Some(kv.v)])
    };
    let (first, second) = match operands.keys {
        Keys::Tokens(kv) => (Some(kv), None),
        Keys::Columns { columns, own } => (columns, own),
    };
    let ([k, shared, v], [own_k, own_shared, own_v]) = (of(first), of(second));
    [Some(operands.q), k, shared, v, own_k, own_shared, own_v]
}

/// [`product`](AttentionBackend::product), whose gradients are products too.
pub(super) fn product<B: AttentionBackend, C: CheckpointStrategy>(
    a: Tensor<Autodiff<B, C>, 2>,
    b: Tensor<Autodiff<B, C>, 2>,
) -> Tensor<Autodiff<B, C>, 2> {
    let (inner_a, inner_b) = (a.clone().inner(), b.clone().inner());
    let backward = move |grad, [of_a, of_b]: [bool; 2]| {
        let grad = tensor::<B, 2>(grad);
        let of_a = of_a.then(|| B::product(grad.clone(), inner_b.clone().transpose()));
        let of_b = of_b.then(|| B::product(inner_a.clone().transpose(), grad));
        [of_a, of_b].map(|grad| grad.map(primitive))
    };
    tensor(record::<B, C, 2>(
        [primitive(a), primitive(b)],
        |[a, b]| primitive(B::product(tensor(a), tensor(b))),
        backward,
    ))
}

/// [`activate`](AttentionBackend::activate) by `native`.
pub(super) fn activate<B: AttentionBackend, C: CheckpointStrategy>(
    x: Tensor<Autodiff<B, C>, 2>,
    activation: Activation,
    native: Derivatives<B>,
) -> Tensor<Autodiff<B, C>, 2> {
    let inner = x.clone().inner();
    let backward = move |grad, _| {
        let grad = (native.activate_backward)(inner.clone(), activation, tensor(grad));
        [Some(primitive(grad))]
    };
    tensor(record::<B, C, 1>(
        [primitive(x)],
        |[x]| primitive(B::activate(tensor(x), activation)),
        backward,
    ))
}

/// [`rotate`](AttentionBackend::rotate): its backward pass turns back.
pub(super) fn rotate<B: AttentionBackend, C: CheckpointStrategy>(
    x: Tensor<Autodiff<B, C>, 4>,
    rotary: &Rotary<Autodiff<B, C>>,
    first: usize,
) -> Tensor<Autodiff<B, C>, 4> {
    let forth = rotary.clone().inner();
    let back = forth.clone().inverse();
    let rotate = move |x, rotary: &Rotary<B>| primitive(B::rotate(tensor(x), rotary, first));
    tensor(record::<B, C, 1>(
        [primitive(x)],
        |[x]| rotate(x, &forth),
        move |grad, _| [Some(rotate(grad, &back))],
    ))
}

/// [`gate_and_merge`](AttentionBackend::gate_and_merge) by `native`.
pub(super) fn gate_and_merge<B: AttentionBackend, C: CheckpointStrategy>(
    latents: Tensor<Autodiff<B, C>, 3>,
    gates: Tensor<Autodiff<B, C>, 2>,
    stride: usize,
    native: Derivatives<B>,
) -> Tensor<Autodiff<B, C>, 3> {
    let (inner, inner_gates) = (latents.clone().inner(), gates.clone().inner());
    let backward = move |grad, _| {
        let (latents, gates) = (inner.clone(), inner_gates.clone());
        let (latents, gates) =
            (native.gate_and_merge_backward)(latents, gates, stride, tensor(grad));
        [Some(primitive(latents)), Some(primitive(gates))]
    };
    tensor(record::<B, C, 2>(
        [primitive(latents), primitive(gates)],
        |[latents, gates]| primitive(B::gate_and_merge(tensor(latents), tensor(gates), stride)),
        backward,
    ))
}

fn primitive<B: Backend, const D: usize>(x: Tensor<B, D>) -> Float<B> {
    x.into_primitive().tensor()
}

fn tensor<B: Backend, const D: usize>(x: Float<B>) -> Tensor<B, D> {
    Tensor::from_primitive(TensorPrimitive::Float(x))
}

/// A node that is computed by `forward` from the values of its parents, and whose gradient `backward` turns
/// into those of its parents; it is told which of them have one.
fn record<B: Backend, C: CheckpointStrategy, const N: usize>(
    parents: [Float<Autodiff<B, C>>; N],
    forward: impl FnOnce([Float<B>; N]) -> Float<B>,
    backward: impl Fn(Float<B>, [bool; N]) -> [Option<Float<B>>; N] + Send + Sync + 'static,
) -> Float<Autodiff<B, C>> {
    let nodes = parents.each_ref().map(|parent| parent.node.clone());
    // The values are moved, so that an operation may work in place.
    let out = forward(parents.map(|parent| parent.primitive));
    match Node(PhantomData)
        .prepare::<C>(nodes)
        .compute_bound()
        .stateful()
    {
        OpsKind::Tracked(prepared) => prepared.finish(Derivative(Arc::new(backward)), out),
        OpsKind::UnTracked(prepared) => prepared.finish(out),
    }
}

#[derive(Debug)]
struct Node<B>(PhantomData<B>);

/// From the gradient of a node to those of its parents.
struct Derivative<B: Backend, const N: usize>(
    #[expect(clippy::type_complexity, reason = "it is written once")]
    Arc<dyn Fn(Float<B>, [bool; N]) -> [Option<Float<B>>; N] + Send + Sync>,
);

impl<B: Backend, const N: usize> Clone for Derivative<B, N> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<B: Backend, const N: usize> fmt::Debug for Derivative<B, N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Derivative")
    }
}

impl<B: Backend, const N: usize> Backward<B, N> for Node<B> {
    type State = Derivative<B, N>;

    fn backward(self, ops: Ops<Self::State, N>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let wanted = ops.parents.each_ref().map(Option::is_some);
        for (parent, grad) in ops.parents.into_iter().zip(ops.state.0(grad, wanted)) {
            if let (Some(parent), Some(grad)) = (parent, grad) {
                grads.register::<B>(parent.id, grad);
            }
        }
    }
}
