//! Variants that are special cases or other writings of each other.

use burn::{
    module::Param,
    nn::Linear,
    tensor::{Int, Tensor, TensorData, backend::Backend},
};
use mtla_core::{
    attention::{Attention, AttentionConfig, AttentionInput, QueryProjection},
    backend_tests,
    cache::Cache,
    ops::AttentionBackend,
    rope::{RotaryConfig, RotaryLayout},
};
use proptest::{prelude::any, strategy::Strategy};

use crate::common::{
    Numbers, Tokens, check,
    layer::{Layer, any_attention, any_latent},
    rows_of, values, vectors,
};

backend_tests!(
    one_token_a_slot_is_gated_mla,
    what_a_step_did_is_what_the_whole_sequence_does,
    an_open_gate_of_one_token_a_slot_is_mla,
    the_two_rotary_layouts_are_permutations_of_each_other,
);

/// The outputs of one row by all three entry points: the whole sequence, a prefill, steps.
fn every_path<B: AttentionBackend>(layer: &Layer<B>, row: &Tokens) -> [Tokens; 3] {
    let tokens = row.len();
    let x = layer.padded(std::slice::from_ref(row), tokens);
    let whole = layer.module.forward(AttentionInput::new(x.clone())).context;
    let mut cache = layer.cache(1);
    let plan = cache.extend(&[0], &[tokens]);
    let prefill = layer.module.prefill(x, &plan, cache.layer_mut(0));
    let mut cache = layer.cache(1);
    let mut step = |x: &Vec<f64>| {
        let plan = cache.step(&[0]);
        let x = layer.flat(std::slice::from_ref(x));
        vectors(layer.module.step(x, &plan, cache.layer_mut(0))).remove(0)
    };
    let steps = row.iter().map(&mut step).collect();
    [rows_of(whole).remove(0), rows_of(prefill).remove(0), steps]
}

fn mla_and_single_token_mtla() -> impl Strategy<Value = (AttentionConfig, AttentionConfig)> {
    any_latent().prop_map(|config| match config {
        AttentionConfig::Mla(latent) | AttentionConfig::Mtla { latent, .. } => {
            let mtla = AttentionConfig::Mtla {
                down_rate: 1,
                latent: latent.clone(),
            };
            (AttentionConfig::Mla(latent), mtla)
        }
        _ => unreachable!("a latent variant was drawn"),
    })
}

fn one_token_a_slot_is_gated_mla<B: AttentionBackend>(device: &B::Device) {
    let shapes = (mla_and_single_token_mtla(), 1usize..9, any::<u64>());
    check(12, shapes, |((_, mtla), tokens, seed)| {
        let layer = Layer::<B>::drawn(&mtla, seed, device);
        let row = Numbers::new(seed).tokens(tokens, layer.d_model);
        let expected = layer.oracle.row(&row);
        for found in every_path(&layer, &row) {
            layer.assert_close(&found, &expected, "gated MLA");
        }
    });
}

fn an_open_gate_of_one_token_a_slot_is_mla<B: AttentionBackend>(device: &B::Device) {
    let shapes = (mla_and_single_token_mtla(), 1usize..9, any::<u64>());
    check(12, shapes, |((mla, mtla), tokens, seed)| {
        // The gate's weights come last, so all others are alike.
        let mla = Layer::<B>::drawn(&mla, seed, device);
        let mut mtla = Layer::<B>::drawn(&mtla, seed, device);
        let Attention::Latent(latent) = &mut mtla.module else {
            unreachable!("a latent variant")
        };
        let gate = latent.gate.as_mut().expect("MTLA has a gate");
        for linear in [&mut gate.fc_c, &mut gate.fc_p] {
            linear.weight = linear.weight.clone().map(|w| w.zeros_like());
            linear.bias = linear
                .bias
                .clone()
                .map(|bias| bias.map(|b| b.ones_like() * 20));
        }
        let row = Numbers::new(seed).tokens(tokens, mla.d_model);
        for (found, expected) in every_path(&mtla, &row).iter().zip(every_path(&mla, &row)) {
            mla.assert_close(found, &expected, "MLA");
        }
    });
}

