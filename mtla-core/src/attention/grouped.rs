//! MHA, MQA and GQA: heads with keys and values of their own, `n_heads / n_kv_heads` of them sharing one
//! set (Vaswani et al. 2017; Shazeer 2019; Ainslie et al. 2023), with rotary positions.

use burn::{
    module::Module,
    nn::{Linear, LinearConfig},
    tensor::{Tensor, backend::Backend},
};

use super::{
    AttentionInput, AttentionOutput, DenseConfig, RotaryPair,
    input::{Span, dropout, weights_by_token},
    join_heads,
};
use crate::{
    cache::{CacheSpec, LayerPool, NewTokens, PrefillPlan, StepPlan},
    linear::project,
    ops::{
        AttendOperands, AttendProblem, AttentionBackend, DecodeProblem, KeyValue, Keys, SlotLayout,
        Visibility, plain,
    },
    rope::{Rotary, RotaryConfig},
};

/// Attention with grouped heads. Slots hold rotated keys and values of one token.
#[derive(Module, Debug)]
pub struct GroupedAttention<B: Backend> {
    /// `d_model → n_heads · head_dim`.
    pub q_proj: Linear<B>,
    /// `d_model → n_kv_heads · head_dim`.
    pub k_proj: Linear<B>,
    /// `d_model → n_kv_heads · head_dim`.
    pub v_proj: Linear<B>,
    /// `n_heads · head_dim → d_model`.
    pub out_proj: Linear<B>,
    n_heads: usize,
    n_kv_heads: usize,
    head_dim: usize,
    dropout: f64,
    #[module(skip)]
    rope: RotaryConfig,
}

impl<B: Backend> GroupedAttention<B> {
    pub(super) fn new(config: &DenseConfig, n_kv_heads: usize, device: &B::Device) -> Self {
        let head_dim = config.head_dim();
        let (d_model, n_heads) = (config.d_model, config.n_heads);
        let linear = |from, to| {
            LinearConfig::new(from, to)
                .with_bias(config.bias)
                .init(device)
        };
        Self {
            q_proj: linear(d_model, n_heads * head_dim),
            k_proj: linear(d_model, n_kv_heads * head_dim),
            v_proj: linear(d_model, n_kv_heads * head_dim),
            out_proj: linear(n_heads * head_dim, d_model),
            n_heads,
            n_kv_heads,
            head_dim,
            dropout: config.dropout,
            rope: config.rope,
        }
    }

    pub(super) fn rope(&self) -> (RotaryConfig, usize) {
        (self.rope, self.head_dim)
    }

    pub(super) fn rotary(&self, input: &AttentionInput<B>) -> RotaryPair<B> {
        input.rotary(&self.rope, self.head_dim)
    }

    fn layout(&self) -> SlotLayout {
        SlotLayout::Dense {
            kv_heads: self.n_kv_heads,
            head_dim: self.head_dim,
        }
    }

    pub(super) fn cache_spec(&self) -> CacheSpec {
        CacheSpec {
            layout: self.layout(),
            stride: 1,
            dtype: None,
        }
    }

    fn scale(&self) -> f64 {
        (self.head_dim as f64).powf(-0.5)
    }

    /// Splits `x [batch, tokens, heads · head_dim]` into heads.
    fn heads(&self, x: Tensor<B, 3>) -> Tensor<B, 4> {
        let [batch, tokens, width] = x.dims();
        x.reshape([batch, tokens, width / self.head_dim, self.head_dim])
    }

    fn plan_rotary(&self, plan: &PrefillPlan<B>, x: &Tensor<B, 3>) -> Rotary<B> {
        plan.rotary.clone().unwrap_or_else(|| {
            self.rope
                .rotary(self.head_dim, &plan.positions, x.dtype(), &x.device())
        })
    }
}

impl<B: AttentionBackend> GroupedAttention<B> {
    pub(super) fn forward(&self, input: AttentionInput<B>) -> AttentionOutput<B> {
        let span = input.span();
        let rotary = self.rotary(&input);
        let keys = input.keys();
        let q = self.heads(project(&self.q_proj, input.query.clone()));
        let q = B::rotate(q, &rotary.query, 0);
        let k = self.heads(project(&self.k_proj, keys.clone()));
        let k = B::rotate(k, &rotary.key, 0);
        let v = self.heads(project(&self.v_proj, keys));
        let operands = AttendOperands {
            q: q.swap_dims(1, 2),
            keys: Keys::Tokens(KeyValue {
                k: k.swap_dims(1, 2),
                shared: None,
                v: v.swap_dims(1, 2),
            }),
        };
        let problem = self.problem(&span, input.dropout_seed);
        let bias = input.bias(&span, 1, false);
        let (heads, weights) = if bias.is_some() || input.weights {
            let (heads, weights) = plain::attend_with(operands, &problem, bias);
            (
                heads,
                input.weights.then(|| weights_by_token(weights, &span, 1)),
            )
        } else {
            (B::attend(operands, &problem), None)
        };
        AttentionOutput {
            context: project(&self.out_proj, join_heads(heads)),
            weights,
        }
    }

