//! What can be wrong with a checkpoint, and what to do about it.

use std::{
    fmt, io,
    path::{Path, PathBuf},
};

use crate::error::ConfigError;

/// A checkpoint that cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// A file that the system does not give or take.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// Something other than a file.
    #[error("{} is not a regular file; put the file itself there, or a link to it", path.display())]
    NotAFile {
        /// What it is.
        path: PathBuf,
    },
    /// A text file that is longer than any of its kind.
    #[error("{} has {bytes} bytes, but at most {limit} are read; it is not the file that its name says",
        path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
        /// Its length.
        bytes: u64,
        /// The longest that is read.
        limit: u64,
    },
    /// JSON that cannot be read.
    #[error("{} cannot be understood: {source}; correct the file at this place", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What and where.
        source: serde_json::Error,
    },
    /// A configuration that cannot be.
    #[error("{}: {source}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// The field.
        source: ConfigError,
    },
    /// A directory without weights.
    #[error("{} holds neither model.safetensors nor model.safetensors.index.json; \
        convert other formats with Python's save_pretrained(dir, safe_serialization=True)", directory.display())]
    NoWeights {
        /// The directory.
        directory: PathBuf,
    },
    /// An index that leads out of its directory.
    #[error("{} names the shard {shard:?}, which is not the name of a file beside it; correct the index",
        index.display())]
    ShardName {
        /// The index.
        index: PathBuf,
        /// The name.
        shard: String,
    },
    /// A shard that is not there.
    #[error("{} is missing, but {} names it; copy or download it again", path.display(), index.display())]
    MissingShard {
        /// The shard.
        path: PathBuf,
        /// The index.
        index: PathBuf,
    },
    /// A file of weights that is not whole.
    #[error("{} is not a whole safetensors file: {reason}; copy or download it again", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// One weight in two files.
    #[error("{name} is both in {} and in {}; leave one of them", first.display(), second.display())]
    Twice {
        /// The weight.
        name: String,
        /// A file that has it.
        first: PathBuf,
        /// Another one.
        second: PathBuf,
    },
    /// Weights that the configuration asks for.
    #[error("{} lacks {names}; the checkpoint is not complete, or config.json is of another model",
        directory.display())]
    Missing {
        /// The checkpoint.
        directory: PathBuf,
        /// Their names in the file.
        names: Names,
    },
    /// Weights that the model has no place for.
    #[error("{} holds {names}, which the model of its config.json does not have; \
        config.json is of another model, or these weights are to be removed", directory.display())]
    Unknown {
        /// The checkpoint.
        directory: PathBuf,
        /// Their names in the file.
        names: Names,
    },
    /// A weight of another shape.
    #[error("{}: {name} has the shape {found:?}, but the configuration makes it {expected:?}; \
        config.json is of another model", path.display())]
    Shape {
        /// The file.
        path: PathBuf,
        /// The weight's name in the file.
        name: String,
        /// The shape that the configuration makes it.
        expected: Vec<usize>,
        /// The shape in the file.
        found: Vec<usize>,
    },
    /// A weight of a type that is not read, or that is not written.
    #[error("{}: {name} is of the type {found}; use float32, float16 or bfloat16", path.display())]
    Type {
        /// The file or directory.
        path: PathBuf,
        /// The weight's name in the file.
        name: String,
        /// Its type.
        found: String,
    },
    /// A parameter of a model that has no name in the files.
    #[error(
        "the parameter {path} has no name in a checkpoint of this kind; save a model of another kind"
    )]
    NoName {
        /// The path of the parameter.
        path: String,
    },
}

impl CheckpointError {
    /// For `map_err` on what the system refuses.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }

    /// One weight is missing.
    pub(crate) fn missing(directory: &Path, name: String) -> Self {
        Self::Missing {
            directory: directory.into(),
            names: Names {
                first: vec![name],
                more: false,
            },
        }
    }

    /// For `map_err` on JSON that cannot be read.
    pub(crate) fn json(path: &Path) -> impl FnOnce(serde_json::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Json { path, source }
    }

    /// For `map_err` on a configuration.
    pub(crate) fn config(path: &Path) -> impl Fn(ConfigError) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Config {
            path: path.clone(),
            source,
        }
    }
}

/// Some names, and whether there are more.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Names {
    /// The first ones.
    pub first: Vec<String>,
    /// Whether others are left out.
    pub more: bool,
}

impl Names {
    /// As many are listed.
    const LISTED: usize = 8;

    /// Adds a name, or notes that there are more; false once there are enough.
    pub(super) fn add(&mut self, name: String) -> bool {
        self.more = self.first.len() == Self::LISTED;
        if !self.more {
            self.first.push(name);
        }
        !self.more
    }

    pub(super) fn is_empty(&self) -> bool {
        self.first.is_empty()
    }
}

impl fmt::Display for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.first.join(", "))?;
        f.write_str(if self.more { " and more" } else { "" })
    }
}
