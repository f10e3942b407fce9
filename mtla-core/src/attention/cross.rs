//! Cross-attention to the temporally compressed latents of a source (the cross-attention variant of MTLA).
//!
//! The source's latents are gated and merged chunk by chunk, once; every query attends to all of the row's
//! slots, `⌈length / down_rate⌉` of them, without positions. A length that is not a multiple of
//! `down_rate` ends in a slot of fewer frames.

use burn::{
    module::Module,
    nn::{LayerNorm, LayerNormConfig, Linear, LinearConfig},
    tensor::{Bool, Tensor, TensorData, backend::Backend},
};
use serde::{Deserialize, Serialize};

use super::{
    ConfigError,
    config::{require, validate_down_rate, validate_dropout},
    expansion::{LatentExpansion, LatentKeys, Latents},
    input::dropout,
    join_heads,
    query::QueryProjection,
};
use crate::{
    cache::{CacheSpec, LayerPool, PrefillPlan, SlotTable},
    linear::project,
    ops::{AttendProblem, AttentionBackend, SlotLayout, Visibility, plain},
    temporal::TemporalGate,
};

/// Configuration of a [`CrossAttention`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CrossAttentionConfig {
    /// Width of the queries and of the output.
    pub d_model: usize,
    /// Width of the source.
    pub d_source: usize,
    /// Heads.
    pub n_heads: usize,
    /// Rank of the query projection; 0 for a full one.
    pub q_lora_rank: usize,
    /// Width of the latent.
    pub kv_lora_rank: usize,
    /// Width of a head's query and key.
    pub qk_head_dim: usize,
    /// Width of a head's value.
    pub v_head_dim: usize,
    /// Source frames per slot.
    pub down_rate: usize,
    /// Biases on all projections but the expansion of the latent.
    pub bias: bool,
    /// Dropout on the attention weights: applied, on any backend, where a call is given a dropout seed, and nowhere
    /// else. Take another seed for each step and layer.
    pub dropout: f64,
}

impl CrossAttentionConfig {
    /// The proportions of [`LatentConfig::new`](super::LatentConfig::new), two frames a slot.
    pub fn new(d_model: usize, n_heads: usize) -> Self {
        let head = d_model / n_heads.max(1);
        Self {
            d_model,
            d_source: d_model,
            n_heads,
            q_lora_rank: 0,
            kv_lora_rank: 4 * head,
            qk_head_dim: head,
            v_head_dim: head,
            down_rate: 2,
            bias: false,
            dropout: 0.0,
        }
    }

    /// A layer with fresh weights.
    ///
    /// # Errors
    /// [`ConfigError`] names the field that does not fit.
    pub fn init<B: Backend>(&self, device: &B::Device) -> Result<CrossAttention<B>, ConfigError> {
        require(self.d_model > 0, "d_model", self.d_model, "at least 1")?;
        require(self.d_source > 0, "d_source", self.d_source, "at least 1")?;
        require(self.n_heads > 0, "n_heads", self.n_heads, "at least 1")?;
        require(
            self.qk_head_dim > 0,
            "qk_head_dim",
            self.qk_head_dim,
            "at least 1",
        )?;
        require(
            self.v_head_dim > 0,
            "v_head_dim",
            self.v_head_dim,
            "at least 1",
        )?;
        validate_down_rate(self.down_rate, self.kv_lora_rank)?;
        validate_dropout(self.dropout)?;
        let linear = |from, to| {
            LinearConfig::new(from, to)
                .with_bias(self.bias)
                .init(device)
        };
        let query = [
            self.d_model,
            self.q_lora_rank,
            self.n_heads * self.qk_head_dim,
        ];
        let heads = [
            self.kv_lora_rank,
            self.n_heads,
            self.qk_head_dim,
            self.v_head_dim,
        ];
        Ok(CrossAttention {
            wq: QueryProjection::new(query, self.bias, device),
            wkv_a: linear(self.d_source, self.kv_lora_rank),
            kv_norm: LayerNormConfig::new(self.kv_lora_rank).init(device),
            wkv_b: LatentExpansion::new(heads, device),
            wo: linear(self.n_heads * self.v_head_dim, self.d_model),
            gate: TemporalGate::new(self.kv_lora_rank, device),
            n_heads: self.n_heads,
            key: self.qk_head_dim,
            stride: self.down_rate,
            dropout: self.dropout,
        })
    }
}

/// A batch of queries and the sources they attend to.
#[derive(Debug, Clone)]
pub struct CrossInput<B: Backend> {
    query: Tensor<B, 3>,
    source: Tensor<B, 3>,
    lengths: Option<Vec<usize>>,
    key_padding_mask: Option<Tensor<B, 2, Bool>>,
    dropout_seed: Option<u64>,
}

