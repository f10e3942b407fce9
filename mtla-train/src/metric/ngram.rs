//! N-gram language models with interpolated modified Kneser-Ney smoothing: what a neural language
//! model has to beat.
//!
//! An n-gram model predicts a token from the `n - 1` tokens before it and from nothing else. Trained
//! on the same tokens as a neural model it says how much of a text lies in its local phrasing, and the
//! distance to it how much comes from a longer memory.
//!
//! The smoothing is that of Chen and Goodman, *An Empirical Study of Smoothing Techniques for Language
//! Modeling* (1998), the default of the common toolkits. With `h` the context, `h'` the context
//! without its oldest token, and `c` the count of an n-gram,
//!
//! ```text
//! p(w | h) = max(c(h w) - D(c(h w)), 0) / sum_w c(h w)  +  backoff(h) · p(w | h')
//! ```
//!
//! where `backoff(h)` is the mass that the discounts `D` took away, the last stage is the uniform
//! distribution over the vocabulary, and below the highest order a "count" is the number of different
//! tokens that precede the n-gram. Each document begins with a mark that is never predicted itself, so
//! that contexts do not reach across documents.
//!
//! An n-gram is stored as one integer, its newest token in the lowest bits: sorting then brings equal
//! n-grams together, and the continuations of a context next to each other.

/// An n-gram model over the token ids `0..vocab_size`; order 1 is a smoothed unigram model.
///
/// It gives a proper distribution after any context: every token has a probability above zero, and
/// together they have 1. Training takes about 16 bytes for each token of the text, and the model about
/// 60 bytes for each different n-gram.
///
/// # Example
///
/// ```
/// use mtla_train::metric::ngram::NgramModel;
///
/// let text = vec![vec![0, 1, 2, 0, 1, 2, 0, 1, 2]];
/// let model = NgramModel::train(3, &text, 4);
/// assert!(model.log_prob(&[0, 1], 2) > model.log_prob(&[0, 1], 0));
/// assert!(model.perplexity(&text) < NgramModel::train(1, &text, 4).perplexity(&text));
/// ```
#[derive(Debug, Clone)]
pub struct NgramModel {
    /// `levels[k]` holds the n-grams of `k + 1` tokens.
    levels: Vec<Level>,
    packing: Packing,
}

/// How tokens are packed into one integer.
#[derive(Debug, Clone, Copy)]
struct Packing {
    bits: u32,
    /// The id that marks the start of a document, the first after those of the vocabulary.
    start: u32,
}

impl Packing {
    fn push(self, ngram: u128, token: u32) -> u128 {
        (ngram << self.bits) | u128::from(token)
    }

    /// The newest `count` tokens.
    fn newest(self, ngram: u128, count: usize) -> u128 {
        ngram & !(u128::MAX.checked_shl(self.bits * count as u32).unwrap_or(0))
    }

    fn context(self, ngram: u128) -> u128 {
        ngram >> self.bits
    }
}

/// The n-grams of one order.
#[derive(Debug, Clone)]
struct Level {
    discounts: Discounts,
    /// Sorted by n-gram.
    counts: Vec<(u128, u32)>,
    /// Sorted by the first field, which is the n-gram without its newest token.
    contexts: Vec<(u128, Continuations)>,
}

/// What followed a context.
#[derive(Debug, Clone, Copy)]
struct Continuations {
    total: f64,
    backoff: f64,
}

/// What is taken off the counts 1, 2, and all above.
#[derive(Debug, Clone, Copy)]
struct Discounts([f64; 3]);

impl Discounts {
    /// Chen and Goodman's estimates from how many n-grams were counted once, twice, and so on. Where
    /// a text is so small or so regular that there is no estimate, or none above zero, which would
    /// leave nothing for what was not seen, half the count stands in.
    fn estimate(counts: &[(u128, u32)]) -> Self {
        let mut n = [0.0; 5];
        for &(_, count) in counts {
            if let Some(n) = n.get_mut(count as usize) {
                *n += 1.0;
            }
        }
        let y = n[1] / (n[1] + 2.0 * n[2]);
        Self([1, 2, 3].map(|count: u8| {
            let [once, more] = [usize::from(count), usize::from(count) + 1].map(|c| n[c]);
            let estimate = f64::from(count) - f64::from(count + 1) * y * more / once;
            if more > 0.0 && estimate > 0.0 {
                estimate
            } else {
                f64::from(count) / 2.0
            }
        }))
    }

