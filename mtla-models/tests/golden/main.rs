//! Parity with Python: checkpoints and their logits, losses and gradients; what they generate; the logits processors; the
//! tokenizer. Every recorded case that is found is read and compared, chosen by what its JSON says.
//! `MTLA_GOLDEN` names another root folder (with folders `llama_mtla` and `llama_plain`).

#![cfg(all(feature = "files", feature = "tokenizer"))]

mod checkpoints;
#[path = "../common/mod.rs"]
mod common;
mod generation;
mod processors;
mod tokenizer;

use std::path::{Path, PathBuf};

use mtla_core::testing::{Golden, golden_root};

/// The folder of all recordings.
fn root() -> PathBuf {
    golden_root(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures"))
}

/// Recorded checkpoints: the directory of each, and the case.
fn cases() -> Vec<(PathBuf, Golden)> {
    let mut cases = Vec::new();
    for folder in ["llama_mtla", "llama_plain"] {
        let folder = root().join(folder);
        for case in Golden::load_all(&folder) {
            if let Some(checkpoint) = case.json["checkpoint"].as_str() {
                cases.push((folder.join(checkpoint), case));
            }
        }
    }
    assert!(!cases.is_empty(), "there is no recorded checkpoint");
    cases
}

fn directory_name(directory: &Path) -> String {
    let name = directory.file_name().expect("a checkpoint has a directory");
    name.to_string_lossy().into_owned()
}
