//! What happens where a kernel cannot run: the plain form, visibly.

use std::sync::{
    Mutex, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use burn::tensor::DType;

use super::super::ProblemError;

/// Why a kernel cannot run a problem that is in order.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unavailable {
    /// An element type that the kernel or the device does not have.
    #[error("{operand} of {dtype:?}")]
    Type {
        /// The operand.
        operand: &'static str,
        /// Its type.
        dtype: DType,
    },
    /// A slot does not fit into the memory that the units of a cube share.
    #[error("{needed} bytes of shared memory are needed for one slot, there are {available}")]
    SharedMemory {
        /// For a tile of one slot.
        needed: usize,
        /// What the device has, or as much of it as the kernel uses.
        available: usize,
    },
    /// More sums than a unit has registers for.
    #[error(
        "{sums} sums a unit, {limit} are possible: too many heads share a key, or values are too wide"
    )]
    Sums {
        /// Heads that share a key, times the width of values, divided among the units of a cube.
        sums: usize,
        /// At most so many.
        limit: usize,
    },
    /// More rows or key/value heads than a launch has cubes for, or none.
    #[error("{rows} rows of {kv_heads} key/value heads")]
    Grid {
        /// Rows.
        rows: usize,
        /// Key/value heads.
        kv_heads: usize,
    },
}

/// Why a kernel did not run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KernelError {
    /// The operands do not fit together; no form of the operation can do it.
    #[error(transparent)]
    Invalid(#[from] ProblemError),
    /// Only the kernel cannot do it, or not on this device.
    #[error("no kernel for {0}")]
    Unavailable(#[from] Unavailable),
}

static REQUIRED: AtomicBool = AtomicBool::new(false);

/// Whether, from now on and in the whole process, a fallback to a plain form is a panic: for tests and
/// measurements, which should not pass without the kernel.
pub fn require_kernel(required: bool) {
    REQUIRED.store(required, Ordering::Relaxed);
}

/// Says that the plain form runs instead; a warning the first time for each reason.
///
/// # Panics
/// If kernels are required.
pub(super) fn fall_back(operation: &str, reason: &Unavailable) {
    static SAID: Mutex<Vec<String>> = Mutex::new(Vec::new());
    assert!(
        !REQUIRED.load(Ordering::Relaxed),
        "{operation}: a kernel is required, and there is none for {reason}"
    );
    let said = format!("{operation}: no kernel for {reason}; the plain form runs instead");
    let mut all = SAID.lock().unwrap_or_else(PoisonError::into_inner);
    if !all.contains(&said) {
        log::warn!("{said}");
        all.push(said);
    }
}
