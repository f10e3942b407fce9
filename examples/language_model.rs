//! Trains a language model with any attention variant, scores it, and lets it write.
//!
//! ```text
//! cargo run --release --example language_model                       # stories, MTLA, a few minutes
//! cargo run --release --example language_model -- --attention mha
//! cargo run --release --example language_model -- --data some/folder --down-rate 3
//! cargo run --release --example language_model -- --init runs/stories-mtla-s2 --data more.txt
//! cargo run --release --example language_model -- --init some/llama --data more.txt
//! ```
//!
//! Top to bottom: settings → text → vocabulary → training (resumed if the run directory has begun) →
//! perplexity beside n-gram models, answers by distance → writing.

#[path = "language_model/arguments.rs"]
mod arguments;
#[path = "language_model/export.rs"]
mod export;
#[path = "language_model/init.rs"]
mod init;
#[path = "language_model/report.rs"]
mod report;
#[path = "language_model/settings.rs"]
mod settings;
#[cfg(test)]
#[path = "language_model/tests.rs"]
mod tests;
#[path = "language_model/text.rs"]
mod text;

use std::{io::Write, path::Path};

use anyhow::Context;
use arguments::Arguments;
use burn::module::Module;
use burn_autodiff::Autodiff;
use clap::Parser;
use init::{Init, Start};
use mtla_core::ops::AttentionBackend;
use mtla_examples::Program;
use mtla_models::{
    decoder::Decoder,
    generate::{Generation, GenerationConfig},
};
use mtla_train::{
    Display, RunDir, Trained, Trainer, best_checkpoint,
    data::{
        Batches, Block, Packing, TextBatch, TextBatcher, TokenBlocks, codec::TextCodec,
        corpus::Split,
    },
    fine_tune::{FOLDER, LlamaFiles},
    load_weights,
};
use report::Report;
use settings::Settings;
use text::Text;

/// Training frees and takes the same large pieces of memory all the time: this allocator keeps them.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> anyhow::Result<()> {
    run(Arguments::parse())
}

fn run(arguments: Arguments) -> anyhow::Result<()> {
    let sampling = arguments.sampling()?;
    let backend = arguments.backend();
    let (settings, init) = arguments.settings()?;
    if arguments.show_settings {
        print!("{}", toml::to_string(&settings)?);
        return Ok(());
    }
    backend.run(LanguageModelRun {
        arguments,
        settings,
        sampling,
        init,
    })
}

/// What has to be done once the backend is known.
struct LanguageModelRun {
    arguments: Arguments,
    settings: Settings,
    sampling: GenerationConfig,
    init: Option<Init>,
}

impl Program for LanguageModelRun {
    fn run<B: AttentionBackend>(self, device: B::Device) -> anyhow::Result<()> {
        let Self {
            arguments,
            mut settings,
            sampling,
            init,
        } = self;
        let run = arguments.run_directory(&settings);
        println!(
            "backend {}, run directory {}",
            B::name(&device),
            run.display()
        );

        let text = Text::load(&settings.data)?;
        let (codec, start) = if let Some(init) = init {
            let codec = init.codec.clone();
            (codec, Some(init.load(&mut settings, &device)?))
        } else {
            let vocabulary = text.vocabulary(settings.data.vocabulary)?;
            settings.model.vocab_size = vocabulary.size();
            (vocabulary.into(), None)
        };
        let tokens = text.encode(&codec)?;
        Text::describe(&tokens, &codec);

        let training = Training::<B> {
            settings: &settings,
            run: &run,
            display: arguments.display(),
            codec: &codec,
            tokens: &tokens,
            device: &device,
        };
        let Some(model) = training.run(start)? else {
            println!("interrupted; run the same command again to go on");
            return Ok(());
        };
        let report = Report::make(&model, &settings, &text, &tokens, &codec, &device)?;
        report.print();
        // Training has ended, so the run directory is free again.
        RunDir::open(&run)?.write("report.json", &serde_json::to_vec_pretty(&report)?)?;
        if let Some(folder) = &arguments.export {
            export::export(folder, &model, &settings.model, &codec, &report)?;
        }
        write(&model, &codec, &text.prompts(&arguments.prompt), &sampling)
    }
}

/// Batches of text.
type TextBatches<B> = Batches<B, Block, TextBatch<B>>;

/// What is trained with what.
struct Training<'a, B: AttentionBackend> {
    settings: &'a Settings,
    run: &'a Path,
    display: Display,
    codec: &'a TextCodec,
    tokens: &'a Split<Vec<Vec<u32>>>,
    device: &'a B::Device,
}