    fn of(self, count: u32) -> f64 {
        self.0[count.clamp(1, 3) as usize - 1]
    }
}

impl NgramModel {
    /// Counts the n-grams of up to `order` tokens in `sequences`, each of which is a document.
    ///
    /// # Panics
    ///
    /// If `order` or `vocab_size` is 0, if a token is not below `vocab_size`, or if `order` tokens of
    /// this vocabulary do not fit in 128 bits (5 tokens do up to a vocabulary of 33 million).
    pub fn train(order: usize, sequences: &[Vec<u32>], vocab_size: usize) -> Self {
        assert!(order > 0, "an n-gram has at least one token");
        assert!(vocab_size > 0, "a vocabulary has at least one token");
        let start = u32::try_from(vocab_size).expect("token ids are 32-bit numbers");
        let packing = Packing {
            bits: u32::BITS - start.leading_zeros(),
            start,
        };
        assert!(
            packing.bits as usize * order <= u128::BITS as usize,
            "{order} tokens of a vocabulary of {vocab_size} do not fit in 128 bits"
        );
        for &token in sequences.iter().flatten() {
            assert!(
                token < start,
                "token {token} in a vocabulary of {vocab_size}"
            );
        }

        let mut levels = vec![Level::new(packing.all(order, sequences), packing)];
        for length in (1..order).rev() {
            let longer = &levels.last().expect("the highest order is there").counts;
            let mut ngrams: Vec<u128> = longer
                .iter()
                .map(|&(ngram, _)| packing.newest(ngram, length))
                .collect();
            ngrams.extend(packing.openings(length, sequences));
            levels.push(Level::new(ngrams, packing));
        }
        levels.reverse();
        Self { levels, packing }
    }

    /// The natural logarithm of the probability of `token` after `context`, the tokens before it in
    /// its document; only the last `order - 1` of them are looked at. A shorter context is taken to
    /// begin where the document begins.
    ///
    /// # Panics
    ///
    /// If a token is not in the vocabulary.
    pub fn log_prob(&self, context: &[u32], token: u32) -> f64 {
        let history = self.levels.len() - 1;
        let known = context.len().min(history);
        let recent = &context[context.len() - known..];
        for &token in recent.iter().chain([&token]) {
            assert!(
                token < self.packing.start,
                "token {token} is not in the vocabulary"
            );
        }
        let opens = known < history;
        let mut ngram = if opens {
            u128::from(self.packing.start)
        } else {
            0
        };
        for &token in recent.iter().chain([&token]) {
            ngram = self.packing.push(ngram, token);
        }

        let uniform = 1.0 / f64::from(self.packing.start);
        let longest = known + usize::from(opens);
        self.levels[..=longest]
            .iter()
            .enumerate()
            .fold(uniform, |shorter, (level, ngrams)| {
                ngrams.interpolate(self.packing.newest(ngram, level + 1), self.packing, shorter)
            })
            .ln()
    }

    /// The perplexity of documents: e to the mean of `-log_prob` over all their tokens. Not a number
    /// where there are no tokens.
    ///
    /// # Panics
    ///
    /// If a token is not in the vocabulary.
    pub fn perplexity(&self, sequences: &[Vec<u32>]) -> f64 {
        let tokens: usize = sequences.iter().map(Vec::len).sum();
        let log_prob: f64 = sequences
            .iter()
            .flat_map(|sequence| (0..sequence.len()).map(move |t| (&sequence[..t], sequence[t])))
            .map(|(context, token)| self.log_prob(context, token))
            .sum();
        (-log_prob / tokens as f64).exp()
    }
}

impl Packing {
    /// Every run of `length` tokens, with the mark of its document's start where it begins there.
    fn all(self, length: usize, sequences: &[Vec<u32>]) -> Vec<u128> {
        let mut ngrams = Vec::with_capacity(sequences.iter().map(Vec::len).sum());
        for sequence in sequences {
            let mut ngram = u128::from(self.start);
            for (position, &token) in sequence.iter().enumerate() {
                ngram = self.newest(self.push(ngram, token), length);
                // The mark and `position + 1` tokens have been read.
                if position + 2 >= length {
                    ngrams.push(ngram);
                }
            }
        }
        ngrams
    }

