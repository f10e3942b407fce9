//! The operations that attention is made of, as a backend extension.
//!
//! Every attention variant of this crate is projections around one of these two:
//!
//! * [`attend`](AttentionBackend::attend): whole sequences, differentiable. Queries attend to *columns*
//!   (keys and values; for temporal attention the merged states at chunk ends) and, where the stride is
//!   above 1, to their own running chunk (the *self term*).
//! * [`decode`](AttentionBackend::decode): one token a row over the slot pool of a cache, no gradient.
//!
//! Smaller ones go with them: products, activations, rotation, the gate and merge, writing to a pool.
//!
//! All have a plain tensor form, most of them in [`plain`], which runs on any backend and is what every faster form
//! is compared with. A backend of your own becomes usable with one line, `impl AttentionBackend for MyBackend {}`,
//! and overrides a method where it has something better. (For a backend of somebody else's, Rust wants a type of
//! yours around it.)

mod activation;
mod autodiff;
mod backends;
#[cfg(feature = "cube")]
pub mod cube;
mod dropout;
#[cfg(feature = "flex")]
mod host;
mod launches;
mod operands;
pub mod plain;
mod problem;

use burn::tensor::{Int, Tensor, backend::Backend};

use crate::rope::Rotary;

pub use activation::Activation;
pub use dropout::Dropout;
pub use launches::{LaunchKind, launches};
pub use operands::{
    AttendForward, AttendOperands, DecodeOperands, Derivatives, HeadMatrices, KeyValue, Keys,
};
pub use problem::{AttendProblem, DecodeProblem, ProblemError, SlotLayout, Visibility};

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

    /// Operations of this backend's that have a backward pass of their own, if there are any: training then
    /// uses them.
    fn derivatives() -> Option<Derivatives<Self>> {
        None
    }

    /// The matrix product of `a [m, k]` and `b [k, n]`, with any strides.
    ///
    /// # Panics
    /// If the shapes do not fit each other.
    fn product(a: Tensor<Self, 2>, b: Tensor<Self, 2>) -> Tensor<Self, 2> {
        a.matmul(b)
    }

    /// The first channels of every head of `x [rows, heads, width]`, multiplied by the head's own matrix; channels
    /// beyond those that the matrix takes come behind the result as they are.
    ///
    /// # Panics
    /// If the matrices do not fit `x`.
    fn multiply_heads(x: Tensor<Self, 3>, matrices: HeadMatrices<Self>) -> Tensor<Self, 3> {
        plain::multiply_heads(x, matrices)
    }

    /// An activation function of every entry.
    fn activate(x: Tensor<Self, 2>, activation: Activation) -> Tensor<Self, 2> {
        activation.plain(x)
    }

    /// Turns the channels from `first` on of every head of `x [rows, tokens, heads, width]` by the angles of
    /// its token, as [`Rotary`] says; the channels before stay as they are.
    ///
    /// # Panics
    /// If the table does not fit `x`.
    fn rotate(x: Tensor<Self, 4>, rotary: &Rotary<Self>, first: usize) -> Tensor<Self, 4> {
        plain::rotate(x, rotary, first)
    }

    /// The states of temporal attention: `latents [batch, tokens, rank]`, each gated by its chunk's row of
    /// `gates [chunks, rank + 1]` (see [`TemporalGate::table`](crate::temporal::TemporalGate::table)) and added
    /// to those before it in its chunk of `stride` tokens.
    ///
    /// # Panics
    /// If there are fewer gates than chunks, or they have another rank.
    fn gate_and_merge(
        latents: Tensor<Self, 3>,
        gates: Tensor<Self, 2>,
        stride: usize,
    ) -> Tensor<Self, 3> {
        plain::gate_and_merge(latents, gates, stride)
    }

    /// One decoding step: rotates queries and new keys, writes or merges each row's new token into its slot, then
    /// attends over the row's slots; see [`DecodeProblem`] for the shapes.
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
