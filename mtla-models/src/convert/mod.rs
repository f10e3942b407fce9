//! From a trained model with dense attention (MHA, MQA, GQA) to one with latent attention (MLA, MTLA) that begins
//! near it.
//!
//! Each attention becomes a latent one in three steps, all of which look at what inputs the layer has on a text:
//!
//! 1. *Rotary part.* One rotary key is to serve all heads. The pairs of one frequency are mixed among the heads, and the
//!    direction in which they vary most is kept with rotation; what is left of the keys goes on without.
//! 2. *Latent.* The rest of the keys and the values are factorised together: the best map of rank
//!    `kv_lora_rank`, in the mean square over the text's tokens.
//! 3. *Norm.* The latent's layer norm divides each token by its own deviation, which no weight can undo. The
//!    latents are made white and their mean the direction that matters least, so that it takes little away and divides
//!    by nearly the same number everywhere; its scale is the mean deviation.
//!
//! What is exact: keys and values before the norm at full rank. What is not: the norm, and the rotation of what
//! does not fit in one rotary key. So the logits are near and not equal, and some training has to follow; for MTLA,
//! whose gate and merging are new, more of it. The [`ConversionReport`] says how near.
//!
//! Related: MHA2MLA (Ji et al. 2025), `TransMLA` (Meng et al. 2025).
//!
//! ```
//! # #[cfg(feature = "flex")] {
//! use burn::tensor::{Int, Tensor};
//! use burn_flex::Flex;
//! use mtla_core::attention::AttentionConfig;
//! use mtla_models::convert::{Conversion, convert};
//! use mtla_models::decoder::DecoderConfig;
//!
//! let device = Default::default();
//! let config = DecoderConfig::new(50, 2, AttentionConfig::gqa(32, 4, 2));
//! let model = config.init::<Flex>(&device).unwrap();
//! let text = Tensor::<Flex, 1, Int>::arange(0..48, &device).reshape([3, 16]);
//!
//! let conversion = Conversion::new(16, 8).with_down_rate(Some(2));
//! let converted = convert(&model, &config, &conversion, &[text]).unwrap();
//! assert_eq!(converted.config.attention.name(), "mtla");
//! println!("divergence {:.3} nats a token", converted.report.divergence);
//! # }
//! ```

mod keys;
mod layer;
mod linear_algebra;

use burn::tensor::{Int, Tensor, activation::log_softmax, backend::ExecutionError, try_read_sync};
use mtla_core::{
    attention::{Attention, AttentionConfig, AttentionInput, DenseConfig, LatentConfig},
    ops::AttentionBackend,
};
use serde::Serialize;

use crate::{
    decoder::{Decoder, DecoderConfig, DecoderInput},
    error::{ConfigError, checker},
};
use keys::Shape;

/// What a model is to become.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conversion {
    /// Rank of the latent.
    pub kv_lora_rank: usize,
    /// Width of the rotary key, a divisor of the old head width: a smaller one keeps every n-th frequency.
    pub qk_rope_head_dim: usize,
    /// Tokens a cache slot (MTLA), or `None` for MLA.
    pub down_rate: Option<usize>,
}

impl Conversion {
    /// To MLA.
    pub fn new(kv_lora_rank: usize, qk_rope_head_dim: usize) -> Self {
        Self {
            kv_lora_rank,
            qk_rope_head_dim,
            down_rate: None,
        }
    }

    /// To MTLA with this many tokens a slot, or with `None` to MLA.
    #[must_use]
    pub fn with_down_rate(mut self, down_rate: Option<usize>) -> Self {
        self.down_rate = down_rate;
        self
    }

    /// The attention that a dense one becomes.
    ///
    /// # Errors
    /// [`ConvertError`] if `attention` is not dense, or the sizes do not fit it.
    pub fn attention(&self, attention: &AttentionConfig) -> Result<AttentionConfig, ConvertError> {
        let (dense, groups) = dense(attention)?;
        let (rank, rope, width) = (self.kv_lora_rank, self.qk_rope_head_dim, dense.head_dim());
        let check = checker("conversion");
        // Biases are one more input.
        let inputs = dense.d_model + usize::from(dense.bias);
        let most = inputs.min(2 * groups * width);
        check(
            (1..=most).contains(&rank),
            "kv_lora_rank",
            &rank,
            &format!("1 to {most}, which is exact"),
        )?;
        check(
            rope > 0 && rope.is_multiple_of(2) && width.is_multiple_of(rope),
            "qk_rope_head_dim",
            &rope,
            &format!("an even divisor of the head width {width}"),
        )?;
        let latent = LatentConfig {
            d_model: dense.d_model,
            n_heads: dense.n_heads,
            q_lora_rank: 0,
            kv_lora_rank: rank,
            qk_nope_head_dim: width,
            qk_rope_head_dim: rope,
            v_head_dim: width,
            bias: dense.bias,
            dropout: dense.dropout,
            rope: dense.rope,
        };
        Ok(match self.down_rate {
            Some(down_rate) => AttentionConfig::Mtla { down_rate, latent },
            None => AttentionConfig::Mla(latent),
        })
    }
}

