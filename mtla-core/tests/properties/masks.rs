//! Attention weights and the caller's masks.

use burn::tensor::{Bool, DType, Tensor, TensorData};
use mtla_core::{attention::AttentionInput, backend_tests, ops::AttentionBackend};
use proptest::{collection::vec, prelude::any};

use crate::common::{
    Numbers, Tokens, check,
    layer::{Layer, any_attention},
    longest,
    oracle::{Question, visible},
    padded, rows_of, values,
};

backend_tests!(
    weights_are_those_of_the_visible_tokens,
    masks_add_to_the_scores,
    a_query_without_any_key_stays_finite,
);

/// `[batch, heads, queries, keys]` as nested vectors.
fn nested<B: AttentionBackend>(weights: Tensor<B, 4>) -> Vec<Vec<Tokens>> {
    let [_, heads, queries, keys] = weights.dims();
    let flat = values(weights);
    let rows = flat.chunks(heads * queries * keys);
    rows.map(|row| {
        let heads = row.chunks(queries * keys);
        heads
            .map(|head| head.chunks(keys).map(<[f64]>::to_vec).collect())
            .collect()
    })
    .collect()
}

fn weights_are_those_of_the_visible_tokens<B: AttentionBackend>(device: &B::Device) {
    let shapes = (
        any_attention(),
        vec((0usize..8, 0usize..9), 1..4),
        any::<u64>(),
    );
    check(32, shapes, |(config, spans, seed)| {
        let layer = Layer::<B>::drawn(&config, seed, device);
        let mut numbers = Numbers::new(seed);
        let (offsets, lengths): (Vec<usize>, Vec<usize>) = spans.iter().copied().unzip();
        let totals: Vec<usize> = spans.iter().map(|(offset, n)| offset + n).collect();
        let (queries, keys) = (longest(&lengths).max(1), longest(&totals).max(1));
        let rows = numbers.rows(&totals, layer.d_model);
        let ends: Vec<Tokens> = rows
            .iter()
            .zip(&offsets)
            .map(|(row, offset)| row[*offset..].to_vec())
            .collect();
        let input = AttentionInput::new(layer.padded(&ends, queries))
            .with_keys(layer.padded(&rows, keys))
            .with_offsets(offsets.clone())
            .with_lengths(lengths.clone());
        let plain = rows_of(layer.module.forward(input.clone()).context);
        let output = layer.module.forward(input.with_weights());
        let weights = output.weights.expect("weights were asked for");
        assert_eq!(weights.dims()[2..], [queries, keys]);
        let (weights, context) = (nested(weights), rows_of(output.context));
        let tolerance = layer.precision.tolerance;
        for row in 0..rows.len() {
            let answer = layer
                .oracle
                .answer(&Question::new(&rows[row], &ends[row], offsets[row]));
            layer.assert_close(&context[row], &answer.outputs, "output beside weights");
            layer.assert_close(&plain[row], &answer.outputs, "output without weights");
            for (found, expected) in weights[row].iter().zip(&answer.weights) {
                for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
                    assert!(
                        (found.iter().sum::<f64>() - 1.0).abs() < tolerance,
                        "{found:?}"
                    );
                    for (j, weight) in found.iter().enumerate() {
                        let seen = j < totals[row] && visible(offsets[row] + i, j, layer.stride);
                        let truth = if seen { expected[j] } else { 0.0 };
                        assert!(
                            (weight - truth).abs() < tolerance,
                            "{i} to {j}: {weight} not {truth}"
                        );
                        assert!(
                            seen || *weight == 0.0,
                            "{i} to {j} is hidden and has {weight}"
                        );
                    }
                }
            }
        }
    });
}

/// Masks of one batch: `[1|batch][queries][keys]` to be added and `[batch][keys]` to be hidden.
#[derive(Debug)]
struct Masks {
    additive: Option<Vec<Tokens>>,
    padding: Option<Vec<Vec<bool>>>,
}

impl Masks {
    fn draw(uses: [bool; 3], [batch, queries, keys]: [usize; 3], numbers: &mut Numbers) -> Self {
        let [additive, one_for_all, padding] = uses;
        let mut mask = numbers.rows(&vec![queries; if one_for_all { 1 } else { batch }], keys);
        for entry in mask.iter_mut().flatten().flatten() {
            if numbers.below(4) == 0 {
                *entry = f64::NEG_INFINITY;
            }
        }
        let mut hide = |_| (0..keys).map(|_| numbers.below(3) == 0).collect();
        let hidden = (0..batch).map(&mut hide).collect();
        Self {
            additive: additive.then_some(mask),
            padding: padding.then_some(hidden),
        }
    }

