//! Python loads what is saved here, with the same logits, and the other way round.
//!
//! Runs where `MTLA_PYTHON` names a Python with `torch`, `transformers==4.51.3` and `mtla`.

use std::{env, ffi::OsString, path::Path, process::Command};

use burn::tensor::{DType, Int, Tensor, TensorData};
use burn_flex::{Flex, FlexDevice};
use mtla_core::testing::{Checks, Golden};
use mtla_models::{
    checkpoint::SaveOptions,
    decoder::DecoderInput,
    llama::{Llama, LlamaConfig, RopeScaling},
};
use tempfile::tempdir;

use crate::sample::{config, llama, mtla};

const TOLERANCE: f64 = 1e-4;

fn python() -> Option<OsString> {
    let python = env::var_os("MTLA_PYTHON");
    if python.is_none() {
        println!("skipped: MTLA_PYTHON names no Python with torch, transformers and mtla");
    }
    python
}

fn run(python: &OsString, arguments: &[&str], directory: &Path) {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/python/round_trip.py");
    let output = Command::new(python)
        .arg(script)
        .args(arguments)
        .arg(directory)
        .output()
        .expect("MTLA_PYTHON is a program");
    assert!(
        output.status.success(),
        "{arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Compares the logits that Python wrote beside the checkpoint with those of the Llama.
fn compare(what: &str, llama: &Llama<Flex>, directory: &Path, checks: &mut Checks) {
    let case = Golden::load(&directory.join("logits.json"));
    let rows: Vec<Vec<i64>> = case
        .integers("input_ids")
        .iter()
        .map(|row| row.iter().map(|id| *id as i64).collect())
        .collect();
    let shape = [rows.len(), rows[0].len()];
    let ids = TensorData::new(rows.concat(), shape);
    let ids = Tensor::<Flex, 2, Int>::from_data(ids, &FlexDevice);
    let logits = llama.decoder.forward(DecoderInput::new(ids)).into_data();
    checks.close(what, &logits, case.values("logits"), TOLERANCE, TOLERANCE);
}

fn ours() -> Vec<(&'static str, LlamaConfig)> {
    let scaling = RopeScaling {
        rope_type: "llama3".into(),
        factor: Some(8.0),
        low_freq_factor: Some(1.0),
        high_freq_factor: Some(4.0),
        original_max_position_embeddings: Some(32),
        ..RopeScaling::default()
    };
    let gqa = LlamaConfig {
        num_key_value_heads: Some(1),
        head_dim: Some(6),
        attention_bias: true,
        rope_scaling: Some(scaling.clone()),
        tie_word_embeddings: true,
        ..config()
    };
    let tied = LlamaConfig {
        tie_word_embeddings: true,
        rope_scaling: Some(scaling),
        ..mtla()
    };
    vec![
        ("mha", config()),
        ("gqa", gqa),
        ("mtla", mtla()),
        ("tied mtla", tied),
    ]
}

#[test]
fn python_loads_what_is_saved_here() {
    let Some(python) = python() else { return };
    let mut checks = Checks::default();
    for (name, config) in ours() {
        let llama = llama(config.clone());
        for (dtype, shard_bytes) in [
            (DType::F32, u64::MAX),
            (DType::F32, 4000),
            (DType::F16, u64::MAX),
            (DType::BF16, u64::MAX),
        ] {
            let folder = tempdir().unwrap();
            let options = SaveOptions {
                dtype: Some(dtype),
                shard_bytes,
            };
            llama.save_pretrained_with(folder.path(), &options).unwrap();
            run(&python, &["logits"], folder.path());
            if dtype == DType::F32 {
                compare(name, &llama, folder.path(), &mut checks);
            } else {
                // The numbers of the file, in 32 bits on both sides.
                let rounded = Llama::from_pretrained(folder.path(), &FlexDevice).unwrap();
                let what = format!("{name} in {dtype:?}");
                compare(&what, &rounded, folder.path(), &mut checks);
            }
        }
    }
    checks.finish("checkpoints of ours in Python");
}

#[test]
fn what_python_saves_is_loaded_here() {
    let Some(python) = python() else { return };
    let mut checks = Checks::default();
    for kind in ["llama", "llama_bf16", "mtla", "mtla_tied", "mtla_sharded"] {
        let folder = tempdir().unwrap();
        run(&python, &["make", kind], folder.path());
        let llama = Llama::from_pretrained(folder.path(), &FlexDevice).unwrap();
        compare(kind, &llama, folder.path(), &mut checks);
        // And once more around.
        let again = tempdir().unwrap();
        llama.save_pretrained(again.path()).unwrap();
        run(&python, &["logits"], again.path());
        compare(kind, &llama, again.path(), &mut checks);
    }
    checks.finish("checkpoints of Python's here");
}
