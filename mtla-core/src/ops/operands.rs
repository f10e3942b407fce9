//! What the operations are given and give back.

use std::ops::Range;

use burn::tensor::{Int, Tensor, backend::Backend};
use burn_autodiff::{Autodiff, checkpoint::strategy::CheckpointStrategy};

use super::{Activation, AttendProblem, DecodeProblem, ProblemError};
use crate::rope::Rotary;

/// Keys and values that queries attend to.
#[derive(Debug, Clone)]
pub struct KeyValue<B: Backend> {
    /// Keys `[batch, kv_heads, n, key_width − shared width]`.
    pub k: Tensor<B, 4>,
    /// Further channels of the keys, the same for all heads: `[batch, 1, n, shared width]`.
    pub shared: Option<Tensor<B, 4>>,
    /// Values `[batch, kv_heads, n, value_width]`.
    pub v: Tensor<B, 4>,
}

/// The keys and values of an [`attend`](super::AttentionBackend::attend).
#[derive(Debug, Clone)]
pub enum Keys<B: Backend> {
    /// One key for each token of a row. Columns are the tokens that end a chunk, and query `i` of row `b` is
    /// token `offsets[b] + i`, which is where its own running chunk stands.
    Tokens(KeyValue<B>),
    /// Columns given for themselves, as from a cache.
    Columns {
        /// Columns; `None` when no chunk is complete.
        columns: Option<KeyValue<B>>,
        /// Keys and values of each query's own running chunk.
        own: Option<KeyValue<B>>,
    },
}

/// Operands of [`AttentionBackend::attend`](super::AttentionBackend::attend).
#[derive(Debug, Clone)]
pub struct AttendOperands<B: Backend> {
    /// Queries `[batch, heads, queries, key_width]`.
    pub q: Tensor<B, 4>,
    /// What they attend to.
    pub keys: Keys<B>,
}

impl<B: Backend> KeyValue<B> {
    pub(super) fn map(self, f: impl Fn(Tensor<B, 4>) -> Tensor<B, 4>) -> Self {
        Self {
            k: f(self.k),
            shared: self.shared.map(&f),
            v: f(self.v),
        }
    }

    /// These, and `after` them those.
    #[cfg(feature = "cube")]
    pub(super) fn followed_by(self, after: Self) -> Self {
        let cat = |a, b| Tensor::cat(vec![a, b], 2);
        Self {
            k: cat(self.k, after.k),
            shared: self.shared.zip(after.shared).map(|(a, b)| cat(a, b)),
            v: cat(self.v, after.v),
        }
    }

    /// Shapes of whole keys and of values.
    fn dims(&self) -> ([usize; 4], [usize; 4]) {
        let mut k = self.k.dims();
        if let Some(shared) = &self.shared {
            let [batch, one, n, width] = shared.dims();
            assert_eq!(
                [batch, one, n],
                [k[0], 1, k[2]],
                "attend: shared channels do not fit the keys"
            );
            k[3] += width;
        }
        (k, self.v.dims())
    }
}

impl<B: Backend> AttendOperands<B> {
    /// # Panics
    /// If the operands do not fit the problem.
    pub(super) fn check(&self, problem: &AttendProblem) {
        self.validate(problem)
            .unwrap_or_else(|error| panic!("attend: {error}"));
    }

    /// # Errors
    /// If the operands do not fit the problem.
    pub(super) fn validate(&self, problem: &AttendProblem) -> Result<(), ProblemError> {
        let q = self.q.dims();
        match &self.keys {
            Keys::Columns { columns, own } => problem.validate(
                q,
                columns.as_ref().map(KeyValue::dims),
                own.as_ref().map(KeyValue::dims),
            ),
            Keys::Tokens(kv) => problem.validate_tokens(q, kv.dims()),
        }
    }
}

impl<B: Backend, C: CheckpointStrategy> KeyValue<Autodiff<B, C>> {
    fn inner(self) -> KeyValue<B> {
        KeyValue {
            k: self.k.inner(),
            shared: self.shared.map(Tensor::inner),
            v: self.v.inner(),
        }
    }
}

impl<B: Backend, C: CheckpointStrategy> AttendOperands<Autodiff<B, C>> {
    /// Without the autodiff graph.
    pub(super) fn inner(self) -> AttendOperands<B> {
        let keys = match self.keys {
            Keys::Tokens(kv) => Keys::Tokens(kv.inner()),
            Keys::Columns { columns, own } => Keys::Columns {
                columns: columns.map(KeyValue::inner),
                own: own.map(KeyValue::inner),
            },
        };
        AttendOperands {
            q: self.q.inner(),
            keys,
        }
    }
}

/// What the forward pass of [`Derivatives::attend`] gives.
#[derive(Debug, Clone)]
pub struct AttendForward<B: Backend> {
    /// The result of `attend`, `[batch, heads, queries, value_width]`.
    pub out: Tensor<B, 4>,
    /// What the backward pass wants to know beside it: for each query `ln Σ e^score`,
    /// `[batch, heads, queries, 1]`.
    pub log_sum: Tensor<B, 4>,
}

