//! Fields that a file may write in several ways.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

/// When beam search stops. In a file: `false`, `true`, `"never"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EarlyStopping {
    /// As soon as there are as many finished sequences as beams, and the best unfinished one, if it ended
    /// now, would not be better than the worst of them.
    #[default]
    Heuristic,
    /// As soon as there are as many finished sequences as beams.
    Always,
    /// Only when no unfinished sequence can become better than the worst finished one.
    Never,
}

impl Serialize for EarlyStopping {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Heuristic => serializer.serialize_bool(false),
            Self::Always => serializer.serialize_bool(true),
            Self::Never => serializer.serialize_str("never"),
        }
    }
}

impl<'de> Deserialize<'de> for EarlyStopping {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Form {
            Flag(bool),
            Word(String),
            Nothing(()),
        }
        match Form::deserialize(deserializer)? {
            Form::Flag(false) | Form::Nothing(()) => Ok(Self::Heuristic),
            Form::Flag(true) => Ok(Self::Always),
            Form::Word(word) if word == "never" => Ok(Self::Never),
            Form::Word(word) => Err(D::Error::custom(format!(
                "early_stopping is {word:?}, expected true, false or \"never\""
            ))),
        }
    }
}

/// A list that may be written as its only element, or as `null` if it is empty.
pub(super) mod one_or_many {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(in super::super) fn serialize<T: Serialize, S: Serializer>(
        list: &[T],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match list {
            [] => serializer.serialize_none(),
            [only] => only.serialize(serializer),
            _ => list.serialize(serializer),
        }
    }

    pub(in super::super) fn deserialize<'de, T: Deserialize<'de>, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<T>, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Form<T> {
            Many(Vec<T>),
            One(T),
            Nothing(()),
        }
        Ok(match Form::deserialize(deserializer)? {
            Form::Many(list) => list,
            Form::One(only) => vec![only],
            Form::Nothing(()) => Vec::new(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{super::GenerationConfig, EarlyStopping};

    fn read(json: &str) -> GenerationConfig {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn files_of_hugging_face_are_read() {
        assert_eq!(read("{}"), GenerationConfig::default());
        let config = read(
            r#"{"_from_model_config": true, "bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0,
                "transformers_version": "4.51.3", "do_sample": true, "top_p": 0.9, "max_length": 30,
                "stop_strings": "\n", "early_stopping": "never", "temperature": 1, "typical_p": null}"#,
        );
        assert_eq!(config.eos_token_id, [2, 3]);
        assert_eq!(config.stop_strings, ["\n"]);
        assert_eq!(config.early_stopping, EarlyStopping::Never);
        assert_eq!((config.top_p, config.top_k), (Some(0.9), Some(50)));
        assert_eq!(config.max_new_tokens_after(12), 18);
        assert!(read(r#"{"eos_token_id": null}"#).eos_token_id.is_empty());
        let error = serde_json::from_str::<GenerationConfig>(r#"{"early_stopping": "no"}"#);
        let error = error.unwrap_err().to_string();
        assert!(error.starts_with("early_stopping is \"no\""), "{error}");
    }

    #[test]
    fn what_is_written_is_read_again() {
        let mut all = GenerationConfig::new(5)
            .with_temperature(0.5)
            .with_top_p(0.9)
            .with_seed(1)
            .with_stop_tokens([2])
            .with_stop_strings(["a", "b"])
            .with_num_return_sequences(4)
            .with_log_probabilities(3);
        all.bad_words_ids = Some(vec![vec![1, 2]]);
        all.exponential_decay_length_penalty = Some((3, 1.5));
        for stopping in [
            EarlyStopping::Heuristic,
            EarlyStopping::Always,
            EarlyStopping::Never,
        ] {
            all.early_stopping = stopping;
            assert_eq!(read(&serde_json::to_string(&all).unwrap()), all);
        }
    }
}
