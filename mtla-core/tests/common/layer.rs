//! Layers with seeded weights, and the oracles that hold the same weights.

use burn::{
    module::{Module, ModuleMapper, Param},
    nn::{LayerNorm, Linear},
    tensor::{DType, Tensor, TensorData, backend::Backend},
};
use mtla_core::{
    attention::{
        Attention, AttentionConfig, CrossAttention, CrossAttentionConfig, DenseConfig,
        LatentConfig, LatentExpansion, QueryProjection,
    },
    cache::{Cache, CacheSpec},
    ops::AttentionBackend,
    rope::{RotaryConfig, RotaryLayout, RotaryScaling},
    temporal::TemporalGate,
};
use proptest::{prelude::any, prop_oneof, strategy::Strategy};

use super::{
    Numbers, Precision, Tokens,
    oracle::{self, Oracle, Rope},
    values, vectors,
};

/// Every variant, at small and odd sizes.
pub(crate) fn any_attention() -> impl Strategy<Value = AttentionConfig> {
    prop_oneof![2 => any_dense(), 3 => any_latent()]
}

fn any_rope() -> impl Strategy<Value = RotaryConfig> {
    (any::<bool>(), any::<bool>()).prop_map(|(half_split, short)| RotaryConfig {
        theta: if short { 50.0 } else { 10_000.0 },
        layout: if half_split {
            RotaryLayout::HalfSplit
        } else {
            RotaryLayout::Interleaved
        },
        scaling: RotaryScaling::None,
    })
}

fn any_dense() -> impl Strategy<Value = AttentionConfig> {
    let sizes = (0..3, 1usize..3, 1usize..4, 1usize..4, 3usize..8);
    (sizes, any::<bool>(), any_rope()).prop_map(
        |((kind, kv_heads, group, half, d_model), bias, rope)| {
            let dense = DenseConfig {
                d_model,
                n_heads: kv_heads * group,
                head_dim: Some(2 * half),
                bias,
                dropout: 0.0,
                rope,
            };
            match kind {
                0 => AttentionConfig::Mha(dense),
                1 => AttentionConfig::Mqa(dense),
                _ => AttentionConfig::Gqa {
                    n_kv_heads: kv_heads,
                    dense,
                },
            }
        },
    )
}

/// MLA, and MTLA of one to five tokens a slot.
pub(crate) fn any_latent() -> impl Strategy<Value = AttentionConfig> {
    let sizes = (
        3usize..8,
        1usize..4,
        0usize..3,
        4usize..10,
        1usize..4,
        1usize..3,
        1usize..4,
    );
    (sizes, 0usize..6, any::<bool>(), any_rope()).prop_map(|(sizes, down_rate, bias, rope)| {
        let (d_model, n_heads, q_rank, kv_lora_rank, nope, half_rope, value) = sizes;
        let latent = LatentConfig {
            d_model,
            n_heads,
            q_lora_rank: [0, 0, 3][q_rank],
            kv_lora_rank,
            qk_nope_head_dim: nope,
            qk_rope_head_dim: 2 * half_rope,
            v_head_dim: value,
            bias,
            dropout: 0.0,
            rope,
        };
        match down_rate {
            0 => AttentionConfig::Mla(latent),
            down_rate => AttentionConfig::Mtla { down_rate, latent },
        }
    })
}

/// Cross-attention to one to five frames a slot.
pub(crate) fn any_cross() -> impl Strategy<Value = CrossAttentionConfig> {
    let sizes = (
        3usize..8,
        3usize..8,
        1usize..4,
        0usize..3,
        4usize..10,
        1usize..4,
        1usize..4,
    );
    (sizes, 1usize..6, any::<bool>()).prop_map(|(sizes, down_rate, bias)| {
        let (d_model, d_source, n_heads, q_rank, kv_lora_rank, qk_head_dim, v_head_dim) = sizes;
        CrossAttentionConfig {
            d_model,
            d_source,
            n_heads,
            q_lora_rank: [0, 0, 3][q_rank],
            kv_lora_rank,
            qk_head_dim,
            v_head_dim,
            down_rate,
            bias,
            dropout: 0.0,
        }
    })
}

