//! What to generate.

mod forms;
mod validation;

use serde::{Deserialize, Serialize};

pub use forms::EarlyStopping;

/// Tokens after the prompt where neither a number of them nor a length is given.
const DEFAULT_NEW_TOKENS: usize = 20;

/// How long, how often and how to choose.
///
/// The fields are those of Hugging Face's `generation_config.json`, with the same meaning and, read from a
/// file, the same defaults; the file's other fields are passed over. [`seed`](Self::seed) and
/// [`log_probabilities`](Self::log_probabilities) are ours.
///
/// * `num_beams` above 1 is beam search;
/// * else `do_sample` is sampling;
/// * else it is greedy search.
///
/// ```
/// use mtla_models::generate::GenerationConfig;
///
/// let config = GenerationConfig::new(100).with_temperature(0.8);
/// assert!(config.do_sample);
/// assert_eq!(
///     config.with_top_p(1.5).validate().unwrap_err().to_string(),
///     "generation configuration: top_p is 1.5, expected a probability in (0, 1]"
/// );
///
/// let file = r#"{"num_beams": 4, "early_stopping": "never", "eos_token_id": 2, "use_cache": true}"#;
/// let config: GenerationConfig = serde_json::from_str(file).unwrap();
/// assert_eq!(config.eos_token_id, [2]);
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct GenerationConfig {
    /// Tokens after which a sequence ends at the latest.
    pub max_new_tokens: Option<usize>,
    /// The same with the tokens of the prompt counted; `max_new_tokens` goes before it. If neither is given,
    /// 20 new tokens.
    pub max_length: Option<usize>,
    /// New tokens before which no sequence ends with a stop token.
    pub min_new_tokens: Option<usize>,
    /// The same with the tokens of the prompt counted; `min_new_tokens` goes before it.
    pub min_length: usize,

    /// Samples, rather than taking the most probable token.
    pub do_sample: bool,
    /// Divides the logits before sampling.
    pub temperature: f64,
    /// Samples among this many most probable tokens only (all if none or 0).
    pub top_k: Option<usize>,
    /// Samples among the most probable tokens that reach this probability together only.
    pub top_p: Option<f64>,
    /// Samples among tokens that have this share of the most probable one's probability only.
    pub min_p: Option<f64>,
    /// Samples among the tokens nearest to the average information that reach this probability only.
    pub typical_p: Option<f64>,
    /// Samples among tokens of this probability only (0: all).
    pub epsilon_cutoff: f64,
    /// The same with a threshold that depends on the entropy (0: all).
    pub eta_cutoff: f64,
    /// The same seed samples the same tokens again.
    pub seed: u64,

    /// Sequences that beam search keeps.
    pub num_beams: usize,
    /// The score of a sequence is its log-probability divided by its new tokens to this power.
    pub length_penalty: f64,
    /// When beam search stops.
    pub early_stopping: EarlyStopping,
    /// Sequences of each prompt: samples, or the best ones of beam search.
    pub num_return_sequences: usize,

    /// Above 1 makes tokens less probable that there have been, in the prompt or after it.
    pub repetition_penalty: f64,
    /// No sequence of this many tokens comes twice (0: may).
    pub no_repeat_ngram_size: usize,
    /// Token sequences that never come.
    pub bad_words_ids: Option<Vec<Vec<u32>>>,
    /// Tokens that never come.
    pub suppress_tokens: Option<Vec<u32>>,
    /// Tokens that never come first after the prompt.
    pub begin_suppress_tokens: Option<Vec<u32>>,
    /// What the last token is if the sequence becomes as long as it may.
    #[serde(with = "forms::one_or_many")]
    pub forced_eos_token_id: Vec<u32>,
    /// New tokens from which on stop tokens become more probable, and by which factor a token.
    pub exponential_decay_length_penalty: Option<(usize, f64)>,
    /// Makes log-probabilities of the scores again after all changes (for beam search).
    pub renormalize_logits: bool,

    /// Tokens that end a sequence.
    #[serde(with = "forms::one_or_many")]
    pub eos_token_id: Vec<u32>,
    /// Texts that end a sequence; they need a [`TextDecoder`](super::TextDecoder).
    #[serde(with = "forms::one_or_many")]
    pub stop_strings: Vec<String>,
    /// Gives the log-probability of every token, and of this many most probable ones at its place.
    pub log_probabilities: Option<usize>,
}