/// A converted model.
#[derive(Debug)]
pub struct Converted<B: AttentionBackend> {
    /// Its configuration.
    pub config: DecoderConfig,
    /// The model.
    pub model: Decoder<B>,
    /// How near it is to the old one.
    pub report: ConversionReport,
}

/// How near a converted model is to the old one, on the text of the conversion.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ConversionReport {
    /// By layer.
    pub layers: Vec<LayerReport>,
    /// Kullback-Leibler divergence of the next token's distribution from the old model's, in nats a token.
    pub divergence: f64,
}

/// Root mean squares of differences, in relation to that of what they are differences from.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct LayerReport {
    /// Of keys, before the norm and without regard to rotation.
    pub keys: f64,
    /// Of values, before the norm.
    pub values: f64,
    /// Of the attention's output, for the old model's inputs.
    pub attention: f64,
}

/// Why a model cannot be converted.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    /// Sizes that do not fit the model.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The model's attention is latent already.
    #[error("the model has {found} attention; only mha, mqa and gqa can be converted")]
    NotDense {
        /// Its attention.
        found: &'static str,
    },
    /// There is no text to look at.
    #[error("there is no text: give at least one batch of tokens")]
    NoText,
    /// Weights or hidden states are no numbers.
    #[error("a layer's weights or inputs are NaN, infinite or all 0: the model is damaged")]
    NotFinite,
    /// The device failed.
    #[error("the device failed while converting")]
    Device(#[source] ExecutionError),
    /// The device does not answer without an event loop.
    #[error("this device answers only asynchronously: use `convert_async`")]
    OnlyAsync,
}

/// The dense attention and its number of key/value heads.
fn dense(attention: &AttentionConfig) -> Result<(&DenseConfig, usize), ConvertError> {
    match attention {
        AttentionConfig::Mha(dense) => Ok((dense, dense.n_heads)),
        AttentionConfig::Mqa(dense) => Ok((dense, 1)),
        AttentionConfig::Gqa { n_kv_heads, dense } => Ok((dense, *n_kv_heads)),
        AttentionConfig::Mla(_) | AttentionConfig::Mtla { .. } => Err(ConvertError::NotDense {
            found: attention.name(),
        }),
    }
}

/// Converts `model`, which is of `config`, by what it does on `text`: batches of tokens `[batch, tokens]`
/// without padding. Some thousand tokens are enough, more than `d_model` of them at least.
///
/// # Errors
/// [`ConvertError`] if the model or the sizes do not allow it.
pub async fn convert_async<B: AttentionBackend>(
    model: &Decoder<B>,
    config: &DecoderConfig,
    conversion: &Conversion,
    text: &[Tensor<B, 2, Int>],
) -> Result<Converted<B>, ConvertError> {
    convert_layers(model, config, conversion, text, |_| {}).await
}

