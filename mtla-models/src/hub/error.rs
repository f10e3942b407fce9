//! What can go wrong between a name and a model directory.

use std::{error::Error, io, path::PathBuf};

/// Why a model could not be fetched. The message names the model or file, what is wrong and the cure.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// The text names no model.
    #[error(
        "`{given}` names no model of the hub: {reason}; write hub:owner/name or hub:owner/name@revision"
    )]
    Name {
        /// What was given.
        given: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// There is no place for the cache.
    #[error("there is no home directory for the cache of models; set HF_HOME to a folder")]
    NoCache,
    /// The hub could not be reached, and the cache does not have the model.
    #[error(
        "{endpoint} cannot be reached, and {model} is not in the cache {}; check the network, \
         HF_ENDPOINT and HF_HUB_OFFLINE, or give the path of a model directory",
        cache.display()
    )]
    Unreachable {
        /// The model.
        model: String,
        /// Where the hub was looked for.
        endpoint: String,
        /// Where copies are kept.
        cache: PathBuf,
        /// What the network said; nothing if it was not asked.
        source: Option<Box<dyn Error + Send + Sync>>,
    },
    /// The hub does not have it, or not for everyone.
    #[error(
        "{what} is not on {endpoint}, or not for everyone (status {status}); check owner, name and \
         revision, and for a private or gated model set HF_TOKEN"
    )]
    NotFound {
        /// The model, or a file of it.
        what: String,
        /// The hub.
        endpoint: String,
        /// The status of the answer: 401, 403 or 404.
        status: u16,
    },
    /// The hub answered with something that cannot be used.
    #[error(
        "the answer of the hub to {url} cannot be used: {reason}; try again later, or check HF_ENDPOINT"
    )]
    Answer {
        /// What was asked for.
        url: String,
        /// What is wrong with the answer.
        reason: String,
    },
    /// The model changed between the list of its files and the files.
    #[error("{model} changed while it was fetched; try again, or name a revision")]
    Changed {
        /// The model.
        model: String,
    },
    /// The model has no file that could be loaded.
    #[error(
        "{model} has no config.json, tokenizer or .safetensors files, so there is nothing to load"
    )]
    Nothing {
        /// The model.
        model: String,
    },
    /// The connection ended within a file. What arrived is kept.
    #[error(
        "the download of {file} stopped after {received} of {size} bytes; try again to go on from there"
    )]
    Interrupted {
        /// The model and the file.
        file: String,
        /// The bytes that are on the disk.
        received: u64,
        /// The size of the file.
        size: u64,
        /// What the network said.
        source: io::Error,
    },
    /// The bytes of a file are not those that the hub promised. They are removed.
    #[error(
        "{file} is not what the hub promised: its checksum is {found}, expected {expected}; it was \
         removed, try again"
    )]
    Checksum {
        /// The model and the file.
        file: String,
        /// The checksum that the hub gives.
        expected: String,
        /// The checksum of what arrived.
        found: String,
    },
    /// The cache could not be written.
    #[error("{} in the cache cannot be written; is there space, and is it writable?", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}
