//! Generation: greedy search and sampling over batches of prompts.
//!
//! Prompts of any lengths go into one batch without padding between them and their continuations. They are
//! prefilled once; the samples of a prompt share its part of the cache. Then every step takes one token a
//! row, and rows that are finished leave the batch and give their cache back.
//!
//! What a row becomes does not depend on what else is in the batch: neither its logits (up to rounding) nor
//! the random numbers that it samples with, which are a function of the seed, of the prompt's and the
//! sample's number, and of the step.
//!
//! Only the chosen tokens are read back from the device under greedy search, and only the logits under
//! sampling, once a step, and asynchronously: [`Generation::advance`] works in a browser. On a native
//! target [`generate`] and the iterator that a [`Generation`] is do the waiting.
//!
//! ```
//! # #[cfg(feature = "flex")] {
//! use burn_flex::Flex;
//! use mtla_core::attention::AttentionConfig;
//! use mtla_models::{decoder::DecoderConfig, generate::{Generation, GenerationConfig, generate}};
//!
//! let config = DecoderConfig::new(100, 2, AttentionConfig::mtla(32, 4));
//! let model = config.init::<Flex>(&Default::default()).unwrap();
//! let prompts = [vec![5, 6, 7], vec![8]];
//!
//! // All at once:
//! let greedy = GenerationConfig::new(4);
//! let completions = generate(&model, &prompts, &greedy).unwrap();
//! assert_eq!(completions.len(), 2);
//! assert_eq!(completions[1].tokens.len(), 4);
//!
//! // Token by token, three samples a prompt:
//! let sampling = greedy.with_temperature(0.8).with_top_p(0.95).with_num_samples(3);
//! for events in Generation::new(&model, &prompts, &sampling).unwrap() {
//!     for event in events.unwrap() {
//!         println!("prompt {}, sample {}: {}", event.prompt, event.sample, event.token);
//!     }
//! }
//! # }
//! ```

mod config;
mod generation;
mod sampling;

use burn::tensor::{Int, Tensor, backend::ExecutionError, try_read_sync};
use mtla_core::{
    cache::{Cache, PrefillPlan, StepPlan},
    ops::AttentionBackend,
};

use crate::error::ConfigError;
pub use config::GenerationConfig;
pub use generation::{FinishReason, Generation, TokenEvent};
pub use sampling::{Candidate, SamplingStrategy, uniform};

/// A model that continues token sequences over a cache.
pub trait LanguageModel<B: AttentionBackend> {
    /// Number of token ids.
    fn vocab_size(&self) -> usize;

    /// Where the model is.
    fn device(&self) -> B::Device;

    /// An empty cache for this model.
    fn new_cache(&self) -> Cache<B>;

    /// Takes several tokens a row, `[rows, longest]` with rows padded at their end, into the cache that the
    /// plan is of, and returns the logits after each row's last one, `[rows, vocab_size]`.
    ///
    /// # Panics
    /// If the tokens or the cache do not fit the plan.
    fn prefill(
        &self,
        tokens: Tensor<B, 2, Int>,
        plan: &PrefillPlan<B>,
        cache: &mut Cache<B>,
    ) -> Tensor<B, 2>;

    /// Takes one token a row, `[rows]`, into the cache that the plan is of, and returns the logits after
    /// it, `[rows, vocab_size]`.
    ///
    /// # Panics
    /// If the tokens or the cache do not fit the plan.
    fn step(
        &self,
        tokens: Tensor<B, 1, Int>,
        plan: &StepPlan<B>,
        cache: &mut Cache<B>,
    ) -> Tensor<B, 2>;
}

/// Why nothing can be generated.
#[derive(Debug, thiserror::Error)]
pub enum GenerationError {
    /// The configuration cannot work.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A prompt without tokens.
    #[error(
        "prompt {prompt} is empty: give at least one token, for instance the begin-of-text token"
    )]
    EmptyPrompt {
        /// Number of the prompt, from 0.
        prompt: usize,
    },
    /// A prompt holds a token that the model does not know.
    #[error(
        "prompt {prompt} has token {token} at place {place}, but the model knows the tokens 0 to {last} only: use the tokenizer that it was trained with"
    )]
    UnknownToken {
        /// Number of the prompt, from 0.
        prompt: usize,
        /// Place in the prompt, from 0.
        place: usize,
        /// The token.
        token: u32,
        /// The model's last token id.
        last: usize,
    },
    /// A stop token that the model does not know.
    #[error(
        "stop token {token} never comes: the model knows the tokens 0 to {last} only; use the tokenizer that it was trained with"
    )]
    UnknownStopToken {
        /// The token.
        token: u32,
        /// The model's last token id.
        last: usize,
    },
    /// The model's logits are no distribution.
    #[error(
        "the logits after {step} tokens of prompt {prompt}, sample {sample} are NaN or infinite: the weights are damaged, or the element type is too narrow for them"
    )]
    NotFinite {
        /// Number of the prompt, from 0.
        prompt: usize,
        /// Number of the sample, from 0.
        sample: usize,
        /// Tokens generated so far.
        step: usize,
    },
    /// The device failed.
    #[error("the device failed while generating")]
    Device(#[source] ExecutionError),
    /// The device does not answer without an event loop.
    #[error(
        "this device answers only asynchronously: use `generate_async` or `Generation::advance`"
    )]
    OnlyAsync,
}

/// A generated continuation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Completion {
    /// Number of the prompt, from 0.
    pub prompt: usize,
    /// Number of the sample, from 0.
    pub sample: usize,
    /// The new tokens; a stop token is the last one.
    pub tokens: Vec<u32>,
    /// Why it ends.
    pub finish: FinishReason,
}

/// Continues every prompt [`num_samples`](GenerationConfig::num_samples) times; the completions come by
/// prompt, then by sample.
///
/// # Errors
/// [`GenerationError`] if the configuration or a prompt cannot work, or the device fails.
pub async fn generate_async<B: AttentionBackend, M: LanguageModel<B>>(
    model: &M,
    prompts: &[impl AsRef<[u32]>],
    config: &GenerationConfig,
) -> Result<Vec<Completion>, GenerationError> {
    let mut generation = Generation::new(model, prompts, config)?;
    let mut completions: Vec<Completion> = (0..prompts.len() * config.num_samples)
        .map(|i| Completion {
            prompt: i / config.num_samples,
            sample: i % config.num_samples,
            tokens: Vec::new(),
            finish: FinishReason::Length,
        })
        .collect();
    while !generation.is_done() {
        for event in generation.advance().await? {
            let completion = &mut completions[event.prompt * config.num_samples + event.sample];
            completion.tokens.push(event.token);
            completion.finish = event.finish.unwrap_or(completion.finish);
        }
    }
    Ok(completions)
}

/// As [`generate_async`], and waits for the result.
///
/// # Errors
/// As [`generate_async`], and [`GenerationError::OnlyAsync`] for a GPU in a browser.
pub fn generate<B: AttentionBackend, M: LanguageModel<B>>(
    model: &M,
    prompts: &[impl AsRef<[u32]>],
    config: &GenerationConfig,
) -> Result<Vec<Completion>, GenerationError> {
    wait(generate_async(model, prompts, config))
}

/// Waits for a result; on a target where that is impossible, only looks whether it is there.
fn wait<T>(result: impl Future<Output = Result<T, GenerationError>>) -> Result<T, GenerationError> {
    try_read_sync(result).unwrap_or(Err(GenerationError::OnlyAsync))
}
