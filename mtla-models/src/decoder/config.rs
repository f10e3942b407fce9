//! What a decoder looks like, and its fresh weights.

use burn::{
    module::{Module, ModuleMapper, Param},
    nn::{
        EmbeddingConfig, Initializer, LayerNormConfig, LinearConfig, RmsNormConfig,
        norm::{Normalization, NormalizationConfig},
    },
    tensor::{Tensor, backend::Backend},
};
use mtla_core::attention::{Attention, AttentionConfig};
use serde::{Deserialize, Serialize};

use super::{
    Decoder,
    layer::{DecoderLayer, FeedForward},
};
use crate::error::{ConfigError, checker};

/// The norm before each sublayer and before the head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NormKind {
    /// Mean and variance (Ba et al. 2016).
    #[default]
    LayerNorm,
    /// Root mean square only (Zhang & Sennrich 2019).
    RmsNorm,
}

/// The feed-forward sublayer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FeedForwardKind {
    /// `W_down max(W_up x, 0)` (Vaswani et al. 2017): the cheapest.
    Relu,
    /// `W_down gelu(W_up x)`.
    #[default]
    Gelu,
    /// `W_down (silu(W_gate x) ⊙ W_up x)` (Shazeer 2020).
    SwiGlu,
}

/// Configuration of a [`Decoder`].
///
/// ```
/// use mtla_core::attention::AttentionConfig;
/// use mtla_models::decoder::{DecoderConfig, FeedForwardKind, NormKind};
///
/// let config = DecoderConfig::new(32_000, 6, AttentionConfig::mtla(512, 8))
///     .with_feed_forward(FeedForwardKind::SwiGlu)
///     .with_norm(NormKind::RmsNorm);
/// assert_eq!(config.d_ff(), 1368);
/// assert_eq!(
///     config.with_dropout(1.0).validate().unwrap_err().to_string(),
///     "decoder configuration: dropout is 1, expected a probability in [0, 1)"
/// );
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DecoderConfig {
    /// Number of token ids.
    pub vocab_size: usize,
    /// Number of layers.
    pub n_layers: usize,
    /// The attention of every layer; it sets the width `d_model` too.
    pub attention: AttentionConfig,
    /// Inner width of the feed-forward sublayer; see [`d_ff`](Self::d_ff).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub d_ff: Option<usize>,
    /// The feed-forward sublayer.
    #[serde(default)]
    pub feed_forward: FeedForwardKind,
    /// The norms.
    #[serde(default)]
    pub norm: NormKind,
    /// Added to the variance in the norms.
    #[serde(default = "default_norm_eps")]
    pub norm_eps: f64,
    /// Dropout on the embeddings and on each sublayer's output while training. (Dropout on the attention
    /// weights belongs to [`attention`](Self::attention).)
    #[serde(default)]
    pub dropout: f64,
    /// How far back heads begin by looking, in tokens: a list for each of the first layers, with an offset for
    /// each of its first heads (see [`Attention::look_back`]). The attention needs biases for it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub look_back: Vec<Vec<f64>>,
    /// Whether the head uses the transposed embedding as its weight.
    #[serde(default = "default_tie_embeddings")]
    pub tie_embeddings: bool,
}

/// The score of the token that a head begins by looking at, far above what contents give.
const LOOK_BACK_SCORE: f64 = 50.0;

fn default_norm_eps() -> f64 {
    1e-5
}

fn default_tie_embeddings() -> bool {
    true
}

impl DecoderConfig {
    /// Layer norms, GELU of the usual width, tied embeddings, no dropout.
    pub fn new(vocab_size: usize, n_layers: usize, attention: AttentionConfig) -> Self {
        Self {
            vocab_size,
            n_layers,
            attention,
            d_ff: None,
            feed_forward: FeedForwardKind::default(),
            norm: NormKind::default(),
            norm_eps: default_norm_eps(),
            dropout: 0.0,
            look_back: Vec::new(),
            tie_embeddings: default_tie_embeddings(),
        }
    }

