//! MLA and MTLA: keys and values of all heads are read from one latent a token (DeepSeek-AI 2024), which
//! MTLA merges over `down_rate` neighbouring tokens (Deng & Woodland 2025).
//!
//! ```text
//! q_nope, q_pe = split(W_q x)             c = LayerNorm(W_kva x)[..rank]      k_pe = RoPE(W_kva x)[rank..]
//! S_i          = c_i                      (MLA)
//!              = Σ w_j c_j over the tokens j ≤ i of i's chunk                 (MTLA)
//! score(i, j)  = ( (q_nope_i W_UK) · S_j + RoPE(q_pe_i) · k_pe_j ) · (nope + rope)^-½
//! y_i          = W_o concat_h( Σ_j softmax_j(score) S_j W_UV )
//! ```
//!
//! Token `i` sees the states at the ends of completed chunks, and its own running one.

use burn::{
    module::Module,
    nn::{LayerNorm, LayerNormConfig, Linear, LinearConfig},
    tensor::{Tensor, backend::Backend},
};

use super::{
    AttentionInput, AttentionOutput, LatentConfig, RotaryPair,
    expansion::{LatentExpansion, LatentKeys, Latents},
    input::{dropout, weights_by_token},
    join_heads,
    query::QueryProjection,
};
use crate::{
    cache::{CacheSpec, LayerPool, NewTokens, PrefillPlan, StepPlan},
    linear::project,
    ops::{AttendProblem, AttentionBackend, DecodeProblem, SlotLayout, Visibility, plain},
    rope::{Rotary, RotaryConfig},
    temporal::TemporalGate,
};

/// Latent attention, with a [gate](TemporalGate) (MTLA) or without (MLA). Slots hold a latent and the
/// rotated key of the slot's newest token.
#[derive(Module, Debug)]
pub struct LatentAttention<B: Backend> {
    /// Queries of all heads.
    pub wq: QueryProjection<B>,
    /// `d_model → kv_lora_rank + qk_rope_head_dim`: latent and shared rope key.
    pub wkv_a: Linear<B>,
    /// Norm of the latent.
    pub kv_norm: LayerNorm<B>,
    /// `kv_lora_rank → n_heads · (nope + v)`.
    pub wkv_b: LatentExpansion<B>,
    /// `n_heads · v → d_model`.
    pub wo: Linear<B>,
    /// The temporal gate; MLA has none.
    pub gate: Option<TemporalGate<B>>,
    n_heads: usize,
    rank: usize,
    nope: usize,
    rope_dim: usize,
    value: usize,
    stride: usize,
    dropout: f64,
    #[module(skip)]
    rope: RotaryConfig,
}

impl<B: Backend> LatentAttention<B> {
    pub(super) fn new(config: &LatentConfig, down_rate: Option<usize>, device: &B::Device) -> Self {
        let c = config;
        let linear = |from, to| LinearConfig::new(from, to).with_bias(c.bias).init(device);
        let query = c.n_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim);
        let heads = [c.kv_lora_rank, c.n_heads, c.qk_nope_head_dim, c.v_head_dim];
        Self {
            wq: QueryProjection::new([c.d_model, c.q_lora_rank, query], c.bias, device),
            wkv_a: linear(c.d_model, c.kv_lora_rank + c.qk_rope_head_dim),
            kv_norm: LayerNormConfig::new(c.kv_lora_rank).init(device),
            wkv_b: LatentExpansion::new(heads, device),
            wo: linear(c.n_heads * c.v_head_dim, c.d_model),
            gate: down_rate.map(|_| TemporalGate::new(c.kv_lora_rank, device)),
            n_heads: c.n_heads,
            rank: c.kv_lora_rank,
            nope: c.qk_nope_head_dim,
            rope_dim: c.qk_rope_head_dim,
            value: c.v_head_dim,
            stride: down_rate.unwrap_or(1),
            dropout: c.dropout,
            rope: c.rope,
        }
    }

    /// Tokens per slot.
    pub fn down_rate(&self) -> usize {
        self.stride
    }

    /// Width of a head's query.
    pub(super) fn head_width(&self) -> usize {
        self.nope + self.rope_dim
    }

    pub(super) fn rope(&self) -> (RotaryConfig, usize) {
        (self.rope, self.rope_dim)
    }

    pub(super) fn rotary(&self, input: &AttentionInput<B>) -> RotaryPair<B> {
        input.rotary(&self.rope, self.rope_dim)
    }

    fn layout(&self) -> SlotLayout {
        SlotLayout::Latent {
            rank: self.rank,
            rope_dim: self.rope_dim,
        }
    }

    pub(super) fn cache_spec(&self) -> CacheSpec {
        CacheSpec {
            layout: self.layout(),
            stride: self.stride,
            dtype: None,
        }
    }

    fn scale(&self) -> f64 {
        ((self.nope + self.rope_dim) as f64).powf(-0.5)
    }
}

