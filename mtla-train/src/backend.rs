//! The choice of a backend, and of the type of numbers, when a program starts.

use burn::tensor::DType;
use clap::ValueEnum;
use mtla_core::ops::AttentionBackend;

/// Where to compute. A backend is there if the program was built with its cargo feature.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BackendKind {
    /// CPU, fast (feature `flex`, on by default).
    Flex,
    /// CPU, plain (feature `ndarray`).
    Ndarray,
    /// Any GPU through Vulkan, Metal, `DirectX` 12 or `WebGPU` (feature `wgpu`).
    Wgpu,
    /// NVIDIA GPUs (feature `cuda`).
    Cuda,
    /// `LibTorch` on the CPU (feature `tch`).
    Tch,
}

/// A program that runs on any backend.
pub trait Program {
    /// Runs it on `device`.
    ///
    /// # Errors
    /// Whatever keeps it from finishing.
    fn run<B: AttentionBackend>(self, device: B::Device) -> anyhow::Result<()>;
}

impl BackendKind {
    /// The first backend that is compiled in, fastest first.
    pub fn best() -> Self {
        if cfg!(feature = "cuda") {
            Self::Cuda
        } else if cfg!(feature = "wgpu") {
            Self::Wgpu
        } else if cfg!(feature = "flex") {
            Self::Flex
        } else if cfg!(feature = "tch") {
            Self::Tch
        } else {
            Self::Ndarray
        }
    }

    /// Runs `program` on the backend's default device.
    ///
    /// # Errors
    /// If the backend is not compiled in, or the program's own.
    pub fn run(self, program: impl Program) -> anyhow::Result<()> {
        match self {
            #[cfg(feature = "flex")]
            Self::Flex => program.run::<burn_flex::Flex>(Default::default()),
            #[cfg(feature = "ndarray")]
            Self::Ndarray => program.run::<burn_ndarray::NdArray>(Default::default()),
            #[cfg(feature = "wgpu")]
            Self::Wgpu => program.run::<burn_wgpu::Wgpu>(Default::default()),
            #[cfg(feature = "cuda")]
            Self::Cuda => program.run::<burn_cuda::Cuda>(Default::default()),
            #[cfg(feature = "tch")]
            Self::Tch => program.run::<burn_tch::LibTorch>(Default::default()),
            #[allow(unreachable_patterns, reason = "unless every backend is compiled in")]
            missing => {
                let name = format!("{missing:?}").to_lowercase();
                anyhow::bail!(
                    "this program was built without the backend {name}: build it with --features {name}"
                )
            }
        }
    }
}

/// The type of the numbers that a model is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum FloatKind {
    /// 32 bits.
    F32,
    /// 16 bits, 5 of them exponent.
    F16,
    /// 16 bits, 8 of them exponent.
    Bf16,
}

impl FloatKind {
    /// As Burn calls it.
    pub fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::Bf16 => DType::BF16,
        }
    }
}
