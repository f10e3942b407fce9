//! One file from the hub into the cache, where it appears whole and right or not at all.

use super::{
    Hub, HubError, HubModel, Progress,
    requests::{Description, Trouble},
};
use hf_hub::Cache;
use indicatif::{ProgressBar, ProgressStyle};
use sha1::Sha1;
use sha2::{Digest, Sha256};
use std::{
    fs,
    io::{self, Read, Write},
    path::Path,
    thread,
    time::Duration,
};

/// How often a connection that breaks is made anew within one call.
const ATTEMPTS: u32 = 3;

/// The bytes that are read at once.
const PART: usize = 1 << 17;

/// A file of a model at one commit.
pub(super) struct File<'a> {
    pub(super) model: &'a HubModel,
    pub(super) name: &'a str,
    pub(super) commit: &'a str,
    /// Its place in the cache.
    pub(super) pointer: &'a Path,
}

impl File<'_> {
    /// For messages.
    fn full_name(&self) -> String {
        format!("{} of {}", self.name, self.model)
    }
}

impl Hub {
    /// Fetches a file. Where another process fetches it at the moment, waits for that.
    pub(super) fn download(&self, file: &File<'_>) -> Result<(), Trouble> {
        let url = self.url(file.model, file.name);
        let description = self.describe(&url, &file.full_name())?;
        let commit = description.commit.as_deref();
        if commit.is_some_and(|commit| commit != file.commit) {
            let model = file.model.to_string();
            return Err(HubError::Changed { model }.into());
        }
        let cached = Cache::new(self.cache.clone()).repo(file.model.repo());
        let contents = cached.blob_path(&description.etag);
        for path in [&*contents, file.pointer] {
            let folder = path.parent().unwrap_or(path);
            fs::create_dir_all(folder).map_err(failed(folder))?;
        }

        let lock_path = contents.with_added_extension("lock");
        let lock = fs::File::create(&lock_path).and_then(|file| file.lock().map(|()| file));
        let lock = lock.map_err(failed(&lock_path))?;
        if !contents.exists() {
            let unfinished = contents.with_added_extension("part");
            self.receive(file, &url, &description, &unfinished)?;
            verify(file, &description, &unfinished)?;
            fs::rename(&unfinished, &contents).map_err(failed(&contents))?;
        }
        link(&contents, &description.etag, file.pointer).map_err(failed(file.pointer))?;
        drop(lock);
        Ok(())
    }

    /// Gets what is missing of a file.
    fn receive(
        &self,
        file: &File<'_>,
        url: &str,
        description: &Description,
        unfinished: &Path,
    ) -> Result<(), Trouble> {
        let show = self.show(file.name, description.size);
        let mut attempt = 1;
        loop {
            match self.receive_once(file, url, description, unfinished, &show) {
                Err(Trouble::Answer(HubError::Interrupted { .. })) if attempt < ATTEMPTS => {
                    thread::sleep(Duration::from_millis(100 << attempt));
                    attempt += 1;
                }
                done => return done,
            }
        }
    }

