//! Saving and loading is the identity.

use burn::tensor::DType;
use burn_flex::{Flex, FlexDevice};
use mtla_models::{
    checkpoint::{CheckpointError, SaveOptions},
    llama::{LatentSizes, Llama, LlamaConfig, LoadOptions, RopeScaling},
};
use proptest::prelude::*;
use serde_json::json;
use tempfile::tempdir;

use crate::sample::{config, files, llama, mtla, weights};

fn dense() -> impl Strategy<Value = LlamaConfig> {
    let heads = prop_oneof![Just((1, 1)), Just((3, 1)), Just((4, 2)), Just((3, 3))];
    let scaling = RopeScaling {
        rope_type: "llama3".into(),
        factor: Some(8.0),
        low_freq_factor: Some(1.0),
        high_freq_factor: Some(4.0),
        original_max_position_embeddings: Some(32),
        ..RopeScaling::default()
    };
    let rope = prop_oneof![Just(None), Just(Some(scaling))];
    (heads, 1..4usize, any::<bool>(), rope).prop_map(|((heads, kv_heads), half, bias, rope)| {
        LlamaConfig {
            num_attention_heads: heads,
            num_key_value_heads: Some(kv_heads),
            head_dim: Some(2 * half),
            attention_bias: bias,
            rope_scaling: rope,
            ..config()
        }
    })
}

fn latent() -> impl Strategy<Value = LlamaConfig> {
    let sizes = (0..6usize, 4..9usize, 1..7usize, 1..4usize, 1..7usize);
    (sizes, proptest::option::of(1..4usize)).prop_map(|((query, rank, nope, half, value), rate)| {
        let sizes = LatentSizes {
            q_lora_rank: query,
            kv_lora_rank: rank,
            qk_nope_head_dim: nope,
            qk_rope_head_dim: 2 * half,
            v_head_dim: value,
        };
        match rate {
            Some(rate) => config().with_mtla(sizes, rate).unwrap(),
            None => config().with_mla(sizes).unwrap(),
        }
    })
}

