//! The text to learn from: the user's own, or stories that are made up.
//!
//! [`load`] reads one file, or every text file below a folder, whatever it is called. A folder is
//! taken as it comes: what is hidden, empty, a copy or no text is left out, and the list of what was
//! left out is part of the result. A file that the user names is meant to be read, so there anything
//! that keeps it from being read is an error.
//!
//! What is measured has to be unseen, so the documents are then [`split`] three ways: to train on, to
//! validate on while training, and to hold out for the final score.

mod split;

pub use split::{Split, split, stories};

use super::story::Story;
use split::SHARE;
use std::{
    collections::HashMap,
    fmt,
    fs::{self, File},
    hash::{DefaultHasher, Hash, Hasher},
    io::{self, Read},
    path::{Path, PathBuf},
};
use walkdir::{DirEntry, WalkDir};

/// The most text that [`load`] reads where the caller has no other limit, in bytes.
pub const MAX_BYTES: u64 = 1 << 30;

/// So many bytes of a file are looked at to tell whether it is text, before all of it is read.
const HEAD: u64 = 8192;

/// A text that is a unit: contexts do not reach across its ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    /// Where it comes from, such as a path below the corpus folder.
    pub name: String,
    /// Its text.
    pub text: String,
}

impl From<&Story> for Document {
    fn from(story: &Story) -> Self {
        let text = story.render();
        let name = text.split('.').next().unwrap_or_default().to_owned();
        Self { name, text }
    }
}

/// The documents found at a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loaded {
    /// The documents, in order of their paths; at least one.
    pub documents: Vec<Document>,
    /// What was left out of a folder.
    pub skipped: Vec<Skipped>,
}

/// Something in a folder that is not part of the corpus.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Skipped {
    /// Where it is.
    pub path: PathBuf,
    /// Why it was left out.
    pub reason: Reason,
}

/// Why something in a folder was left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// Its name begins with a dot.
    Hidden,
    /// It is a link, a pipe or a device, neither a file nor a folder.
    NotAFile,
    /// It is not UTF-8 text, or begins with zero bytes as other files do.
    NotText,
    /// There is nothing in it but spaces and line ends.
    Blank,
    /// An earlier document has the same text.
    Copy,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Hidden => "hidden",
            Self::NotAFile => "neither a file nor a folder",
            Self::NotText => "not UTF-8 text",
            Self::Blank => "blank",
            Self::Copy => "a copy",
        })
    }
}

/// Why there is no corpus.
#[derive(Debug, thiserror::Error)]
pub enum CorpusError {
    /// The system did not give the contents.
    #[error("{} cannot be read; check the path and its permissions", path.display())]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The path leads to a pipe, a device or the like, which might not end.
    #[error("{} is neither a file nor a folder; copy its text to a file", path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// The file is not UTF-8 text.
    #[error(
        "{} is not UTF-8 text: it goes wrong at byte {offset}; \
         convert it, for example with `iconv -f latin1 -t utf-8`", path.display()
    )]
    NotText {
        /// The file.
        path: PathBuf,
        /// The bytes before the first that is not part of a character.
        offset: usize,
    },
    /// There is more text than the limit allows.
    #[error("the corpus exceeds {limit} bytes at {}; choose less text, or a higher limit", path.display())]
    TooLarge {
        /// The file with which the limit was exceeded.
        path: PathBuf,
        /// The limit.
        limit: u64,
    },
    /// There is no text.
    #[error("there is no text in {}{}; give a text file, or a folder with some", path.display(), omissions(skipped))]
    Empty {
        /// The file or folder.
        path: PathBuf,
        /// What was left out.
        skipped: Vec<Skipped>,
    },
    /// The text cannot be divided into three parts.
    #[error(
        "{bytes} bytes of text are too few to train on, validate on and hold out; give at least {SHARE} characters"
    )]
    TooShort {
        /// The length of the text.
        bytes: usize,
    },
}

fn omissions(skipped: &[Skipped]) -> String {
    let first = skipped.first();
    first.map_or_else(String::new, |Skipped { path, reason }| {
        format!(
            " ({} left out; the first is {}, {reason})",
            skipped.len(),
            path.display()
        )
    })
}

