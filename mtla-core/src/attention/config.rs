//! What an attention layer looks like: one enum, so that a model names its attention in its configuration.

use burn::tensor::backend::Backend;
use serde::{Deserialize, Serialize};

use super::{Attention, grouped::GroupedAttention, latent::LatentAttention};
use crate::rope::RotaryConfig;

/// An attention configuration with sizes that cannot work.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("attention configuration: {field} is {found}, expected {expected}")]
pub struct ConfigError {
    /// The field at fault.
    pub field: &'static str,
    /// Its value.
    pub found: String,
    /// What would work.
    pub expected: String,
}

pub(super) fn require(
    holds: bool,
    field: &'static str,
    found: impl ToString,
    expected: impl ToString,
) -> Result<(), ConfigError> {
    if holds {
        return Ok(());
    }
    Err(ConfigError {
        field,
        found: found.to_string(),
        expected: expected.to_string(),
    })
}

/// Heads with keys and values of their own (MHA, MQA, GQA).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DenseConfig {
    /// Width of the model.
    pub d_model: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Width of a head; `d_model / n_heads` unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head_dim: Option<usize>,
    /// Biases on all projections.
    #[serde(default)]
    pub bias: bool,
    /// Dropout on the attention weights: applied, on any backend, where a call is given a dropout seed, and nowhere
    /// else. Take another seed for each step and layer.
    #[serde(default)]
    pub dropout: f64,
    /// Rotary embedding of queries and keys.
    #[serde(default)]
    pub rope: RotaryConfig,
}

impl DenseConfig {
    /// Heads of width `d_model / n_heads`, no bias, no dropout.
    pub fn new(d_model: usize, n_heads: usize) -> Self {
        Self {
            d_model,
            n_heads,
            head_dim: None,
            bias: false,
            dropout: 0.0,
            rope: RotaryConfig::default(),
        }
    }

    /// Width of a head.
    pub fn head_dim(&self) -> usize {
        self.head_dim.unwrap_or(self.d_model / self.n_heads.max(1))
    }

    fn validate(&self, n_kv_heads: usize) -> Result<(), ConfigError> {
        let (d, h) = (self.d_model, self.n_heads);
        require(d > 0, "d_model", d, "at least 1")?;
        require(h > 0, "n_heads", h, "at least 1")?;
        require(
            self.head_dim.is_some() || d.is_multiple_of(h),
            "n_heads",
            h,
            format!("a divisor of d_model = {d}, or head_dim given"),
        )?;
        let width = self.head_dim();
        require(
            width > 0 && width.is_multiple_of(2),
            "head_dim",
            width,
            "a positive even number (rotary pairs)",
        )?;
        require(
            n_kv_heads > 0 && h.is_multiple_of(n_kv_heads),
            "n_kv_heads",
            n_kv_heads,
            format!("a divisor of n_heads = {h}"),
        )?;
        validate_dropout(self.dropout)
    }
}

/// Latent attention (MLA): keys and values are read from one low-rank latent a token.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LatentConfig {
    /// Width of the model.
    pub d_model: usize,
    /// Heads.
    pub n_heads: usize,
    /// Rank of the query projection; 0 for a full one.
    #[serde(default)]
    pub q_lora_rank: usize,
    /// Width of the latent.
    pub kv_lora_rank: usize,
    /// Width of a head's query and key without position.
    pub qk_nope_head_dim: usize,
    /// Width of a head's rotated query, and of the rotated key that all heads share.
    pub qk_rope_head_dim: usize,
    /// Width of a head's value.
    pub v_head_dim: usize,
    /// Biases on all projections but the expansion of the latent (which only ever acts through its
    /// weight).
    #[serde(default)]
    pub bias: bool,
    /// Dropout on the attention weights: applied, on any backend, where a call is given a dropout seed, and nowhere
    /// else. Take another seed for each step and layer.
    #[serde(default)]
    pub dropout: f64,
    /// The decoupled rotary embedding.
    #[serde(default)]
    pub rope: RotaryConfig,
}

