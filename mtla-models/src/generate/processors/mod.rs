//! What changes a row of scores before a token is chosen from it.
//!
//! Each processor is what the class of the same purpose in Hugging Face's `transformers` is, with a filter
//! value of `−∞`. Scores are logits for greedy search and sampling and log-probabilities for beam search;
//! the tokens that a processor looks back on are the prompt and what has been generated.
//!
//! ```
//! use mtla_models::generate::processors::{LogitsProcessor, RepetitionPenalty, TopK};
//!
//! let mut scores = [2.0, -1.0, 3.0];
//! RepetitionPenalty { penalty: 2.0 }.process(&[1, 0], &mut scores);
//! assert_eq!(scores, [1.0, -2.0, 3.0]);
//! TopK { top_k: 1 }.process(&[1, 0], &mut scores);
//! assert_eq!(scores, [f32::NEG_INFINITY, f32::NEG_INFINITY, 3.0]);
//! ```

mod history;
mod length;
mod warpers;

use std::{fmt::Debug, sync::Arc};

pub use history::{BadWords, NoRepeatNgram, RepetitionPenalty};
pub use length::{
    ExponentialDecay, ForcedLast, MinLength, SuppressAtBegin, SuppressTokens, forbid,
};
pub use warpers::{EpsilonCutoff, EtaCutoff, MinP, Renormalize, Temperature, TopK, TopP, TypicalP};

use super::GenerationConfig;

/// Changes the scores of the next token.
pub trait LogitsProcessor: Debug + Send + Sync {
    /// Changes `scores`, one a token of the vocabulary, of the token that comes after `tokens`.
    fn process(&self, tokens: &[u32], scores: &mut [f32]);
}

/// Processors that work one after the other.
#[derive(Debug, Clone, Default)]
pub struct LogitsProcessors(Vec<Arc<dyn LogitsProcessor>>);

impl LogitsProcessors {
    /// What `config` asks for after a prompt of `prompt_length` tokens, in Hugging Face's order; `custom`
    /// ones come after those that forbid tokens and before those that shape what is sampled from.
    pub fn new(
        config: &GenerationConfig,
        prompt_length: usize,
        custom: &[Arc<dyn LogitsProcessor>],
    ) -> Self {
        let mut chain = Self::default();
        chain.look_back(config);
        chain.bound_length(config, prompt_length);
        chain.0.extend_from_slice(custom);
        if config.do_sample {
            chain.shape(config);
        }
        if config.renormalize_logits {
            chain.push(Renormalize);
        }
        chain
    }

    /// Adds a processor at the end.
    pub fn push(&mut self, processor: impl LogitsProcessor + 'static) {
        self.0.push(Arc::new(processor));
    }

    /// Whether nothing is changed.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn look_back(&mut self, config: &GenerationConfig) {
        let penalty = config.repetition_penalty;
        if (penalty - 1.0).abs() > 0.0 {
            self.push(RepetitionPenalty { penalty });
        }
        if config.no_repeat_ngram_size > 0 {
            self.push(NoRepeatNgram {
                size: config.no_repeat_ngram_size,
            });
        }
        if let Some(words) = &config.bad_words_ids {
            self.push(BadWords::new(words, &config.eos_token_id));
        }
    }

    fn bound_length(&mut self, config: &GenerationConfig, prompt_length: usize) {
        let ends = &config.eos_token_id;
        let min_length = config.min_length_after(prompt_length);
        if !ends.is_empty() && min_length > prompt_length {
            self.push(MinLength {
                min_length,
                ends: ends.clone(),
            });
        }
        if !config.forced_eos_token_id.is_empty() {
            self.push(ForcedLast {
                max_length: prompt_length + config.max_new_tokens_after(prompt_length),
                tokens: config.forced_eos_token_id.clone(),
            });
        }
        if let Some((start, factor)) = config.exponential_decay_length_penalty {
            self.push(ExponentialDecay {
                start: prompt_length + start,
                factor,
                ends: ends.clone(),
            });
        }
        if let Some(tokens) = &config.suppress_tokens {
            self.push(SuppressTokens(tokens.clone()));
        }
        if let Some(tokens) = &config.begin_suppress_tokens {
            self.push(SuppressAtBegin {
                begin: prompt_length,
                tokens: tokens.clone(),
            });
        }
    }

    /// What only sampling does.
    fn shape(&mut self, config: &GenerationConfig) {
        if (config.temperature - 1.0).abs() > 0.0 {
            self.push(Temperature {
                temperature: config.temperature,
            });
        }
        if let Some(top_k) = config.top_k.filter(|k| *k > 0) {
            self.push(TopK { top_k });
        }
        if let Some(top_p) = config.top_p.filter(|p| *p < 1.0) {
            self.push(TopP { top_p, keep: 1 });
        }
        if let Some(min_p) = config.min_p {
            self.push(MinP { min_p, keep: 1 });
        }
        if let Some(mass) = config.typical_p.filter(|p| *p < 1.0) {
            self.push(TypicalP { mass, keep: 1 });
        }
        if config.epsilon_cutoff > 0.0 {
            self.push(EpsilonCutoff {
                epsilon: config.epsilon_cutoff,
            });
        }
        if config.eta_cutoff > 0.0 {
            self.push(EtaCutoff {
                epsilon: config.eta_cutoff,
            });
        }
    }
}

impl LogitsProcessor for LogitsProcessors {
    fn process(&self, tokens: &[u32], scores: &mut [f32]) {
        for processor in &self.0 {
            processor.process(tokens, scores);
        }
    }
}