    fn give<B: AttentionBackend>(
        &self,
        mut input: AttentionInput<B>,
        dtype: DType,
        device: &B::Device,
    ) -> AttentionInput<B> {
        if let Some(mask) = &self.additive {
            let shape = [mask[0].len(), mask[0][0].len()];
            input = input.with_mask(padded(mask, shape, dtype, device));
        }
        if let Some(hidden) = &self.padding {
            let data = TensorData::new(hidden.concat(), [hidden.len(), hidden[0].len()]);
            input = input.with_key_padding_mask(Tensor::from_data(data, device));
        }
        input
    }

    /// What is added to the score of query `i` and key `j` of `row`.
    fn bias(&self, row: usize, i: usize, j: usize) -> f64 {
        let added = |mask: &Vec<Tokens>| mask[row % mask.len()][i][j];
        let hidden = self.padding.as_ref().is_some_and(|hidden| hidden[row][j]);
        let padding = if hidden { f64::NEG_INFINITY } else { 0.0 };
        self.additive.as_ref().map_or(0.0, added) + padding
    }
}

fn masks_add_to_the_scores<B: AttentionBackend>(device: &B::Device) {
    let shapes = (any_attention(), 1usize..4, 0usize..6, 1usize..10);
    let uses = any::<[bool; 3]>();
    check(40, (shapes, uses, any::<u64>()), |(shapes, uses, seed)| {
        let (config, batch, offset, queries) = shapes;
        let layer = Layer::<B>::drawn(&config, seed, device);
        let mut numbers = Numbers::new(seed);
        let keys = offset + queries;
        let rows = numbers.rows(&vec![keys; batch], layer.d_model);
        let ends: Vec<Tokens> = rows.iter().map(|row| row[offset..].to_vec()).collect();
        let input =
            AttentionInput::new(layer.padded(&ends, queries)).with_keys(layer.padded(&rows, keys));
        let masks = Masks::draw(uses, [batch, queries, keys], &mut numbers);
        let input = masks.give(input, layer.precision.dtype, device);

        let output = layer.module.forward(input.with_weights());
        let (found, weights) = (rows_of(output.context), nested(output.weights.unwrap()));
        for row in 0..batch {
            let bias = |i: usize, j: usize| masks.bias(row, i, j);
            let question = Question {
                bias: &bias,
                ..Question::new(&rows[row], &ends[row], offset)
            };
            let answer = layer.oracle.answer(&question);
            for i in 0..queries {
                let mut seen = (0..keys).filter(|j| visible(offset + i, *j, layer.stride));
                if seen.all(|j| bias(i, j) == f64::NEG_INFINITY) {
                    // A query that sees nothing has no answer.
                    assert!(found[row][i].iter().all(|x| x.is_finite()));
                    continue;
                }
                let (found, expected) = (&found[row][i..=i], &answer.outputs[i..=i]);
                layer.assert_close(found, expected, "masked output");
                for (found, expected) in weights[row].iter().zip(&answer.weights) {
                    layer.assert_close(&found[i..=i], &expected[i..=i], "masked weights");
                }
            }
        }
    });
}

/// A row that is all padding must not poison a batch: its numbers mean nothing, but they are numbers.
fn a_query_without_any_key_stays_finite<B: AttentionBackend>(device: &B::Device) {
    check(
        12,
        (any_attention(), 1usize..7, any::<u64>()),
        |(config, tokens, seed)| {
            let layer = Layer::<B>::drawn(&config, seed, device);
            let rows = Numbers::new(seed).rows(&[tokens, tokens], layer.d_model);
            let hidden: Vec<bool> = (0..2 * tokens).map(|i| i < tokens).collect();
            let mask =
                Tensor::<B, 2, Bool>::from_data(TensorData::new(hidden, [2, tokens]), device);
            let input =
                AttentionInput::new(layer.padded(&rows, tokens)).with_key_padding_mask(mask);
            let found = rows_of(layer.module.forward(input).context);
            assert!(found[0].iter().flatten().all(|x| x.is_finite()));
            layer.assert_close(
                &found[1],
                &layer.oracle.row(&rows[1]),
                "the row without padding",
            );
            // The same by lengths.
            let input =
                AttentionInput::new(layer.padded(&rows, tokens)).with_lengths(vec![0, tokens]);
            let found = rows_of(layer.module.forward(input).context);
            assert!(found[0].iter().flatten().all(|x| x.is_finite()));
            layer.assert_close(
                &found[1],
                &layer.oracle.row(&rows[1]),
                "the row beside an empty one",
            );
        },
    );
}