impl LatentConfig {
    /// The paper's proportions: heads of width `d_h = d_model / n_heads`, a latent of `4 d_h` and a rope
    /// key of `d_h / 2` (Deng & Woodland 2025, §5.2), no query rank, no bias, no dropout.
    pub fn new(d_model: usize, n_heads: usize) -> Self {
        let head = d_model / n_heads.max(1);
        Self {
            d_model,
            n_heads,
            q_lora_rank: 0,
            kv_lora_rank: 4 * head,
            qk_nope_head_dim: head,
            qk_rope_head_dim: (head / 2).next_multiple_of(2),
            v_head_dim: head,
            bias: false,
            dropout: 0.0,
            rope: RotaryConfig::default(),
        }
    }

    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        require(self.d_model > 0, "d_model", self.d_model, "at least 1")?;
        require(self.n_heads > 0, "n_heads", self.n_heads, "at least 1")?;
        let rank = self.kv_lora_rank;
        require(rank > 0, "kv_lora_rank", rank, "at least 1")?;
        let nope = self.qk_nope_head_dim;
        require(nope > 0, "qk_nope_head_dim", nope, "at least 1")?;
        let rope = self.qk_rope_head_dim;
        require(
            rope > 0 && rope.is_multiple_of(2),
            "qk_rope_head_dim",
            rope,
            "a positive even number (rotary pairs)",
        )?;
        require(
            self.v_head_dim > 0,
            "v_head_dim",
            self.v_head_dim,
            "at least 1",
        )?;
        validate_dropout(self.dropout)
    }
}

pub(super) fn validate_down_rate(down_rate: usize, rank: usize) -> Result<(), ConfigError> {
    require(down_rate > 0, "down_rate", down_rate, "at least 1")?;
    require(
        rank >= 4,
        "kv_lora_rank",
        rank,
        "at least 4 (the gate works in kv_lora_rank / 4 dimensions)",
    )
}

pub(super) fn validate_dropout(dropout: f64) -> Result<(), ConfigError> {
    require(
        (0.0..1.0).contains(&dropout),
        "dropout",
        dropout,
        "a probability in [0, 1)",
    )
}

/// The attention of a layer.
///
/// ```
/// use mtla_core::attention::AttentionConfig;
///
/// let mtla = AttentionConfig::mtla(512, 8).with_down_rate(3);
/// assert_eq!(mtla.down_rate(), 3);
/// let mut gqa = AttentionConfig::gqa(512, 8, 3);
/// assert_eq!(
///     gqa.validate().unwrap_err().to_string(),
///     "attention configuration: n_kv_heads is 3, expected a divisor of n_heads = 8"
/// );
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum AttentionConfig {
    /// Multi-head attention: every head has its own keys and values.
    Mha(DenseConfig),
    /// Multi-query attention: all heads share one set of keys and values.
    Mqa(DenseConfig),
    /// Grouped-query attention.
    Gqa {
        /// Sets of keys and values; each serves `n_heads / n_kv_heads` heads.
        n_kv_heads: usize,
        /// The heads.
        #[serde(flatten)]
        dense: DenseConfig,
    },
    /// Multi-head latent attention.
    Mla(LatentConfig),
    /// Multi-head temporal latent attention: latents of `down_rate` neighbouring tokens share a slot.
    Mtla {
        /// Tokens per slot.
        down_rate: usize,
        /// The latents.
        #[serde(flatten)]
        latent: LatentConfig,
    },
}

impl AttentionConfig {
    /// Multi-head attention.
    pub fn mha(d_model: usize, n_heads: usize) -> Self {
        Self::Mha(DenseConfig::new(d_model, n_heads))
    }

    /// Multi-query attention.
    pub fn mqa(d_model: usize, n_heads: usize) -> Self {
        Self::Mqa(DenseConfig::new(d_model, n_heads))
    }

    /// Grouped-query attention.
    pub fn gqa(d_model: usize, n_heads: usize, n_kv_heads: usize) -> Self {
        Self::Gqa {
            n_kv_heads,
            dense: DenseConfig::new(d_model, n_heads),
        }
    }

    /// Multi-head latent attention in the paper's proportions.
    pub fn mla(d_model: usize, n_heads: usize) -> Self {
        Self::Mla(LatentConfig::new(d_model, n_heads))
    }

    /// Multi-head temporal latent attention in the paper's proportions, two tokens a slot.
    pub fn mtla(d_model: usize, n_heads: usize) -> Self {
        Self::Mtla {
            down_rate: 2,
            latent: LatentConfig::new(d_model, n_heads),
        }
    }

    /// Sets the tokens per slot of MTLA; other variants have one token a slot and stay as they are.
    #[must_use]
    pub fn with_down_rate(mut self, rate: usize) -> Self {
        if let Self::Mtla { down_rate, .. } = &mut self {
            *down_rate = rate;
        }
        self
    }

