//! The two operations that attention is made of, as a backend extension.
//!
//! Every attention variant of this crate is projections around one of two operations:
//!
//! * [`attend`](AttentionBackend::attend): whole sequences, differentiable. Queries attend to *columns*
//!   (keys and values; for temporal attention the merged states at chunk ends) and, where the stride is
//!   above 1, to their own running chunk (the *self term*).
//! * [`decode`](AttentionBackend::decode): one token a row over the slot pool of a cache, no gradient.
//!
//! Both have a plain tensor form in [`plain`], which runs on any backend and is what every faster form is
//! compared with. A backend becomes usable with one line, `impl AttentionBackend for MyBackend {}`, and
//! overrides a method where it has something better.

mod autodiff;
mod backends;
mod dropout;
#[cfg(feature = "flex")]
mod host;
mod launches;
pub mod plain;
mod problem;

use burn::tensor::{Int, Tensor, backend::Backend};
use burn_autodiff::{Autodiff, checkpoint::strategy::CheckpointStrategy};

pub use dropout::Dropout;
pub use launches::{LaunchKind, launches};
pub use problem::{AttendProblem, DecodeProblem, ProblemError, SlotLayout, Visibility};

/// Keys and values that queries attend to, `k [batch, kv_heads, n, key_width]` and
/// `v [batch, kv_heads, n, value_width]`.
#[derive(Debug, Clone)]
pub struct KeyValue<B: Backend> {
    /// Keys.
    pub k: Tensor<B, 4>,
    /// Values.
    pub v: Tensor<B, 4>,
}

/// Operands of [`AttentionBackend::attend`].
#[derive(Debug, Clone)]
pub struct AttendOperands<B: Backend> {
    /// Queries `[batch, heads, queries, key_width]`.
    pub q: Tensor<B, 4>,
    /// Columns; `None` when no chunk is complete.
    pub columns: Option<KeyValue<B>>,
    /// Keys and values of each query's own running chunk.
    pub self_term: Option<KeyValue<B>>,
}

impl<B: AttentionBackend, C: CheckpointStrategy> KeyValue<Autodiff<B, C>> {
    /// Without the autodiff graph.
    fn inner(self) -> KeyValue<B> {
        KeyValue {
            k: self.k.inner(),
            v: self.v.inner(),
        }
    }
}

impl<B: Backend> AttendOperands<B> {
    /// # Panics
    /// If the operands do not fit the problem.
    fn check(&self, problem: &AttendProblem) {
        let dims = |kv: &KeyValue<B>| (kv.k.dims(), kv.v.dims());
        problem
            .validate(
                self.q.dims(),
                self.columns.as_ref().map(dims),
                self.self_term.as_ref().map(dims),
            )
            .unwrap_or_else(|error| panic!("attend: {error}"));
    }
}

/// What the forward pass of a [`DifferentiableAttend`] gives.
#[derive(Debug, Clone)]
pub struct AttendForward<B: Backend> {
    /// The result of `attend`, `[batch, heads, queries, value_width]`.
    pub out: Tensor<B, 4>,
    /// What the backward pass wants to know beside it: for each query `ln Σ e^score`,
    /// `[batch, heads, queries, 1]`.
    pub log_sum: Tensor<B, 4>,
}

/// An [`attend`](AttentionBackend::attend) with a backward pass of its own, which `Autodiff` records as one
/// node instead of tracing the plain form.
#[derive(Debug, Clone, Copy)]
pub struct DifferentiableAttend<B: Backend> {
    /// The forward pass.
    pub forward: fn(AttendOperands<B>, &AttendProblem) -> AttendForward<B>,
    /// The gradients of the operands, from the operands, what the forward pass gave, and the gradient of its
    /// result.
    pub backward:
        fn(AttendOperands<B>, &AttendProblem, AttendForward<B>, Tensor<B, 4>) -> AttendOperands<B>,
}

/// Operands of [`AttentionBackend::decode`].
#[derive(Debug, Clone)]
pub struct DecodeOperands<B: Backend> {
    /// Queries, rotated (and, for latent layouts, projected to the latent space)
    /// `[rows, heads, key_width]`.
    pub q: Tensor<B, 3>,
    /// The new token of each row as the pool stores it, before the gate `[rows, slot width]`.
    pub row: Tensor<B, 2>,
    /// Folded gate table `[chunks, rank + 1]`: the gate of latent `c` in chunk `t` is
    /// `sigmoid(table[t, ..rank]·c + table[t, rank])`; `None` where nothing is gated.
    pub gates: Option<Tensor<B, 2>>,
    /// All slots `[slots, slot width]`.
    pub pool: Tensor<B, 2>,
    /// Per row its token count before this token, then its slots in order, filled up with the row's last
    /// slot: `[rows, 1 + max_slots]`.
    pub table: Tensor<B, 2, Int>,
}

/// A backend that attention can run on.
///
/// The provided methods are the plain tensor forms, so a backend of your own needs one line,
/// `impl AttentionBackend for MyBackend {}`.
pub trait AttentionBackend: Backend {
    /// Attention of whole sequences; see [`AttendProblem`] for the shapes.
    ///
    /// Returns `[batch, heads, queries, value_width]`.
    ///
    /// # Panics
    /// If the operands do not fit the problem.
    fn attend(operands: AttendOperands<Self>, problem: &AttendProblem) -> Tensor<Self, 4> {
        plain::attend(operands, problem)
    }

    /// An `attend` of this backend's that has its own backward pass, if there is one: training then uses it.
    fn differentiable_attend() -> Option<DifferentiableAttend<Self>> {
        None
    }

    /// One decoding step: writes or merges each row's new token into its slot, then attends over the
    /// row's slots; see [`DecodeProblem`] for the shapes.
    ///
    /// Returns `[rows, heads, value_width]` and the updated pool. Pool slots that the tables do not name
    /// are left alone, and a pool whose storage is not shared is updated in place where the backend can.
    ///
    /// # Panics
    /// If the operands do not fit the problem.
    fn decode(
        operands: DecodeOperands<Self>,
        problem: &DecodeProblem,
    ) -> (Tensor<Self, 3>, Tensor<Self, 2>) {
        plain::decode(operands, problem)
    }

    /// Puts `rows [n, width]` into the slots `slots [n]` (distinct) of `pool [slots, width]`.
    fn write_slots(
        pool: Tensor<Self, 2>,
        slots: Tensor<Self, 1, Int>,
        rows: Tensor<Self, 2>,
    ) -> Tensor<Self, 2> {
        plain::write_slots(pool, slots, rows)
    }
}
