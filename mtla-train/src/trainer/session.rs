//! What a run does in a step and now and then between steps.

use super::checkpoint::{Best, Checkpoints, State};
use super::error::TrainError;
use super::history::{MetricsFile, StepLoss, Window, mean, perplexity, read_metrics};
use super::reporter::Reporter;
use super::run_dir::RunDir;
use super::step::gradients;
use super::workers::Workers;
use super::{MetricLine, TrainMetrics, Trained, Trainer, TrainerConfig, ValidBatches};
use super::{ValidMetrics, Validated};
use crate::loss::Objective;
use crate::plot::loss_curve;
use crate::seed::{Stream, derive};
use burn::data::dataloader::DataLoader;
use burn::module::AutodiffModule;
use burn::optim::adaptor::OptimizerAdaptor;
use burn::optim::{AdamW, Optimizer};
use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::{DType, Tensor};

/// A run under way.
pub(super) struct Session<'a, B: AutodiffBackend, M: AutodiffModule<B>> {
    pub state: State,
    trainer: Trainer<'a, B, M>,
    total: usize,
    run: RunDir,
    checkpoints: Checkpoints,
    optimizer: OptimizerAdaptor<AdamW, M, B>,
    workers: Workers,
    window: Window<B::InnerBackend>,
    metrics: MetricsFile,
    pub reporter: Reporter,
}

