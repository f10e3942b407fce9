//! Prompts that are continued together.

use mtla_core::ops::AttentionBackend;

use super::{
    Completion, Engine, Event, EventKind, GenerationConfig, GenerationError, LanguageModel,
    Request, TokenEvent, stream::EventStream, wait,
};

/// A generation under way: every [`advance`](Self::advance) gives each unfinished sample its next token.
///
/// It is an iterator over the same, which waits for each step; see the [module](super) for an example.
/// The tokens of beam search come all at once, when it is over.
#[derive(Debug)]
pub struct Generation<'m, B: AttentionBackend, M: LanguageModel<B>> {
    engine: Engine<B, &'m M>,
    first_prompt: usize,
}

impl<'m, B: AttentionBackend, M: LanguageModel<B>> Generation<'m, B, M> {
    /// Starts to continue `prompts`; nothing is computed yet.
    ///
    /// Take a model without autodiff (`model.valid()` of one in training): generation needs no gradients,
    /// and would only keep what they need.
    ///
    /// # Errors
    /// [`GenerationError`] if the configuration, a prompt or a stop token cannot work.
    pub fn new(
        model: &'m M,
        prompts: &[impl AsRef<[u32]>],
        config: &GenerationConfig,
    ) -> Result<Self, GenerationError> {
        config.validate()?;
        Self::of(model, requests(prompts, config))
    }

    /// As [`new`](Self::new), with requests of any kind.
    ///
    /// # Errors
    /// [`GenerationError`] if one of them cannot work.
    pub fn of(
        model: &'m M,
        requests: impl IntoIterator<Item = Request>,
    ) -> Result<Self, GenerationError> {
        let mut engine = Engine::new(model);
        for request in requests {
            engine.submit(request)?;
        }
        Ok(Self {
            engine,
            first_prompt: 0,
        })
    }

    /// Samples as if the prompts were those from number `first` on of a longer list, so that a list that is
    /// generated in several parts gives what it gives at once.
    #[must_use]
    pub fn with_first_prompt(mut self, first: usize) -> Self {
        self.engine.renumber(first);
        self.first_prompt = first;
        self
    }

    /// Whether every sample has ended.
    pub fn is_done(&self) -> bool {
        self.engine.is_idle()
    }

    /// The next token of every unfinished sample, by prompt, then by sample; nothing when all have ended.
    ///
    /// If this fails, the generation is over.
    ///
    /// # Errors
    /// [`GenerationError`] if the device fails, the logits are no distribution, or every token is forbidden.
    pub async fn advance(&mut self) -> Result<Vec<TokenEvent>, GenerationError> {
        let mut tokens = Vec::new();
        for event in self.engine.advance().await? {
            match event.kind {
                EventKind::Token(mut token) => {
                    token.prompt -= self.first_prompt;
                    tokens.push(token);
                }
                EventKind::Finished(_) => {}
                EventKind::Failed(error) => {
                    self.engine.clear();
                    return Err(error);
                }
            }
        }
        Ok(tokens)
    }

    /// The same as a stream.
    pub fn into_stream(self) -> EventStream<'m, B, M> {
        EventStream::new(self)
    }
}

impl<B: AttentionBackend, M: LanguageModel<B>> Iterator for Generation<'_, B, M> {
    type Item = Result<Vec<TokenEvent>, GenerationError>;

    fn next(&mut self) -> Option<Self::Item> {
        (!self.is_done()).then(|| wait(self.advance()))
    }
}

/// Continues every prompt [`num_return_sequences`](GenerationConfig::num_return_sequences) times; the
/// completions come by prompt, then by sample.
///
/// # Errors
/// [`GenerationError`] if the configuration or a prompt cannot work, or the device fails.
pub async fn generate_async<B: AttentionBackend, M: LanguageModel<B>>(
    model: &M,
    prompts: &[impl AsRef<[u32]>],
    config: &GenerationConfig,
) -> Result<Vec<Completion>, GenerationError> {
    config.validate()?;
    complete(model, requests(prompts, config)).await
}

/// As [`generate_async`], and waits for the result.
///
/// # Errors
/// As [`generate_async`], and [`GenerationError::OnlyAsync`] for a GPU in a browser.
pub fn generate<B: AttentionBackend, M: LanguageModel<B>>(
    model: &M,
    prompts: &[impl AsRef<[u32]>],
    config: &GenerationConfig,
) -> Result<Vec<Completion>, GenerationError> {
    wait(generate_async(model, prompts, config))
}

/// Continues requests of any kind; the completions come by request, then by sample.
///
/// # Errors
/// [`GenerationError`] if one of them cannot work, or the device fails.
pub async fn complete<B: AttentionBackend, M: LanguageModel<B>>(
    model: &M,
    requests: impl IntoIterator<Item = Request>,
) -> Result<Vec<Completion>, GenerationError> {
    let mut engine = Engine::new(model);
    for request in requests {
        engine.submit(request)?;
    }
    let mut finished = Vec::new();
    while !engine.is_idle() {
        for Event { request, kind } in engine.advance().await? {
            match kind {
                EventKind::Token(_) => {}
                EventKind::Finished(completions) => finished.push((request, completions)),
                EventKind::Failed(error) => return Err(error),
            }
        }
    }
    finished.sort_by_key(|(request, _)| *request);
    Ok(finished.into_iter().flat_map(|x| x.1).collect())
}

fn requests<'a>(
    prompts: &'a [impl AsRef<[u32]>],
    config: &'a GenerationConfig,
) -> impl Iterator<Item = Request> + 'a {
    prompts
        .iter()
        .enumerate()
        .map(|(number, prompt)| Request::new(prompt.as_ref(), config.clone()).with_number(number))
}
