//! The field `rope_scaling` of a `config.json`.

use mtla_core::rope::RotaryScaling;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{ConfigError, checker};

/// Rescaling of the rotary frequencies, as a file has it.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct RopeScaling {
    /// `llama3`, or `default` for none. Older files call the field `type`.
    #[serde(alias = "type")]
    pub rope_type: String,
    /// Stretch of the longest wavelengths.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub factor: Option<f64>,
    /// Wavelengths above the original context divided by this are stretched in full.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub low_freq_factor: Option<f64>,
    /// Wavelengths below the original context divided by this are kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub high_freq_factor: Option<f64>,
    /// Context length of the original training, in tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub original_max_position_embeddings: Option<usize>,
    /// All other fields.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

impl RopeScaling {
    /// The rescaling that the fields describe.
    ///
    /// # Errors
    /// [`ConfigError`] if it is of a kind that is not known here, or a number is missing.
    pub fn rotary(&self) -> Result<RotaryScaling, ConfigError> {
        let check = checker("rope_scaling");
        if self.rope_type == "default" {
            return Ok(RotaryScaling::None);
        }
        check(
            self.rope_type == "llama3",
            "rope_type",
            &self.rope_type,
            "llama3 or default",
        )?;
        let number = |field, value: Option<f64>| {
            let fits = value.is_some_and(|x| x > 0.0 && x.is_finite());
            let found = value.map_or("missing".into(), |x| x.to_string());
            check(fits, field, &found, "a positive number")?;
            Ok::<_, ConfigError>(value.unwrap_or_default())
        };
        let original = self.original_max_position_embeddings;
        let scaling = RotaryScaling::Llama3 {
            factor: number("factor", self.factor)?,
            low_freq_factor: number("low_freq_factor", self.low_freq_factor)?,
            high_freq_factor: number("high_freq_factor", self.high_freq_factor)?,
            original_context: original.unwrap_or_default(),
        };
        check(
            self.low_freq_factor < self.high_freq_factor,
            "low_freq_factor",
            &self.low_freq_factor.unwrap_or_default(),
            "a number below high_freq_factor",
        )?;
        check(
            original.is_some_and(|tokens| tokens > 0),
            "original_max_position_embeddings",
            &original.map_or("missing".into(), |tokens| tokens.to_string()),
            "at least 1",
        )?;
        Ok(scaling)
    }

    /// The field for a rescaling; none for none.
    pub fn from_rotary(scaling: RotaryScaling) -> Option<Self> {
        let RotaryScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_context,
        } = scaling
        else {
            return None;
        };
        Some(Self {
            rope_type: "llama3".into(),
            factor: Some(factor),
            low_freq_factor: Some(low_freq_factor),
            high_freq_factor: Some(high_freq_factor),
            original_max_position_embeddings: Some(original_context),
            other: Map::new(),
        })
    }
}