    /// Sets the inner width of the feed-forward sublayer.
    #[must_use]
    pub fn with_d_ff(mut self, d_ff: usize) -> Self {
        self.d_ff = Some(d_ff);
        self
    }

    /// Sets the feed-forward sublayer.
    #[must_use]
    pub fn with_feed_forward(mut self, kind: FeedForwardKind) -> Self {
        self.feed_forward = kind;
        self
    }

    /// Sets the norms.
    #[must_use]
    pub fn with_norm(mut self, kind: NormKind) -> Self {
        self.norm = kind;
        self
    }

    /// Sets what is added to the variance in the norms.
    #[must_use]
    pub fn with_norm_eps(mut self, norm_eps: f64) -> Self {
        self.norm_eps = norm_eps;
        self
    }

    /// Sets the dropout on the embeddings and on each sublayer's output.
    #[must_use]
    pub fn with_dropout(mut self, probability: f64) -> Self {
        self.dropout = probability;
        self
    }

    /// Sets how far back heads begin by looking.
    #[must_use]
    pub fn with_look_back(mut self, offsets: Vec<Vec<f64>>) -> Self {
        self.look_back = offsets;
        self
    }

    /// Switches whether the head uses the embedding as its weight.
    #[must_use]
    pub fn with_tied_embeddings(mut self, tie: bool) -> Self {
        self.tie_embeddings = tie;
        self
    }

    /// Width of the model.
    pub fn d_model(&self) -> usize {
        self.attention.d_model()
    }

    /// Inner width of the feed-forward sublayer. Unless given `4 d_model`, and for `SwiGLU`, which has three
    /// matrices instead of two, `8/3 d_model` rounded up to a multiple of 8.
    pub fn d_ff(&self) -> usize {
        let usual = match self.feed_forward {
            FeedForwardKind::Relu | FeedForwardKind::Gelu => 4 * self.d_model(),
            FeedForwardKind::SwiGlu => (8 * self.d_model()).div_ceil(3).next_multiple_of(8),
        };
        self.d_ff.unwrap_or(usual)
    }

