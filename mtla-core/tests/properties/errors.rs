//! What is wrong, where, and what would be right: the typed errors of configurations and caches, and the
//! panics of a programmer's mistakes.

#![cfg(feature = "flex")]

use burn::tensor::{Distribution, Tensor};
use burn_flex::{Flex, FlexDevice};
use mtla_core::{
    attention::{
        Attention, AttentionConfig, AttentionInput, CrossAttentionConfig, CrossInput, DenseConfig,
        LatentConfig,
    },
    cache::{Cache, CacheError},
};

const EVEN: &str = "a positive even number (rotary pairs)";
const PROBABILITY: &str = "a probability in [0, 1)";
const GATED: &str = "at least 4 (the gate works in kv_lora_rank / 4 dimensions)";

/// Both the check and the making of a layer refuse the configuration.
#[track_caller]
fn rejects(config: &AttentionConfig, found: &str, expected: &str) {
    let error = config.validate().unwrap_err();
    let message = format!("attention configuration: {found}, expected {expected}");
    assert_eq!(error.to_string(), message);
    assert_eq!(config.init::<Flex>(&FlexDevice).unwrap_err(), error);
}

#[test]
fn dense_configurations() {
    let mha = |d_model, n_heads| AttentionConfig::mha(d_model, n_heads);
    rejects(&mha(0, 4), "d_model is 0", "at least 1");
    rejects(&mha(12, 0), "n_heads is 0", "at least 1");
    let divisor = "a divisor of d_model = 12, or head_dim given";
    rejects(&mha(12, 5), "n_heads is 5", divisor);
    rejects(&mha(12, 4), "head_dim is 3", EVEN);
    let dense = |width| DenseConfig {
        head_dim: Some(width),
        ..DenseConfig::new(12, 4)
    };
    rejects(&AttentionConfig::Mqa(dense(0)), "head_dim is 0", EVEN);
    let gqa = |n_kv_heads| AttentionConfig::Gqa {
        n_kv_heads,
        dense: dense(2),
    };
    for n_kv_heads in [0, 3, 8] {
        let found = format!("n_kv_heads is {n_kv_heads}");
        rejects(&gqa(n_kv_heads), &found, "a divisor of n_heads = 4");
    }
    assert_eq!(gqa(2).validate(), Ok(()));
    for dropout in [1.0, -0.1, f64::NAN] {
        let found = format!("dropout is {dropout}");
        rejects(&gqa(2).with_dropout(dropout), &found, PROBABILITY);
    }
}

#[test]
fn latent_configurations() {
    type Field = fn(&mut LatentConfig) -> &mut usize;
    let latent = || LatentConfig::new(16, 2);
    let fields: [(&str, Field); 5] = [
        ("d_model", |c| &mut c.d_model),
        ("n_heads", |c| &mut c.n_heads),
        ("kv_lora_rank", |c| &mut c.kv_lora_rank),
        ("qk_nope_head_dim", |c| &mut c.qk_nope_head_dim),
        ("v_head_dim", |c| &mut c.v_head_dim),
    ];
    for (name, field) in fields {
        let mut latent = latent();
        *field(&mut latent) = 0;
        let found = format!("{name} is 0");
        rejects(&AttentionConfig::Mla(latent.clone()), &found, "at least 1");
        let mtla = AttentionConfig::Mtla {
            down_rate: 2,
            latent,
        };
        rejects(&mtla, &found, "at least 1");
    }
    for width in [0, 5] {
        let config = AttentionConfig::Mla(LatentConfig {
            qk_rope_head_dim: width,
            ..latent()
        });
        rejects(&config, &format!("qk_rope_head_dim is {width}"), EVEN);
    }
    let narrow = LatentConfig {
        kv_lora_rank: 3,
        ..latent()
    };
    assert_eq!(AttentionConfig::Mla(narrow.clone()).validate(), Ok(()));
    let narrow = AttentionConfig::Mtla {
        down_rate: 2,
        latent: narrow,
    };
    rejects(&narrow, "kv_lora_rank is 3", GATED);
    let mtla = AttentionConfig::mtla(16, 2);
    let no_tokens = mtla.clone().with_down_rate(0);
    rejects(&no_tokens, "down_rate is 0", "at least 1");
    rejects(&mtla.with_dropout(2.0), "dropout is 2", PROBABILITY);
    let mla = AttentionConfig::mla(16, 2).with_down_rate(7);
    assert_eq!(mla.down_rate(), 1, "only MTLA has another rate than 1");
}

