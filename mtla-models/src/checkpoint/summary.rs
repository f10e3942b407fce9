//! What the headers of the weights say.

use std::{collections::BTreeSet, path::Path};

use super::{CheckpointError, weights::Weights};

/// How many numbers a checkpoint has, and of which types. The numbers themselves are not read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WeightsSummary {
    /// All numbers of all weights.
    pub parameters: u64,
    /// Their bytes.
    pub bytes: u64,
    /// The names of their types, such as `bf16`, each once.
    pub types: Vec<String>,
}

impl WeightsSummary {
    /// Of the weights in a directory.
    ///
    /// # Errors
    /// [`CheckpointError`] if there are none, or a file is damaged.
    pub fn read(directory: impl AsRef<Path>) -> Result<Self, CheckpointError> {
        let weights = Weights::open(directory.as_ref())?;
        let (mut parameters, mut bytes) = (0, 0);
        let mut types = BTreeSet::new();
        for weight in weights.names().filter_map(|name| weights.get(name)) {
            parameters += weight.shape.iter().map(|n| *n as u64).product::<u64>();
            bytes += weight.bytes.len() as u64;
            types.insert(format!("{:?}", weight.dtype).to_lowercase());
        }
        Ok(Self {
            parameters,
            bytes,
            types: types.into_iter().collect(),
        })
    }
}
