//! The settings of a run.

use super::error::TrainError;
use crate::schedule::Schedule;
use burn::module::AutodiffModule;
use burn::optim::{AdamW, AdamWConfig, adaptor::OptimizerAdaptor};
use burn::tensor::backend::AutodiffBackend;
use serde::{Deserialize, Serialize};

/// How long a run is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Length {
    /// So many optimizer steps.
    Steps(usize),
    /// So many times through the data.
    Epochs(usize),
}

/// `AdamW`: decoupled weight decay on every parameter, as Burn has it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Optimizer {
    /// Decay of the mean of the gradients.
    pub beta_1: f64,
    /// Decay of the mean of their squares.
    pub beta_2: f64,
    /// Added to the root of the mean square.
    pub epsilon: f64,
    /// Weight decay; a step takes `learning rate × weight_decay` of each weight away.
    pub weight_decay: f64,
}

impl Default for Optimizer {
    fn default() -> Self {
        Self {
            beta_1: 0.9,
            beta_2: 0.95,
            epsilon: 1e-8,
            weight_decay: 0.1,
        }
    }
}

impl Optimizer {
    pub(super) fn init<B, M>(&self) -> OptimizerAdaptor<AdamW, M, B>
    where
        B: AutodiffBackend,
        M: AutodiffModule<B>,
    {
        AdamWConfig::new()
            .with_beta_1(self.beta_1 as f32)
            .with_beta_2(self.beta_2 as f32)
            .with_epsilon(self.epsilon as f32)
            .with_weight_decay(self.weight_decay as f32)
            .init()
    }
}

/// The settings of a run, as they stand in a configuration file.
///
/// ```
/// use mtla_train::{Length, TrainerConfig};
///
/// let config: TrainerConfig = serde_json::from_str(
///     r#"{ "length": { "steps": 500 }, "learning_rate": { "peak": 1e-3, "warmup": 50 } }"#,
/// )?;
/// assert_eq!(config.length, Length::Steps(500));
/// assert_eq!(config.seed, TrainerConfig::default().seed);
/// config.validate()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainerConfig {
    /// Decides everything random: first weights, order of the data, dropout.
    pub seed: u64,
    /// How long to train.
    pub length: Length,
    /// Rows in a batch; for the caller, who makes the [`Batches`](crate::data::Batches).
    pub batch_size: usize,
    /// Batches that make one optimizer step. The last step of an epoch may have fewer.
    pub accumulation: usize,
    /// How many batches of a step are computed at once, each by its share of the cores: for processors with several cores and models too small
    /// to keep them busy. The result does not depend on it, unless the model draws from the backend's
    /// random numbers, of which there is one sequence for all threads.
    pub workers: usize,
    /// The optimizer.
    pub optimizer: Optimizer,
    /// The learning rate.
    pub learning_rate: Schedule,
    /// The norm over all gradients is not let above this.
    pub clip_norm: Option<f64>,
    /// Steps between lines of training metrics.
    pub log_every: usize,
    /// Steps between validations; there is one more at the end.
    pub validate_every: usize,
    /// Steps between checkpoints; there is one more at each best validation and at the end.
    pub checkpoint_every: usize,
    /// Newest checkpoints to keep, besides the best one.
    pub keep_last: usize,
}

impl Default for TrainerConfig {
    fn default() -> Self {
        Self {
            seed: 42,
            length: Length::Epochs(1),
            batch_size: 32,
            accumulation: 1,
            workers: 1,
            optimizer: Optimizer::default(),
            learning_rate: Schedule::default(),
            clip_norm: Some(1.0),
            log_every: 10,
            validate_every: 500,
            checkpoint_every: 500,
            keep_last: 2,
        }
    }
}

