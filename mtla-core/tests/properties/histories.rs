//! Any history of a cache gives what its rows' tokens give: rows join, grow by prefill and by step, are
//! continued several times or dropped, and are cut.
//!
//! Beside the cache under test runs a *copied* one, in which every row is prefilled from its own tokens
//! whenever rows were reordered, so that no slot is ever shared. Both must answer alike.

use std::collections::HashSet;

use mtla_core::{
    attention::AttentionConfig,
    backend_tests,
    cache::{Cache, CacheError},
    ops::AttentionBackend,
};
use proptest::{
    collection::vec,
    prelude::any,
    prop_oneof,
    strategy::{Just, Strategy},
};

use crate::common::{
    F32, Numbers, Precision, Tokens, check,
    layer::{Layer, any_attention, slot_elements},
    longest, rows_of, vectors,
};

backend_tests!(
    any_history_is_every_rows_own_tokens,
    beams_of_an_open_slot_do_not_meet,
    a_reserved_cache_never_grows,
);

/// The rows are drawn as numbers and taken modulo the rows there are.
#[derive(Debug, Clone)]
enum Move {
    Join(usize),
    Prefill {
        counts: Vec<usize>,
        outputs: Outputs,
    },
    Step(Vec<bool>),
    Reorder(Vec<usize>),
    Truncate {
        row: usize,
        drop: usize,
    },
}

#[derive(Debug, Clone, Copy)]
enum Outputs {
    All,
    Last,
    None,
}

fn moves() -> impl Strategy<Value = Vec<Move>> {
    let outputs = prop_oneof![Just(Outputs::All), Just(Outputs::Last), Just(Outputs::None)];
    let one = prop_oneof![
        1 => (1usize..3).prop_map(Move::Join),
        3 => (vec(0usize..6, 6), outputs)
            .prop_map(|(counts, outputs)| Move::Prefill { counts, outputs }),
        5 => vec(any::<bool>(), 6).prop_map(Move::Step),
        3 => vec(0usize..6, 0..7).prop_map(Move::Reorder),
        1 => (0usize..6, 0usize..7).prop_map(|(row, drop)| Move::Truncate { row, drop }),
    ];
    vec(one, 4..16)
}

const LAYERS: u64 = 2;

struct World<B: AttentionBackend> {
    layers: Vec<Layer<B>>,
    shared: Cache<B>,
    copied: Cache<B>,
    /// What each row has been given so far.
    rows: Vec<Tokens>,
    numbers: Numbers,
    slot_bytes: usize,
}

impl<B: AttentionBackend> World<B> {
    fn new(config: &AttentionConfig, seed: u64, device: &B::Device) -> Self {
        let precision = Precision::drawn::<B>(seed, device);
        let layers: Vec<Layer<B>> = (0..LAYERS)
            .map(|i| Layer::new(config, seed ^ i, precision, device))
            .collect();
        let empty = Cache::new(layers[0].spec(), layers.len(), device);
        Self {
            shared: empty.clone(),
            copied: empty,
            rows: Vec::new(),
            numbers: Numbers::new(seed),
            slot_bytes: slot_elements(config) * precision.dtype.size() * layers.len(),
            layers,
        }
    }

    fn play(&mut self, play: &Move) {
        match play {
            Move::Join(count) => self.join((*count).min(6 - self.rows.len())),
            _ if self.rows.is_empty() => self.join(1),
            Move::Prefill { counts, outputs } => self.prefill(counts, *outputs),
            Move::Step(taking_part) => {
                self.step(
                    &(0..self.rows.len())
                        .filter(|row| taking_part[*row])
                        .collect::<Vec<_>>(),
                );
            }
            Move::Reorder(order) => {
                let order: Vec<usize> = order.iter().map(|row| row % self.rows.len()).collect();
                self.reorder(&order);
            }
            Move::Truncate { row, drop } => self.truncate(row % self.rows.len(), *drop),
        }
        self.check_books();
    }

    fn join(&mut self, count: usize) {
        let rows = self.rows.len()..self.rows.len() + count;
        assert_eq!(self.shared.join(count), rows);
        assert_eq!(self.copied.join(count), rows);
        self.rows.resize(rows.end, Vec::new());
    }

