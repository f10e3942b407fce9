//! Prompts continued.

use std::{num::NonZeroUsize, path::PathBuf, sync::Arc};

use anyhow::ensure;
use clap::Args;
use mtla_core::ops::AttentionBackend;
use mtla_models::{
    generate::{Engine, GenerationConfig, Request},
    tokenizer::{Chat, Message, Tokenizer},
};
use mtla_train::{
    backend::{BackendKind, FloatKind, Program},
    measure::bytes,
    pretrained::Pretrained,
    progress::spinner,
};

use crate::{
    output::{Form, Output},
    sampling::Sampling,
    text,
};

/// Continue prompts: greedy search, sampling or beam search.
///
/// What comes after the prompt goes to standard output; one line about speed and memory, to standard error.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mtla generate models/llama --prompt 'Once upon a time' --stream
  mtla generate models/llama --chat --system 'Be brief.' --prompt 'What is a cache?' --stream
  mtla generate models/llama --prompt-file prompts.txt --json > texts.jsonl
  mtla generate models/llama --prompt 'The sea' --temperature 0.8 --top-p 0.95 --num-return-sequences 3
  mtla generate models/llama --prompt 'The sea' --num-beams 4 --length-penalty 0.8 --stop '.'")]
pub(crate) struct Generate {
    /// A model directory, or hub:owner/name[@revision].
    model: String,
    /// A text to continue; may be given several times.
    #[arg(
        short,
        long,
        value_name = "TEXT",
        required_unless_present = "prompt_file"
    )]
    prompt: Vec<String>,
    /// A file with one text to continue in each line.
    #[arg(long, value_name = "FILE")]
    prompt_file: Option<PathBuf>,
    /// Take prompts for what a user says, in the model's chat template.
    #[arg(long)]
    chat: bool,
    /// What the model is told before the user speaks.
    #[arg(long, value_name = "TEXT", requires = "chat")]
    system: Option<String>,
    /// Print the text as it is made, prompt after prompt.
    #[arg(long, conflicts_with = "json")]
    stream: bool,
    /// Print a line of JSON for each text: text, tokens, reason, score, log-probabilities.
    #[arg(long)]
    json: bool,
    /// With --json, the log-probability of each token, and of the N most probable ones at its place.
    #[arg(long, value_name = "N", num_args = 0..=1, default_missing_value = "0", requires = "json")]
    log_probs: Option<usize>,
    /// Prompts that are computed together.
    #[arg(long, value_name = "N", default_value = "16")]
    batch_size: NonZeroUsize,
    /// Where to compute; the fastest backend that is compiled in, unless given.
    #[arg(long, value_enum)]
    backend: Option<BackendKind>,
    /// The numbers to compute with; those of the backend, unless given.
    #[arg(long, value_enum)]
    dtype: Option<FloatKind>,
    #[command(flatten)]
    sampling: Sampling,
}

impl Generate {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        self.backend.unwrap_or_else(BackendKind::best).run(self)
    }

    /// All texts to continue.
    fn prompts(&self) -> anyhow::Result<Vec<String>> {
        let mut prompts = self.prompt.clone();
        if let Some(path) = &self.prompt_file {
            let text = text::read(path)?;
            prompts.extend(text.lines().map(str::to_owned));
            ensure!(
                !text.is_empty(),
                "{} is empty; write one prompt in each line",
                path.display()
            );
        }
        Ok(prompts)
    }

    /// How they are continued.
    fn config(
        &self,
        model: &Pretrained,
        tokenizer: &Tokenizer,
    ) -> anyhow::Result<GenerationConfig> {
        let mut config = model.generation_config(tokenizer)?;
        self.sampling.change(&mut config, tokenizer)?;
        config.log_probabilities = self.log_probs;
        config.validate()?;
        ensure!(
            !(self.stream && config.num_return_sequences > 1),
            "--stream shows one text a prompt, not {}; leave it out, or add --num-return-sequences 1",
            config.num_return_sequences
        );
        Ok(config)
    }

    fn encode(&self, prompt: &str, tokenizer: &Tokenizer) -> anyhow::Result<Vec<u32>> {
        if !self.chat {
            return Ok(tokenizer.encode(prompt)?);
        }
        let system = self.system.iter().map(Message::system);
        let messages: Vec<Message> = system.chain([Message::user(prompt)]).collect();
        Ok(tokenizer.encode_chat(&Chat::new(&messages).with_generation_prompt())?)
    }
}

impl Program for Generate {
    fn run<B: AttentionBackend>(self, device: B::Device) -> anyhow::Result<()> {
        let prompts = self.prompts()?;
        let model = Pretrained::open(&self.model)?;
        let tokenizer = Arc::new(model.tokenizer()?);
        let config = self.config(&model, &tokenizer)?;
        let prompts: Vec<Vec<u32>> = prompts
            .iter()
            .map(|prompt| self.encode(prompt, &tokenizer))
            .collect::<anyhow::Result<_>>()?;
        let longest = prompts.iter().map(Vec::len).max().unwrap_or_default();
        let context = model.config.max_position_embeddings;
        if longest > context {
            eprintln!("a prompt has {longest} tokens, and the model has learned from {context}");
        }
        let reading = spinner(format!("reading {}", model.directory.display()));
        let llama = model.load::<B>(self.dtype, &device)?;
        reading.finish_and_clear();

        let form = match (self.stream, self.json) {
            (true, _) => Form::Stream,
            (_, true) => Form::Json,
            _ => Form::Text,
        };
        let several = prompts.len() * config.num_return_sequences > 1;
        let mut output = Output::new(&tokenizer, form)
            .with_headings(several)
            .with_messages(self.chat);
        let mut engine = Engine::new(&llama.decoder);
        let together = match form {
            Form::Stream => 1,
            _ => self.batch_size.get(),
        };
        for (number, prompts) in prompts.chunks(together).enumerate() {
            let first = number * together;
            for (number, prompt) in prompts.iter().enumerate() {
                engine.submit(request(prompt, first + number, &config, &tokenizer))?;
            }
            output.run(&mut engine, first, prompts)?;
        }
        let cache = bytes(engine.peak_bytes() as f64);
        eprintln!("{}; cache {cache}", output.speed);
        Ok(())
    }
}

fn request(
    prompt: &[u32],
    number: usize,
    config: &GenerationConfig,
    tokenizer: &Arc<Tokenizer>,
) -> Request {
    let tokenizer = tokenizer.clone();
    Request::new(prompt, config.clone())
        .with_number(number)
        .with_text(move |tokens: &[u32]| Ok(tokenizer.decode(tokens)?))
}
