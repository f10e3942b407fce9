//! A Llama from a directory is trained on, and what is saved is the model that was trained.
//!
//! Where `MTLA_PYTHON` names a Python with `torch`, `transformers==4.51.3` and `mtla`, it loads the result too.

use std::{env, fs, path::Path, process::Command};

use burn::{
    module::Module,
    tensor::{Int, Tensor, TensorData, Tolerance},
};
use burn_autodiff::Autodiff;
use burn_flex::{Flex, FlexDevice};
use mtla_models::{
    decoder::{Decoder, DecoderInput},
    llama::{LatentSizes, Llama, LlamaConfig},
    tokenizer::Tokenizer,
};
use mtla_train::{
    Display, Length, MetricLine, Trainer, TrainerConfig, best_checkpoint,
    data::{
        Batches, Packing, TextBatcher, TokenBlocks, codec::TextCodec, story::StoryWorld,
        vocabulary::Vocabulary,
    },
    fine_tune::{LlamaFiles, Source},
    load_weights, read_metrics,
};
use serde_json::json;
use tempfile::tempdir;

const STEPS: usize = 6;

/// Kinds of Llamas: dense with shared keys, MLA, and MTLA with the head that its embedding is.
fn configs(vocab_size: usize) -> Vec<LlamaConfig> {
    let dense = LlamaConfig {
        vocab_size,
        hidden_size: 24,
        intermediate_size: 32,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: Some(2),
        max_position_embeddings: 64,
        ..LlamaConfig::default()
    };
    let sizes = LatentSizes::for_head(6);
    let tied = LlamaConfig {
        tie_word_embeddings: true,
        ..dense.clone()
    };
    vec![
        dense.clone(),
        dense.with_mla(sizes).unwrap(),
        tied.with_mtla(sizes, 2).unwrap(),
    ]
}

fn text() -> String {
    let stories = StoryWorld::new(3).stories().take(30);
    stories.map(|story| story.render() + "\n\n").collect()
}

fn codec() -> TextCodec {
    TextCodec::from(Vocabulary::train([text().as_str()], 300).unwrap())
}

/// A Llama's directory with fresh weights.
fn make(config: LlamaConfig, directory: &Path) {
    Llama::<Flex>::new(config, &FlexDevice)
        .unwrap()
        .save_pretrained(directory)
        .unwrap();
    codec().save_pretrained(directory).unwrap();
}

/// Trains the Llama of `from` on in `run`, and saves the best in `to`; may stop after the first validation.
fn tune(from: &Path, run: &Path, to: &Path, stop: bool) {
    let (config, codec) = LlamaFiles::describe(from).unwrap();
    let (llama, decoder) = LlamaFiles::load::<Autodiff<Flex>>(from, codec, &FlexDevice).unwrap();
    assert_eq!(llama.config.model_type, config.model_type);
    let documents = [llama.codec.document(&text()).unwrap()];
    let blocks = TokenBlocks::new(&documents, 32, Packing::Stream).unwrap();
    let settings = TrainerConfig {
        length: Length::Steps(STEPS),
        batch_size: 4,
        validate_every: 3,
        ..TrainerConfig::default()
    };
    let settings = TrainerConfig {
        learning_rate: mtla_train::Schedule {
            peak: 1e-2,
            warmup: 0,
            ..settings.learning_rate
        },
        ..settings
    };
    let trainer =
        Trainer::<Autodiff<Flex>, Decoder<Autodiff<Flex>>>::new(run, settings, FlexDevice)
            .display(Display::Quiet)
            .validate_first(true);
    let interrupter = trainer.interrupter();
    trainer
        .after_validation(|validated| {
            if stop {
                interrupter.stop(Some("a test"));
            }
            if validated.best {
                llama.save(validated.model, to)?;
            }
            Ok(())
        })
        .fit(
            |_| decoder,
            &Batches::shuffled(blocks.clone(), TextBatcher, 4),
            &Batches::sequential(blocks, TextBatcher, 4),
        )
        .unwrap();
}