impl<B: AttentionBackend> Training<'_, B> {
    /// Trains until the end of the run and returns the weights with the lowest validation loss; nothing if the
    /// run was interrupted. If the model is a Llama, these are in the folder `pretrained` too.
    fn run(&self, start: Option<Start<Autodiff<B>>>) -> anyhow::Result<Option<Decoder<B>>> {
        let (config, codec) = (&self.settings.model, self.codec);
        config.validate()?;
        let context = self.settings.data.context;
        let is_tuned = start.is_some();
        let (decoder, llama) = match start {
            Some(start) => (Some(start.decoder), start.llama),
            None => (None, None),
        };
        let llama = llama.or_else(|| LlamaFiles::of_decoder(config, context, codec));

        let (train, valid) = self.batches()?;
        let sample = GenerationConfig::new(120)
            .with_temperature(0.8)
            .with_seed(self.settings.trainer.seed)
            .with_stop_tokens([codec.end()]);
        let Trained { finished, .. } = Trainer::<Autodiff<B>, Decoder<Autodiff<B>>>::new(
            self.run,
            self.settings.trainer.clone(),
            self.device.clone(),
        )
        .model_config(self.settings)
        .display(self.display)
        .validate_first(is_tuned)
        .after_validation(|validated| {
            if let TextCodec::Trained(vocabulary) = codec {
                vocabulary.save(validated.run.path("tokenizer.json"))?;
            }
            if let (true, Some(llama)) = (validated.best, &llama) {
                llama.save(validated.model, &validated.run.path(FOLDER))?;
            }
            let written =
                mtla_models::generate::generate(validated.model, &[[codec.start()]], &sample)?;
            let text = codec.decode(&written[0].tokens)?;
            let name = format!("samples/step-{:08}.txt", validated.metrics.step);
            validated.run.write(name, text.as_bytes())?;
            Ok(())
        })
        .fit(
            |device| {
                let fresh = config.init(device).expect("the settings were checked");
                match decoder {
                    Some(decoder) => fresh.load_record(decoder.into_record()),
                    None => fresh,
                }
            },
            &train,
            &valid,
        )?;
        if !finished {
            return Ok(None);
        }
        self.best(llama.as_ref()).map(Some)
    }

    /// The best weights of a finished run. A Llama's are put in their folder if they are not there.
    fn best(&self, llama: Option<&LlamaFiles>) -> anyhow::Result<Decoder<B>> {
        let best =
            best_checkpoint(self.run)?.context("a finished run has a validated checkpoint")?;
        let fresh = self.settings.model.init(self.device)?;
        let model: Decoder<B> = load_weights(&best, fresh, self.device)?;
        let folder = self.run.join(FOLDER);
        if let (false, Some(llama)) = (folder.join("config.json").exists(), llama) {
            llama.save(&model, &folder)?;
        }
        Ok(model)
    }

    /// Batches to train and to validate on.
    fn batches(&self) -> anyhow::Result<(TextBatches<Autodiff<B>>, TextBatches<B>)> {
        let (data, size) = (&self.settings.data, self.settings.trainer.batch_size);
        let blocks = |documents, packing| TokenBlocks::new(documents, data.context, packing);
        let train = blocks(&self.tokens.train, data.packing())?;
        let train = match data.packing() {
            Packing::Stream => Batches::shuffled(train, TextBatcher, size),
            Packing::Documents => {
                let lengths = train.lengths();
                Batches::bucketed(train, TextBatcher, size, lengths)
            }
        };
        let valid = blocks(&self.tokens.validation, Packing::Documents)?;
        Ok((train, Batches::sequential(valid, TextBatcher, size)))
    }
}

/// Lets the model go on from each prompt, printing as it writes.
fn write<B: AttentionBackend>(
    model: &Decoder<B>,
    codec: &TextCodec,
    prompts: &[String],
    sampling: &GenerationConfig,
) -> anyhow::Result<()> {
    let sampling = sampling.clone().with_stop_tokens([codec.end()]);
    for (number, prompt) in prompts.iter().enumerate() {
        println!("\n── written by the model ──────────────────────────");
        print!("{prompt}");
        let tokens = codec.prompt(prompt)?;
        let sampling = sampling.clone().with_seed(sampling.seed + number as u64);
        let mut written = Vec::new();
        let mut shown = 0;
        for events in Generation::new(model, &[tokens], &sampling)? {
            written.extend(events?.iter().map(|event| event.token));
            let text = codec.decode(&written)?;
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
