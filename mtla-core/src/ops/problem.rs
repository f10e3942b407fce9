//! What an attention operation is asked to compute: validated shapes and host-side numbers.
//!
//! A problem is built (and checked) once, from the shapes of its operands, before a kernel or a tensor
//! form sees them. Everything that a kernel needs to choose its launch is here on the host, so that no
//! implementation has to read a tensor back.

use std::ops::Range;

use crate::ops::Dropout;

/// A problem whose operands do not fit together: a programmer's mistake in the caller.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProblemError {
    /// Two operands disagree on a dimension.
    #[error("{operand} has shape {found:?}, expected {expected}")]
    Shape {
        /// The operand at fault.
        operand: &'static str,
        /// Its shape.
        found: Vec<usize>,
        /// What would have fitted.
        expected: String,
    },
    /// The number of heads is not a multiple of the number of key/value heads.
    #[error("{heads} query heads cannot be grouped over {kv_heads} key/value heads")]
    Heads {
        /// Query heads.
        heads: usize,
        /// Key/value heads.
        kv_heads: usize,
    },
    /// A list with one entry per row has another length than the batch.
    #[error("{list} has {found} entries for {rows} rows")]
    PerRow {
        /// The list at fault.
        list: &'static str,
        /// Its number of entries.
        found: usize,
        /// The number of rows.
        rows: usize,
    },
    /// A query would attend to a chunk column that was not given.
    #[error(
        "row {row} ends at token {last_token} and needs {needed} columns, {columns} were given"
    )]
    MissingColumns {
        /// The row.
        row: usize,
        /// The absolute index of its last query.
        last_token: usize,
        /// Completed chunks visible to that query.
        needed: usize,
        /// Columns given.
        columns: usize,
    },
    /// A query is a token that there is no key of.
    #[error("row {row} ends at token {needed}, keys of {tokens} tokens were given")]
    MissingTokens {
        /// The row.
        row: usize,
        /// Tokens up to its last query.
        needed: usize,
        /// Tokens given.
        tokens: usize,
    },
    /// A table has no place for the new token's slot.
    #[error("row {row} needs a table of {needed} slots, it has {slots}")]
    MissingSlots {
        /// The row.
        row: usize,
        /// Slots of its tokens, the new one's among them.
        needed: usize,
        /// Slots in its table.
        slots: usize,
    },
    /// A pool of no slots.
    #[error("there is no slot in the pool")]
    EmptyPool,
    /// Nothing at all is visible: no columns and no self term.
    #[error("there are neither columns nor a self term to attend to")]
    Empty,
}

/// Which columns a query sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Visibility {
    /// Causal attention over chunk ends: column `k` is visible to the query that is token `i` of its row
    /// iff `k·stride + stride − 1 ≤ i`. Stride 1 is plain causal attention.
    ///
    /// A self term, where one is given, counts for tokens that do not end a chunk (a chunk end is a
    /// column already).
    Causal {
        /// Tokens per column (`down_rate`; 1 for dense attention and MLA).
        stride: usize,
        /// Absolute index of each row's first query.
        offsets: Vec<usize>,
    },
    /// Every query of row `b` sees the first `lengths[b]` columns (cross-attention over a source).
    Prefix {
        /// Visible columns of each row.
        lengths: Vec<usize>,
    },
}

/// Attention of whole sequences: `softmax(scale · q·[columns | self]ᵀ) · [columns | self]`.
///
/// # Shapes
/// `q [batch, heads, queries, key_width]`, columns `k [batch, kv_heads, columns, key_width]` and
/// `v [batch, kv_heads, columns, value_width]`, optional self keys and values
/// `[batch, kv_heads, queries, …]`; result `[batch, heads, queries, value_width]`.
#[derive(Debug, Clone, PartialEq)]
pub struct AttendProblem {
    /// Rows.
    pub batch: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; each serves `heads / kv_heads` query heads.
    pub kv_heads: usize,
    /// Queries per row (padded).
    pub queries: usize,
    /// Key columns per row (padded); 0 when there is only the self term.
    pub columns: usize,
    /// Whether every query has a self term.
    pub self_term: bool,
    /// Width of queries and keys.
    pub key_width: usize,
    /// Width of values.
    pub value_width: usize,
    /// Which columns a query sees.
    pub visibility: Visibility,
    /// Valid queries of each row; results of later queries carry no meaning and may be skipped.
    pub lengths: Vec<usize>,
    /// Factor on the scores.
    pub scale: f64,
    /// Dropout on the attention weights.
    pub dropout: Option<Dropout>,
}

