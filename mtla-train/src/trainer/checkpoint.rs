//! Everything a run needs to go on, written so that it is there whole or not at all.
//!
//! A checkpoint is a directory `step-…` with the weights and the optimizer in Burn's own record
//! format and `state.json` with the rest. It is made under a name ending in `.tmp`, forced to the
//! disk and renamed; a process that dies in between leaves a `.tmp` that the next one removes.

use super::error::TrainError;
use super::history::StepLoss;
use super::record_file::{Fingerprint, damaged, read_record, write_record};
use super::run_dir::RunDir;
use crate::disk::{UNFINISHED, finish, sync_folder, write_through};
use burn::module::{AutodiffModule, Module, ModuleVisitor, Param};
use burn::optim::Optimizer;
use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::{Bool, Int, Tensor};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

const FOLDER: &str = "checkpoints";
const PREFIX: &str = "step-";
const MODEL: &str = "model.mpk";
const OPTIMIZER: &str = "optimizer.mpk";
const STATE: &str = "state.json";

/// The best validation of a run.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// The step it was made at.
    pub step: usize,
    /// Its loss, in nats a token.
    pub loss: f64,
}

/// Where a run is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct State {
    /// Optimizer steps made.
    pub step: usize,
    /// Epochs completed.
    pub epoch: usize,
    /// Batches seen of the epoch under way.
    pub batch: usize,
    /// The best validation so far.
    pub best: Option<Best>,
    /// Bytes of `metrics.jsonl` that belong to the steps made.
    pub metrics_bytes: u64,
    /// Steps whose losses are not in `metrics.jsonl` yet.
    pub unlogged: Vec<StepLoss>,
}

/// `state.json`.
#[derive(Serialize, Deserialize)]
struct Manifest {
    state: State,
    parameters: Vec<Parameter>,
    model: Fingerprint,
    optimizer: Fingerprint,
}

/// A parameter's name and shape, by which a checkpoint is compared with a model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Parameter {
    name: String,
    shape: Vec<usize>,
}

/// The checkpoints of a run.
pub(super) struct Checkpoints {
    folder: PathBuf,
    keep_last: usize,
}

impl Checkpoints {
    /// Opens the checkpoints of `run` and removes what is unfinished.
    pub(super) fn open(run: &RunDir, keep_last: usize) -> Result<Self, TrainError> {
        let folder = run.path(FOLDER);
        fs::create_dir_all(&folder).map_err(TrainError::io("create", &folder))?;
        for path in entries(&folder)? {
            if path.extension().is_some_and(|ending| ending == UNFINISHED) {
                remove(&path)?;
            }
        }
        Ok(Self { folder, keep_last })
    }

    /// The newest checkpoint.
    pub(super) fn newest(&self) -> Result<Option<PathBuf>, TrainError> {
        Ok(steps(&self.folder)?.pop().map(|(_, path)| path))
    }

    /// Writes a checkpoint and removes those no longer kept.
    pub(super) fn save<B, M, O>(
        &self,
        model: &M,
        optimizer: &O,
        state: &State,
    ) -> Result<(), TrainError>
    where
        B: AutodiffBackend,
        M: AutodiffModule<B>,
        O: Optimizer<M, B>,
    {
        let path = self.folder.join(format!("{PREFIX}{:08}", state.step));
        let unfinished = path.with_extension(UNFINISHED);
        let write = || {
            fs::create_dir(&unfinished).map_err(TrainError::io("create", &unfinished))?;
            let record = model.clone().into_record();
            let manifest = Manifest {
                state: state.clone(),
                parameters: parameters(model),
                model: write_record::<B, _>(&unfinished.join(MODEL), record)?,
                optimizer: write_record::<B, _>(
                    &unfinished.join(OPTIMIZER),
                    optimizer.to_record(),
                )?,
            };
            let manifest = serde_json::to_vec_pretty(&manifest).expect("plain data");
            let manifest_path = unfinished.join(STATE);
            write_through(&manifest_path, &manifest)
                .map_err(TrainError::io("write", &manifest_path))?;
            sync_folder(&unfinished).map_err(TrainError::io("write", &unfinished))?;
            finish(&unfinished, &path).map_err(TrainError::io("rename a finished folder to", &path))
        };
        write().inspect_err(|_| drop(fs::remove_dir_all(&unfinished)))?;
        self.prune(state.best)
    }

    /// Puts what is in a checkpoint into a model and an optimizer fresh from their configs.
    pub(super) fn load<B, M, O>(
        path: &Path,
        model: M,
        optimizer: O,
        device: &B::Device,
    ) -> Result<(M, O, State), TrainError>
    where
        B: AutodiffBackend,
        M: AutodiffModule<B>,
        O: Optimizer<M, B>,
    {
        let manifest = read_manifest(path)?;
        let model = load_model(path, &manifest, model, device)?;
        let record = read_record::<B, _>(&path.join(OPTIMIZER), manifest.optimizer, device)?;
        Ok((model, optimizer.load_record(record), manifest.state))
    }

