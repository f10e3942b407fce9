//! The input of [`Attention::forward`](super::Attention::forward) and what follows from it on the host.

use burn::tensor::{Bool, Tensor, backend::Backend};

use crate::{
    cache::index,
    ops::{AttendProblem, Dropout, Visibility, plain::Bias},
    rope::{Rotary, RotaryConfig},
};

/// A batch of whole sequences.
///
/// Rows are left-aligned: row `b` is its first `lengths[b]` tokens, what comes after is padding and has no
/// influence on them. By default queries and keys are the same tokens.
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::tensor::{Distribution, Tensor};
/// use burn_flex::Flex;
/// use mtla_core::attention::{AttentionConfig, AttentionInput};
///
/// let device = Default::default();
/// let attention = AttentionConfig::mtla(64, 4).init::<Flex>(&device).unwrap();
/// let x = Tensor::random([2, 7, 64], Distribution::Default, &device);
/// let input = AttentionInput::new(x).with_lengths(vec![7, 4]);
/// assert_eq!(attention.forward(input).context.dims(), [2, 7, 64]);
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct AttentionInput<B: Backend> {
    pub(crate) query: Tensor<B, 3>,
    pub(crate) keys: Option<Tensor<B, 3>>,
    pub(crate) offsets: Option<Vec<usize>>,
    pub(crate) lengths: Option<Vec<usize>>,
    pub(crate) positions: Option<Vec<Vec<usize>>>,
    pub(crate) rotary: Option<RotaryPair<B>>,
    pub(crate) mask: Option<Tensor<B, 3>>,
    pub(crate) key_padding_mask: Option<Tensor<B, 2, Bool>>,
    pub(crate) weights: bool,
    pub(crate) dropout_seed: Option<u64>,
}

/// What [`Attention::forward`](super::Attention::forward) returns.
#[derive(Debug, Clone)]
pub struct AttentionOutput<B: Backend> {
    /// `[batch, queries, d_model]`. What stands beyond a row's length carries no meaning and is not the same on every
    /// path: keep it out of losses.
    pub context: Tensor<B, 3>,
    /// The attention weights if they were asked for, before dropout: `[batch, heads, queries, keys]`, by key token.
    /// For MTLA the weight of a chunk stands at its last token, that of the query's own running chunk at the query's
    /// own token, and 0 elsewhere.
    pub weights: Option<Tensor<B, 4>>,
}

/// Rotations of the queries and of the keys of a batch.
#[derive(Debug, Clone)]
pub struct RotaryPair<B: Backend> {
    pub(crate) query: Rotary<B>,
    pub(crate) key: Rotary<B>,
}

impl<B: Backend> AttentionInput<B> {
    /// Self-attention over `x [batch, tokens, d_model]`.
    pub fn new(x: Tensor<B, 3>) -> Self {
        Self {
            query: x,
            keys: None,
            offsets: None,
            lengths: None,
            positions: None,
            rotary: None,
            mask: None,
            key_padding_mask: None,
            weights: false,
            dropout_seed: None,
        }
    }

    /// Keys `[batch, key tokens, d_model]` other than the queries: a source prefix followed by the query
    /// tokens (the prefix-as-keys form of the published speech and summarisation models). Queries are the
    /// last of the key tokens unless [offsets](Self::with_offsets) say otherwise: give them where rows differ.
    #[must_use]
    pub fn with_keys(mut self, keys: Tensor<B, 3>) -> Self {
        self.keys = Some(keys);
        self
    }

    /// Query `i` of row `b` is key token `offsets[b] + i`.
    #[must_use]
    pub fn with_offsets(mut self, offsets: Vec<usize>) -> Self {
        self.offsets = Some(offsets);
        self
    }

    /// Valid queries of each row; unless given, all of them for which there are keys.
    #[must_use]
    pub fn with_lengths(mut self, lengths: Vec<usize>) -> Self {
        self.lengths = Some(lengths);
        self
    }

    /// Positions of the key tokens for the rotary embedding: one list per row, or one list for all rows;
    /// `0, 1, 2, …` unless given.
    #[must_use]
    pub fn with_positions(mut self, positions: Vec<Vec<usize>>) -> Self {
        self.positions = Some(positions);
        self
    }

    /// Rotations computed before, so that the layers of a model share them (see
    /// [`Attention::rotary`](super::Attention::rotary)).
    #[must_use]
    pub fn with_rotary(mut self, rotary: Option<RotaryPair<B>>) -> Self {
        self.rotary = rotary;
        self
    }