fn logits(decoder: &Decoder<Flex>) -> TensorData {
    let ids = TensorData::new((0..24).map(|i| i * 11 % 290).collect::<Vec<i32>>(), [2, 12]);
    let ids = Tensor::<Flex, 2, Int>::from_data(ids, &FlexDevice);
    decoder.forward(DecoderInput::new(ids)).into_data()
}

#[test]
fn what_is_saved_is_what_was_trained() {
    // One after the other: training in several threads of a process is the trainer's own business.
    for config in configs(codec().size()) {
        let folder = tempdir().unwrap();
        let path = |name| folder.path().join(name);
        make(config, &path("llama"));
        tune(&path("llama"), &path("run"), &path("saved"), false);

        let llama = Llama::<Flex>::from_pretrained(path("saved"), &FlexDevice).unwrap();
        let best = best_checkpoint(&path("run")).unwrap().unwrap();
        let fresh = llama.config.decoder().unwrap().init(&FlexDevice).unwrap();
        let trained: Decoder<Flex> = load_weights(&best, fresh, &FlexDevice).unwrap();
        let saved = logits(&llama.decoder);
        // The weights are the same, but lie in another order, and so do the sums.
        saved.assert_approx_eq::<f32>(&logits(&trained), Tolerance::absolute(1e-5));
        let before = Llama::<Flex>::from_pretrained(path("llama"), &FlexDevice).unwrap();
        assert_ne!(saved, logits(&before.decoder), "nothing was learnt");
        assert_eq!(llama.decoder.num_params(), before.decoder.num_params());
        let generation = llama.generation.unwrap();
        assert_eq!(generation["eos_token_id"], json!(codec().end()));
        let tokenizer = Tokenizer::load(path("saved")).unwrap();
        assert_eq!(
            tokenizer.encode("The coin").unwrap(),
            codec().prompt("The coin").unwrap()
        );

        // It is trained on from there, as if it had not been stopped at once.
        for stop in [true, false] {
            tune(&path("saved"), &path("stopped"), &path("again"), stop);
        }
        tune(&path("saved"), &path("through"), &path("other"), false);
        let metrics = |run| read_metrics(&path(run).join("metrics.jsonl")).unwrap();
        assert_eq!(metrics("stopped"), metrics("through"));
        let steps: Vec<usize> = metrics("stopped")
            .iter()
            .filter_map(|line| match line {
                MetricLine::Valid(line) => Some(line.step),
                MetricLine::Train(_) => None,
            })
            .collect();
        assert_eq!(steps, [0, 3, 6]);
        let weights = |name| fs::read(path(name).join("model.safetensors")).unwrap();
        assert_eq!(weights("again"), weights("other"));
        python_agrees(&path("again"));
    }
}

/// Python reads the tokens of a text, and the same logits, from a directory. It has no MLA.
fn python_agrees(directory: &Path) {
    let llama = Llama::<Flex>::from_pretrained(directory, &FlexDevice).unwrap();
    let Some(python) = env::var_os("MTLA_PYTHON") else {
        println!("skipped: MTLA_PYTHON names no Python with torch, transformers and mtla");
        return;
    };
    if llama.config.model_type == mtla_models::llama::ModelType::LlamaMla {
        return;
    }
    let text = "Who has the coin? Größe";
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/python/load.py");
    let output = Command::new(python)
        .args([script.as_ref(), directory.as_os_str(), text.as_ref()])
        .output()
        .expect("MTLA_PYTHON is a program");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    // Packages may have written something before.
    let output = String::from_utf8(output.stdout).unwrap();
    let found: serde_json::Value = serde_json::from_str(output.lines().last().unwrap()).unwrap();

    let ids = codec().prompt(text).unwrap();
    assert_eq!(found["ids"], json!(ids));
    let shape = [1, ids.len()];
    let ids = TensorData::new(ids.iter().map(|id| *id as i32).collect::<Vec<_>>(), shape);
    let ids = Tensor::<Flex, 2, Int>::from_data(ids, &FlexDevice);
    let ours = llama.decoder.forward(DecoderInput::new(ids)).into_data();
    let theirs: Vec<f32> = serde_json::from_value(found["logits"].clone()).unwrap();
    let theirs = TensorData::new(theirs, ours.shape.clone());
    ours.assert_approx_eq::<f32>(&theirs, Tolerance::absolute(1e-4));
}

