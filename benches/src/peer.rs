//! What this library's sides of `compare.py` share: lines on standard input and output, and files of tensors.

use std::{
    fmt::Display,
    io::{BufRead, Write},
    path::Path,
};

use anyhow::{Context, bail};
use burn::tensor::{DType, TensorData};
use safetensors::{Dtype, tensor::TensorView};

/// Answers each line `COMMAND [ARGUMENT]` of standard input with a line, until there are no more.
///
/// # Errors
/// The first of `answer`'s own, or if reading or writing fails.
pub fn answer_commands(
    mut answer: impl FnMut(&str, &str) -> anyhow::Result<String>,
) -> anyhow::Result<()> {
    let mut stdout = std::io::stdout();
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let (command, argument) = line.split_once(' ').unwrap_or((&line, ""));
        writeln!(stdout, "{}", answer(command, argument)?)?;
        stdout.flush()?;
    }
    Ok(())
}

/// The largest resident set so far, in KiB.
///
/// # Errors
/// Where there is no `/proc/self/status`.
pub fn peak() -> anyhow::Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status").context("this needs Linux")?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .context("no VmHWM in /proc/self/status")?;
    Ok(line.trim().trim_end_matches(" kB").trim().parse()?)
}

/// Writes tensors of 32-bit floats and 64-bit integers for `compare.py`.
///
/// # Errors
/// If a tensor is of another type, or writing fails.
pub fn write_tensors<N: AsRef<str> + Ord + Display>(
    path: &Path,
    tensors: impl IntoIterator<Item = (N, TensorData)>,
) -> anyhow::Result<()> {
    let tensors: Vec<_> = tensors.into_iter().collect();
    let views = tensors.iter().map(|(name, data)| {
        let dtype = match data.dtype {
            DType::F32 => Dtype::F32,
            DType::I64 => Dtype::I64,
            other => bail!("{name} is of type {other:?}"),
        };
        let view = TensorView::new(dtype, data.shape.to_vec(), data.as_bytes())?;
        Ok((name, view))
    });
    let views = views.collect::<anyhow::Result<Vec<_>>>()?;
    safetensors::serialize_to_file(views, None, path)?;
    Ok(())
}