impl AttendProblem {
    /// Checks the operands' shapes against each other and against the per-row lists.
    ///
    /// # Errors
    /// [`ProblemError`] names the operand or the row that does not fit.
    pub fn validate(
        &self,
        q: [usize; 4],
        columns: Option<([usize; 4], [usize; 4])>,
        self_term: Option<([usize; 4], [usize; 4])>,
    ) -> Result<(), ProblemError> {
        if self.kv_heads == 0 || !self.heads.is_multiple_of(self.kv_heads) {
            return Err(ProblemError::Heads {
                heads: self.heads,
                kv_heads: self.kv_heads,
            });
        }
        let shape = |operand, found: [usize; 4], expected: [usize; 4]| {
            if found == expected {
                return Ok(());
            }
            Err(ProblemError::Shape {
                operand,
                found: found.to_vec(),
                expected: format!("{expected:?}"),
            })
        };
        let (b, h, g) = (self.batch, self.heads, self.kv_heads);
        let (t, k) = (self.queries, self.columns);
        shape("q", q, [b, h, t, self.key_width])?;
        if let Some((keys, values)) = columns {
            shape("k", keys, [b, g, k, self.key_width])?;
            shape("v", values, [b, g, k, self.value_width])?;
        }
        if let Some((keys, values)) = self_term {
            shape("self k", keys, [b, g, t, self.key_width])?;
            shape("self v", values, [b, g, t, self.value_width])?;
        }
        if columns.is_none() && self_term.is_none() {
            return Err(ProblemError::Empty);
        }
        self.validate_rows()
    }

    /// As [`validate`](Self::validate), for keys and values of all tokens of a row, `[batch, kv_heads, tokens,
    /// …]`: columns are the chunk ends among them.
    ///
    /// # Errors
    /// [`ProblemError`] names the operand or the row that does not fit.
    pub fn validate_tokens(
        &self,
        q: [usize; 4],
        (keys, values): ([usize; 4], [usize; 4]),
    ) -> Result<(), ProblemError> {
        let Visibility::Causal { stride, offsets } = &self.visibility else {
            return self.validate(q, Some((keys, values)), None);
        };
        let tokens = keys[2];
        let column = |mut shape: [usize; 4]| {
            shape[2] /= stride;
            shape
        };
        self.validate(q, Some((column(keys), column(values))), None)?;
        if values[2] != tokens {
            return Err(ProblemError::Shape {
                operand: "v",
                found: values.to_vec(),
                expected: format!("{tokens} tokens"),
            });
        }
        for (row, (offset, length)) in offsets.iter().zip(&self.lengths).enumerate() {
            if offset + length > tokens {
                return Err(ProblemError::MissingTokens {
                    row,
                    needed: offset + length,
                    tokens,
                });
            }
        }
        Ok(())
    }

    fn validate_rows(&self) -> Result<(), ProblemError> {
        let per_row = |list, found: usize| {
            if found == self.batch {
                return Ok(());
            }
            Err(ProblemError::PerRow {
                list,
                found,
                rows: self.batch,
            })
        };
        per_row("lengths", self.lengths.len())?;
        match &self.visibility {
            Visibility::Prefix { lengths } => per_row("visible lengths", lengths.len()),
            Visibility::Causal { stride, offsets } => {
                per_row("offsets", offsets.len())?;
                for (row, (offset, length)) in offsets.iter().zip(&self.lengths).enumerate() {
                    let needed = (offset + length) / stride;
                    if needed > self.columns {
                        return Err(ProblemError::MissingColumns {
                            row,
                            last_token: (offset + length).saturating_sub(1),
                            needed,
                            columns: self.columns,
                        });
                    }
                }
                Ok(())
            }
        }
    }
}

/// One token a row against the slot pool.
///
/// # Shapes
/// `q [rows, heads, key_width]`, `row [rows, slot width]`, rotations of cosines and sines `[2, rows|1, 1, rotated
/// channels]`, pool `[slots, slot width]`, packed table `[rows, 1 + max_slots]`; result `[rows, heads, value_width]` and the pool with the new tokens in it.
#[derive(Debug, Clone, PartialEq)]
pub struct DecodeProblem {
    /// Query heads.
    pub heads: usize,
    /// What a slot holds.
    pub layout: SlotLayout,
    /// Tokens per slot.
    pub stride: usize,
    /// Tokens each row held before this one; the new token is number `starts[b]` (from 0) of row `b`.
    pub starts: Vec<usize>,
    /// Slots in the longest row's table, the new token's slot included.
    pub max_slots: usize,
    /// Slots that each row's table begins with as that of the row before it does: as many as that or fewer, so that 0
    /// is right for every row. Forms that read what rows share only once go by it.
    pub common: Vec<usize>,
    /// Factor on the scores.
    pub scale: f64,
}