/// Reads the file at `path`, or all text files below that folder: at most `max_bytes` of text
/// ([`MAX_BYTES`] is a good choice), which is held in memory.
///
/// In a folder, files come in the order of their paths. Hidden files and folders, links, files that
/// are not text, blank files and copies are left out and listed.
///
/// # Errors
///
/// If something cannot be read, a file given by its path is not UTF-8 text, there is no text at all,
/// or too much of it.
///
/// # Example
///
/// ```
/// use mtla_train::data::corpus;
///
/// # let folder = tempfile::tempdir()?;
/// # let folder = folder.path();
/// std::fs::write(folder.join("b.txt"), "Once upon a time")?;
/// std::fs::write(folder.join("a.rs"), "fn main() {}")?;
/// std::fs::write(folder.join("logo.png"), b"\x89PNG\0")?;
/// let loaded = corpus::load(folder, corpus::MAX_BYTES)?;
/// assert_eq!(loaded.documents[0].name, "a.rs");
/// assert_eq!(loaded.documents.len(), 2);
/// assert_eq!(loaded.skipped[0].reason.to_string(), "not UTF-8 text");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn load(path: impl AsRef<Path>, max_bytes: u64) -> Result<Loaded, CorpusError> {
    let path = path.as_ref();
    let kind = fs::metadata(path).map_err(read_error(path))?;
    let mut loader = Loader {
        left: max_bytes,
        limit: max_bytes,
        ..Loader::default()
    };
    if kind.is_dir() {
        loader.folder(path)?;
    } else if kind.is_file() {
        let text = loader.read(path)?;
        let text = String::from_utf8(text).map_err(|error| CorpusError::NotText {
            path: path.to_owned(),
            offset: error.utf8_error().valid_up_to(),
        })?;
        let name = path
            .file_name()
            .unwrap_or(path.as_os_str())
            .to_string_lossy()
            .into_owned();
        loader.add(path, name, text);
    } else {
        return Err(CorpusError::NotAFile {
            path: path.to_owned(),
        });
    }
    if loader.documents.is_empty() {
        return Err(CorpusError::Empty {
            path: path.to_owned(),
            skipped: loader.skipped,
        });
    }
    Ok(Loaded {
        documents: loader.documents,
        skipped: loader.skipped,
    })
}

/// Whether a file has a zero byte where it begins, as hardly a text has and most other files do.
fn looks_binary(path: &Path) -> io::Result<bool> {
    let mut head = Vec::new();
    File::open(path)?.take(HEAD).read_to_end(&mut head)?;
    Ok(head.contains(&0))
}

fn read_error(path: &Path) -> impl FnOnce(io::Error) -> CorpusError {
    move |source| CorpusError::Read {
        path: path.to_owned(),
        source,
    }
}

/// What has been read so far.
#[derive(Default)]
struct Loader {
    documents: Vec<Document>,
    skipped: Vec<Skipped>,
    /// The documents whose text has a certain hash.
    by_hash: HashMap<u64, Vec<usize>>,
    /// How many bytes may still be read.
    left: u64,
    limit: u64,
}

impl Loader {
    fn folder(&mut self, root: &Path) -> Result<(), CorpusError> {
        let mut entries = WalkDir::new(root)
            .min_depth(1)
            .sort_by_file_name()
            .into_iter();
        while let Some(entry) = entries.next() {
            let entry = entry.map_err(|error| {
                let path = error.path().unwrap_or(root).to_owned();
                CorpusError::Read {
                    path,
                    source: error.into(),
                }
            })?;
            if entry.file_name().as_encoded_bytes().starts_with(b".") {
                self.skip(entry.path(), Reason::Hidden);
                if entry.file_type().is_dir() {
                    entries.skip_current_dir();
                }
            } else if entry.file_type().is_file() {
                self.file(root, &entry)?;
            } else if !entry.file_type().is_dir() {
                self.skip(entry.path(), Reason::NotAFile);
            }
        }
        Ok(())
    }

    /// Adds a file of a folder if it is text.
    fn file(&mut self, root: &Path, entry: &DirEntry) -> Result<(), CorpusError> {
        let path = entry.path();
        let text = if looks_binary(path).map_err(read_error(path))? {
            None
        } else {
            String::from_utf8(self.read(path)?).ok()
        };
        if let Some(text) = text {
            let inside = path.strip_prefix(root).unwrap_or(path);
            let names: Vec<_> = inside.iter().map(|name| name.to_string_lossy()).collect();
            self.add(path, names.join("/"), text);
        } else {
            self.skip(path, Reason::NotText);
        }
        Ok(())
    }

    fn add(&mut self, path: &Path, name: String, text: String) {
        let mut hasher = DefaultHasher::new();
        text.hash(&mut hasher);
        let same_hash = self.by_hash.entry(hasher.finish()).or_default();
        if text.trim().is_empty() {
            self.skip(path, Reason::Blank);
        } else if same_hash
            .iter()
            .any(|&index| self.documents[index].text == text)
        {
            self.skip(path, Reason::Copy);
        } else {
            same_hash.push(self.documents.len());
            self.left -= text.len() as u64;
            self.documents.push(Document { name, text });
        }
    }

    fn skip(&mut self, path: &Path, reason: Reason) {
        self.skipped.push(Skipped {
            path: path.to_owned(),
            reason,
        });
    }

