//! Damaged and hostile files: an error that names the file and what is wrong, never a panic.

use std::{
    fs,
    path::{Path, PathBuf},
};

use burn::{module::Module, tensor::DType};
use burn_flex::{Flex, FlexDevice};
use mtla_models::{
    checkpoint::{CheckpointError, SaveOptions},
    llama::{Llama, LlamaConfig},
};
use serde_json::{Value, json};
use tempfile::{TempDir, tempdir};

use crate::sample::{llama, mtla};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

fn saved(shard_bytes: u64) -> TempDir {
    let folder = tempdir().unwrap();
    let options = SaveOptions {
        dtype: None,
        shard_bytes,
    };
    llama(mtla())
        .save_pretrained_with(folder.path(), &options)
        .unwrap();
    folder
}

fn load(folder: &TempDir) -> Result<Llama<Flex>, CheckpointError> {
    Llama::from_pretrained(folder.path(), &FlexDevice)
}

/// The error of loading; its message names the file or directory, and `word`.
#[track_caller]
fn refused(folder: &TempDir, word: &str) -> CheckpointError {
    let Err(error) = load(folder) else {
        panic!("loaded, although {word}")
    };
    let message = error.to_string();
    let place = folder.path().to_string_lossy();
    assert!(message.contains(&*place), "{message}");
    assert!(message.contains(word), "{message} says nothing of {word}");
    error
}

/// A safetensors file of any header.
fn file(header: &[u8], data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header, data].concat()
}

/// Header and data of a file.
fn parts(path: &Path) -> (Value, Vec<u8>) {
    let bytes = fs::read(path).unwrap();
    let (length, rest) = bytes.split_at(8);
    let length = u64::from_le_bytes(length.try_into().unwrap()) as usize;
    let (header, data) = rest.split_at(length);
    (serde_json::from_slice(header).unwrap(), data.to_vec())
}

/// Changes the header of the only file.
fn edit(folder: &TempDir, change: impl FnOnce(&mut Value, &mut Vec<u8>)) {
    let path = folder.path().join(SINGLE);
    let (mut header, mut data) = parts(&path);
    change(&mut header, &mut data);
    let header = serde_json::to_vec(&header).unwrap();
    fs::write(path, file(&header, &data)).unwrap();
}

fn edit_json(path: PathBuf, change: impl FnOnce(&mut Value)) {
    let mut value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut value);
    fs::write(path, serde_json::to_vec(&value).unwrap()).unwrap();
}

fn edit_config(folder: &TempDir, change: impl FnOnce(&mut Value)) {
    edit_json(folder.path().join("config.json"), change);
}

#[test]
fn truncated_files() {
    let folder = saved(u64::MAX);
    let path = folder.path().join(SINGLE);
    let whole = fs::read(&path).unwrap();
    for length in [0, 7, 8, 9, 500, whole.len() / 2, whole.len() - 1] {
        fs::write(&path, &whole[..length]).unwrap();
        let error = refused(&folder, "not a whole safetensors file");
        assert!(matches!(error, CheckpointError::Damaged { .. }));
    }
    fs::write(&path, [&whole[..], b"more"].concat()).unwrap();
    refused(&folder, "not a whole safetensors file");
}

#[test]
fn hostile_headers() {
    let folder = saved(u64::MAX);
    let path = folder.path().join(SINGLE);
    let deep = |open: &str, close: &str| {
        format!("{{\"a\": {}{}}}", open.repeat(50_000), close.repeat(50_000)).into_bytes()
    };
    let one = |shape: &str, offsets: &str| {
        format!(
            "{{\"a\": {{\"dtype\": \"F32\", \"shape\": {shape}, \"data_offsets\": {offsets}}}}}"
        )
        .into_bytes()
    };
    let two = |first: &str, second: &str| {
        let entry = |name: &str, offsets: &str| {
            format!(
                "\"{name}\": {{\"dtype\": \"F32\", \"shape\": [4], \"data_offsets\": {offsets}}}"
            )
        };
        format!("{{{}, {}}}", entry("a", first), entry("b", second)).into_bytes()
    };
    let headers = [
        deep("[", "]"),
        deep("{\"a\": ", "}"),
        b"\xff\xfe".to_vec(),
        b"[]".to_vec(),
        b"{\"a\": 1}".to_vec(),
        one("[1152921504606846976, 1152921504606846976]", "[0, 32]"),
        one("[18446744073709551615]", "[0, 32]"),
        one("[99999999999999999999999]", "[0, 32]"),
        one("[-1]", "[0, 32]"),
        one("[8]", "[0, 1099511627776]"),
        one("[8]", "[32, 0]"),
        one("[8]", "[8, 40]"),
        one("[4611686018427387904]", "[0, 18446744073709551615]"),
        two("[0, 16]", "[8, 24]"),
        two("[0, 16]", "[0, 16]"),
        two("[0, 16]", "[32, 48]"),
    ];
    for header in headers {
        fs::write(&path, file(&header, &[0; 32])).unwrap();
        refused(&folder, "not a whole safetensors file");
    }
    for length in [u64::MAX, u64::MAX - 7, 1 << 62, 100_000_001, 33] {
        let bytes = [&length.to_le_bytes()[..], &[b'{'; 32]].concat();
        fs::write(&path, bytes).unwrap();
        refused(&folder, "not a whole safetensors file");
    }
}

