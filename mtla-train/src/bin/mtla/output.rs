//! Requests run to their end, and what is printed of them.

use std::{
    fmt,
    io::{Stdout, Write, stdout},
    time::{Duration, Instant},
};

use burn::tensor::try_read_sync;
use mtla_core::ops::AttentionBackend;
use mtla_models::{
    generate::{
        Completion, Engine, EventKind, FinishReason, GenerationError, LanguageModel, TokenEvent,
    },
    tokenizer::{TextStream, Tokenizer, TokenizerError},
};
use mtla_train::progress::spinner;
use serde_json::json;

/// In which form texts are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// When they are finished.
    Text,
    /// Token by token.
    Stream,
    /// As a line of JSON each.
    Json,
}

pub(crate) struct Output<'a> {
    tokenizer: &'a Tokenizer,
    form: Form,
    headings: bool,
    messages: bool,
    out: Stdout,
    pub(crate) speed: Speed,
}

impl<'a> Output<'a> {
    pub(crate) fn new(tokenizer: &'a Tokenizer, form: Form) -> Self {
        Self {
            tokenizer,
            form,
            headings: false,
            messages: false,
            out: stdout(),
            speed: Speed::default(),
        }
    }

    /// Whether a line before each text says which one it is.
    pub(crate) fn with_headings(mut self, headings: bool) -> Self {
        self.headings = headings;
        self
    }

    /// Whether texts are messages of their own and do not go on in the prompt's text.
    pub(crate) fn with_messages(mut self, messages: bool) -> Self {
        self.messages = messages;
        self
    }

    /// Runs the requests of `prompts`, the first of which has the number `first`, and prints what comes of them.
    pub(crate) fn run<B: AttentionBackend, M: LanguageModel<B>>(
        &mut self,
        engine: &mut Engine<B, M>,
        first: usize,
        prompts: &[Vec<u32>],
    ) -> anyhow::Result<()> {
        let stream = self.form == Form::Stream;
        let mut text = self.text(&prompts[0])?;
        if stream {
            self.heading(first, 0)?;
        }
        let waiting = (!stream).then(|| spinner("generating"));
        let mut completions = Vec::new();
        let mut steps = 0;
        while !engine.is_idle() {
            let start = Instant::now();
            let events = try_read_sync(engine.advance()).unwrap_or(Err(GenerationError::OnlyAsync));
            let time = match steps {
                0 => &mut self.speed.prompt_time,
                _ => &mut self.speed.new_time,
            };
            *time += start.elapsed();
            steps += 1;
            for event in events? {
                match event.kind {
                    EventKind::Token(token) if stream => self.stream(&token, &mut text)?,
                    EventKind::Token(_) => {}
                    EventKind::Finished(finished) => completions.extend(finished),
                    EventKind::Failed(error) => return Err(error.into()),
                }
            }
            if let Some(waiting) = &waiting {
                let last = first + prompts.len() - 1;
                waiting.set_message(format!("prompts {first} to {last}, {steps} tokens each"));
            }
        }
        drop(waiting);
        self.speed.count(prompts, &completions);
        if stream {
            writeln!(self.out, "{}", text.finish()?)?;
            return Ok(());
        }
        completions.sort_by_key(|completion| (completion.prompt, completion.sample));
        for completion in completions {
            let text = self.decode(&completion, &prompts[completion.prompt - first])?;
            if self.form == Form::Json {
                writeln!(self.out, "{}", json_line(&completion, &text)?)?;
            } else {
                self.heading(completion.prompt, completion.sample)?;
                writeln!(self.out, "{text}")?;
            }
        }
        Ok(())
    }

    fn stream(&mut self, token: &TokenEvent, text: &mut TextStream<'_>) -> anyhow::Result<()> {
        if token.finish != Some(FinishReason::Stop) {
            write!(self.out, "{}", text.push(token.token)?)?;
            self.out.flush()?;
        }
        Ok(())
    }

    /// Says which text comes, if there are several.
    fn heading(&mut self, prompt: usize, sequence: usize) -> anyhow::Result<()> {
        if self.headings {
            writeln!(self.out, "── prompt {prompt}, text {sequence}")?;
        }
        Ok(())
    }

    /// The text of a completion, without the token that ends it.
    fn decode(&self, completion: &Completion, prompt: &[u32]) -> Result<String, TokenizerError> {
        let mut tokens = &completion.tokens[..];
        if completion.finish == FinishReason::Stop {
            tokens = &tokens[..tokens.len() - 1];
        }
        let mut stream = self.text(prompt)?;
        let mut text = String::new();
        for token in tokens {
            text += &stream.push(*token)?;
        }
        Ok(text + &stream.finish()?)
    }

    /// The text that comes after `prompt`.
    fn text(&self, prompt: &[u32]) -> Result<TextStream<'a>, TokenizerError> {
        let text = self.tokenizer.stream();
        if self.messages {
            return Ok(text);
        }
        text.after(prompt)
    }
}

fn json_line(completion: &Completion, text: &str) -> serde_json::Result<String> {
    let reason = match completion.finish {
        FinishReason::Stop => "stop",
        FinishReason::StopString => "stop_string",
        FinishReason::Length => "length",
    };
    let mut line = json!({
        "prompt": completion.prompt,
        "sequence": completion.sample,
        "text": text,
        "tokens": completion.tokens,
        "reason": reason,
    });
    if let Some(score) = completion.score {
        line["score"] = score.into();
    }
    if let Some(log_probabilities) = &completion.log_probabilities {
        line["log_probabilities"] = serde_json::to_value(log_probabilities)?;
    }
    serde_json::to_string(&line)
}

/// How many tokens there were, and how long they took.
#[derive(Debug, Default)]
pub(crate) struct Speed {
    prompt_tokens: usize,
    prompt_time: Duration,
    new_tokens: usize,
    new_time: Duration,
}

impl Speed {
    /// The first new token of each text comes with the prompt.
    fn count(&mut self, prompts: &[Vec<u32>], completions: &[Completion]) {
        self.prompt_tokens += prompts.iter().map(Vec::len).sum::<usize>();
        let new = |completion: &Completion| completion.tokens.len().saturating_sub(1);
        self.new_tokens += completions.iter().map(new).sum::<usize>();
    }
}

impl fmt::Display for Speed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rate = |tokens: usize, time: Duration| {
            if tokens == 0 {
                "0".into()
            } else {
                format!("{:.1}", tokens as f64 / time.as_secs_f64())
            }
        };
        write!(
            f,
            "prompt {} tokens, {} tokens/s; decoding {} tokens, {} tokens/s",
            self.prompt_tokens,
            rate(self.prompt_tokens, self.prompt_time),
            self.new_tokens,
            rate(self.new_tokens, self.new_time)
        )
    }
}
