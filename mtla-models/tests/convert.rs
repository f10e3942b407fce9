//! Dense models turned into latent ones: what is exact, what falls with the rank, and what is refused.

#![cfg(all(feature = "flex", feature = "convert"))]

use std::sync::{Mutex, MutexGuard, PoisonError};

use burn::tensor::{Int, Tensor, TensorData, backend::Backend};
use burn_flex::{Flex, FlexDevice};
use mtla_core::{
    attention::{AttentionConfig, DenseConfig},
    rope::{RotaryConfig, RotaryLayout},
};
use mtla_models::{
    convert::{Conversion, Converted, convert},
    decoder::{Decoder, DecoderConfig, DecoderInput},
};

const VOCABULARY: usize = 40;

/// A model of this attention, with weights that look random.
fn model(attention: AttentionConfig) -> (DecoderConfig, Decoder<Flex>) {
    Flex::seed(&FlexDevice, 7);
    let config = DecoderConfig::new(VOCABULARY, 2, attention);
    let model = config.init(&FlexDevice).unwrap();
    (config, model)
}

/// Random numbers are the whole process's, and weights are drawn when they are first looked at: tests wait for each
/// other, so that nobody draws between a seed and what is drawn from it.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn attentions() -> Vec<AttentionConfig> {
    let rope = RotaryConfig {
        layout: RotaryLayout::HalfSplit,
        ..RotaryConfig::default()
    };
    let wide = DenseConfig {
        head_dim: Some(16),
        ..DenseConfig::new(32, 4)
    };
    vec![
        AttentionConfig::mha(32, 4).with_bias(true),
        AttentionConfig::mqa(32, 4).with_rope(rope),
        AttentionConfig::gqa(32, 4, 2)
            .with_rope(rope)
            .with_bias(true),
        AttentionConfig::Gqa {
            n_kv_heads: 2,
            dense: wide,
        },
    ]
}

/// More tokens than the model is wide.
fn text() -> Vec<Tensor<Flex, 2, Int>> {
    let mut state = 1u64;
    (0..4)
        .map(|_| {
            let ids: Vec<i64> = (0..60)
                .map(|_| {
                    state = state
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1);
                    (state >> 33) as i64 % VOCABULARY as i64
                })
                .collect();
            Tensor::from_data(TensorData::new(ids, [3, 20]), &FlexDevice)
        })
        .collect()
}

fn converted(attention: AttentionConfig, rank: usize, rope: usize) -> Converted<Flex> {
    let (config, model) = model(attention);
    convert(&model, &config, &Conversion::new(rank, rope), &text()).unwrap()
}

#[test]
fn keys_and_values_are_exact_at_full_rank() {
    let _alone = alone();
    for attention in attentions() {
        let width = match &attention {
            AttentionConfig::Gqa { dense, .. }
            | AttentionConfig::Mha(dense)
            | AttentionConfig::Mqa(dense) => dense.head_dim(),
            _ => unreachable!(),
        };
        let groups = match &attention {
            AttentionConfig::Mha(_) => 4,
            AttentionConfig::Mqa(_) => 1,
            _ => 2,
        };
        let full = (32 + usize::from(attention.bias())).min(2 * groups * width);
        for rope in [width, width / 2] {
            for layer in converted(attention.clone(), full, rope).report.layers {
                assert!(layer.keys < 1e-5 && layer.values < 1e-5, "{layer:?}");
            }
        }
    }
}

#[test]
fn errors_fall_with_the_rank() {
    let _alone = alone();
    for attention in attentions() {
        let reports: Vec<_> = [4, 8, 12, 16]
            .map(|rank| converted(attention.clone(), rank, 8).report.layers)
            .to_vec();
        for layer in [0, 1] {
            let errors: Vec<(f64, f64)> = reports
                .iter()
                .map(|layers| layers[layer])
                .map(|layer| (layer.keys.hypot(layer.values), layer.attention))
                .collect();
            // Where all is kept already, rounding is left.
            assert!(errors.is_sorted_by(|a, b| a.0 + 1e-9 > b.0), "{errors:?}");
            assert!(errors[0].0 > 0.1, "{errors:?}");
            assert!(errors[3].1 < errors[0].1, "{errors:?}");
        }
    }
}