async fn convert_layers<B: AttentionBackend>(
    model: &Decoder<B>,
    config: &DecoderConfig,
    conversion: &Conversion,
    text: &[Tensor<B, 2, Int>],
    mut converted_layer: impl FnMut(&LayerReport),
) -> Result<Converted<B>, ConvertError> {
    let (dense, groups) = dense(&config.attention)?;
    let shape = Shape {
        heads: dense.n_heads,
        groups,
        width: dense.head_dim(),
        rope: conversion.qk_rope_head_dim,
        layout: dense.rope.layout,
    };
    let attention = conversion.attention(&config.attention)?;
    let mut new_config = config.clone();
    new_config.attention = attention.clone();
    new_config.look_back.clear();
    new_config.validate()?;
    if text.is_empty() {
        return Err(ConvertError::NoText);
    }
    let (AttentionConfig::Mla(latent) | AttentionConfig::Mtla { latent, .. }) = &attention else {
        unreachable!("a conversion makes latent attention");
    };

    let device = model.embedding.weight.device();
    let mut new = model.clone();
    let mut layers = Vec::with_capacity(model.layers.len());
    let mut states: Vec<Tensor<B, 3>> = text
        .iter()
        .map(|tokens| model.embedding.forward(tokens.clone()))
        .collect();
    for (old, new) in model.layers.iter().zip(&mut new.layers) {
        let x: Vec<_> = states
            .iter()
            .map(|x| old.attention_norm.forward(x.clone()))
            .collect();
        let Attention::Grouped(grouped) = &old.attention else {
            unreachable!("the configuration is of dense attention");
        };
        let mut converted = attention.init::<B>(&device).map_err(ConfigError::from)?;
        let Attention::Latent(empty) = &mut converted else {
            unreachable!("the configuration is of latent attention");
        };
        let errors = layer::convert(grouped, empty, (shape, latent), &x).await?;
        let outputs = |attention: &Attention<B>| -> Vec<Tensor<B, 3>> {
            x.iter()
                .map(|x| attention.forward(AttentionInput::new(x.clone())).context)
                .collect()
        };
        let (before, after) = (outputs(&old.attention), outputs(&converted));
        let report = LayerReport {
            keys: errors.keys,
            values: errors.values,
            attention: relative(&after, &before).await?,
        };
        converted_layer(&report);
        layers.push(report);
        new.attention = converted;
        states = states
            .into_iter()
            .zip(before)
            .map(|(x, attended)| old.after_attention(x, attended))
            .collect();
    }
    let divergence = divergence(model, &new, text).await?;
    Ok(Converted {
        config: new_config,
        model: new,
        report: ConversionReport { layers, divergence },
    })
}

/// As [`convert_async`], and waits for the result.
///
/// # Errors
/// As [`convert_async`], and [`ConvertError::OnlyAsync`] for a GPU in a browser.
pub fn convert<B: AttentionBackend>(
    model: &Decoder<B>,
    config: &DecoderConfig,
    conversion: &Conversion,
    text: &[Tensor<B, 2, Int>],
) -> Result<Converted<B>, ConvertError> {
    convert_with(model, config, conversion, text, |_| {})
}

/// As [`convert`], and shows `converted_layer` each layer as it is converted.
///
/// # Errors
/// As [`convert`].
pub fn convert_with<B: AttentionBackend>(
    model: &Decoder<B>,
    config: &DecoderConfig,
    conversion: &Conversion,
    text: &[Tensor<B, 2, Int>],
    converted_layer: impl FnMut(&LayerReport),
) -> Result<Converted<B>, ConvertError> {
    try_read_sync(convert_layers(
        model,
        config,
        conversion,
        text,
        converted_layer,
    ))
    .unwrap_or(Err(ConvertError::OnlyAsync))
}

/// The root mean square of the difference in relation to that of `before`.
async fn relative<B: AttentionBackend>(
    after: &[Tensor<B, 3>],
    before: &[Tensor<B, 3>],
) -> Result<f64, ConvertError> {
    let (mut difference, mut size) = (0.0, 0.0);
    for (after, before) in after.iter().zip(before) {
        difference += number((after.clone() - before.clone()).square().sum()).await?;
        size += number(before.clone().square().sum()).await?;
    }
    Ok(if size == 0.0 {
        0.0
    } else {
        (difference / size).sqrt()
    })
}

/// Mean over all tokens of the divergence of what follows.
async fn divergence<B: AttentionBackend>(
    old: &Decoder<B>,
    new: &Decoder<B>,
    text: &[Tensor<B, 2, Int>],
) -> Result<f64, ConvertError> {
    let (mut sum, mut tokens) = (0.0, 0);
    for text in text {
        let [old, new] =
            [old, new].map(|model| log_softmax(model.forward(DecoderInput::new(text.clone())), 2));
        sum += number((old.clone().exp() * (old - new)).sum()).await?;
        tokens += text.shape().num_elements();
    }
    Ok(sum / tokens as f64)
}

async fn number<B: AttentionBackend>(x: Tensor<B, 1>) -> Result<f64, ConvertError> {
    let data = x.into_data_async().await.map_err(ConvertError::Device)?;
    Ok(data.iter::<f64>().next().expect("a sum is one number"))
}
