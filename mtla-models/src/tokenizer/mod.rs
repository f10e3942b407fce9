//! Text to token ids and back with the files that Hugging Face models carry, and chats as prompts.
//!
//! [`Tokenizer::load`] reads `tokenizer.json` through the `tokenizers` crate, and beside it, where they
//! are there, `tokenizer_config.json`, `special_tokens_map.json` and `chat_template.jinja`. It gives the
//! ids and texts that `AutoTokenizer` gives in Python: special tokens around a text as the files say, and
//! tokens that only the configuration knows added to the vocabulary. Padding and truncation in the file
//! are not applied, as in Python.
//!
//! * [`TextStream`] decodes one token after the other, and never shows a part of a character;
//! * [`Chat`] is a conversation that the model's own template turns into a prompt.
//!
//! Files may come from anywhere: what is read is bounded in size, and a template in work and memory.

mod chat;
mod error;
mod files;
mod python;
mod stream;

pub use chat::{Chat, Message};
pub use error::TokenizerError;
pub use stream::TextStream;

use files::{Around, Settings, TOKENIZER_LIMIT, Templates};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    fmt, io,
    path::{Path, PathBuf},
};
use tokenizers::{AddedToken, Tokenizer as Inner, processors::template::TemplateProcessing};

/// The tokenizer of a model directory.
///
/// # Example
///
/// ```
/// use mtla_models::tokenizer::Tokenizer;
/// # let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/llama_mtla/tokenizer");
///
/// let tokenizer = Tokenizer::load(directory)?;
/// let ids = tokenizer.encode("The ferry leaves at seven.")?;
/// assert_eq!(Some(ids[0]), tokenizer.bos());
/// assert_eq!(tokenizer.decode(&ids)?, "The ferry leaves at seven.");
/// assert_eq!(tokenizer.decode_with_special(&ids)?, "<s>The ferry leaves at seven.");
///
/// // A model with fewer rows in its embedding than there are tokens is found out before it runs.
/// assert!(tokenizer.fits(300).is_ok());
/// assert!(tokenizer.fits(299).unwrap_err().to_string().contains("id 299"));
/// # Ok::<(), mtla_models::tokenizer::TokenizerError>(())
/// ```
#[derive(Clone)]
pub struct Tokenizer {
    inner: Inner,
    path: PathBuf,
    roles: BTreeMap<&'static str, String>,
    clean_up: bool,
    templates: Templates,
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer")
            .field("path", &self.path)
            .field("size", &self.size())
            .finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Reads the tokenizer of a model directory.
    ///
    /// # Errors
    ///
    /// If there is no `tokenizer.json`, or a file cannot be read or used.
    pub fn load(directory: impl AsRef<Path>) -> Result<Self, TokenizerError> {
        let directory = directory.as_ref();
        let path = directory.join("tokenizer.json");
        let bytes = files::read(&path, TOKENIZER_LIMIT)?.ok_or_else(|| TokenizerError::Read {
            path: path.clone(),
            source: io::ErrorKind::NotFound.into(),
        })?;
        Self::build(path, &bytes, Settings::load(directory)?)
    }

    /// The tokenizer of a `tokenizer.json` alone, for programs without a disk. It names no tokens with a role, and has
    /// no chat template.
    ///
    /// # Errors
    ///
    /// If it cannot be used.
    pub fn from_json(json: &[u8]) -> Result<Self, TokenizerError> {
        Self::build("tokenizer.json".into(), json, Settings::default())
    }

    fn build(path: PathBuf, bytes: &[u8], settings: Settings) -> Result<Self, TokenizerError> {
        let invalid = |reason| TokenizerError::Invalid {
            path: path.clone(),
            reason,
        };
        let json = serde_json::from_slice(bytes).map_err(|error| invalid(error.to_string()))?;
        check_templates(&json).map_err(invalid)?;
        let mut inner = Inner::from_bytes(bytes).map_err(|error| invalid(error.to_string()))?;
        let unlimited = inner.with_padding(None).with_truncation(None);
        unlimited.map_err(|error| invalid(error.to_string()))?;

        add_missing(&mut inner, &settings);
        let content = |token: &files::Token| token.content().to_owned();
        let roles: BTreeMap<&'static str, String> = settings
            .roles
            .iter()
            .map(|(&role, token)| (role, content(token)))
            .collect();
        if let Some(around) = settings.around {
            put_around(&mut inner, around, &roles).map_err(invalid)?;
        }
        Ok(Self {
            inner,
            path,
            roles,
            clean_up: settings.clean_up,
            templates: settings.templates,
        })
    }

    /// The number of tokens. Ids may be larger where a vocabulary has gaps; see [`Self::fits`].
    pub fn size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The id of a token, written as in the vocabulary.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// How a token is written in the vocabulary.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The token that begins a text.
    pub fn bos(&self) -> Option<u32> {
        self.role("bos_token")
    }

    /// The token that ends a text.
    pub fn eos(&self) -> Option<u32> {
        self.role("eos_token")
    }

    /// The token that fills up shorter rows of a batch.
    pub fn pad(&self) -> Option<u32> {
        self.role("pad_token")
    }

    fn role(&self, name: &str) -> Option<u32> {
        self.id(self.roles.get(name)?)
    }

