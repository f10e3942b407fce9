//! The cached paths give what the whole sequence gives: token by token, at once, and in any pieces.

use burn::tensor::Tensor;
use burn_autodiff::Autodiff;
use mtla_core::{attention::AttentionConfig, backend_tests, cache::Cache, ops::AttentionBackend};
use proptest::{collection::vec, prelude::any, strategy::Strategy};

use crate::common::{
    Numbers, Tokens, check,
    layer::{Layer, any_attention},
    longest, rows_of, vectors,
};

backend_tests!(
    steps_are_the_whole_sequence,
    a_prefill_is_the_whole_sequence,
    pieces_are_the_whole_sequence,
    a_row_decodes_alone_as_in_a_batch,
    positions_and_rotations_of_the_caller,
    under_autodiff_as_without,
);

#[derive(Debug, Clone)]
struct Case {
    config: AttentionConfig,
    lengths: Vec<usize>,
    seed: u64,
}

fn cases() -> impl Strategy<Value = Case> {
    (any_attention(), vec(0usize..13, 1..4), any::<u64>()).prop_map(|(config, lengths, seed)| {
        Case {
            config,
            lengths,
            seed,
        }
    })
}

/// A layer, rows of random tokens, and what each row gives as a whole.
struct Setting<B: AttentionBackend> {
    layer: Layer<B>,
    rows: Vec<Tokens>,
    expected: Vec<Tokens>,
}

impl<B: AttentionBackend> Setting<B> {
    fn new(case: &Case, device: &B::Device) -> Self {
        let layer = Layer::<B>::drawn(&case.config, case.seed, device);
        let rows = Numbers::new(case.seed).rows(&case.lengths, layer.d_model);
        let expected = rows.iter().map(|row| layer.oracle.row(row)).collect();
        Self {
            layer,
            rows,
            expected,
        }
    }

    /// The next `counts[b]` tokens of the rows, and the longest count.
    fn piece(&self, cache: &Cache<B>, counts: &[usize]) -> Tensor<B, 3> {
        let next = |row: usize| self.rows[row][cache.len(row)..][..counts[row]].to_vec();
        let rows: Vec<Tokens> = (0..counts.len()).map(next).collect();
        self.layer.padded(&rows, longest(counts))
    }

    /// Decodes all rows to their ends, those with tokens left at each time, and checks every output.
    fn decode(&self, cache: &mut Cache<B>) {
        let left = |cache: &Cache<B>| -> Vec<usize> {
            (0..cache.rows())
                .filter(|row| cache.len(*row) < self.rows[*row].len())
                .collect()
        };
        let mut rows = left(cache);
        while !rows.is_empty() {
            let starts: Vec<usize> = rows.iter().map(|row| cache.len(*row)).collect();
            let next: Tokens = rows
                .iter()
                .zip(&starts)
                .map(|(row, at)| self.rows[*row][*at].clone())
                .collect();
            let plan = cache.step(&rows);
            assert_eq!(plan.starts(), starts);
            let x = self.layer.flat(&next);
            let found = vectors(self.layer.module.step(x, &plan, cache.layer_mut(0)));
            for (i, row) in rows.iter().enumerate() {
                let expected = &self.expected[*row][starts[i]];
                self.layer
                    .assert_close(&found[i..=i], std::slice::from_ref(expected), "step");
            }
            rows = left(cache);
            rows.reverse(); // The order of a step's rows is free.
        }
    }
}

fn steps_are_the_whole_sequence<B: AttentionBackend>(device: &B::Device) {
    stepwise::<B>(32, device);
}

fn stepwise<B: AttentionBackend>(count: u32, device: &B::Device) {
    check(count, cases(), |case| {
        let setting = Setting::<B>::new(&case, device);
        let mut cache = setting.layer.cache(case.lengths.len());
        setting.decode(&mut cache);
        for (row, length) in case.lengths.iter().enumerate() {
            assert_eq!(cache.len(row), *length);
            assert_eq!(
                cache.row_slots(row).len(),
                length.div_ceil(case.config.down_rate())
            );
        }
    });
}

fn a_prefill_is_the_whole_sequence<B: AttentionBackend>(device: &B::Device) {
    at_once::<B>(32, device);
}

