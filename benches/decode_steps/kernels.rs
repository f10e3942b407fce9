//! How many kernels the device executes: counted where CubeCL hands them to it, from what its profiling logger says.

use std::{
    mem,
    sync::{Mutex, PoisonError},
    thread,
    time::Duration,
};

use burn::tensor::{Int, Tensor, backend::Backend};
use burn_cubecl::cubecl::config::{
    CubeClRuntimeConfig, RuntimeConfig, profiling::ProfilingLogLevel,
};
use burn_wgpu::WgpuDevice;
use log::{LevelFilter, Log, Metadata, Record};
use mtla_benches::variants;
use mtla_core::{
    attention::AttentionConfig,
    cache::Cache,
    ops::AttentionBackend,
    testing::backends::{Wgpu, WgpuBare},
};
use mtla_models::{
    decoder::{Decoder, DecoderConfig},
    generate::LanguageModel,
};

/// Layers of the decoders.
const LAYERS: usize = 4;

/// Steps before the one that is counted: fusion tries what it has not seen before.
const BEFORE: usize = 6;

/// What has been executed since somebody looked.
static EXECUTED: Mutex<Vec<String>> = Mutex::new(Vec::new());

fn executed() -> Vec<String> {
    mem::take(&mut EXECUTED.lock().unwrap_or_else(PoisonError::into_inner))
}

struct Listener;

impl Log for Listener {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        if let Some(name) = record.args().to_string().strip_prefix("Executing ") {
            let mut executed = EXECUTED.lock().unwrap_or_else(PoisonError::into_inner);
            executed.push(name.to_owned());
        }
    }

    fn flush(&self) {}
}

/// Has CubeCL say what it executes; before anything is executed.
fn listen() {
    let mut config = CubeClRuntimeConfig::default();
    config.profiling.logger.level = ProfilingLogLevel::Minimal;
    config.profiling.logger.log = Some(Default::default());
    CubeClRuntimeConfig::set(config);
    log::set_logger(&Listener).expect("there is no logger yet");
    log::set_max_level(LevelFilter::Info);
}

/// The kernels that `run` executes, by their names, in order.
fn kernels<B: Backend<Device = WgpuDevice>>(
    device: &WgpuDevice,
    run: impl FnOnce(),
) -> Vec<String> {
    mark::<B>(device);
    run();
    let mut names = mark::<B>(device);
    names.pop();
    names
}

/// Everything up to here, whose last kernel is one that no step has: the logger has a thread of its own, and keeps the
/// order.
fn mark<B: Backend<Device = WgpuDevice>>(device: &WgpuDevice) -> Vec<String> {
    B::sync(device).expect("a device that goes on");
    let mut names = Vec::new();
    drop(Tensor::<WgpuBare, 1>::ones([2], device).flip([0]));
    WgpuBare::sync(device).expect("a device that goes on");
    while !names
        .last()
        .is_some_and(|name: &String| name.contains("Flip"))
    {
        names.extend(executed());
        thread::sleep(Duration::from_millis(1));
    }
    names
}

/// Prints a line of JSON for each variant: kernels of a step of one attention layer, and of a token of a whole decoder, bare
/// and under fusion.
pub(crate) fn count(tokens: &[usize], rows: &[usize]) {
    listen();
    let device = WgpuDevice::default();
    for (name, config) in variants() {
        for &tokens in tokens {
            for &rows in rows {
                let [layer, token] = of_variant::<WgpuBare>(&config, tokens, rows, &device);
                let [fused_layer, fused_token] = of_variant::<Wgpu>(&config, tokens, rows, &device);
                println!(
                    "{{\"variant\": \"{name}\", \"tokens\": {tokens}, \"rows\": {rows}, \"layer\": {layer}, \
                     \"layer_fused\": {fused_layer}, \"layers\": {LAYERS}, \"token\": {token}, \
                     \"token_fused\": {fused_token}}}"
                );
            }
        }
    }
}

/// Kernels of a layer's step and of a decoder's, in rows that hold as many tokens.
fn of_variant<B: AttentionBackend<Device = WgpuDevice>>(
    config: &AttentionConfig,
    tokens: usize,
    rows: usize,
    device: &WgpuDevice,
) -> [usize; 2] {
    let attention = config.init::<B>(device).expect("a sound configuration");
    let mut cache = Cache::new(attention.cache_spec(), 1, device);
    let layer = steady::<B>(&mut cache, tokens, rows, device, |cache, numbers| {
        let x = Tensor::<B, 2>::zeros([rows, config.d_model()], device);
        let plan = cache.step(numbers);
        kernels::<B>(device, || {
            let y = attention.step(x, &plan, cache.layer_mut(0));
            B::sync(device).expect("a device that goes on");
            drop(y);
        })
    });
    let decoder = DecoderConfig::new(64, LAYERS, config.clone());
    let decoder: Decoder<B> = decoder.init(device).expect("a sound configuration");
    let mut cache = decoder.new_cache();
    let token = steady::<B>(&mut cache, tokens, rows, device, |cache, numbers| {
        let ids = Tensor::<B, 1, Int>::zeros([rows], device);
        let plan = cache.step(numbers);
        kernels::<B>(device, || {
            let y = decoder.step(ids, &plan, cache);
            B::sync(device).expect("a device that goes on");
            drop(y);
        })
    });
    [layer, token]
}

/// Kernels of the last of a few steps, in a cache whose rows hold as many tokens then.
fn steady<B: AttentionBackend<Device = WgpuDevice>>(
    cache: &mut Cache<B>,
    tokens: usize,
    rows: usize,
    device: &WgpuDevice,
    mut step: impl FnMut(&mut Cache<B>, &[usize]) -> Vec<String>,
) -> usize {
    let numbers: Vec<usize> = cache.join(rows).collect();
    // What the slots hold does not matter.
    cache.extend(&numbers, &vec![tokens.saturating_sub(BEFORE); rows]);
    let mut last = Vec::new();
    for _ in 0..BEFORE {
        last = step(cache, &numbers);
    }
    B::sync(device).expect("a device that goes on");
    last.len()
}