    /// The n-grams of `length` tokens that begin with the mark of the start. Nothing ever precedes
    /// them, so they are counted as they occur.
    fn openings(self, length: usize, sequences: &[Vec<u32>]) -> impl Iterator<Item = u128> {
        sequences
            .iter()
            .filter_map(move |sequence| sequence.get(..length - 1))
            .filter(|opening| !opening.is_empty())
            .map(move |opening| {
                let start = u128::from(self.start);
                opening
                    .iter()
                    .fold(start, |ngram, &token| self.push(ngram, token))
            })
    }
}

impl Level {
    /// Counts n-grams, each given as often as it counts.
    fn new(mut ngrams: Vec<u128>, packing: Packing) -> Self {
        ngrams.sort_unstable();
        let counts: Vec<(u128, u32)> = ngrams
            .chunk_by(|a, b| a == b)
            .map(|run| (run[0], u32::try_from(run.len()).unwrap_or(u32::MAX)))
            .collect();
        let discounts = Discounts::estimate(&counts);
        let contexts = counts
            .chunk_by(|a, b| packing.context(a.0) == packing.context(b.0))
            .map(|run| {
                let total: f64 = run.iter().map(|&(_, count)| f64::from(count)).sum();
                let taken: f64 = run.iter().map(|&(_, count)| discounts.of(count)).sum();
                let backoff = taken / total;
                (packing.context(run[0].0), Continuations { total, backoff })
            })
            .collect();
        Self {
            discounts,
            counts,
            contexts,
        }
    }

    /// The probability of an n-gram's newest token, given that of the order below.
    fn interpolate(&self, ngram: u128, packing: Packing, shorter: f64) -> f64 {
        let Some(after) = find(&self.contexts, packing.context(ngram)) else {
            return shorter;
        };
        let seen = find(&self.counts, ngram).map_or(0.0, |count| {
            (f64::from(count) - self.discounts.of(count)) / after.total
        });
        seen + after.backoff * shorter
    }
}

