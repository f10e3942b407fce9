//! From logits to the tokens of one request, on the host.
//!
//! A search holds one row of the cache before its first token (the prompt), and one for each of its
//! unfinished sequences afterwards. Each step takes the logits of these rows and says which row each
//! sequence that goes on continues.

mod beams;
mod draw;
mod rules;
mod samples;

use std::ops::Range;

pub use draw::uniform;

use super::{Completion, GenerationError, Request, TokenEvent};
use beams::Beams;
use rules::Rules;
use samples::Samples;

/// What the model says about the rows of one request.
#[derive(Debug, Clone, Copy)]
pub(super) enum Rows<'a> {
    /// The most probable token of each row.
    MostProbable(&'a [u32]),
    /// The logits of each row, one after the other.
    Logits {
        logits: &'a [f32],
        vocab_size: usize,
    },
}

impl<'a> Rows<'a> {
    fn logits(self, row: usize) -> Option<&'a [f32]> {
        let Self::Logits { logits, vocab_size } = self else {
            return None;
        };
        Some(&logits[range(row, vocab_size)])
    }
}

fn range(row: usize, width: usize) -> Range<usize> {
    row * width..(row + 1) * width
}

/// What a step gives.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    /// For each sequence that goes on the row that it continues.
    pub(super) parents: Vec<usize>,
    /// Tokens that are settled.
    pub(super) events: Vec<TokenEvent>,
    /// All sequences, when the last one has ended.
    pub(super) completions: Option<Vec<Completion>>,
    /// A search that goes on could as well [end](Search::end): nothing better is expected.
    pub(super) settled: bool,
}

/// The sequences of one request.
#[derive(Debug)]
pub(super) struct Search {
    rules: Rules,
    method: Method,
}

#[derive(Debug)]
enum Method {
    Samples(Samples),
    Beams(Beams),
}

impl Search {
    pub(super) fn new(request: Request) -> Result<Self, GenerationError> {
        let sequences = request.config.num_return_sequences;
        let (rules, start) = Rules::new(request)?;
        let method = if rules.config.num_beams > 1 {
            Method::Beams(Beams::new(start))
        } else {
            Method::Samples(Samples::new(start, sequences))
        };
        Ok(Self { rules, method })
    }

    /// The prompt's number is `first` higher.
    pub(super) fn renumber(&mut self, first: usize) {
        self.rules.number += first;
    }

    /// Rows of the cache that it holds.
    pub(super) fn rows(&self) -> usize {
        match &self.method {
            Method::Samples(samples) => samples.rows(),
            Method::Beams(beams) => beams.rows(),
        }
    }

    /// Rows of the cache that it may come to hold.
    pub(super) fn max_rows(&self) -> usize {
        match &self.method {
            Method::Samples(samples) => samples.max_rows(),
            Method::Beams(_) => self.rules.config.num_beams,
        }
    }

    /// The whole sequence of each row.
    pub(super) fn sequences(&self) -> Vec<&[u32]> {
        match &self.method {
            Method::Samples(samples) => samples.sequences(),
            Method::Beams(beams) => beams.sequences(),
        }
    }

    /// Whether it wants nothing but the most probable tokens.
    pub(super) fn is_plain(&self) -> bool {
        matches!(self.method, Method::Samples(_)) && self.rules.is_plain()
    }

    /// Takes what the model says after the newest tokens.
    pub(super) fn advance(&mut self, rows: Rows) -> Result<Outcome, GenerationError> {
        match &mut self.method {
            Method::Samples(samples) => samples.advance(&self.rules, rows),
            Method::Beams(beams) => beams.advance(&self.rules, rows),
        }
    }

    /// Ends a search that is [settled](Outcome::settled).
    pub(super) fn end(&mut self) -> Outcome {
        match &mut self.method {
            Method::Samples(_) => Outcome::default(),
            Method::Beams(beams) => beams.end(&self.rules),
        }
    }
}
