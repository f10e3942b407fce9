//! Processors that forbid tokens or force them, at certain lengths or always.

use super::LogitsProcessor;

/// Sets the scores of `tokens` to `−∞`; tokens outside the vocabulary are passed over.
pub fn forbid(scores: &mut [f32], tokens: &[u32]) {
    for token in tokens {
        if let Some(score) = scores.get_mut(*token as usize) {
            *score = f32::NEG_INFINITY;
        }
    }
}

/// Forbids the end before a length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MinLength {
    /// Tokens, those of the prompt included.
    pub min_length: usize,
    /// Tokens that end a sequence.
    pub ends: Vec<u32>,
}

impl LogitsProcessor for MinLength {
    fn process(&self, tokens: &[u32], scores: &mut [f32]) {
        if tokens.len() < self.min_length {
            forbid(scores, &self.ends);
        }
    }
}

/// Leaves only certain tokens as the last one of the longest sequence allowed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForcedLast {
    /// Tokens of the longest sequence, those of the prompt included.
    pub max_length: usize,
    /// What the last one may be.
    pub tokens: Vec<u32>,
}

impl LogitsProcessor for ForcedLast {
    fn process(&self, tokens: &[u32], scores: &mut [f32]) {
        if tokens.len() + 1 != self.max_length {
            return;
        }
        scores.fill(f32::NEG_INFINITY);
        for token in &self.tokens {
            scores[*token as usize] = 0.0;
        }
    }
}

/// Makes the end more probable with every token beyond a length.
#[derive(Debug, Clone, PartialEq)]
pub struct ExponentialDecay {
    /// The length, the prompt's tokens included.
    pub start: usize,
    /// Above 1: what is added is the size of the score, times this to the power of the tokens beyond, minus
    /// once the size.
    pub factor: f64,
    /// Tokens that end a sequence.
    pub ends: Vec<u32>,
}

impl LogitsProcessor for ExponentialDecay {
    fn process(&self, tokens: &[u32], scores: &mut [f32]) {
        if tokens.len() <= self.start {
            return;
        }
        let beyond = (tokens.len() - self.start) as f64;
        let factor = (self.factor.powf(beyond) - 1.0) as f32;
        for end in &self.ends {
            let score = &mut scores[*end as usize];
            *score += score.abs() * factor;
        }
    }
}

/// Forbids tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SuppressTokens(
    /// What is forbidden.
    pub Vec<u32>,
);

impl LogitsProcessor for SuppressTokens {
    fn process(&self, _tokens: &[u32], scores: &mut [f32]) {
        forbid(scores, &self.0);
    }
}

/// Forbids tokens as the first one after the prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SuppressAtBegin {
    /// Tokens of the prompt.
    pub begin: usize,
    /// What is forbidden.
    pub tokens: Vec<u32>,
}

impl LogitsProcessor for SuppressAtBegin {
    fn process(&self, tokens: &[u32], scores: &mut [f32]) {
        if tokens.len() == self.begin {
            forbid(scores, &self.tokens);
        }
    }
}
