//! What to generate.

use serde::{Deserialize, Serialize};

use super::sampling::SamplingStrategy;
use crate::error::{ConfigError, checker};

/// How long, how often and how to choose.
///
/// ```
/// use mtla_models::generate::{GenerationConfig, SamplingStrategy};
///
/// let config = GenerationConfig::new(100);
/// assert_eq!(config.strategy(), SamplingStrategy::Greedy);
/// assert_eq!(
///     config.with_top_p(1.5).validate().unwrap_err().to_string(),
///     "generation configuration: top_p is 1.5, expected a probability in (0, 1]"
/// );
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GenerationConfig {
    /// Tokens after which a sample ends at the latest.
    pub max_new_tokens: usize,
    /// Divides the logits before sampling; 0 takes the most probable token instead.
    #[serde(default)]
    pub temperature: f64,
    /// Samples among this many most probable tokens only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_k: Option<usize>,
    /// Samples among the most probable tokens that reach this probability together only (after `top_k`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f64>,
    /// The same seed samples the same tokens again.
    #[serde(default)]
    pub seed: u64,
    /// Tokens that end a sample.
    #[serde(default)]
    pub stop_tokens: Vec<u32>,
    /// Samples of each prompt.
    #[serde(default = "default_num_samples")]
    pub num_samples: usize,
}

fn default_num_samples() -> usize {
    1
}

impl GenerationConfig {
    /// Greedy search for `max_new_tokens` tokens.
    pub fn new(max_new_tokens: usize) -> Self {
        Self {
            max_new_tokens,
            temperature: 0.0,
            top_k: None,
            top_p: None,
            seed: 0,
            stop_tokens: Vec::new(),
            num_samples: default_num_samples(),
        }
    }

    /// Sets the temperature.
    #[must_use]
    pub fn with_temperature(mut self, temperature: f64) -> Self {
        self.temperature = temperature;
        self
    }

    /// Sets the number of tokens to sample among.
    #[must_use]
    pub fn with_top_k(mut self, top_k: usize) -> Self {
        self.top_k = Some(top_k);
        self
    }

    /// Sets the probability to sample among.
    #[must_use]
    pub fn with_top_p(mut self, top_p: f64) -> Self {
        self.top_p = Some(top_p);
        self
    }

    /// Sets the seed.
    #[must_use]
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Sets the tokens that end a sample.
    #[must_use]
    pub fn with_stop_tokens(mut self, tokens: impl Into<Vec<u32>>) -> Self {
        self.stop_tokens = tokens.into();
        self
    }

    /// Sets the number of samples of each prompt.
    #[must_use]
    pub fn with_num_samples(mut self, samples: usize) -> Self {
        self.num_samples = samples;
        self
    }

    /// How a token is chosen: greedily if and only if the temperature is 0.
    pub fn strategy(&self) -> SamplingStrategy {
        if self.temperature == 0.0 {
            return SamplingStrategy::Greedy;
        }
        SamplingStrategy::Sample {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
        }
    }

    /// Checks all fields.
    ///
    /// # Errors
    /// [`ConfigError`] names the field, its value and what would work.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let check = checker("generation");
        let tokens = self.max_new_tokens;
        check(tokens > 0, "max_new_tokens", &tokens, "at least 1")?;
        let t = self.temperature;
        check(
            t >= 0.0 && t.is_finite(),
            "temperature",
            &t,
            "0 (greedy) or a positive number",
        )?;
        let k = self.top_k.unwrap_or(1);
        check(k > 0, "top_k", &k, "at least 1, or none")?;
        let p = self.top_p.unwrap_or(1.0);
        check(p > 0.0 && p <= 1.0, "top_p", &p, "a probability in (0, 1]")?;
        check(
            self.num_samples > 0,
            "num_samples",
            &self.num_samples,
            "at least 1",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_name_the_field() {
        let good = GenerationConfig::new(1).with_temperature(1.0);
        assert_eq!(good.validate(), Ok(()));
        let bad = [
            ("max_new_tokens", GenerationConfig::new(0)),
            ("temperature", good.clone().with_temperature(-0.1)),
            ("temperature", good.clone().with_temperature(f64::NAN)),
            ("temperature", good.clone().with_temperature(f64::INFINITY)),
            ("top_k", good.clone().with_top_k(0)),
            ("top_p", good.clone().with_top_p(0.0)),
            ("top_p", good.clone().with_top_p(1.01)),
            ("top_p", good.clone().with_top_p(f64::NAN)),
            ("num_samples", good.with_num_samples(0)),
        ];
        for (expected, config) in bad {
            let Err(ConfigError::Field { of, field, .. }) = config.validate() else {
                panic!("{config:?} is valid")
            };
            assert_eq!((of, field), ("generation", expected));
        }
    }

    #[test]
    fn only_the_length_has_to_be_given_in_a_file() {
        let config: GenerationConfig = serde_json::from_str(r#"{"max_new_tokens": 5}"#).unwrap();
        assert_eq!(config, GenerationConfig::new(5));
        let all = config
            .with_temperature(0.5)
            .with_top_k(3)
            .with_top_p(0.9)
            .with_seed(1)
            .with_stop_tokens([2])
            .with_num_samples(4);
        let json = serde_json::to_string(&all).unwrap();
        assert_eq!(
            serde_json::from_str::<GenerationConfig>(&json).unwrap(),
            all
        );
        let misspelt = r#"{"max_new_tokens": 5, "temprature": 1}"#;
        let error = serde_json::from_str::<GenerationConfig>(misspelt).unwrap_err();
        assert!(error.to_string().contains("temprature"), "{error}");
    }
}
