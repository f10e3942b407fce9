//! Beam search.
//!
//! It goes as in Hugging Face's `transformers` for one prompt: of all continuations of all beams the best
//! `max(2, 1 + stop tokens) · beams` are looked at. Those that end are kept as finished if they are among the
//! best `beams`, and the best ones that do not end are the next beams. Impossible continuations (`−∞`) are
//! never taken, where the original fills up with them.

use std::cmp::Ordering;

use super::{
    Outcome, Rows,
    rules::{Rules, Sequence},
};
use crate::generate::{
    EarlyStopping, FinishReason, GenerationError, TokenEvent, probability::log_softmax,
};

/// Sequences that compete with each other.
#[derive(Debug)]
pub(super) struct Beams {
    /// The best one first.
    unfinished: Vec<Beam>,
    /// The best one first.
    finished: Vec<Finished>,
}

#[derive(Debug)]
struct Beam {
    sequence: Sequence,
    /// Sum of the scores of its tokens.
    sum: f64,
}

#[derive(Debug)]
struct Finished {
    sequence: Sequence,
    /// The sum, divided by the number of tokens to the power of the length penalty.
    score: f64,
    finish: FinishReason,
}

/// How far a search is.
enum Progress {
    /// Unfinished sequences may still matter.
    Open,
    /// They are not expected to.
    Settled,
    /// They cannot.
    Over,
}

/// A continuation of a beam by one token.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    beam: usize,
    token: u32,
    sum: f64,
}

impl Beams {
    pub(super) fn new(start: Sequence) -> Self {
        let start = Beam {
            sequence: start,
            sum: 0.0,
        };
        Self {
            unfinished: vec![start],
            finished: Vec::new(),
        }
    }

    pub(super) fn rows(&self) -> usize {
        self.unfinished.len()
    }

    pub(super) fn sequences(&self) -> Vec<&[u32]> {
        let beams = self.unfinished.iter();
        beams.map(|beam| &beam.sequence.tokens[..]).collect()
    }

    pub(super) fn advance(
        &mut self,
        rules: &Rules,
        rows: Rows,
    ) -> Result<Outcome, GenerationError> {
        let beams = rules.config.num_beams;
        let step = 1 + rules.step(&self.unfinished[0].sequence);
        let candidates = self.candidates(rules, rows)?;
        let mut outcome = Outcome::default();
        let mut next = Vec::with_capacity(beams);
        let mut ended = Vec::new();
        for (rank, candidate) in candidates.iter().enumerate() {
            if rank >= beams && next.len() == beams {
                break;
            }
            let mut sequence = self.unfinished[candidate.beam].sequence.clone();
            let logits = rows.logits(candidate.beam);
            match rules.append(&mut sequence, candidate.token, logits)? {
                Some(finish) if rank < beams => ended.push(Finished {
                    sequence,
                    score: candidate.sum / length(step, rules),
                    finish,
                }),
                None if next.len() < beams => {
                    outcome.parents.push(candidate.beam);
                    next.push(Beam {
                        sequence,
                        sum: candidate.sum,
                    });
                }
                _ => {}
            }
        }
        self.finish(rules, ended);
        self.unfinished = next;
        match self.progress(rules, step) {
            Progress::Open => {}
            Progress::Settled => outcome.settled = true,
            Progress::Over => return Ok(self.end(rules)),
        }
        Ok(outcome)
    }

    /// The best continuations, the best one first.
    fn candidates(&self, rules: &Rules, rows: Rows) -> Result<Vec<Candidate>, GenerationError> {
        let mut candidates = Vec::new();
        for (beam, Beam { sequence, sum }) in self.unfinished.iter().enumerate() {
            let logits = rows.logits(beam).expect("beam search reads logits");
            rules.check(logits, beam, sequence)?;
            let logs = log_softmax(logits);
            let mut scores: Vec<f32> = logs.into_iter().map(|log| log as f32).collect();
            rules.process(sequence, &mut scores);
            let possible = (0..).zip(scores).filter(|(_, score)| score.is_finite());
            candidates.extend(possible.map(|(token, score)| Candidate {
                beam,
                token,
                sum: sum + f64::from(score),
            }));
        }
        if candidates.is_empty() && self.finished.is_empty() {
            return Err(rules.nothing_left(0, &self.unfinished[0].sequence));
        }
        let kept = (1 + rules.config.eos_token_id.len()).max(2) * rules.config.num_beams;
        if kept < candidates.len() {
            candidates.select_nth_unstable_by(kept - 1, Candidate::better);
            candidates.truncate(kept);
        }
        candidates.sort_unstable_by(Candidate::better);
        Ok(candidates)
    }

    /// Keeps the best finished sequences.
    fn finish(&mut self, rules: &Rules, ended: Vec<Finished>) {
        self.finished.extend(ended);
        // Stable: of equally good ones those that were finished first stay.
        self.finished.sort_by(|a, b| b.score.total_cmp(&a.score));
        self.finished.truncate(rules.config.num_beams);
    }

    /// Whether unfinished sequences may still matter after `step` tokens.
    fn progress(&self, rules: &Rules, step: usize) -> Progress {
        let Some(best) = self.unfinished.first() else {
            return Progress::Over;
        };
        let full = self.finished.len() == rules.config.num_beams;
        let Some(worst) = self.finished.last().filter(|_| full) else {
            return Progress::Open;
        };
        let length = match rules.config.early_stopping {
            EarlyStopping::Always => return Progress::Over,
            EarlyStopping::Never if rules.config.length_penalty > 0.0 => {
                length(rules.max_new_tokens(), rules)
            }
            EarlyStopping::Never | EarlyStopping::Heuristic => length(step, rules),
        };
        if best.sum / length > worst.score {
            Progress::Open
        } else {
            Progress::Settled
        }
    }

    /// Stops, with the best finished sequences.
    pub(super) fn end(&mut self, rules: &Rules) -> Outcome {
        let mut events = Vec::new();
        let mut completions = Vec::new();
        let best = std::mem::take(&mut self.finished).into_iter();
        for (sample, best) in best.take(rules.config.num_return_sequences).enumerate() {
            let finish = best.finish;
            let completion = rules.complete(best.sequence, sample, finish, Some(best.score));
            let last = completion.tokens.len() - 1;
            events.extend(completion.tokens.iter().enumerate().map(|(place, token)| {
                let probabilities = completion.log_probabilities.as_ref();
                TokenEvent {
                    prompt: rules.number,
                    sample,
                    token: *token,
                    log_probability: probabilities.map(|list| list[place].clone()),
                    finish: (place == last).then_some(finish),
                }
            }));
            completions.push(completion);
        }
        Outcome {
            events,
            completions: Some(completions),
            ..Outcome::default()
        }
    }
}

impl Candidate {
    /// The larger sum first, of equal ones the better beam, then the first token.
    fn better(&self, other: &Self) -> Ordering {
        let place = |candidate: &Self| (candidate.beam, candidate.token);
        other
            .sum
            .total_cmp(&self.sum)
            .then_with(|| place(self).cmp(&place(other)))
    }
}

/// What the sum of `tokens` tokens is divided by.
fn length(tokens: usize, rules: &Rules) -> f64 {
    (tokens as f64).powf(rules.config.length_penalty)
}
