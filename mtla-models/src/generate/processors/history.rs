//! Processors that look at which tokens there have been.

use std::collections::BTreeSet;

use super::{LogitsProcessor, length::forbid};

/// Makes tokens that there have been less probable (more probable if the penalty is below 1): divides their
/// score where it is positive, and multiplies it where it is negative (Keskar et al. 2019).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RepetitionPenalty {
    /// Above 0; 1 changes nothing.
    pub penalty: f64,
}

impl LogitsProcessor for RepetitionPenalty {
    fn process(&self, tokens: &[u32], scores: &mut [f32]) {
        let penalty = self.penalty as f32;
        // Once a token, however often there has been one.
        for token in tokens.iter().collect::<BTreeSet<_>>() {
            let score = &mut scores[*token as usize];
            if *score < 0.0 {
                *score *= penalty;
            } else {
                *score /= penalty;
            }
        }
    }
}

/// Forbids a token that would end a sequence of `size` tokens that there has been.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NoRepeatNgram {
    /// Tokens of such a sequence, at least 1.
    pub size: usize,
}

impl LogitsProcessor for NoRepeatNgram {
    fn process(&self, tokens: &[u32], scores: &mut [f32]) {
        if tokens.len() < self.size {
            return;
        }
        let newest = &tokens[tokens.len() + 1 - self.size..];
        for ngram in tokens.windows(self.size) {
            let (last, before) = ngram.split_last().expect("at least one token");
            if before == newest {
                forbid(scores, &[*last]);
            }
        }
    }
}

/// Forbids token sequences.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadWords {
    words: Vec<Vec<u32>>,
}

impl BadWords {
    /// Forbids each of `words`, but never a token of `ends` as such.
    pub fn new(words: &[Vec<u32>], ends: &[u32]) -> Self {
        let forbidden = |word: &&Vec<u32>| !ends.iter().any(|end| word[..] == [*end]);
        Self {
            words: words.iter().filter(forbidden).cloned().collect(),
        }
    }
}

impl LogitsProcessor for BadWords {
    fn process(&self, tokens: &[u32], scores: &mut [f32]) {
        for word in &self.words {
            let Some((last, before)) = word.split_last() else {
                continue;
            };
            // A word of several tokens needs at least as many before it, as it does in the original.
            let fits = before.is_empty() || word.len() <= tokens.len();
            if fits && tokens.ends_with(before) {
                forbid(scores, &[*last]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tokens of four that are forbidden after `tokens`.
    fn forbidden(processor: &impl LogitsProcessor, tokens: &[u32]) -> Vec<usize> {
        let mut scores = [0.0; 4];
        processor.process(tokens, &mut scores);
        (0..4).filter(|i| scores[*i] == f32::NEG_INFINITY).collect()
    }

    #[test]
    fn ngrams_come_once() {
        let pairs = NoRepeatNgram { size: 2 };
        assert_eq!(forbidden(&pairs, &[]), [0; 0]);
        assert_eq!(forbidden(&pairs, &[1]), [0; 0]);
        assert_eq!(forbidden(&pairs, &[1, 1]), [1]);
        assert_eq!(forbidden(&pairs, &[1, 2, 1, 3, 1]), [2, 3]);
        assert_eq!(
            forbidden(&NoRepeatNgram { size: 3 }, &[1, 2, 3, 0, 1, 2]),
            [3]
        );
        assert_eq!(forbidden(&NoRepeatNgram { size: 1 }, &[3, 0]), [0, 3]);
    }

    #[test]
    fn words_are_forbidden_where_they_would_end() {
        let words = BadWords::new(&[vec![3], vec![1, 2], vec![0]], &[0]);
        assert_eq!(forbidden(&words, &[]), [3]);
        assert_eq!(forbidden(&words, &[0, 1]), [2, 3]);
        assert_eq!(forbidden(&words, &[1, 0]), [3]);
    }

    #[test]
    fn a_token_is_punished_once() {
        let mut scores = [4.0, -4.0, 1.0];
        RepetitionPenalty { penalty: 2.0 }.process(&[0, 1, 0, 0], &mut scores);
        assert_eq!(
            scores.map(f32::to_bits),
            [2.0f32, -8.0, 1.0].map(f32::to_bits)
        );
    }
}
