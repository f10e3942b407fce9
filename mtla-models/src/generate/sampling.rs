//! From logits to a token, on the host.

use std::cmp::Ordering;

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng, SeedableRng},
};

/// How a token is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum SamplingStrategy {
    /// The most probable token; of equally probable ones the first.
    Greedy,
    /// A random token of `softmax(logits / temperature)`, cut to its most probable tokens.
    Sample {
        /// Above 1 flattens the distribution, below 1 sharpens it.
        temperature: f64,
        /// Keeps this many most probable tokens.
        top_k: Option<usize>,
        /// Then keeps the fewest most probable tokens whose probabilities (of those left) add up to at
        /// least this (nucleus sampling, Holtzman et al. 2020).
        top_p: Option<f64>,
    },
}

/// A token that may be chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Candidate {
    /// The token.
    pub token: u32,
    /// Its probability among the candidates.
    pub probability: f64,
}

impl SamplingStrategy {
    /// The tokens that may be chosen, by ascending id, with probabilities that add up to 1; `None` if the
    /// logits are no distribution (a NaN, `+∞`, or nothing but `−∞`).
    ///
    /// ```
    /// use mtla_models::generate::SamplingStrategy;
    ///
    /// let strategy = SamplingStrategy::Sample { temperature: 1.0, top_k: Some(2), top_p: None };
    /// let logits = [3f32.ln(), 0.5f32.ln(), 1f32.ln()];
    /// let candidates = strategy.candidates(&logits).unwrap();
    /// assert_eq!(candidates.iter().map(|c| c.token).collect::<Vec<_>>(), [0, 2]);
    /// assert!((candidates[0].probability - 0.75).abs() < 1e-6);
    /// ```
    pub fn candidates(&self, logits: &[f32]) -> Option<Vec<Candidate>> {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        if !max.is_finite() || logits.iter().any(|x| x.is_nan()) {
            return None;
        }
        let (temperature, top_k, top_p) = match *self {
            Self::Greedy => (1.0, Some(1), None),
            Self::Sample {
                temperature,
                top_k,
                top_p,
            } => (temperature, top_k, top_p),
        };
        // Not normalised before the end: "probability" is relative until then.
        let mut candidates: Vec<Candidate> = (0..)
            .zip(logits)
            .map(|(token, logit)| Candidate {
                token,
                probability: (f64::from(logit - max) / temperature).exp(),
            })
            .filter(|candidate| candidate.probability > 0.0)
            .collect();
        if let Some(k) = top_k.filter(|k| (1..candidates.len()).contains(k)) {
            candidates.select_nth_unstable_by(k - 1, more_probable);
            candidates.truncate(k);
        }
        if let Some(p) = top_p.filter(|p| *p < 1.0) {
            keep_nucleus(&mut candidates, p);
        }
        // By id, so that rounding which swaps two close candidates does not shift the draw of the others.
        candidates.sort_unstable_by_key(|candidate| candidate.token);
        let total: f64 = candidates
            .iter()
            .map(|candidate| candidate.probability)
            .sum();
        for candidate in &mut candidates {
            candidate.probability /= total;
        }
        Some(candidates)
    }

    /// The token that a uniform random number `draw` in `[0, 1)` chooses; `None` as in
    /// [`candidates`](Self::candidates).
    pub fn choose(&self, logits: &[f32], draw: f64) -> Option<u32> {
        let candidates = self.candidates(logits)?;
        let mut reached = 0.0;
        let chosen = candidates.iter().find(|candidate| {
            reached += candidate.probability;
            draw < reached
        });
        // Rounding may leave the sum a little below 1.
        chosen
            .or(candidates.last())
            .map(|candidate| candidate.token)
    }
}

/// Cuts to the fewest most probable candidates that have at least the share `p` of the whole.
fn keep_nucleus(candidates: &mut Vec<Candidate>, p: f64) {
    candidates.sort_unstable_by(more_probable);
    let total: f64 = candidates
        .iter()
        .map(|candidate| candidate.probability)
        .sum();
    let mut reached = 0.0;
    let kept = candidates.iter().take_while(|candidate| {
        let wanted = reached < p * total;
        reached += candidate.probability;
        wanted
    });
    let kept = kept.count();
    candidates.truncate(kept);
}

fn more_probable(a: &Candidate, b: &Candidate) -> Ordering {
    let probable = b.probability.total_cmp(&a.probability);
    probable.then(a.token.cmp(&b.token))
}

