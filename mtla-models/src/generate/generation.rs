//! A generation under way.

use burn::tensor::{Int, Tensor, TensorData};
use mtla_core::{cache::Cache, ops::AttentionBackend};

use super::{
    GenerationConfig, GenerationError, LanguageModel, SamplingStrategy, sampling::uniform, wait,
};

/// Why a sample ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// Its last token is a stop token.
    Stop,
    /// It has as many tokens as were allowed.
    Length,
}

/// A new token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenEvent {
    /// Number of the prompt, from 0.
    pub prompt: usize,
    /// Number of the sample, from 0.
    pub sample: usize,
    /// The token.
    pub token: u32,
    /// Why the sample ends, if this is its last token.
    pub finish: Option<FinishReason>,
}

/// A generation under way: every [`advance`](Self::advance) gives each unfinished sample its next token.
///
/// It is an iterator over the same, which waits for each step; see the [module](super) for an example.
#[derive(Debug)]
pub struct Generation<'m, B: AttentionBackend, M: LanguageModel<B>> {
    model: &'m M,
    config: GenerationConfig,
    strategy: SamplingStrategy,
    prompts: Vec<Vec<u32>>,
    first_prompt: usize,
    cache: Cache<B>,
    /// Unfinished samples; the i-th is row i of the cache.
    rows: Vec<Row>,
    /// Tokens that every unfinished sample has so far.
    step: usize,
}

#[derive(Debug, Clone, Copy)]
struct Row {
    prompt: usize,
    sample: usize,
    /// The newest token, which is not in the cache yet.
    token: u32,
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
        let prompts: Vec<Vec<u32>> = prompts.iter().map(|x| x.as_ref().to_vec()).collect();
        check_tokens(&prompts, &config.stop_tokens, model.vocab_size())?;
        let rows = (0..prompts.len())
            .flat_map(|prompt| {
                (0..config.num_samples).map(move |sample| Row {
                    prompt,
                    sample,
                    token: 0,
                })
            })
            .collect();
        Ok(Self {
            model,
            config: config.clone(),
            strategy: config.strategy(),
            prompts,
            first_prompt: 0,
            cache: model.new_cache(),
            rows,
            step: 0,
        })
    }

    /// Samples as if the prompts were those from number `first` on of a longer list, so that a list that is
    /// generated in several parts gives what it gives at once.
    #[must_use]
    pub fn with_first_prompt(mut self, first: usize) -> Self {
        self.first_prompt = first;
        self
    }

    /// Whether every sample has ended.
    pub fn is_done(&self) -> bool {
        self.rows.is_empty()
    }

    /// The next token of every unfinished sample, by prompt, then by sample; nothing when all have ended.
    ///
    /// If this fails, or its future is dropped before it is ready, the generation is over.
    ///
    /// # Errors
    /// [`GenerationError`] if the device fails or the logits are no distribution.
    pub async fn advance(&mut self) -> Result<Vec<TokenEvent>, GenerationError> {
        if self.is_done() {
            return Ok(Vec::new());
        }
        let rows = std::mem::take(&mut self.rows);
        let logits = if self.step == 0 {
            self.prefill(&rows)
        } else {
            self.decode(&rows)
        };
        let tokens = self.choose(&rows, logits).await?;
        Ok(self.append(rows, &tokens))
    }

    /// Prefills every prompt once; the logits of its samples `[prompts · samples, vocab_size]`.
    fn prefill(&mut self, samples: &[Row]) -> Tensor<B, 2> {
        let device = self.model.device();
        let prompts = std::mem::take(&mut self.prompts);
        let counts: Vec<usize> = prompts.iter().map(Vec::len).collect();
        let rows: Vec<usize> = self.cache.join(prompts.len()).collect();
        let plan = self.cache.extend(&rows, &counts);
        let padded = prompts.iter().flat_map(|prompt| {
            let padding = plan.longest() - prompt.len();
            prompt
                .iter()
                .map(|token| i64::from(*token))
                .chain(std::iter::repeat_n(0, padding))
        });
        let tokens = TensorData::new(padded.collect::<Vec<_>>(), [rows.len(), plan.longest()]);
        let tokens = Tensor::from_data(tokens, &device);
        let logits = self.model.prefill(tokens, &plan, &mut self.cache);
        if self.config.num_samples == 1 {
            return logits;
        }
        let order: Vec<usize> = samples.iter().map(|row| row.prompt).collect();
        self.cache.reorder(&order);
        logits.select(0, ids(order.iter().map(|row| *row as i64), &device))
    }

    /// Takes the newest tokens into the cache; the logits after them `[rows, vocab_size]`.
    fn decode(&mut self, rows: &[Row]) -> Tensor<B, 2> {
        let numbers: Vec<usize> = (0..rows.len()).collect();
        let plan = self.cache.step(&numbers);
        let tokens = rows.iter().map(|row| i64::from(row.token));
        let tokens = ids(tokens, &self.model.device());
        self.model.step(tokens, &plan, &mut self.cache)
    }

    /// A token for every row.
    async fn choose(
        &self,
        rows: &[Row],
        logits: Tensor<B, 2>,
    ) -> Result<Vec<u32>, GenerationError> {
        if self.strategy == SamplingStrategy::Greedy {
            let tokens = logits.argmax(1).into_data_async().await;
            let tokens = tokens.map_err(GenerationError::Device)?;
            return Ok(tokens.iter::<u32>().collect());
        }
        let [_, vocab_size] = logits.dims();
        let logits = logits
            .into_data_async()
            .await
            .map_err(GenerationError::Device)?;
        let logits: Vec<f32> = logits.iter().collect();
        rows.iter()
            .zip(logits.chunks_exact(vocab_size))
            .map(|(row, logits)| {
                let prompt = (self.first_prompt + row.prompt) as u64;
                let step = self.step as u64;
                let draw = uniform(self.config.seed, prompt, row.sample as u64, step);
                let token = self.strategy.choose(logits, draw);
                token.ok_or(GenerationError::NotFinite {
                    prompt: row.prompt,
                    sample: row.sample,
                    step: self.step,
                })
            })
            .collect()
    }

    /// Appends a token to every row, and takes finished rows out of the batch.
    fn append(&mut self, rows: Vec<Row>, tokens: &[u32]) -> Vec<TokenEvent> {
        self.step += 1;
        let mut events = Vec::with_capacity(rows.len());
        let mut unfinished = Vec::with_capacity(rows.len());
        for (number, (row, token)) in rows.iter().zip(tokens.iter().copied()).enumerate() {
            let Row { prompt, sample, .. } = *row;
            let finish = self.finish(token);
            events.push(TokenEvent {
                prompt,
                sample,
                token,
                finish,
            });
            if finish.is_none() {
                unfinished.push(number);
                self.rows.push(Row {
                    prompt,
                    sample,
                    token,
                });
            }
        }
        if unfinished.len() < rows.len() {
            self.cache.reorder(&unfinished);
        }
        events
    }

    fn finish(&self, token: u32) -> Option<FinishReason> {
        if self.config.stop_tokens.contains(&token) {
            return Some(FinishReason::Stop);
        }
        (self.step == self.config.max_new_tokens).then_some(FinishReason::Length)
    }
}

