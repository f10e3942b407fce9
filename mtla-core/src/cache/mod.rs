//! One pool of slots for every cache: dense keys and values, latents, and temporally merged latents.
//!
//! All states of a layer live in one tensor `[slots, width]`. A sequence (*row*) is a table of slot numbers
//! and a token count, kept on the host and shared by all layers of a model. Slots are reference-counted:
//!
//! * beams and samples of one prompt point at the same prompt slots;
//! * [`reorder`](Cache::reorder) permutes tables and copies nothing; only the *open* slot of a row (the
//!   chunk that the next token merges into) is copied, and only if another row holds it too;
//! * a finished row gives its slots back, and a new prompt takes them (continuous batching);
//! * prompts get contiguous runs of slots.
//!
//! A call to the model goes in two steps. First the cache makes room and says where things are
//! ([`extend`](Cache::extend) or [`step`](Cache::step) return a plan), then every layer is run with that
//! plan and its own pool ([`layer_mut`](Cache::layer_mut)):
//!
//! ```
//! # #[cfg(feature = "flex")] {
//! use burn::tensor::{Distribution, Tensor};
//! use burn_flex::Flex;
//! use mtla_core::{attention::AttentionConfig, cache::Cache};
//!
//! let device = Default::default();
//! let attention = AttentionConfig::mtla(64, 4).init::<Flex>(&device).unwrap();
//! let mut cache = Cache::new(attention.cache_spec(), 1, &device);
//!
//! cache.join(2);
//! let prompt = Tensor::random([2, 5, 64], Distribution::Default, &device);
//! let plan = cache.extend(&[0, 1], &[5, 3]); // ragged: row 1 has three tokens
//! let last = attention.prefill_last(prompt, &plan, cache.layer_mut(0));
//!
//! cache.reorder(&[0, 0, 1]); // two continuations of row 0
//! let plan = cache.step(&[0, 1, 2]);
//! let token = Tensor::random([3, 64], Distribution::Default, &device);
//! let y = attention.step(token, &plan, cache.layer_mut(0));
//! assert_eq!(y.dims(), [3, 64]);
//! # let _ = last;
//! # }
//! ```

mod observation;
mod plan;
mod tables;

use burn::tensor::{DType, Int, Tensor, TensorData, backend::Backend};

pub use crate::ops::SlotLayout;
use crate::{
    ops::{AttentionBackend, DecodeOperands, DecodeProblem, plain},
    rope::Rotary,
    temporal::TemporalGate,
};
pub use observation::Observation;
pub use plan::{PrefillPlan, StepPlan};
use tables::{Orders, Row, Tables};

/// A row cannot be cut where it was asked to be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CacheError {
    /// Tokens that were merged into one slot cannot be taken apart again.
    #[error(
        "row {row} cannot be cut to {asked} tokens: {stride} tokens share a slot, cut at a multiple of {stride}"
    )]
    InsideChunk {
        /// The row.
        row: usize,
        /// The length asked for.
        asked: usize,
        /// Tokens per slot.
        stride: usize,
    },
    /// The row is shorter than that.
    #[error("row {row} holds {held} tokens and cannot be cut to {asked}")]
    Beyond {
        /// The row.
        row: usize,
        /// Its tokens.
        held: usize,
        /// The length asked for.
        asked: usize,
    },
}

/// What the cache of an attention variant looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheSpec {
    /// What a slot holds.
    pub layout: SlotLayout,
    /// Tokens per slot: the `down_rate` of MTLA and of a compressed source, 1 for all others.
    pub stride: usize,
    /// Element type of the slots; `None` for the device's default float type.
    pub dtype: Option<DType>,
}

impl CacheSpec {
    /// The same cache with slots of another element type, for instance half precision under 32-bit
    /// activations.
    #[must_use]
    pub fn with_dtype(mut self, dtype: DType) -> Self {
        self.dtype = Some(dtype);
        self
    }
}