    fn problem(&self, span: &Span, seed: Option<u64>) -> AttendProblem {
        AttendProblem {
            kv_heads: self.n_kv_heads,
            key_width: self.head_dim,
            value_width: self.head_dim,
            ..span.problem(self.n_heads, 1, self.scale(), dropout(self.dropout, seed))
        }
    }

    pub(super) fn prefill(
        &self,
        x: Tensor<B, 3>,
        plan: &PrefillPlan<B>,
        pool: &mut LayerPool<B>,
    ) -> Tensor<B, 3> {
        let rotary = self.plan_rotary(plan, &x);
        self.write(&x, plan, pool, &rotary);
        let q = B::rotate(self.heads(project(&self.q_proj, x)), &rotary, 0);
        self.attend(q, &plan.starts, &plan.counts, plan, pool)
    }

    pub(super) fn prefill_last(
        &self,
        x: Tensor<B, 3>,
        plan: &PrefillPlan<B>,
        pool: &mut LayerPool<B>,
    ) -> Tensor<B, 2> {
        let [rows, _, _] = x.dims();
        let rotary = self.plan_rotary(plan, &x);
        self.write(&x, plan, pool, &rotary);
        let q = project(&self.q_proj, plan.select_last(x)).unsqueeze_dim::<3>(1);
        let q = B::rotate(self.heads(q), &plan.last_rotary(&rotary), 0);
        let (offsets, lengths) = plan.last_span();
        let y = self.attend(q, &offsets, &lengths, plan, pool);
        let width = y.dims()[2];
        y.reshape([rows, width])
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

    /// Writes the keys and values of the new tokens into their slots.
    fn write(
        &self,
        x: &Tensor<B, 3>,
        plan: &PrefillPlan<B>,
        pool: &mut LayerPool<B>,
        rotary: &Rotary<B>,
    ) {
        let [rows, tokens, _] = x.dims();
        plan.check(x);
        let width = self.n_kv_heads * self.head_dim;
        let k = B::rotate(self.heads(project(&self.k_proj, x.clone())), rotary, 0);
        let v = project(&self.v_proj, x.clone());
        let row = Tensor::cat(vec![k.reshape([rows, tokens, width]), v], 2);
        plan.write(row.reshape([rows * tokens, 2 * width]), pool);
    }

    /// Attends from `q [rows, queries, heads, head_dim]` to the slots of the plan's rows.
    fn attend(
        &self,
        q: Tensor<B, 4>,
        offsets: &[usize],
        lengths: &[usize],
        plan: &PrefillPlan<B>,
        pool: &LayerPool<B>,
    ) -> Tensor<B, 3> {
        let [rows, queries, _, _] = q.dims();
        let slots = plan.table.gather(pool.slots());
        let columns = plan.table.max_slots;
        let kv = plain::to_dtype(slots, q.dtype())
            .reshape([rows, columns, 2 * self.n_kv_heads, self.head_dim])
            .swap_dims(1, 2);
        let operands = AttendOperands {
            q: q.swap_dims(1, 2),
            keys: Keys::Columns {
                columns: Some(KeyValue {
                    k: kv.clone().narrow(1, 0, self.n_kv_heads),
                    shared: None,
                    v: kv.narrow(1, self.n_kv_heads, self.n_kv_heads),
                }),
                own: None,
            },
        };
        let problem = AttendProblem {
            batch: rows,
            heads: self.n_heads,
            kv_heads: self.n_kv_heads,
            queries,
            columns,
            self_term: false,
            key_width: self.head_dim,
            value_width: self.head_dim,
            visibility: Visibility::Causal {
                stride: 1,
                offsets: offsets.to_vec(),
            },
            lengths: lengths.to_vec(),
            scale: self.scale(),
            dropout: None,
        };
        project(&self.out_proj, join_heads(B::attend(operands, &problem)))
    }

    pub(super) fn step(
        &self,
        x: Tensor<B, 2>,
        plan: &StepPlan<B>,
        pool: &mut LayerPool<B>,
    ) -> Tensor<B, 2> {
        let [rows, _] = x.dims();
        let (h, d) = (self.n_heads, self.head_dim);
        let rotary = plan
            .rotary
            .clone()
            .unwrap_or_else(|| self.rope.rotary(d, &plan.positions, x.dtype(), &x.device()));
        let q = project(&self.q_proj, x.clone()).reshape([rows, h, d]);
        let k = project(&self.k_proj, x.clone());
        let row = Tensor::cat(vec![k, project(&self.v_proj, x)], 1);
        let problem = DecodeProblem {
            heads: h,
            layout: self.layout(),
            stride: 1,
            starts: plan.starts.clone(),
            max_slots: plan.table.max_slots,
            common: plan.table.common.clone(),
            scale: self.scale(),
        };
        let new = NewTokens {
            q,
            row,
            rotary,
            gates: None,
        };
        let heads = pool.decode(new, &problem, &plan.table);
        project(&self.out_proj, heads.reshape([rows, h * d]))
    }
}