    /// New tokens for `rows`, noted in their histories; returns their numbers before.
    fn draw(&mut self, rows: &[usize], counts: &[usize]) -> (Vec<Tokens>, Vec<usize>) {
        let new = self.numbers.rows(counts, self.layers[0].d_model);
        let starts = rows.iter().map(|row| self.rows[*row].len()).collect();
        for (row, new) in rows.iter().zip(&new) {
            self.rows[*row].extend_from_slice(new);
        }
        (new, starts)
    }

    fn prefill(&mut self, counts: &[usize], outputs: Outputs) {
        let rows: Vec<usize> = (0..self.rows.len()).rev().collect();
        let counts = &counts[..rows.len()];
        if longest(counts) == 0 {
            return;
        }
        let (new, starts) = self.draw(&rows, counts);
        let plan = self.shared.extend(&rows, counts);
        let copied_plan = self.copied.extend(&rows, counts);
        for (i, layer) in self.layers.iter().enumerate() {
            let x = || layer.padded(&new, longest(counts));
            let module = &layer.module;
            let (shared, copied) = (self.shared.layer_mut(i), self.copied.layer_mut(i));
            module.prefill_keys(x(), &copied_plan, copied);
            let found: Vec<Tokens> = match outputs {
                Outputs::All => rows_of(module.prefill(x(), &plan, shared)),
                Outputs::Last => {
                    let last = vectors(module.prefill_last(x(), &plan, shared));
                    last.into_iter().map(|y| vec![y]).collect()
                }
                Outputs::None => {
                    module.prefill_keys(x(), &plan, shared);
                    continue;
                }
            };
            for (k, row) in rows.iter().enumerate() {
                let expected = &layer.oracle.row(&self.rows[*row])[starts[k]..];
                let first = match outputs {
                    Outputs::Last => counts[k].saturating_sub(1),
                    _ => 0,
                };
                layer.assert_close(&found[k], &expected[first..], "prefill");
            }
        }
    }

    fn step(&mut self, rows: &[usize]) {
        if rows.is_empty() {
            return;
        }
        let (new, starts) = self.draw(rows, &vec![1; rows.len()]);
        let new = new.concat();
        let plan = self.shared.step(rows);
        let copied_plan = self.copied.step(rows);
        assert_eq!(plan.starts(), starts);
        for (i, layer) in self.layers.iter().enumerate() {
            let step = |plan, cache: &mut Cache<B>| {
                vectors(
                    layer
                        .module
                        .step(layer.flat(&new), plan, cache.layer_mut(i)),
                )
            };
            let shared = step(&plan, &mut self.shared);
            let copied = step(&copied_plan, &mut self.copied);
            layer.assert_close(&shared, &copied, "shared and copied slots");
            for (k, row) in rows.iter().enumerate() {
                let expected = &layer.oracle.row(&self.rows[*row])[starts[k]..];
                layer.assert_close(&shared[k..=k], expected, "step");
            }
        }
    }

    fn reorder(&mut self, order: &[usize]) {
        let before = self.shared.live_bytes();
        self.shared.reorder(order);
        assert!(
            self.shared.live_bytes() <= before,
            "reordering takes no slots"
        );
        self.rows = order.iter().map(|row| self.rows[*row].clone()).collect();
        self.copied = Cache::new(
            self.layers[0].spec(),
            self.layers.len(),
            &self.layers[0].device,
        );
        for (row, tokens) in self.rows.iter().enumerate() {
            self.copied.join(1);
            if tokens.is_empty() {
                continue;
            }
            let plan = self.copied.extend(&[row], &[tokens.len()]);
            for (i, layer) in self.layers.iter().enumerate() {
                let x = layer.padded(std::slice::from_ref(tokens), tokens.len());
                layer
                    .module
                    .prefill_keys(x, &plan, self.copied.layer_mut(i));
            }
        }
    }

    fn truncate(&mut self, row: usize, drop: usize) {
        let (held, stride) = (self.rows[row].len(), self.layers[0].stride);
        let asked = held.saturating_sub(drop);
        let result = self.shared.truncate(row, asked);
        assert_eq!(result, self.copied.truncate(row, asked));
        if asked == held || asked.is_multiple_of(stride) {
            assert_eq!(result, Ok(()));
            self.rows[row].truncate(asked);
        } else {
            assert_eq!(result, Err(CacheError::InsideChunk { row, asked, stride }));
        }
        let beyond = self.shared.truncate(row, held + 1);
        let held = self.rows[row].len();
        assert!(matches!(beyond, Err(CacheError::Beyond { held: h, .. }) if h == held));
    }

