//! Weights of a file into a module.

use burn::{
    module::{Module, ModuleMapper, Param},
    tensor::{DType, Tensor, backend::Backend},
};

use super::{
    CheckpointError, Key, Layout, Names, convert,
    keys::matches,
    visit::{Path, entries},
    weights::Weights,
};

/// Replaces all parameters of a module by those of a checkpoint, in the type `dtype`.
///
/// Names and shapes are compared first: a module whose weights are not drawn yet costs nothing before the files
/// are known to fit. `ignored` are forms of names that may be in the files and are not read.
pub(crate) fn load<B: Backend, M: Module<B>>(
    module: M,
    keys: &[Key],
    ignored: &[&str],
    weights: &Weights,
    dtype: DType,
    device: &B::Device,
) -> Result<M, CheckpointError> {
    compare(&module, keys, ignored, weights)?;
    let mut mapper = Mapper::<B> {
        keys,
        path: Path::default(),
        weights,
        dtype,
        device,
        failed: None,
    };
    let module = module.map(&mut mapper);
    match mapper.failed {
        Some(error) => Err(error),
        None => Ok(module),
    }
}

fn compare<B: Backend, M: Module<B>>(
    module: &M,
    keys: &[Key],
    ignored: &[&str],
    weights: &Weights,
) -> Result<(), CheckpointError> {
    let expected = entries(module, keys)?;
    let directory = || weights.directory().to_path_buf();
    let mut names = Names::default();
    for entry in &expected {
        if weights.get(&entry.name).is_none() && !names.add(entry.name.clone()) {
            break;
        }
    }
    if !names.is_empty() {
        return Err(CheckpointError::Missing {
            directory: directory(),
            names,
        });
    }
    let mut known: Vec<&str> = expected.iter().map(|entry| entry.name.as_str()).collect();
    known.sort_unstable();
    for name in weights.names() {
        let fits = known.binary_search(&name).is_ok()
            || ignored.iter().any(|pattern| matches(pattern, name));
        if !fits && !names.add(name.into()) {
            break;
        }
    }
    if !names.is_empty() {
        return Err(CheckpointError::Unknown {
            directory: directory(),
            names,
        });
    }
    for entry in expected {
        let Some(weight) = weights.get(&entry.name) else {
            continue;
        };
        if weight.shape != entry.shape {
            return Err(CheckpointError::Shape {
                path: weight.path.into(),
                name: entry.name,
                expected: entry.shape,
                found: weight.shape.to_vec(),
            });
        }
    }
    Ok(())
}

struct Mapper<'a, B: Backend> {
    keys: &'a [Key],
    path: Path,
    weights: &'a Weights,
    dtype: DType,
    device: &'a B::Device,
    failed: Option<CheckpointError>,
}

impl<B: Backend> Mapper<'_, B> {
    fn tensor<const D: usize>(&self, shape: &[usize]) -> Result<Tensor<B, D>, CheckpointError> {
        let entry = self.path.entry(self.keys, shape)?;
        let Some(weight) = self.weights.get(&entry.name) else {
            return Err(CheckpointError::missing(
                self.weights.directory(),
                entry.name,
            ));
        };
        let Some(data) = convert::read(weight, entry.layout, self.dtype) else {
            return Err(CheckpointError::Type {
                path: weight.path.into(),
                name: entry.name,
                found: format!("{:?}", weight.dtype),
            });
        };
        let tensor = Tensor::<B, D>::from_data(data, (self.device, self.dtype));
        Ok(match entry.layout {
            Layout::Transposed => tensor.swap_dims(0, 1),
            Layout::Same | Layout::Rearranged => tensor,
        })
    }
}

impl<B: Backend> ModuleMapper<B> for Mapper<'_, B> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        if self.failed.is_some() {
            return param;
        }
        match self.tensor(&param.lazy_shape()) {
            Ok(tensor) => Param::initialized(param.id, tensor.require_grad()),
            Err(error) => {
                self.failed = Some(error);
                param
            }
        }
    }

    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.enter(name);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.exit();
    }
}
