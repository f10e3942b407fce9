//! Models by their name on the Hugging Face hub.
//!
//! `hub:owner/name`, or `hub:owner/name@revision` for a branch, tag or commit, stands for the files of a
//! model that this library can load: configuration, weights as safetensors, tokenizer. They are fetched
//! once and kept in the cache that Python and the other programs of the hub use, in its layout (that of
//! the `hf-hub` crate, which also names the addresses to ask); so what one has fetched the other finds.
//!
//! Nothing that is not whole and right gets a name in the cache: a download that was interrupted goes on
//! where it stopped, the checksum that the hub gives is compared before the file appears, and a model
//! gets its name when all its files are there. The names that a server sends never lead out of the cache.
//!
//! These variables of the environment are honoured: `HF_ENDPOINT`, another hub; `HF_HOME` and
//! `HF_HUB_CACHE`, the place of the cache; `HF_TOKEN`, or else the file `token` that `hf auth login`
//! writes; `HF_HUB_OFFLINE`, to use the cache alone. Without network a model in the cache is used as it is.

mod download;
mod error;
mod requests;
mod source;

pub use error::HubError;
pub use source::{HubModel, ModelSource};

use download::File;
use hf_hub::Cache;
use requests::{Listing, Trouble};
use std::{
    env, fmt, fs,
    path::{Path, PathBuf},
    sync::Arc,
};

/// How far the download of one file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress<'a> {
    /// The name of the file.
    pub file: &'a str,
    /// The bytes that have arrived, those of earlier calls among them.
    pub received: u64,
    /// The bytes of the file.
    pub size: u64,
}

type Report = Arc<dyn Fn(Progress<'_>) + Send + Sync>;

/// Where the hub is, and where copies of its models are kept.
///
/// # Example
///
/// ```no_run
/// use mtla_models::hub::{Hub, ModelSource};
///
/// // As the environment says.
/// let directory = ModelSource::parse("hub:owner/name")?.resolve()?;
///
/// // A cache of one's own, and no bars on the terminal.
/// let hub = Hub::from_env()?
///     .with_cache("/data/models")
///     .with_progress(|progress| log(progress.file, progress.received, progress.size));
/// let directory = ModelSource::parse("hub:owner/name@v1.0")?.resolve_with(&hub)?;
/// # fn log(_: &str, _: u64, _: u64) {}
/// # Ok::<(), mtla_models::hub::HubError>(())
/// ```
#[derive(Clone)]
pub struct Hub {
    endpoint: String,
    cache: PathBuf,
    token: Option<String>,
    offline: bool,
    report: Option<Report>,
    agent: ureq::Agent,
}

impl fmt::Debug for Hub {
    /// Without the token.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hub")
            .field("endpoint", &self.endpoint)
            .field("cache", &self.cache)
            .field("offline", &self.offline)
            .finish_non_exhaustive()
    }
}

impl Hub {
    /// The hub that the environment names.
    ///
    /// # Errors
    ///
    /// If there is no place for the cache.
    pub fn from_env() -> Result<Self, HubError> {
        Self::from_variables(|name| env::var(name).ok())
    }

    fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Result<Self, HubError> {
        let variable = |name| variable(name).filter(|value| !value.is_empty());
        let below = |name, folder| variable(name).map(|path| Path::new(&path).join(folder));
        let home = variable("HF_HOME")
            .map(PathBuf::from)
            .or_else(|| below("XDG_CACHE_HOME", "huggingface"))
            .or_else(|| Some(env::home_dir()?.join(".cache").join("huggingface")))
            .ok_or(HubError::NoCache)?;
        let usual = Cache::new(home.join("hub"));
        let token = variable("HF_TOKEN").map(|token| token.trim().to_owned());
        let yes = |value: String| !matches!(value.as_str(), "0" | "false" | "no" | "off");
        let hub = Self {
            endpoint: String::new(),
            token: token.or_else(|| usual.token()),
            cache: variable("HF_HUB_CACHE").map_or_else(|| usual.path().clone(), PathBuf::from),
            offline: variable("HF_HUB_OFFLINE").is_some_and(|value| yes(value.to_lowercase())),
            report: None,
            agent: requests::agent(),
        };
        let endpoint = variable("HF_ENDPOINT");
        Ok(hub.with_endpoint(endpoint.as_deref().unwrap_or("https://huggingface.co")))
    }

    /// Another hub: the address before `/owner/name`.
    pub fn with_endpoint(mut self, endpoint: &str) -> Self {
        endpoint
            .trim_end_matches('/')
            .clone_into(&mut self.endpoint);
        self
    }

    /// Another folder for the cache, which `HF_HUB_CACHE` names otherwise.
    pub fn with_cache(mut self, folder: impl Into<PathBuf>) -> Self {
        self.cache = folder.into();
        self
    }

