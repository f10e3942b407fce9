//! Why nothing can be generated.

use burn::tensor::backend::ExecutionError;

use super::text::DecodeError;
use crate::error::ConfigError;

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
    /// The configuration names a token that the model does not know.
    #[error(
        "token {token} of {field} never comes: the model knows the tokens 0 to {last} only; use the tokenizer that it was trained with"
    )]
    UnknownStopToken {
        /// The field of the configuration.
        field: &'static str,
        /// The token.
        token: u32,
        /// The model's last token id.
        last: usize,
    },
    /// The prompt leaves no room for a new token.
    #[error(
        "prompt {prompt} has {tokens} tokens and max_length is {max_length}: raise it, or set max_new_tokens, which does not count the prompt"
    )]
    PromptTooLong {
        /// Number of the prompt, from 0.
        prompt: usize,
        /// Tokens of the prompt.
        tokens: usize,
        /// Tokens allowed, those of the prompt included.
        max_length: usize,
    },
    /// Stop strings, but nothing that makes text of tokens.
    #[error(
        "stop_strings need text: give the request what makes text of tokens with `Request::with_text`"
    )]
    NoDecoder,
    /// More rows than the engine takes.
    #[error(
        "a request with {rows} beams or samples does not fit into an engine of {max_rows} rows: ask for fewer, or raise `Engine::with_max_rows`"
    )]
    TooManyRows {
        /// Rows that the request needs.
        rows: usize,
        /// Rows that the engine takes.
        max_rows: usize,
    },
    /// The tokens are no text.
    #[error("the generated tokens are no text")]
    Decode(#[source] DecodeError),
    /// The model's logits are no distribution.
    #[error(
        "the logits after {step} tokens of prompt {prompt}, sample {sample} are NaN or infinite: the weights are damaged, or the element type is too narrow for them"
    )]
    NotFinite {
        /// Number of the prompt, from 0.
        prompt: usize,
        /// Number of the sample or beam, from 0.
        sample: usize,
        /// Tokens generated so far.
        step: usize,
    },
    /// Everything is forbidden.
    #[error(
        "after {step} tokens of prompt {prompt}, sample {sample} every token is forbidden: allow repetitions or a shorter length, or forbid fewer words"
    )]
    NothingLeft {
        /// Number of the prompt, from 0.
        prompt: usize,
        /// Number of the sample or beam, from 0.
        sample: usize,
        /// Tokens generated so far.
        step: usize,
    },
    /// The device failed.
    #[error("the device failed while generating")]
    Device(#[source] ExecutionError),
    /// The device does not answer without an event loop.
    #[error(
        "this device answers only asynchronously: use `generate_async`, `Generation::advance` or `Engine::advance`"
    )]
    OnlyAsync,
}
