//! One optimizer step: the gradients of its batches, added, scaled and clipped.

use super::error::TrainError;
use super::workers::Workers;
use crate::loss::{Loss, Objective};
use crate::seed::{Stream, derive};
use burn::module::{AutodiffModule, ModuleVisitor, Param};
use burn::optim::{GradientsAccumulator, GradientsParams};
use burn::tensor::backend::AutodiffBackend;
use burn::tensor::{DType, Tensor};
use std::marker::PhantomData;
use std::sync::{Mutex, PoisonError};

/// The gradients of a step and the numbers about it, still on the device.
pub(super) struct Gradients<B: AutodiffBackend> {
    pub grads: GradientsParams,
    /// Mean loss over all tokens of the step.
    pub loss: Tensor<B::InnerBackend, 1>,
    /// The norm over all gradients before clipping.
    pub norm: Tensor<B::InnerBackend, 1>,
    pub tokens: usize,
}

/// What one batch adds to a step.
struct Part<B: AutodiffBackend> {
    grads: GradientsParams,
    loss: Tensor<B::InnerBackend, 1>,
    tokens: usize,
}

/// Gradients of the mean loss over all tokens of `batches`, clipped to the norm `clip`.
///
/// Batches differ in their numbers of tokens. Each mean is weighted by its tokens in relation to
/// the first batch's, and the sum is divided by the sum of the weights: all numbers stay near 1,
/// whatever the precision.
///
/// Batches are computed by the `workers` and added in their order, so that the result
/// does not depend on how many there are.
///
/// No `backward` runs while another batch's graph grows, here or in another trainer of the process: at its end
/// Burn 0.21 sweeps the graphs of all threads, and of one that is not finished it may take steps that are still
/// needed, whose gradients are then missing without a word (<https://github.com/tracel-ai/burn/issues/5573>).
pub(super) fn gradients<B, M>(
    model: &M,
    batches: Vec<M::Batch>,
    clip: Option<f64>,
    workers: &Workers,
    (step, seed): (usize, u64),
) -> Result<Gradients<B>, TrainError>
where
    B: AutodiffBackend,
    M: AutodiffModule<B> + Objective<B>,
{
    static GRAPHS: Mutex<()> = Mutex::new(());
    // What it guards is whole even after a panic.
    let _graphs = GRAPHS.lock().unwrap_or_else(PoisonError::into_inner);
    let device = model.devices()[0].clone();
    let mut accumulator = GradientsAccumulator::new();
    let mut losses = Vec::new();
    let mut tokens: Vec<usize> = Vec::new();
    let mut numbered = batches.into_iter().enumerate();
    loop {
        let turn: Vec<_> = numbered.by_ref().take(workers.count()).collect();
        if turn.is_empty() {
            break;
        }
        // Each has a graph of its own, or they would wait for each other.
        let turn = turn.into_iter().map(|batch| {
            let model = model.clone();
            let model = if workers.count() > 1 {
                model.fork(&device)
            } else {
                model
            };
            (model, batch)
        });
        let forward = workers.map(turn.collect(), |(model, (index, batch))| {
            let loss = model.loss(batch, Some(derive(seed, Stream::Batch, index)));
            (model, loss)
        });
        for part in workers.map(forward, |(model, loss)| part(&model, loss)) {
            if part.tokens == 0 {
                return Err(TrainError::EmptyBatch { step });
            }
            tokens.push(part.tokens);
            let Part {
                mut grads, loss, ..
            } = part;
            if part.tokens != tokens[0] {
                let weight = loss.ones_like() * (part.tokens as f64 / tokens[0] as f64);
                model.visit(&mut Scale::<B> {
                    grads: &mut grads,
                    scale: weight,
                });
            }
            losses.push(loss * (part.tokens as f64 / tokens[0] as f64));
            accumulator.accumulate(model, grads);
        }
    }
    let mut grads = accumulator.grads();
    let tokens_all: usize = tokens.iter().sum();
    let weight = tokens_all as f64 / tokens[0] as f64;

    let norm = norm::<B, M>(model, &grads) / weight;
    let mut scale = norm.ones_like() / weight;
    if let Some(clip) = clip {
        scale = scale * (norm.clone().recip() * clip).clamp_max(1.0);
    }
    model.visit(&mut Scale::<B> {
        grads: &mut grads,
        scale,
    });
    let loss = Tensor::cat(losses, 0).sum() / weight;
    Ok(Gradients {
        grads,
        loss,
        norm,
        tokens: tokens_all,
    })
}

fn part<B, M>(model: &M, loss: Loss<B>) -> Part<B>
where
    B: AutodiffBackend,
    M: AutodiffModule<B>,
{
    Part {
        tokens: loss.tokens,
        loss: loss.mean.clone().inner().cast(DType::F32),
        grads: GradientsParams::from_grads(loss.mean.backward(), model),
    }
}

/// The Euclidean norm over all gradients, in single precision.
fn norm<B, M>(model: &M, grads: &GradientsParams) -> Tensor<B::InnerBackend, 1>
where
    B: AutodiffBackend,
    M: AutodiffModule<B>,
{
    let mut squares = Squares::<B> {
        grads,
        sums: Vec::new(),
        backend: PhantomData,
    };
    model.visit(&mut squares);
    Tensor::cat(squares.sums, 0).sum().sqrt()
}

struct Squares<'a, B: AutodiffBackend> {
    grads: &'a GradientsParams,
    sums: Vec<Tensor<B::InnerBackend, 1>>,
    backend: PhantomData<B>,
}

