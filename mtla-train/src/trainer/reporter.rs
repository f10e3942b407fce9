//! What is seen of a run while it trains.
//!
//! On a terminal it is burn-train's text interface, elsewhere a line now and then; `train.log` has
//! the lines either way. burn-train's own metrics each read their tensors back (and its perplexity
//! wants the logits), so they are fed here by numbers that are already on the host.

use super::error::TrainError;
use super::history::{TrainMetrics, ValidMetrics};
use super::run_dir::RunDir;
use super::terminal;
use burn::data::dataloader::Progress;
use burn_train::Interrupter;
use burn_train::metric::state::{FormatOptions, NumericMetricState};
use burn_train::metric::{MetricDefinition, MetricEntry, MetricId, NumericAttributes};
use burn_train::renderer::tui::TuiMetricsRendererWrapper;
use burn_train::renderer::{MetricState, MetricsRenderer, MetricsRendererTraining};
use burn_train::renderer::{ProgressType, TrainingProgress};
use std::fs::{File, OpenOptions};
use std::io::{IsTerminal, Write, stdout};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How a run is shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Display {
    /// burn-train's text interface if standard output is a terminal, lines if not.
    #[default]
    Auto,
    /// Lines on standard error.
    Lines,
    /// Nothing.
    Quiet,
}

/// Shows a run and keeps `train.log`.
pub(super) struct Reporter {
    screen: Screen,
    log: File,
    log_path: PathBuf,
    started: Instant,
    first_step: usize,
    total: usize,
    last_line: Instant,
}

enum Screen {
    Tui(Box<Tui>),
    Lines,
    Quiet,
}

impl Reporter {
    /// Opens the log of `run`, of which `step` of `total` steps are made, and the screen.
    pub(super) fn open(
        run: &RunDir,
        display: Display,
        interrupter: &Interrupter,
        (step, total): (usize, usize),
    ) -> Result<Self, TrainError> {
        let log_path = run.path("train.log");
        let log = OpenOptions::new().create(true).append(true).open(&log_path);
        let log = log.map_err(TrainError::io("open", &log_path))?;
        let screen = match display {
            Display::Auto if stdout().is_terminal() => {
                Screen::Tui(Tui::open(interrupter, step).into())
            }
            Display::Auto | Display::Lines => Screen::Lines,
            Display::Quiet => Screen::Quiet,
        };
        let (started, last_line) = (Instant::now(), Instant::now());
        Ok(Self {
            screen,
            log,
            log_path,
            started,
            first_step: step,
            total,
            last_line,
        })
    }

    /// Says something.
    pub(super) fn note(&mut self, text: &str) -> Result<(), TrainError> {
        if let Screen::Lines = self.screen {
            eprintln!("{text}");
        }
        let seconds = self.started.elapsed().as_secs_f64();
        let line = format!("[{seconds:10.2}] {text}\n");
        self.log
            .write_all(line.as_bytes())
            .map_err(TrainError::io("write", &self.log_path))
    }

    /// Shows the training steps since the last time.
    pub(super) fn train(&mut self, line: &TrainMetrics) -> Result<(), TrainError> {
        let TrainMetrics {
            step,
            loss,
            learning_rate,
            tokens,
            ..
        } = *line;
        let total = self.total;
        let speed = tokens as f64 / self.last_line.elapsed().as_secs_f64();
        let left = time_left(self.started.elapsed(), step - self.first_step, total - step);
        self.last_line = Instant::now();
        if let Screen::Tui(tui) = &mut self.screen {
            tui.train(line, speed, total);
        }
        self.note(&format!(
            "step {step:>6}/{total} | loss {loss:.4} | lr {learning_rate:.2e} | \
             {speed:.0} tokens/s | {left} left"
        ))
    }

    /// Shows a validation.
    pub(super) fn valid(&mut self, line: &ValidMetrics) -> Result<(), TrainError> {
        let ValidMetrics {
            step,
            loss,
            perplexity,
            ..
        } = *line;
        let total = self.total;
        if let Screen::Tui(tui) = &mut self.screen {
            tui.valid(line, total);
        }
        self.note(&format!(
            "step {step:>6}/{total} | validation loss {loss:.4} | perplexity {perplexity:.2}"
        ))
    }

    /// Gives the terminal back and says a last thing on it.
    pub(super) fn close(&mut self, text: &str) -> Result<(), TrainError> {
        if let Screen::Tui(_) = self.screen {
            self.screen = Screen::Lines;
        }
        self.note(text)
    }

    /// Gives the terminal back and leaves it to the caller to show the error.
    pub(super) fn abandon(&mut self, error: &TrainError) {
        self.screen = Screen::Quiet;
        self.note(&format!("error: {error}")).ok();
    }
}

/// `4 min 12 s`, as far as `done` steps in `elapsed` tell for `left` steps.
fn time_left(elapsed: Duration, done: usize, left: usize) -> String {
    let seconds = (elapsed.as_secs_f64() / done.max(1) as f64 * left as f64).round() as u64;
    let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
    match (hours, minutes) {
        (0, 0) => format!("{seconds} s"),
        (0, _) => format!("{minutes} min {} s", seconds % 60),
        _ => format!("{hours} h {minutes} min"),
    }
}