/// Elements that one slot holds, by the published cache sizes: `2·n_kv·d_h` or `c + r`.
pub(crate) fn slot_elements(config: &AttentionConfig) -> usize {
    match config {
        AttentionConfig::Mha(c) => 2 * c.n_heads * c.head_dim(),
        AttentionConfig::Mqa(c) => 2 * c.head_dim(),
        AttentionConfig::Gqa { n_kv_heads, dense } => 2 * n_kv_heads * dense.head_dim(),
        AttentionConfig::Mla(c) | AttentionConfig::Mtla { latent: c, .. } => {
            c.kv_lora_rank + c.qk_rope_head_dim
        }
    }
}

/// A layer with seeded weights and the oracle of the same weights.
#[derive(Debug)]
pub(crate) struct Layer<B: Backend> {
    pub(crate) module: Attention<B>,
    pub(crate) oracle: Oracle,
    pub(crate) d_model: usize,
    pub(crate) stride: usize,
    pub(crate) precision: Precision,
    pub(crate) device: B::Device,
}

impl<B: AttentionBackend> Layer<B> {
    /// A layer in the [precision](Precision::drawn) that the seed draws.
    pub(crate) fn drawn(config: &AttentionConfig, seed: u64, device: &B::Device) -> Self {
        Self::new(config, seed, Precision::drawn::<B>(seed, device), device)
    }

    pub(crate) fn new(
        config: &AttentionConfig,
        seed: u64,
        precision: Precision,
        device: &B::Device,
    ) -> Self {
        let module = config
            .init::<B>(device)
            .expect("the strategies draw valid sizes");
        let module = module.map(&mut Fill::new(seed, precision.dtype));
        Self {
            oracle: read(config, &module),
            module,
            d_model: config.d_model(),
            stride: config.down_rate(),
            precision,
            device: device.clone(),
        }
    }

    pub(crate) fn spec(&self) -> CacheSpec {
        self.module.cache_spec().with_dtype(self.precision.dtype)
    }

    /// An empty cache with `rows` empty rows.
    pub(crate) fn cache(&self, rows: usize) -> Cache<B> {
        let mut cache = Cache::new(self.spec(), 1, &self.device);
        cache.join(rows);
        cache
    }

    pub(crate) fn padded(&self, rows: &[Tokens], longest: usize) -> Tensor<B, 3> {
        super::padded(
            rows,
            [longest, self.d_model],
            self.precision.dtype,
            &self.device,
        )
    }

    pub(crate) fn flat(&self, tokens: &[Vec<f64>]) -> Tensor<B, 2> {
        super::flat(tokens, self.precision.dtype, &self.device)
    }

    #[track_caller]
    pub(crate) fn assert_close(&self, found: &[Vec<f64>], expected: &[Vec<f64>], what: &str) {
        super::assert_close(found, expected, self.precision.tolerance, what);
    }
}

/// A cross-attention layer with seeded weights and the oracle of the same weights.
#[derive(Debug)]
pub(crate) struct CrossLayer<B: Backend> {
    pub(crate) module: CrossAttention<B>,
    pub(crate) oracle: oracle::Latent,
}

impl<B: AttentionBackend> CrossLayer<B> {
    pub(crate) fn new(
        config: &CrossAttentionConfig,
        seed: u64,
        precision: Precision,
        device: &B::Device,
    ) -> Self {
        let module = config
            .init::<B>(device)
            .expect("the strategies draw valid sizes");
        let module = module.map(&mut Fill::new(seed, precision.dtype));
        let m = &module;
        let oracle = oracle::Latent {
            query: query(&m.wq),
            kv_a: linear(&m.wkv_a),
            norm: norm(&m.kv_norm),
            kv_b: expansion(&m.wkv_b),
            out: linear(&m.wo),
            gate: Some(gate(&m.gate)),
            heads: config.n_heads,
            nope: config.qk_head_dim,
            rope_dim: 0,
            value: config.v_head_dim,
            stride: config.down_rate,
            rope: Rope {
                theta: 1.0,
                half_split: false,
            },
        };
        Self { module, oracle }
    }
}

/// Replaces every parameter by seeded numbers of a size that keeps scores and gates lively.
pub(crate) struct Fill {
    numbers: Numbers,
    dtype: DType,
    path: Vec<String>,
}

impl Fill {
    pub(crate) fn new(seed: u64, dtype: DType) -> Self {
        Self {
            numbers: Numbers::new(seed ^ 0x5eed),
            dtype,
            path: Vec::new(),
        }
    }
}