    /// The contents of a file; never more than the limit, whatever the file grows to meanwhile.
    fn read(&self, path: &Path) -> Result<Vec<u8>, CorpusError> {
        let file = File::open(path).map_err(read_error(path))?;
        let mut contents = Vec::new();
        file.take(self.left + 1)
            .read_to_end(&mut contents)
            .map_err(read_error(path))?;
        if contents.len() as u64 > self.left {
            return Err(CorpusError::TooLarge {
                path: path.to_owned(),
                limit: self.limit,
            });
        }
        Ok(contents)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(folder: &Path, files: &[(&str, &[u8])]) {
        for (name, contents) in files {
            let path = folder.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, contents).unwrap();
        }
    }

    fn names(documents: &[Document]) -> Vec<&str> {
        documents
            .iter()
            .map(|document| document.name.as_str())
            .collect()
    }

    #[test]
    fn a_folder_gives_its_text_files_in_order_and_a_list_of_the_others() {
        let folder = tempfile::tempdir().unwrap();
        let files: [(&str, &[u8]); 9] = [
            ("b/two.rs", b"fn two() {}"),
            ("b/one.txt", "Grüße".as_bytes()),
            ("a.md", b"# A"),
            ("c", b"no extension"),
            (".git/config", b"[core]"),
            ("binary", b"\x7fELF\0\0"),
            ("latin1.txt", b"Gr\xfc\xdfe"),
            ("blank.txt", b" \n\n"),
            ("z/copy.md", b"# A"),
        ];
        write(folder.path(), &files);
        let loaded = load(folder.path(), 100).unwrap();
        assert_eq!(
            names(&loaded.documents),
            ["a.md", "b/one.txt", "b/two.rs", "c"]
        );
        assert_eq!(loaded.documents[1].text, "Grüße");
        let skipped: Vec<(&str, Reason)> = loaded
            .skipped
            .iter()
            .map(|s| (s.path.file_name().unwrap().to_str().unwrap(), s.reason))
            .collect();
        let expected = [
            (".git", Reason::Hidden),
            ("binary", Reason::NotText),
            ("blank.txt", Reason::Blank),
            ("latin1.txt", Reason::NotText),
            ("copy.md", Reason::Copy),
        ];
        assert_eq!(skipped, expected);
    }

    #[test]
    fn a_file_is_a_corpus_too_and_has_to_be_text() {
        let folder = tempfile::tempdir().unwrap();
        write(
            folder.path(),
            &[("good", b"text"), ("bad", b"text \xff"), ("blank", b"\n")],
        );
        let good = load(folder.path().join("good"), 4).unwrap();
        assert_eq!(
            good.documents,
            [Document {
                name: "good".into(),
                text: "text".into()
            }]
        );

        let bad = load(folder.path().join("bad"), 100).unwrap_err();
        assert!(matches!(&bad, CorpusError::NotText { offset: 5, path } if path.ends_with("bad")));
        let message = bad.to_string();
        assert!(
            message.contains("byte 5") && message.contains("iconv"),
            "{message}"
        );

        let blank = load(folder.path().join("blank"), 100).unwrap_err();
        assert!(matches!(blank, CorpusError::Empty { .. }));
        let missing = load(folder.path().join("missing"), 100).unwrap_err();
        assert!(matches!(missing, CorpusError::Read { .. }));
    }

    #[test]
    fn an_empty_folder_says_what_was_left_out() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), &[("image", b"\0")]);
        let message = load(folder.path(), 100).unwrap_err().to_string();
        assert!(
            message.contains("1 left out") && message.contains("not UTF-8"),
            "{message}"
        );
    }

    #[test]
    fn the_limit_holds_for_all_files_together() {
        let folder = tempfile::tempdir().unwrap();
        write(
            folder.path(),
            &[("a", b"12345"), ("b", b"67890"), ("video", &[0; 1000])],
        );
        assert_eq!(load(folder.path(), 10).unwrap().documents.len(), 2);
        let error = load(folder.path(), 9).unwrap_err();
        assert!(matches!(&error, CorpusError::TooLarge { path, limit: 9 } if path.ends_with("b")));
    }

    #[cfg(unix)]
    #[test]
    fn links_and_special_files_neither_block_nor_loop() {
        use std::os::unix::{fs::symlink, net::UnixListener};

        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), &[("text", b"text")]);
        symlink(folder.path(), folder.path().join("loop")).unwrap();
        let _socket = UnixListener::bind(folder.path().join("socket")).unwrap();
        let loaded = load(folder.path(), 100).unwrap();
        assert_eq!(names(&loaded.documents), ["text"]);
        assert_eq!(loaded.skipped.len(), 2);
        assert!(
            loaded
                .skipped
                .iter()
                .all(|skipped| skipped.reason == Reason::NotAFile)
        );

        // A link that the user names is followed.
        let linked = load(folder.path().join("loop"), 100).unwrap();
        assert_eq!(linked.documents, loaded.documents);
        let endless = load("/dev/zero", 100).unwrap_err();
        assert!(matches!(endless, CorpusError::NotAFile { .. }));
    }
}