#[test]
fn missing_unknown_and_misshapen_weights_are_named() {
    let folder = saved(u64::MAX);
    edit(&folder, |header, _| {
        let header = header.as_object_mut().unwrap();
        let weight = header.remove("model.norm.weight").unwrap();
        header.insert("model.norm.gain".into(), weight);
    });
    refused(&folder, "lacks model.norm.weight;");

    let folder = saved(u64::MAX);
    edit(&folder, |header, data| {
        let end = data.len();
        data.extend([0; 8]);
        header["model.layers.0.self_attn.extra.weight"] =
            json!({"dtype": "F32", "shape": [2], "data_offsets": [end, end + 8]});
    });
    refused(&folder, "holds model.layers.0.self_attn.extra.weight,");

    let folder = saved(u64::MAX);
    edit_config(&folder, |config| config["vocab_size"] = 24.into());
    let error = refused(&folder, "config.json is of another model");
    let CheckpointError::Shape {
        name,
        expected,
        found,
        ..
    } = error
    else {
        panic!("{error}")
    };
    assert!(name == "model.embed_tokens.weight" || name == "lm_head.weight");
    assert_eq!((expected, found), (vec![24, 24], vec![23, 24]));

    let folder = saved(u64::MAX);
    edit(&folder, |header, _| {
        header["model.norm.weight"]["dtype"] = "I32".into();
    });
    refused(&folder, "model.norm.weight is of the type I32");
}

#[test]
fn transposed_matrices_are_misshapen() {
    let folder = saved(u64::MAX);
    edit(&folder, |header, _| {
        let weight = &mut header["model.layers.1.mlp.up_proj.weight"];
        assert_eq!(weight["shape"], json!([20, 24]));
        weight["shape"] = json!([24, 20]);
    });
    refused(
        &folder,
        "model.layers.1.mlp.up_proj.weight has the shape [24, 20]",
    );
}

#[test]
fn old_rotary_frequencies_are_no_unknown_weights() {
    let folder = saved(u64::MAX);
    edit(&folder, |header, data| {
        let end = data.len();
        data.extend([0; 8]);
        header["model.layers.0.self_attn.rotary_emb.inv_freq"] =
            json!({"dtype": "F32", "shape": [2], "data_offsets": [end, end + 8]});
    });
    load(&folder).unwrap();
}

#[test]
fn a_summary_is_of_the_weights_that_are_read() {
    let folder = tempdir().unwrap();
    let tied = LlamaConfig {
        tie_word_embeddings: true,
        ..mtla()
    };
    let options = SaveOptions {
        dtype: Some(DType::BF16),
        ..SaveOptions::default()
    };
    llama(tied)
        .save_pretrained_with(folder.path(), &options)
        .unwrap();
    let compare = |tied| {
        let model = load(&folder).unwrap();
        assert_eq!(model.config.tie_word_embeddings, tied);
        let config = fs::read(folder.path().join("config.json")).unwrap();
        let config: LlamaConfig = serde_json::from_slice(&config).unwrap();
        let summary = config.weights_summary(folder.path()).unwrap();
        let parameters = model.decoder.num_params() as u64;
        assert_eq!(summary.parameters, parameters);
        assert_eq!(summary.bytes, 2 * parameters);
        assert_eq!(summary.types, ["bf16"]);
        parameters
    };
    let parameters = compare(true);
    // Frequencies, and a head with the numbers of the embedding: neither is read.
    edit(&folder, |header, data| {
        let end = data.len();
        data.extend([0; 8]);
        header["model.layers.0.self_attn.rotary_emb.inv_freq"] =
            json!({"dtype": "F32", "shape": [2], "data_offsets": [end, end + 8]});
        let embedding = header["model.embed_tokens.weight"].clone();
        let place = |i: usize| embedding["data_offsets"][i].as_u64().unwrap() as usize;
        let numbers = data[place(0)..place(1)].to_vec();
        let offsets = [end + 8, end + 8 + numbers.len()];
        data.extend(numbers);
        header["lm_head.weight"] =
            json!({"dtype": "BF16", "shape": embedding["shape"], "data_offsets": offsets});
    });
    assert_eq!(compare(true), parameters);
    // Another head is.
    edit(&folder, |_, data| *data.last_mut().unwrap() ^= 1);
    assert!(compare(false) > parameters);
}