impl<B: Backend> CrossInput<B> {
    /// Queries `[batch, queries, d_model]` over sources `[batch, frames, d_source]`.
    pub fn new(query: Tensor<B, 3>, source: Tensor<B, 3>) -> Self {
        Self {
            query,
            source,
            lengths: None,
            key_padding_mask: None,
            dropout_seed: None,
        }
    }

    /// Valid frames of each source; what comes after has no influence. Where there are none the context is 0.
    #[must_use]
    pub fn with_source_lengths(mut self, lengths: Vec<usize>) -> Self {
        self.lengths = Some(lengths);
        self
    }

    /// Hides slots in the reference implementation's meaning: padded frames are merged like others, and a
    /// slot is hidden iff its *first* frame is padded in `mask [batch, frames]`. Give
    /// [lengths](Self::with_source_lengths) instead to keep rows independent of their batch.
    #[must_use]
    pub fn with_key_padding_mask(mut self, mask: Tensor<B, 2, Bool>) -> Self {
        self.key_padding_mask = Some(mask);
        self
    }

    /// Applies the configured dropout with the mask of this seed; without a seed nothing is dropped.
    #[must_use]
    pub fn with_dropout_seed(mut self, seed: Option<u64>) -> Self {
        self.dropout_seed = seed;
        self
    }
}

/// Attention from queries to the compressed latents of a source.
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::tensor::{Distribution, Tensor};
/// use burn_flex::Flex;
/// use mtla_core::{
///     attention::{CrossAttentionConfig, CrossInput},
///     cache::Cache,
/// };
///
/// let device = Default::default();
/// let attention = CrossAttentionConfig::new(64, 4).init::<Flex>(&device).unwrap();
/// let query = Tensor::random([2, 3, 64], Distribution::Default, &device);
/// let source = Tensor::random([2, 9, 64], Distribution::Default, &device);
/// let input = CrossInput::new(query.clone(), source.clone()).with_source_lengths(vec![9, 5]);
/// let y = attention.forward(input);
/// assert_eq!(y.dims(), [2, 3, 64]);
///
/// // The same, one token at a time over a source that is compressed once.
/// let mut cache = Cache::new(attention.cache_spec(), 1, &device);
/// cache.join(2);
/// let plan = cache.extend(&[0, 1], &[9, 5]);
/// attention.prefill_source(source, &plan, cache.layer_mut(0));
/// let table = cache.table(&[0, 1]);
/// let first = attention.step(query.narrow(1, 0, 1).squeeze_dim(1), &table, cache.layer(0));
/// assert_eq!(first.dims(), [2, 64]);
/// # }
/// ```
#[derive(Module, Debug)]
pub struct CrossAttention<B: Backend> {
    /// Queries of all heads.
    pub wq: QueryProjection<B>,
    /// `d_source → kv_lora_rank`.
    pub wkv_a: Linear<B>,
    /// Norm of the latent.
    pub kv_norm: LayerNorm<B>,
    /// `kv_lora_rank → n_heads · (key + value)`.
    pub wkv_b: LatentExpansion<B>,
    /// `n_heads · value → d_model`.
    pub wo: Linear<B>,
    /// The temporal gate.
    pub gate: TemporalGate<B>,
    n_heads: usize,
    key: usize,
    stride: usize,
    dropout: f64,
}

impl<B: AttentionBackend> CrossAttention<B> {
    /// The cache that holds compressed sources; its rows count source frames.
    pub fn cache_spec(&self) -> CacheSpec {
        CacheSpec {
            layout: SlotLayout::Latent {
                rank: self.kv_norm.gamma.dims()[0],
                rope_dim: 0,
            },
            stride: self.stride,
            dtype: None,
        }
    }

    /// Attention of whole sequences, trainable.
    ///
    /// # Shapes
    /// queries `[batch, queries, d_model]`, sources `[batch, frames, d_source]` →
    /// `[batch, queries, d_model]`.
    ///
    /// # Panics
    /// If the parts of the input do not fit together.
    pub fn forward(&self, input: CrossInput<B>) -> Tensor<B, 3> {
        let [batch, frames, _] = input.source.dims();
        let lengths = input.lengths.unwrap_or_else(|| vec![frames; batch]);
        assert!(
            lengths.len() == batch && lengths.iter().all(|n| *n <= frames),
            "source lengths {lengths:?} do not fit {batch} rows of {frames} frames"
        );
        let states = self.compress(input.source, &lengths);
        let slots = states.dims()[1];
        let bias = input.key_padding_mask.map(|mask| {
            let first: Vec<i64> = (0..slots).map(|slot| (slot * self.stride) as i64).collect();
            let first = Tensor::from_data(TensorData::new(first, [slots]), &states.device());
            let hidden = mask.select(1, first).reshape([batch, 1, 1, slots]);
            let zeros = Tensor::zeros([batch, 1, 1, slots], (&states.device(), states.dtype()));
            plain::Bias {
                columns: Some(zeros.mask_fill(hidden, f32::NEG_INFINITY)),
                self_term: None,
            }
        });
        let visible = lengths.iter().map(|n| n.div_ceil(self.stride)).collect();
        let dropout = dropout(self.dropout, input.dropout_seed);
        let problem = AttendProblem {
            dropout,
            ..self.problem(batch, input.query.dims()[1], slots, visible)
        };
        self.attend(input.query, states, problem, bias)
    }

