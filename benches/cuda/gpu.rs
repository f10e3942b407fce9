//! A GPU that is not there: CubeCL compiles for it as for CUDA, and where CUDA would launch, the source is kept.
//!
//! So the kernels come from the same calls, plans and launches as on a GPU. What it is like, and how it is compiled for,
//! follows `runtime.rs` of the crate `cubecl-cuda`, which asks the driver; memory is handed out and never there.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex, PoisonError},
};

use burn::tensor::backend::{Backend as _, ExecutionError};
use burn_backend::DeviceOps;
use burn_cubecl::{CubeBackend, cubecl};
use cubecl::{
    CubeTask, Runtime,
    bytes::Bytes,
    client::ComputeClient,
    device::{Device, DeviceId, DeviceService, ServerUtilitiesHandle},
    features::{Plane, Tma, TypeUsage},
    future::DynFut,
    ir::{
        BarrierLevel, ContiguousElements, DeviceProperties, ElemType, FloatKind,
        HardwareProperties, MatrixLayout, MemoryDeviceProperties, MmaProperties, OpaqueType,
        SemanticType, StorageType, TargetProperties, VectorSize,
    },
    prelude::{CubeCount, ExecutionMode},
    profile::{ProfileDuration, TimingMethod},
    server::{
        Binding, ComputeServer, CopyDescriptor, IoError, KernelArguments, ProfileError,
        ProfilingToken, ServerCommunication, ServerError, ServerUtilities,
    },
    stream_id::StreamId,
    zspace::{Shape, Strides, striding::has_pitched_row_major_strides},
};
use cubecl_cpp::{
    DialectWmmaCompiler,
    cuda::{
        CudaDialect,
        arch::CudaArchitecture,
        mma::{CudaWmmaCompiler, contiguous_elements_cuda},
    },
    register_supported_types,
    shared::{
        CompilationOptions, CppCompiler, register_mma_features, register_scaled_mma_features,
        register_wmma_features,
    },
};
use cubecl_runtime::{
    allocator::PitchedMemoryLayoutPolicy,
    logging::ServerLogger,
    memory_management::{ManagedMemoryHandle, MemoryAllocationMode, MemoryUsage},
    storage::{ComputeStorage, ManagedResource, StorageHandle, StorageId},
    validation::{validate_cube_dim, validate_units},
};

/// CUDA's, and what it makes of products of matrices.
type Compiler = CppCompiler<Dialect>;
type Dialect = CudaDialect<Wmma>;
type Wmma = CudaWmmaCompiler;

/// Burn's backend on it.
pub(crate) type Backend = CubeBackend<Recorder, f32, i32, u8>;

/// A GPU of this compute capability, 80 for 8.0.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Gpu {
    pub(crate) capability: u16,
}

impl Gpu {
    /// The architecture that `cubecl-cuda` compiles for on it.
    pub(crate) fn architecture(&self) -> String {
        let specific = if self.capability >= 90 { "a" } else { "" };
        format!("sm_{}{specific}", self.capability)
    }

    /// The kernels of this library that were launched since the last call, or why one could not be generated.
    pub(crate) fn launched(&self) -> Result<Vec<Result<Kernel, String>>, ExecutionError> {
        Backend::sync(self)?;
        Ok(std::mem::take(&mut *lock()))
    }
}

/// A kernel as it would be compiled and launched.
pub(crate) struct Kernel {
    pub(crate) name: String,
    pub(crate) source: String,
    /// Threads of a block.
    pub(crate) threads: u32,
    /// Shared memory of a block, in bytes.
    pub(crate) shared: usize,
}

static LAUNCHED: Mutex<Vec<Result<Kernel, String>>> = Mutex::new(Vec::new());

fn lock() -> std::sync::MutexGuard<'static, Vec<Result<Kernel, String>>> {
    LAUNCHED.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Device for Gpu {
    fn from_id(id: DeviceId) -> Self {
        Self {
            capability: id.index_id,
        }
    }

    fn to_id(&self) -> DeviceId {
        DeviceId::new(0, self.capability)
    }
}

impl DeviceOps for Gpu {}

/// Blocks of a launch, at most.
const MAX_GRID: (u32, u32, u32) = (i32::MAX as u32, u16::MAX as u32, u16::MAX as u32);

/// A runtime like CUDA's.
#[derive(Debug, Clone)]
pub(crate) struct Recorder;

impl Runtime for Recorder {
    type Compiler = Compiler;
    type Server = Server;
    type Device = Gpu;

    fn client(device: &Gpu) -> ComputeClient<Self> {
        ComputeClient::load(device)
    }

