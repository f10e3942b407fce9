//! The CubeCL kernels against the plain form in 64 bits on the host, on fresh random inputs, and which form ran.
//!
//! Memory that a kernel is to write is filled with NaN before.

#![cfg(all(feature = "flex", feature = "wgpu"))]

#[path = "../common/mod.rs"]
mod common;

mod attend;
mod decode;
mod product;

use mtla_core::ops::cube::{self, Planes};

/// Counters and switches are of the whole process, so tests that use them don't run beside others.
static ALONE: std::sync::Mutex<()> = std::sync::Mutex::new(());

/// With the kernel or not at all, on poisoned memory.
pub(crate) fn alone() -> std::sync::MutexGuard<'static, ()> {
    let guard = ALONE
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    #[cfg(feature = "autotune")]
    forget_measurements();
    cube::require_kernel(true);
    cube::poison_outputs(true);
    cube::use_planes(Planes::Reported);
    cube::use_tensor_cores(true);
    guard
}

/// What earlier runs measured is not taken, once for the whole process and before it measures.
#[cfg(feature = "autotune")]
fn forget_measurements() {
    use burn_cubecl::cubecl::config::{CubeClRuntimeConfig, RuntimeConfig, cache::CacheConfig};

    static FORGOTTEN: std::sync::Once = std::sync::Once::new();
    FORGOTTEN.call_once(|| {
        let folder = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("kernel-autotune");
        if folder.exists() {
            std::fs::remove_dir_all(&folder).expect("a folder of this test's own");
        }
        let mut config = CubeClRuntimeConfig::default();
        config.autotune.cache = CacheConfig::File(folder);
        CubeClRuntimeConfig::set(config);
    });
}