impl DecodeProblem {
    /// Slots of a row, the new token's slot included.
    pub(super) fn slots(&self, row: usize) -> usize {
        self.starts[row] / self.stride + 1
    }

    /// Slots that all of these neighbouring rows begin with, those of new tokens not among them; 0 for a single row.
    #[cfg(any(feature = "flex", feature = "cube"))]
    pub(super) fn shared(&self, rows: Range<usize>) -> usize {
        let alike = self.common[rows.start + 1..rows.end].iter().copied().min();
        let held = rows.map(|row| self.slots(row) - 1);
        held.fold(alike.unwrap_or(0), usize::min)
    }

    /// Checks the operands' shapes.
    ///
    /// # Errors
    /// [`ProblemError`] names the operand that does not fit.
    pub fn validate(
        &self,
        q: [usize; 3],
        row: [usize; 2],
        rotary: Option<[usize; 4]>,
        gates: Option<[usize; 2]>,
        pool: [usize; 2],
        table: [usize; 2],
    ) -> Result<(), ProblemError> {
        let rows = self.starts.len();
        let shape = |operand, found: &[usize], expected: &[usize]| {
            if found == expected {
                return Ok(());
            }
            Err(ProblemError::Shape {
                operand,
                found: found.to_vec(),
                expected: format!("{expected:?}"),
            })
        };
        shape("q", &q, &[rows, self.heads, self.layout.key_width()])?;
        shape("row", &row, &[rows, self.layout.width()])?;
        shape("pool", &pool, &[pool[0], self.layout.width()])?;
        shape("table", &table, &[rows, 1 + self.max_slots])?;
        if let Some(found) = rotary {
            let of = if found[1] == 1 { 1 } else { rows };
            let expected = [2, of, 1, self.layout.rotated().len()];
            shape("rotation", &found, &expected)?;
        }
        if self.common.len() != rows {
            return Err(ProblemError::PerRow {
                list: "common slots",
                found: self.common.len(),
                rows,
            });
        }
        for row in 0..rows {
            let needed = self.slots(row);
            if needed > self.max_slots {
                return Err(ProblemError::MissingSlots {
                    row,
                    needed,
                    slots: self.max_slots,
                });
            }
        }
        if rows > 0 && pool[0] == 0 {
            return Err(ProblemError::EmptyPool);
        }
        if let Some(found) = gates {
            let chunks = self.starts.iter().max().map_or(0, |p| p / self.stride + 1);
            let expected = [found[0].max(chunks), self.layout.value_width() + 1];
            shape("gate table", &found, &expected)?;
        }
        let kv_heads = self.layout.kv_heads();
        if kv_heads == 0 || !self.heads.is_multiple_of(kv_heads) {
            return Err(ProblemError::Heads {
                heads: self.heads,
                kv_heads,
            });
        }
        Ok(())
    }
}

/// What one slot of a cache holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SlotLayout {
    /// Keys of all key/value heads, then values: `2 · kv_heads · head_dim` wide.
    Dense {
        /// Key/value heads.
        kv_heads: usize,
        /// Width of one head.
        head_dim: usize,
    },
    /// One latent and one rope key for all heads: `rank + rope_dim` wide.
    Latent {
        /// Width of the latent (`kv_lora_rank`).
        rank: usize,
        /// Width of the shared rope key (`qk_rope_head_dim`); 0 without rope.
        rope_dim: usize,
    },
}

impl SlotLayout {
    /// Elements of one slot.
    pub fn width(&self) -> usize {
        match self {
            Self::Dense { kv_heads, head_dim } => 2 * kv_heads * head_dim,
            Self::Latent { rank, rope_dim } => rank + rope_dim,
        }
    }

    /// Width of the keys that a query is compared with.
    pub fn key_width(&self) -> usize {
        match self {
            Self::Dense { head_dim, .. } => *head_dim,
            Self::Latent { rank, rope_dim } => rank + rope_dim,
        }
    }

    /// Width of the values that are summed.
    pub fn value_width(&self) -> usize {
        match self {
            Self::Dense { head_dim, .. } => *head_dim,
            Self::Latent { rank, .. } => *rank,
        }
    }

    /// Channels of a query, and of a key, that a rotary embedding turns.
    pub fn rotated(&self) -> Range<usize> {
        match self {
            Self::Dense { head_dim, .. } => 0..*head_dim,
            Self::Latent { rank, rope_dim } => *rank..rank + rope_dim,
        }
    }

    /// Key/value heads in a slot.
    pub fn kv_heads(&self) -> usize {
        match self {
            Self::Dense { kv_heads, .. } => *kv_heads,
            Self::Latent { .. } => 1,
        }
    }
}
