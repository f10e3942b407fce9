//! Where the tokens of one call go: computed once on the host, used by every layer.

use burn::tensor::{Int, Tensor, backend::Backend};

use super::{LayerPool, SlotTable, index};
use crate::{
    ops::{AttentionBackend, plain::to_dtype},
    rope::Rotary,
    temporal::{TemporalGate, folded_gates, running_merge},
};

/// A step of one token a row. Made by [`Cache::step`](super::Cache::step), and good once for each layer, until the next
/// call that changes the cache.
#[derive(Debug, Clone)]
pub struct StepPlan<B: Backend> {
    pub(crate) starts: Vec<usize>,
    /// One position a row, as the list that rotary tables are made from.
    pub(crate) positions: Vec<Vec<usize>>,
    pub(crate) rotary: Option<Rotary<B>>,
    pub(crate) table: SlotTable<B>,
}

impl<B: Backend> StepPlan<B> {
    pub(super) fn new(starts: Vec<usize>, table: SlotTable<B>) -> Self {
        Self {
            positions: starts.iter().map(|p| vec![*p]).collect(),
            starts,
            rotary: None,
            table,
        }
    }

    /// Rows of this step.
    pub fn rows(&self) -> usize {
        self.starts.len()
    }

    /// Tokens each row held before this step.
    pub fn starts(&self) -> &[usize] {
        &self.starts
    }

    /// Positions for the rotary embedding, one a row; by default the number of tokens held before.
    ///
    /// # Panics
    /// If there is not one position a row.
    #[must_use]
    pub fn with_positions(mut self, positions: &[usize]) -> Self {
        assert_eq!(positions.len(), self.rows(), "one position a row");
        self.positions = positions.iter().map(|p| vec![*p]).collect();
        self.rotary = None;
        self
    }

    /// Rotations computed before, so that the layers of a model share them (see
    /// [`Attention::step_rotary`](crate::attention::Attention::step_rotary)).
    #[must_use]
    pub fn with_rotary(mut self, rotary: Option<Rotary<B>>) -> Self {
        self.rotary = rotary;
        self
    }
}

/// Several tokens a row. Made by [`Cache::extend`](super::Cache::extend).
///
/// Rows start anywhere: a row that holds `p` tokens goes on inside the chunk of its open slot if `p` is
/// not a multiple of the stride. So the new tokens are laid out on a grid of chunks, each row shifted by
/// `p mod stride`, and the open slot's value is put right before the first new token of its chunk.
///
/// A plan is good once for each layer, until the next call that changes the cache.
#[derive(Debug, Clone)]
pub struct PrefillPlan<B: Backend> {
    pub(crate) starts: Vec<usize>,
    pub(crate) counts: Vec<usize>,
    pub(crate) positions: Vec<Vec<usize>>,
    pub(crate) rotary: Option<Rotary<B>>,
    pub(crate) table: SlotTable<B>,
    pub(crate) grid: Grid<B>,
}

/// Index lists between tokens `[rows · longest]`, the chunk grid `[rows · chunks · stride]` and slots.
#[derive(Debug, Clone)]
pub(crate) struct Grid<B: Backend> {
    /// Chunks per row (of the row that touches most).
    pub(crate) chunks: usize,
    /// For each grid cell its source among `rows · longest` tokens, then one carry per row, then a zero.
    pub(crate) cells: Tensor<B, 1, Int>,
    /// For each token its grid cell.
    pub(crate) tokens: Tensor<B, 1, Int>,
    /// For each token its chunk number.
    pub(crate) chunk_numbers: Tensor<B, 1, Int>,
    /// The largest chunk number.
    pub(crate) last_chunk: usize,
    /// Each row's open slot (its first new slot where none is open).
    pub(crate) carry_slots: Tensor<B, 1, Int>,
    /// Slots that are written.
    pub(crate) write_slots: Tensor<B, 1, Int>,
    /// For each written slot the token (of `rows · longest`) that was merged into it last.
    pub(crate) write_tokens: Tensor<B, 1, Int>,
    /// Each row's last token (of `rows · longest`).
    pub(crate) last_tokens: Tensor<B, 1, Int>,
}

