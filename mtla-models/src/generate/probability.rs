//! Probabilities of scores, on the host.

use burn::tensor::{Tensor, backend::Backend};
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
        Self {
            chosen: logs[token as usize],
            top: best(logs, count),
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
    let logits: Vec<f32> = logits.convert::<f32>().iter().collect();
    let rows = logits.chunks_exact(vocab_size.max(1));
    Ok(rows.map(|row| best(&log_softmax(row), count)).collect())
}

/// The `count` largest, the largest one first, of equal ones the first one.
fn best(logs: &[f64], count: usize) -> Vec<ScoredToken> {
    let scored = |(token, log): (u32, &f64)| ScoredToken {
        token,
        log_probability: *log,
    };
    let mut best: Vec<ScoredToken> = (0..).zip(logs).map(scored).collect();
    let order = |a: &ScoredToken, b: &ScoredToken| {
        let larger = b.log_probability.total_cmp(&a.log_probability);
        larger.then(a.token.cmp(&b.token))
    };
    if count > 0 && count < best.len() {
        best.select_nth_unstable_by(count - 1, order);
    }
    best.truncate(count);
    best.sort_unstable_by(order);
    best
}

/// Log-probabilities `scores − ln Σ e^scores`.
pub(super) fn log_softmax(scores: &[f32]) -> Vec<f64> {
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let relative = |score: &f32| f64::from(*score) - f64::from(max);
    let total: f64 = scores.iter().map(|score| relative(score).exp()).sum();
    let total = total.ln();
    scores.iter().map(|score| relative(score) - total).collect()
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
    fn damaged_logits_are_no_distribution() {
        assert!(is_distribution(&[f32::NEG_INFINITY, 0.0]));
        for bad in [f32::NAN, f32::INFINITY] {
            assert!(!is_distribution(&[0.0, bad]));
        }
        assert!(!is_distribution(&[f32::NEG_INFINITY; 2]));
        assert!(!is_distribution(&[]));
    }
}
