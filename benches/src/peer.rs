//! What this library's sides of `compare.py` share: lines on standard input and output.

use std::io::{BufRead, Write};

use anyhow::Context;

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
