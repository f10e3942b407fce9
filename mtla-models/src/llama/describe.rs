//! What a `config.json` may say, and the decoder that it describes.

use mtla_core::{
    attention::{AttentionConfig, DenseConfig, LatentConfig},
    rope::{RotaryConfig, RotaryLayout},
};
use serde_json::Value;

use super::{
    config::{LatentSizes, LlamaConfig, ModelType},
    rope::RopeScaling,
};
use crate::{
    decoder::{DecoderConfig, FeedForwardKind, NormKind},
    error::{ConfigError, checker},
};

/// No size in a configuration is larger: products of two stay numbers that a machine has.
const LARGEST: usize = 1 << 24;

/// The tokens per slot of a file that does not say.
const DOWN_RATE: usize = 2;

impl LlamaConfig {
    /// Checks all fields.
    ///
    /// # Errors
    /// [`ConfigError`] names the field, its value and what would work.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.decoder().map(|_| ())
    }

    fn validate_own(&self) -> Result<(), ConfigError> {
        let check = checker("llama");
        let sizes = self.latent_sizes();
        for (field, size) in [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads.unwrap_or(1)),
            ("head_dim", self.head_dim.unwrap_or(1)),
            ("kv_lora_rank", sizes.kv_lora_rank),
            ("qk_nope_head_dim", sizes.qk_nope_head_dim),
            ("qk_rope_head_dim", sizes.qk_rope_head_dim),
            ("v_head_dim", sizes.v_head_dim),
            ("q_lora_rank", sizes.q_lora_rank.max(1)),
            ("down_rate", self.down_rate.unwrap_or(1)),
        ] {
            let fits = (1..=LARGEST).contains(&size);
            check(fits, field, &size, "at least 1 and at most 2^24")?;
        }
        check(
            self.hidden_act == "silu",
            "hidden_act",
            &self.hidden_act,
            "silu",
        )?;
        check(!self.mlp_bias, "mlp_bias", &self.mlp_bias, "false")?;
        let theta = self.rope_theta;
        check(
            theta > 0.0 && theta.is_finite(),
            "rope_theta",
            &theta,
            "a positive number",
        )?;
        check(
            !self.other.contains_key("rope_parameters"),
            "rope_parameters",
            &self.other.get("rope_parameters").unwrap_or(&Value::Null),
            "the fields rope_theta and rope_scaling instead, as transformers 4 writes them",
        )
    }

    /// The decoder that the fields describe.
    ///
    /// # Errors
    /// [`ConfigError`] names a field that cannot be, its value and what would work.
    pub fn decoder(&self) -> Result<DecoderConfig, ConfigError> {
        self.validate_own()?;
        let rope = RotaryConfig {
            theta: self.rope_theta,
            layout: RotaryLayout::HalfSplit,
            scaling: match &self.rope_scaling {
                Some(scaling) => scaling.rotary()?,
                None => Default::default(),
            },
        };
        let attention = self.attention().with_rope(rope);
        let config = DecoderConfig::new(self.vocab_size, self.num_hidden_layers, attention)
            .with_d_ff(self.intermediate_size)
            .with_feed_forward(FeedForwardKind::SwiGlu)
            .with_norm(NormKind::RmsNorm)
            .with_norm_eps(self.rms_norm_eps)
            .with_tied_embeddings(self.tie_word_embeddings);
        config.validate()?;
        Ok(config)
    }

    /// The attention, but for its rotary embedding.
    fn attention(&self) -> AttentionConfig {
        let (d_model, n_heads) = (self.hidden_size, self.num_attention_heads);
        let sizes = self.latent_sizes();
        let latent = LatentConfig {
            q_lora_rank: sizes.q_lora_rank,
            kv_lora_rank: sizes.kv_lora_rank,
            qk_nope_head_dim: sizes.qk_nope_head_dim,
            qk_rope_head_dim: sizes.qk_rope_head_dim,
            v_head_dim: sizes.v_head_dim,
            ..LatentConfig::new(d_model, n_heads)
        };
        let attention = match self.model_type {
            ModelType::Llama => AttentionConfig::Gqa {
                n_kv_heads: self.num_key_value_heads.unwrap_or(n_heads),
                dense: DenseConfig {
                    head_dim: self.head_dim,
                    bias: self.attention_bias,
                    ..DenseConfig::new(d_model, n_heads)
                },
            },
            ModelType::LlamaMla => AttentionConfig::Mla(latent),
            ModelType::LlamaMtla => AttentionConfig::Mtla {
                down_rate: self.down_rate.unwrap_or(DOWN_RATE),
                latent,
            },
        };
        attention.with_dropout(self.attention_dropout)
    }

    /// The file of a decoder. What matters only in training has no place in it: the dropout on activations and
    /// the start of heads.
    ///
    /// # Errors
    /// [`ConfigError`] names a field of a decoder that is no Llama.
    pub fn from_decoder(decoder: &DecoderConfig) -> Result<Self, ConfigError> {
        decoder.validate()?;
        let check = checker("decoder");
        let (norm, feed_forward) = (decoder.norm, decoder.feed_forward);
        check(
            norm == NormKind::RmsNorm,
            "norm",
            &format!("{norm:?}"),
            "RmsNorm, as in a Llama",
        )?;
        check(
            feed_forward == FeedForwardKind::SwiGlu,
            "feed_forward",
            &format!("{feed_forward:?}"),
            "SwiGlu, as in a Llama",
        )?;
        let rope = decoder.attention.rope();
        check(
            rope.layout == RotaryLayout::HalfSplit,
            "rope.layout",
            &format!("{:?}", rope.layout),
            "HalfSplit, as in a Llama",
        )?;
        let mut config = Self {
            vocab_size: decoder.vocab_size,
            hidden_size: decoder.d_model(),
            intermediate_size: decoder.d_ff(),
            num_hidden_layers: decoder.n_layers,
            num_attention_heads: decoder.attention.n_heads(),
            rms_norm_eps: decoder.norm_eps,
            rope_theta: rope.theta,
            rope_scaling: RopeScaling::from_rotary(rope.scaling),
            attention_bias: decoder.attention.bias(),
            tie_word_embeddings: decoder.tie_embeddings,
            ..Self::default()
        };
        match &decoder.attention {
            AttentionConfig::Mha(dense) => config.set_dense(dense, dense.n_heads),
            AttentionConfig::Mqa(dense) => config.set_dense(dense, 1),
            AttentionConfig::Gqa { n_kv_heads, dense } => config.set_dense(dense, *n_kv_heads),
            AttentionConfig::Mla(latent) => return config.set_latent(latent, None),
            AttentionConfig::Mtla { down_rate, latent } => {
                return config.set_latent(latent, Some(*down_rate));
            }
        }
        config.set_architecture();
        config.validate()?;
        Ok(config)
    }

    fn set_dense(&mut self, dense: &DenseConfig, n_kv_heads: usize) {
        self.num_key_value_heads = Some(n_kv_heads);
        self.head_dim = Some(dense.head_dim());
        self.attention_dropout = dense.dropout;
    }

    fn set_latent(
        mut self,
        latent: &LatentConfig,
        down_rate: Option<usize>,
    ) -> Result<Self, ConfigError> {
        let check = checker("decoder");
        check(
            !latent.bias,
            "attention.bias",
            &latent.bias,
            "false, as in a Llama with latent attention",
        )?;
        self.num_key_value_heads = Some(latent.n_heads);
        self.attention_dropout = latent.dropout;
        let sizes = LatentSizes {
            q_lora_rank: latent.q_lora_rank,
            kv_lora_rank: latent.kv_lora_rank,
            qk_nope_head_dim: latent.qk_nope_head_dim,
            qk_rope_head_dim: latent.qk_rope_head_dim,
            v_head_dim: latent.v_head_dim,
        };
        match down_rate {
            Some(down_rate) => self.with_mtla(sizes, down_rate),
            None => self.with_mla(sizes),
        }
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
    fn errors_name_the_field() {
        let bad = [
            ("num_hidden_layers", r#"{"num_hidden_layers": 0}"#),
            ("vocab_size", r#"{"vocab_size": 18446744073709551615}"#),
            ("hidden_act", r#"{"hidden_act": "gelu"}"#),
            ("mlp_bias", r#"{"mlp_bias": true}"#),
            ("rope_theta", r#"{"rope_theta": -1.0}"#),
            ("rope_parameters", r#"{"rope_parameters": {}}"#),
            (
                "rope_type",
                r#"{"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}"#,
            ),
            ("factor", r#"{"rope_scaling": {"rope_type": "llama3"}}"#),
        ];
        for (expected, json) in bad {
            let config: LlamaConfig = serde_json::from_str(json).unwrap();
            let Err(ConfigError::Field { field, .. }) = config.validate() else {
                panic!("{json} is valid")
            };
            assert_eq!(field, expected);
        }
        let odd = LatentSizes {
            qk_rope_head_dim: 7,
            ..LatentSizes::for_head(8)
        };
        assert_eq!(
            small().with_mtla(odd, 2).unwrap_err().to_string(),
            "attention configuration: qk_rope_head_dim is 7, expected a positive even number (rotary pairs)"
        );
    }

    #[test]
    fn there_and_back() {
        let sizes = LatentSizes {
            q_lora_rank: 5,
            v_head_dim: 6,
            ..LatentSizes::for_head(8)
        };
        let gqa = LlamaConfig {
            num_key_value_heads: Some(1),
            head_dim: Some(6),
            attention_bias: true,
            tie_word_embeddings: true,
            ..small()
        };
        let mla = small().with_mla(sizes).unwrap();
        for config in [gqa, mla, small().with_mtla(sizes, 3).unwrap()] {
            let decoder = config.decoder().unwrap();
            let back = LlamaConfig::from_decoder(&decoder).unwrap();
            assert_eq!(back.model_type, config.model_type);
            assert_eq!(back.decoder().unwrap(), decoder);
        }
        let layer_norms = small().decoder().unwrap().with_norm(NormKind::LayerNorm);
        assert_eq!(
            LlamaConfig::from_decoder(&layer_norms)
                .unwrap_err()
                .to_string(),
            "decoder configuration: norm is LayerNorm, expected RmsNorm, as in a Llama"
        );
    }
}
