//! The numbers of a run: from the device to `metrics.jsonl`.
//!
//! Burn's file logger truncates its files when it is opened and knows no steps, so a run could not
//! go on in them. Here a line is a JSON object, and the file is cut back on resumption to what the
//! checkpoint had seen. There are no times in it: two runs that are equal have equal files.

use super::error::TrainError;
use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// A line of `metrics.jsonl`.
///
/// ```
/// use mtla_train::MetricLine;
///
/// let line = r#"{"split":"valid","step":500,"epoch":2,"loss":0.5,"perplexity":1.65}"#;
/// let MetricLine::Valid(valid) = serde_json::from_str(line)? else { panic!() };
/// assert_eq!((valid.step, valid.loss), (500, 0.5));
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "split", rename_all = "lowercase")]
pub enum MetricLine {
    /// The training steps since the line before.
    Train(TrainMetrics),
    /// A validation.
    Valid(ValidMetrics),
}

/// Numbers of the training steps since the line before.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainMetrics {
    /// The last of these steps, counted from 1.
    pub step: usize,
    /// Its epoch, counted from 1.
    pub epoch: usize,
    /// Mean loss over the tokens of these steps, in nats.
    pub loss: f64,
    /// `exp(loss)`.
    pub perplexity: f64,
    /// The learning rate of the last step.
    pub learning_rate: f64,
    /// The norm over all gradients before clipping, mean over the steps.
    pub gradient_norm: f64,
    /// Tokens trained on in these steps.
    pub tokens: usize,
}

/// Numbers of a validation.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ValidMetrics {
    /// The step after which it was made.
    pub step: usize,
    /// Its epoch, counted from 1.
    pub epoch: usize,
    /// Mean loss over the tokens of the validation data, in nats.
    pub loss: f64,
    /// `exp(loss)`.
    pub perplexity: f64,
}

/// `exp(loss)`, kept within what JSON can hold.
pub(super) fn perplexity(loss: f64) -> f64 {
    loss.exp().min(f64::MAX)
}

/// What is known of a step once it is read back.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct StepLoss {
    pub step: usize,
    pub loss: f64,
    pub gradient_norm: f64,
    pub tokens: usize,
}

/// The steps since the last line. Their numbers stay on the device until they are asked for; then
/// they come over all at once.
pub(super) struct Window<B: Backend> {
    waiting: Vec<(usize, Tensor<B, 1>, usize)>,
    read: Vec<StepLoss>,
}

impl<B: Backend> Window<B> {
    pub(super) fn new(read: Vec<StepLoss>) -> Self {
        Self {
            waiting: Vec::new(),
            read,
        }
    }

    /// Adds a step with its `[loss]` and `[gradient norm]`.
    pub(super) fn push(
        &mut self,
        step: usize,
        loss: Tensor<B, 1>,
        norm: Tensor<B, 1>,
        tokens: usize,
    ) {
        self.waiting
            .push((step, Tensor::cat(vec![loss, norm], 0), tokens));
    }

    /// Reads back what is waiting and gives all steps of the window.
    pub(super) fn read(&mut self) -> &[StepLoss] {
        if !self.waiting.is_empty() {
            let waiting = std::mem::take(&mut self.waiting);
            let tensors = waiting
                .iter()
                .map(|(_, numbers, _)| numbers.clone())
                .collect();
            let numbers: Vec<f64> = Tensor::cat(tensors, 0).into_data().iter().collect();
            for ((step, _, tokens), pair) in waiting.into_iter().zip(numbers.chunks_exact(2)) {
                let (loss, gradient_norm) = (pair[0], pair[1]);
                self.read.push(StepLoss {
                    step,
                    loss,
                    gradient_norm,
                    tokens,
                });
            }
        }
        &self.read
    }

    /// Forgets the steps, once they are written.
    pub(super) fn clear(&mut self) {
        self.read.clear();
    }
}

/// Mean of `(value, weight)`.
pub(super) fn mean(values: impl Iterator<Item = (f64, usize)>) -> f64 {
    let (sum, count) = values.fold((0.0, 0), |(sum, count), (value, weight)| {
        (sum + value * weight as f64, count + weight)
    });
    sum / count as f64
}

/// `metrics.jsonl`, open at its end.
pub(super) struct MetricsFile {
    path: PathBuf,
    file: File,
    bytes: u64,
}

