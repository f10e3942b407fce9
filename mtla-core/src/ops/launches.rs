//! Which implementation ran: counters that only grow, for tests and for the curious.

use std::sync::atomic::{AtomicU64, Ordering};

/// An implementation of an operation that is not the plain tensor form.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LaunchKind {
    /// `attend` of the Flex backend.
    HostAttend,
    /// Its backward pass.
    HostAttendBackward,
    /// `decode` of the Flex backend.
    HostDecode,
    /// `decode` of the backends that CubeCL compiles for.
    CubeDecode,
    /// Those of them in which slots that rows share were read once for several rows.
    CubeDecodeTeams,
    /// Those of them that used tensor cores.
    CubeDecodeTensorCores,
    /// The second launch of it, where rows have several parts.
    CubeDecodeCombine,
    /// `attend` of those backends.
    CubeAttend,
    /// Steps on copies, to measure plans of `decode` with the feature `autotune`; not among those above.
    CubeDecodeTrial,
    /// Products of few rows on those backends, of `product` and of `multiply_heads`.
    CubeProduct,
}

static COUNTS: [AtomicU64; 10] = [const { AtomicU64::new(0) }; 10];

#[cfg(any(feature = "flex", feature = "cube"))]
pub(super) fn count(kind: LaunchKind) {
    COUNTS[kind as usize].fetch_add(1, Ordering::Relaxed);
}

/// How often an implementation has run in this process.
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::tensor::{Distribution, Tensor};
/// use burn_flex::Flex;
/// use mtla_core::attention::{AttentionConfig, AttentionInput};
/// use mtla_core::ops::{LaunchKind, launches};
///
/// let before = launches(LaunchKind::HostAttend);
/// let device = Default::default();
/// let attention = AttentionConfig::mtla(64, 4).init::<Flex>(&device).unwrap();
/// let x = Tensor::random([2, 7, 64], Distribution::Default, &device);
/// attention.forward(AttentionInput::new(x));
/// assert_eq!(launches(LaunchKind::HostAttend), before + 1);
/// # }
/// ```
pub fn launches(kind: LaunchKind) -> u64 {
    COUNTS[kind as usize].load(Ordering::Relaxed)
}