impl<'a, B, M> Session<'a, B, M>
where
    B: AutodiffBackend,
    M: AutodiffModule<B> + Objective<B>,
    M::InnerModule: Objective<B::InnerBackend>,
{
    /// Takes up the newest checkpoint, or starts with `model` as it is.
    pub(super) fn open(
        trainer: Trainer<'a, B, M>,
        run: RunDir,
        model: M,
        total: usize,
    ) -> Result<(Self, M), TrainError> {
        let config = &trainer.config;
        let checkpoints = Checkpoints::open(&run, config.keep_last)?;
        let newest = checkpoints.newest()?;
        let optimizer = config.optimizer.init();
        let (model, optimizer, state) = match &newest {
            Some(path) => Checkpoints::load(path, model, optimizer, &trainer.device)?,
            None => (model, optimizer, State::default()),
        };
        // Burn puts off the first values of a parameter until it is used; this uses all, in order.
        let parameters = model.num_params();
        checkpoints.prune(state.best)?;
        let metrics = MetricsFile::open(run.path("metrics.jsonl"), state.metrics_bytes)?;
        let progress = (state.step, total);
        let mut reporter = Reporter::open(&run, trainer.display, &trainer.interrupter, progress)?;
        let from = newest.map_or("the start".into(), |path| path.display().to_string());
        reporter.note(&format!("training {parameters} parameters from {from}"))?;
        let window = Window::new(state.unlogged.clone());
        let workers = Workers::new(trainer.config.workers).map_err(TrainError::Threads)?;
        let session = Self {
            state,
            trainer,
            total,
            run,
            checkpoints,
            optimizer,
            workers,
            window,
            metrics,
            reporter,
        };
        Ok((session, model))
    }

    pub(super) fn config(&self) -> &TrainerConfig {
        &self.trainer.config
    }

    pub(super) fn device(&self) -> &B::Device {
        &self.trainer.device
    }

    pub(super) fn finished(&self) -> bool {
        self.state.step >= self.total
    }

    /// Whether the validation before the first step is to be made, and was not.
    pub(super) fn starts_with_validation(&self) -> bool {
        self.trainer.validate_first && self.state == State::default()
    }

    pub(super) fn interrupted(&self) -> bool {
        self.trainer.interrupter.should_stop()
    }

    /// Whether what is done every `steps` is done now. Everything is at the end.
    pub(super) fn due(&self, steps: usize) -> bool {
        self.state.step.is_multiple_of(steps) || self.finished()
    }

    fn learning_rate(&self) -> f64 {
        self.config().learning_rate.at(self.state.step, self.total)
    }

    /// One optimizer step on `batches`.
    pub(super) fn step(&mut self, model: M, batches: Vec<M::Batch>) -> Result<M, TrainError> {
        self.state.batch += batches.len();
        self.state.step += 1;
        let step = self.state.step;
        let seed = derive(self.config().seed, Stream::Step, step);
        B::seed(self.device(), seed);
        let config = self.config();
        let (clip, workers) = (config.clip_norm, &self.workers);
        let found = gradients::<B, M>(&model, batches, clip, workers, (step, seed))?;
        self.window.push(step, found.loss, found.norm, found.tokens);
        Ok(self
            .optimizer
            .step(self.learning_rate(), model, found.grads))
    }

    /// Goes on to the next epoch, if this one had all its batches.
    pub(super) fn end_epoch(&mut self, planned: usize) -> Result<(), TrainError> {
        let State { epoch, batch, .. } = self.state;
        if batch != planned {
            return Err(TrainError::DataEnded {
                epoch,
                got: batch,
                planned,
            });
        }
        (self.state.epoch, self.state.batch) = (epoch + 1, 0);
        Ok(())
    }

    /// The steps not logged yet, all of them sound.
    fn unlogged(&mut self) -> Result<Vec<StepLoss>, TrainError> {
        let steps = self.window.read().to_vec();
        for &StepLoss {
            step,
            loss,
            gradient_norm,
            ..
        } in &steps
        {
            self.require_finite(step, "training loss", loss)?;
            self.require_finite(step, "gradient norm", gradient_norm)?;
        }
        Ok(steps)
    }

    fn require_finite(
        &self,
        step: usize,
        quantity: &'static str,
        value: f64,
    ) -> Result<(), TrainError> {
        if value.is_finite() {
            return Ok(());
        }
        let checkpoint = self.checkpoints.newest()?;
        Err(TrainError::NotFinite {
            step,
            quantity,
            value,
            checkpoint,
        })
    }

    /// Writes a line for the steps since the last one.
    pub(super) fn log(&mut self) -> Result<(), TrainError> {
        let steps = self.unlogged()?;
        self.window.clear();
        let loss = mean(steps.iter().map(|s| (s.loss, s.tokens)));
        let line = TrainMetrics {
            step: self.state.step,
            epoch: self.state.epoch + 1,
            loss,
            perplexity: perplexity(loss),
            learning_rate: self.learning_rate(),
            gradient_norm: mean(steps.iter().map(|s| (s.gradient_norm, 1))),
            tokens: steps.iter().map(|s| s.tokens).sum(),
        };
        self.metrics.append(&MetricLine::Train(line))?;
        self.reporter.train(&line)
    }

    /// Computes the loss on the validation data; tells whether it is the best so far.
    pub(super) fn validate<V: Clone + Send + Sync + 'static>(
        &mut self,
        model: &M,
        data: &ValidBatches<B, M, V>,
    ) -> Result<bool, TrainError> {
        self.unlogged()?;
        let (model, step) = (model.valid(), self.state.step);
        let loss = validation_loss(&model, data, self.device());
        self.require_finite(step, "validation loss", loss)?;

        let epoch = self.state.epoch + 1;
        let metrics = ValidMetrics {
            step,
            epoch,
            loss,
            perplexity: perplexity(loss),
        };
        self.metrics.append(&MetricLine::Valid(metrics))?;
        self.reporter.valid(&metrics)?;
        let svg = loss_curve(&read_metrics(&self.run.path("metrics.jsonl"))?)?;
        self.run.write("loss.svg", svg.as_bytes())?;
        let best = self.state.best.is_none_or(|best| loss < best.loss);
        if let Some(work) = &mut self.trainer.after_validation {
            work(Validated {
                model: &model,
                metrics,
                best,
                run: &self.run,
            })
            .map_err(|source| TrainError::AfterValidation { step, source })?;
        }
        if best {
            self.state.best = Some(Best { step, loss });
        }
        Ok(best)
    }

    /// Writes a checkpoint of a sound state.
    pub(super) fn save(&mut self, model: &M) -> Result<(), TrainError> {
        self.state.unlogged = self.unlogged()?;
        self.state.metrics_bytes = self.metrics.sync()?;
        self.checkpoints.save(model, &self.optimizer, &self.state)
    }

    /// Closes a run that is finished or interrupted.
    pub(super) fn end(&mut self, model: M) -> Result<Trained<M>, TrainError> {
        let (step, best, finished) = (self.state.step, self.state.best, self.finished());
        let how = if finished {
            "finished"
        } else {
            "stopped; start again to go on"
        };
        let validation = best.map_or(String::new(), |Best { step, loss }| {
            format!("; best validation loss {loss:.4} at step {step}")
        });
        let total = self.total;
        let text = format!("step {step}/{total}: {how}{validation}");
        self.reporter.close(&text)?;
        Ok(Trained {
            model,
            step,
            finished,
            best,
        })
    }
}

/// Mean loss over the tokens of `data`, read back once.
fn validation_loss<B, M, I>(
    model: &M,
    data: &crate::data::Batches<B, I, M::Batch>,
    device: &B::Device,
) -> f64
where
    B: Backend,
    M: Objective<B>,
    I: Clone + Send + Sync + 'static,
{
    const SEED: u64 = 0;
    let losses: Vec<_> = data
        .epoch(SEED, 0, device)
        .iter()
        .map(|batch| model.loss(batch, None))
        .collect();
    let tokens: Vec<usize> = losses.iter().map(|loss| loss.tokens).collect();
    let means = losses
        .into_iter()
        .map(|loss| loss.mean.cast(DType::F32))
        .collect();
    let means = Tensor::cat(means, 0).into_data();
    mean(means.iter::<f64>().zip(tokens))
}
