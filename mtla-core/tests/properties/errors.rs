//! What is wrong, where, and what would be right: the typed errors of configurations, problems and caches,
//! and the panics of a programmer's mistakes.

#![cfg(feature = "flex")]

use burn::tensor::{Distribution, Tensor};
use burn_flex::Flex;
use mtla_core::{
    attention::{
        AttentionConfig, AttentionInput, CrossAttentionConfig, CrossInput, DenseConfig,
        LatentConfig,
    },
    cache::{Cache, CacheError, SlotLayout},
    ops::{
        AttendOperands, AttendProblem, AttentionBackend, DecodeProblem, KeyValue, ProblemError,
        Visibility,
    },
};

#[track_caller]
fn rejects(config: AttentionConfig, expected: &str) {
    let error = config.validate().unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("attention configuration: {expected}")
    );
    assert_eq!(config.init::<Flex>(&Default::default()).unwrap_err(), error);
}

#[test]
fn dense_configurations() {
    let dense = || DenseConfig::new(12, 4);
    let mha = AttentionConfig::Mha;
    rejects(
        mha(DenseConfig::new(0, 4)),
        "d_model is 0, expected at least 1",
    );
    rejects(
        mha(DenseConfig::new(12, 0)),
        "n_heads is 0, expected at least 1",
    );
    rejects(
        mha(DenseConfig::new(12, 5)),
        "n_heads is 5, expected a divisor of d_model = 12, or head_dim given",
    );
    let even = "expected a positive even number (rotary pairs)";
    rejects(mha(dense()), &format!("head_dim is 3, {even}"));
    let head_dim = |width| DenseConfig {
        head_dim: Some(width),
        ..dense()
    };
    rejects(
        AttentionConfig::Mqa(head_dim(0)),
        &format!("head_dim is 0, {even}"),
    );
    let gqa = |n_kv_heads| AttentionConfig::Gqa {
        n_kv_heads,
        dense: head_dim(2),
    };
    for n_kv_heads in [0, 3, 8] {
        let expected = format!("n_kv_heads is {n_kv_heads}, expected a divisor of n_heads = 4");
        rejects(gqa(n_kv_heads), &expected);
    }
    assert_eq!(gqa(2).validate(), Ok(()));
    for dropout in [1.0, -0.1, f64::NAN] {
        let expected = format!("dropout is {dropout}, expected a probability in [0, 1)");
        rejects(gqa(2).with_dropout(dropout), &expected);
    }
}

#[test]
fn latent_configurations() {
    let latent = || LatentConfig::new(16, 2);
    let zero = |field: &str| {
        let mut c = latent();
        let target = match field {
            "d_model" => &mut c.d_model,
            "n_heads" => &mut c.n_heads,
            "kv_lora_rank" => &mut c.kv_lora_rank,
            "qk_nope_head_dim" => &mut c.qk_nope_head_dim,
            "v_head_dim" => &mut c.v_head_dim,
            _ => unreachable!("no such field"),
        };
        *target = 0;
        c
    };
    for field in [
        "d_model",
        "n_heads",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "v_head_dim",
    ] {
        let expected = format!("{field} is 0, expected at least 1");
        rejects(AttentionConfig::Mla(zero(field)), &expected);
        rejects(
            AttentionConfig::Mtla {
                down_rate: 2,
                latent: zero(field),
            },
            &expected,
        );
    }
    for width in [0, 5] {
        let config = AttentionConfig::Mla(LatentConfig {
            qk_rope_head_dim: width,
            ..latent()
        });
        let expected = "expected a positive even number (rotary pairs)";
        rejects(config, &format!("qk_rope_head_dim is {width}, {expected}"));
    }
    let narrow = LatentConfig {
        kv_lora_rank: 3,
        ..latent()
    };
    assert_eq!(AttentionConfig::Mla(narrow.clone()).validate(), Ok(()));
    let expected = "expected at least 4 (the gate works in kv_lora_rank / 4 dimensions)";
    rejects(
        AttentionConfig::Mtla {
            down_rate: 2,
            latent: narrow,
        },
        &format!("kv_lora_rank is 3, {expected}"),
    );
    rejects(
        AttentionConfig::mtla(16, 2).with_down_rate(0),
        "down_rate is 0, expected at least 1",
    );
    rejects(
        AttentionConfig::mtla(16, 2).with_dropout(2.0),
        "dropout is 2, expected a probability in [0, 1)",
    );
    assert_eq!(AttentionConfig::mla(16, 2).with_down_rate(7).down_rate(), 1);
}