impl<B: AttentionBackend> LatentAttention<B> {
    /// Queries of `x [batch, tokens, d_model]`, rotated: `[batch, tokens, heads, nope + rope]`.
    fn queries(&self, x: Tensor<B, 3>, rotary: &Rotary<B>) -> Tensor<B, 4> {
        let [batch, tokens, _] = x.dims();
        let width = self.nope + self.rope_dim;
        let q = self.wq.forward(x);
        B::rotate(
            q.reshape([batch, tokens, self.n_heads, width]),
            rotary,
            self.nope,
        )
    }

    /// Normalised latents and rotated keys of `x [batch, tokens, d_model]`, before any gate.
    fn latents(&self, x: Tensor<B, 3>, rotary: &Rotary<B>) -> Latents<B> {
        let [batch, tokens, _] = x.dims();
        let width = self.rank + self.rope_dim;
        let kv = project(&self.wkv_a, x).reshape([batch, tokens, 1, width]);
        let kv = B::rotate(kv, rotary, self.rank).reshape([batch, tokens, width]);
        Latents {
            state: self.kv_norm.forward(kv.clone().narrow(2, 0, self.rank)),
            rope: Some(kv.narrow(2, self.rank, self.rope_dim)),
        }
    }

    /// Running states of whole sequences: the gate and the merge, chunks counted from each row's start.
    fn states(&self, latents: Tensor<B, 3>) -> Tensor<B, 3> {
        let Some(gate) = &self.gate else {
            return latents;
        };
        let chunks = latents.dims()[1].div_ceil(self.stride);
        B::gate_and_merge(latents, gate.table(chunks), self.stride)
    }

    pub(super) fn forward(&self, input: AttentionInput<B>) -> AttentionOutput<B> {
        let span = input.span();
        let rotary = self.rotary(&input);
        let q = self.queries(input.query.clone(), &rotary.query);
        let mut latents = self.latents(input.keys(), &rotary.key);
        latents.state = self.states(latents.state);

        let problem = span.problem(
            self.n_heads,
            self.stride,
            self.scale(),
            dropout(self.dropout, input.dropout_seed),
        );
        let bias = input.bias(&span, self.stride, self.stride > 1);
        let (heads, weights) =
            self.wkv_b
                .attend(q, LatentKeys::Tokens(latents), problem, bias, input.weights);
        AttentionOutput {
            context: project(&self.wo, join_heads(heads)),
            weights: weights.map(|w| weights_by_token(w, &span, self.stride)),
        }
    }

    fn plan_rotary(&self, plan: &PrefillPlan<B>, x: &Tensor<B, 3>) -> Rotary<B> {
        plan.rotary.clone().unwrap_or_else(|| {
            self.rope
                .rotary(self.rope_dim, &plan.positions, x.dtype(), &x.device())
        })
    }

    pub(super) fn prefill(
        &self,
        x: Tensor<B, 3>,
        plan: &PrefillPlan<B>,
        pool: &mut LayerPool<B>,
    ) -> Tensor<B, 3> {
        let rotary = self.plan_rotary(plan, &x);
        let own = self.write(&x, plan, pool, &rotary);
        let q = self.queries(x, &rotary);
        self.attend_slots(q, own, plan.starts.clone(), plan.counts.clone(), plan, pool)
    }

    pub(super) fn prefill_last(
        &self,
        x: Tensor<B, 3>,
        plan: &PrefillPlan<B>,
        pool: &mut LayerPool<B>,
    ) -> Tensor<B, 2> {
        let [rows, _, d_model] = x.dims();
        let rotary = self.plan_rotary(plan, &x);
        let own = self.write(&x, plan, pool, &rotary);
        let last = |x| plan.select_last(x).unsqueeze_dim::<3>(1);
        let own = own.map(last);
        let q = self.queries(last(x), &plan.last_rotary(&rotary));
        let (offsets, lengths) = plan.last_span();
        self.attend_slots(q, own, offsets, lengths, plan, pool)
            .reshape([rows, d_model])
    }

