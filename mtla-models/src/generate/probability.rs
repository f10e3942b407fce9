//! Probabilities of scores, on the host.

use std::cmp::Ordering;

use burn::tensor::{Tensor, TensorData, backend::Backend};
use serde::{Deserialize, Serialize};

use super::{GenerationError, wait};

/// A token and its log-probability.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ScoredToken {
    /// The token.
    pub token: u32,
    /// Its log-probability.
    pub log_probability: f64,
}

/// How probable the model itself found a token, before anything changed its logits.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LogProbability {
    /// The log-probability of the token that was chosen.
    pub chosen: f64,
    /// The most probable tokens, the most probable one first.
    pub top: Vec<ScoredToken>,
}

impl LogProbability {
    /// Of `token`, with the `count` most probable ones; `logs` are the log-probabilities of all.
    pub(super) fn new(logs: &[f64], token: u32, count: usize) -> Self {
        let scored = |token: u32| ScoredToken {
            token,
            log_probability: logs[token as usize],
        };
        let top = largest(logs, count, f64::total_cmp);
        Self {
            chosen: logs[token as usize],
            top: top.into_iter().map(scored).collect(),
        }
    }
}

/// The `count` most probable tokens of each row of `logits [rows, vocab_size]`, the most probable one first.
///
/// # Errors
/// [`GenerationError`] if the device fails.
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::tensor::Tensor;
/// use burn_flex::Flex;
/// use mtla_models::generate::most_probable;
///
/// let logits = Tensor::<Flex, 2>::from_floats([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]], &Default::default());
/// let tokens: Vec<Vec<u32>> = most_probable(logits, 2)
///     .unwrap()
///     .into_iter()
///     .map(|row| row.into_iter().map(|best| best.token).collect())
///     .collect();
/// assert_eq!(tokens, [[1, 2], [0, 1]]);
/// # }
/// ```
pub fn most_probable<B: Backend>(
    logits: Tensor<B, 2>,
    count: usize,
) -> Result<Vec<Vec<ScoredToken>>, GenerationError> {
    let [_, vocab_size] = logits.dims();
    let logits = wait(async {
        let read = logits.into_data_async().await;
        read.map_err(GenerationError::Device)
    })?;
    let logits = floats(logits);
    let rows = logits.chunks_exact(vocab_size.max(1));
    Ok(rows
        .map(|logits| {
            let total = log_sum(logits);
            let scored = |token: u32| ScoredToken {
                token,
                log_probability: f64::from(logits[token as usize]) - total,
            };
            largest(logits, count, f32::total_cmp)
                .into_iter()
                .map(scored)
                .collect()
        })
        .collect())
}

fn floats(data: TensorData) -> Vec<f32> {
    data.convert::<f32>().into_vec().expect("just converted")
}

/// The places of the `count` largest, the largest one first, of equal ones the first one.
fn largest<T: Copy + PartialOrd>(
    scores: &[T],
    count: usize,
    compare: fn(&T, &T) -> Ordering,
) -> Vec<u32> {
    let count = count.min(scores.len());
    let order = |a: &u32, b: &u32| {
        let larger = compare(&scores[*b as usize], &scores[*a as usize]);
        larger.then(a.cmp(b))
    };
    let cut = |kept: &mut Vec<u32>| {
        if count > 0 && count < kept.len() {
            kept.select_nth_unstable_by(count - 1, order);
        }
        kept.truncate(count);
    };
    let mut kept: Vec<u32> = Vec::with_capacity(2 * count);
    // What is not above this one is not among the largest.
    let mut least = None;
    for (place, score) in (0..).zip(scores) {
        if least.is_some_and(|least| *score <= least) {
            continue;
        }
        kept.push(place);
        if kept.len() >= 2 * count {
            cut(&mut kept);
            least = kept.last().map(|place| scores[*place as usize]);
        }
    }
    cut(&mut kept);
    kept.sort_unstable_by(order);
    kept
}

/// Log-probabilities `scores − ln Σ e^scores`.
pub(super) fn log_softmax(scores: &[f32]) -> Vec<f64> {
    let total = log_sum(scores);
    scores
        .iter()
        .map(|score| f64::from(*score) - total)
        .collect()
}

/// `ln Σ e^scores`.
fn log_sum(scores: &[f32]) -> f64 {
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let total: f64 = scores
        .iter()
        .map(|score| f64::from((score - max).exp()))
        .sum();
    f64::from(max) + total.ln()
}

/// Probabilities.
pub(super) fn softmax(scores: &[f32]) -> Vec<f64> {
    let mut logs = log_softmax(scores);
    for log in &mut logs {
        *log = log.exp();
    }
    logs
}

/// Whether logits are a distribution: no NaN, no `+∞`, and not `−∞` all of them.
pub(super) fn is_distribution(logits: &[f32]) -> bool {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    max.is_finite() && !logits.iter().any(|x| x.is_nan())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_probable_tokens_come_first() {
        let logs = log_softmax(&[1.0, 3.0, 2.0, 3.0].map(|x: f32| x.ln()));
        let probability = LogProbability::new(&logs, 2, 3);
        assert!((probability.chosen.exp() - 2.0 / 9.0).abs() < 1e-6);
        let top: Vec<u32> = probability.top.iter().map(|x| x.token).collect();
        assert_eq!(top, [1, 3, 2]);
        assert_eq!(LogProbability::new(&logs, 0, 0).top, []);
        assert_eq!(LogProbability::new(&logs, 0, 9).top.len(), 4);
    }

    #[test]
    fn the_largest_are_those_of_a_sorted_list() {
        let scores: Vec<f32> = (0..1000).map(|i| ((i * 7919) % 131) as f32).collect();
        let mut sorted: Vec<u32> = (0..1000).collect();
        sorted.sort_by(|a, b| scores[*b as usize].total_cmp(&scores[*a as usize]));
        for count in [0, 1, 2, 7, 20, 131, 999, 1000, 1001, usize::MAX] {
            let found = largest(&scores, count, f32::total_cmp);
            assert_eq!(found, sorted[..count.min(1000)], "{count}");
        }
        assert_eq!(largest(&[f32::NEG_INFINITY; 2], 1, f32::total_cmp), [0]);
    }

    #[test]
    fn damaged_logits_are_no_distribution() {
        assert!(is_distribution(&[f32::NEG_INFINITY, 0.0]));
        for bad in [f32::NAN, f32::INFINITY] {
            assert!(!is_distribution(&[0.0, bad]));
        }
        assert!(!is_distribution(&[f32::NEG_INFINITY; 2]));
        assert!(!is_distribution(&[]));
    }
}
