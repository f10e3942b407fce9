//! Draws the validation losses of several runs in one picture, and prints them.
//!
//! ```text
//! cargo run --release --example compare_runs -- out.svg converted=runs/a "from scratch=runs/b" original=0.57
//! ```
//!
//! A name with a run directory is a curve; a name with a number is a level to compare with.

use std::{fs, path::PathBuf};

use anyhow::{Context, bail};
use clap::Parser;
use mtla_train::{Curve, MetricLine, loss_curves, read_metrics};

/// Draw the validation losses of several runs.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// The picture to write.
    svg: PathBuf,
    /// `name=run directory`, or `name=loss` for a level.
    #[arg(required = true, value_name = "NAME=RUN")]
    runs: Vec<String>,
    /// Leave out losses above this.
    #[arg(long, value_name = "LOSS", default_value_t = f64::INFINITY)]
    below: f64,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let (mut curves, mut levels) = (Vec::new(), Vec::new());
    for run in &arguments.runs {
        let Some((name, place)) = run.split_once('=') else {
            bail!("{run:?} has no `=`: give a name and a run directory");
        };
        match place.parse::<f64>() {
            Ok(level) => levels.push((name, level)),
            Err(_) => curves.push(curve(name, place)?),
        }
    }
    for Curve { name, points } in &mut curves {
        let losses: Vec<_> = points
            .iter()
            .map(|(step, loss)| format!("{step} {loss:.4}"))
            .collect();
        println!("{name}: {}", losses.join(", "));
        points.retain(|(_, loss)| *loss <= arguments.below);
    }
    let steps = curves.iter().flat_map(|curve| &curve.points);
    let last = steps.map(|(step, _)| *step).fold(0.0, f64::max);
    curves.extend(
        levels
            .into_iter()
            .map(|(name, level)| Curve::new(name, [(0.0, level), (last, level)])),
    );
    let path = &arguments.svg;
    fs::write(path, loss_curves(&curves)?)
        .with_context(|| format!("cannot write {}", path.display()))
}

/// The validations of a run.
fn curve(name: &str, run: &str) -> anyhow::Result<Curve> {
    let lines = read_metrics(&PathBuf::from(run).join("metrics.jsonl"))?;
    let points = lines.iter().filter_map(|line| match line {
        MetricLine::Valid(line) => Some((line.step as f64, line.loss)),
        MetricLine::Train(_) => None,
    });
    let curve = Curve::new(name, points);
    if curve.points.is_empty() {
        bail!("{run} has no validation yet");
    }
    Ok(curve)
}