    pub(super) fn prefill_keys(
        &self,
        x: Tensor<B, 3>,
        plan: &PrefillPlan<B>,
        pool: &mut LayerPool<B>,
    ) {
        let rotary = self.plan_rotary(plan, &x);
        self.write(&x, plan, pool, &rotary);
    }

    /// Writes the new tokens' slots and returns the running states of the tokens.
    fn write(
        &self,
        x: &Tensor<B, 3>,
        plan: &PrefillPlan<B>,
        pool: &mut LayerPool<B>,
        rotary: &Rotary<B>,
    ) -> Latents<B> {
        plan.check(x);
        let [rows, tokens, _] = x.dims();
        let latents = self.latents(x.clone(), rotary);
        let flat = latents.state.reshape([rows * tokens, self.rank]);
        let flat = match &self.gate {
            Some(gate) => plan.gate_and_merge(flat, gate, pool, self.stride),
            None => flat,
        };
        let rope = latents.rope.expect("self-attention has rope keys");
        let flat_rope = rope.clone().reshape([rows * tokens, self.rope_dim]);
        plan.write(Tensor::cat(vec![flat.clone(), flat_rope], 1), pool);
        Latents {
            state: flat.reshape([rows, tokens, self.rank]),
            rope: Some(rope),
        }
    }

    fn attend_slots(
        &self,
        q: Tensor<B, 4>,
        own: Latents<B>,
        offsets: Vec<usize>,
        lengths: Vec<usize>,
        plan: &PrefillPlan<B>,
        pool: &LayerPool<B>,
    ) -> Tensor<B, 3> {
        let [batch, queries, _, _] = q.dims();
        let slots = plain::to_dtype(plan.table.gather(pool.slots()), q.dtype());
        let columns = Latents {
            state: slots.clone().narrow(2, 0, self.rank),
            rope: Some(slots.narrow(2, self.rank, self.rope_dim)),
        };
        let problem = AttendProblem {
            batch,
            heads: self.n_heads,
            kv_heads: self.n_heads,
            queries,
            columns: plan.table.max_slots,
            self_term: self.stride > 1,
            key_width: 0,
            value_width: 0,
            visibility: Visibility::Causal {
                stride: self.stride,
                offsets,
            },
            lengths,
            scale: self.scale(),
            dropout: None,
        };
        let keys = LatentKeys::Columns(columns, (self.stride > 1).then_some(own));
        let (heads, _) = self.wkv_b.attend(q, keys, problem, None, false);
        project(&self.wo, join_heads(heads))
    }

    pub(super) fn step(
        &self,
        x: Tensor<B, 2>,
        plan: &StepPlan<B>,
        pool: &mut LayerPool<B>,
    ) -> Tensor<B, 2> {
        let [rows, _] = x.dims();
        let rotary = plan.rotary.clone().unwrap_or_else(|| {
            self.rope
                .rotary(self.rope_dim, &plan.positions, x.dtype(), &x.device())
        });
        let last_chunk = plan.starts.iter().max().map_or(0, |p| p / self.stride);
        let gates = self.gate.as_ref().map(|gate| pool.gates(gate, last_chunk));

        let q = self.wq.forward(x.clone());
        let q = q.reshape([rows, self.n_heads, self.head_width()]);
        let q = self.wkv_b.absorb_query(q);
        let kv = project(&self.wkv_a, x);
        let latent = self.kv_norm.forward(kv.clone().narrow(1, 0, self.rank));
        let row = Tensor::cat(vec![latent, kv.narrow(1, self.rank, self.rope_dim)], 1);
        let problem = DecodeProblem {
            heads: self.n_heads,
            layout: self.layout(),
            stride: self.stride,
            starts: plan.starts.clone(),
            max_slots: plan.table.max_slots,
            common: plan.table.common.clone(),
            scale: self.scale(),
        };
        let new = NewTokens {
            q,
            row,
            rotary,
            gates,
        };
        let context = pool.decode(new, &problem, &plan.table);
        let heads = self.wkv_b.expand_context(context);
        project(&self.wo, heads.reshape([rows, self.n_heads * self.value]))
    }
}