/// The cache of all layers of a model. See the [module documentation](self).
#[derive(Debug, Clone)]
pub struct Cache<B: Backend> {
    spec: CacheSpec,
    tables: Tables,
    layers: Vec<LayerPool<B>>,
    device: B::Device,
}

/// The slots of one layer.
#[derive(Debug, Clone)]
pub struct LayerPool<B: Backend> {
    spec: CacheSpec,
    /// Taken out while an operation works on it, so that its storage is not shared and can be written in
    /// place.
    slots: Option<Tensor<B, 2>>,
    /// Folded gates of the chunks seen so far, `[chunks, rank + 1]`; belongs to the layer's weights.
    gates: Option<Tensor<B, 2>>,
    is_observed: bool,
    observation: Option<Observation<B>>,
}

impl<B: Backend> LayerPool<B> {
    /// All slots, `[slots, width]`; which of them a row holds is said by [`Cache::row_slots`].
    ///
    /// # Panics
    /// If an earlier operation on this pool panicked half-way.
    pub fn slots(&self) -> Tensor<B, 2> {
        self.slots
            .clone()
            .expect("an earlier operation on this pool panicked")
    }

    /// Begins a call of a layer that writes to this pool.
    ///
    /// # Panics
    /// As [`check`](Self::check).
    pub(crate) fn begin(&mut self, spec: CacheSpec) {
        self.check(spec);
        self.observation = None;
    }

    /// # Panics
    /// If a layer whose cache is `spec` would not find in this pool what it puts there.
    pub(crate) fn check(&self, spec: CacheSpec) {
        let here = self.spec;
        assert!(
            (here.layout, here.stride) == (spec.layout, spec.stride),
            "a layer that keeps {:?} with {} tokens a slot was given the pool of a cache of {:?} with {} tokens a slot: make the cache from the layer's `cache_spec`",
            spec.layout,
            spec.stride,
            here.layout,
            here.stride,
        );
    }

    pub(crate) fn update<R>(&mut self, f: impl FnOnce(Tensor<B, 2>) -> (R, Tensor<B, 2>)) -> R {
        let slots = self
            .slots
            .take()
            .expect("an earlier operation on this pool panicked");
        let (result, slots) = f(slots);
        self.slots = Some(slots);
        result
    }
}

/// The new token of each row, for [`LayerPool::decode`].
pub(crate) struct NewTokens<B: Backend> {
    /// Queries before rotation `[rows, heads, key_width]`.
    pub(crate) q: Tensor<B, 3>,
    /// What the pool is to hold of them, before rotation and gate, `[rows, width]`.
    pub(crate) row: Tensor<B, 2>,
    pub(crate) rotary: Rotary<B>,
    pub(crate) gates: Option<Tensor<B, 2>>,
}

impl<B: AttentionBackend> LayerPool<B> {
    /// A step over this pool, `[rows, heads, value_width]`.
    pub(crate) fn decode(
        &mut self,
        new: NewTokens<B>,
        problem: &DecodeProblem,
        table: &SlotTable<B>,
    ) -> Tensor<B, 3> {
        let looking = self.is_observed.then(|| {
            let gates = Self::step_gates(&new, problem);
            (gates, new.q.clone(), new.rotary.clone())
        });
        let out = self.update(|pool| {
            let operands = DecodeOperands {
                q: new.q,
                row: new.row,
                rotary: Some(new.rotary),
                gates: new.gates,
                pool,
                table: table.packed.clone(),
            };
            B::decode(operands, problem)
        });
        if let Some((gates, q, rotary)) = looking {
            let (pool, table) = (self.slots(), table.packed.clone());
            let weights = plain::decode_weights(q, Some(&rotary), pool, table, problem);
            self.observation = Some(Observation {
                gates: gates.map(Tensor::detach),
                weights: Some(weights.detach()),
            });
        }
        out
    }

