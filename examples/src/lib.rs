//! What the example programs share: the choice of a backend at run time, which is that of the `mtla` command.

#![warn(missing_docs)]

pub use mtla_train::backend::{BackendKind, FloatKind, Program};
