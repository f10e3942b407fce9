//! Burn's records in files that are known to be whole.
//!
//! Burn's file recorders read these files, but do not write them: they drop their buffer without a
//! flush, so that a disk that is full at the end of a file goes unnoticed, and never `fsync`. And a
//! file with other contents than were written would make their conversion to tensors panic.

use super::error::TrainError;
use burn::record::RecorderError;
use burn::record::{BurnRecord, DefaultRecorder, FullPrecisionSettings, Record, Recorder};
use burn::tensor::backend::Backend;
use serde::{Deserialize, Serialize};
use std::error::Error;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

/// Tells whether a file is the one that was written.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Fingerprint {
    bytes: u64,
    crc32: u32,
}

/// Counts and sums what is written through it.
struct Summing<W> {
    inner: W,
    bytes: u64,
    sum: crc32fast::Hasher,
}

impl<W: Write> Summing<W> {
    fn new(inner: W) -> Self {
        Self {
            inner,
            bytes: 0,
            sum: crc32fast::Hasher::new(),
        }
    }

    fn fingerprint(self) -> Fingerprint {
        Fingerprint {
            bytes: self.bytes,
            crc32: self.sum.finalize(),
        }
    }
}

impl<W: Write> Write for Summing<W> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(buffer)?;
        self.sum.update(&buffer[..written]);
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Writes a record as Burn's default recorder does, and forces it to the disk.
pub(super) fn write_record<B: Backend, R: Record<B>>(
    path: &Path,
    record: R,
) -> Result<Fingerprint, TrainError> {
    let item = record.into_item::<FullPrecisionSettings>();
    let record = BurnRecord::<_, B>::new::<DefaultRecorder>(item);
    let write = || {
        let mut writer = BufWriter::new(Summing::new(File::create(path)?));
        rmp_serde::encode::write_named(&mut writer, &record).map_err(|error| cause(&error))?;
        let file = writer.into_inner()?;
        file.inner.sync_all()?;
        Ok(file.fingerprint())
    };
    write().map_err(TrainError::io("write", path))
}

/// The I/O error at the bottom of an encoding error.
fn cause(error: &(dyn Error + 'static)) -> io::Error {
    let chain = std::iter::successors(Some(error), |&error| error.source());
    let code = chain
        .filter_map(|e| e.downcast_ref::<io::Error>()?.raw_os_error())
        .last();
    code.map_or_else(
        || io::Error::other(error.to_string()),
        io::Error::from_raw_os_error,
    )
}

pub(super) fn read_record<B: Backend, R: Record<B>>(
    path: &Path,
    written: Fingerprint,
    device: &B::Device,
) -> Result<R, TrainError> {
    let mut file = File::open(path).map_err(TrainError::io("read", path))?;
    let mut summing = Summing::new(io::sink());
    io::copy(&mut file, &mut summing).map_err(TrainError::io("read", path))?;
    let found = summing.fingerprint();
    if found != written {
        return Err(damaged(
            path,
            format!("{found:?} where {written:?} was written"),
        ));
    }
    let record = DefaultRecorder::new().load(path.to_path_buf(), device);
    record.map_err(|error| match error {
        RecorderError::FileNotFound(text)
        | RecorderError::DeserializeError(text)
        | RecorderError::Unknown(text) => damaged(path, text),
    })
}

/// A file of a checkpoint that cannot be used.
pub(super) fn damaged(path: &Path, reason: String) -> TrainError {
    TrainError::Damaged {
        path: path.to_path_buf(),
        reason,
        cure: "remove this checkpoint to go on from the one before it".into(),
    }
}