impl<B: Backend> PrefillPlan<B> {
    pub(super) fn new(
        stride: usize,
        starts: Vec<usize>,
        counts: Vec<usize>,
        slots: &[&[usize]],
        table: SlotTable<B>,
        device: &B::Device,
    ) -> Self {
        let grid = Grid::new(stride, &starts, &counts, slots, device);
        let longest = counts.iter().copied().max().unwrap_or(0);
        let positions = starts.iter().map(|p| (*p..p + longest).collect()).collect();
        Self {
            starts,
            counts,
            positions,
            rotary: None,
            table,
            grid,
        }
    }

    /// Rows of this call.
    pub fn rows(&self) -> usize {
        self.starts.len()
    }

    /// Tokens each row held before this call.
    pub fn starts(&self) -> &[usize] {
        &self.starts
    }

    /// New tokens of each row.
    pub fn counts(&self) -> &[usize] {
        &self.counts
    }

    /// New tokens of the longest row: the second dimension of the input.
    pub fn longest(&self) -> usize {
        self.counts.iter().copied().max().unwrap_or(0)
    }

    /// Positions for the rotary embedding, one list a row with a position for each new token; by default
    /// they count on from the tokens held before.
    ///
    /// # Panics
    /// If there is not one list a row, or a list is shorter than the row's new tokens.
    #[must_use]
    pub fn with_positions(mut self, positions: &[Vec<usize>]) -> Self {
        assert_eq!(positions.len(), self.rows(), "one list of positions a row");
        let longest = self.longest();
        self.positions = positions
            .iter()
            .zip(&self.counts)
            .map(|(row, count)| {
                assert!(row.len() >= *count, "a position for each of {count} tokens");
                let mut row = row.clone();
                row.resize(longest, 0);
                row
            })
            .collect();
        self.rotary = None;
        self
    }

    /// Rotations computed before, so that the layers of a model share them (see
    /// [`Attention::prefill_rotary`](crate::attention::Attention::prefill_rotary)).
    #[must_use]
    pub fn with_rotary(mut self, rotary: Option<Rotary<B>>) -> Self {
        self.rotary = rotary;
        self
    }

    /// Picks each row's last new token from `x [rows, longest, width]`: `[rows, width]`.
    pub fn select_last(&self, x: Tensor<B, 3>) -> Tensor<B, 2> {
        let [rows, tokens, width] = x.dims();
        x.reshape([rows * tokens, width])
            .select(0, self.grid.last_tokens.clone())
    }
}

impl<B: Backend> PrefillPlan<B> {
    /// The rotation of each row's last new token, out of that of all new tokens.
    pub(crate) fn last_rotary(&self, rotary: &Rotary<B>) -> Rotary<B> {
        rotary.select(self.grid.last_tokens.clone())
    }

    /// Offsets and lengths of one query a row, its last new token.
    pub(crate) fn last_span(&self) -> (Vec<usize>, Vec<usize>) {
        let ends = self.starts.iter().zip(&self.counts);
        let offsets = ends.map(|(start, count)| (start + count).saturating_sub(1));
        let lengths = self.counts.iter().map(|count| (*count).min(1));
        (offsets.collect(), lengths.collect())
    }

    /// # Panics
    /// If `x` is not `[rows, longest, …]`.
    pub(crate) fn check(&self, x: &Tensor<B, 3>) {
        let [rows, tokens, _] = x.dims();
        assert!(
            rows == self.rows() && tokens == self.longest(),
            "the plan is for {} rows of at most {} tokens, the input has {rows} rows of {tokens}",
            self.rows(),
            self.longest()
        );
    }
}