/// Looks a key up in a table that is sorted by it.
fn find<T: Copy>(table: &[(u128, T)], key: u128) -> Option<T> {
    let place = table.binary_search_by_key(&key, |&(key, _)| key).ok()?;
    Some(table[place].1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    const VOCABULARY: usize = 12;

    /// Documents in which each token mostly follows from the one before.
    fn text(seed: u64, documents: usize) -> Vec<Vec<u32>> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        (0..documents)
            .map(|_| {
                let length = rng.random_range(0..40);
                let mut token = 0;
                let mut next = || {
                    let jump = if rng.random_bool(0.8) {
                        3
                    } else {
                        rng.random_range(0..10)
                    };
                    token = (token * 2 + jump) % 10;
                    token
                };
                (0..length).map(|_| next()).collect()
            })
            .collect()
    }

    fn close(a: f64, b: f64) {
        assert!((a - b).abs() < 1e-12, "{a} is not {b}");
    }

    #[test]
    fn probabilities_after_any_context_sum_to_one() {
        let text = text(1, 60);
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        for order in 1..=6 {
            let model = NgramModel::train(order, &text, VOCABULARY);
            for _ in 0..200 {
                // Seen contexts, unseen ones, and the beginnings of documents.
                let length = rng.random_range(0..8);
                let context: Vec<u32> = if rng.random_bool(0.5) {
                    (0..length)
                        .map(|_| rng.random_range(0..VOCABULARY as u32))
                        .collect()
                } else {
                    let document = &text[rng.random_range(0..text.len())];
                    document[..length.min(document.len())].to_vec()
                };
                let all: Vec<f64> = (0..VOCABULARY as u32)
                    .map(|t| model.log_prob(&context, t).exp())
                    .collect();
                assert!(all.iter().all(|&p| p > 0.0), "{order} {context:?} {all:?}");
                close(all.iter().sum(), 1.0);
            }
        }
    }

    #[test]
    fn a_small_model_is_as_reckoned_by_hand() {
        // The bigrams are ^0 (twice), 00 and 01, where ^ is the start; so n1 = 2, n2 = 1, and the
        // discounts are 0.5 for a count of 1, and for want of an estimate 1 for a count of 2.
        let model = NgramModel::train(2, &[vec![0, 0, 1], vec![0]], 3);
        // 0 is preceded by ^ and by 0, and 1 by 0: the unigrams count 2 and 1, so n1 = n2 = 1, and
        // the discount for a count of 1 is 1 - 2 · 1/3.
        let left = (1.0 + 1.0 / 3.0) / 3.0 / 3.0;
        let unigram = [
            (2.0 - 1.0) / 3.0 + left,
            (1.0 - 1.0 / 3.0) / 3.0 + left,
            left,
        ];
        close(unigram.iter().sum(), 1.0);
        let after_0 = |seen: f64, token: usize| seen + 1.0 / 2.0 * unigram[token];
        close(model.log_prob(&[0], 0).exp(), after_0(0.25, 0));
        close(model.log_prob(&[0], 1).exp(), after_0(0.25, 1));
        close(model.log_prob(&[0], 2).exp(), after_0(0.0, 2));
        // ^0 was counted twice, and is all that follows ^.
        close(
            model.log_prob(&[], 0).exp(),
            (2.0 - 1.0) / 2.0 + 1.0 / 2.0 * unigram[0],
        );
        // Nothing follows 2.
        close(model.log_prob(&[2], 1).exp(), unigram[1]);
    }

    #[test]
    fn estimated_discounts_are_those_of_chen_and_goodman() {
        let counts = |of: &[(u32, usize)]| -> Vec<(u128, u32)> {
            of.iter()
                .flat_map(|&(count, times)| vec![(0, count); times])
                .collect()
        };
        let Discounts(d) = Discounts::estimate(&counts(&[(1, 100), (2, 50), (3, 30), (4, 20)]));
        let y = 100.0 / 200.0;
        close(d[0], 1.0 - 2.0 * y * 50.0 / 100.0);
        close(d[1], 2.0 - 3.0 * y * 30.0 / 50.0);
        close(d[2], 3.0 - 4.0 * y * 20.0 / 30.0);
        assert_eq!(
            Discounts::estimate(&counts(&[(1, 3), (2, 9)])).0[1..],
            [1.0, 1.5]
        );
    }

    #[test]
    fn longer_contexts_predict_text_better() {
        let (train, test) = (text(1, 400), text(2, 100));
        let [unigram, bigram] = [1, 2].map(|n| NgramModel::train(n, &train, VOCABULARY));
        assert!(bigram.perplexity(&test) < 0.7 * unigram.perplexity(&test));
        // Contexts beyond the last token say nothing here, and smoothing must not let them harm.
        let fivegram = NgramModel::train(5, &train, VOCABULARY);
        assert!(fivegram.perplexity(&test) < 1.1 * bigram.perplexity(&test));
    }

    #[test]
    fn random_tokens_are_as_perplexing_as_the_vocabulary_is_large() {
        let mut rng = ChaCha8Rng::seed_from_u64(4);
        let mut random = || {
            vec![
                (0..20_000)
                    .map(|_| rng.random_range(0..50))
                    .collect::<Vec<u32>>(),
            ]
        };
        let (train, test) = (random(), random());
        let perplexity = NgramModel::train(1, &train, 50).perplexity(&test);
        assert!((49.0..51.5).contains(&perplexity), "{perplexity}");
    }

    #[test]
    fn without_text_all_tokens_are_equally_likely() {
        let model = NgramModel::train(5, &[], 8);
        close(model.log_prob(&[1, 2, 3, 4, 5], 6), -(8f64.ln()));
        assert!(model.perplexity(&[vec![]]).is_nan());
    }

    #[test]
    fn contexts_end_where_documents_begin() {
        let model = NgramModel::train(3, &vec![vec![0, 1]; 20], 4);
        assert!(model.log_prob(&[], 0).exp() > 0.9);
        // Across documents 0 always follows 1.
        assert!(model.log_prob(&[0, 1], 0).exp() < 0.5);
    }

    #[test]
    #[should_panic(expected = "token 4 in a vocabulary of 4")]
    fn a_token_beyond_the_vocabulary_is_a_mistake() {
        NgramModel::train(2, &[vec![4]], 4);
    }
}
