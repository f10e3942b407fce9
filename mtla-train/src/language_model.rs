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

#[cfg(test)]
mod tests {
    use burn::module::{Module, Param};
    use burn::tensor::{Int, Tensor};
    use burn_flex::{Flex, FlexDevice};
    use mtla_core::attention::AttentionConfig;
    use mtla_core::cache::{Cache, PrefillPlan, StepPlan};
    use mtla_models::decoder::DecoderConfig;

    use super::*;
    use crate::data::story::Question;
    use crate::data::vocabulary::Vocabulary;

    /// Finds every token as probable as these logits say, whatever comes before.
    #[derive(Module, Debug)]
    struct Fixed<B: Backend> {
        logits: Param<Tensor<B, 1>>,
    }

    impl<B: Backend> Objective<B> for Fixed<B> {
        type Batch = TextBatch<B>;

        fn loss(&self, batch: TextBatch<B>, _seed: Option<u64>) -> Loss<B> {
            let [rows, length] = batch.inputs.dims();
            let logits = self.logits.val().unsqueeze::<3>();
            let logits = logits.repeat(&[rows, length, 1]);
            next_token_loss(logits, batch.targets, &batch.lengths)
        }
    }

    fn perplexity_of(probabilities: &[f32], documents: &[Vec<u32>]) -> f64 {
        let logits: Vec<f32> = probabilities.iter().map(|p| p.ln()).collect();
        let logits = Tensor::<Flex, 1>::from_floats(&logits[..], &FlexDevice);
        let model = Fixed {
            logits: Param::from_tensor(logits),
        };
        let window = Window {
            context: 3,
            rows: 2,
        };
        let mut shares = Vec::new();
        let perplexity = perplexity(&model, documents, window, &FlexDevice, |share| {
            shares.push(share);
        });
        assert!(
            shares.is_sorted() && shares.last() == Some(&1.0),
            "{shares:?}"
        );
        perplexity.unwrap()
    }

    #[test]
    fn perplexity_is_the_mean_over_all_tokens_but_the_first_ones() {
        // Rows of one, two and three predictions, in batches of different sizes.
        let documents = [vec![2, 0, 0, 1, 0, 1], vec![1, 0], vec![0, 2, 0]];
        let uniform = perplexity_of(&[1.0 / 3.0; 3], &documents);
        assert!((uniform - 3.0).abs() < 1e-5, "{uniform}");
        // Five tokens of probability 1/2, two of 1/4, one of 1/4.
        let skewed = perplexity_of(&[0.5, 0.25, 0.25], &documents);
        let expected = 2f64.powf((5.0 + 2.0 * 3.0) / 8.0);
        assert!((skewed - expected).abs() < 1e-5, "{skewed} {expected}");

        let nothing = TokenBlocks::new([[1u32]], 3, Packing::Documents);
        assert!(nothing.is_err());
    }

    /// Says one token after a prompt, then another one again and again.
    struct Says {
        decoder: Decoder<Flex>,
        tokens: [u32; 2],
    }

    impl Says {
        fn only(logits: &Tensor<Flex, 2>, token: u32) -> Tensor<Flex, 2> {
            let [rows, size] = logits.dims();
            let token = Tensor::<Flex, 1, Int>::full([rows], token, &FlexDevice);
            token.one_hot::<2>(size).float()
        }
    }

    impl LanguageModel<Flex> for Says {
        fn vocab_size(&self) -> usize {
            self.decoder.vocab_size()
        }

        fn device(&self) -> FlexDevice {
            FlexDevice
        }

        fn new_cache(&self) -> Cache<Flex> {
            self.decoder.new_cache()
        }

        fn prefill(
            &self,
            tokens: Tensor<Flex, 2, Int>,
            plan: &PrefillPlan<Flex>,
            cache: &mut Cache<Flex>,
        ) -> Tensor<Flex, 2> {
            Self::only(&self.decoder.prefill(tokens, plan, cache), self.tokens[0])
        }

        fn step(
            &self,
            tokens: Tensor<Flex, 1, Int>,
            plan: &StepPlan<Flex>,
            cache: &mut Cache<Flex>,
        ) -> Tensor<Flex, 2> {
            Self::only(&self.decoder.step(tokens, plan, cache), self.tokens[1])
        }
    }

    #[test]
    fn answers_are_what_the_model_says_up_to_the_end_of_the_line() {
        let codec = TextCodec::from(Vocabulary::train(["a b c\n"], 257).unwrap());
        let question = |answer: &str| Question {
            question: "Who?".into(),
            answer: answer.into(),
            key: answer.into(),
            evidence: 2..3,
            hops: 1,
        };
        let story = Story {
            text: "b a".into(),
            questions: vec![question("a"), question("bc")],
        };
        let ask = |first: u32, then: u32| {
            let config = DecoderConfig::new(codec.size(), 1, AttentionConfig::mha(8, 2));
            let model = Says {
                decoder: config.init(&FlexDevice).unwrap(),
                tokens: [first, then],
            };
            let mut shares = Vec::new();
            let stories = [story.clone()];
            let answers = answer(&model, &codec, &stories, 1, |share| shares.push(share));
            assert_eq!(shares, [0.5, 1.0]);
            answers.unwrap()
        };
        let token = |text: &str| codec.encode(text).unwrap()[0];
        let (a, line) = (token("a"), token("\n"));

        for then in [codec.end(), line] {
            let answers = ask(a, then);
            let given: Vec<&str> = answers.iter().map(|answer| answer.given.as_str()).collect();
            assert_eq!(given, ["a", "a"]);
            assert!(answers[0].is_correct() && !answers[1].is_correct());
            assert_eq!(answers[1].expected, "bc");
            // One token a byte: the line's end and the question, and then the first answer and the second question.
            assert_eq!(answers[0].distance, "\nWho?".len());
            assert_eq!(answers[1].distance, "\nWho? a\nWho?".len());
            assert_eq!(answers[0].guess, story.questions[0].guess(&story.prompt(0)));
        }
        // One token for ever: two more than the longest answer has.
        let answers = ask(a, a);
        assert!(
            answers
                .iter()
                .all(|answer| answer.given == "aaaa" && !answer.is_correct())
        );
        // Nothing.
        assert!(
            ask(codec.end(), a)
                .iter()
                .all(|answer| answer.given.is_empty())
        );
    }
}
