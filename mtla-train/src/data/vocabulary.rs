//! Text as token ids: byte-level byte-pair encoding, trained on the text at hand.
//!
//! The vocabulary starts from the 256 bytes, so that there is no unknown token and any text comes back
//! exactly as it went in, whatever its language, spacing or line ends; then the most frequent pair of
//! neighbours is merged to a new piece, over and over, until the vocabulary is full. Text is split
//! into words, numbers, punctuation and runs of spaces as in GPT-2, and pieces do not cross from one to
//! the next. There is one special token, which ends a document; text that spells it out is text.
//!
//! The work is done by the `tokenizers` crate, and a vocabulary is saved in its `tokenizer.json`, so
//! that Python reads it too. A part of that file says how text is to be taken apart; it is always the
//! same here, and a file that says otherwise is refused.

use crate::disk::replace;
use mtla_models::tokenizer::TokenizerError;
use serde::Deserialize;
use serde_json::Value;
use std::{
    error::Error,
    fs, io, iter,
    ops::RangeInclusive,
    path::{Path, PathBuf},
};
use tokenizers::{
    AddedToken, NormalizerWrapper, TokenizerImpl,
    models::bpe::{BPE, BpeTrainer, Vocab},
    pre_tokenizers::byte_level::ByteLevel,
};

/// How the token that ends a document is written in `tokenizer.json`.
pub const END_OF_TEXT: &str = "<|endoftext|>";

/// The sizes that a vocabulary may have: from the 256 bytes and the end of text to about a million.
pub const SIZES: RangeInclusive<usize> = 257..=1 << 20;

/// Text is handed to the tokenizer in parts of about this many bytes, which bounds the memory that
/// its bookkeeping takes.
const PART: usize = 1 << 16;

/// Why a vocabulary could not be made, read or written, or tokens not be decoded.
#[derive(Debug, thiserror::Error)]
pub enum VocabularyError {
    /// The size asked for is not one that a vocabulary may have.
    #[error(
        "a byte-level vocabulary has {} to {} pieces; {size} were asked for",
        SIZES.start(),
        SIZES.end()
    )]
    Size {
        /// The size asked for.
        size: usize,
    },
    /// The trainer gave up.
    #[error("the vocabulary could not be trained")]
    Train(#[source] Box<dyn Error + Send + Sync>),
    /// The file could not be read.
    #[error("the vocabulary {} cannot be read; give the path of a tokenizer.json", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is not a vocabulary of this kind.
    #[error("{} is not a byte-level vocabulary: {reason}; train it again", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where in the file.
        reason: String,
    },
    /// The file could not be written.
    #[error("the vocabulary cannot be saved as {}; is its folder there, and writable?", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The tokenizer of a model cannot be used.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The tokenizer of a model does not say which token ends a text.
    #[error(
        "the tokenizer in {} names no token that ends a text; set eos_token in tokenizer_config.json, \
         or eos_token_id in config.json",
        path.display()
    )]
    NoEnd {
        /// The directory.
        path: PathBuf,
    },
    /// A token is not one of the vocabulary's.
    #[error("token {id} is not in this vocabulary of {size}; it comes from another one")]
    UnknownToken {
        /// The token.
        id: u32,
        /// The number of tokens in the vocabulary.
        size: usize,
    },
}

/// A byte-level vocabulary, whose ids are `0..size`.
///
/// # Example
///
/// ```
/// use mtla_train::data::vocabulary::Vocabulary;
///
/// let text = "the cat and the hat and the bat\n";
/// let vocabulary = Vocabulary::train([text], 270)?;
/// assert!(vocabulary.size() <= 270);
///
/// // Frequent words are short, and every text comes back.
/// assert!(vocabulary.encode(" the").len() < vocabulary.encode(" eht").len());
/// assert_eq!(vocabulary.decode(&vocabulary.encode("Großes 猫\r\n"))?, "Großes 猫\r\n");
/// assert_eq!(vocabulary.encode_document(text).last(), Some(&vocabulary.end_of_text()));
/// # Ok::<(), mtla_train::data::vocabulary::VocabularyError>(())
/// ```
#[derive(Clone)]
pub struct Vocabulary {
    tokenizer: Tokenizer,
    end_of_text: u32,
}

/// Post-processing does nothing here, so any type stands in for it.
type Tokenizer = TokenizerImpl<BPE, NormalizerWrapper, ByteLevel, ByteLevel, ByteLevel>;

