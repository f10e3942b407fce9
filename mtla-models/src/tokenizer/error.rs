//! What can be wrong with the files of a tokenizer, and with what it is asked for.

use std::{error::Error, io, path::PathBuf};

/// Why a tokenizer could not be read or used. The message names the file, the place in it and the cure.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// A file could not be read.
    #[error("{} cannot be read; a model directory holds tokenizer.json", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file is larger than any tokenizer's.
    #[error(
        "{} has more than {limit} bytes, which no tokenizer needs; is it another file?",
        path.display()
    )]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The most bytes that are read.
        limit: u64,
    },
    /// A file says something that cannot be used.
    #[error("{} is not usable: {reason}; save the tokenizer again", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where in the file.
        reason: String,
    },
    /// A token has no row in the model's embedding.
    #[error(
        "token `{token}` of {} has id {id}, beyond the model's vocabulary of {vocabulary}; \
         use the tokenizer that was saved with the model, or resize the model's embedding to at least {}",
        path.display(),
        u64::from(*id) + 1
    )]
    DoesNotFit {
        /// The tokenizer's file.
        path: PathBuf,
        /// How the token is written.
        token: String,
        /// Its id.
        id: u32,
        /// The number of rows of the embedding.
        vocabulary: usize,
    },
    /// The text could not be taken apart.
    #[error("the text cannot be encoded")]
    Encode(#[source] Box<dyn Error + Send + Sync>),
    /// The tokens could not be put together.
    #[error("the tokens cannot be decoded")]
    Decode(#[source] Box<dyn Error + Send + Sync>),
    /// The tokenizer has no chat template, or none of this name.
    #[error(
        "{} has no chat template{}; write the prompt by hand, or add chat_template.jinja to the model directory",
        path.display(),
        name.as_ref().map(|name| format!(" named `{name}`")).unwrap_or_default()
    )]
    NoChatTemplate {
        /// The directory of the model.
        path: PathBuf,
        /// The name that was asked for.
        name: Option<String>,
    },
    /// The chat template is no template, or refuses the conversation.
    #[error("the chat template of {}: {reason}", path.display())]
    Chat {
        /// The file that holds the template.
        path: PathBuf,
        /// What the template says, with the line.
        reason: String,
    },
}