impl Default for GenerationConfig {
    /// What an empty `generation_config.json` means.
    fn default() -> Self {
        Self {
            max_new_tokens: None,
            max_length: None,
            min_new_tokens: None,
            min_length: 0,
            do_sample: false,
            temperature: 1.0,
            top_k: Some(50),
            top_p: None,
            min_p: None,
            typical_p: None,
            epsilon_cutoff: 0.0,
            eta_cutoff: 0.0,
            seed: 0,
            num_beams: 1,
            length_penalty: 1.0,
            early_stopping: EarlyStopping::Heuristic,
            num_return_sequences: 1,
            repetition_penalty: 1.0,
            no_repeat_ngram_size: 0,
            bad_words_ids: None,
            suppress_tokens: None,
            begin_suppress_tokens: None,
            forced_eos_token_id: Vec::new(),
            exponential_decay_length_penalty: None,
            renormalize_logits: false,
            eos_token_id: Vec::new(),
            stop_strings: Vec::new(),
            log_probabilities: None,
        }
    }
}

impl GenerationConfig {
    /// Greedy search for `max_new_tokens` tokens; nothing is cut off when sampling is switched on.
    pub fn new(max_new_tokens: usize) -> Self {
        Self {
            max_new_tokens: Some(max_new_tokens),
            top_k: None,
            ..Self::default()
        }
    }

    /// Samples at this temperature; 0 is greedy search.
    #[must_use]
    pub fn with_temperature(mut self, temperature: f64) -> Self {
        self.do_sample = temperature != 0.0;
        self.temperature = if self.do_sample { temperature } else { 1.0 };
        self
    }

    /// Sets the number of tokens to sample among.
    #[must_use]
    pub fn with_top_k(mut self, top_k: usize) -> Self {
        self.top_k = Some(top_k);
        self
    }

    /// Sets the probability to sample among.
    #[must_use]
    pub fn with_top_p(mut self, top_p: f64) -> Self {
        self.top_p = Some(top_p);
        self
    }

    /// Sets the seed.
    #[must_use]
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Sets the tokens that end a sequence.
    #[must_use]
    pub fn with_stop_tokens(mut self, tokens: impl Into<Vec<u32>>) -> Self {
        self.eos_token_id = tokens.into();
        self
    }

    /// Sets the texts that end a sequence.
    #[must_use]
    pub fn with_stop_strings(mut self, texts: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.stop_strings = texts.into_iter().map(Into::into).collect();
        self
    }

    /// Sets the number of sequences of each prompt.
    #[must_use]
    pub fn with_num_return_sequences(mut self, sequences: usize) -> Self {
        self.num_return_sequences = sequences;
        self
    }

    /// Beam search with this many beams.
    #[must_use]
    pub fn with_num_beams(mut self, beams: usize) -> Self {
        self.num_beams = beams;
        self
    }

    /// Asks for log-probabilities: of every token, and of the `top` most probable ones at its place.
    #[must_use]
    pub fn with_log_probabilities(mut self, top: usize) -> Self {
        self.log_probabilities = Some(top);
        self
    }

    /// Tokens that come after a prompt of `prompt_length` tokens at most.
    pub fn max_new_tokens_after(&self, prompt_length: usize) -> usize {
        let by_length = |length: usize| length.saturating_sub(prompt_length);
        self.max_new_tokens
            .or(self.max_length.map(by_length))
            .unwrap_or(DEFAULT_NEW_TOKENS)
    }

    /// Tokens, those of the prompt included, before which no sequence ends with a stop token.
    pub(super) fn min_length_after(&self, prompt_length: usize) -> usize {
        let by_count = |count: usize| prompt_length + count;
        self.min_new_tokens.map_or(self.min_length, by_count)
    }

    /// Rows of the batch that a prompt takes at most.
    pub fn rows(&self) -> usize {
        self.num_beams.max(self.num_return_sequences)
    }
}
