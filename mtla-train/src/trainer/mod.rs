//! Training with exact resume.
//!
//! [`Trainer::fit`] is the whole story: open the run directory, take up the newest checkpoint or
//! start fresh, then step by step draw batches, compute gradients, update, and now and then log,
//! validate and save. Burn does the data loading, gradients, optimizer, record files and text
//! interface. The loop is here because of a promise Burn's own does not make: **a run that is
//! killed at any moment and started again ends with the same weights and the same metrics, bit for
//! bit, as one that was not.** Four things keep it:
//!
//! - whatever is random in a step is seeded from the run's seed and the step's number;
//! - the order of the data is a function of the seed and the epoch, and a checkpoint knows the
//!   place in it;
//! - a checkpoint is there whole or not at all ([`checkpoint`]);
//! - `metrics.jsonl` is cut back to what the checkpoint has seen ([`history`]).
//!
//! The promise holds on one machine and a backend that computes the same twice, as the CPU does.

mod checkpoint;
mod config;
mod error;
mod history;
mod record_file;
mod reporter;
mod run_dir;
mod session;
mod signal;
mod step;
mod terminal;
mod workers;

pub use burn_train::Interrupter;
pub use checkpoint::{Best, best_checkpoint, load_weights};
pub use config::{Length, Optimizer, TrainerConfig};
pub use error::TrainError;
pub use history::{MetricLine, TrainMetrics, ValidMetrics, read_metrics};
pub use reporter::Display;
pub use run_dir::RunDir;

use crate::data::Batches;
use crate::loss::Objective;
use crate::measure::environment;
use crate::seed::{Stream, derive};
use burn::data::dataloader::DataLoader;
use burn::module::AutodiffModule;
use burn::tensor::backend::AutodiffBackend;
use burn::tensor::{DType, Element};
use serde::Serialize;
use serde_json::{Value, json};
use session::Session;
use signal::StopOnSignal;
use std::path::PathBuf;

/// What the caller may look at after each validation.
#[derive(Debug)]
pub struct Validated<'a, M> {
    /// The model, without gradients.
    pub model: &'a M,
    /// The step and its validation loss.
    pub metrics: ValidMetrics,
    /// Whether no loss before was as low.
    pub best: bool,
    /// Where samples and the like can be written.
    pub run: &'a RunDir,
}

/// Validation data for the model `M`: its batches are on the backend without gradients.
pub type ValidBatches<B, M, I> =
    Batches<
        <B as AutodiffBackend>::InnerBackend,
        I,
        <<M as AutodiffModule<B>>::InnerModule as Objective<
            <B as AutodiffBackend>::InnerBackend,
        >>::Batch,
    >;

type HookResult = Result<(), Box<dyn std::error::Error + Send + Sync>>;
type Hook<'a, M> = dyn FnMut(Validated<'_, M>) -> HookResult + 'a;

/// How a call of [`Trainer::fit`] ended.
#[derive(Debug)]
pub struct Trained<M> {
    /// The model after the last step.
    pub model: M,
    /// Optimizer steps made in all.
    pub step: usize,
    /// Whether that is all of them; if not, the run was interrupted and can be resumed.
    pub finished: bool,
    /// The best validation; [`best_checkpoint`] has its weights.
    pub best: Option<Best>,
}

/// Trains a model in a run directory.
///
/// ```
/// use burn::{module::Module, nn, tensor::backend::Backend};
/// use mtla_train::data::{Batches, Packing, TextBatch, TextBatcher, TokenBlocks};
/// use mtla_train::{Display, Length, Loss, Objective, Trainer, TrainerConfig, next_token_loss};
///
/// #[derive(Module, Debug)]
/// struct Bigram<B: Backend> {
///     table: nn::Embedding<B>,
/// }
///
/// impl<B: Backend> Objective<B> for Bigram<B> {
///     type Batch = TextBatch<B>;
///     fn loss(&self, batch: TextBatch<B>, _seed: Option<u64>) -> Loss<B> {
///         next_token_loss(self.table.forward(batch.inputs), batch.targets, &batch.lengths)
///     }
/// }
///
/// type B = burn_autodiff::Autodiff<burn_flex::Flex>;
/// let mut config = TrainerConfig { length: Length::Epochs(2), ..Default::default() };
/// config.batch_size = 2;
/// config.learning_rate.warmup = 0;
///
/// let text: Vec<u32> = (0..40).map(|i| i % 4).collect();
/// let blocks = TokenBlocks::new([text], 5, Packing::Stream)?;
/// let train = Batches::shuffled(blocks.clone(), TextBatcher, config.batch_size);
/// let valid = Batches::sequential(blocks, TextBatcher, config.batch_size);
///
/// # let folder = tempfile::tempdir()?;
/// # let folder = folder.path();
/// let trained = Trainer::<B, Bigram<B>>::new(folder.join("run"), config, Default::default())
///     .display(Display::Quiet)
///     .fit(|device| Bigram { table: nn::EmbeddingConfig::new(5, 5).init(device) }, &train, &valid)?;
/// assert!(trained.finished);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Trainer<'a, B: AutodiffBackend, M: AutodiffModule<B>> {
    folder: PathBuf,
    config: TrainerConfig,
    device: B::Device,
    model_config: Value,
    display: Display,
    interrupter: Interrupter,
    validate_first: bool,
    after_validation: Option<Box<Hook<'a, M::InnerModule>>>,
}

