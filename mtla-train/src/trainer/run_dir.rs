//! The directory of a run.
//!
//! | File | |
//! |---|---|
//! | `config.json` | settings, seed, versions, backend and device, written once |
//! | `metrics.jsonl` | one JSON object a line, see [`MetricLine`](super::MetricLine) |
//! | `train.log` | what was shown, with seconds since the start |
//! | `loss.svg` | the loss over the steps |
//! | `checkpoints/step-…` | weights (`model.mpk`), `optimizer.mpk` and `state.json` |
//! | `lock` | held while a process trains here |
//!
//! At any moment a reader, or a process started after a crash, finds a file as it was or as it is now.

use super::error::TrainError;
use crate::disk::replace;
use serde_json::Value;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// An open run directory. No other process can open it at the same time.
#[derive(Debug)]
pub struct RunDir {
    root: PathBuf,
    _lock: File,
}

impl RunDir {
    /// Opens `root`, made if need be.
    ///
    /// # Errors
    ///
    /// [`TrainError::Locked`] if another process has it open, [`TrainError::Io`] if it cannot be
    /// written.
    pub fn open(root: impl Into<PathBuf>) -> Result<Self, TrainError> {
        let root = root.into();
        fs::create_dir_all(&root).map_err(TrainError::io("create", &root))?;
        let path = root.join("lock");
        let lock = File::create(&path).map_err(TrainError::io("create", &path))?;
        match lock.try_lock() {
            Ok(()) => Ok(Self { root, _lock: lock }),
            Err(fs::TryLockError::WouldBlock) => Err(TrainError::Locked { path: root }),
            Err(fs::TryLockError::Error(source)) => Err(TrainError::Io {
                action: "lock",
                path,
                source,
            }),
        }
    }

    /// Where `name` is in the run directory.
    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.root.join(name)
    }

    /// Writes the file `name`, a path within the run directory, all or nothing.
    ///
    /// # Errors
    ///
    /// [`TrainError::Io`]; a file that was there before is then as it was.
    pub fn write(&self, name: impl AsRef<Path>, contents: &[u8]) -> Result<PathBuf, TrainError> {
        let path = self.path(name);
        let folder = path.parent().unwrap_or(&self.root);
        fs::create_dir_all(folder).map_err(TrainError::io("create", folder))?;
        replace(&path, contents).map_err(TrainError::io("write", &path))?;
        Ok(path)
    }

    /// Writes `description` into `config.json`, or compares it with what a run before has written
    /// there. Only what is under `settings` must be the same.
    pub(super) fn claim(&self, description: &Value) -> Result<(), TrainError> {
        let path = self.path("config.json");
        if !path.exists() {
            let text = format!("{description:#}\n");
            return self.write("config.json", text.as_bytes()).map(drop);
        }
        let text = fs::read_to_string(&path).map_err(TrainError::io("read", &path))?;
        let written: Value = serde_json::from_str(&text).map_err(|error| TrainError::Damaged {
            path: path.clone(),
            reason: error.to_string(),
            cure: "restore it or choose another run directory".into(),
        })?;
        let mut differences = Vec::new();
        compare(
            "",
            &written["settings"],
            &description["settings"],
            &mut differences,
        );
        if differences.is_empty() {
            return Ok(());
        }
        Err(TrainError::OtherRun {
            path,
            differences: differences.join(", "),
        })
    }
}

/// Lists where `then` and `now` differ, as `a.b: 1 then, 2 now`.
fn compare(place: &str, then: &Value, now: &Value, differences: &mut Vec<String>) {
    if let (Value::Object(a), Value::Object(b)) = (then, now) {
        let added = b.keys().filter(|key| !a.contains_key(*key));
        for key in a.keys().chain(added) {
            let place = if place.is_empty() {
                key.clone()
            } else {
                format!("{place}.{key}")
            };
            compare(&place, &then[key], &now[key], differences);
        }
    } else if then != now {
        differences.push(format!("{place}: {then} then, {now} now"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn one_process_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let first = RunDir::open(folder.path()).unwrap();
        assert!(matches!(
            RunDir::open(folder.path()),
            Err(TrainError::Locked { .. })
        ));
        drop(first);
        RunDir::open(folder.path()).unwrap();
    }

    #[test]
    fn files_are_replaced_whole_and_leave_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::open(folder.path()).unwrap();
        run.write("samples/a.txt", b"one").unwrap();
        let path = run.write("samples/a.txt", b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_is_reported_and_the_old_file_kept() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::open(folder.path()).unwrap();
        let path = run.write("a.txt", b"old").unwrap();
        std::os::unix::fs::symlink("/dev/full", run.path("a.txt.tmp")).unwrap();
        let error = run.write("a.txt", b"new").unwrap_err().to_string();
        assert!(
            error.contains("a.txt") && error.contains("No space left"),
            "{error}"
        );
        assert_eq!(fs::read(path).unwrap(), b"old");
    }

    #[test]
    fn other_settings_are_named_with_both_values() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::open(folder.path()).unwrap();
        let description = |d_model, host| json!({ "settings": { "model": { "d_model": d_model, "layers": 2 } }, "host": host });
        run.claim(&description(64, "a")).unwrap();
        run.claim(&description(64, "b")).unwrap();
        let error = run.claim(&description(128, "a")).unwrap_err().to_string();
        assert!(
            error.contains("(model.d_model: 64 then, 128 now)"),
            "{error}"
        );
        let error = run
            .claim(&json!({ "settings": { "extra": 1 } }))
            .unwrap_err()
            .to_string();
        assert!(error.contains("extra: null then, 1 now"), "{error}");
    }

    #[test]
    fn a_damaged_config_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::open(folder.path()).unwrap();
        run.write("config.json", b"{").unwrap();
        let error = run.claim(&json!({})).unwrap_err().to_string();
        assert!(error.contains("config.json is damaged"), "{error}");
    }
}
