//! The published `config.json`, field by field.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::rope::RopeScaling;
use crate::error::ConfigError;

/// The attention of a checkpoint, under the name that `model_type` gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum ModelType {
    /// MHA, MQA or GQA, by `num_key_value_heads`.
    #[default]
    #[serde(rename = "llama")]
    Llama,
    /// MLA. The fields and names of `llama-mtla` without those of the temporal gate; Python's package has no
    /// such class.
    #[serde(rename = "llama-mla")]
    LlamaMla,
    /// MTLA, as Python's package `mtla` has it.
    #[serde(rename = "llama-mtla")]
    LlamaMtla,
}

impl ModelType {
    /// The class that Python makes of it.
    pub fn architecture(self) -> &'static str {
        match self {
            Self::Llama => "LlamaForCausalLM",
            Self::LlamaMla => "LlamaMLAForCausalLM",
            Self::LlamaMtla => "LlamaMTLAForCausalLM",
        }
    }
}

/// The `config.json` of a Llama with MHA, MQA, GQA, MLA or MTLA, field by field.
///
/// A field that a file leaves out has the default of Python's class. Fields that do not shape the model (token
/// ids, versions, anything unknown) are in [`other`](Self::other) and are written again as they were.
///
/// ```
/// use mtla_models::llama::{LatentSizes, LlamaConfig};
///
/// // MTLA with everything else as in Llama 3 8B.
/// let llama: LlamaConfig = serde_json::from_str(
///     r#"{"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256,
///         "num_key_value_heads": 8, "rope_theta": 500000.0, "torch_dtype": "bfloat16"}"#,
/// )?;
/// let mtla = llama.with_mtla(LatentSizes::default(), 2)?;
/// assert_eq!(mtla.decoder()?.attention.down_rate(), 2);
/// assert_eq!(mtla.intermediate_size, 14336);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LlamaConfig {
    /// The attention.
    pub model_type: ModelType,
    /// Number of token ids.
    pub vocab_size: usize,
    /// Width of the model.
    pub hidden_size: usize,
    /// Inner width of the feed-forward sublayer.
    pub intermediate_size: usize,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Sets of keys and values of `llama`; as many as query heads unless given. The others ignore it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_key_value_heads: Option<usize>,
    /// Width of a head of `llama`; `hidden_size / num_attention_heads` unless given. The others ignore it, but
    /// Python takes the width of rotated channels from it (see [`with_mtla`](Self::with_mtla)).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub head_dim: Option<usize>,
    /// The activation: `silu`, which is the only one.
    pub hidden_act: String,
    /// Context length of the training; nothing here depends on it.
    pub max_position_embeddings: usize,
    /// Added to the mean square in the norms.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Rescaling of the rotary frequencies.
    pub rope_scaling: Option<RopeScaling>,
    /// Biases on the projections of `llama`'s attention. The others ignore it, as in Python.
    pub attention_bias: bool,
    /// Dropout on the attention weights while training.
    pub attention_dropout: f64,
    /// Biases in the feed-forward sublayer: `false`.
    pub mlp_bias: bool,
    /// Whether the head uses the transposed embedding as its weight.
    pub tie_word_embeddings: bool,
    /// Rank of the query projection; 0 for a full one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub q_lora_rank: Option<usize>,
    /// Width of the latent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kv_lora_rank: Option<usize>,
    /// Width of a head's query and key without position.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub qk_nope_head_dim: Option<usize>,
    /// Width of a head's rotated query, and of the rotated key that all heads share.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub qk_rope_head_dim: Option<usize>,
    /// Width of a head's value.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub v_head_dim: Option<usize>,
    /// Tokens per slot.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub down_rate: Option<usize>,
    /// How Python computes a prompt. What it stands for is always computed here: the same as in training.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recompute_prompt_attn: Option<bool>,
    /// `qk_rope_head_dim / qk_nope_head_dim`, for Python.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub partial_rotary_factor: Option<f64>,
    /// All other fields.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

impl Default for LlamaConfig {
    /// The defaults of Python's `LlamaConfig`: the sizes of the first Llama 7B.
    fn default() -> Self {
        Self {
            model_type: ModelType::Llama,
            vocab_size: 32_000,
            hidden_size: 4096,
            intermediate_size: 11_008,
            num_hidden_layers: 32,
            num_attention_heads: 32,
            num_key_value_heads: None,
            head_dim: None,
            hidden_act: "silu".into(),
            max_position_embeddings: 2048,
            rms_norm_eps: 1e-6,
            rope_theta: 10_000.0,
            rope_scaling: None,
            attention_bias: false,
            attention_dropout: 0.0,
            mlp_bias: false,
            tie_word_embeddings: false,
            q_lora_rank: None,
            kv_lora_rank: None,
            qk_nope_head_dim: None,
            qk_rope_head_dim: None,
            v_head_dim: None,
            down_rate: None,
            recompute_prompt_attn: None,
            partial_rotary_factor: None,
            other: Map::new(),
        }
    }
}

/// The sizes of latent attention; see [`LatentConfig`](mtla_core::attention::LatentConfig) for what they are.
///
/// The defaults are those of Python's `LlamaMTLAConfig`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LatentSizes {
    /// Rank of the query projection; 0 for a full one.
    pub q_lora_rank: usize,
    /// Width of the latent.
    pub kv_lora_rank: usize,
    /// Width of a head's query and key without position.
    pub qk_nope_head_dim: usize,
    /// Width of a head's rotated query, and of the rotated key that all heads share.
    pub qk_rope_head_dim: usize,
    /// Width of a head's value.
    pub v_head_dim: usize,
}