    fn name(_: &ComputeClient<Self>) -> &'static str {
        "cuda"
    }

    fn require_array_lengths() -> bool {
        true
    }

    fn max_cube_count() -> (u32, u32, u32) {
        MAX_GRID
    }

    fn can_read_tensor(shape: &Shape, strides: &Strides) -> bool {
        has_pitched_row_major_strides(shape, strides)
    }

    fn target_properties() -> TargetProperties {
        TargetProperties {
            mma: MmaProperties {
                register_size_bits: 32,
                const_plane_size: 32,
                register_layout_a: MatrixLayout::RowMajor,
                register_layout_b: MatrixLayout::ColMajor,
                register_layout_acc: MatrixLayout::RowMajor,
                register_duplication_a: 1,
                register_duplication_b: 1,
                register_duplication_acc: 1,
                contiguous_elements: ContiguousElements::new(contiguous_elements_cuda),
            },
        }
    }

    fn enumerate_devices(_: u16, (): &()) -> Vec<DeviceId> {
        Vec::new()
    }
}

#[derive(Debug)]
pub(crate) struct Server {
    options: CompilationOptions,
    utilities: Arc<ServerUtilities<Self>>,
}

impl Server {
    fn compile(
        &self,
        kernel: &dyn CubeTask<Compiler>,
        mode: ExecutionMode,
    ) -> Result<Kernel, String> {
        let properties = &self.utilities.properties;
        validate_cube_dim(properties, &kernel.id()).map_err(|error| error.to_string())?;
        validate_units(properties, &kernel.id()).map_err(|error| error.to_string())?;
        let compiled = kernel
            .compile(
                &mut Compiler::default(),
                &self.options,
                mode,
                kernel.address_type(),
            )
            .map_err(|error| error.to_string())?;
        let shared = compiled.repr.map_or(0, |repr| repr.shared_memory_size());
        let most = properties.hardware.max_shared_memory_size;
        if shared > most {
            return Err(format!("{shared} bytes of shared memory; there are {most}"));
        }
        // Of `mtla_core::…::decode_kernel::DecodeKernel<…>`, the function.
        let path = kernel.name().split('<').next().unwrap_or_default();
        Ok(Kernel {
            name: path.rsplit("::").nth(1).unwrap_or(path).into(),
            source: compiled.source,
            threads: compiled.cube_dim.num_elems(),
            shared,
        })
    }
}

impl DeviceService for Server {
    fn init(id: DeviceId) -> Self {
        let (properties, options) = describe(id.index_id.into());
        let layout = PitchedMemoryLayoutPolicy::new(properties.memory.alignment as usize);
        let logger = Arc::new(ServerLogger::default());
        Self {
            options,
            utilities: Arc::new(ServerUtilities::new(properties, logger, (), layout)),
        }
    }

    fn utilities(&self) -> ServerUtilitiesHandle {
        self.utilities.clone()
    }
}

/// What `cubecl-cuda` finds out about a GPU of this compute capability, and how it compiles for it.
fn describe(capability: u32) -> (DeviceProperties, CompilationOptions) {
    // Of a block, for those who ask, and multiprocessors: an A100's and an H100's.
    let (shared, multiprocessors) = if capability < 90 {
        (163 << 10, 108)
    } else {
        (227 << 10, 132)
    };

    let hardware = HardwareProperties {
        load_width: 128,
        plane_size_min: 32,
        plane_size_max: 32,
        max_bindings: 1024,
        max_shared_memory_size: shared,
        max_cube_count: MAX_GRID,
        max_units_per_cube: 1024,
        max_cube_dim: (1024, 1024, 64),
        num_streaming_multiprocessors: Some(multiprocessors),
        num_tensor_cores: Some(4),
        min_tensor_cores_dim: Some(8),
        num_cpu_cores: None,
        max_vector_size: VectorSize::MAX,
    };
    let memory = MemoryDeviceProperties {
        max_page_size: 10 << 30,
        alignment: 512,
    };
    let mut device =
        DeviceProperties::new(Default::default(), memory, hardware, TimingMethod::System);
    register_supported_types(&mut device);
    device.register_type_usage(ElemType::Float(FloatKind::TF32), TypeUsage::Conversion);
    device.register_semantic_type(SemanticType::Pipeline);
    for level in [BarrierLevel::Unit, BarrierLevel::Cube] {
        device.register_type_usage(OpaqueType::Barrier(level), TypeUsage::Buffer);
    }
    device.features.plane |= Plane::Sync | Plane::Ops | Plane::NonUniformControlFlow;
    device.features.memory_reinterpret = true;
    device.features.alignment = true;
    device.features.copy_async = true;
    let halves =
        [FloatKind::F16, FloatKind::BF16].map(|kind| StorageType::from(ElemType::Float(kind)));
    device.features.matmul.ldmatrix.extend(halves);
    if capability >= 90 {
        device.features.tma.insert(Tma::Base);
        device.register_semantic_type(SemanticType::TensorMap);
        device.features.cube_cluster = true;
        device.features.matmul.stmatrix.extend(halves);
    }
    let architecture = CudaArchitecture {
        version: capability,
    };
    register_wmma_features(
        <Wmma as DialectWmmaCompiler<Dialect>>::supported_wmma_combinations(&architecture),
        &mut device,
    );
    register_mma_features(
        <Wmma as DialectWmmaCompiler<Dialect>>::supported_mma_combinations(&architecture),
        &mut device,
    );
    register_scaled_mma_features(
        <Wmma as DialectWmmaCompiler<Dialect>>::supported_scaled_mma_combinations(&architecture),
        &mut device,
    );

    let mut options = CompilationOptions::default();
    let features = &mut options.supports_features;
    features.fast_math = true;
    features.fast_tanh = true;
    features.grid_constants = true;
    features.clusters = capability >= 90;
    features.elect_sync = capability >= 90;
    (device, options)
}

