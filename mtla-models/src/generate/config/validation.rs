//! What cannot work.

use super::GenerationConfig;
use crate::error::{ConfigError, checker};

impl GenerationConfig {
    /// Checks all fields.
    ///
    /// # Errors
    /// [`ConfigError`] names the field, its value and what would work.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.check_lengths()?;
        self.check_counts()?;
        self.check_history()?;
        if self.do_sample {
            self.check_sampling()?;
        }
        Ok(())
    }

    fn check_lengths(&self) -> Result<(), ConfigError> {
        let check = checker("generation");
        let tokens = self.max_new_tokens.unwrap_or(1);
        check(tokens > 0, "max_new_tokens", &tokens, "at least 1")?;
        let least = self.min_new_tokens.unwrap_or(0);
        let most = self.max_new_tokens.unwrap_or(usize::MAX);
        check(
            least <= most,
            "min_new_tokens",
            &least,
            "at most max_new_tokens",
        )?;
        let factor = self.exponential_decay_length_penalty.map_or(1.0, |x| x.1);
        check(
            factor > 0.0 && factor.is_finite(),
            "exponential_decay_length_penalty",
            &factor,
            "a positive factor",
        )
    }

    fn check_counts(&self) -> Result<(), ConfigError> {
        let check = checker("generation");
        let beams = self.num_beams;
        check(beams > 0, "num_beams", &beams, "at least 1")?;
        check(
            beams == 1 || !self.do_sample,
            "num_beams",
            &beams,
            "1 with do_sample, or do_sample false: beams are not sampled",
        )?;
        let sequences = self.num_return_sequences;
        let field = "num_return_sequences";
        check(sequences > 0, field, &sequences, "at least 1")?;
        check(
            self.do_sample || sequences <= beams,
            field,
            &sequences,
            "at most num_beams, or sampling: without it there is one continuation a beam",
        )?;
        let penalty = self.length_penalty;
        check(
            penalty.is_finite(),
            "length_penalty",
            &penalty,
            "a finite number",
        )
    }

    fn check_history(&self) -> Result<(), ConfigError> {
        let check = checker("generation");
        let penalty = self.repetition_penalty;
        check(
            penalty > 0.0 && penalty.is_finite(),
            "repetition_penalty",
            &penalty,
            "a positive number",
        )?;
        let words = self.bad_words_ids.iter().flatten();
        check(
            words.into_iter().all(|word| !word.is_empty()),
            "bad_words_ids",
            &"a list with an empty word",
            "words of at least one token",
        )?;
        check(
            self.stop_strings.iter().all(|text| !text.is_empty()),
            "stop_strings",
            &"a list with an empty text",
            "texts of at least one character",
        )
    }

    fn check_sampling(&self) -> Result<(), ConfigError> {
        let check = checker("generation");
        let t = self.temperature;
        check(
            t > 0.0 && t.is_finite(),
            "temperature",
            &t,
            "a positive number, or greedy search",
        )?;
        let probability = "a probability in (0, 1]";
        for (field, value) in [("top_p", self.top_p), ("typical_p", self.typical_p)] {
            let p = value.unwrap_or(1.0);
            check(p > 0.0 && p <= 1.0, field, &p, probability)?;
        }
        let p = self.min_p.unwrap_or(0.0);
        check(
            (0.0..=1.0).contains(&p),
            "min_p",
            &p,
            "a share between 0 and 1",
        )?;
        for (field, p) in [
            ("epsilon_cutoff", self.epsilon_cutoff),
            ("eta_cutoff", self.eta_cutoff),
        ] {
            check((0.0..1.0).contains(&p), field, &p, "a probability below 1")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_name_the_field() {
        let good = GenerationConfig::new(2).with_temperature(1.0);
        assert_eq!(good.validate(), Ok(()));
        let with = |change: fn(&mut GenerationConfig)| {
            let mut config = good.clone();
            change(&mut config);
            config
        };
        let greedy = GenerationConfig::new(2);
        let bad = [
            ("max_new_tokens", GenerationConfig::new(0)),
            ("min_new_tokens", with(|x| x.min_new_tokens = Some(3))),
            (
                "exponential_decay_length_penalty",
                with(|x| x.exponential_decay_length_penalty = Some((1, 0.0))),
            ),
            ("temperature", good.clone().with_temperature(-0.1)),
            ("temperature", good.clone().with_temperature(f64::NAN)),
            ("temperature", good.clone().with_temperature(f64::INFINITY)),
            ("top_p", good.clone().with_top_p(0.0)),
            ("top_p", good.clone().with_top_p(1.01)),
            ("top_p", good.clone().with_top_p(f64::NAN)),
            ("typical_p", with(|x| x.typical_p = Some(0.0))),
            ("min_p", with(|x| x.min_p = Some(1.1))),
            ("epsilon_cutoff", with(|x| x.epsilon_cutoff = 1.0)),
            ("eta_cutoff", with(|x| x.eta_cutoff = -1.0)),
            ("repetition_penalty", with(|x| x.repetition_penalty = 0.0)),
            ("length_penalty", with(|x| x.length_penalty = f64::NAN)),
            (
                "bad_words_ids",
                with(|x| x.bad_words_ids = Some(vec![vec![]])),
            ),
            ("stop_strings", good.clone().with_stop_strings([""])),
            ("num_beams", good.clone().with_num_beams(0)),
            ("num_beams", good.clone().with_num_beams(2)),
            ("num_return_sequences", good.with_num_return_sequences(0)),
            (
                "num_return_sequences",
                greedy.clone().with_num_return_sequences(2),
            ),
            (
                "num_return_sequences",
                greedy.with_num_beams(3).with_num_return_sequences(4),
            ),
        ];
        for (expected, config) in bad {
            let Err(ConfigError::Field { of, field, .. }) = config.validate() else {
                panic!("{config:?} is valid")
            };
            assert_eq!((of, field), ("generation", expected));
        }
    }
}