fn configs() -> impl Strategy<Value = LlamaConfig> {
    let sizes = (1..9usize, 1..12usize, 1..4usize, 1..20usize, any::<bool>());
    let attention = prop_oneof![dense(), latent()];
    (attention, sizes).prop_map(
        |(attention, (width, inner, layers, vocab, tied))| LlamaConfig {
            hidden_size: 2 * width,
            intermediate_size: inner,
            num_hidden_layers: layers,
            vocab_size: vocab,
            tie_word_embeddings: tied,
            rms_norm_eps: 1.0 / 3.0,
            other: json!({"eos_token_id": [1, 2], "anything": {"at": "all"}})
                .as_object()
                .unwrap()
                .clone(),
            ..attention
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn saved_and_loaded_is_the_same(
        config in configs(),
        dtype in prop_oneof![Just(DType::F32), Just(DType::F16), Just(DType::BF16)],
        shard_bytes in prop_oneof![Just(1), Just(1000), Just(u64::MAX)],
    ) {
        let mut llama = llama(config);
        llama.generation = json!({"max_new_tokens": 12}).as_object().cloned();
        let options = SaveOptions { dtype: Some(dtype), shard_bytes };
        let [first, second] = [tempdir().unwrap(), tempdir().unwrap()];
        llama.save_pretrained_with(first.path(), &options).unwrap();
        let loaded = Llama::<Flex>::from_pretrained(first.path(), &FlexDevice).unwrap();
        let mut config = loaded.config.clone();
        prop_assert_eq!(
            config.other.remove("torch_dtype").is_some(),
            true
        );
        prop_assert_eq!(&config, &llama.config);
        prop_assert_eq!(&loaded.generation, &llama.generation);
        let (found, expected) = (weights(&loaded.decoder), weights(&llama.decoder));
        prop_assert_eq!(found.len(), expected.len());
        for (path, data) in &expected {
            // Rounded once to the type of the file.
            let rounded = data.clone().convert_dtype(dtype).convert_dtype(DType::F32);
            prop_assert_eq!(&found[path], &rounded, "{}", path);
        }
        loaded.save_pretrained_with(second.path(), &options).unwrap();
        prop_assert!(files(first.path()) == files(second.path()), "other files the second time");
    }
}

#[test]
fn weights_in_half_precision_are_read_as_they_are() {
    for dtype in [DType::F16, DType::BF16] {
        let folder = tempdir().unwrap();
        let options = SaveOptions {
            dtype: Some(dtype),
            ..SaveOptions::default()
        };
        llama(mtla())
            .save_pretrained_with(folder.path(), &options)
            .unwrap();
        let options = LoadOptions {
            dtype: Some(dtype),
            ..LoadOptions::default()
        };
        let loaded = Llama::<Flex>::from_pretrained_with(folder.path(), &options, &FlexDevice);
        let loaded = loaded.unwrap();
        let all = weights(&loaded.decoder);
        assert!(all.values().all(|data| data.dtype == dtype));
        let again = tempdir().unwrap();
        loaded.save_pretrained(again.path()).unwrap();
        assert_eq!(files(folder.path()), files(again.path()));
    }
}

#[test]
fn another_number_of_shards_leaves_nothing_of_the_old_ones() {
    let folder = tempdir().unwrap();
    let save = |shard_bytes| {
        let options = SaveOptions {
            dtype: None,
            shard_bytes,
        };
        llama(mtla())
            .save_pretrained_with(folder.path(), &options)
            .unwrap();
        Llama::<Flex>::from_pretrained(folder.path(), &FlexDevice).unwrap();
        files(folder.path()).into_keys().collect::<Vec<_>>()
    };
    std::fs::write(folder.path().join("notes.txt"), "kept").unwrap();
    assert!(save(4000).len() > 5);
    let single = ["config.json", "model.safetensors", "notes.txt"];
    assert_eq!(save(u64::MAX), single);
    assert!(save(8000).contains(&"model.safetensors.index.json".into()));
    assert_eq!(save(u64::MAX), single);
}

#[test]
fn defaults_of_generation_do_not_outlive_their_model() {
    let folder = tempdir().unwrap();
    let mut llama = llama(mtla());
    llama.generation = json!({"max_new_tokens": 12}).as_object().cloned();
    for generation in [llama.generation.clone(), None] {
        llama.generation = generation;
        llama.save_pretrained(folder.path()).unwrap();
        let loaded = Llama::<Flex>::from_pretrained(folder.path(), &FlexDevice).unwrap();
        assert_eq!(loaded.generation, llama.generation);
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_told_and_leaves_the_old_files_whole() {
    use std::os::unix::fs::symlink;

    let folder = tempdir().unwrap();
    let save = |llama: &Llama<Flex>| {
        let options = SaveOptions {
            dtype: None,
            shard_bytes: 8000,
        };
        llama.save_pretrained_with(folder.path(), &options)
    };
    let mut llama = llama(mtla());
    llama.generation = json!({"max_new_tokens": 12}).as_object().cloned();
    save(&llama).unwrap();
    let before = files(folder.path());
    for name in before.keys() {
        // What the file is written as before it has its name.
        let unfinished = folder.path().join(format!("{name}.tmp"));
        symlink("/dev/full", &unfinished).unwrap();
        let error = save(&llama).unwrap_err();
        assert!(!unfinished.exists());
        let CheckpointError::Io { path, source, .. } = &error else {
            panic!("{error}")
        };
        assert_eq!(*path, folder.path().join(name));
        assert_eq!(source.kind(), std::io::ErrorKind::StorageFull);
        let message = error.to_string();
        assert!(
            message.contains("cannot write") && message.contains("No space left"),
            "{message}"
        );
        assert!(files(folder.path()) == before, "{name} and others changed");
    }
}

#[test]
fn a_place_that_cannot_be_written_is_told() {
    let folder = tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "kept").unwrap();
    let error = llama(mtla()).save_pretrained(&file).unwrap_err();
    assert!(matches!(error, CheckpointError::Io { .. }), "{error}");
    assert!(error.to_string().contains("file"), "{error}");
    assert_eq!(files(folder.path())["file"], b"kept");
}

#[test]
fn a_decoder_that_is_not_what_the_configuration_says_is_not_written() {
    let mut llama = llama(mtla());
    llama.config.intermediate_size += 1;
    let folder = tempdir().unwrap();
    let error = llama.save_pretrained(folder.path()).unwrap_err();
    assert!(matches!(error, CheckpointError::Shape { .. }), "{error}");
    assert!(files(folder.path()).is_empty());
}
