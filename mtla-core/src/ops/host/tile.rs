//! How a problem is cut into pieces: tiles of queries, and for each tile the blocks of columns it sees.

use super::{
    super::{AttendProblem, Visibility, dropout::DropoutRow},
    matrix::{Heads, Matrix},
    real::Real,
};

/// Queries computed together, at most.
pub(super) const QUERIES: usize = 128;
/// Columns computed together, at most.
pub(super) const COLUMNS: usize = 128;

/// Some queries of one row of the batch, all of one key/value head: `count` tokens of one head, or one token
/// of `count` heads (which is better where a problem has few queries, as in the last step of a prompt).
#[derive(Debug, Clone, Copy)]
pub(super) struct Tile {
    pub(super) batch: usize,
    pub(super) head: usize,
    pub(super) query: usize,
    pub(super) count: usize,
    pub(super) along: Along,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Along {
    Tokens,
    Heads,
}

impl Tile {
    /// Head and query of the tile's entry `i`.
    pub(super) fn place(&self, i: usize) -> (usize, usize) {
        match self.along {
            Along::Tokens => (self.head, self.query + i),
            Along::Heads => (self.head + i, self.query),
        }
    }

    /// The tile's rows of `x`, which has a row for every query of every head.
    pub(super) fn rows_of<'a, R: Real>(&self, x: &Heads<'a, R>) -> Matrix<'a, R> {
        match self.along {
            Along::Tokens => x.tokens(self.batch, self.head, self.query, self.count),
            Along::Heads => x.heads(self.batch, self.head, self.query, self.count),
        }
    }
}

/// What follows from a problem for every query.
pub(super) struct Plan<'a> {
    pub(super) problem: &'a AttendProblem,
    /// Tokens of a row, where keys are given for all of them.
    pub(super) tokens: Option<usize>,
}

impl Plan<'_> {
    /// Where a query's own key stands.
    pub(super) fn own_token(&self, batch: usize, query: usize) -> usize {
        match (&self.problem.visibility, self.tokens) {
            (Visibility::Causal { offsets, .. }, Some(_)) => offsets[batch] + query,
            _ => query,
        }
    }

    /// Where a column's key stands.
    pub(super) fn column_token(&self, column: usize) -> usize {
        match self.tokens {
            Some(_) => (column + 1) * self.stride() - 1,
            None => column,
        }
    }

    /// Tokens a column.
    pub(super) fn stride(&self) -> usize {
        match self.problem.visibility {
            Visibility::Causal { stride, .. } => stride,
            Visibility::Prefix { .. } => 1,
        }
    }

    /// Heads that share a key/value head.
    pub(super) fn group(&self) -> usize {
        self.problem.heads / self.problem.kv_heads
    }

    /// The tiles of `heads` heads from `head` on, which share one key/value head.
    pub(super) fn tiles(&self, batch: usize, head: usize, heads: usize) -> Vec<Tile> {
        let p = self.problem;
        let length = p.lengths[batch].min(p.queries);
        let tile = |head, query, count, along| Tile {
            batch,
            head,
            query,
            count,
            along,
        };
        if length < heads {
            return (0..length)
                .flat_map(|query| {
                    (0..heads).step_by(QUERIES).map(move |first| {
                        let count = QUERIES.min(heads - first);
                        tile(head + first, query, count, Along::Heads)
                    })
                })
                .collect();
        }
        (head..head + heads)
            .flat_map(|head| {
                (0..length).step_by(QUERIES).map(move |query| {
                    let count = QUERIES.min(length - query);
                    tile(head, query, count, Along::Tokens)
                })
            })
            .collect()
    }

    /// Columns that a query sees, the first ones of its row.
    pub(super) fn visible(&self, batch: usize, query: usize) -> usize {
        match &self.problem.visibility {
            Visibility::Causal { stride, offsets } => (offsets[batch] + query + 1) / stride,
            Visibility::Prefix { lengths } => lengths[batch],
        }
        .min(self.problem.columns)
    }

    /// Whether a query attends to its own running chunk: not where that chunk is complete, which is a column
    /// already.
    pub(super) fn sees_itself(&self, batch: usize, query: usize) -> bool {
        self.problem.self_term
            && match &self.problem.visibility {
                Visibility::Causal { stride, offsets } => {
                    !(offsets[batch] + query + 1).is_multiple_of(*stride)
                }
                Visibility::Prefix { .. } => true,
            }
    }

    /// The blocks of columns that a tile sees, and for each the tile's first entry that sees any of it.
    /// (Later queries see at least what earlier ones see.)
    pub(super) fn blocks(&self, tile: &Tile) -> Vec<Block> {
        let visible = |i| self.visible(tile.batch, tile.place(i).1);
        let mut first = 0;
        (0..visible(tile.count - 1))
            .step_by(COLUMNS)
            .map(|column| {
                while visible(first) <= column {
                    first += 1;
                }
                let end = visible(tile.count - 1).min(column + COLUMNS);
                Block {
                    first,
                    column,
                    count: end - column,
                }
            })
            .collect()
    }

    /// How many of a block's columns entry `i` of the tile sees.
    pub(super) fn visible_in(&self, tile: &Tile, block: &Block, i: usize) -> usize {
        let visible = self.visible(tile.batch, tile.place(i).1);
        visible.saturating_sub(block.column).min(block.count)
    }

    /// The dropout mask's row of one query.
    pub(super) fn dropout(&self, tile: &Tile, i: usize) -> Option<DropoutRow> {
        let p = self.problem;
        let (head, query) = tile.place(i);
        let row = (tile.batch * p.heads + head) * p.queries + query;
        p.dropout.map(|dropout| dropout.row(row as u32))
    }

    /// A measure of the work.
    pub(super) fn multiplications(&self) -> usize {
        let p = self.problem;
        let columns = (0..p.batch)
            .map(|batch| {
                let queries = p.lengths[batch].min(p.queries);
                queries * self.visible(batch, queries.saturating_sub(1)).max(1)
            })
            .sum::<usize>();
        columns * p.heads * (p.key_width + p.value_width)
    }
}

/// Columns `column..column + count`, seen by the entries of a tile from `first` on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Block {
    pub(super) first: usize,
    pub(super) column: usize,
    pub(super) count: usize,
}