impl std::fmt::Debug for Vocabulary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vocabulary")
            .field("size", &self.size())
            .finish_non_exhaustive()
    }
}

#[expect(
    clippy::missing_panics_doc,
    reason = "a byte-level vocabulary has tokens for every text, and texts for all its tokens"
)]
impl Vocabulary {
    /// Trains a vocabulary of `size` tokens on documents. It is smaller where no pair of neighbours is
    /// left that occurs twice. Equal texts give equal vocabularies.
    ///
    /// # Errors
    ///
    /// If the size is not among [`SIZES`].
    pub fn train<'a>(
        documents: impl IntoIterator<Item = &'a str>,
        size: usize,
    ) -> Result<Self, VocabularyError> {
        if !SIZES.contains(&size) {
            return Err(VocabularyError::Size { size });
        }
        let mut trainer = BpeTrainer::builder()
            .vocab_size(size)
            .min_frequency(2)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .special_tokens(vec![AddedToken::from(END_OF_TEXT, true)])
            .show_progress(false)
            .build();
        let parts: Vec<&str> = documents.into_iter().flat_map(parts).collect();
        let mut tokenizer = byte_level(BPE::default());
        tokenizer
            .train(&mut trainer, parts.into_iter())
            .map_err(VocabularyError::Train)?;
        let reason = "the trainer was given the token";
        Ok(Self {
            end_of_text: tokenizer.token_to_id(END_OF_TEXT).expect(reason),
            tokenizer,
        })
    }

    /// Reads a vocabulary that [`Self::save`] wrote.
    ///
    /// # Errors
    ///
    /// If the file cannot be read, or is not a `tokenizer.json` that takes text apart as this module
    /// does.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, VocabularyError> {
        let path = path.as_ref();
        let text = fs::read(path).map_err(|source| VocabularyError::Read {
            path: path.to_owned(),
            source,
        })?;
        parse(&text).map_err(|reason| VocabularyError::Invalid {
            path: path.to_owned(),
            reason,
        })
    }

    /// Writes the vocabulary as a `tokenizer.json`. The file appears whole or not at all.
    ///
    /// # Errors
    ///
    /// If the file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), VocabularyError> {
        let path = path.as_ref();
        let text = self
            .tokenizer
            .to_string(true)
            .expect("a vocabulary has a JSON form");
        replace(path, text.as_bytes()).map_err(|source| VocabularyError::Write {
            path: path.to_owned(),
            source,
        })
    }

    /// The `tokenizer.json`.
    pub(super) fn to_json(&self) -> Value {
        serde_json::to_value(&self.tokenizer).expect("a vocabulary has a JSON form")
    }

    /// The number of tokens, among them the end of text.
    pub fn size(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }

    /// The token that ends a document.
    pub fn end_of_text(&self) -> u32 {
        self.end_of_text
    }

    /// The tokens of a text.
    ///
    /// The tokens of a text that ends before a space or a line end are the first tokens of the text
    /// that goes on there; so a prompt may be encoded alone.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        parts(text)
            .flat_map(|part| {
                let encoding = self.tokenizer.encode_fast(part, false);
                encoding.expect("every byte has a token").get_ids().to_vec()
            })
            .collect()
    }

    /// The tokens of a text, and the end of text.
    pub fn encode_document(&self, text: &str) -> Vec<u32> {
        let mut tokens = self.encode(text);
        tokens.push(self.end_of_text);
        tokens
    }

    /// The text of tokens, without ends of text. Where tokens break off within a character, or a
    /// model made up bytes that are no UTF-8, the replacement character stands for them.
    ///
    /// # Errors
    ///
    /// If a token is not below [`Self::size`].
    pub fn decode(&self, tokens: &[u32]) -> Result<String, VocabularyError> {
        let size = self.size();
        if let Some(&id) = tokens.iter().find(|&&id| id as usize >= size) {
            return Err(VocabularyError::UnknownToken { id, size });
        }
        Ok(self
            .tokenizer
            .decode(tokens, true)
            .expect("every token is known"))
    }
}

/// The one way in which text is taken apart and put together again.
fn byte_level(pieces: BPE) -> Tokenizer {
    let bytes = ByteLevel::default().add_prefix_space(false);
    let mut tokenizer = Tokenizer::new(pieces);
    tokenizer
        .with_pre_tokenizer(Some(bytes))
        .with_decoder(Some(bytes));
    tokenizer.add_special_tokens(&[AddedToken::from(END_OF_TEXT, true)]);
    tokenizer.set_encode_special_tokens(true);
    tokenizer
}

