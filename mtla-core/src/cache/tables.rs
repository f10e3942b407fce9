//! The host side of a cache: which slots a row owns, how often a slot is shared, which slots are free.
//!
//! Nothing here touches a tensor. The device side follows the orders that come out of here: copy these
//! slots, grow to this capacity.

use std::collections::BTreeMap;

use super::CacheError;

/// One sequence: its slots in order and the number of its tokens.
#[derive(Debug, Clone, Default)]
pub(super) struct Row {
    pub(super) slots: Vec<usize>,
    pub(super) tokens: usize,
}

/// What the pools have to do before the new tokens of a call can be written.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Orders {
    /// `(from, to)`: open slots that were shared and are about to be merged into.
    pub(super) copies: Vec<(usize, usize)>,
}

/// Row tables, reference counts and free slots of one pool.
#[derive(Debug, Clone)]
pub(super) struct Tables {
    stride: usize,
    rows: Vec<Row>,
    references: Vec<u32>,
    free: FreeRuns,
}

impl Tables {
    pub(super) fn new(stride: usize) -> Self {
        assert!(stride > 0, "a slot holds at least one token");
        Self {
            stride,
            rows: Vec::new(),
            references: Vec::new(),
            free: FreeRuns::default(),
        }
    }

    pub(super) fn rows(&self) -> &[Row] {
        &self.rows
    }

    pub(super) fn capacity(&self) -> usize {
        self.references.len()
    }

    /// Slots that at least one row holds.
    pub(super) fn live(&self) -> usize {
        self.capacity() - self.free.total()
    }

    pub(super) fn join(&mut self, count: usize) {
        self.rows.resize_with(self.rows.len() + count, Row::default);
    }

    /// Makes room for `slots` slots in all.
    pub(super) fn reserve(&mut self, slots: usize) {
        let old = self.capacity();
        if slots > old {
            self.references.resize(slots, 0);
            self.free.release(old, slots - old);
        }
    }

    /// Appends `count` tokens to `row`.
    pub(super) fn extend(&mut self, row: usize, count: usize, orders: &mut Orders) {
        if count == 0 {
            return;
        }
        let Row { slots, tokens } = &self.rows[row];
        let (tokens, held) = (*tokens, slots.len());
        if !tokens.is_multiple_of(self.stride) {
            let open = slots[held - 1];
            if self.references[open] > 1 {
                let copy = self.take(1, slots.get(held.wrapping_sub(2)).copied())[0];
                self.references[open] -= 1;
                self.rows[row].slots[held - 1] = copy;
                orders.copies.push((open, copy));
            }
        }
        let needed = (tokens + count).div_ceil(self.stride) - held;
        let last = self.rows[row].slots.last().copied();
        let new = self.take(needed, last);
        self.rows[row].slots.extend(new);
        self.rows[row].tokens = tokens + count;
    }

    /// Takes `count` free slots: the ones right after `last` if they are free, one contiguous run if
    /// there is one, single slots if there are enough, and else grows by doubling.
    fn take(&mut self, count: usize, last: Option<usize>) -> Vec<usize> {
        if count == 0 {
            return Vec::new();
        }
        if self.free.total() < count {
            let missing = count - self.free.total();
            self.reserve((2 * self.capacity()).max(self.capacity() + missing).max(16));
        }
        let slots = last
            .and_then(|last| self.free.take_at(last + 1, count))
            .or_else(|| self.free.take_run(count))
            .unwrap_or_else(|| self.free.take_scattered(count));
        for slot in &slots {
            self.references[*slot] = 1;
        }
        slots
    }

    fn release(&mut self, slot: usize) {
        self.references[slot] -= 1;
        if self.references[slot] == 0 {
            self.free.release(slot, 1);
        }
    }

    /// Row `i` of the result continues row `order[i]`; rows may repeat, and rows not named leave.
    pub(super) fn reorder(&mut self, order: &[usize]) {
        let rows: Vec<Row> = order.iter().map(|row| self.rows[*row].clone()).collect();
        for slot in rows.iter().flat_map(|row| &row.slots) {
            self.references[*slot] += 1;
        }
        for row in std::mem::replace(&mut self.rows, rows) {
            for slot in row.slots {
                self.release(slot);
            }
        }
    }

    pub(super) fn truncate(&mut self, row: usize, tokens: usize) -> Result<(), CacheError> {
        let held = self.rows[row].tokens;
        if tokens > held {
            return Err(CacheError::Beyond {
                row,
                held,
                asked: tokens,
            });
        }
        if tokens == held {
            return Ok(());
        }
        if !tokens.is_multiple_of(self.stride) {
            return Err(CacheError::InsideChunk {
                row,
                asked: tokens,
                stride: self.stride,
            });
        }
        let kept = tokens / self.stride;
        for slot in self.rows[row].slots.split_off(kept) {
            self.release(slot);
        }
        self.rows[row].tokens = tokens;
        Ok(())
    }
}

/// Free slots as maximal runs, start → length.
#[derive(Debug, Clone, Default)]
struct FreeRuns {
    runs: BTreeMap<usize, usize>,
    total: usize,
}

impl FreeRuns {
    fn total(&self) -> usize {
        self.total
    }

