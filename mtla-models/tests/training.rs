//! Decoders of every attention variant learn, and with all of their weights.

mod common;

use burn::{
    module::{AutodiffModule, Module, ModuleVisitor, Param},
    nn::loss::CrossEntropyLossConfig,
    optim::{AdamWConfig, GradientsParams, Optimizer},
    tensor::{
        Tensor,
        backend::{AutodiffBackend, Backend},
    },
};
use burn_autodiff::Autodiff;
use common::{VOCAB, batch, configs, tokens};
use mtla_core::{
    attention::AttentionConfig, backend_tests, ops::AttentionBackend, testing::one_graph,
};
use mtla_models::{
    decoder::{Decoder, DecoderConfig, DecoderInput},
    generate::{GenerationConfig, generate},
};

/// Cross entropy of predicting each next token of `rows` (of one length).
fn loss<B: AttentionBackend>(
    model: &Decoder<B>,
    rows: &[Vec<u32>],
    device: &B::Device,
) -> Tensor<B, 1> {
    let places = rows[0].len() - 1;
    let sequences = batch::<B>(rows, 0, device);
    let targets = sequences.clone().narrow(1, 1, places).reshape([-1]);
    let logits = model.forward(DecoderInput::new(sequences.narrow(1, 0, places)));
    let logits = logits.reshape([rows.len() * places, VOCAB]);
    CrossEntropyLossConfig::new()
        .init(device)
        .forward(logits, targets)
}

fn value<B: Backend>(loss: &Tensor<B, 1>) -> f32 {
    loss.clone().into_data().iter().next().unwrap()
}

fn every_variant_learns_a_batch_by_heart<B: AttentionBackend>(device: &B::Device) {
    let rows: Vec<Vec<u32>> = (0..3).map(|row| tokens(13, row)).collect();
    for config in configs() {
        let mut model = config.init::<Autodiff<B>>(device).unwrap();
        let mut optimizer = AdamWConfig::new().init();
        let before = value(&loss(&model, &rows, device));
        // Fresh predictions are close to uniform.
        assert!(
            (before - (VOCAB as f32).ln()).abs() < 1.0,
            "{before} for {config:?}"
        );
        for _ in 0..60 {
            let _alone = one_graph();
            let grads = loss(&model, &rows, device).backward();
            let grads = GradientsParams::from_grads(grads, &model);
            model = optimizer.step(1e-2, model, grads);
        }
        let after = value(&loss(&model, &rows, device));
        assert!(
            after < before / 20.0,
            "from {before} to {after} only, for {config:?}"
        );

        // What was learnt comes out again, through the cache.
        let prompts: Vec<Vec<u32>> = rows.iter().map(|row| row[..3].to_vec()).collect();
        let completions = generate(&model.valid(), &prompts, &GenerationConfig::new(10)).unwrap();
        for (row, completion) in rows.iter().zip(completions) {
            assert_eq!(completion.tokens, row[3..], "{config:?}");
        }
    }
}

/// Counts parameters, and collects the ids of those without a gradient.
struct Gradients<'g, B: AutodiffBackend> {
    grads: &'g B::Gradients,
    path: Vec<String>,
    seen: usize,
    missing: Vec<String>,
}

impl<B: AutodiffBackend> ModuleVisitor<B> for Gradients<'_, B> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        self.seen += param.val().shape().num_elements();
        let grad = param.val().grad(self.grads);
        let size = grad.map(|grad| grad.abs().sum().into_data().iter::<f32>().next().unwrap());
        if !size.is_some_and(|size| size > 0.0 && size.is_finite()) {
            self.missing.push(self.path.join("."));
        }
    }
}

fn gradients_reach_every_parameter<B: AttentionBackend>(device: &B::Device) {
    let rows = vec![tokens(9, 0), tokens(9, 1)];
    let mut configs = configs();
    let AttentionConfig::Mtla {
        down_rate,
        mut latent,
    } = AttentionConfig::mtla(16, 4)
    else {
        unreachable!()
    };
    latent.q_lora_rank = 8;
    configs.push(DecoderConfig::new(
        VOCAB,
        2,
        AttentionConfig::Mtla { down_rate, latent },
    ));
    for config in configs {
        let model = config.init::<Autodiff<B>>(device).unwrap();
        let _alone = one_graph();
        let grads = loss(&model, &rows, device).backward();
        let (path, missing) = (Vec::new(), Vec::new());
        let mut gradients = Gradients {
            grads: &grads,
            path,
            seen: 0,
            missing,
        };
        model.visit(&mut gradients);
        assert_eq!(gradients.missing, [""; 0], "{config:?}");
        assert_eq!(gradients.seen, model.num_params());
    }
}

backend_tests!(
    every_variant_learns_a_batch_by_heart,
    gradients_reach_every_parameter
);
