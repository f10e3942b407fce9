//! What is asked of an engine.

use std::{fmt, sync::Arc};

use super::{GenerationConfig, GenerationError, processors::LogitsProcessor, text::TextDecoder};

/// A prompt to be continued, with a configuration of its own.
///
/// ```
/// use mtla_models::generate::{GenerationConfig, Request};
///
/// // Token 97 is "a", and so on.
/// let text = |tokens: &[u32]| Ok(tokens.iter().map(|t| char::from(*t as u8)).collect());
/// let config = GenerationConfig::new(50).with_stop_strings(["\n\n"]);
/// let request = Request::new([97, 98], config).with_text(text);
/// ```
#[derive(Clone)]
pub struct Request {
    pub(super) prompt: Vec<u32>,
    pub(super) config: GenerationConfig,
    pub(super) number: usize,
    pub(super) decoder: Option<Arc<dyn TextDecoder>>,
    pub(super) processors: Vec<Arc<dyn LogitsProcessor>>,
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Request")
            .field("prompt", &self.prompt)
            .field("config", &self.config)
            .field("number", &self.number)
            .field("processors", &self.processors)
            .finish_non_exhaustive()
    }
}

impl Request {
    /// Continues `prompt`.
    pub fn new(prompt: impl Into<Vec<u32>>, config: GenerationConfig) -> Self {
        Self {
            prompt: prompt.into(),
            config,
            number: 0,
            decoder: None,
            processors: Vec::new(),
        }
    }

    /// Sets the number of the prompt, 0 by default, which its samples depend on and its events carry.
    #[must_use]
    pub fn with_number(mut self, number: usize) -> Self {
        self.number = number;
        self
    }

    /// Sets how tokens become text, which [stop strings](GenerationConfig::stop_strings) need.
    #[must_use]
    pub fn with_text(mut self, decoder: impl TextDecoder + 'static) -> Self {
        self.decoder = Some(Arc::new(decoder));
        self
    }

    /// Adds a processor of one's own.
    #[must_use]
    pub fn with_processor(mut self, processor: impl LogitsProcessor + 'static) -> Self {
        self.processors.push(Arc::new(processor));
        self
    }

    /// Checks all that does not depend on what else is running.
    pub(super) fn check(&self, vocab_size: usize) -> Result<(), GenerationError> {
        self.config.validate()?;
        self.check_prompt(vocab_size)?;
        self.check_tokens(vocab_size)?;
        if !self.config.stop_strings.is_empty() && self.decoder.is_none() {
            return Err(GenerationError::NoDecoder);
        }
        Ok(())
    }

    fn check_prompt(&self, vocab_size: usize) -> Result<(), GenerationError> {
        let prompt = self.number;
        if self.prompt.is_empty() {
            return Err(GenerationError::EmptyPrompt { prompt });
        }
        let unknown = |token: &u32| *token as usize >= vocab_size;
        if let Some(place) = self.prompt.iter().position(unknown) {
            return Err(GenerationError::UnknownToken {
                prompt,
                place,
                token: self.prompt[place],
                last: vocab_size.saturating_sub(1),
            });
        }
        if self.config.max_new_tokens_after(self.prompt.len()) == 0 {
            return Err(GenerationError::PromptTooLong {
                prompt,
                tokens: self.prompt.len(),
                max_length: self.config.max_length.unwrap_or_default(),
            });
        }
        Ok(())
    }

    /// Checks the tokens that the configuration names.
    fn check_tokens(&self, vocab_size: usize) -> Result<(), GenerationError> {
        let config = &self.config;
        let named = [
            ("eos_token_id", &config.eos_token_id[..]),
            ("forced_eos_token_id", &config.forced_eos_token_id),
        ];
        let words = config.bad_words_ids.iter().flatten();
        let words = words.map(|word| ("bad_words_ids", &word[..]));
        for (field, tokens) in named.into_iter().chain(words) {
            let unknown = tokens.iter().find(|token| **token as usize >= vocab_size);
            if let Some(token) = unknown {
                return Err(GenerationError::UnknownStopToken {
                    field,
                    token: *token,
                    last: vocab_size.saturating_sub(1),
                });
            }
        }
        Ok(())
    }
}