impl<B: AttentionBackend, M: LanguageModel<B>> Iterator for Generation<'_, B, M> {
    type Item = Result<Vec<TokenEvent>, GenerationError>;

    fn next(&mut self) -> Option<Self::Item> {
        (!self.is_done()).then(|| wait(self.advance()))
    }
}

fn ids<B: AttentionBackend>(
    numbers: impl Iterator<Item = i64>,
    device: &B::Device,
) -> Tensor<B, 1, Int> {
    let numbers: Vec<i64> = numbers.collect();
    let count = numbers.len();
    Tensor::from_data(TensorData::new(numbers, [count]), device)
}

fn check_tokens(
    prompts: &[Vec<u32>],
    stop_tokens: &[u32],
    vocab_size: usize,
) -> Result<(), GenerationError> {
    let last = vocab_size.saturating_sub(1);
    let unknown = |token: &u32| *token as usize > last;
    for (prompt, tokens) in prompts.iter().enumerate() {
        if tokens.is_empty() {
            return Err(GenerationError::EmptyPrompt { prompt });
        }
        if let Some(place) = tokens.iter().position(unknown) {
            let token = tokens[place];
            return Err(GenerationError::UnknownToken {
                prompt,
                place,
                token,
                last,
            });
        }
    }
    match stop_tokens.iter().copied().find(|token| unknown(token)) {
        Some(token) => Err(GenerationError::UnknownStopToken { token, last }),
        None => Ok(()),
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn_flex::{Flex, FlexDevice};
    use mtla_core::attention::AttentionConfig;

    use super::*;
    use crate::decoder::{Decoder, DecoderConfig};

    /// Bytes of the slots that are held after each step.
    fn live_bytes(mut generation: Generation<Flex, Decoder<Flex>>) -> Vec<usize> {
        let mut bytes = Vec::new();
        while let Some(events) = generation.next() {
            events.unwrap();
            bytes.push(generation.cache.live_bytes());
        }
        bytes
    }

    #[test]
    fn samples_share_the_prompt_and_finished_rows_give_their_cache_back() {
        let config = DecoderConfig::new(11, 1, AttentionConfig::mtla(8, 2));
        let device = FlexDevice;
        let model: Decoder<Flex> = config.init(&device).unwrap();
        // Rank 16 and rope 2, in 32 bits.
        let slot = 18 * 4;
        let config = GenerationConfig::new(3).with_num_samples(4);
        let generation = Generation::new(&model, &[[1, 2, 3]], &config).unwrap();
        // Two prompt slots for all. Then each sample continues the open one, three of them in a copy, and
        // then each gets a slot of its own. The last token ends the samples.
        assert_eq!(live_bytes(generation), [2 * slot, (1 + 4) * slot, 0]);
    }
}
