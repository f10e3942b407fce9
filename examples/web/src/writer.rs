//! The model at work: from a prompt to text, one token at a time, with what there is to see on the way.

use burn::{module::Module, tensor::TensorData};
use mtla_core::{
    attention::AttentionConfig,
    ops::{AttentionBackend, LaunchKind, launches},
};
use mtla_models::{
    decoder::{Decoder, DecoderConfig, StoreError},
    generate::{
        Engine, EventKind, FinishReason, GenerationConfig, GenerationError, Request, TokenEvent,
    },
    tokenizer::{Tokenizer, TokenizerError},
};
use serde::{Deserialize, Serialize};

use crate::memory::{Share, alternatives};

/// The token that ends a text; the tokenizer begins every prompt with it.
const END_OF_TEXT: &str = "<|endoftext|>";

/// The longest prompt and text together, in tokens: far more than the models were trained on.
const LONGEST: usize = 2048;

/// Why there is no text.
#[derive(Debug, thiserror::Error)]
pub enum WriterError {
    /// The description of the model.
    #[error("the model's configuration cannot be understood: {0}")]
    Config(#[from] serde_json::Error),
    /// Its weights.
    #[error(transparent)]
    Weights(#[from] StoreError),
    /// Its tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// A tokenizer without an end of text.
    #[error("the tokenizer has no {END_OF_TEXT}")]
    NoEnd,
    /// What was asked for, or the device.
    #[error(transparent)]
    Generation(#[from] GenerationError),
    /// A prompt that is too long.
    #[error("the prompt has {tokens} tokens; at most {most} leave room for {room} more")]
    TooLong {
        /// Its tokens.
        tokens: usize,
        /// The most that there may be.
        most: usize,
        /// The tokens asked for.
        room: usize,
    },
}

/// The files of a model.
#[derive(Debug, Clone)]
pub struct Files {
    /// `decoder.json`.
    pub config: Vec<u8>,
    /// `model.safetensors`.
    pub weights: Vec<u8>,
    /// `tokenizer.json`.
    pub tokenizer: Vec<u8>,
}

/// What kind of model it is.
#[derive(Debug, Clone, Serialize)]
pub struct Description {
    /// The kind of attention.
    pub attention: &'static str,
    /// Its numbers.
    pub parameters: usize,
    /// Its layers.
    pub layers: usize,
    /// Query heads of a layer.
    pub heads: usize,
    /// Tokens that share a slot.
    pub down_rate: usize,
    /// Bytes of cache that a token takes, all layers together.
    pub bytes_per_token: f64,
    /// What others would take.
    pub alternatives: Vec<Share>,
}

/// How it is to write.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Options {
    /// Tokens to write, at most.
    pub max_new_tokens: usize,
    /// Temperature; 0 for the most probable tokens.
    pub temperature: f64,
    /// The probability that the tokens drawn from have together.
    pub top_p: f64,
    /// Seed of the draws.
    pub seed: u64,
    /// Whether to say what the layers do.
    pub observe: bool,
}

/// What a step gave.
#[derive(Debug, Clone, Serialize)]
pub struct Step {
    /// The pieces of text of the tokens that were taken in: the prompt's first, and then the newest one's.
    pub taken: Vec<String>,
    /// The token that was chosen.
    pub token: u32,
    /// The text that it adds; empty where a character is not complete.
    pub text: String,
    /// Tokens in the cache.
    pub length: usize,
    /// Bytes of cache in use.
    pub cache_bytes: usize,
    /// Launches of the decoding operation on the GPU.
    pub launches: u64,
    /// Why it was the last, if it was: `stop` or `length`.
    pub finish: Option<&'static str>,
    /// What each layer did, if that was asked for.
    pub layers: Vec<Layer>,
}

/// What a layer did.
#[derive(Debug, Clone, Serialize)]
pub struct Layer {
    /// The gates of the tokens that were taken in; none where nothing is gated.
    pub gates: Vec<f32>,
    /// How strongly each head looked at each slot; none after a prompt.
    pub weights: Vec<Vec<f32>>,
}

/// A model that writes.
#[derive(Debug)]
pub struct Writer<B: AttentionBackend> {
    engine: Engine<B, Decoder<B>>,
    tokenizer: Tokenizer,
    end: u32,
    description: Description,
    length: usize,
    /// What the next step takes in.
    next: Vec<u32>,
    written: Vec<u32>,
    shown: usize,
}

impl<B: AttentionBackend> Writer<B> {
    /// Reads a model.
    ///
    /// # Errors
    /// [`WriterError`] says which of the files is not as it should be.
    pub fn new(files: Files, device: &B::Device) -> Result<Self, WriterError> {
        let config: DecoderConfig = serde_json::from_slice(&files.config)?;
        let tokenizer = Tokenizer::from_json(&files.tokenizer)?;
        tokenizer.fits(config.vocab_size)?;
        let end = tokenizer.id(END_OF_TEXT).ok_or(WriterError::NoEnd)?;
        let model = config.load_safetensors::<B>(files.weights, device)?;
        let description = Description {
            attention: match &config.attention {
                AttentionConfig::Mha(_) => "MHA",
                AttentionConfig::Mqa(_) => "MQA",
                AttentionConfig::Gqa { .. } => "GQA",
                AttentionConfig::Mla(_) => "MLA",
                AttentionConfig::Mtla { .. } => "MTLA",
            },
            parameters: model.num_params(),
            layers: config.n_layers,
            heads: config.attention.n_heads(),
            down_rate: config.attention.down_rate(),
            bytes_per_token: model.cache_bytes_per_token(),
            alternatives: alternatives(&config, model.embedding.weight.dtype().size())
                .map_err(StoreError::Config)?,
        };
        Ok(Self {
            engine: Engine::new(model),
            tokenizer,
            end,
            description,
            length: 0,
            next: Vec::new(),
            written: Vec::new(),
            shown: 0,
        })
    }

    /// What kind of model it is.
    pub fn description(&self) -> &Description {
        &self.description
    }

    /// Begins a text that goes on from `prompt`, and drops what was under way.
    ///
    /// # Errors
    /// [`WriterError`] if the options cannot be, or the prompt is too long.
    pub fn start(&mut self, prompt: &str, options: &Options) -> Result<(), WriterError> {
        self.engine.clear();
        let tokens = self.tokenizer.encode(prompt)?;
        let most = LONGEST.saturating_sub(options.max_new_tokens);
        if tokens.len() > most {
            return Err(WriterError::TooLong {
                tokens: tokens.len(),
                most,
                room: options.max_new_tokens,
            });
        }
        let config = GenerationConfig::new(options.max_new_tokens)
            .with_temperature(options.temperature)
            .with_top_p(options.top_p)
            .with_seed(options.seed)
            .with_stop_tokens([self.end]);
        let layers: Vec<usize> = (0..self.description.layers).collect();
        self.engine
            .observe(if options.observe { &layers } else { &[] });
        self.engine.submit(Request::new(tokens.clone(), config))?;
        (self.length, self.shown) = (0, 0);
        self.next = tokens;
        self.written.clear();
        Ok(())
    }

    /// Writes one token; nothing if the text is over.
    ///
    /// # Errors
    /// [`WriterError`] if the device fails, or the logits are no distribution.
    pub async fn advance(&mut self) -> Result<Option<Step>, WriterError> {
        let before = decode_launches();
        let events = self.engine.advance().await?;
        let cache_bytes = self.engine.live_bytes();
        for event in events {
            match event.kind {
                EventKind::Token(token) => {
                    let mut step = self.step(&token)?;
                    step.launches = decode_launches() - before;
                    // With the last token the cache is given back.
                    step.cache_bytes = cache_bytes.max(step.cache_bytes);
                    return Ok(Some(step));
                }
                EventKind::Failed(error) => return Err(error.into()),
                EventKind::Finished(_) => {}
            }
        }
        Ok(None)
    }

    /// Ends the text that is under way.
    pub fn stop(&mut self) {
        self.engine.clear();
    }

    fn step(&mut self, event: &TokenEvent) -> Result<Step, WriterError> {
        let taken = std::mem::replace(&mut self.next, vec![event.token]);
        self.length += taken.len();
        if event.token != self.end {
            self.written.push(event.token);
        }
        let text = self.tokenizer.decode(&self.written)?;
        // A character may still be waiting for its last bytes.
        let ready = text.trim_end_matches('\u{fffd}').len();
        let new = text.get(self.shown..ready).unwrap_or_default().to_owned();
        self.shown = self.shown.max(ready);
        let slots = self.length.div_ceil(self.description.down_rate);
        let slot = self.description.bytes_per_token * self.description.down_rate as f64;
        Ok(Step {
            taken: self.pieces(&taken)?,
            token: event.token,
            text: new,
            length: self.length,
            cache_bytes: (slots as f64 * slot) as usize,
            launches: 0,
            finish: event.finish.map(|reason| match reason {
                FinishReason::Length => "length",
                FinishReason::Stop | FinishReason::StopString => "stop",
            }),
            layers: self.layers(),
        })
    }

    fn pieces(&self, tokens: &[u32]) -> Result<Vec<String>, WriterError> {
        let piece = |token: &u32| Ok(self.tokenizer.decode_with_special(&[*token])?);
        tokens.iter().map(piece).collect()
    }

    fn layers(&self) -> Vec<Layer> {
        let numbers = |data: &TensorData| data.iter::<f32>().collect::<Vec<_>>();
        let layer = |observed: &mtla_models::generate::Observed| Layer {
            gates: observed.gates.as_ref().map_or_else(Vec::new, numbers),
            weights: observed.weights.as_ref().map_or_else(Vec::new, |data| {
                let slots = data.shape[2];
                numbers(data).chunks(slots).map(<[f32]>::to_vec).collect()
            }),
        };
        self.engine.observed().iter().map(layer).collect()
    }
}

/// Launches of the decoding operation on a GPU, up to now.
pub(crate) fn decode_launches() -> u64 {
    launches(LaunchKind::CubeDecode) + launches(LaunchKind::CubeDecodeCombine)
}
