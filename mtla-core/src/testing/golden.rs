//! Recorded cases: a JSON file that says what was run, and a safetensors file beside it with the tensors.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use burn::tensor::{Bool, Tensor, TensorData, backend::Backend};
use safetensors::{Dtype, SafeTensors};

/// The folder of recorded cases: `MTLA_GOLDEN`, or else `fallback`.
pub fn golden_root(fallback: &str) -> PathBuf {
    std::env::var_os("MTLA_GOLDEN").map_or_else(|| PathBuf::from(fallback), PathBuf::from)
}

/// One recorded case.
#[derive(Debug)]
pub struct Golden {
    /// The name of the file, without its ending.
    pub name: String,
    /// What was run.
    pub json: serde_json::Value,
    tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
}

impl Golden {
    /// All cases of a folder that have a JSON and a safetensors file, by name.
    ///
    /// # Panics
    /// If the folder or a file in it cannot be read.
    pub fn load_all(folder: &Path) -> Vec<Self> {
        let entries = std::fs::read_dir(folder)
            .unwrap_or_else(|error| panic!("golden cases in {}: {error}", folder.display()));
        let mut paths: Vec<PathBuf> = entries
            .map(|entry| entry.expect("a readable folder").path())
            .filter(|path| path.extension().is_some_and(|x| x == "json"))
            .filter(|path| path.with_extension("safetensors").exists())
            .collect();
        paths.sort();
        paths.iter().map(|path| Self::load(path)).collect()
    }

    /// The case of a JSON file and of the safetensors file beside it.
    ///
    /// # Panics
    /// If one of them cannot be read.
    pub fn load(path: &Path) -> Self {
        let read = |path: &Path| {
            std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
        };
        let json = serde_json::from_slice(&read(path))
            .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let path = path.with_extension("safetensors");
        let bytes = read(&path);
        let file = SafeTensors::deserialize(&bytes)
            .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let tensors = file
            .tensors()
            .into_iter()
            .map(|(name, view)| {
                let values: Vec<f32> = match view.dtype() {
                    Dtype::F32 => view
                        .data()
                        .chunks_exact(4)
                        .map(|b| f32::from_le_bytes(b.try_into().expect("4 bytes")))
                        .collect(),
                    Dtype::I64 => view
                        .data()
                        .chunks_exact(8)
                        .map(|b| i64::from_le_bytes(b.try_into().expect("8 bytes")) as f32)
                        .collect(),
                    other => panic!("{}: {name} is {other:?}", path.display()),
                };
                (name, (view.shape().to_vec(), values))
            })
            .collect();
        let name = path
            .file_stem()
            .expect("a file")
            .to_string_lossy()
            .into_owned();
        Self {
            name,
            json,
            tensors,
        }
    }

    /// A number of the configuration.
    ///
    /// # Panics
    /// If it is missing.
    pub fn size(&self, field: &str) -> usize {
        self.json["config"][field]
            .as_u64()
            .unwrap_or_else(|| panic!("{}: config.{field}", self.name)) as usize
    }

    /// A switch of the configuration; off if it is missing.
    pub fn flag(&self, field: &str) -> bool {
        self.json["config"][field].as_bool().unwrap_or(false)
    }

    /// Whether there is such a tensor.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Names of all tensors that start with `prefix`.
    pub fn names<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = &'a str> + 'a {
        self.tensors
            .keys()
            .map(String::as_str)
            .filter(move |name| name.starts_with(prefix))
    }

    fn get(&self, name: &str) -> &(Vec<usize>, Vec<f32>) {
        self.tensors
            .get(name)
            .unwrap_or_else(|| panic!("{}: there is no tensor {name}", self.name))
    }

    /// A tensor's values in row-major order.
    ///
    /// # Panics
    /// If it is missing.
    pub fn values(&self, name: &str) -> &[f32] {
        &self.get(name).1
    }

    /// A tensor on a device.
    ///
    /// # Panics
    /// If it is missing or has another rank.
    pub fn tensor<B: Backend, const D: usize>(
        &self,
        name: &str,
        device: &B::Device,
    ) -> Tensor<B, D> {
        let (shape, values) = self.get(name);
        assert_eq!(shape.len(), D, "{}: {name} has shape {shape:?}", self.name);
        Tensor::from_data(TensorData::new(values.clone(), shape.clone()), device)
    }

    /// A mask on a device: true where the recorded number is not 0.
    ///
    /// # Panics
    /// If it is missing or has another rank.
    pub fn mask<B: Backend>(&self, name: &str, device: &B::Device) -> Tensor<B, 2, Bool> {
        self.tensor::<B, 2>(name, device).not_equal_elem(0)
    }

    /// A tensor of whole numbers, row by row.
    ///
    /// # Panics
    /// If it is missing.
    pub fn integers(&self, name: &str) -> Vec<Vec<usize>> {
        let (shape, values) = self.get(name);
        let width = *shape.last().expect("at least one dimension");
        values
            .chunks(width)
            .map(|row| row.iter().map(|x| x.round() as usize).collect())
            .collect()
    }
}

/// Counts comparisons and collects the ones that failed, so that one run shows all of them.
#[derive(Debug, Default)]
pub struct Checks {
    /// Comparisons made.
    pub made: usize,
    /// Descriptions of those that failed.
    pub failed: Vec<String>,
}

impl Checks {
    /// Compares values, each within `absolute + relative · max |expected|`.
    pub fn close(
        &mut self,
        what: &str,
        found: &TensorData,
        expected: &[f32],
        absolute: f64,
        relative: f64,
    ) {
        self.made += 1;
        let found: Vec<f64> = found.iter::<f64>().collect();
        if found.len() != expected.len() {
            let (found, expected) = (found.len(), expected.len());
            self.failed
                .push(format!("{what}: {found} values, expected {expected}"));
            return;
        }
        let largest = expected.iter().fold(0.0, |m, x| f64::from(x.abs()).max(m));
        let bound = absolute + relative * largest;
        let error = found
            .iter()
            .zip(expected)
            .map(|(a, b)| (a - f64::from(*b)).abs())
            .fold(
                0.0,
                |m: f64, x| if x.is_nan() { f64::INFINITY } else { m.max(x) },
            );
        if error > bound {
            self.failed
                .push(format!("{what}: off by {error:.2e}, allowed {bound:.2e}"));
        }
    }

    /// Records a plain condition.
    pub fn holds(&mut self, what: &str, condition: bool) {
        self.made += 1;
        if !condition {
            self.failed.push(what.to_owned());
        }
    }

    /// Fails the test if a comparison failed or none was made.
    ///
    /// # Panics
    /// With the list of failures.
    pub fn finish(self, title: &str) {
        println!("{title}: {} checks", self.made);
        assert!(self.made > 0, "{title}: nothing was checked");
        assert!(
            self.failed.is_empty(),
            "{title}: {} of {} checks failed:\n{}",
            self.failed.len(),
            self.made,
            self.failed.join("\n")
        );
    }
}
