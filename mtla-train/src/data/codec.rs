//! Text as tokens: with a vocabulary made for the text, or with the tokenizer that a model came with.

use std::path::Path;

use mtla_models::tokenizer::Tokenizer;
use serde_json::{Value, json};

use super::{
    tokenizer_files::TokenizerFiles,
    vocabulary::{END_OF_TEXT, Vocabulary, VocabularyError},
};

/// Text is handed to a model's tokenizer in parts of at least this many bytes, which bounds the memory that
/// its bookkeeping takes.
const PART: usize = 1 << 16;

/// How a language model reads and writes text.
///
/// ```
/// use mtla_train::data::{codec::TextCodec, vocabulary::Vocabulary};
///
/// let codec = TextCodec::from(Vocabulary::train(["the cat and the hat\n"], 270)?);
/// let tokens = codec.document("the cat")?;
/// assert_eq!((tokens[0], *tokens.last().unwrap()), (codec.start(), codec.end()));
/// assert_eq!(codec.decode(&tokens)?, "the cat");
/// # Ok::<(), mtla_train::data::vocabulary::VocabularyError>(())
/// ```
#[derive(Debug, Clone)]
pub enum TextCodec {
    /// With a vocabulary trained on the text. The end of text begins a document too.
    Trained(Box<Vocabulary>),
    /// With the tokenizer of a model.
    Pretrained(Box<ModelTokenizer>),
}

/// The tokenizer of a model directory, with its files.
#[derive(Debug, Clone)]
pub struct ModelTokenizer {
    tokenizer: Tokenizer,
    start: u32,
    end: u32,
    in_parts: bool,
    files: TokenizerFiles,
}

impl From<Vocabulary> for TextCodec {
    fn from(vocabulary: Vocabulary) -> Self {
        Self::Trained(Box::new(vocabulary))
    }
}

impl TextCodec {
    /// The tokenizer of a model directory. Which tokens begin and end a document is what it says of `bos_token` and
    /// `eos_token`; where it is silent they are `bos` and `eos`, and without a first token the last one serves.
    ///
    /// # Errors
    ///
    /// If the tokenizer cannot be used, or has no token that ends a text.
    pub fn of_model(
        directory: &Path,
        bos: Option<u32>,
        eos: Option<u32>,
    ) -> Result<Self, VocabularyError> {
        let tokenizer = Tokenizer::load(directory)?;
        let end = tokenizer.eos().or(eos);
        let end = end.ok_or_else(|| VocabularyError::NoEnd {
            path: directory.to_owned(),
        })?;
        let start = tokenizer.bos().or(bos).unwrap_or(end);
        Ok(Self::Pretrained(Box::new(ModelTokenizer {
            in_parts: is_same_in_parts(&tokenizer)?,
            tokenizer,
            start,
            end,
            files: TokenizerFiles::read(directory)?,
        })))
    }

    /// The number of tokens.
    pub fn size(&self) -> usize {
        match self {
            Self::Trained(vocabulary) => vocabulary.size(),
            Self::Pretrained(model) => model.tokenizer.size(),
        }
    }

    /// The token that begins a document.
    pub fn start(&self) -> u32 {
        match self {
            Self::Trained(vocabulary) => vocabulary.end_of_text(),
            Self::Pretrained(model) => model.start,
        }
    }

    /// The token that ends a document.
    pub fn end(&self) -> u32 {
        match self {
            Self::Trained(vocabulary) => vocabulary.end_of_text(),
            Self::Pretrained(model) => model.end,
        }
    }

    /// Checks that a model with `vocab_size` rows in its embedding has one for every token.
    ///
    /// # Errors
    ///
    /// Names a token that has none.
    pub fn fits(&self, vocab_size: usize) -> Result<(), VocabularyError> {
        let own = match self {
            Self::Trained(vocabulary) => vocabulary.size() as u32 - 1,
            Self::Pretrained(model) => {
                model.tokenizer.fits(vocab_size)?;
                model.start.max(model.end)
            }
        };
        if own as usize >= vocab_size {
            return Err(VocabularyError::UnknownToken {
                id: own,
                size: vocab_size,
            });
        }
        Ok(())
    }

