//! Greedy search and sampling.

use super::{
    Outcome, Rows,
    draw::{most_probable, sample, uniform},
    rules::{Rules, Sequence},
};
use crate::generate::{Completion, GenerationError, TokenEvent};

/// Sequences that do not depend on each other.
#[derive(Debug)]
pub(super) struct Samples {
    /// The prompt has no continuation yet: all samples share its row.
    fresh: bool,
    unfinished: Vec<Sample>,
    finished: Vec<Completion>,
}

#[derive(Debug)]
struct Sample {
    number: usize,
    sequence: Sequence,
}

impl Samples {
    pub(super) fn new(start: Sequence, count: usize) -> Self {
        let sample = |number| Sample {
            number,
            sequence: start.clone(),
        };
        Self {
            fresh: true,
            unfinished: (0..count).map(sample).collect(),
            finished: Vec::with_capacity(count),
        }
    }

    pub(super) fn rows(&self) -> usize {
        if self.fresh { 1 } else { self.max_rows() }
    }

    pub(super) fn max_rows(&self) -> usize {
        self.unfinished.len()
    }

    pub(super) fn sequences(&self) -> Vec<&[u32]> {
        let samples = &self.unfinished[..self.rows()];
        samples.iter().map(|x| &x.sequence.tokens[..]).collect()
    }

    pub(super) fn advance(
        &mut self,
        rules: &Rules,
        rows: Rows,
    ) -> Result<Outcome, GenerationError> {
        let fresh = std::mem::replace(&mut self.fresh, false);
        let mut outcome = Outcome::default();
        for (place, mut sample) in std::mem::take(&mut self.unfinished).into_iter().enumerate() {
            let row = if fresh { 0 } else { place };
            let token = sample.choose(rules, rows, row)?;
            let finish = rules.append(&mut sample.sequence, token, rows.logits(row))?;
            outcome.events.push(TokenEvent {
                prompt: rules.number,
                sample: sample.number,
                token,
                log_probability: sample.sequence.newest_probability(),
                finish,
            });
            if let Some(finish) = finish {
                let Sample { number, sequence } = sample;
                let completion = rules.complete(sequence, number, finish, None);
                self.finished.push(completion);
            } else {
                outcome.parents.push(row);
                self.unfinished.push(sample);
            }
        }
        if self.unfinished.is_empty() {
            self.finished.sort_by_key(|completion| completion.sample);
            outcome.completions = Some(std::mem::take(&mut self.finished));
        }
        Ok(outcome)
    }
}

impl Sample {
    fn choose(&self, rules: &Rules, rows: Rows, row: usize) -> Result<u32, GenerationError> {
        let logits = match rows {
            Rows::MostProbable(tokens) => return Ok(tokens[row]),
            Rows::Logits { logits, vocab_size } => &logits[super::range(row, vocab_size)],
        };
        rules.check(logits, self.number, &self.sequence)?;
        let mut scores = logits.to_vec();
        rules.process(&self.sequence, &mut scores);
        let token = if rules.config.do_sample {
            let step = rules.step(&self.sequence);
            let [prompt, number, step] = [rules.number, self.number, step].map(|x| x as u64);
            sample(&scores, uniform(rules.config.seed, prompt, number, step))
        } else {
            most_probable(&scores)
        };
        token.ok_or_else(|| rules.nothing_left(self.number, &self.sequence))
    }
}
