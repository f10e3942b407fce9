//! What the caches of other kinds of attention hold.

use burn_flex::Flex;
use mtla_core::attention::AttentionConfig;
use mtla_models::{ConfigError, decoder::DecoderConfig};
use serde::Serialize;

/// Bytes of cache that a token takes with a kind of attention.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Share {
    /// The kind.
    pub attention: &'static str,
    /// Bytes, all layers together; with MTLA the mean over the tokens of a slot.
    pub bytes_per_token: f64,
}

/// What decoders of this width, depth and number of heads would hold with other kinds of attention, the dense ones
/// first.
///
/// # Errors
/// [`ConfigError`] if the sizes cannot be.
pub fn alternatives(config: &DecoderConfig, float_bytes: usize) -> Result<Vec<Share>, ConfigError> {
    let (width, heads) = (config.d_model(), config.attention.n_heads());
    let latent = match &config.attention {
        AttentionConfig::Mla(latent) | AttentionConfig::Mtla { latent, .. } => {
            AttentionConfig::Mla(latent.clone())
        }
        _ => AttentionConfig::mla(width, heads),
    };
    [
        ("MHA", AttentionConfig::mha(width, heads)),
        (
            "GQA",
            AttentionConfig::gqa(width, heads, (heads / 2).max(1)),
        ),
        ("MLA", latent),
    ]
    .into_iter()
    .map(|(attention, kind)| {
        let spec = kind.init::<Flex>(&Default::default())?.cache_spec();
        let slot = spec.layout.width() * float_bytes * config.n_layers;
        Ok(Share {
            attention,
            bytes_per_token: slot as f64 / spec.stride as f64,
        })
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dense_caches_hold_keys_and_values_and_latent_ones_less() {
        let config = DecoderConfig::new(10, 3, AttentionConfig::mtla(64, 4));
        let shares = alternatives(&config, 4).unwrap();
        let bytes: Vec<f64> = shares.iter().map(|share| share.bytes_per_token).collect();
        assert_eq!(bytes[..2], [2.0 * 64.0 * 4.0 * 3.0, 64.0 * 4.0 * 3.0]);
        let model = config.init::<Flex>(&Default::default()).unwrap();
        assert!((bytes[2] - 2.0 * model.cache_bytes_per_token()).abs() < 1e-9);
    }
}
