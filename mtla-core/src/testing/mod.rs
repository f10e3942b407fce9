//! Help for tests of attention code: the compiled backends, recorded cases, tolerances (feature
//! `testing`).
//!
//! Tests are generic functions over a backend, instantiated by [`backend_tests!`](crate::backend_tests)
//! for every backend that a feature of the calling crate switches on.

mod golden;
mod reference;

use std::sync::{Mutex, MutexGuard, PoisonError};

pub use golden::{Checks, Golden, golden_root};
pub use reference::{load_attention, load_cross_attention, names};

/// Waits until no other test works on a graph of operations, and keeps the others waiting.
///
/// To be held from the first operation to the end of `backward`: the end of any `backward` of Burn 0.21 sweeps the
/// graphs of the whole process, and of one that another thread is building it may take steps that
/// are still needed, whose gradients are then missing from the sums
/// ([burn#5573](https://github.com/tracel-ai/burn/issues/5573)).
///
/// ```
/// use burn::tensor::Tensor;
/// use burn_autodiff::Autodiff;
/// use burn_flex::Flex;
/// use mtla_core::testing::one_graph;
///
/// let x = Tensor::<Autodiff<Flex>, 1>::from_floats([3.0], &Default::default()).require_grad();
/// let alone = one_graph();
/// let grads = (x.clone() * x.clone()).backward();
/// drop(alone);
/// assert_eq!(x.grad(&grads).unwrap().into_scalar(), 6.0);
/// ```
pub fn one_graph() -> MutexGuard<'static, ()> {
    static GRAPH: Mutex<()> = Mutex::new(());
    // What it guards is whole even after a panic.
    GRAPH.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The backends that are compiled, by the names that [`backend_tests!`](crate::backend_tests) uses.
pub mod backends {
    #[cfg(feature = "cuda")]
    pub use burn_cuda::Cuda;
    #[cfg(feature = "flex")]
    pub use burn_flex::Flex;
    #[cfg(feature = "ndarray")]
    pub use burn_ndarray::NdArray;
    #[cfg(feature = "tch")]
    pub use burn_tch::LibTorch;

    /// The wgpu backend with operation fusion.
    #[cfg(feature = "wgpu")]
    pub type Wgpu = burn_fusion::Fusion<WgpuBare>;
    /// The wgpu backend as a browser build has it.
    #[cfg(feature = "wgpu")]
    pub type WgpuBare = burn_cubecl::CubeBackend<burn_wgpu::WgpuRuntime, f32, i32, u32>;
}

/// Makes a `#[test]` of each generic function `fn name<B: AttentionBackend>(device: &B::Device)`, for
/// every backend whose feature is on in the calling crate (`flex`, `ndarray`, `wgpu` with and without
/// fusion, `cuda`, `tch`).
#[macro_export]
macro_rules! backend_tests {
    ($($name:ident),+ $(,)?) => {
        $crate::backend_tests!(@ flex "flex" Flex $($name)+);
        $crate::backend_tests!(@ ndarray "ndarray" NdArray $($name)+);
        $crate::backend_tests!(@ wgpu "wgpu" Wgpu $($name)+);
        $crate::backend_tests!(@ wgpu_bare "wgpu" WgpuBare $($name)+);
        $crate::backend_tests!(@ cuda "cuda" Cuda $($name)+);
        $crate::backend_tests!(@ tch "tch" LibTorch $($name)+);
    };
    (@ $module:ident $feature:literal $backend:ident $($name:ident)+) => {
        #[cfg(feature = $feature)]
        mod $module {
            $(
                #[test]
                fn $name() {
                    super::$name::<$crate::testing::backends::$backend>(&Default::default());
                }
            )+
        }
    };
}