    /// Checks all fields.
    ///
    /// # Errors
    /// [`ConfigError`] names the field, its value and what would work.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let check = checker("decoder");
        check(
            self.vocab_size > 0,
            "vocab_size",
            &self.vocab_size,
            "at least 1",
        )?;
        check(self.n_layers > 0, "n_layers", &self.n_layers, "at least 1")?;
        self.attention.validate()?;
        check(self.d_ff() > 0, "d_ff", &self.d_ff(), "at least 1")?;
        let eps = self.norm_eps;
        check(
            eps > 0.0 && eps.is_finite(),
            "norm_eps",
            &eps,
            "a positive number",
        )?;
        let dropout = self.dropout;
        check(
            (0.0..1.0).contains(&dropout),
            "dropout",
            &dropout,
            "a probability in [0, 1)",
        )?;
        let (layers, heads) = (self.n_layers, self.attention.n_heads());
        let fits = self.look_back.len() <= layers
            && self.look_back.iter().all(|layer| layer.len() <= heads)
            && self
                .look_back
                .iter()
                .flatten()
                .all(|offset| offset.is_finite());
        check(
            fits && (self.look_back.is_empty() || self.attention.bias()),
            "look_back",
            &format!("{:?}", self.look_back),
            "at most one list a layer and one offset a head, and an attention with biases",
        )
    }

    /// A decoder with fresh weights, drawn now from the backend's random numbers (after [`Backend::seed`]
    /// the same ones again).
    ///
    /// A matrix has the standard deviation `1/√(3 · inputs)`, which at 768 inputs is GPT-2's 0.02. The
    /// embedding has `1/√(3 · d_model)` where it is the head's weight too, and else 1, so that a token stands
    /// out from what the first layers add to it. The last matrix of each sublayer is smaller by `√(2 · n_layers)`, so
    /// that the residual stream does not grow with depth (Radford et al. 2019, §2.3).
    ///
    /// # Errors
    /// [`ConfigError`] if the sizes do not fit; see [`validate`](Self::validate).
    pub fn init<B: Backend>(&self, device: &B::Device) -> Result<Decoder<B>, ConfigError> {
        Ok(self.init_lazy(device)?.map(&mut DrawNow))
    }

    /// As [`init`](Self::init), but weights are drawn at their first use: those that are replaced before take
    /// neither time nor memory.
    pub(crate) fn init_lazy<B: Backend>(
        &self,
        device: &B::Device,
    ) -> Result<Decoder<B>, ConfigError> {
        self.validate()?;
        let (d_model, vocab_size) = (self.d_model(), self.vocab_size);
        let layers: Result<Vec<_>, ConfigError> = (0..self.n_layers)
            .map(|layer| self.layer(layer, device))
            .collect();
        let std = if self.tie_embeddings {
            (3.0 * d_model as f64).powf(-0.5)
        } else {
            1.0
        };
        Ok(Decoder {
            embedding: EmbeddingConfig::new(vocab_size, d_model)
                .with_initializer(Initializer::Normal { mean: 0.0, std })
                .init(device),
            layers: layers?,
            norm: self.norm(device),
            head: (!self.tie_embeddings).then(|| {
                LinearConfig::new(d_model, vocab_size)
                    .with_bias(false)
                    .init(device)
            }),
            dropout: self.dropout,
        })
    }

    fn layer<B: Backend>(
        &self,
        number: usize,
        device: &B::Device,
    ) -> Result<DecoderLayer<B>, ConfigError> {
        let (d_model, d_ff) = (self.d_model(), self.d_ff());
        let linear = |from, to| LinearConfig::new(from, to).with_bias(false).init(device);
        let gated = self.feed_forward == FeedForwardKind::SwiGlu;
        let mut layer = DecoderLayer {
            attention_norm: self.norm(device),
            attention: self.attention.init(device)?,
            feed_forward_norm: self.norm(device),
            feed_forward: FeedForward {
                kind: self.feed_forward,
                gate: gated.then(|| linear(d_model, d_ff)),
                up: linear(d_model, d_ff),
                down: linear(d_ff, d_model),
            },
        };
        let attention_output = match &mut layer.attention {
            Attention::Grouped(attention) => &mut attention.out_proj,
            Attention::Latent(attention) => &mut attention.wo,
        };
        self.shrink(&mut attention_output.weight, device);
        self.shrink(&mut layer.feed_forward.down.weight, device);
        if let Some(offsets) = self.look_back.get(number) {
            layer.attention.look_back(offsets, LOOK_BACK_SCORE);
        }
        Ok(layer)
    }

    fn norm<B: Backend>(&self, device: &B::Device) -> Normalization<B> {
        let (width, eps) = (self.d_model(), self.norm_eps);
        let config: NormalizationConfig = match self.norm {
            NormKind::LayerNorm => LayerNormConfig::new(width).with_epsilon(eps).into(),
            NormKind::RmsNorm => RmsNormConfig::new(width).with_epsilon(eps).into(),
        };
        config.init(device)
    }

    /// Replaces the weight of a sublayer's last matrix by one that is smaller by `√(2 · n_layers)`.
    fn shrink<B: Backend>(&self, weight: &mut Param<Tensor<B, 2>>, device: &B::Device) {
        let [from, to] = weight.lazy_shape().dims();
        let gain = (3.0 * 2.0 * self.n_layers as f64).powf(-0.5);
        let initializer = Initializer::KaimingUniform {
            gain,
            fan_out_only: false,
        };
        *weight = initializer.init_with([from, to], Some(from), Some(to), device);
    }
}

