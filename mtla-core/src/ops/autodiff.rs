//! Operations with a backward of their own, as nodes of Burn's autodiff graph.

use std::marker::PhantomData;

use burn::tensor::{Tensor, TensorPrimitive};
use burn_autodiff::{
    Autodiff,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};

use super::{
    AttendForward, AttendOperands, AttendProblem, AttentionBackend, DifferentiableAttend, KeyValue,
};

/// [`attend`](AttentionBackend::attend) by `native`, recorded as one node.
pub(super) fn attend<B: AttentionBackend, C: CheckpointStrategy>(
    operands: AttendOperands<Autodiff<B, C>>,
    problem: &AttendProblem,
    native: DifferentiableAttend<B>,
) -> Tensor<Autodiff<B, C>, 4> {
    let inner = AttendOperands {
        q: operands.q.clone().inner(),
        columns: operands.columns.clone().map(KeyValue::inner),
        self_term: operands.self_term.clone().map(KeyValue::inner),
    };
    let forward = (native.forward)(inner.clone(), problem);
    let out = forward.out.clone().into_primitive().tensor();

    // A node has a fixed number of parents: what is absent is stood in for by a constant.
    let absent = || Tensor::from_inner(Tensor::zeros([1, 1, 1, 1], &forward.out.device()));
    let parents = |kv: Option<KeyValue<Autodiff<B, C>>>| match kv {
        Some(kv) => [kv.k, kv.v],
        None => [absent(), absent()],
    };
    let [k, v] = parents(operands.columns);
    let [own_k, own_v] = parents(operands.self_term);
    let nodes = [operands.q, k, v, own_k, own_v].map(|x| x.into_primitive().tensor().node);

    let prepared = AttendBackward(PhantomData).prepare::<C>(nodes);
    let out = match prepared.compute_bound().stateful() {
        OpsKind::Tracked(prepared) => {
            let state = State {
                operands: inner,
                problem: problem.clone(),
                forward,
                native,
            };
            prepared.finish(state, out)
        }
        OpsKind::UnTracked(prepared) => prepared.finish(out),
    };
    Tensor::from_primitive(TensorPrimitive::Float(out))
}

#[derive(Debug)]
struct AttendBackward<B>(PhantomData<B>);

/// What the backward pass needs.
#[derive(Debug, Clone)]
struct State<B: AttentionBackend> {
    operands: AttendOperands<B>,
    problem: AttendProblem,
    forward: AttendForward<B>,
    native: DifferentiableAttend<B>,
}

impl<B: AttentionBackend> Backward<B, 5> for AttendBackward<B> {
    type State = State<B>;

    fn backward(self, ops: Ops<State<B>, 5>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = Tensor::from_primitive(TensorPrimitive::Float(grads.consume::<B>(&ops.node)));
        let state = ops.state;
        let found = (state.native.backward)(state.operands, &state.problem, state.forward, grad);
        let pair = |kv: Option<KeyValue<B>>| kv.map_or([None, None], |kv| [Some(kv.k), Some(kv.v)]);
        let ([k, v], [own_k, own_v]) = (pair(found.columns), pair(found.self_term));
        let found = [Some(found.q), k, v, own_k, own_v];
        for (parent, grad) in ops.parents.into_iter().zip(found) {
            if let (Some(parent), Some(grad)) = (parent, grad) {
                grads.register::<B>(parent.id, grad.into_primitive().tensor());
            }
        }
    }
}