    /// A mask added to the scores, `[1|batch, queries, keys]`, on top of causality; `−∞` hides a key. For
    /// MTLA the entry of a chunk's last token counts for the chunk.
    #[must_use]
    pub fn with_mask(mut self, mask: Tensor<B, 3>) -> Self {
        self.mask = Some(mask);
        self
    }

    /// Hides the keys where `mask [batch, keys]` is true, in the reference implementation's meaning: for
    /// MTLA chunks are counted over padded tokens too, and a chunk is hidden iff its last token is. Rows
    /// then depend on the padding of their batch; give [lengths](Self::with_lengths) instead to keep them
    /// independent.
    #[must_use]
    pub fn with_key_padding_mask(mut self, mask: Tensor<B, 2, Bool>) -> Self {
        self.key_padding_mask = Some(mask);
        self
    }

    /// Returns the attention weights as well. This takes the plain form, which holds the whole matrix of them: slower,
    /// and for looking rather than training.
    #[must_use]
    pub fn with_weights(mut self) -> Self {
        self.weights = true;
        self
    }

    /// Applies the configured dropout with the mask of this seed; without a seed nothing is dropped.
    #[must_use]
    pub fn with_dropout_seed(mut self, seed: Option<u64>) -> Self {
        self.dropout_seed = seed;
        self
    }

    pub(crate) fn keys(&self) -> Tensor<B, 3> {
        self.keys.clone().unwrap_or_else(|| self.query.clone())
    }

    pub(crate) fn span(&self) -> Span {
        let [batch, queries, _] = self.query.dims();
        let keys = self.keys.as_ref().map_or(queries, |keys| keys.dims()[1]);
        assert!(
            keys >= 1 && queries >= 1,
            "an empty sequence has no attention"
        );
        let offsets = self.offsets.clone().unwrap_or_else(|| {
            assert!(
                queries <= keys,
                "{queries} queries are more than {keys} keys"
            );
            vec![keys - queries; batch]
        });
        let lengths = self.lengths.clone().unwrap_or_else(|| {
            offsets
                .iter()
                .map(|offset| queries.min(keys - offset))
                .collect()
        });
        assert!(
            offsets.len() == batch && lengths.len() == batch,
            "{} offsets and {} lengths for {batch} rows",
            offsets.len(),
            lengths.len()
        );
        for (offset, length) in offsets.iter().zip(&lengths) {
            assert!(
                *length <= queries && offset + length <= keys,
                "{length} queries from token {offset} on do not fit into {queries} queries and {keys} keys"
            );
        }
        Span {
            batch,
            queries,
            keys,
            offsets,
            lengths,
        }
    }

    /// Rotations of this input's queries and keys.
    pub(crate) fn rotary(&self, rope: &RotaryConfig, dim: usize) -> RotaryPair<B> {
        if let Some(rotary) = &self.rotary {
            return rotary.clone();
        }
        let span = self.span();
        let (device, dtype) = (self.query.device(), self.query.dtype());
        let keys = self
            .positions
            .clone()
            .unwrap_or_else(|| vec![(0..span.keys).collect()]);
        assert!(
            keys.len() == 1 || keys.len() == span.batch,
            "{} lists of positions for {} rows",
            keys.len(),
            span.batch
        );
        assert!(
            keys.iter().all(|row| row.len() == span.keys),
            "every list of positions has an entry for each of {} keys",
            span.keys
        );
        let key = rope.rotary(dim, &keys, dtype, &device);
        if self.keys.is_none() && span.is_whole() {
            return RotaryPair {
                query: key.clone(),
                key,
            };
        }
        let rows = if keys.len() == 1 && span.is_even() {
            1
        } else {
            span.batch
        };
        let queries: Vec<Vec<usize>> = (0..rows)
            .map(|row| {
                let keys = &keys[row % keys.len()];
                (0..span.queries)
                    .map(|i| keys[(span.offsets[row] + i).min(span.keys - 1)])
                    .collect()
            })
            .collect();
        RotaryPair {
            query: rope.rotary(dim, &queries, dtype, &device),
            key,
        }
    }