impl<'a, B, M> Trainer<'a, B, M>
where
    B: AutodiffBackend,
    M: AutodiffModule<B> + Objective<B>,
    M::InnerModule: Objective<B::InnerBackend>,
{
    /// A trainer for a run in `folder`.
    pub fn new(folder: impl Into<PathBuf>, config: TrainerConfig, device: B::Device) -> Self {
        Self {
            folder: folder.into(),
            config,
            device,
            model_config: Value::Null,
            display: Display::default(),
            interrupter: Interrupter::new(),
            validate_first: false,
            after_validation: None,
        }
    }

    /// The model's settings, and whatever else must not change within a run: they are kept in
    /// `config.json` and compared on resumption.
    ///
    /// # Panics
    ///
    /// If `config` is nothing JSON can hold, such as a map with keys that are not strings.
    pub fn model_config(mut self, config: &impl Serialize) -> Self {
        self.model_config = serde_json::to_value(config).expect("a config that JSON can hold");
        self
    }

    /// How the run is shown.
    pub fn display(mut self, display: Display) -> Self {
        self.display = display;
        self
    }

    /// Validates before the first step too, as step 0: for a model that comes with weights worth a comparison.
    pub fn validate_first(mut self, yes: bool) -> Self {
        self.validate_first = yes;
        self
    }

    /// Calls `work` after each validation, for samples or scores. A run that is killed soon after
    /// calls it once more for the same step.
    pub fn after_validation(
        mut self,
        work: impl FnMut(Validated<'_, M::InnerModule>) -> HookResult + 'a,
    ) -> Self {
        self.after_validation = Some(Box::new(work));
        self
    }

    /// A handle that stops the run after the step under way, with a checkpoint. Ctrl-C and
    /// termination signals do the same, unless the program has a handler of its own.
    pub fn interrupter(&self) -> Interrupter {
        self.interrupter.clone()
    }

    /// Trains the model that `init` makes until the run is finished or interrupted.
    ///
    /// If there is a checkpoint in the run directory, training goes on from there: call it again
    /// with the same arguments after whatever happened. `init` must not use random numbers other
    /// than the backend's.
    ///
    /// # Errors
    ///
    /// Any [`TrainError`]. The newest checkpoint is good after each of them.
    pub fn fit<I, V>(
        self,
        init: impl FnOnce(&B::Device) -> M,
        train: &Batches<B, I, <M as Objective<B>>::Batch>,
        valid: &ValidBatches<B, M, V>,
    ) -> Result<Trained<M>, TrainError>
    where
        I: Clone + Send + Sync + 'static,
        V: Clone + Send + Sync + 'static,
    {
        let total = self.check(train.len(), valid.len())?;
        let run = RunDir::open(&self.folder)?;
        run.claim(&self.description(train.len(), valid.len()))?;
        B::seed(&self.device, derive(self.config.seed, Stream::Init, 0));
        let model = init(&self.device);

        let _signals = StopOnSignal::new(&self.interrupter);
        let (mut session, model) = Session::open(self, run, model, total)?;
        let trained = session
            .train(model, train, valid)
            .and_then(|model| session.end(model));
        trained.inspect_err(|error| session.reporter.abandon(error))
    }

    /// Checks what can be checked before anything is written; gives the number of steps.
    fn check(&self, train: usize, valid: usize) -> Result<usize, TrainError> {
        self.config.validate()?;
        for (split, batches) in [("training", train), ("validation", valid)] {
            if batches == 0 {
                return Err(TrainError::NoBatches { split });
            }
        }
        if B::FloatElem::dtype() == DType::F64 {
            let (field, value) = ("backend", "one of 64-bit floats".into());
            let rule = "one of at most 32 bits, which is what a checkpoint holds";
            return Err(TrainError::Config { field, value, rule });
        }
        self.config.total_steps(train)
    }

    /// `config.json`. What is under `settings` must stay the same for the run to be resumed.
    fn description(&self, train: usize, valid: usize) -> Value {
        let mut trainer = json!(self.config);
        let settings = trainer.as_object_mut().expect("a struct");
        let checkpoints = ["checkpoint_every", "keep_last"].map(|key| settings.remove(key));
        let mut description = environment::<B>(&self.device);
        description["settings"] = json!({
            "trainer": trainer,
            "model": self.model_config,
            "data": { "train_batches": train, "valid_batches": valid },
        });
        description["checkpoints"] =
            json!({ "every": checkpoints[0], "keep_last": checkpoints[1] });
        description
    }
}

impl<B, M> Session<'_, B, M>
where
    B: AutodiffBackend,
    M: AutodiffModule<B> + Objective<B>,
    M::InnerModule: Objective<B::InnerBackend>,
{
    /// The loop: epochs of batches, steps of one or more batches.
    fn train<I, V>(
        &mut self,
        mut model: M,
        train: &Batches<B, I, <M as Objective<B>>::Batch>,
        valid: &ValidBatches<B, M, V>,
    ) -> Result<M, TrainError>
    where
        I: Clone + Send + Sync + 'static,
        V: Clone + Send + Sync + 'static,
    {
        if self.starts_with_validation() {
            self.validate(&model, valid)?;
            self.save(&model)?;
        }
        while !self.finished() {
            let seed = derive(self.config().seed, Stream::Epoch, self.state.epoch);
            let epoch = train.epoch(seed, self.state.batch, self.device());
            let mut batches = epoch.iter();
            loop {
                let group: Vec<_> = batches.by_ref().take(self.config().accumulation).collect();
                if group.is_empty() {
                    break;
                }
                model = self.step(model, group)?;
                let stop = self.interrupted();
                if self.due(self.config().log_every) {
                    self.log()?;
                }
                let best =
                    self.due(self.config().validate_every) && self.validate(&model, valid)?;
                if best || stop || self.due(self.config().checkpoint_every) {
                    self.save(&model)?;
                }
                if stop || self.finished() {
                    return Ok(model);
                }
            }
            self.end_epoch(train.len())?;
        }
        Ok(model)
    }
}