    /// The token for private and gated models, or none. It is sent to the hub alone.
    pub fn with_token(mut self, token: Option<String>) -> Self {
        self.token = token;
        self
    }

    /// Uses the cache alone.
    pub fn offline(mut self) -> Self {
        self.offline = true;
        self
    }

    /// Is called as files arrive, instead of the bars that a terminal shows.
    pub fn with_progress(mut self, report: impl Fn(Progress<'_>) + Send + Sync + 'static) -> Self {
        self.report = Some(Arc::new(report));
        self
    }

    /// The directory of a model, whose files are fetched if they are not in the cache.
    ///
    /// # Errors
    ///
    /// If the hub cannot be reached and the cache does not have the model, the hub does not have it, the
    /// download is interrupted or arrives with a wrong checksum, or the cache cannot be written.
    pub fn fetch(&self, model: &HubModel) -> Result<PathBuf, HubError> {
        let known = self.known(model);
        let unreachable = |source| HubError::Unreachable {
            model: model.to_string(),
            endpoint: self.endpoint.clone(),
            cache: self.cache.clone(),
            source,
        };
        if self.offline || (model.is_commit() && known.is_some()) {
            return known.ok_or_else(|| unreachable(None));
        }
        let listing = match self.list(model) {
            Ok(listing) => listing,
            Err(Trouble::Network(source)) => {
                return known.ok_or_else(|| unreachable(Some(source)));
            }
            Err(Trouble::Answer(error)) => return Err(error),
        };
        let fetched = self.fetch_all(model, &listing);
        fetched.map_err(|trouble| match trouble {
            Trouble::Network(source) => unreachable(Some(source)),
            Trouble::Answer(error) => error,
        })
    }

    fn fetch_all(&self, model: &HubModel, listing: &Listing) -> Result<PathBuf, Trouble> {
        let names = source::of_use(&listing.files);
        if names.is_empty() {
            let model = model.to_string();
            return Err(HubError::Nothing { model }.into());
        }
        let cached = Cache::new(self.cache.clone()).repo(model.repo());
        let directory = cached.pointer_path(&listing.commit);
        for name in names {
            let pointer = directory.join(name);
            if !pointer.exists() {
                self.download(&File {
                    model,
                    name,
                    commit: &listing.commit,
                    pointer: &pointer,
                })?;
            }
        }
        let written = cached.create_ref(&listing.commit);
        written.map_err(|source| HubError::Write {
            path: directory.clone(),
            source,
        })?;
        Ok(directory)
    }

    /// The directory of a model that was fetched before.
    fn known(&self, model: &HubModel) -> Option<PathBuf> {
        let cache = Cache::new(self.cache.clone());
        let folder = cache.path().join(model.repo().folder_name());
        let name = folder.join("refs").join(model.revision());
        let commit = fs::read_to_string(name).ok()?;
        let commit = Some(commit.trim()).filter(|commit| source::is_plain(commit))?;
        let directory = folder.join("snapshots").join(commit);
        directory.is_dir().then_some(directory)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hub(variables: &[(&str, &str)]) -> Hub {
        let find = |name: &str| variables.iter().find(|(key, _)| *key == name);
        Hub::from_variables(|name| find(name).map(|(_, value)| (*value).to_owned())).unwrap()
    }

    #[test]
    fn the_environment_is_honoured() {
        let home = tempfile::tempdir().unwrap();
        fs::write(home.path().join("token"), "from-file\n").unwrap();
        let home = home.path().to_str().unwrap();

        let usual = hub(&[("HF_HOME", home)]);
        assert_eq!(usual.endpoint, "https://huggingface.co");
        assert_eq!(usual.cache, Path::new(home).join("hub"));
        assert_eq!(usual.token.as_deref(), Some("from-file"));
        assert!(!usual.offline);

        let other = hub(&[
            ("HF_HOME", home),
            ("HF_HUB_CACHE", "/data/cache"),
            ("HF_ENDPOINT", "http://localhost:8080/"),
            ("HF_TOKEN", "from-variable"),
            ("HF_HUB_OFFLINE", "1"),
        ]);
        assert_eq!(other.endpoint, "http://localhost:8080");
        assert_eq!(other.cache, Path::new("/data/cache"));
        assert_eq!(other.token.as_deref(), Some("from-variable"));
        assert!(other.offline);
        assert!(!format!("{other:?}").contains("from-variable"));

        let xdg = hub(&[("XDG_CACHE_HOME", "/xdg"), ("HF_HUB_OFFLINE", "0")]);
        assert_eq!(xdg.cache, Path::new("/xdg/huggingface/hub"));
        assert!(!xdg.offline);
    }
}