    fn release(&mut self, start: usize, length: usize) {
        self.total += length;
        let (mut start, mut length) = (start, length);
        if let Some((&before, &run)) = self.runs.range(..start).next_back()
            && before + run == start
        {
            self.runs.remove(&before);
            (start, length) = (before, run + length);
        }
        if let Some(run) = self.runs.remove(&(start + length)) {
            length += run;
        }
        self.runs.insert(start, length);
    }

    /// `count` slots from `start` on, if all of them are free.
    fn take_at(&mut self, start: usize, count: usize) -> Option<Vec<usize>> {
        let (&run, &length) = self.runs.range(..=start).next_back()?;
        if start + count > run + length {
            return None;
        }
        self.runs.remove(&run);
        if start > run {
            self.runs.insert(run, start - run);
        }
        if start + count < run + length {
            self.runs
                .insert(start + count, run + length - start - count);
        }
        self.total -= count;
        Some((start..start + count).collect())
    }

    /// The first run of at least `count` slots.
    fn take_run(&mut self, count: usize) -> Option<Vec<usize>> {
        let start = *self.runs.iter().find(|(_, length)| **length >= count)?.0;
        self.take_at(start, count)
    }

    fn take_scattered(&mut self, count: usize) -> Vec<usize> {
        let mut slots = Vec::with_capacity(count);
        while slots.len() < count {
            let (&start, &length) = self.runs.iter().next().expect("the caller made room");
            let part = length.min(count - slots.len());
            slots.extend(self.take_at(start, part).expect("the run is free"));
        }
        slots
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(tables: &Tables) {
        let mut counts = vec![0u32; tables.capacity()];
        for row in tables.rows() {
            assert_eq!(row.slots.len(), row.tokens.div_ceil(tables.stride));
            for slot in &row.slots {
                counts[*slot] += 1;
            }
        }
        assert_eq!(counts, tables.references);
        let free: usize = tables.free.runs.values().sum();
        assert_eq!(free, tables.free.total());
        assert_eq!(free, counts.iter().filter(|c| **c == 0).count());
        let ends: Vec<_> = tables.free.runs.iter().map(|(s, l)| (*s, s + l)).collect();
        assert!(
            ends.windows(2).all(|w| w[0].1 < w[1].0),
            "runs are maximal: {ends:?}"
        );
        assert!(
            ends.iter()
                .all(|(s, e)| (*s..*e).all(|slot| counts[slot] == 0))
        );
    }

    #[test]
    fn prompts_are_contiguous_and_shared_by_reorder() {
        let mut tables = Tables::new(2);
        let mut orders = Orders::default();
        tables.join(1);
        tables.extend(0, 9, &mut orders);
        assert_eq!(tables.rows()[0].slots, [0, 1, 2, 3, 4]);
        tables.reorder(&[0, 0, 0]);
        check(&tables);
        assert_eq!(tables.live(), 5);
        // All three continue the open slot 4: two copies, one keeps it.
        for row in 0..3 {
            tables.extend(row, 1, &mut orders);
        }
        assert_eq!(orders.copies.len(), 2);
        assert!(orders.copies.iter().all(|(from, _)| *from == 4));
        assert_eq!(tables.live(), 7);
        check(&tables);
    }

    #[test]
    fn truncation_only_at_chunk_boundaries() {
        let mut tables = Tables::new(3);
        tables.join(1);
        tables.extend(0, 8, &mut Orders::default());
        assert_eq!(
            tables.truncate(0, 7),
            Err(CacheError::InsideChunk {
                row: 0,
                asked: 7,
                stride: 3
            })
        );
        assert_eq!(
            tables.truncate(0, 9),
            Err(CacheError::Beyond {
                row: 0,
                held: 8,
                asked: 9
            })
        );
        tables.truncate(0, 8).unwrap();
        tables.truncate(0, 6).unwrap();
        assert_eq!(tables.live(), 2);
        tables.truncate(0, 0).unwrap();
        assert_eq!(tables.live(), 0);
        check(&tables);
    }

    proptest::proptest! {
        #[test]
        fn any_history_keeps_the_books(
            stride in 1usize..5,
            moves in proptest::collection::vec((0usize..5, 0usize..64, 0usize..9), 1..60),
        ) {
            let mut tables = Tables::new(stride);
            tables.join(2);
            for (kind, seed, count) in moves {
                let rows = tables.rows().len();
                match kind {
                    0 if rows < 12 => tables.join(1),
                    1 => {
                        let order: Vec<usize> =
                            (0..seed % 6).map(|i| (seed / 3 + i * i) % rows.max(1)).collect();
                        if rows > 0 {
                            tables.reorder(&order);
                        }
                    }
                    2 if rows > 0 => {
                        let row = seed % rows;
                        let tokens = tables.rows()[row].tokens;
                        let target = tokens.saturating_sub(count) / stride * stride;
                        tables.truncate(row, target).unwrap();
                    }
                    _ if rows > 0 => {
                        let mut orders = Orders::default();
                        let row = seed % rows;
                        tables.extend(row, count, &mut orders);
                        // The slot that is written to now belongs to this row alone.
                        if count > 0 {
                            let open = *tables.rows()[row].slots.last().unwrap();
                            proptest::prop_assert_eq!(tables.references[open], 1);
                        }
                    }
                    _ => {}
                }
                check(&tables);
            }
        }
    }
}