impl<B: Backend> ModuleMapper<B> for Fill {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let (id, old, mapper) = param.consume();
        let shape = old.shape();
        let (mean, deviation) = match self.path.last().map(String::as_str) {
            Some("gamma") => (1.0, 0.2),
            _ if D == 1 => (0.0, 0.3),
            _ => (0.0, (shape[0] as f64).powf(-0.5)),
        };
        let draw = |_| f64::from((mean + deviation * self.numbers.normal()) as f32);
        let drawn: Vec<f64> = (0..shape.num_elements()).map(draw).collect();
        let data = TensorData::new(drawn, shape).convert_dtype(self.dtype);
        let new = Tensor::from_data(data, (&old.device(), self.dtype));
        let new = new.set_require_grad(old.is_require_grad());
        Param::from_mapped_value(id, new, mapper)
    }
}

fn read<B: Backend>(config: &AttentionConfig, module: &Attention<B>) -> Oracle {
    match (config, module) {
        (AttentionConfig::Mha(c), Attention::Grouped(_)) => dense(c, c.n_heads, module),
        (AttentionConfig::Mqa(c), Attention::Grouped(_)) => dense(c, 1, module),
        (
            AttentionConfig::Gqa {
                n_kv_heads,
                dense: c,
            },
            _,
        ) => dense(c, *n_kv_heads, module),
        (AttentionConfig::Mla(c), _) => latent(c, 1, module),
        (
            AttentionConfig::Mtla {
                down_rate,
                latent: c,
            },
            _,
        ) => latent(c, *down_rate, module),
        _ => panic!("{config:?} made another kind of layer"),
    }
}

fn dense<B: Backend>(config: &DenseConfig, kv_heads: usize, module: &Attention<B>) -> Oracle {
    let Attention::Grouped(m) = module else {
        panic!("not a dense layer")
    };
    Oracle::Dense(Box::new(oracle::Dense {
        q: linear(&m.q_proj),
        k: linear(&m.k_proj),
        v: linear(&m.v_proj),
        out: linear(&m.out_proj),
        heads: config.n_heads,
        kv_heads,
        width: config.head_dim(),
        rope: rope(config.rope),
    }))
}

fn latent<B: Backend>(config: &LatentConfig, stride: usize, module: &Attention<B>) -> Oracle {
    let Attention::Latent(m) = module else {
        panic!("not a latent layer")
    };
    Oracle::Latent(Box::new(oracle::Latent {
        query: query(&m.wq),
        kv_a: linear(&m.wkv_a),
        norm: norm(&m.kv_norm),
        kv_b: expansion(&m.wkv_b),
        out: linear(&m.wo),
        gate: m.gate.as_ref().map(gate),
        heads: config.n_heads,
        nope: config.qk_nope_head_dim,
        rope_dim: config.qk_rope_head_dim,
        value: config.v_head_dim,
        stride,
        rope: rope(config.rope),
    }))
}

fn rope(config: RotaryConfig) -> Rope {
    Rope {
        theta: config.theta,
        half_split: config.layout == RotaryLayout::HalfSplit,
    }
}

fn linear<B: Backend>(linear: &Linear<B>) -> oracle::Linear {
    oracle::Linear {
        weight: vectors(linear.weight.val()),
        bias: linear.bias.as_ref().map(|bias| values(bias.val())),
    }
}

fn norm<B: Backend>(norm: &LayerNorm<B>) -> oracle::Norm {
    oracle::Norm {
        gamma: values(norm.gamma.val()),
        beta: values(norm.beta.as_ref().expect("the norm is affine").val()),
    }
}

fn query<B: Backend>(query: &QueryProjection<B>) -> oracle::Query {
    match query {
        QueryProjection::Full(wq) => oracle::Query::Full(linear(wq)),
        QueryProjection::LowRank(q) => oracle::Query::LowRank {
            a: linear(&q.wq_a),
            norm: norm(&q.q_norm),
            b: linear(&q.wq_b),
        },
    }
}

fn gate<B: Backend>(gate: &TemporalGate<B>) -> oracle::Gate {
    oracle::Gate {
        fc_c: linear(&gate.fc_c),
        fc_p: linear(&gate.fc_p),
    }
}

fn expansion<B: Backend>(expansion: &LatentExpansion<B>) -> Tokens {
    vectors(expansion.weight.val())
}
