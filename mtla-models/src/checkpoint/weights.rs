//! The weights of a directory: every file mapped into memory, every header checked, nothing converted yet.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, btree_map::Entry},
    io::ErrorKind,
    path::{Path, PathBuf},
};

use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};

use super::{
    CheckpointError, Names,
    files::{open, read_json},
    index::{INDEX, Index, SINGLE, check_shard_name},
};

/// The length of the header's length.
const LENGTH: usize = 8;

/// All weights of a checkpoint by name.
#[derive(Debug)]
pub(crate) struct Weights {
    directory: PathBuf,
    shards: Vec<Shard>,
    places: BTreeMap<String, Place>,
}

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    map: Mmap,
}

#[derive(Debug)]
struct Place {
    shard: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    start: usize,
    end: usize,
}

/// A weight in a file.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Weight<'a> {
    pub(crate) path: &'a Path,
    pub(crate) dtype: Dtype,
    pub(crate) shape: &'a [usize],
    pub(crate) bytes: &'a [u8],
}

impl Weights {
    /// Opens all files of weights in a directory.
    ///
    /// Another process must not shorten the files while they are open.
    pub(crate) fn open(directory: &Path) -> Result<Self, CheckpointError> {
        let mut weights = Self {
            directory: directory.into(),
            shards: Vec::new(),
            places: BTreeMap::new(),
        };
        let single = directory.join(SINGLE);
        if single.exists() {
            weights.add(&single)?;
            return Ok(weights);
        }
        let path = directory.join(INDEX);
        if !path.exists() {
            return Err(CheckpointError::NoWeights {
                directory: directory.into(),
            });
        }
        weights.add_shards(&path)?;
        Ok(weights)
    }

    fn add_shards(&mut self, path: &Path) -> Result<(), CheckpointError> {
        let index: Index = read_json(path)?;
        let names: BTreeSet<&String> = index.weight_map.values().collect();
        let mut numbers = HashMap::new();
        for name in names {
            check_shard_name(path, name)?;
            let shard = self.directory.join(name);
            numbers.insert(name.as_str(), self.shards.len());
            self.add(&shard).map_err(|error| match error {
                CheckpointError::Io { source, .. } if source.kind() == ErrorKind::NotFound => {
                    CheckpointError::MissingShard {
                        path: shard.clone(),
                        index: path.into(),
                    }
                }
                other => other,
            })?;
        }
        let mut missing = Names::default();
        for (name, shard) in &index.weight_map {
            let there = self.places.get(name).map(|place| place.shard);
            if there != numbers.get(shard.as_str()).copied() && !missing.add(name.clone()) {
                break;
            }
        }
        if missing.is_empty() {
            return Ok(());
        }
        Err(CheckpointError::Missing {
            directory: self.directory.clone(),
            names: missing,
        })
    }

    /// Maps a file and takes in its header.
    fn add(&mut self, path: &Path) -> Result<(), CheckpointError> {
        let damaged = |reason: String| CheckpointError::Damaged {
            path: path.into(),
            reason,
        };
        let (file, bytes) = open(path)?;
        if bytes < LENGTH as u64 {
            return Err(damaged(format!("it has only {bytes} bytes")));
        }
        // SAFETY: the map is only read. A process that shortens the file meanwhile ends this one with a bus error,
        // which is why the documentation forbids it; files that are replaced by renaming stay whole.
        let map = unsafe { Mmap::map(&file) }.map_err(CheckpointError::io("map", path))?;
        // Checks that the header fits the file, and that tensors follow each other without holes to its end.
        let (header, metadata) =
            SafeTensors::read_metadata(&map).map_err(|error| damaged(error.to_string()))?;
        let shard = self.shards.len();
        for (name, info) in metadata.tensors() {
            let (start, end) = info.data_offsets;
            let place = Place {
                shard,
                dtype: info.dtype,
                shape: info.shape.clone(),
                start: LENGTH + header + start,
                end: LENGTH + header + end,
            };
            match self.places.entry(name) {
                Entry::Vacant(entry) => {
                    entry.insert(place);
                }
                Entry::Occupied(entry) => {
                    return Err(CheckpointError::Twice {
                        name: entry.key().clone(),
                        first: self.shards[entry.get().shard].path.clone(),
                        second: path.into(),
                    });
                }
            }
        }
        self.shards.push(Shard {
            path: path.into(),
            map,
        });
        Ok(())
    }

    /// The directory.
    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// All names in order.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.places.keys().map(String::as_str)
    }

    /// A weight by its name.
    pub(crate) fn get(&self, name: &str) -> Option<Weight<'_>> {
        let place = self.places.get(name)?;
        let shard = &self.shards[place.shard];
        Some(Weight {
            path: &shard.path,
            dtype: place.dtype,
            shape: &place.shape,
            bytes: &shard.map[place.start..place.end],
        })
    }
}

impl Weight<'_> {
    /// Whether both are the same numbers.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        self.dtype == other.dtype && self.shape == other.shape && self.bytes == other.bytes
    }
}