/// One set of keys and values for all heads, and all of its frequencies: only the norm is left between the two.
#[test]
fn what_the_norm_leaves_is_near() {
    let _alone = alone();
    let attention = AttentionConfig::mqa(32, 4);
    let near = converted(attention.clone(), 16, 8);
    for layer in &near.report.layers {
        assert!(layer.attention < 0.5, "{layer:?}");
    }
    // Nearer than a latent attention that knows nothing of the old one.
    let (config, old) = model(attention);
    let mut fresh = old.clone();
    for layer in &mut fresh.layers {
        layer.attention = near.config.attention.init(&FlexDevice).unwrap();
    }
    let [text, ..] = &text()[..] else {
        unreachable!()
    };
    let logits = |model: &Decoder<Flex>| model.forward(DecoderInput::new(text.clone()));
    let distance = |model| {
        let difference: Tensor<Flex, 3> = logits(model) - logits(&old);
        difference.square().mean().into_scalar()
    };
    let (near, fresh) = (distance(&near.model), distance(&fresh));
    assert!(near < 0.2 * fresh, "{near} and {fresh} of {config:?}");
}

#[test]
fn to_mtla_with_a_gate_of_its_own() {
    let _alone = alone();
    let (config, model) = model(AttentionConfig::gqa(32, 4, 2));
    let conversion = Conversion::new(16, 8).with_down_rate(Some(2));
    let converted = convert(&model, &config, &conversion, &text()).unwrap();
    assert_eq!(converted.config.attention.name(), "mtla");
    // The divergence that is reported is that of the two models, token by token.
    let (mut sum, mut tokens) = (0.0, 0);
    for text in text() {
        let [old, new] = [&model, &converted.model].map(|model| {
            let logits = model.forward(DecoderInput::new(text.clone())).into_data();
            logits.iter::<f64>().collect::<Vec<f64>>()
        });
        let rows = old.chunks(VOCABULARY).zip(new.chunks(VOCABULARY));
        for (old, new) in rows {
            let total = |row: &[f64]| row.iter().map(|x| x.exp()).sum::<f64>().ln();
            let (a, b) = (total(old), total(new));
            let terms = old.iter().zip(new);
            sum += terms
                .map(|(x, y)| (x - a).exp() * ((x - a) - (y - b)))
                .sum::<f64>();
            tokens += 1;
        }
    }
    let expected = sum / f64::from(tokens);
    let found = converted.report.divergence;
    assert!(
        expected > 0.0 && (found / expected - 1.0).abs() < 1e-3,
        "{found}, {expected}"
    );
}

#[test]
fn what_cannot_be_converted_is_told() {
    let _alone = alone();
    let refused = |attention, conversion, text: &[Tensor<Flex, 2, Int>]| {
        let (config, model) = model(attention);
        convert(&model, &config, &conversion, text)
            .unwrap_err()
            .to_string()
    };
    let gqa = || AttentionConfig::gqa(32, 4, 2);
    assert_eq!(
        refused(AttentionConfig::mla(32, 4), Conversion::new(8, 8), &text()),
        "the model has mla attention; only mha, mqa and gqa can be converted"
    );
    assert_eq!(
        refused(gqa(), Conversion::new(33, 8), &text()),
        "conversion configuration: kv_lora_rank is 33, expected 1 to 32, which is exact"
    );
    assert_eq!(
        refused(gqa(), Conversion::new(8, 6), &text()),
        "conversion configuration: qk_rope_head_dim is 6, expected an even divisor of the head width 8"
    );
    assert_eq!(
        refused(gqa(), Conversion::new(8, 8), &[]),
        "there is no text: give at least one batch of tokens"
    );
}
