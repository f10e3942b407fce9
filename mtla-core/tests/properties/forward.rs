//! Whole sequences: ragged batches, source prefixes as keys, positions of the caller's, rows alone.

use burn::tensor::DType;
use mtla_core::{
    attention::{AttentionConfig, AttentionInput},
    backend_tests,
    ops::AttentionBackend,
};
use proptest::{collection::vec, prelude::any, strategy::Strategy};

use crate::common::{
    F32, Numbers, Tokens, check,
    layer::{Layer, any_attention},
    longest,
    oracle::Question,
    rows_of,
};

backend_tests!(
    a_ragged_batch_is_every_row_alone,
    a_row_in_any_batch_is_the_row_alone,
    keys_may_start_before_the_queries,
    rotations_follow_the_given_positions,
);

#[derive(Debug, Clone)]
struct Ragged {
    config: AttentionConfig,
    lengths: Vec<usize>,
    /// Columns of padding beyond the longest row.
    extra: usize,
    seed: u64,
}

impl Ragged {
    /// The width of the padded batch.
    fn width(&self) -> usize {
        (longest(&self.lengths) + self.extra).max(1)
    }
}

fn ragged() -> impl Strategy<Value = Ragged> {
    (
        any_attention(),
        vec(0usize..14, 1..4),
        0usize..3,
        any::<u64>(),
    )
        .prop_map(|(config, lengths, extra, seed)| Ragged {
            config,
            lengths,
            extra,
            seed,
        })
}

fn a_ragged_batch_is_every_row_alone<B: AttentionBackend>(device: &B::Device) {
    check(64, ragged(), |case| {
        let layer = Layer::<B>::drawn(&case.config, case.seed, device);
        let rows = Numbers::new(case.seed).rows(&case.lengths, layer.d_model);
        let input = AttentionInput::new(layer.padded(&rows, case.width()));
        let output = layer
            .module
            .forward(input.with_lengths(case.lengths.clone()));
        assert!(output.weights.is_none(), "weights were not asked for");
        for (row, found) in rows.iter().zip(rows_of(output.context)) {
            layer.assert_close(&found, &layer.oracle.row(row), "forward");
        }
    });
}

fn a_row_in_any_batch_is_the_row_alone<B: AttentionBackend>(device: &B::Device) {
    check(24, ragged(), |case| {
        let layer = Layer::<B>::drawn(&case.config, case.seed, device);
        let rows = Numbers::new(case.seed).rows(&case.lengths, layer.d_model);
        let forward = |rows: &[Tokens], lengths: &[usize], width| {
            let input = AttentionInput::new(layer.padded(rows, width));
            rows_of(
                layer
                    .module
                    .forward(input.with_lengths(lengths.to_vec()))
                    .context,
            )
        };
        let together = forward(&rows, &case.lengths, case.width());
        for (row, found) in rows.iter().zip(together).filter(|(row, _)| !row.is_empty()) {
            let alone = forward(std::slice::from_ref(row), &[row.len()], row.len());
            layer.assert_close(&found, &alone[0], "in the batch and alone");
        }
    });
}

/// Rows of a prefix-as-keys batch: `offsets[b]` frames and then `lengths[b]` tokens, packed.
#[derive(Debug, Clone)]
struct Prefixed {
    ragged: Ragged,
    offsets: Vec<usize>,
}

fn prefixed() -> impl Strategy<Value = Prefixed> {
    (ragged(), vec(0usize..11, 3), any::<bool>()).prop_map(|(ragged, mut offsets, even)| {
        offsets.truncate(ragged.lengths.len());
        if even {
            let first = offsets[0];
            offsets.fill(first);
        }
        Prefixed { ragged, offsets }
    })
}

