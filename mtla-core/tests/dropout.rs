//! Dropout of attention weights: nothing without a seed, one mask a seed, the same mask on every backend
//! (it is a pure function of the seed and of the weight's place), and the right mean.

mod common;

use common::{
    F32, Numbers, Tokens, check,
    layer::{Layer, any_attention},
    oracle::Question,
    rows_of,
};
use mtla_core::{
    attention::{AttentionConfig, AttentionInput},
    backend_tests,
    ops::{AttentionBackend, Dropout},
};
use proptest::{collection::vec, prelude::any};

backend_tests!(
    nothing_is_dropped_without_a_seed,
    a_seed_names_a_mask,
    the_mask_is_a_function_of_the_place,
    the_mean_is_kept,
);

fn forward<B: AttentionBackend>(
    layer: &Layer<B>,
    rows: &[Tokens],
    seed: Option<u64>,
) -> Vec<Tokens> {
    let tokens = rows[0].len();
    let input = AttentionInput::new(layer.padded(rows, tokens)).with_dropout_seed(seed);
    rows_of(layer.module.forward(input).context)
}

fn nothing_is_dropped_without_a_seed<B: AttentionBackend>(device: &B::Device) {
    check(
        12,
        (any_attention(), 1usize..9, any::<u64>()),
        |(config, tokens, seed)| {
            let layer =
                |dropout| Layer::<B>::new(&config.clone().with_dropout(dropout), seed, F32, device);
            let (without, with) = (layer(0.0), layer(0.4));
            let rows = Numbers::new(seed).rows(&[tokens, tokens], with.d_model);
            let plain = forward(&without, &rows, None);
            assert_eq!(forward(&with, &rows, None), plain, "no seed");
            assert_eq!(forward(&without, &rows, Some(seed)), plain, "probability 0");
            for (found, row) in plain.iter().zip(&rows) {
                with.assert_close(found, &with.oracle.row(row), "no dropout");
            }
        },
    );
}

fn a_seed_names_a_mask<B: AttentionBackend>(device: &B::Device) {
    check(12, (any_attention(), any::<u64>()), |(config, seed)| {
        let layer = Layer::<B>::new(&config.with_dropout(0.5), seed, F32, device);
        let rows = Numbers::new(seed).rows(&[9, 9], layer.d_model);
        let first = forward(&layer, &rows, Some(1));
        assert_eq!(forward(&layer, &rows, Some(1)), first, "the same seed");
        assert_ne!(forward(&layer, &rows, Some(2)), first, "another seed");
        assert_ne!(
            forward(&layer, &rows, Some(1 << 32)),
            first,
            "a seed that differs high up"
        );
        assert_ne!(forward(&layer, &rows, None), first, "no seed");
    });
}

fn the_mask_is_a_function_of_the_place<B: AttentionBackend>(device: &B::Device) {
    let shapes = (
        any_attention(),
        vec(0usize..10, 1..4),
        any::<u64>(),
        0usize..3,
    );
    check(32, shapes, |(config, lengths, seed, p)| {
        let dropout = Dropout {
            probability: [0.1, 0.5, 0.9][p],
            seed,
        };
        let config = config.with_dropout(dropout.probability);
        let layer = Layer::<B>::new(&config, seed, F32, device);
        let rows = Numbers::new(seed).rows(&lengths, layer.d_model);
        let tokens = common::longest(&lengths).max(1);
        let input = AttentionInput::new(layer.padded(&rows, tokens))
            .with_lengths(lengths.clone())
            .with_dropout_seed(Some(seed));
        let heads = match &config {
            AttentionConfig::Mha(c) | AttentionConfig::Mqa(c) => c.n_heads,
            AttentionConfig::Gqa { dense, .. } => dense.n_heads,
            AttentionConfig::Mla(c) | AttentionConfig::Mtla { latent: c, .. } => c.n_heads,
        };
        let (stride, columns) = (layer.stride, tokens / layer.stride);
        let plain = layer.module.forward(input.clone()).context;
        let beside_weights = layer.module.forward(input.with_weights()).context;
        let (plain, beside_weights) = (rows_of(plain), rows_of(beside_weights));
        for (b, row) in rows.iter().enumerate() {
            let kept = |h: usize, i: usize, j: usize| {
                // Chunk ends are columns; the running chunk stands after the last column.
                let column = if (j + 1).is_multiple_of(stride) {
                    j / stride
                } else {
                    columns
                };
                let line = (b * heads + h) * tokens + i;
                let keeps = dropout.keeps(line as u32, column as u32);
                if keeps {
                    1.0 / (1.0 - dropout.probability)
                } else {
                    0.0
                }
            };
            let question = Question {
                dropout: &kept,
                ..Question::new(row, row, 0)
            };
            let expected = layer.oracle.answer(&question).outputs;
            layer.assert_close(&plain[b], &expected, "dropout");
            layer.assert_close(&beside_weights[b], &expected, "dropout beside weights");
        }
    });
}

/// `E[mask] = 1`, so the mean of outputs over seeds is the output without dropout: within five standard
/// errors for every entry.
fn the_mean_is_kept<B: AttentionBackend>(device: &B::Device) {
    const SEEDS: u64 = 300;
    for config in [AttentionConfig::mha(8, 2), AttentionConfig::mtla(8, 2)] {
        let layer = Layer::<B>::new(&config.with_dropout(0.3), 1, F32, device);
        let rows = Numbers::new(2).rows(&[5], layer.d_model);
        let plain = forward(&layer, &rows, None)[0].concat();
        let samples: Vec<Vec<f64>> = (0..SEEDS)
            .map(|seed| forward(&layer, &rows, Some(seed))[0].concat())
            .collect();
        for (i, expected) in plain.iter().enumerate() {
            let n = SEEDS as f64;
            let mean = samples.iter().map(|y| y[i]).sum::<f64>() / n;
            let variance = samples.iter().map(|y| (y[i] - mean).powi(2)).sum::<f64>() / (n - 1.0);
            let bound = 5.0 * (variance / n).sqrt();
            assert!(variance > 0.0);
            assert!(
                (mean - expected).abs() < bound,
                "{mean} ± {bound}, expected {expected}"
            );
        }
    }
}