    /// Removes all but the newest `keep_last` and the best.
    pub(super) fn prune(&self, best: Option<Best>) -> Result<(), TrainError> {
        let steps = steps(&self.folder)?;
        let old = steps.len().saturating_sub(self.keep_last);
        for (step, path) in &steps[..old] {
            if best.is_none_or(|best| best.step != *step) {
                let unwanted = path.with_extension(UNFINISHED);
                fs::rename(path, &unwanted).map_err(TrainError::io("remove", path))?;
                remove(&unwanted)?;
            }
        }
        Ok(())
    }
}

/// The checkpoint with the lowest validation loss in the run directory `run`, if there is one.
///
/// # Errors
///
/// [`TrainError::Io`] or [`TrainError::Damaged`] if the checkpoints cannot be read.
pub fn best_checkpoint(run: &Path) -> Result<Option<PathBuf>, TrainError> {
    let folder = run.join(FOLDER);
    let Some((_, newest)) = steps(&folder)?.pop() else {
        return Ok(None);
    };
    let best = read_manifest(&newest)?.state.best;
    Ok(best.map(|best| folder.join(format!("{PREFIX}{:08}", best.step))))
}

/// Puts the weights of the checkpoint directory `checkpoint` into `model`, on any backend.
///
/// # Errors
///
/// [`TrainError::OtherModel`] if the parameters have other names or shapes, [`TrainError::Io`] or
/// [`TrainError::Damaged`] if the files cannot be read.
pub fn load_weights<B: Backend, M: Module<B>>(
    checkpoint: &Path,
    model: M,
    device: &B::Device,
) -> Result<M, TrainError> {
    load_model(checkpoint, &read_manifest(checkpoint)?, model, device)
}

fn load_model<B: Backend, M: Module<B>>(
    path: &Path,
    manifest: &Manifest,
    model: M,
    device: &B::Device,
) -> Result<M, TrainError> {
    // Burn would load a tensor of another shape without a word and fail in the first step.
    let differences = compare(&manifest.parameters, &parameters(&model));
    if !differences.is_empty() {
        let differences = differences.join(", ");
        return Err(TrainError::OtherModel {
            path: path.to_path_buf(),
            differences,
        });
    }
    let record = read_record::<B, _>(&path.join(MODEL), manifest.model, device)?;
    Ok(model.load_record(record))
}

fn read_manifest(checkpoint: &Path) -> Result<Manifest, TrainError> {
    let path = checkpoint.join(STATE);
    let text = fs::read(&path).map_err(TrainError::io("read", &path))?;
    serde_json::from_slice(&text).map_err(|error| damaged(&path, error.to_string()))
}

/// The finished checkpoints in `folder` with their steps, oldest first.
fn steps(folder: &Path) -> Result<Vec<(usize, PathBuf)>, TrainError> {
    let step = |path: &PathBuf| {
        path.file_name()?
            .to_str()?
            .strip_prefix(PREFIX)?
            .parse()
            .ok()
    };
    let paths = entries(folder)?;
    let mut steps: Vec<_> = paths
        .into_iter()
        .filter_map(|p| Some((step(&p)?, p)))
        .collect();
    steps.sort_unstable();
    Ok(steps)
}

fn entries(folder: &Path) -> Result<Vec<PathBuf>, TrainError> {
    let list = || {
        fs::read_dir(folder)?
            .map(|entry| Ok(entry?.path()))
            .collect()
    };
    let list: io::Result<_> = list();
    list.map_err(TrainError::io("read", folder))
}

fn remove(path: &Path) -> Result<(), TrainError> {
    fs::remove_dir_all(path).map_err(TrainError::io("remove", path))
}

/// The parameters of a module, by their paths.
fn parameters<B: Backend, M: Module<B>>(module: &M) -> Vec<Parameter> {
    struct Names {
        path: Vec<String>,
        found: Vec<Parameter>,
    }
    impl Names {
        fn add(&mut self, shape: Vec<usize>) {
            self.found.push(Parameter {
                name: self.path.join("."),
                shape,
            });
        }
    }
    impl<B: Backend> ModuleVisitor<B> for Names {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            self.add(param.lazy_shape().to_vec());
        }
        fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<B, D, Int>>) {
            self.add(param.lazy_shape().to_vec());
        }
        fn visit_bool<const D: usize>(&mut self, param: &Param<Tensor<B, D, Bool>>) {
            self.add(param.lazy_shape().to_vec());
        }
        fn enter_module(&mut self, name: &str, _: &str) {
            self.path.push(name.into());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.path.pop();
        }
    }
    let mut names = Names {
        path: Vec::new(),
        found: Vec::new(),
    };
    module.visit(&mut names);
    names.found
}

/// Lists where the parameters of a checkpoint and of a model differ.
fn compare(checkpoint: &[Parameter], model: &[Parameter]) -> Vec<String> {
    let shape = |list: &[Parameter], name: &str| {
        list.iter()
            .find(|p| p.name == name)
            .map_or("absent".into(), |p| format!("{:?}", p.shape))
    };
    let added = model
        .iter()
        .filter(|p| checkpoint.iter().all(|q| q.name != p.name));
    checkpoint
        .iter()
        .chain(added)
        .map(|p| (&p.name, shape(checkpoint, &p.name), shape(model, &p.name)))
        .filter(|(_, there, here)| there != here)
        .map(|(name, there, here)| {
            format!("{name} is {there} in the checkpoint, {here} in the model")
        })
        .collect()
}