impl<B: AutodiffBackend> ModuleVisitor<B> for Squares<'_, B> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        if let Some(grad) = self.grads.get::<B::InnerBackend, D>(param.id) {
            self.sums.push(grad.cast(DType::F32).square().sum());
        }
    }
}

struct Scale<'a, B: AutodiffBackend> {
    grads: &'a mut GradientsParams,
    scale: Tensor<B::InnerBackend, 1>,
}

impl<B: AutodiffBackend> ModuleVisitor<B> for Scale<'_, B> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        if let Some(grad) = self.grads.remove::<B::InnerBackend, D>(param.id) {
            let scale = self.scale.clone().cast(grad.dtype()).unsqueeze();
            self.grads.register(param.id, grad * scale);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Block, TextBatch, TextBatcher};
    use crate::loss::{Loss, next_token_loss};
    use burn::data::dataloader::batcher::Batcher;
    use burn::module::Module;
    use burn::nn::{Embedding, EmbeddingConfig};
    use burn::tensor::backend::Backend;
    use burn_autodiff::Autodiff;
    use burn_flex::{Flex, FlexDevice};

    #[derive(Module, Debug)]
    struct Bigram<B: Backend> {
        table: Embedding<B>,
    }

    impl<B: Backend> Objective<B> for Bigram<B> {
        type Batch = TextBatch<B>;

        fn loss(&self, batch: TextBatch<B>, _: Option<u64>) -> Loss<B> {
            let logits = self.table.forward(batch.inputs);
            next_token_loss(logits, batch.targets, &batch.lengths)
        }
    }

    type B = Autodiff<Flex>;

    const LONG: &[u32] = &[1, 2, 3, 4, 0, 3];
    const SHORT: &[u32] = &[4, 2];

    /// Gradient, loss, norm and tokens of a step on these batches.
    fn step(batches: &[&[&[u32]]], clip: Option<f64>) -> (Vec<f32>, f32, f32, usize) {
        step_with(1, batches, clip)
    }

    fn step_with(
        workers: usize,
        batches: &[&[&[u32]]],
        clip: Option<f64>,
    ) -> (Vec<f32>, f32, f32, usize) {
        let weights: Vec<f32> = (0u8..25).map(|i| f32::from(i * 7 % 11) / 4.0).collect();
        let weights = Tensor::<B, 1>::from_floats(&weights[..], &FlexDevice).reshape([5, 5]);
        let mut model = Bigram {
            table: EmbeddingConfig::new(5, 5).init(&FlexDevice),
        };
        model.table.weight = Param::from_tensor(weights);
        let block = |tokens: &&[u32]| Block {
            tokens: tokens.to_vec(),
        };
        let batch =
            |rows: &&[&[u32]]| TextBatcher.batch(rows.iter().map(block).collect(), &FlexDevice);
        let batches = batches.iter().map(batch).collect();
        let workers = Workers::new(workers).unwrap();
        let found = gradients::<B, _>(&model, batches, clip, &workers, (1, 0)).unwrap();
        let grad = found.grads.get::<Flex, 2>(model.table.weight.id).unwrap();
        let grad = grad.into_data().to_vec().unwrap();
        (
            grad,
            found.loss.into_scalar(),
            found.norm.into_scalar(),
            found.tokens,
        )
    }

    fn length(grad: &[f32]) -> f32 {
        grad.iter().map(|x| x * x).sum::<f32>().sqrt()
    }

    #[test]
    fn batches_add_up_as_if_they_were_one() {
        for clip in [None, Some(0.05)] {
            let (grad, loss, norm, tokens) = step(&[&[SHORT], &[LONG, SHORT]], clip);
            let (whole, whole_loss, whole_norm, whole_tokens) =
                step(&[&[SHORT, LONG, SHORT]], clip);
            assert!(
                grad.iter().zip(&whole).all(|(a, b)| (a - b).abs() < 1e-6),
                "{grad:?} {whole:?}"
            );
            assert!((loss - whole_loss).abs() < 1e-6 && (norm - whole_norm).abs() < 1e-6);
            assert_eq!((tokens, whole_tokens), (7, 7));
        }
    }

    #[test]
    fn how_many_workers_there_are_changes_nothing() {
        let batches: &[&[&[u32]]] = &[&[SHORT], &[LONG, SHORT], &[LONG], &[SHORT, SHORT]];
        let alone = step_with(1, batches, Some(0.05));
        for workers in [2, 3, 4, 9] {
            assert_eq!(step_with(workers, batches, Some(0.05)), alone);
        }
    }

    #[test]
    fn clipping_shortens_long_gradients_and_leaves_short_ones() {
        let (free, _, norm, _) = step(&[&[LONG]], None);
        assert!((length(&free) - norm).abs() < 1e-6);
        let (clipped, _, before, _) = step(&[&[LONG]], Some(f64::from(norm) / 2.0));
        assert!((length(&clipped) - norm / 2.0).abs() < 1e-6);
        assert!((before - norm).abs() < 1e-6, "the norm is told as it was");
        let (same, ..) = step(&[&[LONG]], Some(f64::from(norm) * 2.0));
        assert_eq!(same, free);
    }

    #[test]
    fn a_batch_without_tokens_is_an_error() {
        let model = Bigram::<B> {
            table: EmbeddingConfig::new(5, 5).init(&FlexDevice),
        };
        let batch = TextBatcher.batch(vec![Block { tokens: vec![1, 2] }], &FlexDevice);
        let empty = TextBatch {
            lengths: vec![0],
            ..batch
        };
        let workers = Workers::new(1).unwrap();
        let error = gradients::<B, _>(&model, vec![empty], None, &workers, (9, 0))
            .err()
            .unwrap();
        assert!(error.to_string().contains("no tokens at step 9"), "{error}");
    }
}
