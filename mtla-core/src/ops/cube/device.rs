//! What kernels ask of a device.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use burn::tensor::DType;
use burn_cubecl::cubecl;
use cubecl::{
    features::{Plane, TypeUsage},
    ir::{DeviceProperties, StorageType},
};

/// Sums that a unit keeps in registers, at most.
pub(super) const SUMS: usize = 128;
/// Elements of a vector, at most.
const VECTOR: usize = 4;

/// When a kernel uses plane operations (subgroups).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Planes {
    /// Where the device says that it has them.
    Reported,
    /// Nowhere: for drivers that get them wrong.
    Never,
    /// Everywhere: for tests on devices that have them and don't say so.
    Always,
}

/// How many of them to expect where a device does not say.
const MULTIPROCESSORS: usize = 32;

static PLANES: AtomicU8 = AtomicU8::new(Planes::Reported as u8);

/// When kernels use plane operations, from now on and in the whole process.
pub fn use_planes(planes: Planes) {
    PLANES.store(planes as u8, Ordering::Relaxed);
}

static TENSOR_CORES: AtomicBool = AtomicBool::new(true);

/// Whether kernels use tensor cores where the device has them, from now on and in the whole process: `true` unless this
/// says otherwise.
pub fn use_tensor_cores(use_them: bool) {
    TENSOR_CORES.store(use_them, Ordering::Relaxed);
}

/// The sizes `m`, `n` and `k` of products that the device computes by tensor cores, of matrices of this type, if it has 16
/// bits, with sums of 32.
pub(super) fn tensor_cores(dtype: DType, device: &DeviceProperties) -> Vec<[usize; 3]> {
    let one_size = device.hardware.plane_size_min == device.hardware.plane_size_max;
    let has_planes = one_size && plane_size(device) > 1;
    if !TENSOR_CORES.load(Ordering::Relaxed) || !has_planes || dtype.size() != 2 {
        return Vec::new();
    }
    let [operand, sum] = [dtype, DType::F32].map(StorageType::from);
    let sizes = device.features.matmul.cmma.iter();
    sizes
        .filter(|of| [of.a_type, of.b_type] == [operand; 2] && of.cd_type == sum)
        .map(|of| [of.m, of.n, of.k].map(|size| size as usize))
        .collect()
}

/// Units of a plane; 1 where plane operations are not to be used.
pub(super) fn plane_size(device: &DeviceProperties) -> usize {
    let forced = PLANES.load(Ordering::Relaxed);
    let reported = device.features.plane.contains(Plane::Ops);
    let size = device.hardware.plane_size_min as usize;
    if forced == Planes::Never as u8 || !reported && forced != Planes::Always as u8 {
        return 1;
    }
    if size.is_power_of_two() { size } else { 1 }
}

/// Multiprocessors of the device, which run cubes side by side.
pub(super) fn multiprocessors(device: &DeviceProperties) -> usize {
    let reported = device.hardware.num_streaming_multiprocessors;
    reported.map_or(MULTIPROCESSORS, |n| n as usize)
}

/// Whether the device loads, stores and converts numbers of this type.
pub(super) fn is_usable(dtype: DType, device: &DeviceProperties) -> bool {
    let usage = TypeUsage::Buffer | TypeUsage::Conversion;
    device.type_usage(dtype.into()).is_superset(usage)
}

/// Whether kernels take floats of this type on the device.
pub(super) fn is_float(dtype: DType, device: &DeviceProperties) -> bool {
    matches!(dtype, DType::F32 | DType::F16 | DType::BF16) && is_usable(dtype, device)
}

/// The longest vector of elements of this many bytes that divides all widths and that the device loads at once.
pub(super) fn vector(widths: &[usize], bytes: usize, device: &DeviceProperties) -> usize {
    let hardware = &device.hardware;
    let most = (hardware.load_width as usize / (8 * bytes)).min(hardware.max_vector_size);
    let divides =
        |n: &usize| n.is_power_of_two() && widths.iter().all(|width| width.is_multiple_of(*n));
    (1..=most.min(VECTOR)).rev().find(divides).unwrap_or(1)
}