#[test]
fn the_ends_of_a_text_are_kept_as_they_were() {
    let end = codec().end();
    let several = json!([end, 7]);
    let of_file = json!({ "eos_token_id": several, "temperature": 0.5 });
    // What config.json says, what generation_config.json says, and what generation_config.json says afterwards.
    for (config_end, generation, expected) in [
        (Some(&several), None, None),
        (None, Some(&of_file), Some(of_file.clone())),
        (Some(&json!(end)), Some(&of_file), Some(of_file.clone())),
        (
            None,
            None,
            Some(json!({ "bos_token_id": end, "eos_token_id": end })),
        ),
    ] {
        let folder = tempdir().unwrap();
        let path = |name| folder.path().join(name);
        let mut config = configs(codec().size()).remove(0);
        if let Some(end) = config_end {
            config.other.insert("eos_token_id".into(), end.clone());
        }
        make(config, &path("llama"));
        if let Some(generation) = generation {
            let file = path("llama").join("generation_config.json");
            fs::write(file, generation.to_string()).unwrap();
        }
        let (_, codec) = LlamaFiles::describe(&path("llama")).unwrap();
        let (llama, decoder) =
            LlamaFiles::load::<Flex>(&path("llama"), codec, &FlexDevice).unwrap();
        llama.save(&decoder, &path("saved")).unwrap();
        let saved = Llama::<Flex>::from_pretrained(path("saved"), &FlexDevice).unwrap();
        assert_eq!(
            saved.generation,
            expected.as_ref().map(|x| x.as_object().unwrap().clone())
        );
        let ends = saved.generation_config().unwrap().eos_token_id;
        let is_one = expected.is_some_and(|x| x["eos_token_id"] == json!(end));
        assert_eq!(ends, if is_one { vec![end] } else { vec![end, 7] });
    }
}

#[test]
fn what_cannot_be_trained_on_is_told() {
    let folder = tempdir().unwrap();
    let path = folder.path();
    let told = |config: &str| {
        fs::write(path.join("config.json"), config).unwrap();
        Source::find(path).unwrap_err().to_string()
    };
    let missing = Source::find(path.join("nowhere")).unwrap_err().to_string();
    assert!(missing.contains("nowhere is neither a run directory nor a model's"));
    assert!(told("{").contains("config.json cannot be understood"));
    assert!(told("{}").contains("neither `settings` nor `model_type`"));
    assert!(told(r#"{"model_type": "gpt2"}"#).contains("of the type \"gpt2\""));

    fs::write(path.join("config.json"), r#"{"settings": {}}"#).unwrap();
    assert_eq!(Source::find(path).unwrap(), Source::Run(path.into()));
    make(configs(codec().size()).remove(0), path);
    assert_eq!(Source::find(path).unwrap(), Source::Llama(path.into()));
    assert!(LlamaFiles::describe(path).is_ok());

    // A tokenizer with more tokens than the model, then none.
    make(configs(codec().size() - 1).remove(0), path);
    let error = LlamaFiles::describe(path).unwrap_err().to_string();
    assert!(error.contains("beyond the model's vocabulary"), "{error}");
    fs::remove_file(path.join("tokenizer.json")).unwrap();
    let error = LlamaFiles::describe(path).unwrap_err().to_string();
    assert!(error.contains("tokenizer.json cannot be read"), "{error}");
}

#[test]
fn a_decoder_of_another_form_is_no_llama() {
    let mut config = configs(300)[2].decoder().unwrap();
    let llama = LlamaFiles::of_decoder(&config, 128, &codec()).unwrap();
    assert_eq!(llama.config.decoder().unwrap(), config);
    assert_eq!(llama.config.max_position_embeddings, 128);
    config.norm = mtla_models::decoder::NormKind::LayerNorm;
    assert!(LlamaFiles::of_decoder(&config, 128, &codec()).is_none());
}
