//! A conversation with a model.

use std::io::{IsTerminal, Write, stderr, stdin, stdout};

use anyhow::Context;
use clap::Args;
use mtla_core::ops::AttentionBackend;
use mtla_models::{
    generate::{FinishReason, Generation, GenerationConfig},
    llama::Llama,
    tokenizer::{Chat, Message, Tokenizer},
};
use mtla_train::pretrained::Pretrained;

#[derive(Debug, Args)]
pub(crate) struct ChatOptions {
    /// Say this alone, and stop after the answer.
    #[arg(long, value_name = "TEXT", conflicts_with = "benchmark")]
    prompt: Option<String>,
    /// What the model is told before the conversation, if it has a chat template.
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Longest answer, in tokens.
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_new_tokens: usize,
    /// Temperature of the answers; 0 for the most probable tokens [the model's own].
    #[arg(long, value_name = "X")]
    temperature: Option<f64>,
    /// Seed of the answers.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
}

impl ChatOptions {
    /// Whether there is something to say.
    pub(crate) fn is_given(&self) -> bool {
        self.prompt.is_some()
    }

    /// Whatever a chat needs besides the weights.
    pub(crate) fn prepare(&self, model: &Pretrained) -> anyhow::Result<Prepared<'_>> {
        let tokenizer = model
            .tokenizer()
            .context("a chat needs the model's tokenizer; --benchmark needs none")?;
        let mut sampling = model.generation_config(&tokenizer)?;
        sampling.max_new_tokens = Some(self.max_new_tokens);
        sampling.num_return_sequences = 1;
        sampling.seed = self.seed;
        if let Some(temperature) = self.temperature {
            sampling = sampling.with_temperature(temperature).with_num_beams(1);
        }
        sampling.validate()?;
        Ok(Prepared {
            options: self,
            tokenizer,
            sampling,
        })
    }
}

/// A chat without the model.
#[derive(Debug)]
pub(crate) struct Prepared<'a> {
    options: &'a ChatOptions,
    tokenizer: Tokenizer,
    sampling: GenerationConfig,
}

impl Prepared<'_> {
    /// Answers the prompt, or each line of standard input until it ends.
    pub(crate) fn run<B: AttentionBackend>(self, llama: &Llama<B>) -> anyhow::Result<()> {
        let mut conversation = Conversation {
            llama,
            tokenizer: &self.tokenizer,
            sampling: self.sampling,
            system: self.options.system.clone(),
            messages: Vec::new(),
        };
        match &self.options.prompt {
            Some(prompt) => conversation.answer(prompt),
            None => talk(&mut conversation),
        }
    }
}

/// Answers each line of standard input.
fn talk<B: AttentionBackend>(conversation: &mut Conversation<'_, B>) -> anyhow::Result<()> {
    let person = stdin().is_terminal();
    if person {
        ctrlc::set_handler(|| {
            println!();
            std::process::exit(0);
        })?;
        let kind = if conversation.tokenizer.has_chat_template() {
            "chat"
        } else {
            "no chat template: the model continues the text"
        };
        eprintln!("{kind}; /reset forgets the conversation, /quit or Ctrl-D ends it");
    }
    loop {
        if person {
            eprint!("> ");
            stderr().flush()?;
        }
        let mut line = String::new();
        if stdin().read_line(&mut line)? == 0 {
            if person {
                eprintln!();
            }
            return Ok(());
        }
        match line.trim() {
            "" => {}
            "/quit" => return Ok(()),
            "/reset" => conversation.messages.clear(),
            message => conversation.answer(message)?,
        }
    }
}

struct Conversation<'m, B: AttentionBackend> {
    llama: &'m Llama<B>,
    tokenizer: &'m Tokenizer,
    sampling: GenerationConfig,
    system: Option<String>,
    messages: Vec<Message>,
}

impl<B: AttentionBackend> Conversation<'_, B> {
    /// Prints what the model says to this message, as it says it.
    fn answer(&mut self, message: &str) -> anyhow::Result<()> {
        self.messages.push(Message::user(message));
        let prompt = self.prompt()?;
        let context = self.llama.config.max_position_embeddings;
        if prompt.len() > context {
            eprintln!(
                "the conversation has {} tokens, and the model has learned from {context}; /reset forgets it",
                prompt.len()
            );
        }
        let mut stream = self.tokenizer.stream();
        if !self.tokenizer.has_chat_template() {
            stream = stream.after(&prompt)?;
        }
        let mut answer = String::new();
        let mut show = |text: String| {
            print!("{text}");
            answer += &text;
            stdout().flush()
        };
        for events in Generation::new(&self.llama.decoder, &[prompt], &self.sampling)? {
            for event in events? {
                if event.finish != Some(FinishReason::Stop) {
                    show(stream.push(event.token)?)?;
                }
            }
        }
        show(stream.finish()?)?;
        println!();
        self.messages.push(Message::assistant(answer));
        Ok(())
    }

    /// All that was said, in the model's template; without one, as one text.
    fn prompt(&self) -> anyhow::Result<Vec<u32>> {
        if self.tokenizer.has_chat_template() {
            let system = self.system.iter().map(Message::system);
            let messages: Vec<Message> = system.chain(self.messages.iter().cloned()).collect();
            let chat = Chat::new(&messages).with_generation_prompt();
            return Ok(self.tokenizer.encode_chat(&chat)?);
        }
        let text = |message: &Message| match message.role.as_str() {
            "assistant" => format!("{}\n", message.content),
            _ => message.content.clone(),
        };
        let text: String = self.messages.iter().map(text).collect();
        Ok(self.tokenizer.encode(&text)?)
    }
}
