//! What the headers of the weights say.

use std::collections::BTreeSet;

use super::{keys::matches, weights::Weights};

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
    /// Of all weights but those whose names have one of the `ignored` forms.
    pub(crate) fn new(weights: &Weights, ignored: &[&str]) -> Self {
        let (mut parameters, mut bytes) = (0, 0);
        let mut types = BTreeSet::new();
        let names = weights
            .names()
            .filter(|name| !ignored.iter().any(|pattern| matches(pattern, name)));
        for weight in names.filter_map(|name| weights.get(name)) {
            parameters += weight.shape.iter().map(|n| *n as u64).product::<u64>();
            bytes += weight.bytes.len() as u64;
            types.insert(format!("{:?}", weight.dtype).to_lowercase());
        }
        Self {
            parameters,
            bytes,
            types: types.into_iter().collect(),
        }
    }
}