#[test]
fn cross_attention_configurations() {
    let rejects = |config: CrossAttentionConfig, expected: &str| {
        let error = config.init::<Flex>(&Default::default()).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("attention configuration: {expected}")
        );
    };
    let good = || CrossAttentionConfig::new(16, 2);
    let least = "expected at least 1";
    rejects(
        CrossAttentionConfig {
            d_model: 0,
            ..good()
        },
        &format!("d_model is 0, {least}"),
    );
    rejects(
        CrossAttentionConfig {
            d_source: 0,
            ..good()
        },
        &format!("d_source is 0, {least}"),
    );
    rejects(
        CrossAttentionConfig {
            n_heads: 0,
            ..good()
        },
        &format!("n_heads is 0, {least}"),
    );
    let width = CrossAttentionConfig {
        qk_head_dim: 0,
        ..good()
    };
    rejects(width, &format!("qk_head_dim is 0, {least}"));
    rejects(
        CrossAttentionConfig {
            v_head_dim: 0,
            ..good()
        },
        &format!("v_head_dim is 0, {least}"),
    );
    rejects(
        CrossAttentionConfig {
            down_rate: 0,
            ..good()
        },
        &format!("down_rate is 0, {least}"),
    );
    let expected = "expected at least 4 (the gate works in kv_lora_rank / 4 dimensions)";
    let narrow = CrossAttentionConfig {
        kv_lora_rank: 2,
        ..good()
    };
    rejects(narrow, &format!("kv_lora_rank is 2, {expected}"));
    let dropout = CrossAttentionConfig {
        dropout: 1.5,
        ..good()
    };
    rejects(dropout, "dropout is 1.5, expected a probability in [0, 1)");
}

