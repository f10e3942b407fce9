//! Cross-attention: all slots of a source are visible, sources of any length side by side, compressed at
//! once or in pieces.

use burn::tensor::{Bool, Tensor, TensorData};
use mtla_core::{
    attention::{CrossAttentionConfig, CrossInput},
    backend_tests,
    cache::Cache,
    ops::AttentionBackend,
};
use proptest::{collection::vec, prelude::any, strategy::Strategy};

use crate::common::{
    Numbers, Precision, Tokens, assert_close, check, flat,
    layer::{CrossLayer, any_cross},
    longest, padded, rows_of, vectors,
};

backend_tests!(
    ragged_sources_are_every_source_alone,
    a_row_in_any_batch_is_the_row_alone,
    steps_over_a_source_in_pieces,
    beams_share_a_source,
    a_mask_hides_slots_by_their_first_frame,
);

#[derive(Debug, Clone)]
struct Case {
    config: CrossAttentionConfig,
    frames: Vec<usize>,
    queries: usize,
    extra: usize,
    seed: u64,
}

fn cases() -> impl Strategy<Value = Case> {
    (
        any_cross(),
        vec(1usize..14, 1..4),
        1usize..5,
        0usize..3,
        any::<u64>(),
    )
        .prop_map(|(config, frames, queries, extra, seed)| Case {
            config,
            frames,
            queries,
            extra,
            seed,
        })
}

struct Setting<B: AttentionBackend> {
    layer: CrossLayer<B>,
    sources: Vec<Tokens>,
    queries: Vec<Tokens>,
    config: CrossAttentionConfig,
    precision: Precision,
    device: B::Device,
}

impl<B: AttentionBackend> Setting<B> {
    fn new(case: &Case, device: &B::Device) -> Self {
        let precision = Precision::drawn::<B>(case.seed, device);
        let mut numbers = Numbers::new(case.seed);
        Self {
            layer: CrossLayer::new(&case.config, case.seed, precision, device),
            sources: numbers.rows(&case.frames, case.config.d_source),
            queries: numbers.rows(&vec![case.queries; case.frames.len()], case.config.d_model),
            config: case.config.clone(),
            precision,
            device: device.clone(),
        }
    }

    fn sources(&self, rows: &[Tokens], frames: usize) -> Tensor<B, 3> {
        padded(
            rows,
            [frames, self.config.d_source],
            self.precision.dtype,
            &self.device,
        )
    }

    fn queries(&self, rows: &[Tokens]) -> Tensor<B, 3> {
        let shape = [rows[0].len(), self.config.d_model];
        padded(rows, shape, self.precision.dtype, &self.device)
    }

    fn expected(&self, row: usize) -> Tokens {
        self.layer
            .oracle
            .cross(&self.sources[row], &self.queries[row], &|_, _| 0.0)
    }

    fn cache(&self, rows: usize) -> Cache<B> {
        let spec = self
            .layer
            .module
            .cache_spec()
            .with_dtype(self.precision.dtype);
        let mut cache = Cache::new(spec, 1, &self.device);
        cache.join(rows);
        cache
    }
}

fn ragged_sources_are_every_source_alone<B: AttentionBackend>(device: &B::Device) {
    check(48, cases(), |case| {
        let setting = Setting::<B>::new(&case, device);
        let source = setting.sources(&setting.sources, longest(&case.frames) + case.extra);
        let input = CrossInput::new(setting.queries(&setting.queries), source);
        let input = input.with_source_lengths(case.frames.clone());
        let found = rows_of(setting.layer.module.forward(input));
        for (row, found) in found.iter().enumerate() {
            assert_close(
                found,
                &setting.expected(row),
                setting.precision.tolerance,
                "cross-attention",
            );
        }
    });
}

fn a_row_in_any_batch_is_the_row_alone<B: AttentionBackend>(device: &B::Device) {
    check(16, cases(), |case| {
        let setting = Setting::<B>::new(&case, device);
        let forward = |rows: std::ops::Range<usize>, frames| {
            let source = setting.sources(&setting.sources[rows.clone()], frames);
            let input = CrossInput::new(setting.queries(&setting.queries[rows.clone()]), source);
            let input = input.with_source_lengths(case.frames[rows].to_vec());
            rows_of(setting.layer.module.forward(input))
        };
        let together = forward(0..case.frames.len(), longest(&case.frames) + case.extra);
        for (row, found) in together.iter().enumerate() {
            let alone = &forward(row..row + 1, case.frames[row])[0];
            assert_close(
                found,
                alone,
                setting.precision.tolerance,
                "in the batch and alone",
            );
        }
    });
}

