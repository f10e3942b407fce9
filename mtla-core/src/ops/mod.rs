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

mod backends;
mod dropout;
pub mod plain;
mod problem;

use burn::tensor::{Int, Tensor, backend::Backend};

pub use dropout::Dropout;
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