    /// The tokens of a text alone. A model's tokenizer finds special tokens that the text spells out; to a trained
    /// vocabulary they are text.
    ///
    /// # Errors
    ///
    /// If a model's tokenizer has no token for a part of the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, VocabularyError> {
        match self {
            Self::Trained(vocabulary) => Ok(vocabulary.encode(text)),
            Self::Pretrained(model) if !model.in_parts => Ok(model.tokenizer.encode_bare(text)?),
            Self::Pretrained(model) => {
                let mut tokens = Vec::new();
                for part in parts(text) {
                    tokens.extend(model.tokenizer.encode_bare(part)?);
                }
                Ok(tokens)
            }
        }
    }

    /// The tokens of a text that goes on: those of its beginning and no end.
    ///
    /// # Errors
    ///
    /// As [`encode`](Self::encode).
    pub fn prompt(&self, text: &str) -> Result<Vec<u32>, VocabularyError> {
        Ok([vec![self.start()], self.encode(text)?].concat())
    }

    /// The tokens of a text from its start to its end.
    ///
    /// # Errors
    ///
    /// As [`encode`](Self::encode).
    pub fn document(&self, text: &str) -> Result<Vec<u32>, VocabularyError> {
        Ok([self.prompt(text)?, vec![self.end()]].concat())
    }

    /// The text of tokens, without special ones.
    ///
    /// # Errors
    ///
    /// If a token is unknown to a trained vocabulary, or a model's tokenizer cannot put tokens together.
    pub fn decode(&self, tokens: &[u32]) -> Result<String, VocabularyError> {
        match self {
            Self::Trained(vocabulary) => vocabulary.decode(tokens),
            Self::Pretrained(model) => Ok(model.tokenizer.decode(tokens)?),
        }
    }

    /// Writes the files of a tokenizer into a model directory: those that a model came with, or for a trained
    /// vocabulary `tokenizer.json`, which begins a text as documents begin in training, and
    /// `tokenizer_config.json`. Python's `AutoTokenizer` reads them. Those of another tokenizer are removed.
    ///
    /// # Errors
    ///
    /// If a file cannot be written or removed.
    pub fn save_pretrained(&self, directory: &Path) -> Result<(), VocabularyError> {
        match self {
            Self::Trained(vocabulary) => {
                let mut tokenizer = vocabulary.to_json();
                tokenizer["post_processor"] = begin_with(vocabulary.end_of_text());
                let config = json!({
                    "tokenizer_class": "PreTrainedTokenizerFast",
                    "bos_token": END_OF_TEXT,
                    "eos_token": END_OF_TEXT,
                    "clean_up_tokenization_spaces": false,
                });
                let files = [
                    ("tokenizer.json", tokenizer),
                    ("tokenizer_config.json", config),
                ];
                let files = files.map(|(name, json)| (name, format!("{json:#}\n").into_bytes()));
                TokenizerFiles::new(files).write(directory)
            }
            Self::Pretrained(model) => model.files.write(directory),
        }
    }
}

/// The post-processor that puts the end of text before every text.
fn begin_with(id: u32) -> Value {
    let special = json!({ "SpecialToken": { "id": END_OF_TEXT, "type_id": 0 } });
    let text = |name, kind| json!({ "Sequence": { "id": name, "type_id": kind } });
    json!({
        "type": "TemplateProcessing",
        "single": [special, text("A", 0)],
        "pair": [special, text("A", 0), special, text("B", 1)],
        "special_tokens": { END_OF_TEXT: { "id": END_OF_TEXT, "ids": [id], "tokens": [END_OF_TEXT] } },
    })
}

/// Whether a tokenizer makes the same of a text in parts. Those of the Llama 2 family put a space before all that
/// they are given, and so before every part.
fn is_same_in_parts(tokenizer: &Tokenizer) -> Result<bool, VocabularyError> {
    let (first, second) = ("a\n", "a");
    let whole = tokenizer.encode_bare(&[first, second].concat())?;
    let parts = [
        tokenizer.encode_bare(first)?,
        tokenizer.encode_bare(second)?,
    ];
    Ok(whole == parts.concat())
}

/// Cuts a text where a line begins with something other than a space: most tokenizers do not join what is on either
/// side of such a place, and [`is_same_in_parts`] finds those that do.
fn parts(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let (part, left) = rest.split_at(cut(rest));
        rest = left;
        (!part.is_empty()).then_some(part)
    })
}

