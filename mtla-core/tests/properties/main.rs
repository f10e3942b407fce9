//! Properties of every attention variant, each on every backend that the build has: agreement with the
//! definition (`common/oracle.rs`), of the three entry points with each other, and of a row with itself
//! in whatever company it is computed.

#[path = "../common/mod.rs"]
mod common;

mod cached;
mod cross;
mod errors;
mod forward;
mod gradients;
mod histories;
mod identities;
mod masks;
mod problems;