    /// The layer's folded gate table, long enough for chunk number `chunk`.
    pub(crate) fn gates(&mut self, gate: &TemporalGate<B>, chunk: usize) -> Tensor<B, 2> {
        let covers = |table: &&Tensor<B, 2>| table.dims()[0] > chunk;
        if let Some(table) = self.gates.as_ref().filter(covers) {
            return table.clone();
        }
        let chunks = (chunk + 1).next_power_of_two().max(64);
        let table = gate.table(chunks).detach();
        self.gates = Some(table.clone());
        table
    }
}

impl<B: AttentionBackend> Cache<B> {
    /// An empty cache without rows for `layers` layers of one shape.
    pub fn new(spec: CacheSpec, layers: usize, device: &B::Device) -> Self {
        let empty = Self::blank(spec, 1, device);
        let pool = LayerPool {
            spec,
            slots: Some(empty),
            gates: None,
            is_observed: false,
            observation: None,
        };
        let mut cache = Self {
            spec,
            tables: Tables::new(spec.stride),
            layers: vec![pool; layers],
            device: device.clone(),
        };
        cache.tables.reserve(1);
        cache
    }

    fn blank(spec: CacheSpec, slots: usize, device: &B::Device) -> Tensor<B, 2> {
        let shape = [slots, spec.layout.width()];
        match spec.dtype {
            Some(dtype) => Tensor::zeros(shape, (device, dtype)),
            None => Tensor::zeros(shape, device),
        }
    }

    /// Makes room for `tokens` tokens in each of `rows` rows, so that nothing has to grow later. It adds no rows.
    ///
    /// Without it the pools double when they are full. They never shrink: a new cache is the way to less memory.
    pub fn reserve(&mut self, rows: usize, tokens: usize) {
        self.tables
            .reserve(rows * tokens.div_ceil(self.spec.stride));
        self.fit();
    }

    /// Grows the layers' tensors to the tables' capacity.
    fn fit(&mut self) {
        let capacity = self.tables.capacity();
        for layer in &mut self.layers {
            layer.update(|slots| {
                let held = slots.dims()[0];
                if held == capacity {
                    return ((), slots);
                }
                let dtype = slots.dtype();
                let spec = CacheSpec {
                    dtype: Some(dtype),
                    ..self.spec
                };
                let more = Self::blank(spec, capacity - held, &self.device);
                ((), Tensor::cat(vec![slots, more], 0))
            });
        }
    }

    /// Adds `count` empty rows after the existing ones and returns their numbers.
    pub fn join(&mut self, count: usize) -> std::ops::Range<usize> {
        let first = self.rows();
        self.tables.join(count);
        first..first + count
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.tables.rows().len()
    }