/// The part of `tokenizer.json` that differs from one vocabulary to another.
#[derive(Deserialize)]
struct Saved {
    model: Pieces,
}

#[derive(Deserialize)]
struct Pieces {
    vocab: Vocab,
    merges: Vec<(String, String)>,
}

/// Builds the vocabulary of a `tokenizer.json`, or says what is wrong with it.
fn parse(text: &[u8]) -> Result<Vocabulary, String> {
    let file: Value = serde_json::from_slice(text).map_err(|e| e.to_string())?;
    let Saved {
        model: Pieces { vocab, merges },
    } = Saved::deserialize(&file).map_err(|e| format!("in `model`, {e}"))?;

    let size = vocab.len();
    if !SIZES.contains(&size) {
        return Err(VocabularyError::Size { size }.to_string());
    }
    let mut ids: Vec<u32> = vocab.values().copied().collect();
    ids.sort_unstable();
    if let Some((expected, id)) = (0..).zip(ids).find(|(expected, id)| id != expected) {
        return Err(format!(
            "in `model.vocab`, id {expected} is missing before {id}"
        ));
    }
    let bytes = ByteLevel::alphabet().into_iter().map(String::from);
    for piece in bytes.chain([END_OF_TEXT.to_owned()]) {
        if !vocab.contains_key(&piece) {
            return Err(format!("in `model.vocab`, `{piece}` is missing"));
        }
    }

    let end_of_text = vocab[END_OF_TEXT];
    let pieces = BPE::builder().vocab_and_merges(vocab, merges).build();
    let tokenizer = byte_level(pieces.map_err(|e| format!("in `model.merges`, {e}"))?);
    let expected = serde_json::to_value(&tokenizer).expect("a vocabulary has a JSON form");
    match difference(&file, &expected) {
        Some(place) => Err(format!("`{place}` is not as this library writes it")),
        None => Ok(Vocabulary {
            tokenizer,
            end_of_text,
        }),
    }
}

/// The path of the first entry, at most two levels down, in which two objects differ.
fn difference(file: &Value, expected: &Value) -> Option<String> {
    let (Value::Object(a), Value::Object(b)) = (file, expected) else {
        return (file != expected).then(String::new);
    };
    let key = a
        .keys()
        .chain(b.keys())
        .find(|&key| a.get(key) != b.get(key))?;
    let inner = a.get(key).zip(b.get(key)).filter(|_| key == "model");
    let place = inner.and_then(|(a, b)| difference(a, b));
    Some(place.map_or_else(|| key.clone(), |place| format!("{key}.{place}")))
}

/// Cuts a text before spaces and line ends that follow something else. Words are split there in any
/// case, so the parts have the tokens of the whole.
fn parts(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    iter::from_fn(move || {
        let cut = cut(rest);
        let (part, left) = rest.split_at(cut);
        rest = left;
        (!part.is_empty()).then_some(part)
    })
}