    /// Compressed states of whole sources: `[batch, ⌈frames/s⌉, rank]`.
    fn compress(&self, source: Tensor<B, 3>, lengths: &[usize]) -> Tensor<B, 3> {
        let ([batch, frames, _], s) = (source.dims(), self.stride);
        let latents = self.kv_norm.forward(project(&self.wkv_a, source));
        let rank = latents.dims()[2];
        let slots = frames.div_ceil(s);
        let (device, dtype) = (latents.device(), latents.dtype());
        let missing = slots * s - frames;
        let mut parts = vec![latents];
        if missing > 0 {
            parts.push(Tensor::zeros([batch, missing, rank], (&device, dtype)));
        }
        let gated = self
            .gate
            .forward(Tensor::cat(parts, 1).reshape([batch, slots, s, rank]));
        // Frames beyond a row's length stay out of its last slot.
        let valid: Vec<f32> = lengths
            .iter()
            .flat_map(|n| (0..slots * s).map(move |i| f32::from(u8::from(i < *n))))
            .collect();
        let valid = TensorData::new(valid, [batch, slots, s, 1]);
        let valid = Tensor::<B, 4>::from_data(valid, (&device, dtype));
        (gated * valid).sum_dim(2).reshape([batch, slots, rank])
    }

    fn problem(
        &self,
        batch: usize,
        queries: usize,
        columns: usize,
        visible: Vec<usize>,
    ) -> AttendProblem {
        AttendProblem {
            batch,
            heads: self.n_heads,
            kv_heads: self.n_heads,
            queries,
            columns,
            self_term: false,
            key_width: 0,
            value_width: 0,
            visibility: Visibility::Prefix { lengths: visible },
            lengths: vec![queries; batch],
            scale: (self.key as f64).powf(-0.5),
            dropout: None,
        }
    }

    fn attend(
        &self,
        query: Tensor<B, 3>,
        states: Tensor<B, 3>,
        problem: AttendProblem,
        bias: Option<plain::Bias<B>>,
    ) -> Tensor<B, 3> {
        let [batch, queries, _] = query.dims();
        let q = self
            .wq
            .forward(query)
            .reshape([batch, queries, self.n_heads, self.key]);
        let columns = Latents {
            state: states,
            rope: None,
        };
        let keys = LatentKeys::Columns(columns, None);
        let (heads, _) = self.wkv_b.attend(q, keys, problem, bias, false);
        project(&self.wo, join_heads(heads))
    }

    /// Compresses source frames `[rows, longest, d_source]` into the slots of the plan's rows; a source
    /// may come in several pieces.
    ///
    /// # Panics
    /// If the source or the pool does not fit the plan, or the pool is of another kind of layer.
    pub fn prefill_source(
        &self,
        source: Tensor<B, 3>,
        plan: &PrefillPlan<B>,
        pool: &mut LayerPool<B>,
    ) {
        pool.begin(self.cache_spec());
        plan.check(&source);
        let [rows, frames, _] = source.dims();
        let latents = self.kv_norm.forward(project(&self.wkv_a, source));
        let rank = latents.dims()[2];
        let latents = latents.reshape([rows * frames, rank]);
        let states = plan.gate_and_merge(latents, &self.gate, pool, self.stride);
        plan.write(states, pool);
    }

    /// One query a row, `x [rows, d_model]`, over the source rows of `table`: `[rows, d_model]`, without gradient.
    ///
    /// # Panics
    /// If the table has another number of rows than `x`, or the pool is of another kind of layer.
    pub fn step(&self, x: Tensor<B, 2>, table: &SlotTable<B>, pool: &LayerPool<B>) -> Tensor<B, 2> {
        pool.check(self.cache_spec());
        let [rows, d_model] = x.dims();
        assert!(
            table.lengths.len() == rows,
            "{rows} queries over a table of {} source rows",
            table.lengths.len()
        );
        let states = plain::to_dtype(table.gather(pool.slots()), x.dtype());
        let problem = self.problem(rows, 1, table.max_slots, table.lengths.clone());
        self.attend(x.unsqueeze_dim(1), states, problem, None)
            .reshape([rows, d_model])
            .detach()
    }
}
