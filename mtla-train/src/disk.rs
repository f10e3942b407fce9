//! Files that appear whole or not at all.
//!
//! Whatever is replaced is written under another name first, forced to the disk and renamed: at any moment a
//! reader, or a process started after a crash, finds the old file or the new one.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

/// The ending of names that are not finished; what is left of them is worth nothing.
pub(crate) const UNFINISHED: &str = "tmp";

/// Writes the file `path`; what was there before stays if that fails.
///
/// # Errors
///
/// What the system says.
pub fn replace(path: &Path, contents: &[u8]) -> io::Result<()> {
    let unfinished = path.with_added_extension(UNFINISHED);
    write_through(&unfinished, contents)?;
    finish(&unfinished, path).inspect_err(|_| {
        fs::remove_file(&unfinished).ok();
    })
}

/// Writes a file and forces it to the disk; what could not be finished is removed.
pub(crate) fn write_through(path: &Path, contents: &[u8]) -> io::Result<()> {
    let write = || {
        let mut file = File::create(path)?;
        file.write_all(contents)?;
        file.sync_all()
    };
    write().inspect_err(|_| {
        fs::remove_file(path).ok();
    })
}

/// Gives a file or directory its final name, for good.
pub(crate) fn finish(unfinished: &Path, path: &Path) -> io::Result<()> {
    fs::rename(unfinished, path)?;
    match path.parent() {
        // The parent of a bare name is the empty path.
        Some(folder) if folder.as_os_str().is_empty() => sync_folder(Path::new(".")),
        Some(folder) => sync_folder(folder),
        None => Ok(()),
    }
}

/// Forces the names in a directory to the disk, where that is a thing to do.
pub(crate) fn sync_folder(path: &Path) -> io::Result<()> {
    if cfg!(unix) {
        File::open(path)?.sync_all()?;
    }
    Ok(())
}
