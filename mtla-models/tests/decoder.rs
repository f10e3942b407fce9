//! The ways through a decoder agree, for every attention variant.

mod common;

use std::slice;

use burn::{
    module::Module,
    tensor::{Tensor, Tolerance, backend::Backend},
};
use common::{VOCAB, batch, configs, model, tokens};
use mtla_core::{attention::AttentionConfig, backend_tests, ops::AttentionBackend};
use mtla_models::{
    decoder::{DecoderConfig, DecoderInput, FeedForwardKind},
    generate::LanguageModel,
};

#[track_caller]
fn assert_close<B: Backend, const D: usize>(found: Tensor<B, D>, expected: Tensor<B, D>) {
    let tolerance = Tolerance::rel_abs(1e-3, 1e-4);
    found
        .into_data()
        .assert_approx_eq::<f32>(&expected.into_data(), tolerance);
}

/// The logits of one place of one row, `[1, vocab]`.
fn at<B: Backend>(logits: &Tensor<B, 3>, row: usize, place: usize) -> Tensor<B, 2> {
    logits
        .clone()
        .narrow(0, row, 1)
        .narrow(1, place, 1)
        .reshape([1, VOCAB])
}

fn prefill_and_steps_give_the_logits_of_forward<B: AttentionBackend>(device: &B::Device) {
    let rows = [tokens(12, 0), tokens(9, 1)];
    for config in configs() {
        let model = model::<B>(&config, device);
        let whole =
            model.forward(DecoderInput::new(batch(&rows, 0, device)).with_lengths(vec![12, 9]));
        let mut cache = model.new_cache();
        cache.join(2);
        let mut held = [0, 0];
        // Two pieces, ragged and with ends inside chunks, then tokens.
        for counts in [[5, 3], [3, 2]] {
            let pieces = [0, 1].map(|row| rows[row][held[row]..][..counts[row]].to_vec());
            let plan = cache.extend(&[0, 1], &counts);
            let logits = model.prefill(batch(&pieces, 0, device), &plan, &mut cache);
            for row in [0, 1] {
                held[row] += counts[row];
                let found = logits.clone().narrow(0, row, 1);
                assert_close(found, at(&whole, row, held[row] - 1));
            }
        }
        for _ in 0..4 {
            let next = [0, 1].map(|row| vec![rows[row][held[row]]]);
            let plan = cache.step(&[0, 1]);
            let next = batch::<B>(&next, 0, device).reshape([2]);
            let logits = model.step(next, &plan, &mut cache);
            for row in [0, 1] {
                held[row] += 1;
                let found = logits.clone().narrow(0, row, 1);
                assert_close(found, at(&whole, row, held[row] - 1));
            }
        }
    }
}

fn padding_and_later_tokens_have_no_influence<B: AttentionBackend>(device: &B::Device) {
    let rows = [tokens(11, 2), tokens(6, 3), tokens(1, 4)];
    for config in configs() {
        let model = model::<B>(&config, device);
        let whole =
            model.forward(DecoderInput::new(batch(&rows, 9, device)).with_lengths(vec![11, 6, 1]));
        for (number, row) in rows.iter().enumerate() {
            let alone = model.forward(DecoderInput::new(batch(slice::from_ref(row), 0, device)));
            let found = whole.clone().narrow(0, number, 1).narrow(1, 0, row.len());
            assert_close(found, alone);
        }
        let prefix = model.forward(DecoderInput::new(batch(
            &[rows[0][..7].to_vec()],
            0,
            device,
        )));
        assert_close(whole.narrow(0, 0, 1).narrow(1, 0, 7), prefix);
    }
}

fn clones_of_an_unused_model_are_equal<B: AttentionBackend>(device: &B::Device) {
    let config = DecoderConfig::new(VOCAB, 1, AttentionConfig::mtla(16, 4));
    let model = config.init::<B>(device).unwrap();
    let input = DecoderInput::new(batch(&[tokens(5, 0)], 0, device));
    assert_close(model.clone().forward(input.clone()), model.forward(input));
}

fn sizes_are_those_computed_by_hand<B: AttentionBackend>(device: &B::Device) {
    let (v, d, layers) = (VOCAB, 16, 2);
    let init = |config: DecoderConfig| config.init::<B>(device).unwrap();

    // Four projections, two of them to half of the heads; scale and shift of two norms; two matrices.
    let gqa = init(DecoderConfig::new(v, layers, AttentionConfig::gqa(d, 4, 2)));
    let layer = 2 * d * d + 2 * d * (d / 2) + 2 * 2 * d + 2 * d * (4 * d);
    assert_eq!(gqa.num_params(), v * d + layers * layer + 2 * d);
    // Keys and values of two heads of width 4, in 32 bits.
    assert!((gqa.cache_bytes_per_token() - (layers * 2 * 2 * 4 * 4) as f64).abs() < 1e-9);

    // Queries of 4 + 2, a latent of 16 with its norm and a rope key of 2, its expansion to 4 heads of
    // 4 + 4, the output, and a gate of two maps to 16 / 4 with bias.
    let mtla = init(
        DecoderConfig::new(v, layers, AttentionConfig::mtla(d, 4).with_down_rate(3))
            .with_feed_forward(FeedForwardKind::SwiGlu)
            .with_d_ff(10)
            .with_tied_embeddings(false),
    );
    let attention = d * 4 * (4 + 2) + d * (16 + 2) + 2 * 16 + 16 * 4 * 8 + d * d + 2 * (16 * 4 + 4);
    let layer = attention + 2 * 2 * d + 3 * d * 10;
    assert_eq!(mtla.num_params(), 2 * v * d + layers * layer + 2 * d);
    assert!((mtla.cache_bytes_per_token() - (layers * 18 * 4) as f64 / 3.0).abs() < 1e-9);

    let mut cache = mtla.new_cache();
    cache.join(1);
    cache.extend(&[0], &[12]);
    assert!((cache.live_bytes() as f64 - 12.0 * mtla.cache_bytes_per_token()).abs() < 1e-9);
}

backend_tests!(
    prefill_and_steps_give_the_logits_of_forward,
    padding_and_later_tokens_have_no_influence,
    clones_of_an_unused_model_are_equal,
    sizes_are_those_computed_by_hand,
);
