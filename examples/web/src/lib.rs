//! A page in which an MTLA language model writes, on the visitor's GPU or, without one, on the CPU.
//!
//! * [`writer`] is the model at work, on any backend: it is what runs natively too (`examples/write.rs`);
//! * [`memory`] is what other kinds of attention would hold in their caches meanwhile;
//! * [`check`] compares a device with the CPU;
//! * `page`, in a browser, is what the page's worker calls.

pub mod check;
pub mod memory;
#[cfg(all(target_family = "wasm", target_os = "unknown"))]
pub mod page;
pub mod writer;