fn steps_over_a_source_in_pieces<B: AttentionBackend>(device: &B::Device) {
    check(
        32,
        (cases(), vec(vec(0usize..6, 3), 0..4)),
        |(case, cuts)| {
            let setting = Setting::<B>::new(&case, device);
            let rows: Vec<usize> = (0..case.frames.len()).collect();
            let mut cache = setting.cache(rows.len());
            let rest = vec![usize::MAX; 3];
            for cut in cuts.iter().chain([&rest]) {
                let left = |row: usize| case.frames[row] - cache.len(row);
                let counts: Vec<usize> = rows.iter().map(|row| cut[*row].min(left(*row))).collect();
                if longest(&counts) == 0 {
                    continue;
                }
                let pieces: Vec<Tokens> = rows
                    .iter()
                    .map(|row| setting.sources[*row][cache.len(*row)..][..counts[*row]].to_vec())
                    .collect();
                let x = setting.sources(&pieces, longest(&counts));
                let plan = cache.extend(&rows, &counts);
                setting
                    .layer
                    .module
                    .prefill_source(x, &plan, cache.layer_mut(0));
            }
            let table = cache.table(&rows);
            for i in 0..case.queries {
                let x: Tokens = setting.queries.iter().map(|row| row[i].clone()).collect();
                let x = flat(&x, setting.precision.dtype, device);
                let found = vectors(setting.layer.module.step(x, &table, cache.layer(0)));
                for row in &rows {
                    let expected = &setting.expected(*row)[i..=i];
                    assert_close(
                        &found[*row..=*row],
                        expected,
                        setting.precision.tolerance,
                        "step",
                    );
                }
            }
        },
    );
}

fn beams_share_a_source<B: AttentionBackend>(device: &B::Device) {
    check(12, (cases(), vec(0usize..3, 1..7)), |(case, order)| {
        let setting = Setting::<B>::new(&case, device);
        let rows: Vec<usize> = (0..case.frames.len()).collect();
        let mut cache = setting.cache(rows.len());
        let plan = cache.extend(&rows, &case.frames);
        let x = setting.sources(&setting.sources, longest(&case.frames));
        setting
            .layer
            .module
            .prefill_source(x, &plan, cache.layer_mut(0));
        let (held, allocated) = (cache.live_bytes(), cache.allocated_bytes());

        let order: Vec<usize> = order.iter().map(|row| row % rows.len()).collect();
        cache.reorder(&order);
        assert!(cache.live_bytes() <= held);
        assert_eq!(cache.allocated_bytes(), allocated);
        let beams: Vec<usize> = (0..order.len()).collect();
        let x: Tokens = order
            .iter()
            .map(|row| setting.queries[*row][0].clone())
            .collect();
        let x = flat(&x, setting.precision.dtype, device);
        let found = vectors(
            setting
                .layer
                .module
                .step(x, &cache.table(&beams), cache.layer(0)),
        );
        for (found, row) in found.chunks(1).zip(&order) {
            assert_close(
                found,
                &setting.expected(*row)[..1],
                setting.precision.tolerance,
                "a beam",
            );
        }
    });
}

fn a_mask_hides_slots_by_their_first_frame<B: AttentionBackend>(device: &B::Device) {
    check(24, cases(), |case| {
        let setting = Setting::<B>::new(&case, device);
        let (batch, s) = (case.frames.len(), case.config.down_rate);
        let frames = longest(&case.frames);
        let mut numbers = Numbers::new(!case.seed);
        let sources = numbers.rows(&vec![frames; batch], case.config.d_source);
        // The first slot stays: something has to be visible.
        let hidden: Vec<Vec<bool>> = (0..batch)
            .map(|_| {
                (0..frames)
                    .map(|i| i > 0 && numbers.below(3) == 0)
                    .collect()
            })
            .collect();
        let mask = TensorData::new(hidden.concat(), [batch, frames]);
        let mask = Tensor::<B, 2, Bool>::from_data(mask, device);
        let input = CrossInput::new(
            setting.queries(&setting.queries),
            setting.sources(&sources, frames),
        );
        let found = rows_of(
            setting
                .layer
                .module
                .forward(input.with_key_padding_mask(mask)),
        );
        for row in 0..batch {
            let bias = |_, slot: usize| {
                if hidden[row][slot * s] {
                    f64::NEG_INFINITY
                } else {
                    0.0
                }
            };
            let oracle = &setting.layer.oracle;
            let expected = oracle.cross(&sources[row], &setting.queries[row], &bias);
            assert_close(
                &found[row],
                &expected,
                setting.precision.tolerance,
                "masked slots",
            );
        }
    });
}
