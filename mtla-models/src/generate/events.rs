//! What comes out of a generation.

use super::{GenerationError, LogProbability};

/// Why a sequence ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FinishReason {
    /// Its last token is a stop token.
    Stop,
    /// A stop string ends in its last token.
    StopString,
    /// It has as many tokens as were allowed.
    Length,
}

/// A new token.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenEvent {
    /// Number of the prompt, from 0.
    pub prompt: usize,
    /// Number of the sample, from 0.
    pub sample: usize,
    /// The token.
    pub token: u32,
    /// How probable it was, if that was [asked for](super::GenerationConfig::log_probabilities).
    pub log_probability: Option<LogProbability>,
    /// Why the sample ends, if this is its last token.
    pub finish: Option<FinishReason>,
}

/// A generated continuation.
#[derive(Debug, Clone, PartialEq)]
pub struct Completion {
    /// Number of the prompt, from 0.
    pub prompt: usize,
    /// Number of the sample, from 0; of beam search the best sequence is 0.
    pub sample: usize,
    /// The new tokens; a stop token is the last one.
    pub tokens: Vec<u32>,
    /// Why it ends.
    pub finish: FinishReason,
    /// The score of beam search: log-probability divided by the number of tokens to the power of
    /// [`length_penalty`](super::GenerationConfig::length_penalty).
    pub score: Option<f64>,
    /// How probable each token was, if that was [asked for](super::GenerationConfig::log_probabilities).
    pub log_probabilities: Option<Vec<LogProbability>>,
}

/// Which request of an engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub(super) u64);

/// Something that happened to a request of an engine.
#[derive(Debug)]
pub struct Event {
    /// Which request.
    pub request: RequestId,
    /// What happened.
    pub kind: EventKind,
}

/// What happened to a request.
#[derive(Debug)]
pub enum EventKind {
    /// A sequence has a new token. Those of beam search come all at once, when it is over.
    Token(TokenEvent),
    /// All sequences have ended; the request is over. There are fewer than were asked for only where beam
    /// search finds no more of them, because everything else is forbidden.
    Finished(Vec<Completion>),
    /// The request cannot go on; others do.
    Failed(GenerationError),
}