/// burn-train's text interface. Gives the terminal back when dropped.
struct Tui {
    renderer: Option<TuiMetricsRendererWrapper>,
    train: [Number; 5],
    valid: [Number; 2],
}

impl Tui {
    fn open(interrupter: &Interrupter, step: usize) -> Self {
        let mut renderer = TuiMetricsRendererWrapper::new(interrupter.clone(), Some(step));
        let train = [
            Number::new("Loss", false),
            Number::new("Perplexity", false),
            Number::new("Learning Rate", false),
            Number::new("Gradient Norm", false),
            Number::new("Tokens per Second", true),
        ];
        for number in &train {
            renderer.register_metric(number.definition.clone());
        }
        terminal::settle();
        let valid = [Number::new("Loss", false), Number::new("Perplexity", false)];
        Self {
            renderer: Some(renderer),
            train,
            valid,
        }
    }

    fn train(&mut self, line: &TrainMetrics, speed: f64, total: usize) {
        let Some(renderer) = &mut self.renderer else {
            return;
        };
        let TrainMetrics {
            loss,
            perplexity,
            learning_rate,
            gradient_norm,
            ..
        } = *line;
        let values = [loss, perplexity, learning_rate, gradient_norm, speed];
        for (number, value) in self.train.iter_mut().zip(values) {
            renderer.update_train(number.update(value));
        }
        let (progress, status) = progress(line.step, line.epoch, total);
        renderer.render_train(progress, status);
    }

    fn valid(&mut self, line: &ValidMetrics, total: usize) {
        let Some(renderer) = &mut self.renderer else {
            return;
        };
        for (number, value) in self.valid.iter_mut().zip([line.loss, line.perplexity]) {
            renderer.update_valid(number.update(value));
        }
        let (progress, status) = progress(line.step, line.epoch, total);
        renderer.render_valid(progress, status);
    }
}

impl Drop for Tui {
    fn drop(&mut self) {
        self.renderer = None;
        if std::thread::panicking() {
            // Then burn-train does not wait for its thread, which has the cursor hidden.
            std::thread::sleep(Duration::from_millis(200));
            terminal::restore();
        }
    }
}

/// The run's steps as burn-train shows them: for the progress bar and for the status box.
fn progress(step: usize, epoch: usize, total: usize) -> (TrainingProgress, Vec<ProgressType>) {
    let steps = Progress::new(step, total);
    let status = vec![
        ProgressType::Detailed {
            tag: "Step".into(),
            progress: steps.clone(),
        },
        ProgressType::Value {
            tag: "Epoch".into(),
            value: epoch,
        },
    ];
    let progress = TrainingProgress {
        progress: None,
        global_progress: steps,
        iteration: Some(step),
    };
    (progress, status)
}

/// A number over the run, in burn-train's form.
struct Number {
    definition: MetricDefinition,
    state: NumericMetricState,
}

impl Number {
    fn new(name: &str, higher_is_better: bool) -> Self {
        let definition = MetricDefinition {
            metric_id: MetricId::new(Arc::new(name.into())),
            name: name.into(),
            description: None,
            attributes: NumericAttributes {
                unit: None,
                higher_is_better,
            }
            .into(),
        };
        Self {
            definition,
            state: NumericMetricState::new(),
        }
    }

    fn update(&mut self, value: f64) -> MetricState {
        let format = FormatOptions::new(Arc::new(self.definition.name.clone())).precision(4);
        let entry = self.state.update(value, 1, format);
        let entry = MetricEntry::new(self.definition.metric_id.clone(), entry);
        MetricState::Numeric(entry, self.state.current_value())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_left_is_told_in_two_units() {
        let seconds = Duration::from_secs;
        assert_eq!(time_left(seconds(10), 10, 42), "42 s");
        assert_eq!(time_left(seconds(10), 20, 500), "4 min 10 s");
        assert_eq!(time_left(seconds(60), 1, 125), "2 h 5 min");
        assert_eq!(time_left(seconds(0), 0, 5), "0 s");
    }

    #[test]
    fn the_log_has_what_is_shown_and_grows_over_restarts() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::open(folder.path()).unwrap();
        for step in [10, 20] {
            let interrupter = Interrupter::new();
            let mut reporter =
                Reporter::open(&run, Display::Quiet, &interrupter, (step - 10, 40)).unwrap();
            let metrics = TrainMetrics {
                step,
                epoch: 1,
                loss: 2.5,
                perplexity: 12.2,
                learning_rate: 1e-3,
                gradient_norm: 1.0,
                tokens: 100,
            };
            reporter.train(&metrics).unwrap();
        }
        let log = std::fs::read_to_string(run.path("train.log")).unwrap();
        let lines: Vec<_> = log.lines().collect();
        assert_eq!(lines.len(), 2);
        assert!(
            lines[0].contains("step     10/40 | loss 2.5000 | lr 1.00e-3"),
            "{log}"
        );
    }
}
