//! Gradients against central finite differences in 64 bits, for every parameter and every input, and those
//! of every backend in 32 bits against them.

#![cfg(feature = "flex")]

use burn::{
    module::{Module, ModuleMapper, ModuleVisitor, Param},
    tensor::{Tensor, TensorData, backend::AutodiffBackend},
};
use burn_autodiff::Autodiff;
use burn_flex::{Flex, FlexDevice};
use mtla_core::{
    attention::{
        Attention, AttentionConfig, AttentionInput, CrossAttentionConfig, CrossInput, DenseConfig,
        LatentConfig,
    },
    backend_tests,
    ops::AttentionBackend,
    rope::RotaryConfig,
    testing::one_graph,
};
use proptest::{collection::vec, prelude::any};

use crate::common::{
    F32, F64, Numbers, Precision, check,
    layer::{CrossLayer, Layer},
    longest, padded, values,
};

backend_tests!(of_32_bits_are_those_of_64);

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

/// One ragged batch of a layer in the published proportions, where 32 bits lose next to nothing.
#[derive(Debug)]
struct Batch {
    config: AttentionConfig,
    lengths: Vec<usize>,
    /// Tokens of a prefix that every row has.
    offset: usize,
    dropout_seed: Option<u64>,
    seed: u64,
}

impl Batch {
    fn gradients<A: AttentionBackend + AutodiffBackend>(
        &self,
        precision: Precision,
        device: &A::Device,
    ) -> Vec<(String, Vec<f64>)> {
        let layer = Layer::<A>::new(&self.config, self.seed, precision, device);
        let totals: Vec<usize> = self.lengths.iter().map(|n| n + self.offset).collect();
        let mut numbers = Numbers::new(self.seed);
        let rows = numbers.rows(&self.lengths, layer.d_model);
        let x = layer.padded(&rows, longest(&self.lengths));
        let keys = layer.padded(&numbers.rows(&totals, layer.d_model), longest(&totals));
        let forward = |module: &Attention<A>, x: &[Tensor<A, 3>]| {
            let input = AttentionInput::new(x[0].clone())
                .with_keys(x[1].clone())
                .with_offsets(vec![self.offset; self.lengths.len()])
                .with_lengths(self.lengths.clone())
                .with_dropout_seed(self.dropout_seed);
            module.forward(input).context
        };
        let inputs = [x.require_grad(), keys.require_grad()];
        gradients(&layer.module, &inputs, &self.lengths, forward)
    }
}

fn of_32_bits_are_those_of_64<T: AttentionBackend>(device: &T::Device) {
    let shapes = (0..5usize, 1..6usize, vec(1..14usize, 1..3), 0..9usize);
    let seeds = (any::<Option<u64>>(), any::<u64>());
    check(24, (shapes, seeds), |(shapes, (dropout_seed, seed))| {
        let (kind, down_rate, lengths, offset) = shapes;
        let config = match kind {
            0 => AttentionConfig::mha(16, 2),
            1 => AttentionConfig::gqa(16, 4, 2),
            2 => AttentionConfig::mla(16, 2),
            _ => AttentionConfig::mtla(16, 2).with_down_rate(down_rate),
        };
        let batch = Batch {
            config: config.with_bias(seed % 2 == 0).with_dropout(0.2),
            lengths,
            offset,
            dropout_seed,
            seed,
        };
        let found = batch.gradients::<Autodiff<T>>(F32, device);
        let expected = batch.gradients::<B>(F64, &FlexDevice);
        for ((name, found), (_, expected)) in found.iter().zip(&expected) {
            let largest = expected.iter().fold(1.0, |a: f64, b| a.max(b.abs()));
            for (element, (a, b)) in found.iter().zip(expected).enumerate() {
                let error = (a - b).abs() / largest;
                assert!(
                    error < 2e-5,
                    "{name}[{element}]: {a}, in 64 bits {b} (off by {error:e})"
                );
            }
        }
    });
}

/// The loss is `Σ r·y`, with `r` random over the first `lengths[b]` outputs of each row and 0 over the
/// padding.
fn cotangent([batch, tokens, width]: [usize; 3], lengths: &[usize]) -> Vec<f64> {
    let mut numbers = Numbers::new(13);
    let mut r = vec![0.0; batch * tokens * width];
    for (row, length) in lengths.iter().enumerate() {
        let first = row * tokens * width;
        r[first..first + length * width].fill_with(|| numbers.normal());
    }
    r
}

/// The gradients of the loss by all parameters, then by all inputs, with their names.
fn gradients<A: AutodiffBackend, M: Module<A>>(
    module: &M,
    inputs: &[Tensor<A, 3>],
    lengths: &[usize],
    forward: impl Fn(&M, &[Tensor<A, 3>]) -> Tensor<A, 3>,
) -> Vec<(String, Vec<f64>)> {
    let _alone = one_graph();
    let output = forward(module, inputs);
    let options = (&output.device(), output.dtype());
    let r = TensorData::new(cotangent(output.dims(), lengths), output.dims());
    let r = Tensor::from_data(r.convert_dtype(options.1), options);
    let grads = (output * r).sum().backward();
    let mut collected = Collected::<A> {
        grads: &grads,
        found: Vec::new(),
        path: Vec::new(),
    };
    module.visit(&mut collected);
    let mut found = collected.found;
    for (i, input) in inputs.iter().enumerate() {
        let gradient = input.grad(&grads).expect("the input has a gradient");
        found.push((format!("input {i}"), values(gradient)));
    }
    let alive = |(_, gradient): &(_, Vec<f64>)| gradient.iter().any(|g| *g != 0.0);
    assert!(found.iter().any(alive));
    found
}

fn check_gradients<M: Module<B>, const N: usize>(
    module: &M,
    inputs: Vec<Tensor<B, 3>>,
    lengths: [usize; N],
    forward: impl Fn(&M, &[Tensor<B, 3>]) -> Tensor<B, 3>,
) {
    let inputs: Vec<_> = inputs.into_iter().map(Tensor::require_grad).collect();
    let found = gradients(module, &inputs, &lengths, &forward);
    let loss = |module: &M, inputs: &[Tensor<B, 3>]| -> f64 {
        let output = forward(module, inputs);
        let r = cotangent(output.dims(), &lengths);
        values(output).iter().zip(&r).map(|(y, r)| y * r).sum()
    };
    let parameters = found.len() - inputs.len();
    for (number, (name, gradient)) in found.iter().enumerate() {
        compare(name, gradient, |element, delta| {
            if number >= parameters {
                let mut inputs = inputs.clone();
                let input = &mut inputs[number - parameters];
                *input = nudged(input.clone(), element, delta);
                return loss(module, &inputs);
            }
            let mut nudge = Nudge {
                number,
                element,
                delta,
                seen: 0,
            };
            loss(&module.clone().map(&mut nudge), &inputs)
        });
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
struct Collected<'a, A: AutodiffBackend> {
    grads: &'a A::Gradients,
    found: Vec<(String, Vec<f64>)>,
    path: Vec<String>,
}

impl<A: AutodiffBackend> ModuleVisitor<A> for Collected<'_, A> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<A, D>>) {
        let name = self.path.join(".");
        let gradient = param.val().grad(self.grads);
        let gradient = gradient.unwrap_or_else(|| panic!("{name} has no gradient"));
        self.found.push((name, values(gradient)));
    }
}
