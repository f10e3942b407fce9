//! What loading allocates. A binary of its own, because it counts the allocations of the whole process.

#![cfg(all(feature = "files", feature = "flex"))]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use burn::{module::Module, tensor::DType};
use burn_flex::{Flex, FlexDevice};
use mtla_models::llama::{LatentSizes, Llama, LlamaConfig, LoadOptions};

struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is the system's allocator, beside which two numbers are kept.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        PEAK.fetch_max(
            NOW.fetch_add(layout.size(), Relaxed) + layout.size(),
            Relaxed,
        );
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// What is allocated is counted for the whole process: one test at a time.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// A header that is nonsense takes no more memory than a few times the file, whatever it says.
#[test]
fn hostile_headers_take_little() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let config = LlamaConfig {
        vocab_size: 10,
        hidden_size: 8,
        intermediate_size: 8,
        num_hidden_layers: 1,
        num_attention_heads: 2,
        ..LlamaConfig::default()
    };
    let llama = Llama::<Flex>::new(config, &FlexDevice).unwrap();
    llama.save_pretrained(folder.path()).unwrap();
    let entry = |name: String, shape: &str| {
        format!("\"{name}\": {{\"dtype\": \"F32\", \"shape\": {shape}, \"data_offsets\": [0, 0]}}")
    };
    let many: Vec<String> = (0..50_000).map(|i| entry(format!("t{i}"), "[0]")).collect();
    let huge = entry("a".into(), "[1099511627776, 1048576]");
    let headers = [
        (u64::MAX, String::new()),
        (1 << 40, "{".repeat(1000)),
        (0, format!("{{{huge}}}")),
        (0, "[".repeat(1_000_000)),
        (0, format!("{{{}}}", many.join(","))),
    ];
    for (length, header) in headers {
        let length = if length == 0 {
            header.len() as u64
        } else {
            length
        };
        let bytes = [&length.to_le_bytes()[..], header.as_bytes()].concat();
        std::fs::write(folder.path().join("model.safetensors"), &bytes).unwrap();
        let load = || Llama::<Flex>::from_pretrained(folder.path(), &FlexDevice).map(drop);
        let (refused, allocated) = peak(load);
        assert!(refused.is_err());
        let allowed = 1_000_000 + 16 * bytes.len();
        println!("{allocated} bytes for a file of {}", bytes.len());
        assert!(
            allocated < allowed,
            "{allocated} bytes, {allowed} are allowed"
        );
    }
}

/// The most that was allocated at once during a call, beyond what was there before.
fn peak<T>(work: impl FnOnce() -> T) -> (T, usize) {
    let before = NOW.load(Relaxed);
    PEAK.store(before, Relaxed);
    let value = work();
    (value, PEAK.load(Relaxed) - before)
}

#[test]
fn loading_takes_little_more_than_the_weights() {
    let _alone = alone();
    let device = FlexDevice;
    let config = LlamaConfig {
        vocab_size: 3000,
        hidden_size: 256,
        intermediate_size: 512,
        num_hidden_layers: 4,
        num_attention_heads: 4,
        ..LlamaConfig::default()
    };
    let mtla = config.with_mtla(LatentSizes::for_head(32), 2).unwrap();
    for config in [config, mtla] {
        let folder = tempfile::tempdir().unwrap();
        let llama = Llama::<Flex>::new(config, &device).unwrap();
        let numbers = llama.decoder.num_params();
        llama.save_pretrained(folder.path()).unwrap();
        drop(llama);
        for (dtype, size) in [(DType::F32, 4), (DType::BF16, 2)] {
            let options = LoadOptions {
                dtype: Some(dtype),
                ..LoadOptions::default()
            };
            let load = || Llama::<Flex>::from_pretrained_with(folder.path(), &options, &device);
            let (llama, allocated) = peak(load);
            let weights = numbers * size;
            let share = allocated as f64 / weights as f64;
            println!("{dtype:?}: {allocated} bytes for {weights} bytes of weights, {share:.3}");
            assert!(share < 1.2, "{share} times the weights");
            drop(llama);
        }
        // A configuration that asks for more than the file has is refused before anything is allocated for it.
        let path = folder.path().join("config.json");
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(
            &path,
            text.replace("\"vocab_size\": 3000", "\"vocab_size\": 16000000"),
        )
        .unwrap();
        let load = || Llama::<Flex>::from_pretrained(folder.path(), &device).map(drop);
        let (refused, allocated) = peak(load);
        assert!(refused.is_err());
        assert!(allocated < 1_000_000, "{allocated} bytes");
    }
}
