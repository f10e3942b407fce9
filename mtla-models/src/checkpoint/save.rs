//! Weights of a module into files.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet, HashMap},
    fs, io,
    path::Path as FilePath,
};

use burn::{
    module::{Module, ModuleVisitor, Param},
    tensor::{DType, Tensor, TensorData, backend::Backend},
};
use safetensors::{Dtype, SafeTensorError, View, serialize_to_file};

use super::{
    CheckpointError, Key, convert,
    files::{replace, write_json},
    index::{INDEX, Index, is_weights, shard_name},
    visit::{Entry, Path, entries},
};

/// How a checkpoint is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SaveOptions {
    /// The type of the numbers in the files; that of the weights unless given.
    pub dtype: Option<DType>,
    /// Most bytes of weights in one file. A weight that is larger has a file of its own.
    pub shard_bytes: u64,
}

impl Default for SaveOptions {
    /// The type of the weights, and files of at most 5 GB, as Python writes them.
    fn default() -> Self {
        Self {
            dtype: None,
            shard_bytes: 5_000_000_000,
        }
    }
}

/// A parameter that is fetched from its device when its turn has come.
struct Pending {
    entry: Entry,
    dtype: Dtype,
    fetch: Box<dyn Fn() -> TensorData>,
}

impl Pending {
    fn bytes(&self) -> usize {
        self.entry.shape.iter().product::<usize>() * (self.dtype.bitsize() / 8)
    }
}

impl View for &Pending {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.entry.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        convert::write((self.fetch)(), self.entry.layout, self.dtype).into()
    }

    fn data_len(&self) -> usize {
        self.bytes()
    }
}

/// Writes the weights of a module into a directory, one file or several with an index, and removes what an earlier
/// checkpoint of another number of files has left. The module has to have the names and shapes of `like`.
pub(crate) fn save<B: Backend, M: Module<B>>(
    module: &M,
    like: &M,
    keys: &[Key],
    directory: &FilePath,
    options: &SaveOptions,
) -> Result<(), CheckpointError> {
    let pending = collect(module, keys, directory, options)?;
    compare(&pending, entries(like, keys)?, directory)?;
    let shards = divide(&pending, options.shard_bytes);
    let mut written = BTreeSet::new();
    let mut weight_map = BTreeMap::new();
    for (number, shard) in shards.iter().enumerate() {
        let name = shard_name(number + 1, shards.len());
        write_shard(&directory.join(&name), shard)?;
        for weight in shard {
            weight_map.insert(weight.entry.name.clone(), name.clone());
        }
        written.insert(name);
    }
    if shards.len() > 1 {
        let total: usize = pending.iter().map(Pending::bytes).sum();
        let index = Index {
            metadata: [("total_size".to_owned(), total.into())]
                .into_iter()
                .collect(),
            weight_map,
        };
        write_json(&directory.join(INDEX), &index)?;
        written.insert(INDEX.into());
    }
    remove_others(directory, &written)
}

fn collect<B: Backend, M: Module<B>>(
    module: &M,
    keys: &[Key],
    directory: &FilePath,
    options: &SaveOptions,
) -> Result<Vec<Pending>, CheckpointError> {
    let mut collector = Collector {
        keys,
        path: Path::default(),
        directory,
        dtype: options.dtype,
        found: Ok(Vec::new()),
    };
    module.visit(&mut collector);
    collector.found
}

/// Fails if the module is not of the shape that the configuration beside it describes.
fn compare(
    pending: &[Pending],
    like: Vec<Entry>,
    directory: &FilePath,
) -> Result<(), CheckpointError> {
    let shapes: HashMap<&str, &Vec<usize>> = pending
        .iter()
        .map(|weight| (weight.entry.name.as_str(), &weight.entry.shape))
        .collect();
    let names: BTreeSet<&str> = like.iter().map(|entry| entry.name.as_str()).collect();
    let directory = directory.to_path_buf();
    let mut unknown = super::Names::default();
    for weight in pending {
        if !names.contains(weight.entry.name.as_str()) && !unknown.add(weight.entry.name.clone()) {
            break;
        }
    }
    if !unknown.is_empty() {
        return Err(CheckpointError::Unknown {
            directory,
            names: unknown,
        });
    }
    let mut missing = super::Names::default();
    for entry in &like {
        match shapes.get(entry.name.as_str()) {
            Some(found) if **found != entry.shape => {
                return Err(CheckpointError::Shape {
                    path: directory,
                    name: entry.name.clone(),
                    expected: entry.shape.clone(),
                    found: (*found).clone(),
                });
            }
            Some(_) => {}
            None if missing.add(entry.name.clone()) => {}
            None => break,
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    Err(CheckpointError::Missing {
        directory,
        names: missing,
    })
}

/// Weights in order, into as few files as the limit allows without splitting one.
fn divide(pending: &[Pending], limit: u64) -> Vec<Vec<&Pending>> {
    let mut shards: Vec<Vec<&Pending>> = vec![Vec::new()];
    let mut held = 0;
    for weight in pending {
        let bytes = weight.bytes() as u64;
        let full = held > 0 && held + bytes > limit;
        if full {
            shards.push(Vec::new());
            held = 0;
        }
        held += bytes;
        if let Some(shard) = shards.last_mut() {
            shard.push(weight);
        }
    }
    shards
}

fn write_shard(path: &FilePath, shard: &[&Pending]) -> Result<(), CheckpointError> {
    // Python refuses files that do not say so.
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let weights = shard
        .iter()
        .map(|weight| (weight.entry.name.as_str(), *weight));
    replace(path, |unfinished| {
        serialize_to_file(weights, Some(metadata), unfinished).map_err(|error| match error {
            SafeTensorError::IoError(error) => error,
            other => io::Error::other(other),
        })
    })
}

fn remove_others(directory: &FilePath, written: &BTreeSet<String>) -> Result<(), CheckpointError> {
    let listed = fs::read_dir(directory).map_err(CheckpointError::io("list", directory))?;
    for entry in listed {
        let entry = entry.map_err(CheckpointError::io("list", directory))?;
        let name = entry.file_name();
        let stale = name
            .to_str()
            .is_some_and(|name| is_weights(name) && !written.contains(name));
        if stale {
            let path = entry.path();
            fs::remove_file(&path).map_err(CheckpointError::io("remove", &path))?;
        }
    }
    Ok(())
}

struct Collector<'a> {
    keys: &'a [Key],
    path: Path,
    directory: &'a FilePath,
    dtype: Option<DType>,
    found: Result<Vec<Pending>, CheckpointError>,
}

impl<B: Backend> ModuleVisitor<B> for Collector<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        let Ok(found) = &mut self.found else { return };
        let tensor = param.val();
        let dtype = self.dtype.unwrap_or(tensor.dtype());
        let pending = self
            .path
            .entry(self.keys, &tensor.dims())
            .and_then(|entry| {
                let Some(dtype) = convert::file_type(dtype) else {
                    return Err(CheckpointError::Type {
                        path: self.directory.into(),
                        name: entry.name,
                        found: format!("{dtype:?}"),
                    });
                };
                let fetch = Box::new(move || tensor.clone().into_data());
                Ok(Pending {
                    entry,
                    dtype,
                    fetch,
                })
            });
        match pending {
            Ok(pending) => found.push(pending),
            Err(error) => self.found = Err(error),
        }
    }

    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.enter(name);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.exit();
    }
}