    fn receive_once(
        &self,
        file: &File<'_>,
        url: &str,
        description: &Description,
        unfinished: &Path,
        show: &dyn Fn(u64),
    ) -> Result<(), Trouble> {
        let size = description.size;
        let mut options = fs::File::options();
        let opened = options.create(true).append(true).open(unfinished);
        let mut target = opened.map_err(failed(unfinished))?;
        let mut received = target.metadata().map_err(failed(unfinished))?.len();
        if received > size {
            target.set_len(0).map_err(failed(unfinished))?;
            received = 0;
        }
        if received == size {
            return Ok(());
        }
        let (start, body) = self.body(url, received, &file.full_name())?;
        if start < received {
            target.set_len(start).map_err(failed(unfinished))?;
            received = start;
        }
        let mut reader = body.into_reader();
        let mut part = vec![0; PART];
        loop {
            show(received);
            let count = match reader.read(&mut part) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Ok(0) if received == size => break,
                Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
                read => read,
            };
            let count = count.map_err(|source| HubError::Interrupted {
                file: file.full_name(),
                received,
                size,
                source,
            })?;
            received += count as u64;
            if received > size {
                let reason = format!("it is longer than the {size} bytes that it should have");
                fs::remove_file(unfinished).ok();
                return Err(HubError::Answer {
                    url: url.to_owned(),
                    reason,
                }
                .into());
            }
            target
                .write_all(&part[..count])
                .map_err(failed(unfinished))?;
        }
        target.sync_all().map_err(failed(unfinished))?;
        Ok(())
    }

    /// What shows how far a file is: the caller's function, or a bar where there is a terminal.
    fn show(&self, name: &str, size: u64) -> Box<dyn Fn(u64)> {
        let name = name.to_owned();
        if let Some(report) = self.report.clone() {
            return Box::new(move |received| {
                report(Progress {
                    file: &name,
                    received,
                    size,
                });
            });
        }
        let layout = "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
        let style = ProgressStyle::with_template(layout);
        let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = ProgressBar::new(size).with_style(style).with_message(name);
        Box::new(move |received| {
            bar.set_position(received);
            if received == size {
                bar.finish();
            }
        })
    }
}

/// Makes the error of a file in the cache.
fn failed(path: &Path) -> impl Fn(io::Error) -> HubError {
    move |source| HubError::Write {
        path: path.to_owned(),
        source,
    }
}

/// Compares the contents with the checksum that the hub gives them, and removes them if they differ.
fn verify(file: &File<'_>, description: &Description, unfinished: &Path) -> Result<(), HubError> {
    let expected = description.etag.to_ascii_lowercase();
    let found = checksums(unfinished, &expected, description.size);
    let found = found.map_err(failed(unfinished))?;
    if found.is_empty() || found.contains(&expected) {
        return Ok(());
    }
    fs::remove_file(unfinished).map_err(failed(unfinished))?;
    Err(HubError::Checksum {
        file: file.full_name(),
        expected,
        found: found[0].clone(),
    })
}

/// The checksums of the kind that `like` is: SHA-256, or SHA-1 with and without the header that git puts
/// before the contents. None if it is neither.
fn checksums(path: &Path, like: &str, size: u64) -> io::Result<Vec<String>> {
    if !like.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Ok(Vec::new());
    }
    match like.len() {
        64 => Ok(vec![digest(Sha256::new(), path)?]),
        40 => {
            let git = Sha1::new_with_prefix(format!("blob {size}\0"));
            Ok(vec![digest(git, path)?, digest(Sha1::new(), path)?])
        }
        _ => Ok(Vec::new()),
    }
}

fn digest<D: Digest>(mut digest: D, path: &Path) -> io::Result<String> {
    let mut source = fs::File::open(path)?;
    let mut part = vec![0; PART];
    loop {
        match source.read(&mut part)? {
            0 => break,
            count => digest.update(&part[..count]),
        }
    }
    let hex = |byte: &u8| format!("{byte:02x}");
    Ok(digest.finalize().iter().map(hex).collect())
}

/// Gives contents their name in the model: as a link, so that they are kept once for all revisions.
fn link(contents: &Path, etag: &str, pointer: &Path) -> io::Result<()> {
    let make = || {
        #[cfg(unix)]
        return std::os::unix::fs::symlink(Path::new("../../blobs").join(etag), pointer);
        #[cfg(not(unix))]
        return fs::hard_link(contents, pointer).or_else(|_| fs::copy(contents, pointer).map(drop));
    };
    #[cfg(unix)]
    let _ = contents;
    #[cfg(not(unix))]
    let _ = etag;
    match make() {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            // A link to something that is gone.
            fs::remove_file(pointer)?;
            make()
        }
        made => made,
    }
}
