//! Checkpoints on the disk: what is written is read again, here and by Python, and damaged or hostile files are
//! refused with a reason.

#![cfg(all(feature = "files", feature = "flex"))]

#[path = "../common/mod.rs"]
mod common;
mod hostile;
mod python;
mod round_trip;
mod sample;