/// The first place for a cut after the first [`PART`] bytes; the end of the text where there is none.
fn cut(text: &str) -> usize {
    let start = text.floor_char_boundary(PART);
    let mut after_word = false;
    for (place, c) in text[start..].char_indices() {
        if after_word && matches!(c, ' ' | '\n') {
            return start + place;
        }
        after_word = !c.is_whitespace();
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::story::StoryWorld;
    use proptest::prelude::*;

    fn text() -> String {
        let stories = StoryWorld::new(1).stories().take(200);
        stories.map(|story| story.render() + "\n\n").collect()
    }

    fn vocabulary() -> Vocabulary {
        Vocabulary::train([text().as_str()], 400).unwrap()
    }

    fn json(vocabulary: &Vocabulary) -> String {
        vocabulary.tokenizer.to_string(true).unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn any_text_comes_back(text in "(?s).{0,60}|[ \\t\\r\\n]{0,20}", size in 257usize..300) {
            let vocabulary = Vocabulary::train([text.as_str()], size).unwrap();
            let tokens = vocabulary.encode(&text);
            prop_assert!(tokens.iter().all(|&t| (t as usize) < vocabulary.size()));
            prop_assert_eq!(vocabulary.decode(&tokens).unwrap(), text);
        }
    }

    #[test]
    fn frequent_words_are_single_tokens() {
        let vocabulary = vocabulary();
        assert_eq!(vocabulary.size(), 400);
        assert_eq!(vocabulary.encode(" the").len(), 1);
        assert_eq!(vocabulary.encode(" was in the").len(), 3);
    }

    #[test]
    fn equal_texts_give_equal_vocabularies() {
        // Letters drawn from few, so that pairs are often equally frequent.
        let mut state = 1u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            char::from(b"aabbc  "[(state >> 24) as usize % 7])
        };
        let ties: String = (0..5_000).map(|_| next()).collect();
        for text in [text(), ties] {
            let first = json(&Vocabulary::train([text.as_str()], 600).unwrap());
            for _ in 0..5 {
                assert_eq!(
                    json(&Vocabulary::train([text.as_str()], 600).unwrap()),
                    first
                );
            }
        }
    }

    #[test]
    fn long_texts_have_the_tokens_of_their_whole() {
        let vocabulary = vocabulary();
        let text = text().repeat(2);
        assert!(text.len() > 2 * PART && parts(&text).count() > 2);
        assert_eq!(parts(&text).collect::<String>(), text);
        let whole = vocabulary
            .tokenizer
            .encode_fast(text.as_str(), false)
            .unwrap();
        assert_eq!(vocabulary.encode(&text), whole.get_ids());
    }

    #[test]
    fn prompts_have_the_first_tokens_of_the_document() {
        let vocabulary = vocabulary();
        let story = StoryWorld::new(9).story(0);
        let document = vocabulary.encode_document(&story.render());
        let prompt = vocabulary.encode(&story.prompt(1));
        assert_eq!(document[..prompt.len()], prompt);
        assert_eq!(document.last(), Some(&vocabulary.end_of_text()));
        assert_eq!(vocabulary.decode(&document).unwrap(), story.render());
    }

    #[test]
    fn text_that_spells_the_end_of_text_is_text() {
        let vocabulary = vocabulary();
        let tokens = vocabulary.encode(END_OF_TEXT);
        assert!(!tokens.contains(&vocabulary.end_of_text()));
        assert_eq!(vocabulary.decode(&tokens).unwrap(), END_OF_TEXT);
    }

    #[test]
    fn a_saved_vocabulary_is_loaded_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        let vocabulary = vocabulary();
        vocabulary.save(&path).unwrap();
        let loaded = Vocabulary::load(&path).unwrap();
        assert_eq!(json(&loaded), json(&vocabulary));
        let text = format!("{} Größe {END_OF_TEXT}", text());
        assert_eq!(loaded.encode(&text), vocabulary.encode(&text));
        assert_eq!(
            folder.path().read_dir().unwrap().count(),
            1,
            "nothing else is left"
        );
    }

    #[test]
    fn what_is_no_vocabulary_is_refused_with_the_place_in_it() {
        let good = json(&Vocabulary::train(["aa aa"], 260).unwrap());
        let broken = [
            ("{".to_owned(), "EOF"),
            ("{}".to_owned(), "model"),
            (
                good.replace("\"normalizer\": null", "\"normalizer\": 1"),
                "normalizer",
            ),
            (
                good.replace("\"dropout\": null", "\"dropout\": 0.5"),
                "model.dropout",
            ),
            (
                good.replace("\"truncation\": null", "\"truncation\": {}"),
                "truncation",
            ),
            (
                good.replacen("\"!\": 1,", "\"!!\": 1,", 1),
                "`!` is missing",
            ),
            (
                good.replacen("\"!\": 1,", "\"!\": 900,", 1),
                "id 1 is missing",
            ),
        ];
        for (text, place) in broken {
            let reason = parse(text.as_bytes()).unwrap_err();
            assert!(reason.contains(place), "{place}: {reason}");
        }
        assert!(parse(good.as_bytes()).is_ok());
    }

    #[test]
    fn errors_name_the_file() {
        let missing = Vocabulary::load("/nowhere/tokenizer.json").unwrap_err();
        assert!(matches!(missing, VocabularyError::Read { .. }));
        assert!(missing.to_string().contains("/nowhere/tokenizer.json"));
        let unwritable = vocabulary().save("/nowhere/tokenizer.json").unwrap_err();
        assert!(matches!(unwritable, VocabularyError::Write { .. }));
    }

    #[test]
    fn sizes_and_tokens_out_of_range_are_errors() {
        for size in [0, 256, usize::MAX] {
            let error = Vocabulary::train(["text"], size).unwrap_err();
            assert!(matches!(error, VocabularyError::Size { .. }));
        }
        let error = vocabulary().decode(&[5, 400]).unwrap_err();
        assert!(matches!(
            error,
            VocabularyError::UnknownToken { id: 400, size: 400 }
        ));
    }
}