    /// Sets the dropout on the attention weights.
    #[must_use]
    pub fn with_dropout(mut self, probability: f64) -> Self {
        match &mut self {
            Self::Mha(c) | Self::Mqa(c) | Self::Gqa { dense: c, .. } => c.dropout = probability,
            Self::Mla(c) | Self::Mtla { latent: c, .. } => c.dropout = probability,
        }
        self
    }

    /// Sets the rotary embedding.
    #[must_use]
    pub fn with_rope(mut self, rope: RotaryConfig) -> Self {
        match &mut self {
            Self::Mha(c) | Self::Mqa(c) | Self::Gqa { dense: c, .. } => c.rope = rope,
            Self::Mla(c) | Self::Mtla { latent: c, .. } => c.rope = rope,
        }
        self
    }

    /// Switches the biases of the projections.
    #[must_use]
    pub fn with_bias(mut self, bias: bool) -> Self {
        match &mut self {
            Self::Mha(c) | Self::Mqa(c) | Self::Gqa { dense: c, .. } => c.bias = bias,
            Self::Mla(c) | Self::Mtla { latent: c, .. } => c.bias = bias,
        }
        self
    }

    /// The variant's usual short name, as in a configuration file.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Mha(_) => "mha",
            Self::Mqa(_) => "mqa",
            Self::Gqa { .. } => "gqa",
            Self::Mla(_) => "mla",
            Self::Mtla { .. } => "mtla",
        }
    }

    /// Width of the model.
    pub fn d_model(&self) -> usize {
        match self {
            Self::Mha(c) | Self::Mqa(c) | Self::Gqa { dense: c, .. } => c.d_model,
            Self::Mla(c) | Self::Mtla { latent: c, .. } => c.d_model,
        }
    }

    /// Query heads.
    pub fn n_heads(&self) -> usize {
        match self {
            Self::Mha(c) | Self::Mqa(c) | Self::Gqa { dense: c, .. } => c.n_heads,
            Self::Mla(c) | Self::Mtla { latent: c, .. } => c.n_heads,
        }
    }

    /// Whether the projections have biases.
    pub fn bias(&self) -> bool {
        match self {
            Self::Mha(c) | Self::Mqa(c) | Self::Gqa { dense: c, .. } => c.bias,
            Self::Mla(c) | Self::Mtla { latent: c, .. } => c.bias,
        }
    }

    /// The rotary embedding.
    pub fn rope(&self) -> RotaryConfig {
        match self {
            Self::Mha(c) | Self::Mqa(c) | Self::Gqa { dense: c, .. } => c.rope,
            Self::Mla(c) | Self::Mtla { latent: c, .. } => c.rope,
        }
    }

    /// Tokens per slot.
    pub fn down_rate(&self) -> usize {
        match self {
            Self::Mtla { down_rate, .. } => *down_rate,
            _ => 1,
        }
    }

    /// Checks all sizes.
    ///
    /// # Errors
    /// [`ConfigError`] names the field, its value and what would work.
    pub fn validate(&self) -> Result<(), ConfigError> {
        match self {
            Self::Mha(c) => c.validate(c.n_heads),
            Self::Mqa(c) => c.validate(1),
            Self::Gqa { n_kv_heads, dense } => dense.validate(*n_kv_heads),
            Self::Mla(c) => c.validate(),
            Self::Mtla { down_rate, latent } => {
                latent.validate()?;
                validate_down_rate(*down_rate, latent.kv_lora_rank)
            }
        }
    }

    /// A layer with fresh weights.
    ///
    /// # Errors
    /// [`ConfigError`] if the sizes do not fit; see [`validate`](Self::validate).
    pub fn init<B: Backend>(&self, device: &B::Device) -> Result<Attention<B>, ConfigError> {
        self.validate()?;
        Ok(match self {
            Self::Mha(c) => Attention::Grouped(GroupedAttention::new(c, c.n_heads, device)),
            Self::Mqa(c) => Attention::Grouped(GroupedAttention::new(c, 1, device)),
            Self::Gqa { n_kv_heads, dense } => {
                Attention::Grouped(GroupedAttention::new(dense, *n_kv_heads, device))
            }
            Self::Mla(c) => Attention::Latent(LatentAttention::new(c, None, device)),
            Self::Mtla { down_rate, latent } => {
                Attention::Latent(LatentAttention::new(latent, Some(*down_rate), device))
            }
        })
    }
}