impl<B: AttentionBackend> PrefillPlan<B> {
    /// Running states of latents `[rows · longest, rank]`: gated, merged inside chunks, going on from the
    /// open slots of `pool`.
    pub(crate) fn gate_and_merge(
        &self,
        latents: Tensor<B, 2>,
        gate: &TemporalGate<B>,
        pool: &mut LayerPool<B>,
        stride: usize,
    ) -> Tensor<B, 2> {
        let [_, rank] = latents.dims();
        let (rows, grid) = (self.rows(), &self.grid);
        let (device, dtype) = (latents.device(), latents.dtype());
        let gates = pool.gates(gate, grid.last_chunk);
        let gates = gates.select(0, grid.chunk_numbers.clone());
        let gates = folded_gates(latents.clone(), gates);
        pool.observe_prefill(&gates, rows);
        let gated = latents * gates;
        let open = pool.slots().select(0, grid.carry_slots.clone());
        let open = to_dtype(open.narrow(1, 0, rank), dtype);
        let zero = Tensor::zeros([1, rank], (&device, dtype));
        let cells = Tensor::cat(vec![gated, open, zero], 0).select(0, grid.cells.clone());
        running_merge(cells.reshape([rows, grid.chunks, stride, rank]))
            .reshape([rows * grid.chunks * stride, rank])
            .select(0, grid.tokens.clone())
    }

    /// Writes the touched slots, from the states of all new tokens `[rows · longest, width]`.
    pub(crate) fn write(&self, states: Tensor<B, 2>, pool: &mut LayerPool<B>) {
        let states = states.select(0, self.grid.write_tokens.clone()).detach();
        pool.update(|slots| {
            let states = to_dtype(states, slots.dtype());
            (
                (),
                B::write_slots(slots, self.grid.write_slots.clone(), states),
            )
        });
    }
}

impl<B: Backend> Grid<B> {
    fn new(
        stride: usize,
        starts: &[usize],
        counts: &[usize],
        slots: &[&[usize]],
        device: &B::Device,
    ) -> Self {
        let rows = starts.len();
        let longest = counts.iter().copied().max().unwrap_or(0);
        let phase = |row: usize| starts[row] % stride;
        let row_chunks = |row: usize| (phase(row) + counts[row]).div_ceil(stride);
        let chunks = (0..rows).map(row_chunks).max().unwrap_or(0);
        let width = chunks * stride;
        let zero = rows * longest + rows;

        let mut cells = Vec::with_capacity(rows * width);
        let (mut tokens, mut chunk_numbers) = (Vec::new(), Vec::new());
        let (mut write_slots, mut write_tokens) = (Vec::new(), Vec::new());
        let (mut carry_slots, mut last_tokens) = (Vec::new(), Vec::new());
        for row in 0..rows {
            let (start, count, phase) = (starts[row], counts[row], phase(row));
            cells.extend((0..width).map(|cell| {
                if cell + 1 == phase {
                    rows * longest + row
                } else if (phase..phase + count).contains(&cell) {
                    row * longest + cell - phase
                } else {
                    zero
                }
            }));
            // Tokens beyond the row's count are padding; any place inside the row will do for them.
            let last = |i: usize| i.min(count.saturating_sub(1));
            tokens.extend((0..longest).map(|i| row * width + phase + last(i)));
            chunk_numbers.extend((0..longest).map(|i| (start + last(i)) / stride));
            for chunk in 0..row_chunks(row) {
                let end = ((chunk + 1) * stride).min(phase + count);
                // An untouched open slot (no new tokens) is not written.
                if end > phase {
                    write_slots.push(slots[row][start / stride + chunk]);
                    write_tokens.push(row * longest + end - 1 - phase);
                }
            }
            let carry = slots[row].get(start / stride).or(slots[row].last());
            carry_slots.push(carry.copied().unwrap_or(0));
            last_tokens.push(row * longest + count.saturating_sub(1));
        }
        let last_chunk = chunk_numbers.iter().copied().max().unwrap_or(0);
        Self {
            chunks,
            cells: index(&cells, device),
            tokens: index(&tokens, device),
            chunk_numbers: index(&chunk_numbers, device),
            last_chunk,
            carry_slots: index(&carry_slots, device),
            write_slots: index(&write_slots, device),
            write_tokens: index(&write_tokens, device),
            last_tokens: index(&last_tokens, device),
        }
    }
}
