//! The files of a tokenizer in a model directory.

use std::{fs, io, path::Path};

use super::vocabulary::VocabularyError;
use crate::disk::replace;

/// All of them that there may be.
const NAMES: [&str; 9] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
];

/// The files that a tokenizer is made of, as they are in a model directory.
#[derive(Debug, Clone)]
pub struct TokenizerFiles(Vec<(&'static str, Vec<u8>)>);

impl TokenizerFiles {
    /// These files, under their usual names.
    pub(super) fn new(files: impl Into<Vec<(&'static str, Vec<u8>)>>) -> Self {
        Self(files.into())
    }

    /// Reads those of a directory, which may have none.
    ///
    /// # Errors
    ///
    /// If one cannot be read.
    pub fn read(directory: &Path) -> Result<Self, VocabularyError> {
        let mut files = Vec::new();
        for name in NAMES {
            let path = directory.join(name);
            match fs::read(&path) {
                Ok(bytes) => files.push((name, bytes)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(VocabularyError::Read { path, source }),
            }
        }
        Ok(Self(files))
    }

    /// Writes them into a directory, each under a temporary name first, and removes those of another tokenizer that
    /// this one has not.
    ///
    /// # Errors
    ///
    /// If one cannot be written or removed.
    pub fn write(&self, directory: &Path) -> Result<(), VocabularyError> {
        for name in NAMES {
            let path = directory.join(name);
            let done = match self.0.iter().find(|(found, _)| *found == name) {
                Some((_, bytes)) => replace(&path, bytes),
                None => match fs::remove_file(&path) {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                    removed => removed,
                },
            };
            done.map_err(|source| VocabularyError::Write { path, source })?;
        }
        Ok(())
    }
}
