//! Decoder-only language models: how they are trained, and what is asked of them afterwards.
//!
//! A [`Decoder`] is an [`Objective`] over [`TextBatch`]es, so the [`Trainer`](crate::Trainer) trains it.
//! [`perplexity`] and [`answer`] judge it on held-out text.

use burn::data::dataloader::DataLoader;
use burn::tensor::backend::Backend;
use mtla_core::ops::AttentionBackend;
use mtla_models::decoder::{Decoder, DecoderInput};
use mtla_models::generate::{GenerationConfig, GenerationError, LanguageModel, generate};

use crate::data::codec::TextCodec;
#[cfg(doc)]
use crate::data::story::Question;
use crate::data::story::Story;
use crate::data::vocabulary::VocabularyError;
use crate::data::{Batches, BlockError, Packing, TextBatch, TextBatcher, TokenBlocks};
use crate::loss::{Loss, Objective, next_token_loss};

impl<B: AttentionBackend> Objective<B> for Decoder<B> {
    type Batch = TextBatch<B>;

    fn loss(&self, batch: TextBatch<B>, seed: Option<u64>) -> Loss<B> {
        let input = DecoderInput::new(batch.inputs)
            .with_lengths(batch.lengths.clone())
            .with_dropout_seed(seed);
        next_token_loss(self.forward(input), batch.targets, &batch.lengths)
    }
}

/// Rows of at most `context` predictions, `rows` at a time.
#[derive(Debug, Clone, Copy)]
pub struct Window {
    /// Tokens that a prediction can look back on, at most.
    pub context: usize,
    /// Rows computed together.
    pub rows: usize,
}

/// Perplexity of `documents`: e to the mean negative log-probability of their tokens but the first of each.
/// A document longer than the window's context is cut.
///
/// `seen` is called after every batch with the share that is done.
///
/// # Errors
/// If there is nothing to predict.
pub fn perplexity<B, M>(
    model: &M,
    documents: &[Vec<u32>],
    window: Window,
    device: &B::Device,
    mut seen: impl FnMut(f64),
) -> Result<f64, BlockError>
where
    B: Backend,
    M: Objective<B, Batch = TextBatch<B>>,
{
    let blocks = TokenBlocks::new(documents, window.context, Packing::Documents)?;
    let batches = Batches::<B, _, _>::sequential(blocks, TextBatcher, window.rows);
    let (mut sum, mut tokens) = (0.0, 0);
    for (done, batch) in batches.epoch(0, 0, device).iter().enumerate() {
        let loss = model.loss(batch, None);
        sum += loss.mean.into_data().iter::<f64>().sum::<f64>() * loss.tokens as f64;
        tokens += loss.tokens;
        seen((done + 1) as f64 / batches.len() as f64);
    }
    Ok((sum / tokens as f64).exp())
}

/// How a model answered one question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// What the model wrote, up to the end of the line.
    pub given: String,
    /// What it should have written.
    pub expected: String,
    /// What a reader would have written who names what was named last; see [`Question::guess`].
    pub guess: String,
    /// Tokens between the sentence that settles the answer and the answer.
    pub distance: usize,
    /// Facts that have to be joined.
    pub hops: usize,
}

impl Answer {
    /// Whether the whole sentence is right.
    pub fn is_correct(&self) -> bool {
        self.given == self.expected
    }
}

/// Why questions could not be put to a model.
#[derive(Debug, thiserror::Error)]
pub enum AnswerError {
    /// The model could not go on.
    #[error(transparent)]
    Generation(#[from] GenerationError),
    /// The model's tokens are no text.
    #[error(transparent)]
    Vocabulary(#[from] VocabularyError),
}

/// Puts all questions of `stories` to a model: it reads the story and the questions before with their right
/// answers, and goes on greedily.
///
/// `seen` is called after every batch of `rows` questions with the share that is done.
///
/// # Errors
/// [`AnswerError`], for instance if codec and model do not belong together.
pub fn answer<B: AttentionBackend>(
    model: &impl LanguageModel<B>,
    codec: &TextCodec,
    stories: &[Story],
    rows: usize,
    mut seen: impl FnMut(f64),
) -> Result<Vec<Answer>, AnswerError> {
    let asked: Vec<_> = stories
        .iter()
        .flat_map(|story| (0..story.questions.len()).map(move |i| (story, i)))
        .collect();
    let mut longest = 0;
    for (story, i) in &asked {
        longest = longest.max(codec.encode(&story.questions[*i].answer)?.len());
    }
    let config = GenerationConfig::new(longest + 2).with_stop_tokens([codec.end()]);
    let mut answers = Vec::with_capacity(asked.len());
    for batch in asked.chunks(rows) {
        let prompts: Result<Vec<Vec<u32>>, _> = batch
            .iter()
            .map(|(story, i)| codec.prompt(&story.prompt(*i)))
            .collect();
        for ((story, i), completion) in batch.iter().zip(generate(model, &prompts?, &config)?) {
            let question = &story.questions[*i];
            let text = codec.decode(&completion.tokens)?;
            let line = text.split(['\n', '<']).next().unwrap_or_default();
            let since = &story.prompt(*i)[question.evidence.end..];
            answers.push(Answer {
                given: line.trim().to_owned(),
                expected: question.answer.clone(),
                guess: question.guess(&story.prompt(*i)),
                distance: codec.encode(since)?.len(),
                hops: question.hops,
            });
        }
        seen(answers.len() as f64 / asked.len() as f64);
    }
    Ok(answers)
}