/// Draws the weights that Burn would draw at their first use: clones of the model are then equal, and which
/// random numbers it gets does not depend on what happens before.
struct DrawNow;

impl<B: Backend> ModuleMapper<B> for DrawNow {}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> DecoderConfig {
        DecoderConfig::new(10, 2, AttentionConfig::mtla(16, 2))
    }

    #[test]
    fn errors_name_the_field() {
        assert_eq!(config().validate(), Ok(()));
        let bad = [
            (
                "vocab_size",
                DecoderConfig {
                    vocab_size: 0,
                    ..config()
                },
            ),
            (
                "n_layers",
                DecoderConfig {
                    n_layers: 0,
                    ..config()
                },
            ),
            ("d_ff", config().with_d_ff(0)),
            ("norm_eps", config().with_norm_eps(0.0)),
            ("norm_eps", config().with_norm_eps(f64::NAN)),
            ("dropout", config().with_dropout(-0.1)),
            ("dropout", config().with_dropout(1.0)),
            ("look_back", config().with_look_back(vec![vec![1.0]])),
        ];
        for (expected, config) in bad {
            let Err(ConfigError::Field { of, field, .. }) = config.validate() else {
                panic!("{config:?} is valid")
            };
            assert_eq!((of, field), ("decoder", expected));
        }
        let attention = AttentionConfig::mtla(16, 2).with_down_rate(0);
        let error = DecoderConfig {
            attention,
            ..config()
        }
        .validate()
        .unwrap_err();
        assert_eq!(
            error.to_string(),
            "attention configuration: down_rate is 0, expected at least 1"
        );
    }

    #[test]
    fn survives_a_file() {
        let all = config()
            .with_d_ff(40)
            .with_feed_forward(FeedForwardKind::SwiGlu)
            .with_norm(NormKind::RmsNorm)
            .with_norm_eps(1e-6)
            .with_dropout(0.1)
            .with_look_back(vec![vec![1.5], vec![]])
            .with_tied_embeddings(false);
        for config in [config(), all] {
            let json = serde_json::to_string(&config).unwrap();
            assert_eq!(
                serde_json::from_str::<DecoderConfig>(&json).unwrap(),
                config
            );
        }
        let short = r#"{"vocab_size": 10, "n_layers": 2,
            "attention": {"type": "mha", "d_model": 16, "n_heads": 2}}"#;
        let config: DecoderConfig = serde_json::from_str(short).unwrap();
        assert_eq!(
            config,
            DecoderConfig::new(10, 2, AttentionConfig::mha(16, 2))
        );
    }

    #[cfg(feature = "flex")]
    #[test]
    fn weights_have_the_documented_spread() {
        let config = DecoderConfig::new(500, 8, AttentionConfig::mha(64, 2));
        let decoder = config
            .init::<burn_flex::Flex>(&burn_flex::FlexDevice)
            .unwrap();
        let layer = &decoder.layers[3];
        let Attention::Grouped(attention) = &layer.attention else {
            unreachable!()
        };
        let spread = |weight: &Param<Tensor<_, 2>>| {
            f64::from(weight.val().powf_scalar(2.0).mean().into_scalar()).sqrt()
        };
        let usual = |inputs: f64| (3.0 * inputs).powf(-0.5);
        for (name, found, expected) in [
            ("embedding", spread(&decoder.embedding.weight), usual(64.0)),
            ("q_proj", spread(&attention.q_proj.weight), usual(64.0)),
            (
                "out_proj",
                spread(&attention.out_proj.weight),
                usual(64.0) / 4.0,
            ),
            ("up", spread(&layer.feed_forward.up.weight), usual(64.0)),
            (
                "down",
                spread(&layer.feed_forward.down.weight),
                usual(256.0) / 4.0,
            ),
        ] {
            assert!(
                (found / expected - 1.0).abs() < 0.1,
                "{name}: {found}, not {expected}"
            );
        }
    }
}
