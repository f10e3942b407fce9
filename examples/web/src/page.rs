//! What the page's worker calls.

use std::pin::Pin;

use burn_cubecl::CubeBackend;
use burn_flex::Flex;
use burn_wgpu::{RuntimeOptions, WgpuDevice, WgpuRuntime, graphics::WebGpu, init_setup_async};
use mtla_core::ops::AttentionBackend;
use sha2::{Digest, Sha256};
use wasm_bindgen::prelude::*;

use crate::check::check;
use crate::writer::{Description, Files, Options, Step, Writer, WriterError};

/// Without fusion: what is fused would be kernels of its own for every shape, which are compiled at every visit.
type Gpu = CubeBackend<WgpuRuntime, f32, i32, u32>;

/// Prints panics where a page's author looks for them.
#[wasm_bindgen(start)]
fn start() {
    console_error_panic_hook::set_once();
}

/// The SHA-256 of bytes, in hexadecimal digits. (A page's own is there only on pages that came encrypted.)
#[wasm_bindgen]
pub fn sha256(bytes: &[u8]) -> String {
    format!("{:x}", Sha256::digest(bytes))
}

/// Gets the GPU ready. Once, and only where the page has found an adapter.
#[wasm_bindgen]
pub async fn use_gpu() {
    let device = WgpuDevice::default();
    init_setup_async::<WebGpu>(&device, RuntimeOptions::default()).await;
}

type Advanced<'a> = Pin<Box<dyn Future<Output = Result<Option<Step>, WriterError>> + 'a>>;

/// A writer on a backend of which the page need not know.
trait AnyWriter {
    fn description(&self) -> &Description;
    fn start(&mut self, prompt: &str, options: &Options) -> Result<(), WriterError>;
    fn advance(&mut self) -> Advanced<'_>;
    fn stop(&mut self);
}

impl<B: AttentionBackend> AnyWriter for Writer<B> {
    fn description(&self) -> &Description {
        self.description()
    }

    fn start(&mut self, prompt: &str, options: &Options) -> Result<(), WriterError> {
        self.start(prompt, options)
    }

    fn advance(&mut self) -> Advanced<'_> {
        Box::pin(self.advance())
    }

    fn stop(&mut self) {
        self.stop();
    }
}

/// A model in the page.
#[wasm_bindgen]
pub struct PageModel(Box<dyn AnyWriter>);

#[wasm_bindgen]
impl PageModel {
    /// Reads a model; on the GPU after [`use_gpu`].
    ///
    /// # Errors
    /// As [`Writer::new`].
    #[wasm_bindgen(constructor)]
    pub fn new(
        gpu: bool,
        config: Vec<u8>,
        weights: Vec<u8>,
        tokenizer: Vec<u8>,
    ) -> Result<Self, JsError> {
        let files = Files {
            config,
            weights,
            tokenizer,
        };
        Ok(Self(if gpu {
            Box::new(Writer::<Gpu>::new(files, &WgpuDevice::default())?)
        } else {
            Box::new(Writer::<Flex>::new(files, &Default::default())?)
        }))
    }

    /// What kind of model it is, as JSON of a [`Description`].
    ///
    /// # Errors
    /// None that is known of: its numbers are finite.
    pub fn description(&self) -> Result<String, JsError> {
        json(self.0.description())
    }

    /// Begins a text; `options` is the JSON of [`Options`].
    ///
    /// # Errors
    /// As [`Writer::start`], and if the options cannot be understood.
    pub fn start(&mut self, prompt: &str, options: &str) -> Result<(), JsError> {
        let options: Options = serde_json::from_str(options)?;
        Ok(self.0.start(prompt, &options)?)
    }

    /// Writes one token: the JSON of a [`Step`], or `null` if the text is over.
    ///
    /// # Errors
    /// As [`Writer::advance`].
    pub async fn advance(&mut self) -> Result<String, JsError> {
        json(&self.0.advance().await?)
    }

    /// Ends the text that is under way.
    pub fn stop(&mut self) {
        self.0.stop();
    }
}

/// Compares the GPU, which has to be in use, with the CPU: the JSON of a list of [`Checked`](crate::check::Checked).
///
/// # Errors
/// As [`check`].
#[wasm_bindgen]
pub async fn check_kernel(seed: u32) -> Result<String, JsError> {
    json(&check::<Gpu>(seed.into(), &WgpuDevice::default()).await?)
}

fn json(value: &impl serde::Serialize) -> Result<String, JsError> {
    Ok(serde_json::to_string(value)?)
}
