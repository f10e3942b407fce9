//! What holds for all sequences of a request, and one sequence.

use crate::generate::{
    Completion, FinishReason, GenerationConfig, GenerationError, LogProbability, Request,
    probability::{is_distribution, log_softmax},
    processors::{LogitsProcessor, LogitsProcessors},
    text::{StopStrings, Tail},
};

/// A prompt and what has been generated.
#[derive(Debug, Clone)]
pub(super) struct Sequence {
    pub(super) tokens: Vec<u32>,
    log_probabilities: Vec<LogProbability>,
    tail: Tail,
}

impl Sequence {
    /// The newest token's log-probability, if it was asked for.
    pub(super) fn newest_probability(&self) -> Option<LogProbability> {
        self.log_probabilities.last().cloned()
    }
}

/// What holds for all sequences of a request.
#[derive(Debug)]
pub(super) struct Rules {
    pub(super) config: GenerationConfig,
    pub(super) number: usize,
    prompt_length: usize,
    max_new_tokens: usize,
    processors: LogitsProcessors,
    stops: Option<StopStrings>,
}

impl Rules {
    /// The rules of a request, and its prompt as a sequence.
    pub(super) fn new(request: Request) -> Result<(Self, Sequence), GenerationError> {
        let Request {
            prompt,
            config,
            number,
            decoder,
            processors,
        } = request;
        let stops = decoder
            .filter(|_| !config.stop_strings.is_empty())
            .map(|decoder| StopStrings::new(decoder, &config.stop_strings));
        let tail = match &stops {
            Some(stops) => stops.start(&prompt)?,
            None => Tail::default(),
        };
        let rules = Self {
            number,
            prompt_length: prompt.len(),
            max_new_tokens: config.max_new_tokens_after(prompt.len()),
            processors: LogitsProcessors::new(&config, prompt.len(), &processors),
            stops,
            config,
        };
        let start = Sequence {
            tokens: prompt,
            log_probabilities: Vec::new(),
            tail,
        };
        Ok((rules, start))
    }

    /// Whether the most probable tokens are all that is wanted of the model.
    pub(super) fn is_plain(&self) -> bool {
        let config = &self.config;
        !config.do_sample && self.processors.is_empty() && config.log_probabilities.is_none()
    }

    /// Tokens generated so far.
    pub(super) fn step(&self, sequence: &Sequence) -> usize {
        sequence.tokens.len() - self.prompt_length
    }

    /// Tokens that a sequence may have after the prompt.
    pub(super) fn max_new_tokens(&self) -> usize {
        self.max_new_tokens
    }

    /// Checks the logits after a sequence, the `sample`-th one of the request.
    pub(super) fn check(
        &self,
        logits: &[f32],
        sample: usize,
        sequence: &Sequence,
    ) -> Result<(), GenerationError> {
        if is_distribution(logits) {
            return Ok(());
        }
        Err(GenerationError::NotFinite {
            prompt: self.number,
            sample,
            step: self.step(sequence),
        })
    }

    /// Every token is forbidden after a sequence.
    pub(super) fn nothing_left(&self, sample: usize, sequence: &Sequence) -> GenerationError {
        GenerationError::NothingLeft {
            prompt: self.number,
            sample,
            step: self.step(sequence),
        }
    }

    /// Applies the processors to the scores of the token after a sequence.
    pub(super) fn process(&self, sequence: &Sequence, scores: &mut [f32]) {
        self.processors.process(&sequence.tokens, scores);
    }

    /// Appends a token, chosen by the given logits, to a sequence; why the sequence ends, if it does.
    pub(super) fn append(
        &self,
        sequence: &mut Sequence,
        token: u32,
        logits: Option<&[f32]>,
    ) -> Result<Option<FinishReason>, GenerationError> {
        if let (Some(top), Some(logits)) = (self.config.log_probabilities, logits) {
            let probability = LogProbability::new(&log_softmax(logits), token, top);
            sequence.log_probabilities.push(probability);
        }
        sequence.tokens.push(token);
        let stopped = match &self.stops {
            Some(stops) => sequence.tail.extend(stops, &sequence.tokens)?,
            None => false,
        };
        if self.config.eos_token_id.contains(&token) {
            return Ok(Some(FinishReason::Stop));
        }
        if stopped {
            return Ok(Some(FinishReason::StopString));
        }
        let long = self.step(sequence) >= self.max_new_tokens;
        Ok(long.then_some(FinishReason::Length))
    }

    /// A sequence that has ended.
    pub(super) fn complete(
        &self,
        sequence: Sequence,
        sample: usize,
        finish: FinishReason,
        score: Option<f64>,
    ) -> Completion {
        let asked = self.config.log_probabilities.is_some();
        Completion {
            prompt: self.number,
            sample,
            tokens: sequence.tokens[self.prompt_length..].to_vec(),
            finish,
            score,
            log_probabilities: asked.then_some(sequence.log_probabilities),
        }
    }
}
