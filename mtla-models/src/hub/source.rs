//! What names a model, and which of its files are of use.

use super::{Hub, HubError};
use hf_hub::{Repo, RepoType};
use std::{
    fmt,
    path::{Path, PathBuf},
};

/// What stands before the name of a model on the hub.
const PREFIX: &str = "hub:";

/// Where a model is: a directory, or a name on the hub.
///
/// # Example
///
/// ```
/// use mtla_models::hub::ModelSource;
/// use std::path::Path;
///
/// // A path stands for itself, and is not looked at.
/// let directory = ModelSource::parse("models/small")?.resolve()?;
/// assert_eq!(directory, Path::new("models/small"));
///
/// let ModelSource::Hub(model) = ModelSource::parse("hub:owner/name@v1.0")? else {
///     panic!("a name on the hub");
/// };
/// assert_eq!((model.name(), model.revision()), ("owner/name", "v1.0"));
/// assert!(ModelSource::parse("hub:owner/../name").is_err());
/// # Ok::<(), mtla_models::hub::HubError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelSource {
    /// A directory.
    Directory(PathBuf),
    /// A name on the hub.
    Hub(HubModel),
}

impl ModelSource {
    /// Reads `hub:owner/name`, `hub:owner/name@revision` or the path of a directory.
    ///
    /// # Errors
    ///
    /// If what follows `hub:` is no name.
    pub fn parse(text: &str) -> Result<Self, HubError> {
        match text.strip_prefix(PREFIX) {
            Some(name) => HubModel::parse(name).map(Self::Hub),
            None => Ok(Self::Directory(text.into())),
        }
    }

    /// The directory, fetched from the hub that the environment names if it has to be.
    ///
    /// # Errors
    ///
    /// As for [`Hub::fetch`].
    pub fn resolve(&self) -> Result<PathBuf, HubError> {
        match self {
            Self::Directory(path) => Ok(path.clone()),
            Self::Hub(model) => Hub::from_env()?.fetch(model),
        }
    }

    /// The directory, fetched from this hub if it has to be.
    ///
    /// # Errors
    ///
    /// As for [`Hub::fetch`].
    pub fn resolve_with(&self, hub: &Hub) -> Result<PathBuf, HubError> {
        match self {
            Self::Directory(path) => Ok(path.clone()),
            Self::Hub(model) => hub.fetch(model),
        }
    }
}

/// A model on the hub: its owner and name, and a branch, tag or commit.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct HubModel {
    name: String,
    revision: String,
}

impl HubModel {
    /// Reads `owner/name` or `owner/name@revision`; without a revision it is the branch `main`.
    ///
    /// # Errors
    ///
    /// If that is not what the text looks like.
    pub fn parse(text: &str) -> Result<Self, HubError> {
        let (name, revision) = text.split_once('@').unwrap_or((text, "main"));
        let wrong = |reason| {
            Err(HubError::Name {
                given: text.to_owned(),
                reason,
            })
        };
        let parts: Vec<&str> = name.split('/').collect();
        if !matches!(parts.len(), 1 | 2) {
            return wrong("the name has an owner and one name");
        }
        if !parts.iter().all(|part| is_plain(part)) {
            return wrong("owner and name are letters, digits, `-`, `_` and `.`");
        }
        if !revision.split('/').all(is_plain) {
            return wrong("a revision is a branch, tag or commit");
        }
        Ok(Self {
            name: name.to_owned(),
            revision: revision.to_owned(),
        })
    }

    /// Owner and name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The branch, tag or commit.
    pub fn revision(&self) -> &str {
        &self.revision
    }

    /// Whether the revision is a commit, whose files never change.
    pub(super) fn is_commit(&self) -> bool {
        self.revision.len() == 40 && self.revision.bytes().all(|b| b.is_ascii_hexdigit())
    }

    pub(super) fn repo(&self) -> Repo {
        Repo::with_revision(self.name.clone(), RepoType::Model, self.revision.clone())
    }
}

impl fmt::Display for HubModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}@{}", self.name, self.revision)
    }
}

/// Whether a text is safe as the name of one file and as a part of an address.
pub(super) fn is_plain(text: &str) -> bool {
    let safe = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    !text.is_empty() && text.len() <= 128 && !text.starts_with('.') && text.bytes().all(safe)
}

/// The files that can be loaded. Of several copies of the weights it is the one under the usual name.
pub(super) fn of_use(files: &[String]) -> Vec<&str> {
    let has_ending =
        |name: &str, ending: &str| Path::new(name).extension().is_some_and(|e| e == ending);
    let is_weights = |name: &str| has_ending(name, "safetensors");
    let is_usual = |name: &str| is_weights(name) && name.starts_with("model");
    let one_file = files.iter().any(|name| name == "model.safetensors");
    let usual = files.iter().any(|name| is_usual(name));
    let wanted = |name: &str| match name {
        _ if is_weights(name) && one_file => name == "model.safetensors",
        _ if is_weights(name) => is_usual(name) || !usual,
        "tokenizer.model" | "merges.txt" | "vocab.txt" => true,
        _ => has_ending(name, "json") || has_ending(name, "jinja"),
    };
    let names = files.iter().map(String::as_str);
    names
        .filter(|name| is_plain(name) && wanted(name))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_an_owner_a_name_and_a_revision() {
        let read = |text: &str| HubModel::parse(text).map(|m| (m.name, m.revision));
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        assert_eq!(read("a/b").unwrap(), pair("a/b", "main"));
        assert_eq!(read("gpt2").unwrap(), pair("gpt2", "main"));
        assert_eq!(read("a/b@refs/pr/1").unwrap(), pair("a/b", "refs/pr/1"));
        for bad in [
            "", "/", "a/", "/b", "a/b/c", "a/..", "../b", "a/b@", "a/b@../x", "a b/c", "a/b@x@y",
        ] {
            let error = read(bad).unwrap_err();
            assert!(
                error.to_string().contains("hub:owner/name"),
                "{bad}: {error}"
            );
        }
    }

    #[test]
    fn what_cannot_be_loaded_is_left_out() {
        let of_use = |names: &[&str]| {
            let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
            of_use(&names).join(" ")
        };
        let common = [
            "config.json",
            "README.md",
            ".gitattributes",
            "tokenizer.json",
            "chat_template.jinja",
            "pytorch_model.bin",
            "modeling.py",
            "original/params.json",
            "../../outside.json",
            "a\\b.json",
        ];
        assert_eq!(
            of_use(&common),
            "config.json tokenizer.json chat_template.jinja"
        );
        assert_eq!(
            of_use(&[
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
                "consolidated.safetensors"
            ]),
            "model-00001-of-00002.safetensors model-00002-of-00002.safetensors"
        );
        assert_eq!(
            of_use(&["model.safetensors", "model.fp16.safetensors"]),
            "model.safetensors"
        );
        assert_eq!(of_use(&["weights.safetensors"]), "weights.safetensors");
    }
}
