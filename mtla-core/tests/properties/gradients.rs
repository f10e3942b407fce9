//! Gradients against central finite differences in 64 bits, for every parameter and every input.

#![cfg(feature = "flex")]

use burn::{
    module::{Module, ModuleMapper, ModuleVisitor, Param},
    tensor::{Tensor, TensorData, backend::AutodiffBackend},
};
use burn_autodiff::Autodiff;
use burn_flex::{Flex, FlexDevice};
use mtla_core::{
    attention::{
        AttentionConfig, AttentionInput, CrossAttentionConfig, CrossInput, DenseConfig,
        LatentConfig,
    },
    rope::RotaryConfig,
};

use crate::common::{
    F64, Numbers,
    layer::{CrossLayer, Layer},
    padded, values,
};

type B = Autodiff<Flex>;

/// The error of a central difference is about `H² f‴ / 6 + 1e-15 / H`.
const H: f64 = 1e-6;
const TOLERANCE: f64 = 1e-7;

const LENGTHS: [usize; 2] = [7, 4];

fn dense(bias: bool) -> DenseConfig {
    DenseConfig {
        head_dim: Some(4),
        bias,
        ..DenseConfig::new(3, 2)
    }
}

fn latent(q_lora_rank: usize, bias: bool) -> LatentConfig {
    LatentConfig {
        d_model: 3,
        n_heads: 2,
        q_lora_rank,
        kv_lora_rank: 9,
        qk_nope_head_dim: 2,
        qk_rope_head_dim: 2,
        v_head_dim: 3,
        bias,
        dropout: 0.0,
        rope: RotaryConfig::default(),
    }
}

fn mtla(down_rate: usize) -> AttentionConfig {
    AttentionConfig::Mtla {
        down_rate,
        latent: latent(0, false),
    }
}

/// Whole sequences and prefix-as-keys batches, with dropout and without.
fn check_self_attention(config: &AttentionConfig) {
    for (case, seed) in [None, Some(11)].into_iter().enumerate() {
        let config = config
            .clone()
            .with_dropout(if seed.is_some() { 0.3 } else { 0.0 });
        let layer = Layer::<B>::new(&config, 5 + case as u64, F64, &FlexDevice);
        let mut numbers = Numbers::new(6);
        let x = layer.padded(&numbers.rows(&LENGTHS, layer.d_model), LENGTHS[0]);
        check_gradients(&layer.module, vec![x], LENGTHS, |module, x| {
            let input = AttentionInput::new(x[0].clone()).with_lengths(LENGTHS.to_vec());
            module.forward(input.with_dropout_seed(seed)).context
        });

        let offsets = [2, 3];
        let totals = [LENGTHS[0] + offsets[0], LENGTHS[1] + offsets[1]];
        let x = layer.padded(&numbers.rows(&LENGTHS, layer.d_model), LENGTHS[0]);
        let keys = layer.padded(&numbers.rows(&totals, layer.d_model), totals[0]);
        check_gradients(&layer.module, vec![x, keys], LENGTHS, |module, x| {
            let input = AttentionInput::new(x[0].clone())
                .with_keys(x[1].clone())
                .with_offsets(offsets.to_vec())
                .with_lengths(LENGTHS.to_vec())
                .with_dropout_seed(seed);
            module.forward(input).context
        });
    }
}

fn check_cross_attention(config: &CrossAttentionConfig) {
    let device = FlexDevice;
    for seed in [None, Some(12)] {
        let dropout = if seed.is_some() { 0.3 } else { 0.0 };
        let config = CrossAttentionConfig {
            dropout,
            ..config.clone()
        };
        let layer = CrossLayer::<B>::new(&config, 7, F64, &device);
        let mut numbers = Numbers::new(8);
        let queries = numbers.rows(&[3, 3], config.d_model);
        let sources = numbers.rows(&LENGTHS, config.d_source);
        let x = padded(&queries, [3, config.d_model], F64.dtype, &device);
        let source = padded(&sources, [LENGTHS[0], config.d_source], F64.dtype, &device);
        check_gradients(&layer.module, vec![x, source], [3, 3], |module, x| {
            let input = CrossInput::new(x[0].clone(), x[1].clone())
                .with_source_lengths(LENGTHS.to_vec())
                .with_dropout_seed(seed);
            module.forward(input)
        });
    }
}

#[test]
fn of_dense_attention() {
    check_self_attention(&AttentionConfig::Mha(dense(true)));
    check_self_attention(&AttentionConfig::Mqa(dense(false)));
    let dense = DenseConfig {
        n_heads: 4,
        head_dim: Some(2),
        ..dense(false)
    };
    check_self_attention(&AttentionConfig::Gqa {
        n_kv_heads: 2,
        dense,
    });
}

#[test]
fn of_latent_attention() {
    check_self_attention(&AttentionConfig::Mla(latent(0, false)));
    check_self_attention(&AttentionConfig::Mla(latent(3, true)));
}

#[test]
fn of_temporal_attention() {
    for down_rate in [1, 2, 3] {
        check_self_attention(&mtla(down_rate));
    }
    check_self_attention(&AttentionConfig::Mtla {
        down_rate: 2,
        latent: latent(3, true),
    });
    // Longer than any row: no chunk is ever complete.
    check_self_attention(&mtla(11));
}

