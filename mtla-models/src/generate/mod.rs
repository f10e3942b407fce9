//! Generation: greedy search, sampling and beam search over batches of prompts.
//!
//! Prompts of any lengths go into one batch without padding between them and their continuations. They are
//! prefilled once; the samples and beams of a prompt share its part of the cache. Then every step takes one
//! token a row, and rows that are finished leave the batch and give their cache back.
//!
//! * [`generate`] continues prompts and gives what they became;
//! * [`Generation`] gives the tokens step by step, as an iterator or a [stream](Generation::into_stream);
//! * [`Engine`] takes [`Request`]s at any time, each with a configuration of its own. The others are made
//!   of it.
//!
//! What a row becomes does not depend on what else is in the batch: neither its logits (up to rounding) nor
//! the random numbers that it samples with, which are a [function](uniform) of the seed, of the prompt's and
//! the sample's number, and of the step.
//!
//! What a configuration means is what it means to Hugging Face's `transformers` (4.51.3), up to the random
//! numbers of sampling.
//!
//! Only the chosen tokens are read back from the device under plain greedy search, and only the logits
//! otherwise, once a step, and asynchronously: [`Engine::advance`] and [`Generation::advance`] work in a
//! browser. On a native target [`generate`] and the iterator that a [`Generation`] is do the waiting.
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
//! let sampling = greedy.with_temperature(0.8).with_top_p(0.95).with_num_return_sequences(3);
//! for events in Generation::new(&model, &prompts, &sampling).unwrap() {
//!     for event in events.unwrap() {
//!         println!("prompt {}, sample {}: {}", event.prompt, event.sample, event.token);
//!     }
//! }
//! # }
//! ```

mod config;
mod engine;
mod error;
mod events;
mod generation;
mod probability;
pub mod processors;
mod request;
mod search;
mod stream;
mod text;

use burn::tensor::{Int, Tensor, try_read_sync};
use mtla_core::{
    cache::{Cache, PrefillPlan, StepPlan},
    ops::AttentionBackend,
};

pub use config::{EarlyStopping, GenerationConfig};
pub use engine::{Engine, Observed};
pub use error::GenerationError;
pub use events::{Completion, Event, EventKind, FinishReason, RequestId, TokenEvent};
pub use generation::{Generation, complete, generate, generate_async};
pub use probability::{LogProbability, ScoredToken, most_probable};
pub use request::Request;
pub use search::uniform;
pub use stream::EventStream;
pub use text::{DecodeError, TextDecoder};

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

impl<B: AttentionBackend, M: LanguageModel<B>> LanguageModel<B> for &M {
    fn vocab_size(&self) -> usize {
        (**self).vocab_size()
    }

    fn device(&self) -> B::Device {
        (**self).device()
    }

    fn new_cache(&self) -> Cache<B> {
        (**self).new_cache()
    }

    fn prefill(
        &self,
        tokens: Tensor<B, 2, Int>,
        plan: &PrefillPlan<B>,
        cache: &mut Cache<B>,
    ) -> Tensor<B, 2> {
        (**self).prefill(tokens, plan, cache)
    }

    fn step(
        &self,
        tokens: Tensor<B, 1, Int>,
        plan: &StepPlan<B>,
        cache: &mut Cache<B>,
    ) -> Tensor<B, 2> {
        (**self).step(tokens, plan, cache)
    }
}

/// Waits for a result; on a target where that is impossible, only looks whether it is there.
fn wait<T>(result: impl Future<Output = Result<T, GenerationError>>) -> Result<T, GenerationError> {
    try_read_sync(result).unwrap_or(Err(GenerationError::OnlyAsync))
}
