//! Llamas in 16 bits, beyond the numbers of tokens that such numbers count exactly (256 in bf16, 2048 in f16).

#![cfg(all(feature = "files", feature = "flex"))]

mod common;

use burn::tensor::{DType, FloatDType, Tensor};
use burn_flex::{Flex, FlexDevice};
use common::{VOCAB, cached::cached_logits};
use mtla_models::{
    decoder::DecoderInput,
    llama::{Llama, LoadOptions},
};
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng, SeedableRng},
};

/// The root mean square of the last 40 tokens' logits.
fn size(logits: Tensor<Flex, 3>) -> f32 {
    let [_, tokens, _] = logits.dims();
    let last = logits.narrow(1, tokens - 40, 40);
    last.square().mean().sqrt().into_scalar()
}

/// Decoding one by one is as near to 32 bits as the whole sequence at once is, and every token has its place.
fn check(tokens: usize, down_rate: usize) {
    let config = common::llama().with_mtla(common::latent_sizes(), down_rate);
    let config = config.unwrap();
    let mut exact = Llama::<Flex>::new(config.clone(), &FlexDevice).unwrap();
    exact.decoder = common::model(&config.decoder().unwrap(), &FlexDevice);
    let folder = tempfile::tempdir().unwrap();
    exact.save_pretrained(folder.path()).unwrap();

    let mut random = ChaCha8Rng::seed_from_u64(tokens as u64);
    let row: Vec<u32> = (0..tokens)
        .map(|_| random.next_u32() % VOCAB as u32)
        .collect();
    let input = || DecoderInput::new(common::batch(std::slice::from_ref(&row), 0, &FlexDevice));
    let exact = exact.decoder.forward(input());
    for dtype in [DType::BF16, DType::F16] {
        let options = LoadOptions {
            dtype: Some(dtype),
            ..LoadOptions::default()
        };
        let half = Llama::<Flex>::from_pretrained_with(folder.path(), &options, &FlexDevice);
        let half = half.unwrap().decoder;
        let wide = |logits: Tensor<Flex, 3>| logits.cast(FloatDType::F32);
        let whole = size(wide(half.forward(input())) - exact.clone());
        let rows = [row.iter().map(|id| *id as usize).collect()];
        let (cached, cache) = cached_logits(&half, &rows, &[3]);
        assert_eq!(cached.dtype(), dtype);
        let cached = size(wide(cached) - exact.clone().narrow(1, 2, tokens - 2));
        println!("{dtype:?}, {tokens} tokens: whole off by {whole:.2e}, cached by {cached:.2e}");
        assert!(
            whole > 0.0 && cached < 2.0 * whole,
            "{dtype:?}: {cached} and {whole}"
        );
        assert!(cached < 0.1 * size(exact.clone()));
        assert_eq!(cache.len(0), tokens);
        assert_eq!(cache.row_slots(0).len(), tokens.div_ceil(down_rate));
    }
}

#[test]
fn three_hundred_tokens() {
    for down_rate in [1, 2, 3] {
        check(300, down_rate);
    }
}

#[test]
fn two_thousand_one_hundred_tokens() {
    check(2100, 2);
}