fn at_once<B: AttentionBackend>(count: u32, device: &B::Device) {
    let some = cases().prop_filter("a token", |case| longest(&case.lengths) > 0);
    check(count, (some, any::<u64>()), |(case, cut)| {
        let setting = Setting::<B>::new(&case, device);
        let layer = &setting.layer;
        let all: Vec<usize> = (0..case.lengths.len()).collect();

        let mut cache = layer.cache(all.len());
        let x = setting.piece(&cache, &case.lengths);
        let plan = cache.extend(&all, &case.lengths);
        let found = rows_of(layer.module.prefill(x.clone(), &plan, cache.layer_mut(0)));
        for (found, expected) in found.iter().zip(&setting.expected) {
            layer.assert_close(found, expected, "prefill");
        }

        let mut cache = layer.cache(all.len());
        let plan = cache.extend(&all, &case.lengths);
        let found = vectors(layer.module.prefill_last(x, &plan, cache.layer_mut(0)));
        for (i, expected) in setting.expected.iter().enumerate() {
            let last = &expected[expected.len().saturating_sub(1)..];
            layer.assert_close(&found[i..=i], last, "the last outputs");
        }

        // A part of each row as keys only, the rest step by step.
        let mut numbers = Numbers::new(cut);
        let prefix: Vec<usize> = case.lengths.iter().map(|n| numbers.below(n + 1)).collect();
        if longest(&prefix) > 0 {
            let mut cache = layer.cache(all.len());
            let x = setting.piece(&cache, &prefix);
            let plan = cache.extend(&all, &prefix);
            layer.module.prefill_keys(x, &plan, cache.layer_mut(0));
            setting.decode(&mut cache);
        }
    });
}

fn pieces_are_the_whole_sequence<B: AttentionBackend>(device: &B::Device) {
    // Which rows take part in a piece is drawn too: a row may be left out or be there with no token.
    let counts = vec(vec(0usize..6, 3), 1..6);
    let named = vec(vec(any::<bool>(), 3), 6);
    check(
        40,
        (any_attention(), counts, named, any::<u64>()),
        |(config, counts, named, seed)| {
            let total = |row: usize| -> usize {
                let pieces = counts.iter().zip(&named).filter(|(_, named)| named[row]);
                pieces.map(|(counts, _)| counts[row]).sum()
            };
            let lengths = (0..3).map(total).collect();
            let setting = Setting::<B>::new(
                &Case {
                    config,
                    lengths,
                    seed,
                },
                device,
            );
            let layer = &setting.layer;
            let mut cache = layer.cache(3);
            for (counts, named) in counts.iter().zip(&named) {
                let rows: Vec<usize> = (0..3).filter(|row| named[*row]).rev().collect();
                let counts: Vec<usize> = rows.iter().map(|row| counts[*row]).collect();
                if longest(&counts) == 0 {
                    continue;
                }
                let starts: Vec<usize> = rows.iter().map(|row| cache.len(*row)).collect();
                let pieces: Vec<Tokens> = (0..rows.len())
                    .map(|i| setting.rows[rows[i]][starts[i]..][..counts[i]].to_vec())
                    .collect();
                let x = layer.padded(&pieces, longest(&counts));
                let mut fork = cache.clone();
                let plan = cache.extend(&rows, &counts);
                assert_eq!((plan.starts(), plan.counts()), (&starts[..], &counts[..]));
                let found = rows_of(layer.module.prefill(x.clone(), &plan, cache.layer_mut(0)));
                let plan = fork.extend(&rows, &counts);
                let last = vectors(layer.module.prefill_last(x, &plan, fork.layer_mut(0)));
                for (i, row) in rows.iter().enumerate() {
                    let expected = &setting.expected[*row][starts[i]..][..counts[i]];
                    layer.assert_close(&found[i], expected, "a piece");
                    let expected = &expected[counts[i].saturating_sub(1)..];
                    layer.assert_close(&last[i..=i], expected, "the last of a piece");
                }
            }
        },
    );
}

