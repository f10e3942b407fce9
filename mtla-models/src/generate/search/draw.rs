//! Random choices that can be repeated.

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng, SeedableRng},
};

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

/// The token that a uniform random number `draw` in `[0, 1)` chooses from `softmax(scores)`; `None` if every
/// token is forbidden.
pub(super) fn sample(scores: &[f32], draw: f64) -> Option<u32> {
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if !max.is_finite() {
        return None;
    }
    // By token, so that rounding which swaps two close ones does not shift the draw of the others.
    let weights: Vec<f64> = scores
        .iter()
        .map(|score| (f64::from(*score) - f64::from(max)).exp())
        .collect();
    let wanted = draw * weights.iter().sum::<f64>();
    let mut reached = 0.0;
    let mut chosen = None;
    for (token, weight) in (0..).zip(weights) {
        if weight > 0.0 {
            // Rounding may leave the sum a little below what is wanted: then it is the last one.
            chosen = Some(token);
            reached += weight;
            if wanted < reached {
                break;
            }
        }
    }
    chosen
}

/// The token of the highest score, of equal ones the first; `None` if every token is forbidden.
pub(super) fn most_probable(scores: &[f32]) -> Option<u32> {
    let mut best: Option<(u32, f32)> = None;
    for (token, score) in (0..).zip(scores.iter().copied()) {
        if score > best.map_or(f32::NEG_INFINITY, |best| best.1) {
            best = Some((token, score));
        }
    }
    best.map(|best| best.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Logits of the probabilities 0.4, 0.05, 0.3, 0.05, 0.2.
    fn logits() -> [f32; 5] {
        [0.4, 0.05, 0.3, 0.05, 0.2].map(f32::ln)
    }

    #[test]
    fn tokens_come_as_often_as_is_probable() {
        let expected = [0.4, 0.05, 0.3, 0.05, 0.2];
        let draws = 9_000;
        let mut counts = [0.0; 5];
        for step in 0..draws {
            let token = sample(&logits(), uniform(7, 0, 0, step)).unwrap();
            counts[token as usize] += 1.0;
        }
        let chi_square: f64 = counts
            .iter()
            .zip(expected)
            .map(|(count, probability)| {
                let mean = probability * draws as f64;
                (count - mean).powi(2) / mean
            })
            .sum();
        // The 0.999 quantile for four degrees of freedom.
        assert!(chi_square < 18.5, "χ² = {chi_square}");
    }

    #[test]
    fn a_draw_falls_into_the_interval_of_its_token() {
        let chosen = [0.0, 0.39, 0.41, 0.46, 0.74, 0.76, 0.81, 0.999_999_999]
            .map(|draw| sample(&logits(), draw).unwrap());
        assert_eq!(chosen, [0, 0, 1, 2, 2, 3, 4, 4]);
    }

    #[test]
    fn forbidden_tokens_are_never_chosen() {
        let masked = [f32::NEG_INFINITY, 0.0, f32::NEG_INFINITY];
        assert_eq!(sample(&masked, 0.0), Some(1));
        assert_eq!(sample(&masked, 0.999), Some(1));
        assert_eq!(most_probable(&masked), Some(1));
        assert_eq!(most_probable(&[1.0, 2.0, 2.0]), Some(1));
        for nothing in [&[f32::NEG_INFINITY; 2][..], &[]] {
            assert_eq!(sample(nothing, 0.5), None);
            assert_eq!(most_probable(nothing), None);
        }
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