/// One query over a long prefix attends to the latents themselves instead of expanding them.
#[test]
fn of_the_absorbed_form() {
    for config in [AttentionConfig::Mla(latent(0, true)), mtla(2), mtla(3)] {
        let layer = Layer::<B>::new(&config, 9, F64, &FlexDevice);
        let mut numbers = Numbers::new(10);
        let x = layer.padded(&numbers.rows(&[1], layer.d_model), 1);
        let keys = layer.padded(&numbers.rows(&[13], layer.d_model), 13);
        check_gradients(&layer.module, vec![x, keys], [1], |module, x| {
            let input = AttentionInput::new(x[0].clone()).with_keys(x[1].clone());
            module.forward(input).context
        });
    }
}

#[test]
fn of_cross_attention() {
    let small = CrossAttentionConfig {
        d_model: 3,
        d_source: 4,
        n_heads: 2,
        q_lora_rank: 0,
        kv_lora_rank: 9,
        qk_head_dim: 2,
        v_head_dim: 3,
        down_rate: 2,
        bias: false,
        dropout: 0.0,
    };
    check_cross_attention(&small);
    let low_rank = CrossAttentionConfig {
        down_rate: 3,
        q_lora_rank: 3,
        bias: true,
        ..small
    };
    check_cross_attention(&low_rank);
}

/// Compares `∂/∂(parameters, inputs) Σ r·y`, with `r` random over the first `lengths[b]` outputs of each
/// row and 0 over the padding.
fn check_gradients<M: Module<B>, const N: usize>(
    module: &M,
    inputs: Vec<Tensor<B, 3>>,
    lengths: [usize; N],
    forward: impl Fn(&M, &[Tensor<B, 3>]) -> Tensor<B, 3>,
) {
    let device = FlexDevice;
    let inputs: Vec<_> = inputs
        .into_iter()
        .map(|x| x.detach().require_grad())
        .collect();
    let output = forward(module, &inputs);
    let [batch, tokens, width] = output.dims();
    let mut numbers = Numbers::new(13);
    let mut r = vec![0.0; batch * tokens * width];
    for (row, length) in lengths.iter().enumerate() {
        let first = row * tokens * width;
        r[first..first + length * width].fill_with(|| numbers.normal());
    }
    let data = TensorData::new(r.clone(), [batch, tokens, width]);
    let grads = (output * Tensor::from_data(data, (&device, F64.dtype)))
        .sum()
        .backward();
    let loss = |module: &M, inputs: &[Tensor<B, 3>]| -> f64 {
        values(forward(module, inputs))
            .iter()
            .zip(&r)
            .map(|(y, r)| y * r)
            .sum()
    };

    let mut found = Collected {
        grads: &grads,
        found: Vec::new(),
        path: Vec::new(),
    };
    module.visit(&mut found);
    assert!(
        found
            .found
            .iter()
            .any(|(_, gradient)| gradient.iter().any(|g| *g != 0.0))
    );
    for (number, (name, gradient)) in found.found.iter().enumerate() {
        let at = |element, delta| {
            let module = module.clone().map(&mut Nudge {
                number,
                element,
                delta,
                seen: 0,
            });
            loss(&module, &inputs)
        };
        compare(name, gradient, at);
    }
    for (i, input) in inputs.iter().enumerate() {
        let gradient = values(input.grad(&grads).expect("the input has a gradient"));
        let at = |element, delta| {
            let mut inputs = inputs.clone();
            inputs[i] = nudged(inputs[i].clone(), element, delta);
            loss(module, &inputs)
        };
        compare(&format!("input {i}"), &gradient, at);
    }
}

fn compare(name: &str, gradient: &[f64], at: impl Fn(usize, f64) -> f64) {
    let largest = gradient.iter().fold(1.0, |a: f64, b| a.max(b.abs()));
    for (element, found) in gradient.iter().enumerate() {
        let expected = (at(element, H) - at(element, -H)) / (2.0 * H);
        let error = (found - expected).abs() / largest;
        assert!(
            error < TOLERANCE,
            "{name}[{element}]: {found}, by differences {expected} (off by {error:e})"
        );
    }
}

fn nudged<const D: usize>(x: Tensor<B, D>, element: usize, delta: f64) -> Tensor<B, D> {
    let mut data: Vec<f64> = values(x.clone());
    data[element] += delta;
    Tensor::from_data(TensorData::new(data, x.shape()), (&x.device(), F64.dtype))
}

/// Adds `delta` to one element of parameter `number`.
struct Nudge {
    number: usize,
    element: usize,
    delta: f64,
    seen: usize,
}

impl ModuleMapper<B> for Nudge {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        self.seen += 1;
        if self.seen == self.number + 1 {
            param.map(|x| nudged(x, self.element, self.delta))
        } else {
            param
        }
    }
}

/// The gradients of all parameters, by path.
struct Collected<'a> {
    grads: &'a <B as AutodiffBackend>::Gradients,
    found: Vec<(String, Vec<f64>)>,
    path: Vec<String>,
}

impl ModuleVisitor<B> for Collected<'_> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        let name = self.path.join(".");
        let gradient = param.val().grad(self.grads);
        let gradient = gradient.unwrap_or_else(|| panic!("{name} has no gradient"));
        self.found.push((name, values(gradient)));
    }
}
