//! The index of a checkpoint in several files, and the names of all files.

use std::{collections::BTreeMap, path::Path};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::CheckpointError;

/// The file of a checkpoint in one file.
pub(super) const SINGLE: &str = "model.safetensors";
/// The index of one in several files.
pub(super) const INDEX: &str = "model.safetensors.index.json";

/// Which file holds which weight.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Index {
    #[serde(default)]
    pub(super) metadata: Map<String, Value>,
    pub(super) weight_map: BTreeMap<String, String>,
}

/// The name of a shard; numbers begin at 1.
pub(super) fn shard_name(number: usize, count: usize) -> String {
    if count == 1 {
        SINGLE.into()
    } else {
        format!("model-{number:05}-of-{count:05}.safetensors")
    }
}

/// Whether a file is part of the weights of a checkpoint.
pub(super) fn is_weights(name: &str) -> bool {
    let number = |text: &str| text.len() >= 5 && text.bytes().all(|byte| byte.is_ascii_digit());
    name == SINGLE
        || name == INDEX
        || name
            .strip_prefix("model-")
            .and_then(|rest| rest.strip_suffix(".safetensors"))
            .and_then(|rest| rest.split_once("-of-"))
            .is_some_and(|(a, b)| number(a) && number(b))
}

/// Refuses what is not the plain name of a file beside the index, on any system.
pub(super) fn check_shard_name(index: &Path, name: &str) -> Result<(), CheckpointError> {
    let plain =
        !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\\', ':', '\0']);
    if plain {
        return Ok(());
    }
    Err(CheckpointError::ShardName {
        index: index.into(),
        shard: name.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_shards() {
        assert_eq!(shard_name(1, 1), SINGLE);
        assert_eq!(shard_name(2, 7), "model-00002-of-00007.safetensors");
        for name in [SINGLE, INDEX, "model-00002-of-00007.safetensors"] {
            assert!(is_weights(name), "{name}");
        }
        for name in ["model.bin", "model-x-of-y.safetensors", "tokenizer.json"] {
            assert!(!is_weights(name), "{name}");
        }
    }

    #[test]
    fn a_shard_is_beside_its_index() {
        let index = Path::new("dir/model.safetensors.index.json");
        assert!(check_shard_name(index, "a..b.safetensors").is_ok());
        for name in [
            "",
            ".",
            "..",
            "../x",
            "/etc/passwd",
            "a/b",
            r"..\x",
            "C:x",
            "a\0",
        ] {
            assert!(check_shard_name(index, name).is_err(), "{name:?}");
        }
    }
}