    /// Checks that every token has a row in an embedding of `vocab_size` rows.
    ///
    /// # Errors
    ///
    /// Names the first token that has none.
    pub fn fits(&self, vocab_size: usize) -> Result<(), TokenizerError> {
        let around = self.encode("")?;
        let around = around.into_iter().map(|id| {
            let token = self
                .token(id)
                .unwrap_or_else(|| "in the post-processor".into());
            (token, id)
        });
        let beyond = self
            .inner
            .get_vocab(true)
            .into_iter()
            .chain(around)
            .filter(|&(_, id)| id as usize >= vocab_size);
        match beyond.min_by_key(|&(_, id)| id) {
            None => Ok(()),
            Some((token, id)) => Err(TokenizerError::DoesNotFit {
                path: self.path.clone(),
                token,
                id,
                vocabulary: vocab_size,
            }),
        }
    }

    /// The tokens of a text, with the special tokens that the model expects around it. Special tokens
    /// that the text spells out are those tokens.
    ///
    /// # Errors
    ///
    /// If the vocabulary has no token for a part of the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        self.encode_as(text, true)
    }

    /// The tokens of a text alone: what goes on after other tokens, or has its special tokens already.
    ///
    /// # Errors
    ///
    /// If the vocabulary has no token for a part of the text.
    pub fn encode_bare(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        self.encode_as(text, false)
    }

    fn encode_as(&self, text: &str, special: bool) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self.inner.encode_fast(text, special);
        Ok(encoding.map_err(TokenizerError::Encode)?.get_ids().to_vec())
    }

    /// The text of tokens, without special tokens. Ids without a token are left out, because embeddings
    /// often have more rows than there are tokens.
    ///
    /// # Errors
    ///
    /// If the tokenizer cannot put the tokens together.
    pub fn decode(&self, ids: &[u32]) -> Result<String, TokenizerError> {
        self.decode_as(ids, true)
    }

    /// The text of tokens, special tokens among it.
    ///
    /// # Errors
    ///
    /// If the tokenizer cannot put the tokens together.
    pub fn decode_with_special(&self, ids: &[u32]) -> Result<String, TokenizerError> {
        self.decode_as(ids, false)
    }

    fn decode_as(&self, ids: &[u32], skip_special: bool) -> Result<String, TokenizerError> {
        let text = self.decode_raw(ids, skip_special)?;
        Ok(if self.clean_up {
            python::clean_up(&text)
        } else {
            text
        })
    }

    /// As the tokenizer puts tokens together, without the cleaning up afterwards.
    fn decode_raw(&self, ids: &[u32], skip_special: bool) -> Result<String, TokenizerError> {
        let text = self.inner.decode(ids, skip_special);
        text.map_err(TokenizerError::Decode)
    }

    fn is_special(&self, id: u32) -> bool {
        let added = self.inner.get_added_vocabulary();
        self.token(id)
            .is_some_and(|token| added.is_special_token(&token))
    }
}

/// Tokens that the configuration names and `tokenizer.json` does not are added at the end.
fn add_missing(inner: &mut Inner, settings: &Settings) {
    let known = inner.get_added_tokens_decoder();
    let missing: Vec<AddedToken> = settings
        .added
        .iter()
        .filter(|token| known.values().all(|known| known.content != token.content()))
        .map(files::Token::to_added)
        .collect();
    inner.add_tokens(&missing);
}

/// Replaces what `tokenizer.json` puts around a text.
fn put_around(
    inner: &mut Inner,
    around: Around,
    roles: &BTreeMap<&'static str, String>,
) -> Result<(), String> {
    let special = |wanted: bool, role| {
        let token: &String = roles.get(role).filter(|_| wanted)?;
        Some((token.clone(), inner.token_to_id(token)?))
    };
    let (bos, eos) = (
        special(around.bos, "bos_token"),
        special(around.eos, "eos_token"),
    );
    let name = |token: &Option<(String, u32)>| token.as_ref().map(|(token, _)| token.clone());
    let single = [name(&bos), Some("$A".to_owned()), name(&eos)];
    let single: Vec<String> = single.into_iter().flatten().collect();
    let processor = TemplateProcessing::builder()
        .try_single(single)
        .map_err(|error| error.clone())?
        .special_tokens(bos.into_iter().chain(eos).collect::<Vec<_>>())
        .build()
        .map_err(|error| error.to_string())?;
    inner.with_post_processor(Some(processor));
    Ok(())
}

/// Every special token that a template puts around a text has to be among the template's own tokens: the
/// `tokenizers` crate relies on it without a check.
fn check_templates(json: &Value) -> Result<(), String> {
    let mut processors = vec![&json["post_processor"]];
    while let Some(processor) = processors.pop() {
        processors.extend(processor["processors"].as_array().into_iter().flatten());
        let pieces = ["single", "pair"].map(|name| processor[name].as_array());
        for piece in pieces.into_iter().flatten().flatten() {
            let Some(token) = piece["SpecialToken"]["id"].as_str() else {
                continue;
            };
            if processor["special_tokens"].get(token).is_none() {
                return Err(format!(
                    "in `post_processor`, `{token}` is missing among the special_tokens"
                ));
            }
        }
    }
    Ok(())
}