impl Default for LatentSizes {
    fn default() -> Self {
        Self::for_head(64)
    }
}

impl LatentSizes {
    /// The paper's proportions for heads of this width (Deng & Woodland 2025, §5.2): a latent of four heads,
    /// half a head of rotated channels.
    pub fn for_head(width: usize) -> Self {
        Self {
            q_lora_rank: 0,
            kv_lora_rank: 4 * width,
            qk_nope_head_dim: width,
            qk_rope_head_dim: (width / 2).next_multiple_of(2),
            v_head_dim: width,
        }
    }
}

impl LlamaConfig {
    /// This Llama with multi-head latent attention.
    ///
    /// # Errors
    /// [`ConfigError`] if the sizes do not fit.
    pub fn with_mla(&self, sizes: LatentSizes) -> Result<Self, ConfigError> {
        self.with_latent(ModelType::LlamaMla, sizes, None)
    }

    /// This Llama with multi-head temporal latent attention of `down_rate` tokens a slot.
    ///
    /// Python takes the width of rotated channels to be `int(head_dim · qk_rope_head_dim /
    /// qk_nope_head_dim)`; `head_dim` is set so that this comes out as `qk_rope_head_dim`, whatever it was in
    /// the Llama.
    ///
    /// # Errors
    /// [`ConfigError`] if the sizes do not fit.
    pub fn with_mtla(&self, sizes: LatentSizes, down_rate: usize) -> Result<Self, ConfigError> {
        self.with_latent(ModelType::LlamaMtla, sizes, Some(down_rate))
    }

    fn with_latent(
        &self,
        model_type: ModelType,
        sizes: LatentSizes,
        down_rate: Option<usize>,
    ) -> Result<Self, ConfigError> {
        let factor = sizes.qk_rope_head_dim as f64 / sizes.qk_nope_head_dim.max(1) as f64;
        let mut config = Self {
            model_type,
            q_lora_rank: Some(sizes.q_lora_rank),
            kv_lora_rank: Some(sizes.kv_lora_rank),
            qk_nope_head_dim: Some(sizes.qk_nope_head_dim),
            qk_rope_head_dim: Some(sizes.qk_rope_head_dim),
            v_head_dim: Some(sizes.v_head_dim),
            head_dim: Some(python_head_dim(sizes, factor)),
            down_rate,
            recompute_prompt_attn: down_rate.map(|_| true),
            partial_rotary_factor: Some(factor),
            ..self.clone()
        };
        config.set_architecture();
        config.validate()?;
        Ok(config)
    }

    /// Names the class for Python.
    pub(super) fn set_architecture(&mut self) {
        let class = self.model_type.architecture();
        self.other
            .insert("architectures".into(), vec![class].into());
    }

    /// The sizes of the latent attention; those that a file leaves out are Python's defaults.
    pub fn latent_sizes(&self) -> LatentSizes {
        let default = LatentSizes::default();
        LatentSizes {
            q_lora_rank: self.q_lora_rank.unwrap_or(default.q_lora_rank),
            kv_lora_rank: self.kv_lora_rank.unwrap_or(default.kv_lora_rank),
            qk_nope_head_dim: self.qk_nope_head_dim.unwrap_or(default.qk_nope_head_dim),
            qk_rope_head_dim: self.qk_rope_head_dim.unwrap_or(default.qk_rope_head_dim),
            v_head_dim: self.v_head_dim.unwrap_or(default.v_head_dim),
        }
    }
}

/// A `head_dim` from which Python computes the right number of rotated channels; the truncation of its product
/// makes `qk_nope_head_dim` itself wrong for some sizes.
fn python_head_dim(sizes: LatentSizes, factor: f64) -> usize {
    let nope = sizes.qk_nope_head_dim;
    let right = |head_dim: usize| (head_dim as f64 * factor) as usize == sizes.qk_rope_head_dim;
    if !right(nope) && right(nope + 1) {
        nope + 1
    } else {
        nope
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn small() -> LlamaConfig {
        LlamaConfig {
            vocab_size: 11,
            hidden_size: 24,
            intermediate_size: 20,
            num_hidden_layers: 2,
            num_attention_heads: 3,
            ..Default::default()
        }
    }

    #[test]
    fn unknown_fields_are_kept() {
        let json = r#"{"model_type": "llama", "rope_scaling": null, "eos_token_id": [1, 2],
            "quantum": {"x": [1.5, null]}, "hidden_size": 64}"#;
        let config: LlamaConfig = serde_json::from_str(json).unwrap();
        assert_eq!(config.other["eos_token_id"], Value::from(vec![1, 2]));
        let again: Value = serde_json::to_value(&config).unwrap();
        assert_eq!(again["quantum"]["x"][0], 1.5);
        assert_eq!(again["hidden_size"], 64);
        assert_eq!(
            serde_json::from_value::<LlamaConfig>(again).unwrap(),
            config
        );
    }

    #[test]
    fn python_gets_the_right_number_of_rotated_channels() {
        for (nope, rope) in [(64, 32), (49, 8), (128, 64), (48, 32), (21, 14)] {
            let sizes = LatentSizes {
                qk_nope_head_dim: nope,
                qk_rope_head_dim: rope,
                ..LatentSizes::default()
            };
            let config = small().with_mtla(sizes, 2).unwrap();
            let factor = config.partial_rotary_factor.unwrap();
            let rotated = (config.head_dim.unwrap() as f64 * factor) as usize;
            assert_eq!(rotated, rope, "{nope}");
        }
    }
}