/// Operations of a backend that come with a backward pass of their own: `Autodiff` records each as one node,
/// instead of tracing the plain forms.
#[derive(Debug, Clone, Copy)]
#[expect(clippy::type_complexity, reason = "each is written once")]
pub struct Derivatives<B: Backend> {
    /// [`attend`](super::AttentionBackend::attend), forward.
    pub attend: fn(AttendOperands<B>, &AttendProblem) -> AttendForward<B>,
    /// The gradients of its operands, from the operands, what the forward pass gave, and the gradient of its
    /// result.
    pub attend_backward:
        fn(AttendOperands<B>, &AttendProblem, AttendForward<B>, Tensor<B, 4>) -> AttendOperands<B>,
    /// The gradient of [`activate`](super::AttentionBackend::activate)'s input from that and the gradient of its
    /// result.
    pub activate_backward: fn(Tensor<B, 2>, Activation, Tensor<B, 2>) -> Tensor<B, 2>,
    /// The gradients of latents and gates from those of
    /// [`gate_and_merge`](super::AttentionBackend::gate_and_merge)'s result: latents, gates, stride, gradient.
    pub gate_and_merge_backward:
        fn(Tensor<B, 3>, Tensor<B, 2>, usize, Tensor<B, 3>) -> (Tensor<B, 3>, Tensor<B, 2>),
}

/// A matrix for each head, out of one weight.
#[derive(Debug, Clone)]
pub struct HeadMatrices<B: Backend> {
    /// `[rank, heads · block]`.
    pub weight: Tensor<B, 2>,
    /// Heads.
    pub heads: usize,
    /// The columns of a head's block that are its matrix, `[rank, columns]`.
    pub columns: Range<usize>,
    /// Whether it is turned, `[columns, rank]`.
    pub transposed: bool,
}

impl<B: Backend> HeadMatrices<B> {
    /// Columns of a head's block.
    pub(super) fn block(&self) -> usize {
        self.weight.dims()[1] / self.heads
    }

    /// Channels that a head has before and after.
    pub(super) fn widths(&self) -> [usize; 2] {
        let (rank, columns) = (self.weight.dims()[0], self.columns.len());
        if self.transposed {
            [columns, rank]
        } else {
            [rank, columns]
        }
    }

    /// # Panics
    /// If the matrices do not fit `x [rows, heads, width]`.
    pub(super) fn check(&self, x: &Tensor<B, 3>) {
        let ([_, heads, width], [_, all]) = (x.dims(), self.weight.dims());
        assert!(
            heads == self.heads
                && all.is_multiple_of(heads)
                && self.columns.end <= self.block()
                && self.widths()[0] <= width,
            "columns {:?} of {} heads in a weight {:?} do not fit x {:?}",
            self.columns,
            self.heads,
            self.weight.dims(),
            x.dims(),
        );
    }
}

/// Operands of [`AttentionBackend::decode`](super::AttentionBackend::decode).
#[derive(Debug, Clone)]
pub struct DecodeOperands<B: Backend> {
    /// Queries (for latent layouts projected to the latent space) `[rows, heads, key_width]`.
    pub q: Tensor<B, 3>,
    /// The new token of each row as the pool stores it, before rotation and gate `[rows, slot width]`.
    pub row: Tensor<B, 2>,
    /// Rotations of one token a row, which turn the channels [`SlotLayout::rotated`](super::SlotLayout::rotated) of
    /// queries and of the new token's keys; `None` where they have no positions, or are rotated already.
    pub rotary: Option<Rotary<B>>,
    /// Folded gate table `[chunks, rank + 1]`: the gate of latent `c` in chunk `t` is
    /// `sigmoid(table[t, ..rank]·c + table[t, rank])`; `None` where nothing is gated.
    pub gates: Option<Tensor<B, 2>>,
    /// All slots `[slots, slot width]`.
    pub pool: Tensor<B, 2>,
    /// Per row its token count before this token, then its slots in order, filled up with the row's last
    /// slot: `[rows, 1 + max_slots]`.
    pub table: Tensor<B, 2, Int>,
}

impl<B: Backend> DecodeOperands<B> {
    /// # Panics
    /// If the operands do not fit the problem.
    pub(super) fn check(&self, problem: &DecodeProblem) {
        self.validate(problem)
            .unwrap_or_else(|error| panic!("decode: {error}"));
    }

    /// # Errors
    /// If the operands do not fit the problem.
    pub(super) fn validate(&self, problem: &DecodeProblem) -> Result<(), ProblemError> {
        problem.validate(
            self.q.dims(),
            self.row.dims(),
            self.rotary.as_ref().map(|rotary| rotary.table.dims()),
            self.gates.as_ref().map(Tensor::dims),
            self.pool.dims(),
            self.table.dims(),
        )
    }
}