#[test]
fn cuts_inside_a_chunk_and_beyond_the_end() {
    let attention = AttentionConfig::mtla(8, 2).with_down_rate(3);
    let attention = attention.init::<Flex>(&Default::default()).unwrap();
    let mut cache = Cache::<Flex>::new(attention.cache_spec(), 1, &Default::default());
    cache.join(2);
    cache.extend(&[1], &[8]);
    let error = cache.truncate(1, 4).unwrap_err();
    assert_eq!(
        error,
        CacheError::InsideChunk {
            row: 1,
            asked: 4,
            stride: 3
        }
    );
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

fn problem() -> AttendProblem {
    AttendProblem {
        batch: 2,
        heads: 4,
        kv_heads: 2,
        queries: 5,
        columns: 3,
        self_term: true,
        key_width: 6,
        value_width: 7,
        visibility: Visibility::Causal {
            stride: 2,
            offsets: vec![0, 1],
        },
        lengths: vec![5, 5],
        scale: 1.0,
        dropout: None,
    }
}

const Q: [usize; 4] = [2, 4, 5, 6];
const COLUMNS: ([usize; 4], [usize; 4]) = ([2, 2, 3, 6], [2, 2, 3, 7]);
const OWN: ([usize; 4], [usize; 4]) = ([2, 2, 5, 6], [2, 2, 5, 7]);

#[test]
fn attend_problems() {
    let valid = |p: &AttendProblem| p.validate(Q, Some(COLUMNS), Some(OWN));
    assert_eq!(valid(&problem()), Ok(()));

    let error = problem()
        .validate([2, 4, 5, 5], Some(COLUMNS), Some(OWN))
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "q has shape [2, 4, 5, 5], expected [2, 4, 5, 6]"
    );
    let shifted = |mut shape: [usize; 4], axis: usize| {
        shape[axis] += 1;
        shape
    };
    for axis in 0..4 {
        let names = ["k", "v", "self k", "self v"];
        let (columns, own) = (|k, v| Some((k, v)), |k, v| Some((k, v)));
        let broken = [
            (columns(shifted(COLUMNS.0, axis), COLUMNS.1), Some(OWN)),
            (columns(COLUMNS.0, shifted(COLUMNS.1, axis)), Some(OWN)),
            (Some(COLUMNS), own(shifted(OWN.0, axis), OWN.1)),
            (Some(COLUMNS), own(OWN.0, shifted(OWN.1, axis))),
        ];
        for (name, (columns, own)) in names.into_iter().zip(broken) {
            let error = problem().validate(Q, columns, own).unwrap_err();
            assert!(
                matches!(error, ProblemError::Shape { operand, .. } if operand == name),
                "{name} at axis {axis}: {error}"
            );
        }
    }

    for kv_heads in [0, 3] {
        let error = valid(&AttendProblem {
            kv_heads,
            ..problem()
        })
        .unwrap_err();
        let expected = format!("4 query heads cannot be grouped over {kv_heads} key/value heads");
        assert_eq!(error.to_string(), expected);
    }
    let error = problem().validate(Q, None, None).unwrap_err();
    assert_eq!(
        error.to_string(),
        "there are neither columns nor a self term to attend to"
    );
    let error = valid(&AttendProblem {
        lengths: vec![5],
        ..problem()
    })
    .unwrap_err();
    assert_eq!(error.to_string(), "lengths has 1 entries for 2 rows");
    let causal = |offsets| Visibility::Causal { stride: 2, offsets };
    let error = valid(&AttendProblem {
        visibility: causal(vec![0; 3]),
        ..problem()
    })
    .unwrap_err();
    assert_eq!(error.to_string(), "offsets has 3 entries for 2 rows");
    let prefix = Visibility::Prefix { lengths: vec![3] };
    let error = valid(&AttendProblem {
        visibility: prefix,
        ..problem()
    })
    .unwrap_err();
    assert_eq!(
        error.to_string(),
        "visible lengths has 1 entries for 2 rows"
    );
    let late = AttendProblem {
        visibility: causal(vec![0, 3]),
        ..problem()
    };
    let error = valid(&late).unwrap_err();
    assert_eq!(
        error.to_string(),
        "row 1 ends at token 7 and needs 4 columns, 3 were given"
    );
}

#[test]
fn decode_problems() {
    let layout = SlotLayout::Latent {
        rank: 4,
        rope_dim: 2,
    };
    let problem = DecodeProblem {
        heads: 3,
        layout,
        stride: 2,
        starts: vec![5, 0],
        max_slots: 3,
        scale: 1.0,
    };
    let (q, row, gates, pool, table) = ([2, 3, 6], [2, 6], Some([3, 5]), [9, 6], [2, 4]);
    assert_eq!(problem.validate(q, row, gates, pool, table), Ok(()));
    let named = |result: Result<(), ProblemError>| match result.unwrap_err() {
        ProblemError::Shape { operand, .. } => operand,
        other => panic!("{other}"),
    };
    assert_eq!(
        named(problem.validate([2, 3, 4], row, gates, pool, table)),
        "q"
    );
    assert_eq!(
        named(problem.validate(q, [1, 6], gates, pool, table)),
        "row"
    );
    assert_eq!(
        named(problem.validate(q, row, gates, [9, 4], table)),
        "pool"
    );
    assert_eq!(
        named(problem.validate(q, row, gates, pool, [2, 3])),
        "table"
    );
    // Row 0 is in its third chunk: two rows of gates are too few, four are fine.
    assert_eq!(
        named(problem.validate(q, row, Some([2, 5]), pool, table)),
        "gate table"
    );
    assert_eq!(
        named(problem.validate(q, row, Some([3, 4]), pool, table)),
        "gate table"
    );
    assert_eq!(problem.validate(q, row, Some([4, 5]), pool, table), Ok(()));
    let dense = SlotLayout::Dense {
        kv_heads: 2,
        head_dim: 2,
    };
    let dense = DecodeProblem {
        layout: dense,
        ..problem
    };
    let error = dense
        .validate([2, 3, 2], [2, 8], None, [9, 8], table)
        .unwrap_err();
    assert_eq!(
        error,
        ProblemError::Heads {
            heads: 3,
            kv_heads: 2
        }
    );
}

