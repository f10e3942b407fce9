//! Processors that shape the distribution that is sampled from, whatever there has been.

use std::cmp::Ordering;

use super::LogitsProcessor;
use crate::generate::probability::{log_softmax, softmax};

/// Divides all scores: above 1 flattens the distribution, below 1 sharpens it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Temperature {
    /// Above 0.
    pub temperature: f64,
}

impl LogitsProcessor for Temperature {
    fn process(&self, _tokens: &[u32], scores: &mut [f32]) {
        for score in scores {
            *score = (f64::from(*score) / self.temperature) as f32;
        }
    }
}

/// Keeps the most probable tokens, and those that are as probable as the last one kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TopK {
    /// How many, at least 1.
    pub top_k: usize,
}

impl LogitsProcessor for TopK {
    fn process(&self, _tokens: &[u32], scores: &mut [f32]) {
        let threshold = kth_largest(scores, self.top_k);
        retain(scores, |_, score| score >= threshold);
    }
}

/// Keeps the fewest most probable tokens whose probabilities add up to more than this (nucleus sampling,
/// Holtzman et al. 2020); of equally probable ones the first.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TopP {
    /// Between 0 and 1.
    pub top_p: f64,
    /// Tokens that are kept at least.
    pub keep: usize,
}

impl LogitsProcessor for TopP {
    fn process(&self, _tokens: &[u32], scores: &mut [f32]) {
        let probabilities = softmax(scores);
        let ascending = by_score(scores, |a, b| b.cmp_score(a));
        let mut below = 0.0;
        let removable = scores.len().saturating_sub(self.keep);
        for place in &ascending[..removable] {
            below += probabilities[*place];
            if below > 1.0 - self.top_p {
                break;
            }
            scores[*place] = f32::NEG_INFINITY;
        }
    }
}

/// Keeps the tokens that have at least this share of the most probable token's probability.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MinP {
    /// The share, between 0 and 1.
    pub min_p: f64,
    /// Tokens that are kept at least.
    pub keep: usize,
}

impl LogitsProcessor for MinP {
    fn process(&self, _tokens: &[u32], scores: &mut [f32]) {
        let probabilities = softmax(scores);
        let top = probabilities.iter().copied().fold(0.0, f64::max);
        let descending = by_score(scores, Scored::cmp_score);
        for place in descending.iter().skip(self.keep) {
            if probabilities[*place] < self.min_p * top {
                scores[*place] = f32::NEG_INFINITY;
            }
        }
    }
}

/// Keeps the tokens whose information is nearest to the entropy of the distribution, until their
/// probabilities reach this (locally typical sampling, Meister et al. 2022).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TypicalP {
    /// Between 0 and 1.
    pub mass: f64,
    /// Tokens that are kept at least.
    pub keep: usize,
}

impl LogitsProcessor for TypicalP {
    fn process(&self, _tokens: &[u32], scores: &mut [f32]) {
        let logs = log_softmax(scores);
        let entropy = entropy(&logs);
        let distance = |place: usize| (-logs[place] - entropy).abs();
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|a, b| distance(*a).total_cmp(&distance(*b)).then(a.cmp(b)));
        let mut reached = 0.0;
        let wanted = |place: &&usize| {
            reached += logs[**place].exp();
            reached < self.mass
        };
        let last = order.iter().take_while(wanted).count();
        let Some(last) = order.get(last.min(order.len().saturating_sub(1))) else {
            return;
        };
        let threshold = distance(*last);
        for place in order.iter().skip(self.keep) {
            if distance(*place) > threshold {
                scores[*place] = f32::NEG_INFINITY;
            }
        }
    }
}

/// Keeps the tokens of at least this probability, and the most probable one (Hewitt et al. 2022).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EpsilonCutoff {
    /// Between 0 and 1.
    pub epsilon: f64,
}

impl LogitsProcessor for EpsilonCutoff {
    fn process(&self, _tokens: &[u32], scores: &mut [f32]) {
        cut(scores, &softmax(scores), self.epsilon);
    }
}

/// As [`EpsilonCutoff`], with a threshold that is lower where the distribution is flat: the smaller one of ε
/// and `√ε · e^−entropy` (Hewitt et al. 2022).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EtaCutoff {
    /// Between 0 and 1.
    pub epsilon: f64,
}

impl LogitsProcessor for EtaCutoff {
    fn process(&self, _tokens: &[u32], scores: &mut [f32]) {
        let entropy = entropy(&log_softmax(scores));
        let threshold = self.epsilon.min(self.epsilon.sqrt() * (-entropy).exp());
        cut(scores, &softmax(scores), threshold);
    }
}

/// Makes log-probabilities of the scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Renormalize;

impl LogitsProcessor for Renormalize {
    fn process(&self, _tokens: &[u32], scores: &mut [f32]) {
        let logs = log_softmax(scores);
        for (score, log) in scores.iter_mut().zip(logs) {
            *score = log as f32;
        }
    }
}