    /// Tokens that `row` holds.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn len(&self, row: usize) -> usize {
        self.row(row).tokens
    }

    /// Whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.rows() == 0
    }

    /// The slots of `row`, in order.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row_slots(&self, row: usize) -> &[usize] {
        &self.row(row).slots
    }

    fn row(&self, row: usize) -> &Row {
        let rows = self.tables.rows();
        assert!(
            row < rows.len(),
            "row {row} of a cache with {} rows",
            rows.len()
        );
        &rows[row]
    }

    /// The specification that the cache was made with.
    pub fn spec(&self) -> CacheSpec {
        self.spec
    }

    /// The pool of one layer.
    ///
    /// # Panics
    /// If there is no such layer.
    pub fn layer(&self, layer: usize) -> &LayerPool<B> {
        let layers = self.layers.len();
        self.layers
            .get(layer)
            .unwrap_or_else(|| panic!("layer {layer} of a cache for {layers} layers"))
    }

    /// The pool of one layer, to be run with a plan of this cache.
    ///
    /// # Panics
    /// If there is no such layer.
    pub fn layer_mut(&mut self, layer: usize) -> &mut LayerPool<B> {
        let layers = self.layers.len();
        self.layers
            .get_mut(layer)
            .unwrap_or_else(|| panic!("layer {layer} of a cache for {layers} layers"))
    }

    /// Row `i` of the result continues row `order[i]`. Rows may repeat (beams), and rows that are not
    /// named leave and give their slots back: of three rows, `reorder(&[0, 2])` drops row 1, and row 2 is row 1
    /// from then on. No slot is copied.
    ///
    /// # Panics
    /// If `order` names a row that does not exist.
    pub fn reorder(&mut self, order: &[usize]) {
        for row in order {
            self.row(*row);
        }
        self.tables.reorder(order);
    }

    /// Cuts `row` to its first `tokens` tokens.
    ///
    /// # Errors
    /// [`CacheError`] unless `tokens` is what the row holds, or less and a multiple of the stride (merged tokens
    /// cannot be taken apart).
    ///
    /// # Panics
    /// If there is no such row.
    pub fn truncate(&mut self, row: usize, tokens: usize) -> Result<(), CacheError> {
        self.row(row);
        self.tables.truncate(row, tokens)
    }

    /// Makes room for one more token in each of `rows` (distinct) and plans the step.
    ///
    /// The rows count as holding the token from here on: every layer must be run with the plan.
    ///
    /// # Panics
    /// If a row does not exist or is named twice, or there are no rows.
    pub fn step(&mut self, rows: &[usize]) -> StepPlan<B> {
        let starts = self.make_room(rows, &vec![1; rows.len()]);
        let table = self.slot_table(rows, &starts);
        StepPlan::new(starts, table)
    }

    /// Makes room for `counts[i]` more tokens in `rows[i]` (distinct) and plans the prefill. A count may be 0.
    ///
    /// The rows count as holding the tokens from here on: every layer must be run with the plan.
    ///
    /// # Panics
    /// If a row does not exist or is named twice, the lists differ in length, or no row has a new token.
    pub fn extend(&mut self, rows: &[usize], counts: &[usize]) -> PrefillPlan<B> {
        assert_eq!(rows.len(), counts.len(), "one token count per row");
        let starts = self.make_room(rows, counts);
        let slots: Vec<&[usize]> = rows.iter().map(|row| self.row_slots(*row)).collect();
        let table = self.slot_table(rows, &starts);
        PrefillPlan::new(
            self.spec.stride,
            starts,
            counts.to_vec(),
            &slots,
            table,
            &self.device,
        )
    }

    fn make_room(&mut self, rows: &[usize], counts: &[usize]) -> Vec<usize> {
        assert!(
            counts.iter().any(|count| *count > 0),
            "no row has a new token"
        );
        let mut seen = vec![false; self.rows()];
        let mut orders = Orders::default();
        let mut starts = Vec::with_capacity(rows.len());
        for (row, count) in rows.iter().zip(counts) {
            self.row(*row);
            assert!(
                !std::mem::replace(&mut seen[*row], true),
                "row {row} is named twice"
            );
            starts.push(self.len(*row));
            self.tables.extend(*row, *count, &mut orders);
        }
        self.fit();
        self.copy(&orders.copies);
        starts
    }

    fn copy(&mut self, copies: &[(usize, usize)]) {
        if copies.is_empty() {
            return;
        }
        let from: Vec<usize> = copies.iter().map(|(from, _)| *from).collect();
        let to: Vec<usize> = copies.iter().map(|(_, to)| *to).collect();
        let from: Tensor<B, 1, Int> = index(&from, &self.device);
        let to: Tensor<B, 1, Int> = index(&to, &self.device);
        for layer in &mut self.layers {
            layer.update(|slots| {
                let open = slots.clone().select(0, from.clone());
                ((), B::write_slots(slots, to.clone(), open))
            });
        }
    }

    /// The tables of `rows`, which may repeat (several rows over one source), as they are now: to be taken again
    /// after the cache has changed.
    ///
    /// # Panics
    /// If a row does not exist.
    pub fn table(&self, rows: &[usize]) -> SlotTable<B> {
        let tokens: Vec<usize> = rows.iter().map(|row| self.len(*row)).collect();
        self.slot_table(rows, &tokens)
    }

    fn slot_table(&self, rows: &[usize], tokens: &[usize]) -> SlotTable<B> {
        let rows: Vec<&[usize]> = rows.iter().map(|row| self.row_slots(*row)).collect();
        SlotTable::new(&rows, tokens, &self.device)
    }

    /// Bytes of the slots that rows hold, shared ones counted once, over all layers.
    ///
    /// For rows that share nothing this is `Σ ⌈tokens / stride⌉ · width · size of an element · layers`.
    pub fn live_bytes(&self) -> usize {
        self.tables.live() * self.slot_bytes()
    }

    /// Bytes that the pools occupy, over all layers: what rows hold, and what waits for more (see
    /// [`reserve`](Self::reserve)).
    pub fn allocated_bytes(&self) -> usize {
        self.tables.capacity() * self.slot_bytes()
    }

    fn slot_bytes(&self) -> usize {
        let element = self
            .layers
            .first()
            .map_or(0, |layer| layer.slots().dtype().size());
        self.spec.layout.width() * element * self.layers.len()
    }
}

