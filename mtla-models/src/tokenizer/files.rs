//! The files of a tokenizer beside `tokenizer.json`: which tokens have a role, and the chat templates.

use super::TokenizerError;
use serde::{Deserialize, de::DeserializeOwned};
use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};
use tokenizers::AddedToken;

/// The most bytes of a `tokenizer.json`; the largest known have about 35 million.
pub(super) const TOKENIZER_LIMIT: u64 = 1 << 28;

/// The most bytes of any other file.
const LIMIT: u64 = 1 << 24;

/// The roles that a token may have, under the names that templates know them by.
const ROLES: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];

/// What the files beside `tokenizer.json` say.
#[derive(Default)]
pub(super) struct Settings {
    /// The tokens that have a role, by the role's name.
    pub(super) roles: BTreeMap<&'static str, Token>,
    /// Tokens that the vocabulary is to have beyond those in `tokenizer.json`.
    pub(super) added: Vec<Token>,
    /// Whether text is cleaned of spaces before punctuation.
    pub(super) clean_up: bool,
    /// Which tokens a family of tokenizers puts around every text, whatever `tokenizer.json` says.
    pub(super) around: Option<Around>,
    /// The chat templates.
    pub(super) templates: Templates,
}

/// Whether a text begins and ends with a special token.
#[derive(Debug, Clone, Copy)]
pub(super) struct Around {
    pub(super) bos: bool,
    pub(super) eos: bool,
}

/// Chat templates by name, and the file that they are from.
#[derive(Debug, Clone, Default)]
pub(super) struct Templates {
    pub(super) path: PathBuf,
    pub(super) by_name: BTreeMap<String, String>,
}

/// A token as these files write it: as text, or with the ways in which it is found in text.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub(super) enum Token {
    Text(String),
    Full {
        content: String,
        #[serde(default)]
        lstrip: bool,
        #[serde(default)]
        rstrip: bool,
        #[serde(default)]
        single_word: bool,
        normalized: Option<bool>,
        special: Option<bool>,
    },
}

impl Token {
    pub(super) fn content(&self) -> &str {
        match self {
            Self::Text(content) | Self::Full { content, .. } => content,
        }
    }

    /// The token for a vocabulary; it is special unless the file says otherwise.
    pub(super) fn to_added(&self) -> AddedToken {
        match self {
            Self::Text(content) => AddedToken::from(content, true),
            Self::Full {
                content,
                lstrip,
                rstrip,
                single_word,
                normalized,
                special,
            } => {
                let special = special.unwrap_or(true);
                AddedToken::from(content, special)
                    .lstrip(*lstrip)
                    .rstrip(*rstrip)
                    .single_word(*single_word)
                    .normalized(normalized.unwrap_or(!special))
            }
        }
    }
}

/// The part of `tokenizer_config.json` that is of use here.
#[derive(Default, Deserialize)]
struct ConfigFile {
    added_tokens_decoder: Option<BTreeMap<u32, Token>>,
    additional_special_tokens: Option<Vec<Token>>,
    add_bos_token: Option<bool>,
    add_eos_token: Option<bool>,
    chat_template: Option<TemplateField>,
    clean_up_tokenization_spaces: Option<bool>,
    tokenizer_class: Option<String>,
    bos_token: Option<Token>,
    eos_token: Option<Token>,
    unk_token: Option<Token>,
    sep_token: Option<Token>,
    pad_token: Option<Token>,
    cls_token: Option<Token>,
    mask_token: Option<Token>,
}

impl ConfigFile {
    fn role(&self, name: &str) -> Option<&Token> {
        match name {
            "bos_token" => self.bos_token.as_ref(),
            "eos_token" => self.eos_token.as_ref(),
            "unk_token" => self.unk_token.as_ref(),
            "sep_token" => self.sep_token.as_ref(),
            "pad_token" => self.pad_token.as_ref(),
            "cls_token" => self.cls_token.as_ref(),
            "mask_token" => self.mask_token.as_ref(),
            _ => None,
        }
    }