/// What there is none of.
#[derive(Debug)]
pub(crate) enum NoMemory {}

impl ComputeStorage for NoMemory {
    type Resource = Self;

    fn alignment(&self) -> usize {
        match *self {}
    }

    fn get(&mut self, _: &StorageHandle) -> Self {
        match *self {}
    }

    fn alloc(&mut self, _: u64) -> Result<StorageHandle, IoError> {
        match *self {}
    }

    fn dealloc(&mut self, _: StorageId) {
        match *self {}
    }

    fn flush(&mut self) {
        match *self {}
    }
}

impl ServerCommunication for Server {
    const SERVER_COMM_ENABLED: bool = false;
}

impl ComputeServer for Server {
    type Kernel = Box<dyn CubeTask<Compiler>>;
    type Info = ();
    type MemoryLayoutPolicy = PitchedMemoryLayoutPolicy;
    type Storage = NoMemory;

    fn initialize_memory(&mut self, _: ManagedMemoryHandle, _: u64, _: StreamId) {}

    fn logger(&self) -> Arc<ServerLogger> {
        self.utilities.logger.clone()
    }

    fn utilities(&self) -> Arc<ServerUtilities<Self>> {
        self.utilities.clone()
    }

    fn read(
        &mut self,
        _: Vec<CopyDescriptor>,
        _: StreamId,
    ) -> DynFut<Result<Vec<Bytes>, ServerError>> {
        unreachable!("cases read no results")
    }

    fn write(&mut self, _: Vec<(CopyDescriptor, Bytes)>, _: StreamId) {}

    fn sync(&mut self, _: StreamId) -> DynFut<Result<(), ServerError>> {
        Box::pin(async { Ok(()) })
    }

    fn get_resource(
        &mut self,
        _: Binding,
        _: StreamId,
    ) -> Result<ManagedResource<NoMemory>, ServerError> {
        unreachable!("there is no memory to ask about")
    }

    unsafe fn launch(
        &mut self,
        kernel: Self::Kernel,
        _: CubeCount,
        _: KernelArguments,
        mode: ExecutionMode,
        _: StreamId,
    ) {
        // Not Burn's own.
        if !kernel.name().starts_with("mtla_core::") {
            return;
        }
        // Who called would not hear of a panic here.
        let compiled = catch_unwind(AssertUnwindSafe(|| self.compile(&*kernel, mode)))
            .unwrap_or_else(|_| Err("CubeCL panicked".into()));
        lock().push(compiled);
    }

    fn flush(&mut self, _: StreamId) -> Result<(), ServerError> {
        Ok(())
    }

    fn memory_usage(&mut self, _: StreamId) -> Result<MemoryUsage, ServerError> {
        unreachable!("there is no memory to ask about")
    }

    fn memory_cleanup(&mut self, _: StreamId) {}

    fn start_profile(&mut self, _: StreamId) -> Result<ProfilingToken, ServerError> {
        unreachable!("nothing runs that could be timed")
    }

    fn end_profile(
        &mut self,
        _: StreamId,
        _: ProfilingToken,
    ) -> Result<ProfileDuration, ProfileError> {
        unreachable!("nothing runs that could be timed")
    }

    fn allocation_mode(&mut self, _: MemoryAllocationMode, _: StreamId) {}
}
