//! One call to the model for all rows of an engine.

use burn::tensor::{DType, FloatDType, Int, Shape, Tensor, TensorData, backend::ExecutionError};
use mtla_core::{
    cache::{Cache, Observation},
    ops::AttentionBackend,
};

use super::{Job, Observed};
use crate::generate::{LanguageModel, search::Rows};

/// What the model was asked: of some rows the most probable token, of the others the logits.
#[derive(Debug)]
pub(super) struct Batch<B: AttentionBackend> {
    most_probable: Option<Tensor<B, 2, Int>>,
    logits: Option<Tensor<B, 2>>,
    observations: Vec<(usize, Observation<B>)>,
}

/// What the model says, read back from the device.
#[derive(Debug)]
pub(super) struct Answers {
    most_probable: Vec<u32>,
    logits: Vec<f32>,
    vocab_size: usize,
    observed: Vec<Observed>,
}

impl<B: AttentionBackend> Batch<B> {
    /// Takes the newest tokens of all jobs into the cache: those of the rows that it holds, one each, and
    /// the whole prompts of the jobs that have no rows yet, which are the last ones. `None` without jobs.
    pub(super) fn ask<M: LanguageModel<B>>(
        model: &M,
        cache: &mut Cache<B>,
        jobs: &[Job],
        layers: &[usize],
    ) -> Option<Self> {
        let mut observations = Vec::new();
        let mut observe = |cache: &Cache<B>| {
            let of = |layer: &usize| Some((*layer, cache.layer(*layer).observation()?.clone()));
            observations.extend(layers.iter().filter_map(of));
        };
        let sequences: Vec<&[u32]> = jobs.iter().flat_map(|x| x.search.sequences()).collect();
        let (old, new) = sequences.split_at(cache.rows());
        let mut logits = Vec::with_capacity(2);
        if !old.is_empty() {
            logits.push(step(model, cache, old));
            observe(cache);
        }
        if !new.is_empty() {
            logits.push(prefill(model, cache, new));
            observe(cache);
        }
        if logits.is_empty() {
            return None;
        }
        let logits = match logits.len() {
            1 => logits.pop().expect("one"),
            _ => Tensor::cat(logits, 0),
        };
        Some(Self {
            observations,
            ..Self::split(logits, jobs)
        })
    }

    /// Takes from the logits of all rows what the jobs want.
    fn split(logits: Tensor<B, 2>, jobs: &[Job]) -> Self {
        let mut plain = Vec::new();
        let mut whole = Vec::new();
        let mut row = 0;
        for job in jobs {
            let rows = row..row + job.search.rows();
            row = rows.end;
            let list = if job.search.is_plain() {
                &mut plain
            } else {
                &mut whole
            };
            list.extend(rows.map(|row| row as i64));
        }
        let select = |rows: Vec<i64>| match rows.len() {
            0 => None,
            count if count == row => Some(logits.clone()),
            _ => Some(logits.clone().select(0, ids(rows, &logits.device()))),
        };
        Self {
            most_probable: select(plain).map(|logits| logits.argmax(1)),
            logits: select(whole),
            observations: Vec::new(),
        }
    }

    /// Waits for the model. Everything is read back together, as one tensor.
    pub(super) async fn answers(&self) -> Result<Answers, ExecutionError> {
        // Ids are whole numbers below 2^24 in 32-bit floats, too.
        let most_probable = self.most_probable.clone().map(|ids| flat(ids.float()));
        let mut parts: Vec<_> = most_probable.into_iter().collect();
        parts.extend(self.logits.clone().map(flat));
        for (_, observation) in &self.observations {
            parts.extend(observation.gates.clone().map(flat));
            parts.extend(observation.weights.clone().map(flat));
        }
        let whole = match parts.len() {
            1 => parts.pop().expect("one"),
            _ => Tensor::cat(parts, 0),
        };
        let numbers = whole.into_data_async().await?;
        let mut numbers = numbers.iter::<f32>();
        let mut next = |shape: Option<Shape>| -> Option<TensorData> {
            let shape = shape?;
            let part = numbers.by_ref().take(shape.num_elements());
            Some(TensorData::new(part.collect::<Vec<f32>>(), shape))
        };
        let most_probable = next(self.most_probable.as_ref().map(Tensor::shape));
        let logits = next(self.logits.as_ref().map(Tensor::shape));
        let observed = self.observations.iter();
        let observed = observed.map(|(layer, observation)| Observed {
            layer: *layer,
            gates: next(observation.gates.as_ref().map(Tensor::shape)),
            weights: next(observation.weights.as_ref().map(Tensor::shape)),
        });
        Ok(Answers {
            observed: observed.collect(),
            most_probable: most_probable.map_or_else(Vec::new, |x| x.iter::<u32>().collect()),
            logits: logits.map_or_else(Vec::new, |x| x.iter::<f32>().collect()),
            vocab_size: self.logits.as_ref().map_or(0, |logits| logits.dims()[1]),
        })
    }
}