    /// The Llama and Gemma families decide by two switches what stands around a text.
    fn around(&self) -> Option<Around> {
        let class = self.tokenizer_class.as_deref()?;
        let class = class.strip_suffix("Fast").unwrap_or(class);
        matches!(class, "LlamaTokenizer" | "GemmaTokenizer").then(|| Around {
            bos: self.add_bos_token.unwrap_or(true),
            eos: self.add_eos_token.unwrap_or(false),
        })
    }
}

/// One template, or several with names.
#[derive(Deserialize)]
#[serde(untagged)]
enum TemplateField {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

impl Settings {
    /// Reads what is there; a directory with `tokenizer.json` alone is enough.
    pub(super) fn load(directory: &Path) -> Result<Self, TokenizerError> {
        let config_path = directory.join("tokenizer_config.json");
        let mut config: ConfigFile = read_json(&config_path)?.unwrap_or_default();
        let map_path = directory.join("special_tokens_map.json");
        let mut map: ConfigFile = read_json(&map_path)?.unwrap_or_default();

        // Files of today repeat the map in the configuration; in older ones the map counts.
        let newest_first = match config.added_tokens_decoder {
            Some(_) => [&config, &map],
            None => [&map, &config],
        };
        let role = |name| {
            newest_first
                .iter()
                .find_map(|file| file.role(name))
                .cloned()
        };
        let roles: BTreeMap<&'static str, Token> = ROLES
            .into_iter()
            .filter_map(|name| Some((name, role(name)?)))
            .collect();

        let around = config.around();
        let clean_up = config.clean_up_tokenization_spaces.unwrap_or(false);
        let further = [
            config.additional_special_tokens.take(),
            map.additional_special_tokens.take(),
        ];
        let added = config.added_tokens_decoder.take().unwrap_or_default();
        let added = added
            .into_values()
            .chain(roles.values().cloned())
            .chain(further.into_iter().flatten().flatten())
            .collect();
        let templates = templates(directory, &config_path, config.chat_template)?;
        Ok(Self {
            roles,
            added,
            clean_up,
            around,
            templates,
        })
    }
}

/// A file of its own comes before the entry in the configuration.
fn templates(
    directory: &Path,
    config: &Path,
    field: Option<TemplateField>,
) -> Result<Templates, TokenizerError> {
    let path = directory.join("chat_template.jinja");
    if let Some(bytes) = read(&path, LIMIT)? {
        let text = String::from_utf8(bytes).map_err(|error| TokenizerError::Invalid {
            path: path.clone(),
            reason: format!("it is no UTF-8 ({})", error.utf8_error()),
        })?;
        return Ok(Templates {
            path,
            by_name: BTreeMap::from([("default".to_owned(), text)]),
        });
    }
    let by_name = match field {
        None => BTreeMap::new(),
        Some(TemplateField::One(text)) => BTreeMap::from([("default".to_owned(), text)]),
        Some(TemplateField::Named(list)) => list
            .into_iter()
            .map(|one| (one.name, one.template))
            .collect(),
    };
    Ok(Templates {
        path: config.to_owned(),
        by_name,
    })
}

/// The JSON of a file; `None` if there is no such file.
fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, TokenizerError> {
    let Some(bytes) = read(path, LIMIT)? else {
        return Ok(None);
    };
    let value = serde_json::from_slice(&bytes).map_err(|error| TokenizerError::Invalid {
        path: path.to_owned(),
        reason: error.to_string(),
    })?;
    Ok(Some(value))
}

/// The bytes of a file of at most `limit` bytes; `None` if there is no such file.
pub(super) fn read(path: &Path, limit: u64) -> Result<Option<Vec<u8>>, TokenizerError> {
    let failed = |source| TokenizerError::Read {
        path: path.to_owned(),
        source,
    };
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(failed)?,
    };
    let mut bytes = Vec::new();
    file.take(limit + 1)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    if bytes.len() as u64 > limit {
        return Err(TokenizerError::TooLarge {
            path: path.to_owned(),
            limit,
        });
    }
    Ok(Some(bytes))
}
