//! What is random repeats with its seed. Backends have one random state for the whole process, so this is a
//! test program of its own.

mod common;

use std::sync::{Mutex, PoisonError};

use burn::tensor::TensorData;
use common::{VOCAB, batch, tokens};
use mtla_core::{attention::AttentionConfig, backend_tests, ops::AttentionBackend};
use mtla_models::decoder::{Decoder, DecoderConfig, DecoderInput};

/// Backends of one family share their random state.
static ALONE: Mutex<()> = Mutex::new(());

fn logits<B: AttentionBackend>(
    model: &Decoder<B>,
    seed: Option<u64>,
    device: &B::Device,
) -> TensorData {
    let input = DecoderInput::new(batch(&[tokens(9, 0), tokens(9, 1)], 0, device));
    model.forward(input.with_dropout_seed(seed)).into_data()
}

fn the_same_seed_gives_the_same_weights<B: AttentionBackend>(device: &B::Device) {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let config = DecoderConfig::new(VOCAB, 2, AttentionConfig::mtla(16, 4));
    let [first, again, other] = [1, 1, 2].map(|seed| {
        B::seed(device, seed);
        let model = config.init::<B>(device).unwrap();
        B::seed(device, 0);
        logits(&model, None, device)
    });
    assert_eq!(first, again);
    assert_ne!(first, other);
}

fn the_same_seed_drops_the_same<B: AttentionBackend>(device: &B::Device) {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let attention = AttentionConfig::mtla(16, 4);
    let none = DecoderConfig::new(VOCAB, 2, attention.clone());
    let activations = none.clone().with_dropout(0.3);
    let weights = DecoderConfig::new(VOCAB, 2, attention.with_dropout(0.3));
    for (config, drops) in [(none, false), (activations, true), (weights, true)] {
        let model = config.init::<B>(device).unwrap();
        let [whole, first, again, other] =
            [None, Some(1), Some(1), Some(2)].map(|seed| logits(&model, seed, device));
        assert_eq!(first, again, "{config:?}");
        assert_eq!(first != whole, drops, "{config:?}");
        assert_eq!(first != other, drops, "{config:?}");
    }
}

backend_tests!(
    the_same_seed_gives_the_same_weights,
    the_same_seed_drops_the_same
);