impl TrainerConfig {
    /// Checks each value.
    ///
    /// # Errors
    ///
    /// [`TrainError::Config`] with the first field that cannot be.
    pub fn validate(&self) -> Result<(), TrainError> {
        let (length, steps) = match self.length {
            Length::Steps(n) => ("length.steps", n),
            Length::Epochs(n) => ("length.epochs", n),
        };
        let counts = [
            (length, steps),
            ("batch_size", self.batch_size),
            ("accumulation", self.accumulation),
            ("workers", self.workers),
            ("log_every", self.log_every),
            ("validate_every", self.validate_every),
            ("checkpoint_every", self.checkpoint_every),
            ("keep_last", self.keep_last),
        ];
        for (field, value) in counts {
            check(field, value, value > 0, "at least 1")?;
        }
        let (optimizer, rate) = (&self.optimizer, &self.learning_rate);
        let below_one = (0.0..1.0, "at least 0 and below 1");
        let above_zero = (f64::MIN_POSITIVE..f64::INFINITY, "finite and above 0");
        let not_negative = (0.0..f64::INFINITY, "finite and at least 0");
        let reals = [
            ("optimizer.beta_1", optimizer.beta_1, &below_one),
            ("optimizer.beta_2", optimizer.beta_2, &below_one),
            ("optimizer.epsilon", optimizer.epsilon, &above_zero),
            (
                "optimizer.weight_decay",
                optimizer.weight_decay,
                &not_negative,
            ),
            ("learning_rate.peak", rate.peak, &above_zero),
            ("clip_norm", self.clip_norm.unwrap_or(1.0), &above_zero),
        ];
        for (field, value, (range, rule)) in reals {
            check(field, value, range.contains(&value), rule)?;
        }
        let within = (0.0..=rate.peak).contains(&rate.floor);
        check(
            "learning_rate.floor",
            rate.floor,
            within,
            "between 0 and learning_rate.peak",
        )
    }

    /// Optimizer steps in a run over epochs of `batches` batches.
    ///
    /// # Errors
    ///
    /// [`TrainError::Config`] if the warm-up would not end within the run.
    pub fn total_steps(&self, batches: usize) -> Result<usize, TrainError> {
        let total = match self.length {
            Length::Steps(steps) => steps,
            Length::Epochs(epochs) => epochs * batches.div_ceil(self.accumulation),
        };
        let warmup = self.learning_rate.warmup;
        check(
            "learning_rate.warmup",
            warmup,
            warmup < total,
            "below the number of steps",
        )?;
        Ok(total)
    }
}

fn check(
    field: &'static str,
    value: impl ToString,
    holds: bool,
    rule: &'static str,
) -> Result<(), TrainError> {
    if holds {
        return Ok(());
    }
    Err(TrainError::Config {
        field,
        value: value.to_string(),
        rule,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    type Spoil = fn(&mut TrainerConfig);

    #[test]
    fn impossible_values_are_named() {
        let default = TrainerConfig::default();
        let refused: [(&str, Spoil); 13] = [
            ("`length.epochs` is 0", |c| c.length = Length::Epochs(0)),
            ("`length.steps` is 0", |c| c.length = Length::Steps(0)),
            ("`batch_size` is 0", |c| c.batch_size = 0),
            ("`accumulation` is 0", |c| c.accumulation = 0),
            ("`log_every` is 0", |c| c.log_every = 0),
            ("`keep_last` is 0", |c| c.keep_last = 0),
            ("`optimizer.beta_1` is 1", |c| c.optimizer.beta_1 = 1.0),
            ("`optimizer.epsilon` is NaN", |c| {
                c.optimizer.epsilon = f64::NAN;
            }),
            ("`optimizer.weight_decay` is -1", |c| {
                c.optimizer.weight_decay = -1.0;
            }),
            ("`learning_rate.peak` is 0", |c| c.learning_rate.peak = 0.0),
            ("`learning_rate.peak` is inf", |c| {
                c.learning_rate.peak = f64::INFINITY;
            }),
            ("`learning_rate.floor` is 1", |c| {
                c.learning_rate.floor = 1.0;
            }),
            ("`clip_norm` is 0", |c| c.clip_norm = Some(0.0)),
        ];
        assert!(default.validate().is_ok());
        for (message, spoil) in refused {
            let mut config = default.clone();
            spoil(&mut config);
            let error = config.validate().unwrap_err().to_string();
            assert!(
                error.contains(message),
                "{error:?} should contain {message:?}"
            );
        }
    }

    #[test]
    fn misspelt_fields_are_refused() {
        let error = serde_json::from_str::<TrainerConfig>(r#"{"batchsize": 3}"#).unwrap_err();
        assert!(error.to_string().contains("batchsize"), "{error}");
    }

    #[test]
    fn epochs_are_counted_in_steps() {
        let mut config = TrainerConfig {
            length: Length::Epochs(3),
            ..Default::default()
        };
        config.learning_rate.warmup = 0;
        assert_eq!(config.total_steps(10).unwrap(), 30);
        config.accumulation = 4;
        assert_eq!(config.total_steps(10).unwrap(), 9);
        config.length = Length::Steps(7);
        assert_eq!(config.total_steps(10).unwrap(), 7);
        config.learning_rate.warmup = 7;
        assert!(
            config
                .total_steps(10)
                .unwrap_err()
                .to_string()
                .contains("learning_rate.warmup")
        );
    }
}