    /// The caller's masks, sampled at the columns and at the self term.
    pub(crate) fn bias(&self, span: &Span, stride: usize, self_term: bool) -> Option<Bias<B>> {
        let padding = self.key_padding_mask.as_ref().map(|mask| {
            let [batch, keys] = mask.dims();
            let dtype = self.query.dtype();
            let device = self.query.device();
            Tensor::<B, 3>::zeros([batch, 1, keys], (&device, dtype))
                .mask_fill(mask.clone().reshape([batch, 1, keys]), f32::NEG_INFINITY)
                .expand([batch, span.queries, keys])
        });
        let mask = match (self.mask.clone(), padding) {
            (Some(mask), Some(padding)) => mask + padding,
            (Some(mask), None) | (None, Some(mask)) => mask,
            (None, None) => return None,
        };
        let [rows, queries, keys] = mask.dims();
        assert!(
            queries == span.queries && keys == span.keys && (rows == 1 || rows == span.batch),
            "a mask of shape {:?} for {} rows of {} queries and {} keys",
            mask.dims(),
            span.batch,
            span.queries,
            span.keys
        );
        let chunks = keys / stride;
        let columns = (chunks > 0).then(|| {
            mask.clone()
                .narrow(2, 0, chunks * stride)
                .reshape([rows, 1, queries, chunks, stride])
                .narrow(4, stride - 1, 1)
                .reshape([rows, 1, queries, chunks])
        });
        let self_term = self_term.then(|| {
            let mask = mask.expand([span.batch, queries, keys]);
            let own = index::<B>(&span.own_keys(), &mask.device());
            mask.gather(2, own.reshape([span.batch, queries, 1]))
                .reshape([span.batch, 1, queries, 1])
        });
        Some(Bias { columns, self_term })
    }
}

/// Where the queries of a batch stand in their rows.
#[derive(Debug, Clone)]
pub(crate) struct Span {
    pub(crate) batch: usize,
    pub(crate) queries: usize,
    pub(crate) keys: usize,
    pub(crate) offsets: Vec<usize>,
    pub(crate) lengths: Vec<usize>,
}

impl Span {
    /// All rows start at the same token, and all their queries are keys.
    fn is_even(&self) -> bool {
        let first = self.offsets[0];
        self.offsets.iter().all(|offset| *offset == first) && first + self.queries <= self.keys
    }

    /// The queries are exactly the keys.
    fn is_whole(&self) -> bool {
        self.queries == self.keys && self.is_even()
    }

    /// Each query's own key token (a padding query gets the last one), row by row.
    fn own_keys(&self) -> Vec<usize> {
        self.offsets
            .iter()
            .flat_map(|offset| (0..self.queries).map(move |i| (offset + i).min(self.keys - 1)))
            .collect()
    }

    /// The problem of one layer over this batch, with one key/value head a head; widths follow from the
    /// form that the layer chooses.
    pub(crate) fn problem(
        &self,
        heads: usize,
        stride: usize,
        scale: f64,
        dropout: Option<Dropout>,
    ) -> AttendProblem {
        AttendProblem {
            batch: self.batch,
            heads,
            kv_heads: heads,
            queries: self.queries,
            columns: self.keys / stride,
            self_term: stride > 1,
            key_width: 0,
            value_width: 0,
            visibility: Visibility::Causal {
                stride,
                offsets: self.offsets.clone(),
            },
            lengths: self.lengths.clone(),
            scale,
            dropout,
        }
    }
}

/// Spreads weights over `[columns | self]` to `[batch, heads, queries, keys]`: a column's weight stands at
/// its chunk's last token, the self weight at the query's own token.
pub(crate) fn weights_by_token<B: Backend>(
    weights: Tensor<B, 4>,
    span: &Span,
    stride: usize,
) -> Tensor<B, 4> {
    if stride == 1 {
        return weights;
    }
    let [batch, heads, queries, _] = weights.dims();
    let (device, dtype) = (weights.device(), weights.dtype());
    let columns = span.keys / stride;
    let zeros = |shape: [usize; 5]| Tensor::<B, 5>::zeros(shape, (&device, dtype));
    let mut parts = Vec::new();
    if columns > 0 {
        let ends = weights
            .clone()
            .narrow(3, 0, columns)
            .reshape([batch, heads, queries, columns, 1]);
        let inside = zeros([batch, heads, queries, columns, stride - 1]);
        parts.push(Tensor::cat(vec![inside, ends], 4).reshape([
            batch,
            heads,
            queries,
            columns * stride,
        ]));
    }
    let rest = span.keys - columns * stride;
    if rest > 0 {
        parts.push(zeros([batch, heads, queries, rest, 1]).reshape([batch, heads, queries, rest]));
    }
    let own = index::<B>(&span.own_keys(), &device).reshape([batch, 1, queries, 1]);
    let own = own.expand([batch, heads, queries, 1]);
    Tensor::cat(parts, 3).scatter(
        3,
        own,
        weights.narrow(3, columns, 1),
        burn::tensor::IndexingUpdateOp::Add,
    )
}

/// The dropout of a call: only where a seed is given and something is to be dropped.
pub(crate) fn dropout(probability: f64, seed: Option<u64>) -> Option<Dropout> {
    let seed = seed?;
    (probability > 0.0).then_some(Dropout { probability, seed })
}