/// The tables of several rows as one tensor.
#[derive(Debug, Clone)]
pub struct SlotTable<B: Backend> {
    /// Per row a token count (in a plan: of the tokens held before the call), then its slots, filled up
    /// with the row's own last slot (0 if it has none): `[rows, 1 + max_slots]`.
    pub packed: Tensor<B, 2, Int>,
    /// Slots of the longest row, at least 1.
    pub max_slots: usize,
    /// Slots of each row.
    pub lengths: Vec<usize>,
    /// Slots that each row begins with as the row before it does.
    pub common: Vec<usize>,
}

impl<B: Backend> SlotTable<B> {
    fn new(rows: &[&[usize]], tokens: &[usize], device: &B::Device) -> Self {
        let lengths: Vec<usize> = rows.iter().map(|slots| slots.len()).collect();
        let max_slots = lengths.iter().copied().max().unwrap_or(0).max(1);
        let mut packed = Vec::with_capacity(rows.len() * (1 + max_slots));
        for (slots, tokens) in rows.iter().zip(tokens) {
            let last = slots.last().copied().unwrap_or(0);
            packed.push(*tokens as i64);
            packed.extend(slots.iter().map(|slot| *slot as i64));
            packed.resize(packed.len() + max_slots - slots.len(), last as i64);
        }
        let data = TensorData::new(packed, [lengths.len(), 1 + max_slots]);
        let before = std::iter::once(&[][..]).chain(rows.iter().copied());
        let alike = |(a, b): (&[usize], &&[usize])| {
            let pairs = a.iter().zip(*b);
            pairs.take_while(|(a, b)| a == b).count()
        };
        Self {
            packed: Tensor::from_data(data, device),
            max_slots,
            common: before.zip(rows).map(alike).collect(),
            lengths,
        }
    }

    /// Gathers the slots of all rows from a pool: `[rows, max_slots, width]`.
    pub fn gather(&self, pool: Tensor<B, 2>) -> Tensor<B, 3> {
        let [rows, _] = self.packed.dims();
        let width = pool.dims()[1];
        let slots = self.packed.clone().narrow(1, 1, self.max_slots);
        pool.select(0, slots.reshape([rows * self.max_slots]))
            .reshape([rows, self.max_slots, width])
    }
}

/// A list of numbers as an index tensor.
pub(crate) fn index<B: Backend>(values: &[usize], device: &B::Device) -> Tensor<B, 1, Int> {
    let values: Vec<i64> = values.iter().map(|x| *x as i64).collect();
    let length = values.len();
    Tensor::from_data(TensorData::new(values, [length]), device)
}