fn the_two_rotary_layouts_are_permutations_of_each_other<B: AttentionBackend>(device: &B::Device) {
    check(
        24,
        (any_attention(), 1usize..9, any::<u64>()),
        |(config, tokens, seed)| {
            let with = |layout| {
                let rope = RotaryConfig {
                    layout,
                    ..Default::default()
                };
                Layer::<B>::drawn(&config.clone().with_rope(rope), seed, device)
            };
            let interleaved = with(RotaryLayout::Interleaved);
            let mut halves = with(RotaryLayout::HalfSplit);
            match (&mut halves.module, &config) {
                (
                    Attention::Grouped(m),
                    AttentionConfig::Mha(c)
                    | AttentionConfig::Mqa(c)
                    | AttentionConfig::Gqa { dense: c, .. },
                ) => {
                    permute(&mut m.q_proj, 0, 0, c.head_dim());
                    permute(&mut m.k_proj, 0, 0, c.head_dim());
                }
                (
                    Attention::Latent(m),
                    AttentionConfig::Mla(c) | AttentionConfig::Mtla { latent: c, .. },
                ) => {
                    let wq = match &mut m.wq {
                        QueryProjection::Full(wq) => wq,
                        QueryProjection::LowRank(q) => &mut q.wq_b,
                    };
                    permute(wq, 0, c.qk_nope_head_dim, c.qk_rope_head_dim);
                    permute(&mut m.wkv_a, c.kv_lora_rank, 0, c.qk_rope_head_dim);
                }
                _ => unreachable!("the module is of the configuration's kind"),
            }
            let row = Numbers::new(seed).tokens(tokens, interleaved.d_model);
            let pairs = every_path(&halves, &row)
                .into_iter()
                .zip(every_path(&interleaved, &row));
            for (found, expected) in pairs {
                halves.assert_close(&found, &expected, "half-split, permuted");
            }
        },
    );
}

/// Puts the output columns of a linear map in even-then-odd order within every block of `width` columns
/// that follows `kept` columns; the first `skipped` columns of all stay.
fn permute<B: Backend>(linear: &mut Linear<B>, skipped: usize, kept: usize, width: usize) {
    let columns = linear.weight.dims()[1];
    let mut order: Vec<i64> = (0..columns as i64).collect();
    for head in (skipped..columns).step_by(kept + width) {
        let first = head + kept;
        for i in 0..width / 2 {
            order[first + i] = (first + 2 * i) as i64;
            order[first + width / 2 + i] = (first + 2 * i + 1) as i64;
        }
    }
    let order = TensorData::new(order, [columns]);
    let order = Tensor::<B, 1, Int>::from_data(order, &linear.weight.device());
    linear.weight = linear.weight.clone().map(|w| w.select(1, order.clone()));
    let bias = linear.bias.clone();
    linear.bias = bias.map(|bias: Param<Tensor<B, 1>>| bias.map(|b| b.select(0, order)));
}

/// A step's weights stand at slots (a slot is its chunk's last token so far), and its gates are those of a prompt.
fn what_a_step_did_is_what_the_whole_sequence_does<B: AttentionBackend>(device: &B::Device) {
    for (config, stride) in [
        (AttentionConfig::mha(16, 4), 1),
        (AttentionConfig::gqa(16, 4, 2), 1),
        (AttentionConfig::mla(16, 4), 1),
        (AttentionConfig::mtla(16, 4), 2),
        (AttentionConfig::mtla(16, 4).with_down_rate(3), 3),
    ] {
        let attention = config.init::<B>(device).expect("a sound configuration");
        let tokens = 8;
        let x = TensorData::new(Numbers::new(9).normals(2 * tokens * 16), [2, tokens, 16]);
        let x = Tensor::<B, 3>::from_data(x, device);
        let input = AttentionInput::new(x.clone()).with_weights();
        let whole = attention.forward(input).weights.expect("asked for");
        let mut cache = Cache::new(attention.cache_spec(), 1, device);
        cache.observe(&[0]);
        cache.join(2);
        let plan = cache.extend(&[0, 1], &[tokens, tokens]);
        attention.prefill(x.clone(), &plan, cache.layer_mut(0));
        let prompt = cache
            .layer(0)
            .observation()
            .and_then(|seen| seen.gates.clone());
        assert_eq!(
            prompt.is_some(),
            matches!(config, AttentionConfig::Mtla { .. })
        );
        cache.reorder(&[]);
        cache.join(2);
        for token in 0..tokens {
            let plan = cache.step(&[0, 1]);
            let x = x.clone().narrow(1, token, 1).squeeze_dim(1);
            attention.step(x, &plan, cache.layer_mut(0));
            let seen = cache.layer(0).observation().expect("it is kept").clone();
            if let (Some(prompt), Some(gates)) = (&prompt, seen.gates) {
                let expected = values(prompt.clone().narrow(1, token, 1));
                for (a, b) in values(gates).iter().zip(expected) {
                    assert!(0.01 < *a && *a < 0.99, "gate {a}, {config:?}");
                    assert!((a - b).abs() < 1e-5, "{a} and {b}, {config:?}");
                }
            }
            let found = seen.weights.expect("it was a step");
            let slots = token / stride + 1;
            assert_eq!(found.dims(), [2, 4, slots]);
            for slot in 0..slots {
                let last = ((slot + 1) * stride - 1).min(token);
                let expected = whole.clone().narrow(2, token, 1).narrow(3, last, 1);
                let found = found.clone().narrow(2, slot, 1);
                for (a, b) in values(found).iter().zip(values(expected)) {
                    assert!((a - b).abs() < 1e-5, "{a} and {b}, {config:?}");
                }
            }
        }
    }
}
