//! Draws the validation losses of several runs in one picture, and prints them.
//!
//! ```text
//! cargo run --release --example compare_runs -- out.svg converted=runs/a "from scratch=runs/b" original=0.57
//! ```
//!
//! A name with a run directory is a curve; a name with a number is a level to compare with.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use clap::Parser;
use mtla_train::{Curve, MetricLine, disk::replace, loss_curves, read_metrics};

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
    #[arg(long, value_name = "LOSS", value_parser = finite)]
    below: Option<f64>,
}

fn finite(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(x) if x.is_finite() => Ok(x),
        _ => Err("give a finite number".into()),
    }
}

fn main() -> anyhow::Result<()> {
    run(&Arguments::parse())
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let (mut curves, mut levels) = (Vec::new(), Vec::new());
    for run in &arguments.runs {
        let Some((name, place)) = run.split_once('=') else {
            bail!("{run:?} has no `=`: give a name and a run directory");
        };
        match place.parse::<f64>() {
            Ok(level) => {
                ensure!(
                    level.is_finite(),
                    "the level {run:?} is not finite: give a finite loss, or ./{place} for a run directory of that name"
                );
                levels.push((name, level));
            }
            Err(_) => curves.push(curve(name, place)?),
        }
    }
    for Curve { name, points } in &mut curves {
        let losses: Vec<_> = points
            .iter()
            .map(|(step, loss)| format!("{step} {loss:.4}"))
            .collect();
        println!("{name}: {}", losses.join(", "));
        if let Some(below) = arguments.below {
            points.retain(|(_, loss)| *loss <= below);
        }
    }
    let steps = curves.iter().flat_map(|curve| &curve.points);
    let last = steps.map(|(step, _)| *step).fold(0.0, f64::max);
    curves.extend(
        levels
            .into_iter()
            .map(|(name, level)| Curve::new(name, [(0.0, level), (last, level)])),
    );
    let path = &arguments.svg;
    replace(path, loss_curves(&curves)?.as_bytes())
        .with_context(|| format!("cannot write {}", path.display()))
}

/// The validations of a run.
fn curve(name: &str, run: &str) -> anyhow::Result<Curve> {
    let lines = read_metrics(&Path::new(run).join("metrics.jsonl"))?;
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

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// A folder with a run of two validations.
    fn folder() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("run")).unwrap();
        let lines = r#"{"split":"valid","step":10,"epoch":1,"loss":3.0,"perplexity":20.1}
{"split":"valid","step":20,"epoch":1,"loss":2.0,"perplexity":7.4}
"#;
        fs::write(folder.path().join("run/metrics.jsonl"), lines).unwrap();
        folder
    }

    fn compare(folder: &Path, more: &[&str]) -> anyhow::Result<()> {
        let svg = folder.join("out.svg");
        let curve = format!("run={}", folder.join("run").display());
        let arguments = ["compare_runs", svg.to_str().unwrap(), &curve];
        run(&Arguments::try_parse_from([&arguments[..], more].concat())?)
    }

    #[test]
    fn a_picture_has_runs_and_levels_and_appears_whole() {
        let folder = folder();
        let svg = folder.path().join("out.svg");
        fs::write(&svg, "old").unwrap();
        compare(folder.path(), &["original=2.5", "--below", "2.5"]).unwrap();
        let text = fs::read_to_string(svg).unwrap();
        assert!(text.contains("original") && text.contains("</svg>"));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn numbers_that_are_not_finite_are_refused() {
        let folder = folder();
        for (more, part) in [
            (&["level=NaN"][..], "\"level=NaN\" is not finite"),
            (&["level=-inf"], "\"level=-inf\" is not finite"),
            (&["--below", "nan"], "give a finite number"),
            (&["--below", "inf"], "give a finite number"),
            (&["nothing"], "no `=`"),
        ] {
            let error = compare(folder.path(), more).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
        assert!(!folder.path().join("out.svg").exists());
    }
}