impl MetricsFile {
    /// Opens the file and cuts it back to `bytes`.
    pub(super) fn open(path: PathBuf, bytes: u64) -> Result<Self, TrainError> {
        let open = || {
            let options = OpenOptions::new()
                .create(true)
                .write(true)
                .truncate(false)
                .open(&path);
            let mut file = options?;
            let found = file.metadata()?.len();
            if found >= bytes {
                file.set_len(bytes)?;
                file.seek(SeekFrom::Start(bytes))?;
            }
            Ok((file, found))
        };
        let (file, found) = open().map_err(TrainError::io("open", &path))?;
        if found < bytes {
            let reason = format!("it has {found} bytes where the checkpoint has seen {bytes}");
            let cure = "restore it or choose another run directory".into();
            return Err(TrainError::Damaged { path, reason, cure });
        }
        Ok(Self { path, file, bytes })
    }

    /// Adds a line.
    pub(super) fn append(&mut self, line: &MetricLine) -> Result<(), TrainError> {
        let mut text = serde_json::to_vec(line).expect("plain data");
        text.push(b'\n');
        self.file
            .write_all(&text)
            .map_err(TrainError::io("write", &self.path))?;
        self.bytes += text.len() as u64;
        Ok(())
    }

    /// Forces the lines to the disk and gives the length of the file.
    pub(super) fn sync(&self) -> Result<u64, TrainError> {
        self.file
            .sync_all()
            .map_err(TrainError::io("write", &self.path))?;
        Ok(self.bytes)
    }
}

/// Reads a `metrics.jsonl`.
///
/// # Errors
///
/// [`TrainError::Io`], or [`TrainError::Damaged`] with the line that is not one.
pub fn read_metrics(path: &Path) -> Result<Vec<MetricLine>, TrainError> {
    let text = std::fs::read_to_string(path).map_err(TrainError::io("read", path))?;
    let parse = |(number, line): (usize, &str)| {
        serde_json::from_str(line).map_err(|error| TrainError::Damaged {
            path: path.to_path_buf(),
            reason: format!("line {}: {error}", number + 1),
            cure: "remove the line".into(),
        })
    };
    text.lines().enumerate().map(parse).collect()
}

#[cfg(test)]
#[expect(clippy::float_cmp, reason = "these values are exact")]
mod tests {
    use super::*;
    use burn_flex::{Flex, FlexDevice};

    fn line(step: usize) -> MetricLine {
        MetricLine::Valid(ValidMetrics {
            step,
            epoch: 1,
            loss: 0.1 + 0.2,
            perplexity: 1.0,
        })
    }

    #[test]
    fn resuming_cuts_back_to_the_checkpoint() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut file = MetricsFile::open(path.clone(), 0).unwrap();
        file.append(&line(1)).unwrap();
        let bytes = file.sync().unwrap();
        file.append(&line(2)).unwrap();
        drop(file);

        let mut file = MetricsFile::open(path.clone(), bytes).unwrap();
        assert_eq!(read_metrics(&path).unwrap(), [line(1)]);
        file.append(&line(3)).unwrap();
        assert_eq!(read_metrics(&path).unwrap(), [line(1), line(3)]);
        let error = MetricsFile::open(path, 10_000).err().unwrap().to_string();
        assert!(error.contains("metrics.jsonl is damaged"), "{error}");
    }

    #[test]
    fn a_bad_line_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        std::fs::write(&path, "{\"split\":\"valid\"").unwrap();
        assert!(
            read_metrics(&path)
                .unwrap_err()
                .to_string()
                .contains("line 1")
        );
    }

    #[test]
    fn the_window_keeps_its_steps_in_order() {
        let number = |x: f32| Tensor::<Flex, 1>::from_floats([x], &FlexDevice);
        let known = StepLoss {
            step: 1,
            loss: 0.5,
            gradient_norm: 1.0,
            tokens: 3,
        };
        let mut window = Window::new(vec![known]);
        window.push(2, number(0.25), number(2.0), 4);
        window.push(3, number(0.75), number(3.0), 5);
        let steps = window.read().to_vec();
        assert_eq!(steps[0], known);
        assert_eq!(
            steps[1],
            StepLoss {
                step: 2,
                loss: 0.25,
                gradient_norm: 2.0,
                tokens: 4
            }
        );
        assert_eq!(
            steps[2],
            StepLoss {
                step: 3,
                loss: 0.75,
                gradient_norm: 3.0,
                tokens: 5
            }
        );
        assert_eq!(window.read().len(), 3, "reading twice adds nothing");
        assert_eq!(mean([(1.0, 1), (4.0, 2)].into_iter()), 3.0);
    }
}
