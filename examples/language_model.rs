//! Trains a language model with any attention variant, scores it, and lets it write.
//!
//! ```text
//! cargo run --release --example language_model                       # stories, MTLA, a few minutes
//! cargo run --release --example language_model -- --attention mha
//! cargo run --release --example language_model -- --data some/folder --down-rate 3
//! cargo run --release --example language_model -- --init runs/stories-mtla-s2 --data more.txt
//! ```
//!
//! Top to bottom: settings → text → vocabulary → training (resumed if the run directory has begun) →
//! perplexity beside n-gram models, answers by distance → writing.

#[path = "language_model/report.rs"]
mod report;
#[path = "language_model/settings.rs"]
mod settings;
#[path = "language_model/text.rs"]
mod text;

use std::{io::Write, path::Path};

use anyhow::Context;
use burn::module::Module;
use burn_autodiff::Autodiff;
use clap::Parser;
use mtla_core::ops::AttentionBackend;
use mtla_examples::Program;
use mtla_models::{
    decoder::{Decoder, DecoderConfig},
    generate::{Generation, GenerationConfig},
};
use mtla_train::{
    RunDir, Trained, Trainer, best_checkpoint,
    data::{Batches, Packing, TextBatcher, TokenBlocks, vocabulary::Vocabulary},
    load_weights,
};
use report::Report;
use settings::{Arguments, Settings};
use text::Text;

/// Training frees and takes the same large pieces of memory all the time: this allocator keeps them.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let backend = arguments.backend();
    let (settings, init) = arguments.settings()?;
    if arguments.show_settings {
        print!("{}", toml::to_string(&settings)?);
        return Ok(());
    }
    backend.run(LanguageModelRun {
        arguments,
        settings,
        init,
    })
}

/// What has to be done once the backend is known.
struct LanguageModelRun {
    arguments: Arguments,
    settings: Settings,
    init: Option<Init>,
}

/// A run to go on from.
struct Init {
    vocabulary: Vocabulary,
    checkpoint: std::path::PathBuf,
}

impl Program for LanguageModelRun {
    fn run<B: AttentionBackend>(self, device: B::Device) -> anyhow::Result<()> {
        let Self {
            arguments,
            mut settings,
            init,
        } = self;
        let run = arguments.run_directory(&settings);
        println!(
            "backend {}, run directory {}",
            B::name(&device),
            run.display()
        );

        let text = Text::load(&settings.data)?;
        let vocabulary = match &init {
            Some(init) => init.vocabulary.clone(),
            None => text.vocabulary(settings.data.vocabulary)?,
        };
        settings.model.vocab_size = vocabulary.size();
        let tokens = text.encode(&vocabulary);
        Text::describe(&tokens, &vocabulary);

        let model = train::<B>(
            &arguments,
            &settings,
            init,
            &run,
            &vocabulary,
            &tokens,
            &device,
        )?;
        let Some(model) = model else {
            println!("interrupted; run the same command again to go on");
            return Ok(());
        };
        let report = Report::make(&model, &settings, &text, &tokens, &vocabulary, &device)?;
        report.print();
        // Training has ended, so the run directory is free again.
        RunDir::open(&run)?.write("report.json", &serde_json::to_vec_pretty(&report)?)?;
        write(
            &model,
            &vocabulary,
            &text.prompts(&arguments.prompt),
            &arguments.sampling()?,
        )
    }
}

/// Trains until the end of the run and returns the weights with the lowest validation loss; nothing if the
/// run was interrupted.
fn train<B: AttentionBackend>(
    arguments: &Arguments,
    settings: &Settings,
    init: Option<Init>,
    run: &Path,
    vocabulary: &Vocabulary,
    tokens: &mtla_train::data::corpus::Split<Vec<Vec<u32>>>,
    device: &B::Device,
) -> anyhow::Result<Option<Decoder<B>>> {
    let config = settings.model.clone();
    config.validate()?;
    let blocks = |documents: &Vec<Vec<u32>>, packing| {
        TokenBlocks::new(documents, settings.data.context, packing)
    };
    let size = settings.trainer.batch_size;
    let train = blocks(&tokens.train, settings.data.packing())?;
    let train = match settings.data.packing() {
        Packing::Stream => Batches::shuffled(train, TextBatcher, size),
        Packing::Documents => {
            let lengths = train.lengths();
            Batches::bucketed(train, TextBatcher, size, lengths)
        }
    };
    let valid = blocks(&tokens.validation, Packing::Documents)?;
    let valid = Batches::sequential(valid, TextBatcher, size);

    let start = match &init {
        Some(init) => Some(load(&config, &init.checkpoint, device)?),
        None => None,
    };
    let sample = GenerationConfig::new(120)
        .with_temperature(0.8)
        .with_seed(settings.trainer.seed);
    let end = vocabulary.end_of_text();
    let Trained { finished, .. } = Trainer::<Autodiff<B>, Decoder<Autodiff<B>>>::new(
        run,
        settings.trainer.clone(),
        device.clone(),
    )
    .model_config(settings)
    .display(arguments.display())
    .after_validation(|validated| {
        vocabulary.save(validated.run.path("tokenizer.json"))?;
        let sample = sample.clone().with_stop_tokens([end]);
        let written = mtla_models::generate::generate(validated.model, &[[end]], &sample)?;
        let text = vocabulary.decode(&written[0].tokens)?;
        let name = format!("samples/step-{:08}.txt", validated.metrics.step);
        validated.run.write(name, text.as_bytes())?;
        Ok(())
    })
    .fit(
        |device| {
            let fresh = config.init(device).expect("the settings were checked");
            match &start {
                Some(start) => fresh.load_record(start.clone().into_record()),
                None => fresh,
            }
        },
        &train,
        &valid,
    )?;
    if !finished {
        return Ok(None);
    }
    let best = best_checkpoint(run)?.context("a finished run has a validated checkpoint")?;
    Ok(Some(load(&config, &best, device)?))
}

/// A model with the weights of a checkpoint.
fn load<B: AttentionBackend>(
    config: &DecoderConfig,
    checkpoint: &Path,
    device: &B::Device,
) -> anyhow::Result<Decoder<B>> {
    Ok(load_weights::<B, _>(
        checkpoint,
        config.init(device)?,
        device,
    )?)
}

/// Lets the model go on from each prompt, printing as it writes.
fn write<B: AttentionBackend>(
    model: &Decoder<B>,
    vocabulary: &Vocabulary,
    prompts: &[String],
    sampling: &GenerationConfig,
) -> anyhow::Result<()> {
    let end = vocabulary.end_of_text();
    let sampling = sampling.clone().with_stop_tokens([end]);
    for (number, prompt) in prompts.iter().enumerate() {
        println!("\n── written by the model ──────────────────────────");
        print!("{prompt}");
        let tokens = [vec![end], vocabulary.encode(prompt)].concat();
        let sampling = sampling.clone().with_seed(sampling.seed + number as u64);
        let mut written = Vec::new();
        let mut shown = 0;
        for events in Generation::new(model, &[tokens], &sampling)? {
            written.extend(events?.iter().map(|event| event.token));
            let text = vocabulary.decode(&written)?;
            // A character may still be waiting for its last bytes.
            let ready = text.trim_end_matches('\u{fffd}').len();
            print!("{}", text.get(shown..ready).unwrap_or_default());
            shown = shown.max(ready);
            std::io::stdout().flush()?;
        }
        println!();
    }
    Ok(())
}
