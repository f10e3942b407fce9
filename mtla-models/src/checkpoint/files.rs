//! Small text files, and files that appear whole or not at all.

use std::{
    fs::{self, File},
    io::{self, ErrorKind, Read, Write},
    path::Path,
};

use serde::{Serialize, de::DeserializeOwned};

use super::CheckpointError;

/// The ending of names that are not finished.
const UNFINISHED: &str = "tmp";

/// The longest JSON file that is read, in bytes. An index takes about a hundred a weight.
const LONGEST_JSON: u64 = 64 << 20;

/// Opens a regular file. Anything else might never end, or never begin.
pub(super) fn open(path: &Path) -> Result<(File, u64), CheckpointError> {
    let about = fs::metadata(path).map_err(CheckpointError::io("read", path))?;
    if !about.is_file() {
        return Err(CheckpointError::NotAFile { path: path.into() });
    }
    let file = File::open(path).map_err(CheckpointError::io("read", path))?;
    Ok((file, about.len()))
}

/// Reads a JSON file.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, CheckpointError> {
    let (file, bytes) = open(path)?;
    if bytes > LONGEST_JSON {
        return Err(CheckpointError::TooLong {
            path: path.into(),
            bytes,
            limit: LONGEST_JSON,
        });
    }
    let mut text = Vec::new();
    file.take(LONGEST_JSON)
        .read_to_end(&mut text)
        .map_err(CheckpointError::io("read", path))?;
    serde_json::from_slice(&text).map_err(CheckpointError::json(path))
}

/// Reads a JSON file that need not be there.
pub(crate) fn read_json_if_there<T: DeserializeOwned>(
    path: &Path,
) -> Result<Option<T>, CheckpointError> {
    match read_json(path) {
        Ok(value) => Ok(Some(value)),
        Err(CheckpointError::Io { source, .. }) if source.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Writes a JSON file with sorted names, as Python does.
pub(crate) fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), CheckpointError> {
    let sorted = serde_json::to_value(value).map_err(CheckpointError::json(path))?;
    let mut text = serde_json::to_vec_pretty(&sorted).map_err(CheckpointError::json(path))?;
    text.push(b'\n');
    replace(path, |unfinished| {
        File::create(unfinished)?.write_all(&text)
    })
}

/// Writes a file under a temporary name, forces it to the disk and gives it its own name. What was there before
/// stays if that fails.
pub(super) fn replace(
    path: &Path,
    write: impl FnOnce(&Path) -> io::Result<()>,
) -> Result<(), CheckpointError> {
    let unfinished = path.with_added_extension(UNFINISHED);
    let finish = || {
        write(&unfinished)?;
        // A handle that may write: some systems force nothing else to the disk.
        File::options().write(true).open(&unfinished)?.sync_all()?;
        fs::rename(&unfinished, path)
    };
    finish().map_err(|error| {
        fs::remove_file(&unfinished).ok();
        CheckpointError::io("write", path)(error)
    })
}
