//! Training on a GPU (or on Vulkan for CPUs) is training as on the host: same weights, same text, same losses.

#![cfg(feature = "wgpu")]

use std::path::Path;

use burn::module::Module;
use burn::record::{BinBytesRecorder, FullPrecisionSettings, Recorder};
use burn::tensor::backend::AutodiffBackend;
use burn_autodiff::Autodiff;
use burn_flex::{Flex, FlexDevice};
use burn_wgpu::{Wgpu, WgpuDevice};
use mtla_core::{attention::AttentionConfig, ops::AttentionBackend};
use mtla_models::decoder::{Decoder, DecoderConfig};
use mtla_train::data::{
    Batches, Packing, TextBatcher, TokenBlocks, story::StoryWorld, vocabulary::Vocabulary,
};
use mtla_train::{Display, Length, MetricLine, Trainer, TrainerConfig, read_metrics};

type Bytes = BinBytesRecorder<FullPrecisionSettings>;

const STEPS: usize = 20;

/// Losses of each step, and of the validation at the end.
fn losses<B>(folder: &Path, config: &DecoderConfig, weights: &[u8], device: &B::Device) -> Vec<f64>
where
    B: AutodiffBackend + AttentionBackend,
    B::InnerBackend: AttentionBackend,
{
    let stories: Vec<String> = StoryWorld::new(3)
        .stories()
        .take(60)
        .map(|story| story.render())
        .collect();
    let text = stories.iter().map(String::as_str);
    let vocabulary = Vocabulary::train(text, config.vocab_size).expect("a text to learn from");
    let documents = stories.iter().map(|text| vocabulary.encode_document(text));
    let blocks = TokenBlocks::new(documents, 48, Packing::Documents).expect("some text");
    let train = Batches::shuffled(blocks.clone(), TextBatcher, 4);
    let valid = Batches::sequential(blocks, TextBatcher, 16);
    let mut trainer = TrainerConfig {
        length: Length::Steps(STEPS),
        batch_size: 4,
        log_every: 1,
        validate_every: STEPS,
        ..TrainerConfig::default()
    };
    trainer.learning_rate.peak = 3e-3;
    trainer.learning_rate.warmup = 4;
    let trained = Trainer::<B, Decoder<B>>::new(folder, trainer, device.clone())
        .display(Display::Quiet)
        .fit(
            |device| {
                let record = Bytes::default().load(weights.to_vec(), device);
                let model = config.init(device).expect("a sound configuration");
                model.load_record(record.expect("what was recorded"))
            },
            &train,
            &valid,
        )
        .expect("a run to its end");
    assert!(trained.finished);
    read_metrics(&folder.join("metrics.jsonl"))
        .expect("metrics")
        .iter()
        .map(|line| match line {
            MetricLine::Train(metrics) => metrics.loss,
            MetricLine::Valid(metrics) => metrics.loss,
        })
        .collect()
}

#[test]
fn the_losses_are_those_of_the_host() {
    let attention = AttentionConfig::mtla(32, 4).with_dropout(0.1);
    let config = DecoderConfig::new(300, 2, attention);
    let model = config
        .init::<Flex>(&FlexDevice)
        .expect("a sound configuration");
    let weights = Bytes::default()
        .record(model.into_record(), ())
        .expect("bytes");
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name| folder.path().join(name);

    let host = losses::<Autodiff<Flex>>(&path("flex"), &config, &weights, &FlexDevice);
    let device = WgpuDevice::default();
    let wgpu = losses::<Autodiff<Wgpu>>(&path("wgpu"), &config, &weights, &device);
    println!("{host:.4?}\n{wgpu:.4?}");
    assert_eq!((host.len(), wgpu.len()), (STEPS + 1, STEPS + 1));
    assert!(host[STEPS - 1] < host[0] - 0.5, "nothing was learnt");
    for (step, (a, b)) in host.iter().zip(&wgpu).enumerate() {
        assert!((a - b).abs() < 1e-3, "step {}: {a} and {b}", step + 1);
    }
}