/// The uniform random number in `[0, 1)` that the `step`-th token of a sample is chosen with: the first
/// output of the `ChaCha8` generator keyed with these four numbers.
pub fn uniform(seed: u64, prompt: u64, sample: u64, step: u64) -> f64 {
    let mut key = [0; 32];
    for (bytes, number) in key.chunks_exact_mut(8).zip([seed, prompt, sample, step]) {
        bytes.copy_from_slice(&number.to_le_bytes());
    }
    let bits = ChaCha8Rng::from_seed(key).next_u64() >> 11;
    bits as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Logits of the probabilities 0.4, 0.05, 0.3, 0.05, 0.2.
    fn logits() -> [f32; 5] {
        [0.4, 0.05, 0.3, 0.05, 0.2].map(f32::ln)
    }

    fn sample(temperature: f64, top_k: Option<usize>, top_p: Option<f64>) -> SamplingStrategy {
        SamplingStrategy::Sample {
            temperature,
            top_k,
            top_p,
        }
    }

    #[track_caller]
    fn assert_candidates(strategy: SamplingStrategy, expected: &[(u32, f64)]) {
        let found = strategy.candidates(&logits()).unwrap();
        assert_eq!(found.len(), expected.len(), "{found:?}");
        for (found, (token, probability)) in found.iter().zip(expected) {
            assert_eq!(found.token, *token);
            assert!(
                (found.probability - probability).abs() < 1e-6,
                "{found:?}, not {probability}"
            );
        }
    }

    #[test]
    fn cuts_keep_the_most_probable_tokens() {
        let all = [(0, 0.4), (1, 0.05), (2, 0.3), (3, 0.05), (4, 0.2)];
        assert_candidates(sample(1.0, None, None), &all);
        assert_candidates(sample(1.0, Some(9), Some(1.0)), &all);
        assert_candidates(SamplingStrategy::Greedy, &[(0, 1.0)]);
        assert_candidates(
            sample(1.0, Some(2), None),
            &[(0, 4.0 / 7.0), (2, 3.0 / 7.0)],
        );
        // Of two equally probable tokens the first stays.
        let first_four = [
            (0, 8.0 / 19.0),
            (1, 1.0 / 19.0),
            (2, 6.0 / 19.0),
            (4, 4.0 / 19.0),
        ];
        assert_candidates(sample(1.0, Some(4), None), &first_four);
        // 0.4 + 0.3 does not reach 0.75, with 0.2 it does.
        let nucleus = [(0, 4.0 / 9.0), (2, 3.0 / 9.0), (4, 2.0 / 9.0)];
        assert_candidates(sample(1.0, None, Some(0.75)), &nucleus);
        assert_candidates(sample(1.0, None, Some(1e-9)), &[(0, 1.0)]);
        // Among the first two, 4/7 is less than 0.6, although 0.4 + 0.3 is more.
        assert_candidates(
            sample(1.0, Some(2), Some(0.6)),
            &[(0, 4.0 / 7.0), (2, 3.0 / 7.0)],
        );
        assert_candidates(sample(1.0, Some(2), Some(0.55)), &[(0, 1.0)]);
    }

    #[test]
    fn temperature_is_a_power_of_the_probabilities() {
        // Squares of 0.4, 0.3, 0.2 add up to 0.29.
        let expected = [(0, 16.0 / 29.0), (2, 9.0 / 29.0), (4, 4.0 / 29.0)];
        assert_candidates(sample(0.5, Some(3), None), &expected);
    }

    #[test]
    fn tokens_come_as_often_as_is_probable() {
        let strategy = sample(1.0, None, Some(0.85));
        let expected = [4.0 / 9.0, 0.0, 3.0 / 9.0, 0.0, 2.0 / 9.0];
        let draws = 9_000;
        let mut counts = [0.0; 5];
        for step in 0..draws {
            let token = strategy.choose(&logits(), uniform(7, 0, 0, step)).unwrap();
            counts[token as usize] += 1.0;
        }
        assert!(counts[1] == 0.0 && counts[3] == 0.0, "{counts:?}");
        let chi_square: f64 = [0, 2, 4]
            .map(|i: usize| {
                let mean = expected[i] * draws as f64;
                (counts[i] - mean).powi(2) / mean
            })
            .iter()
            .sum();
        // The 0.999 quantile for two degrees of freedom.
        assert!(chi_square < 13.8, "χ² = {chi_square}");
    }

    #[test]
    fn a_draw_falls_into_the_interval_of_its_token() {
        let strategy = sample(1.0, None, None);
        let chosen = [0.0, 0.39, 0.41, 0.46, 0.74, 0.76, 0.81, 0.999_999_999]
            .map(|draw| strategy.choose(&logits(), draw).unwrap());
        assert_eq!(chosen, [0, 0, 1, 2, 2, 3, 4, 4]);
    }

    #[test]
    fn impossible_tokens_are_never_chosen_and_impossible_logits_are_refused() {
        let strategy = sample(1.0, None, None);
        let masked = [f32::NEG_INFINITY, 0.0, f32::NEG_INFINITY];
        assert_eq!(strategy.choose(&masked, 0.0), Some(1));
        assert_eq!(strategy.choose(&masked, 0.999), Some(1));
        for bad in [f32::NAN, f32::INFINITY] {
            assert_eq!(strategy.choose(&[0.0, bad], 0.5), None);
        }
        assert_eq!(strategy.choose(&[f32::NEG_INFINITY; 2], 0.5), None);
        assert_eq!(strategy.choose(&[], 0.5), None);
    }

    #[test]
    fn each_of_the_four_numbers_changes_the_draw() {
        let draw = uniform(1, 2, 3, 4);
        assert!((0.0..1.0).contains(&draw));
        assert_eq!(draw.to_bits(), uniform(1, 2, 3, 4).to_bits());
        let others = [
            uniform(2, 2, 3, 4),
            uniform(1, 3, 3, 4),
            uniform(1, 2, 4, 4),
            uniform(1, 2, 3, 5),
        ];
        assert!(others.iter().all(|other| other.to_bits() != draw.to_bits()));
    }
}