fn a_row_decodes_alone_as_in_a_batch<B: AttentionBackend>(device: &B::Device) {
    check(16, (cases(), 1usize..6), |(case, steps)| {
        let setting = Setting::<B>::new(&case, device);
        let layer = &setting.layer;
        let all: Vec<usize> = (0..case.lengths.len()).collect();
        let next: Vec<Tokens> = (0..steps)
            .map(|i| Numbers::new(i as u64).tokens(all.len(), layer.d_model))
            .collect();
        let outputs = |rows: &[usize]| -> Vec<Tokens> {
            let lengths: Vec<usize> = rows.iter().map(|row| case.lengths[*row]).collect();
            let prompts: Vec<Tokens> = rows.iter().map(|row| setting.rows[*row].clone()).collect();
            let mut cache = layer.cache(rows.len());
            let numbers: Vec<usize> = (0..rows.len()).collect();
            if longest(&lengths) > 0 {
                let plan = cache.extend(&numbers, &lengths);
                let x = layer.padded(&prompts, longest(&lengths));
                layer.module.prefill_keys(x, &plan, cache.layer_mut(0));
            }
            let step = |next: &Tokens| {
                let x: Tokens = rows.iter().map(|row| next[*row].clone()).collect();
                let plan = cache.step(&numbers);
                vectors(layer.module.step(layer.flat(&x), &plan, cache.layer_mut(0)))
            };
            next.iter().map(step).collect()
        };
        let together = outputs(&all);
        for row in all {
            for (alone, together) in outputs(&[row]).iter().zip(&together) {
                layer.assert_close(&together[row..=row], alone, "alone and in a batch");
            }
        }
    });
}

fn positions_and_rotations_of_the_caller<B: AttentionBackend>(device: &B::Device) {
    use crate::common::oracle::Question;
    let some = cases().prop_filter("two tokens", |case| case.lengths.iter().all(|n| *n > 1));
    check(16, some, |case| {
        let setting = Setting::<B>::new(&case, device);
        let layer = &setting.layer;
        let mut numbers = Numbers::new(!case.seed);
        let positions: Vec<Vec<usize>> = (case.lengths.iter())
            .map(|n| (0..*n).map(|_| numbers.below(60)).collect())
            .collect();
        let all: Vec<usize> = (0..case.lengths.len()).collect();
        let counts: Vec<usize> = case.lengths.iter().map(|n| n - 1).collect();

        let mut cache = layer.cache(all.len());
        let x = setting.piece(&cache, &counts);
        let plan = cache.extend(&all, &counts).with_positions(&positions);
        let rotary = layer.module.prefill_rotary(&plan, &x);
        let shared = plan
            .clone()
            .with_positions(&positions)
            .with_rotary(Some(rotary));
        let mut fork = cache.clone();
        let found = rows_of(layer.module.prefill(x.clone(), &plan, cache.layer_mut(0)));
        let again = rows_of(layer.module.prefill(x.clone(), &shared, fork.layer_mut(0)));
        let last = vectors(layer.module.prefill_last(x, &shared, fork.layer_mut(0)));

        let ends: Vec<usize> = positions.iter().map(|row| row[row.len() - 1]).collect();
        let tokens: Tokens = setting
            .rows
            .iter()
            .map(|row| row[row.len() - 1].clone())
            .collect();
        let x = layer.flat(&tokens);
        let plan = cache.step(&all).with_positions(&ends);
        let rotary = layer.module.step_rotary(&plan, &x);
        let shared = plan
            .clone()
            .with_positions(&vec![0; all.len()])
            .with_rotary(Some(rotary));
        let mut fork = cache.clone();
        let step = vectors(layer.module.step(x.clone(), &plan, cache.layer_mut(0)));
        let step_again = vectors(layer.module.step(x, &shared, fork.layer_mut(0)));
        for row in all {
            let tokens = &setting.rows[row];
            let positions = positions[row].clone();
            let question = Question {
                positions,
                ..Question::new(tokens, tokens, 0)
            };
            let expected = layer.oracle.answer(&question).outputs;
            let (before, end) = expected.split_at(counts[row]);
            layer.assert_close(&found[row], before, "prefill at positions");
            layer.assert_close(&again[row], before, "prefill with shared rotations");
            let end_of_prefill = &before[counts[row] - 1..];
            layer.assert_close(
                &last[row..=row],
                end_of_prefill,
                "last with shared rotations",
            );
            layer.assert_close(&step[row..=row], end, "step at a position");
            layer.assert_close(&step_again[row..=row], end, "step with shared rotations");
        }
    });
}

/// Decoding during training (sampling for a validation metric, say) needs no other module.
fn under_autodiff_as_without<B: AttentionBackend>(device: &B::Device) {
    stepwise::<Autodiff<B>>(6, device);
    at_once::<Autodiff<B>>(6, device);
}
