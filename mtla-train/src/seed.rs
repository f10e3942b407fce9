//! One seed for a run, and from it an independent number for everything that is random.
//!
//! A run that is stopped and resumed must see the numbers of a run that was not. So nothing keeps a
//! generator alive from step to step: what epoch 3 or step 1041 needs is computed from the run's
//! seed and that number alone, by jumping into a `ChaCha8` stream.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::Rng;

/// What a derived seed is for; each has a stream of its own.
#[derive(Clone, Copy)]
pub(crate) enum Stream {
    /// The first values of the parameters.
    Init,
    /// The order of the data in an epoch.
    Epoch,
    /// Everything random in an optimizer step.
    Step,
    /// The batches accumulated in a step.
    Batch,
}

/// The `index`-th number of `stream` under `seed`.
pub(crate) fn derive(seed: u64, stream: Stream, index: usize) -> u64 {
    const WORDS_PER_NUMBER: u128 = 2;
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(stream as u64);
    rng.set_word_pos(WORDS_PER_NUMBER * index as u128);
    rng.next_u64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_stream_and_index_has_its_own_number() {
        let mut seen = std::collections::HashSet::new();
        for stream in [Stream::Init, Stream::Epoch, Stream::Step, Stream::Batch] {
            for index in 0..100 {
                assert!(seen.insert(derive(7, stream, index)));
                assert_ne!(derive(7, stream, index), derive(8, stream, index));
            }
        }
    }

    #[test]
    fn numbers_stay_what_they_were() {
        // A change here would break the resumption of every run under way.
        assert_eq!(derive(42, Stream::Step, 1000), 15_374_236_837_186_130_306);
    }
}