#[test]
fn cross_attention_configurations() {
    let rejects = |change: fn(&mut CrossAttentionConfig), found: &str, expected: &str| {
        let mut config = CrossAttentionConfig::new(16, 2);
        change(&mut config);
        let error = config.init::<Flex>(&FlexDevice).unwrap_err();
        let message = format!("attention configuration: {found}, expected {expected}");
        assert_eq!(error.to_string(), message);
    };
    rejects(|c| c.d_model = 0, "d_model is 0", "at least 1");
    rejects(|c| c.d_source = 0, "d_source is 0", "at least 1");
    rejects(|c| c.n_heads = 0, "n_heads is 0", "at least 1");
    rejects(|c| c.qk_head_dim = 0, "qk_head_dim is 0", "at least 1");
    rejects(|c| c.v_head_dim = 0, "v_head_dim is 0", "at least 1");
    rejects(|c| c.down_rate = 0, "down_rate is 0", "at least 1");
    rejects(|c| c.kv_lora_rank = 2, "kv_lora_rank is 2", GATED);
    rejects(|c| c.dropout = 1.5, "dropout is 1.5", PROBABILITY);
}

fn layer(config: AttentionConfig) -> Attention<Flex> {
    config.init(&FlexDevice).unwrap()
}

/// A cache of two empty rows.
fn cache(layer: &Attention<Flex>) -> Cache<Flex> {
    let mut cache = Cache::new(layer.cache_spec(), 1, &FlexDevice);
    cache.join(2);
    cache
}

fn random<const D: usize>(shape: [usize; D]) -> Tensor<Flex, D> {
    Tensor::random(shape, Distribution::Default, &FlexDevice)
}

#[test]
fn cuts_inside_a_chunk_and_beyond_the_end() {
    let mut cache = cache(&layer(AttentionConfig::mtla(8, 2).with_down_rate(3)));
    cache.extend(&[1], &[8]);
    let error = cache.truncate(1, 4).unwrap_err();
    let (row, asked, stride) = (1, 4, 3);
    assert_eq!(error, CacheError::InsideChunk { row, asked, stride });
    assert_eq!(
        error.to_string(),
        "row 1 cannot be cut to 4 tokens: 3 tokens share a slot, cut at a multiple of 3"
    );
    let error = cache.truncate(1, 9).unwrap_err();
    assert_eq!(
        error.to_string(),
        "row 1 holds 8 tokens and cannot be cut to 9"
    );
    assert_eq!(cache.len(1), 8, "a refused cut changes nothing");
    assert_eq!(cache.truncate(1, 6), Ok(()));
}

#[test]
#[should_panic(expected = "row 1 is named twice")]
fn a_row_cannot_be_extended_twice_at_once() {
    cache(&layer(AttentionConfig::mha(8, 2))).extend(&[1, 1], &[1, 2]);
}

#[test]
#[should_panic(expected = "no row has a new token")]
fn a_prefill_brings_tokens() {
    cache(&layer(AttentionConfig::mha(8, 2))).extend(&[0, 1], &[0, 0]);
}

#[test]
#[should_panic(expected = "no row has a new token")]
fn a_step_has_rows() {
    cache(&layer(AttentionConfig::mha(8, 2))).step(&[]);
}

#[test]
#[should_panic(expected = "the plan is for 1 rows of at most 3 tokens, the input has 1 rows of 4")]
fn the_input_of_a_prefill_fits_its_plan() {
    let attention = layer(AttentionConfig::mtla(8, 2));
    let mut cache = cache(&attention);
    let plan = cache.extend(&[0], &[3]);
    attention.prefill(random([1, 4, 8]), &plan, cache.layer_mut(0));
}

#[test]
#[should_panic(expected = "3 queries from token 2 on do not fit into 3 queries and 4 keys")]
fn queries_fit_into_the_keys() {
    let input = AttentionInput::new(random([1, 3, 8]))
        .with_keys(random([1, 4, 8]))
        .with_offsets(vec![2])
        .with_lengths(vec![3]);
    layer(AttentionConfig::mtla(8, 2)).forward(input);
}

#[test]
#[should_panic(expected = "source lengths [5] do not fit 1 rows of 4 frames")]
fn source_lengths_fit_the_source() {
    let attention = CrossAttentionConfig::new(8, 2);
    let attention = attention.init::<Flex>(&FlexDevice).unwrap();
    let input = CrossInput::new(random([1, 3, 8]), random([1, 4, 8]));
    attention.forward(input.with_source_lengths(vec![5]));
}