fn keys_may_start_before_the_queries<B: AttentionBackend>(device: &B::Device) {
    check(
        40,
        prefixed(),
        |Prefixed {
             ragged: case,
             offsets,
         }| {
            let layer = Layer::<B>::drawn(&case.config, case.seed, device);
            let mut numbers = Numbers::new(case.seed);
            let totals: Vec<usize> = offsets
                .iter()
                .zip(&case.lengths)
                .map(|(offset, n)| offset + n)
                .collect();
            let keys = numbers.rows(&totals, layer.d_model);
            // Queries need not be the key tokens that they stand at.
            let queries = numbers.rows(&case.lengths, layer.d_model);
            let input = AttentionInput::new(layer.padded(&queries, case.width()))
                .with_keys(layer.padded(&keys, longest(&totals).max(1) + case.extra))
                .with_offsets(offsets.clone())
                .with_lengths(case.lengths.clone());
            let found = rows_of(layer.module.forward(input).context);
            for (row, found) in found.iter().enumerate() {
                let question = Question::new(&keys[row], &queries[row], offsets[row]);
                let expected = layer.oracle.answer(&question).outputs;
                layer.assert_close(found, &expected, "prefix as keys");
            }
        },
    );
    check(
        16,
        prefixed(),
        |Prefixed {
             ragged: case,
             offsets,
         }| {
            // Without offsets the queries are the last keys, without lengths all are valid.
            let (offset, length) = (offsets[0], longest(&case.lengths).max(1));
            let layer = Layer::<B>::drawn(&case.config, case.seed, device);
            let keys = Numbers::new(case.seed).rows(&[offset + length; 2], layer.d_model);
            let queries: Vec<Tokens> = keys.iter().map(|row| row[offset..].to_vec()).collect();
            let input = AttentionInput::new(layer.padded(&queries, length))
                .with_keys(layer.padded(&keys, offset + length));
            let found = rows_of(layer.module.forward(input).context);
            for (row, found) in keys.iter().zip(&found) {
                layer.assert_close(found, &layer.oracle.row(row)[offset..], "the last tokens");
            }
        },
    );
}

fn rotations_follow_the_given_positions<B: AttentionBackend>(device: &B::Device) {
    check(
        24,
        (prefixed(), any::<bool>()),
        |(
            Prefixed {
                ragged: case,
                offsets,
            },
            shared,
        )| {
            let layer = Layer::<B>::drawn(&case.config, case.seed, device);
            let mut numbers = Numbers::new(case.seed);
            let offset = offsets[0];
            let (batch, length) = (case.lengths.len(), longest(&case.lengths).max(1));
            let keys = numbers.rows(&vec![offset + length; batch], layer.d_model);
            let queries: Vec<Tokens> = keys.iter().map(|row| row[offset..].to_vec()).collect();
            let lists = if shared { 1 } else { batch };
            let positions: Vec<Vec<usize>> = (0..lists)
                .map(|_| (0..offset + length).map(|_| numbers.below(40)).collect())
                .collect();
            let input = AttentionInput::new(layer.padded(&queries, length))
                .with_keys(layer.padded(&keys, offset + length))
                .with_positions(positions.clone());
            let rotary = layer.module.rotary(&input);
            let found = rows_of(layer.module.forward(input.clone()).context);
            // Rotations that were made beforehand are the ones that are used.
            let reused = input.with_positions(vec![]).with_rotary(Some(rotary));
            let reused = rows_of(layer.module.forward(reused).context);
            for row in 0..batch {
                let question = Question {
                    positions: positions[row % lists].clone(),
                    ..Question::new(&keys[row], &queries[row], offset)
                };
                let expected = layer.oracle.answer(&question).outputs;
                layer.assert_close(&found[row], &expected, "positions");
                layer.assert_close(&reused[row], &expected, "shared rotations");
            }
        },
    );
}

/// Positions far beyond what half precision or a 32-bit angle could tell apart.
#[cfg(feature = "flex")]
#[test]
fn far_positions_are_exact() {
    use burn_flex::{Flex, FlexDevice};
    let config = AttentionConfig::mtla(16, 2);
    let layer = Layer::<Flex>::new(&config, 3, F32, &FlexDevice);
    let rows = Numbers::new(4).rows(&[6], layer.d_model);
    let positions: Vec<usize> = (0..6).map(|i| 1_000_003 + 7 * i).collect();
    let input = AttentionInput::new(layer.padded(&rows, 6)).with_positions(vec![positions.clone()]);
    assert_eq!(layer.precision.dtype, DType::F32);
    let found = rows_of(layer.module.forward(input).context);
    let question = Question {
        positions,
        ..Question::new(&rows[0], &rows[0], 0)
    };
    layer.assert_close(
        &found[0],
        &layer.oracle.answer(&question).outputs,
        "far positions",
    );
}