#[test]
fn shards() {
    let folder = saved(4000);
    fs::remove_file(folder.path().join(INDEX)).unwrap();
    let error = refused(&folder, "neither model.safetensors nor");
    assert!(matches!(error, CheckpointError::NoWeights { .. }));

    let folder = saved(4000);
    let shard = fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| path.to_string_lossy().contains("model-00002-of-"))
        .unwrap();
    let name = shard.file_name().unwrap().to_str().unwrap().to_owned();
    fs::remove_file(&shard).unwrap();
    let error = refused(&folder, &format!("{name} is missing"));
    assert!(matches!(error, CheckpointError::MissingShard { .. }));

    for outside in [
        "../model.safetensors",
        "/etc/passwd",
        "..",
        "a/b.safetensors",
        "",
    ] {
        let folder = saved(4000);
        edit_json(folder.path().join(INDEX), |index| {
            index["weight_map"]["model.norm.weight"] = outside.into();
        });
        let error = refused(&folder, "not the name of a file beside it");
        assert!(matches!(error, CheckpointError::ShardName { .. }));
    }

    let folder = saved(4000);
    edit_json(folder.path().join(INDEX), |index| {
        let map = &mut index["weight_map"];
        map["model.norm.weight"] = map["model.embed_tokens.weight"].take();
        map["model.embed_tokens.weight"] = map["model.norm.weight"].clone();
    });
    refused(&folder, "lacks model.norm.weight;");

    let folder = saved(4000);
    let copy = "model-copy.safetensors";
    fs::copy(
        folder.path().join(shard_of(&folder, "model.norm.weight")),
        folder.path().join(copy),
    )
    .unwrap();
    edit_json(folder.path().join(INDEX), |index| {
        index["weight_map"]["model.norm.weight"] = copy.into();
    });
    let error = refused(&folder, copy);
    assert!(matches!(error, CheckpointError::Twice { .. }), "{error}");
}

fn shard_of(folder: &TempDir, name: &str) -> String {
    let index = fs::read(folder.path().join(INDEX)).unwrap();
    let index: Value = serde_json::from_slice(&index).unwrap();
    index["weight_map"][name].as_str().unwrap().to_owned()
}

#[test]
fn hostile_configurations() {
    let folder = saved(u64::MAX);
    let path = folder.path().join("config.json");
    let whole = fs::read(&path).unwrap();
    edit_config(&folder, |config| {
        config["num_hidden_layers"] = (1 << 24).into();
    });
    refused(&folder, "lacks model.layers.2.input_layernorm.weight");
    fs::write(&path, &whole).unwrap();
    for field in [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "kv_lora_rank",
    ] {
        edit_config(&folder, |config| config[field] = (1 << 24).into());
        refused(&folder, "but the configuration makes it");
        edit_config(&folder, |config| config[field] = u64::MAX.into());
        refused(&folder, field);
        fs::write(&path, &whole).unwrap();
    }
    let others = [
        ("model_type", json!("mistral"), "unknown variant `mistral`"),
        ("vocab_size", json!(-1), "invalid value"),
        ("hidden_act", json!("gelu"), "hidden_act is gelu"),
        ("down_rate", json!(0), "down_rate is 0"),
        ("rms_norm_eps", json!(0.0), "norm_eps is 0"),
    ];
    for (field, value, word) in others {
        edit_config(&folder, |config| config[field] = value);
        refused(&folder, word);
        fs::write(&path, &whole).unwrap();
    }
    let deep = format!("{{\"x\": {}{}}}", "[".repeat(100_000), "]".repeat(100_000));
    for text in [&deep, "", "[", "null", "{\"vocab_size\": 1e999}"] {
        fs::write(&path, text).unwrap();
        refused(&folder, "config.json cannot be understood");
    }
    fs::File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(65 << 20)
        .unwrap();
    refused(&folder, "at most");
    fs::remove_file(&path).unwrap();
    refused(&folder, "cannot read");
    fs::create_dir(&path).unwrap();
    refused(&folder, "not a regular file");
}

#[test]
fn random_bytes_in_a_file_are_no_panic() {
    let folder = saved(u64::MAX);
    let path = folder.path().join(SINGLE);
    let whole = fs::read(&path).unwrap();
    let header = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    for step in 0..300 {
        let mut bytes = whole.clone();
        let place = step * 7919 % (header + 8);
        bytes[place] = bytes[place].wrapping_add((step % 255) as u8 + 1);
        fs::write(&path, bytes).unwrap();
        load(&folder).ok();
    }
}

#[test]
fn defaults_of_a_file_are_those_of_python() {
    let config: LlamaConfig = serde_json::from_str(r#"{"model_type": "llama-mtla"}"#).unwrap();
    assert_eq!(config.latent_sizes(), Default::default());
    assert_eq!(config.decoder().unwrap().attention.down_rate(), 2);
}
