//! The learning rate as a function of the step.
//!
//! Burn's schedulers carry state and cannot put a warm-up before a decay. Here the rate is computed
//! from the step alone, so a resumed run needs nothing saved to go on exactly where it was.

use serde::{Deserialize, Serialize};

/// How the learning rate falls after the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Decay {
    /// It stays at its peak.
    Constant,
    /// In a straight line to the floor, reached at the last step.
    Linear,
    /// Along half a cosine to the floor, reached at the last step.
    #[default]
    Cosine,
    /// With the inverse square root of the step, never below the floor.
    InverseSqrt,
}

/// A learning rate that rises linearly for `warmup` steps to `peak`, then decays.
///
/// ```
/// use mtla_train::{Decay, Schedule};
///
/// let schedule = Schedule { peak: 1e-3, warmup: 10, decay: Decay::Linear, floor: 0.0 };
/// assert_eq!(schedule.at(5, 110), 5e-4); // half-way up
/// assert_eq!(schedule.at(10, 110), 1e-3);
/// assert_eq!(schedule.at(60, 110), 5e-4); // half-way down
/// assert_eq!(schedule.at(110, 110), 0.0);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Schedule {
    /// The highest learning rate.
    pub peak: f64,
    /// Steps of linear warm-up; 0 for none.
    pub warmup: usize,
    /// The shape after the warm-up.
    pub decay: Decay,
    /// The lowest learning rate after the warm-up.
    pub floor: f64,
}

impl Default for Schedule {
    fn default() -> Self {
        Self {
            peak: 3e-4,
            warmup: 100,
            decay: Decay::Cosine,
            floor: 0.0,
        }
    }
}

impl Schedule {
    /// The learning rate of `step`, counted from 1, in a run of `total` steps.
    pub fn at(&self, step: usize, total: usize) -> f64 {
        let Self {
            peak,
            warmup,
            decay,
            floor,
        } = *self;
        if step <= warmup {
            return peak * step as f64 / warmup as f64;
        }
        let done = (step - warmup) as f64 / total.saturating_sub(warmup).max(1) as f64;
        let done = done.min(1.0);
        match decay {
            Decay::Constant => peak,
            Decay::Linear => floor + (peak - floor) * (1.0 - done),
            Decay::Cosine => {
                floor + (peak - floor) * 0.5 * (1.0 + (std::f64::consts::PI * done).cos())
            }
            Decay::InverseSqrt => floor.max(peak * (warmup.max(1) as f64 / step as f64).sqrt()),
        }
    }
}

#[cfg(test)]
#[expect(clippy::float_cmp, reason = "these values are exact")]
mod tests {
    use super::*;

    const ALL: [Decay; 4] = [
        Decay::Constant,
        Decay::Linear,
        Decay::Cosine,
        Decay::InverseSqrt,
    ];

    fn schedule(decay: Decay, warmup: usize) -> Schedule {
        Schedule {
            peak: 2.0,
            warmup,
            decay,
            floor: 0.5,
        }
    }

    #[test]
    fn warms_up_to_the_peak_and_never_rises_again() {
        for decay in ALL {
            let rate = |step| schedule(decay, 4).at(step, 40);
            assert_eq!([rate(1), rate(2), rate(4)], [0.5, 1.0, 2.0]);
            for step in 4..40 {
                assert!(
                    rate(step + 1) <= rate(step) && rate(step + 1) >= 0.5,
                    "{decay:?} {step}"
                );
            }
        }
    }

    #[test]
    fn decays_as_named() {
        assert_eq!(schedule(Decay::Constant, 0).at(40, 40), 2.0);
        assert_eq!(schedule(Decay::Linear, 0).at(20, 40), 1.25);
        assert_eq!(schedule(Decay::Linear, 0).at(40, 40), 0.5);
        assert!((schedule(Decay::Cosine, 0).at(20, 40) - 1.25).abs() < 1e-12);
        assert_eq!(schedule(Decay::Cosine, 0).at(40, 40), 0.5);
        assert_eq!(schedule(Decay::InverseSqrt, 4).at(16, 40), 1.0);
        assert_eq!(
            schedule(Decay::InverseSqrt, 1).at(40, 40),
            0.5,
            "held by the floor"
        );
    }

    #[test]
    fn without_warmup_the_first_step_is_near_the_peak() {
        for decay in ALL {
            let rate = schedule(decay, 0).at(1, 1000);
            assert!((1.9..=2.0).contains(&rate), "{decay:?}: {rate}");
        }
    }
}