    /// Lengths, slots and bytes.
    fn check_books(&self) {
        let slots = |cache: &Cache<B>| -> Vec<usize> {
            (0..cache.rows())
                .flat_map(|row| cache.row_slots(row).to_vec())
                .collect()
        };
        let (stride, dtype) = (self.layers[0].stride, self.layers[0].precision.dtype);
        for cache in [&self.shared, &self.copied] {
            assert_eq!(cache.rows(), self.rows.len());
            assert_eq!(cache.is_empty(), self.rows.is_empty());
            for (row, tokens) in self.rows.iter().enumerate() {
                assert_eq!(cache.len(row), tokens.len());
                assert_eq!(cache.row_slots(row).len(), tokens.len().div_ceil(stride));
            }
            let distinct: HashSet<usize> = slots(cache).into_iter().collect();
            assert_eq!(cache.live_bytes(), distinct.len() * self.slot_bytes);
            assert!(cache.allocated_bytes() >= cache.live_bytes());
            for layer in 0..self.layers.len() {
                let [held, width] = cache.layer(layer).slots().dims();
                let bytes = held * width * dtype.size() * self.layers.len();
                assert_eq!(bytes, cache.allocated_bytes());
            }
        }
        // The published size of a cache: ⌈T/s⌉ slots a row, where nothing is shared.
        let unshared: usize = self.rows.iter().map(|row| row.len().div_ceil(stride)).sum();
        assert_eq!(self.copied.live_bytes(), unshared * self.slot_bytes);
        assert!(self.shared.live_bytes() <= unshared * self.slot_bytes);
    }
}

fn any_history_is_every_rows_own_tokens<B: AttentionBackend>(device: &B::Device) {
    check(
        48,
        (any_attention(), moves(), any::<u64>()),
        |(config, moves, seed)| {
            let mut world = World::<B>::new(&config, seed, device);
            world.join(2);
            for play in &moves {
                world.play(play);
            }
            // Whatever happened, all rows go on.
            let all: Vec<usize> = (0..world.rows.len()).collect();
            world.step(&all);
            world.check_books();
        },
    );
}

/// The hardest case for sharing: the open slot of one row is continued by several beams, again and again,
/// and each beam must merge into a copy of its own.
fn beams_of_an_open_slot_do_not_meet<B: AttentionBackend>(device: &B::Device) {
    let shapes = (
        any_attention(),
        1usize..9,
        vec(vec(0usize..4, 4), 3..9),
        any::<u64>(),
    );
    check(16, shapes, |(config, prompt, orders, seed)| {
        let mut world = World::<B>::new(&config, seed, device);
        world.join(1);
        world.prefill(&[prompt], Outputs::Last);
        let held = world.shared.live_bytes();
        world.reorder(&[0; 4]);
        assert_eq!(
            world.shared.live_bytes(),
            held,
            "a shared prompt is held once"
        );
        assert_eq!(
            world.copied.live_bytes(),
            4 * held,
            "a copied one four times"
        );
        for order in orders {
            world.step(&[0, 1, 2, 3]);
            world.reorder(&order);
            world.check_books();
        }
        world.step(&[3, 1, 2, 0]);
    });
}

fn a_reserved_cache_never_grows<B: AttentionBackend>(device: &B::Device) {
    const ROWS: usize = 3;
    const TOKENS: usize = 1000;
    let config = AttentionConfig::mtla(4, 1).with_down_rate(3);
    let layer = Layer::<B>::new(&config, 1, F32, device);
    let mut cache = layer.cache(ROWS);
    cache.reserve(ROWS, TOKENS);
    let allocated = cache.allocated_bytes();
    assert_eq!(
        allocated,
        ROWS * TOKENS.div_ceil(3) * slot_elements(&config) * size_of::<f32>()
    );
    let mut numbers = Numbers::new(2);
    let x = layer.flat(&numbers.tokens(ROWS, layer.d_model));
    for _ in 0..TOKENS {
        // Beams change places all the time, with copies of their open slots.
        cache.reorder(&[
            numbers.below(ROWS),
            numbers.below(ROWS),
            numbers.below(ROWS),
        ]);
        let plan = cache.step(&[0, 1, 2]);
        layer.module.step(x.clone(), &plan, cache.layer_mut(0));
        assert_eq!(cache.allocated_bytes(), allocated);
    }
    assert_eq!(
        cache.layer(0).slots().dims()[0] * slot_elements(&config) * 4,
        allocated
    );
    assert_eq!(cache.len(0), TOKENS);
}
