//! The operations of attention as CubeCL kernels, for every backend that CubeCL compiles for.
//!
//! * `attend` is the attention of whole sequences, `decode` a step of one token a row, and `product` is for what is
//!   projected around a step;
//! * `device.rs` is what kernels ask of a device, and `memory.rs` makes the tensors that they write to;
//! * `fusion.rs` brings them under Burn's fusion, as custom operations;
//! * `fallback.rs` is for when there is no kernel.

mod attend;
mod decode;
mod device;
mod fallback;
mod fusion;
mod memory;
mod product;

use burn_cubecl::cubecl;
use cubecl::prelude::*;

pub use attend::try_attend;
pub(super) use attend::{attend, attend_fused};
pub use decode::{DECODE_PLANS, Decoded, try_decode, try_decode_by};
pub(super) use decode::{decode, decode_fused};
pub use device::{Planes, use_planes, use_tensor_cores};
pub use fallback::{KernelError, Unavailable, require_kernel};
pub use memory::poison_outputs;
pub(super) use product::{multiply_heads, multiply_heads_fused, product, product_fused};

/// Below any score, and finite.
const LOWEST: f32 = -1e30;

/// The sum of a vector's entries.
#[cube]
fn across<N: Size>(x: Vector<f32, N>) -> f32 {
    let mut sum = 0.0f32;
    #[unroll]
    for e in 0..N::value() {
        sum += x[e];
    }
    sum
}