/// All numbers of a tensor in a row, in 32 bits.
fn flat<B: AttentionBackend, const D: usize>(x: Tensor<B, D>) -> Tensor<B, 1> {
    let count = x.shape().num_elements();
    let x = x.reshape([count]);
    if x.dtype() == DType::F32 {
        x
    } else {
        x.cast(FloatDType::F32)
    }
}

impl Answers {
    /// What layers did meanwhile.
    pub(super) fn take_observed(&mut self) -> Vec<Observed> {
        std::mem::take(&mut self.observed)
    }

    /// Reads them job by job.
    pub(super) fn reader(&self) -> AnswerReader<'_> {
        AnswerReader {
            most_probable: &self.most_probable,
            logits: &self.logits,
            vocab_size: self.vocab_size,
        }
    }
}

/// Answers that have not been read yet.
#[derive(Debug)]
pub(super) struct AnswerReader<'a> {
    most_probable: &'a [u32],
    logits: &'a [f32],
    vocab_size: usize,
}

impl<'a> AnswerReader<'a> {
    /// What is said about the next `rows` rows.
    pub(super) fn next(&mut self, rows: usize, plain: bool) -> Rows<'a> {
        if plain {
            let tokens;
            (tokens, self.most_probable) = self.most_probable.split_at(rows);
            return Rows::MostProbable(tokens);
        }
        let logits;
        (logits, self.logits) = self.logits.split_at(rows * self.vocab_size);
        Rows::Logits {
            logits,
            vocab_size: self.vocab_size,
        }
    }
}

/// Takes the last token of each row into the cache; the logits after them `[rows, vocab_size]`.
fn step<B: AttentionBackend, M: LanguageModel<B>>(
    model: &M,
    cache: &mut Cache<B>,
    sequences: &[&[u32]],
) -> Tensor<B, 2> {
    let rows: Vec<usize> = (0..sequences.len()).collect();
    let plan = cache.step(&rows);
    let last = |tokens: &&[u32]| i64::from(*tokens.last().expect("no prompt is empty"));
    let tokens = ids(sequences.iter().map(last).collect(), &model.device());
    model.step(tokens, &plan, cache)
}

/// Takes prompts into new rows of the cache; the logits after them `[prompts, vocab_size]`.
fn prefill<B: AttentionBackend, M: LanguageModel<B>>(
    model: &M,
    cache: &mut Cache<B>,
    prompts: &[&[u32]],
) -> Tensor<B, 2> {
    let counts: Vec<usize> = prompts.iter().map(|prompt| prompt.len()).collect();
    let rows: Vec<usize> = cache.join(prompts.len()).collect();
    let plan = cache.extend(&rows, &counts);
    let padded = prompts.iter().flat_map(|prompt| {
        let padding = std::iter::repeat_n(0, plan.longest() - prompt.len());
        let tokens = prompt.iter().map(|token| i64::from(*token));
        tokens.chain(padding)
    });
    let tokens = TensorData::new(padded.collect::<Vec<_>>(), [rows.len(), plan.longest()]);
    let tokens = Tensor::from_data(tokens, &model.device());
    model.prefill(tokens, &plan, cache)
}

fn ids<B: AttentionBackend>(numbers: Vec<i64>, device: &B::Device) -> Tensor<B, 1, Int> {
    let count = numbers.len();
    Tensor::from_data(TensorData::new(numbers, [count]), device)
}