fn random<const D: usize>(shape: [usize; D]) -> Tensor<Flex, D> {
    Tensor::random(shape, Distribution::Default, &Default::default())
}

#[test]
#[should_panic(expected = "attend: k has shape [2, 2, 4, 6], expected [2, 2, 3, 6]")]
fn attend_names_the_operand_that_does_not_fit() {
    let operands = AttendOperands {
        q: random(Q),
        columns: Some(KeyValue {
            k: random([2, 2, 4, 6]),
            v: random(COLUMNS.1),
        }),
        self_term: None,
    };
    Flex::attend(operands, &problem());
}

#[test]
#[should_panic(expected = "row 1 is named twice")]
fn a_row_cannot_be_extended_twice_at_once() {
    let attention = AttentionConfig::mha(8, 2)
        .init::<Flex>(&Default::default())
        .unwrap();
    let mut cache = Cache::<Flex>::new(attention.cache_spec(), 1, &Default::default());
    cache.join(2);
    cache.extend(&[1, 1], &[1, 2]);
}

#[test]
#[should_panic(expected = "no row has a new token")]
fn a_prefill_brings_tokens() {
    let attention = AttentionConfig::mha(8, 2)
        .init::<Flex>(&Default::default())
        .unwrap();
    let mut cache = Cache::<Flex>::new(attention.cache_spec(), 1, &Default::default());
    cache.join(2);
    cache.extend(&[0, 1], &[0, 0]);
}

#[test]
#[should_panic(expected = "no row has a new token")]
fn a_step_has_rows() {
    let attention = AttentionConfig::mha(8, 2)
        .init::<Flex>(&Default::default())
        .unwrap();
    let mut cache = Cache::<Flex>::new(attention.cache_spec(), 1, &Default::default());
    cache.join(2);
    cache.step(&[]);
}

#[test]
#[should_panic(expected = "the plan is for 1 rows of at most 3 tokens, the input has 1 rows of 4")]
fn the_input_of_a_prefill_fits_its_plan() {
    let attention = AttentionConfig::mtla(8, 2)
        .init::<Flex>(&Default::default())
        .unwrap();
    let mut cache = Cache::<Flex>::new(attention.cache_spec(), 1, &Default::default());
    cache.join(1);
    let plan = cache.extend(&[0], &[3]);
    attention.prefill(random([1, 4, 8]), &plan, cache.layer_mut(0));
}

#[test]
#[should_panic(expected = "3 queries from token 2 on do not fit into 3 queries and 4 keys")]
fn queries_fit_into_the_keys() {
    let attention = AttentionConfig::mtla(8, 2)
        .init::<Flex>(&Default::default())
        .unwrap();
    let input = AttentionInput::new(random([1, 3, 8]))
        .with_keys(random([1, 4, 8]))
        .with_offsets(vec![2])
        .with_lengths(vec![3]);
    attention.forward(input);
}

#[test]
#[should_panic(expected = "source lengths [5] do not fit 1 rows of 4 frames")]
fn source_lengths_fit_the_source() {
    let attention = CrossAttentionConfig::new(8, 2)
        .init::<Flex>(&Default::default())
        .unwrap();
    let input = CrossInput::new(random([1, 3, 8]), random([1, 4, 8]));
    attention.forward(input.with_source_lengths(vec![5]));
}