/// The first place for a cut after the first [`PART`] bytes; the end of the text where there is none.
fn cut(text: &str) -> usize {
    let start = text.floor_char_boundary(PART);
    text[start..]
        .match_indices('\n')
        .map(|(place, _)| start + place + 1)
        .find(|&place| text[place..].starts_with(|c: char| !c.is_whitespace()))
        .unwrap_or(text.len())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn trained() -> TextCodec {
        let text = "the cat and the hat and the bat\n";
        TextCodec::from(Vocabulary::train([text], 270).unwrap())
    }

    #[test]
    fn a_saved_vocabulary_is_a_model_tokenizer() {
        let folder = tempfile::tempdir().unwrap();
        let codec = trained();
        codec.save_pretrained(folder.path()).unwrap();
        let model = TextCodec::of_model(folder.path(), None, None).unwrap();
        assert_eq!((model.start(), model.end()), (codec.start(), codec.end()));
        assert_eq!(model.size(), codec.size());
        let text = "The cat,\n\nand the Größe\n".repeat(9000);
        let document = codec.document(&text).unwrap();
        assert_eq!(model.document(&text).unwrap(), document);
        assert_eq!(model.decode(&document).unwrap(), text);
        // The tokenizer itself begins a text in the same way.
        let tokenizer = Tokenizer::load(folder.path()).unwrap();
        assert_eq!(
            tokenizer.encode("the cat").unwrap(),
            codec.prompt("the cat").unwrap()
        );
        // And what is saved from there is the same again.
        let again = tempfile::tempdir().unwrap();
        model.save_pretrained(again.path()).unwrap();
        for name in ["tokenizer.json", "tokenizer_config.json"] {
            let read = |folder: &tempfile::TempDir| fs::read(folder.path().join(name)).unwrap();
            assert_eq!(read(&again), read(&folder));
        }
    }

    /// A tokenizer of characters that marks spaces, and puts one before what it is given.
    fn with_spaces(normalizer: &Value, pre_tokenizer: &Value) -> TextCodec {
        let folder = tempfile::tempdir().unwrap();
        let pieces = ["</s>", "\u{2581}", "\n", "a", "b", "\u{2581}a"];
        let vocabulary: serde_json::Map<String, Value> = pieces
            .iter()
            .enumerate()
            .map(|(id, piece)| ((*piece).to_owned(), id.into()))
            .collect();
        let tokenizer = json!({
            "normalizer": normalizer,
            "pre_tokenizer": pre_tokenizer,
            "model": {
                "type": "BPE",
                "vocab": vocabulary,
                "merges": [["\u{2581}", "a"]],
            },
        });
        let path = folder.path().join("tokenizer.json");
        fs::write(path, tokenizer.to_string()).unwrap();
        TextCodec::of_model(folder.path(), None, Some(0)).unwrap()
    }

    #[test]
    fn no_space_is_put_before_a_part() {
        let replace =
            json!({ "type": "Replace", "pattern": { "String": " " }, "content": "\u{2581}" });
        let prepend = json!({ "type": "Prepend", "prepend": "\u{2581}" });
        let both = json!({ "type": "Sequence", "normalizers": [prepend, replace] });
        let metaspace = |scheme: &str| {
            json!({
                "type": "Metaspace",
                "replacement": "\u{2581}",
                "prepend_scheme": scheme,
                "split": false,
            })
        };
        let line = "a b\n";
        let text = line.repeat(2 * PART / line.len());
        for (normalizer, pre_tokenizer, space) in [
            (both, Value::Null, true),
            (Value::Null, metaspace("first"), true),
            (Value::Null, metaspace("always"), true),
            (Value::Null, metaspace("never"), false),
        ] {
            let codec = with_spaces(&normalizer, &pre_tokenizer);
            let TextCodec::Pretrained(model) = &codec else {
                panic!("a model's tokenizer");
            };
            assert_eq!(model.in_parts, !space, "{normalizer} {pre_tokenizer}");
            // The line's tokens, each time, and a space before the first alone.
            let mut expected = [3, 1, 4, 2].repeat(text.len() / line.len());
            if space {
                expected[0] = 5;
            }
            assert!(codec.encode(&text).unwrap() == expected);
        }
    }

    #[test]
    fn files_of_another_tokenizer_are_removed() {
        let folder = tempfile::tempdir().unwrap();
        let stale = folder.path().join("chat_template.jinja");
        let other = folder.path().join("notes.txt");
        fs::write(&stale, "old").unwrap();
        fs::write(&other, "kept").unwrap();
        trained().save_pretrained(folder.path()).unwrap();
        assert!(!stale.exists() && other.exists());
        assert!(TextCodec::of_model(folder.path(), None, None).is_ok());
    }

    #[test]
    fn models_that_are_too_small_and_tokenizers_without_an_end_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let codec = trained();
        codec.save_pretrained(folder.path()).unwrap();
        let model = TextCodec::of_model(folder.path(), None, None).unwrap();
        for codec in [&codec, &model] {
            let size = codec.size();
            assert!(codec.fits(size).is_ok());
            let error = codec.fits(size - 1).unwrap_err().to_string();
            assert!(error.contains(&(size - 1).to_string()), "{error}");
        }
        fs::remove_file(folder.path().join("tokenizer_config.json")).unwrap();
        let error = TextCodec::of_model(folder.path(), None, None).unwrap_err();
        assert!(error.to_string().contains("eos_token"), "{error}");
        let model = TextCodec::of_model(folder.path(), None, Some(7)).unwrap();
        assert_eq!((model.start(), model.end()), (7, 7));
    }
}
