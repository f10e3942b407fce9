//! Text out of files.

use std::{fs, path::Path};

use anyhow::{Context, anyhow};

/// Reads a text file, and says where it is none.
pub(crate) fn read(path: &Path) -> anyhow::Result<String> {
    let bytes = fs::read(path).with_context(|| format!("{} cannot be read", path.display()))?;
    let text = String::from_utf8(bytes).map_err(|error| {
        let place = error.utf8_error().valid_up_to();
        let line = error.as_bytes()[..place]
            .split(|byte| *byte == b'\n')
            .count();
        anyhow!(
            "{} is not UTF-8 at byte {place}, in line {line}; save it as UTF-8",
            path.display()
        )
    })?;
    Ok(match text.strip_prefix('\u{feff}') {
        Some(rest) => rest.to_owned(),
        None => text,
    })
}