/// Removes tokens less probable than `threshold`, but not the most probable one.
fn cut(scores: &mut [f32], probabilities: &[f64], threshold: f64) {
    let top = kth_largest(scores, 1);
    retain(scores, |place, score| {
        probabilities[place] >= threshold || score >= top
    });
}

fn retain(scores: &mut [f32], kept: impl Fn(usize, f32) -> bool) {
    for (place, score) in scores.iter_mut().enumerate() {
        if !kept(place, *score) {
            *score = f32::NEG_INFINITY;
        }
    }
}

/// The `k`-th largest score; the smallest one if there are fewer.
fn kth_largest(scores: &[f32], k: usize) -> f32 {
    let mut sorted = scores.to_vec();
    let place = k.min(sorted.len()).saturating_sub(1);
    if sorted.is_empty() {
        return f32::NEG_INFINITY;
    }
    *sorted
        .select_nth_unstable_by(place, |a, b| b.total_cmp(a))
        .1
}

/// Entropy of a distribution given by its log-probabilities.
fn entropy(logs: &[f64]) -> f64 {
    -logs
        .iter()
        .filter(|log| log.is_finite())
        .map(|log| log * log.exp())
        .sum::<f64>()
}

/// A score and its place.
#[derive(Debug, Clone, Copy)]
struct Scored(usize, f32);

impl Scored {
    /// The larger score first, of equal ones the first place.
    fn cmp_score(&self, other: &Self) -> Ordering {
        other.1.total_cmp(&self.1).then(self.0.cmp(&other.0))
    }
}

/// Places of the scores in an order.
fn by_score(scores: &[f32], order: impl Fn(&Scored, &Scored) -> Ordering) -> Vec<usize> {
    let mut scored: Vec<Scored> = scores
        .iter()
        .copied()
        .enumerate()
        .map(|(i, x)| Scored(i, x))
        .collect();
    scored.sort_unstable_by(order);
    scored.into_iter().map(|x| x.0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Logits of the probabilities 0.4, 0.05, 0.3, 0.05, 0.2.
    fn logits() -> [f32; 5] {
        [0.4, 0.05, 0.3, 0.05, 0.2].map(f32::ln)
    }

    #[track_caller]
    fn assert_kept(processor: &impl LogitsProcessor, expected: &[usize]) {
        let mut scores = logits();
        processor.process(&[], &mut scores);
        let kept: Vec<usize> = (0..5).filter(|i| scores[*i].is_finite()).collect();
        assert_eq!(kept, expected, "{processor:?}");
    }

    #[test]
    fn cuts_keep_the_most_probable_tokens() {
        assert_kept(&TopK { top_k: 9 }, &[0, 1, 2, 3, 4]);
        assert_kept(&TopK { top_k: 2 }, &[0, 2]);
        // Both of the least probable ones are as probable as the fourth.
        assert_kept(&TopK { top_k: 4 }, &[0, 1, 2, 3, 4]);
        let nucleus = |top_p| TopP { top_p, keep: 1 };
        // 0.4 + 0.3 does not reach 0.75, with 0.2 it does.
        assert_kept(&nucleus(0.75), &[0, 2, 4]);
        assert_kept(&nucleus(0.93), &[0, 1, 2, 4]);
        assert_kept(&nucleus(1e-9), &[0]);
        let two = TopP {
            top_p: 1e-9,
            keep: 2,
        };
        assert_kept(&two, &[0, 2]);
        let min_p = |min_p| MinP { min_p, keep: 1 };
        assert_kept(&min_p(0.49), &[0, 2, 4]);
        assert_kept(&min_p(1.0), &[0]);
        assert_kept(&EpsilonCutoff { epsilon: 0.25 }, &[0, 2]);
        assert_kept(&EpsilonCutoff { epsilon: 0.9 }, &[0]);
    }

    #[test]
    fn typical_tokens_carry_as_much_information_as_the_average() {
        // The entropy is 1.35 nats; −ln 0.3 = 1.20, −ln 0.2 = 1.61, −ln 0.4 = 0.92, −ln 0.05 = 3.0.
        let typical = |mass| TypicalP { mass, keep: 1 };
        assert_kept(&typical(0.2), &[2]);
        assert_kept(&typical(0.4), &[2, 4]);
        assert_kept(&typical(0.7), &[0, 2, 4]);
    }

    #[test]
    fn temperature_divides_and_renormalizing_makes_log_probabilities() {
        let mut scores = logits().map(|x| x + 3.0);
        Renormalize.process(&[], &mut scores);
        assert!((scores[0] - 0.4f32.ln()).abs() < 1e-6);
        Temperature { temperature: 0.5 }.process(&[], &mut scores);
        assert!((scores[2] - 2.0 * 0.3f32.ln()).abs() < 1e-6);
    }
}
