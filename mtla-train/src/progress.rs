//! What a terminal shows of work that takes a while; nothing where standard error is no terminal.

use std::{borrow::Cow, time::Duration};

use indicatif::{ProgressBar, ProgressStyle};

const TICK: Duration = Duration::from_millis(200);

/// Work of which only the end is known. What it returns removes it with `finish_and_clear`, or when dropped.
pub fn spinner(message: impl Into<Cow<'static, str>>) -> ProgressBar {
    show(ProgressBar::new_spinner(), "{spinner} {msg}", message)
}

/// Work in `steps` steps.
pub fn bar(message: impl Into<Cow<'static, str>>, steps: usize) -> ProgressBar {
    let template = "{msg:<16} {wide_bar} {percent:>3}% {eta:>5}";
    show(ProgressBar::new(steps as u64), template, message)
}

fn show(bar: ProgressBar, template: &str, message: impl Into<Cow<'static, str>>) -> ProgressBar {
    let style = ProgressStyle::with_template(template).expect("the template is well-formed");
    let bar = bar.with_style(style).with_message(message);
    bar.enable_steady_tick(TICK);
    bar.with_finish(indicatif::ProgressFinish::AndClear)
}
