//! Text that appears token by token.

use super::{Tokenizer, TokenizerError};

/// How many replacement characters at the end of a text may still become a character: all bytes of a
/// character but the last.
const UNDECIDED: usize = 3;

/// The most tokens that are looked at together; more only come together where a model makes up bytes
/// that are no text.
const WINDOW: usize = 64;

/// How many tokens before a text say how it is spaced.
const BEFORE: usize = 16;

/// Decodes one token after the other.
///
/// A character that several tokens share appears with the last of them. A few earlier tokens are decoded
/// again with every new one, because how a token is spaced may depend on the one before; so the work for
/// a token does not grow with the text. Spaces are not cleaned up, because that changes text that has
/// been shown.
///
/// # Example
///
/// ```
/// use mtla_models::tokenizer::Tokenizer;
/// # let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/llama_mtla/tokenizer");
///
/// let tokenizer = Tokenizer::load(directory)?;
/// let mut stream = tokenizer.stream();
/// let mut parts = Vec::new();
/// for id in tokenizer.encode("é 🙂")? {
///     parts.push(stream.push(id)?);
/// }
/// assert_eq!(parts, ["", "", "é", " ", "", "", "", "🙂"]);
/// assert_eq!(stream.finish()?, "");
/// # Ok::<(), mtla_models::tokenizer::TokenizerError>(())
/// ```
#[derive(Debug, Clone)]
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    skip_special: bool,
    window: Vec<u32>,
    /// How many of the window's tokens only give the context: their text has been shown.
    context: usize,
    /// How many bytes of the window's text have been shown.
    shown: usize,
}

impl Tokenizer {
    /// A stream that leaves special tokens out.
    pub fn stream(&self) -> TextStream<'_> {
        TextStream {
            tokenizer: self,
            skip_special: true,
            window: Vec::new(),
            context: 0,
            shown: 0,
        }
    }

    /// A stream that shows special tokens.
    pub fn stream_with_special(&self) -> TextStream<'_> {
        TextStream {
            skip_special: false,
            ..self.stream()
        }
    }
}

impl TextStream<'_> {
    /// Goes on from tokens whose text is not shown, such as a prompt: what comes is spaced as it is after them.
    ///
    /// # Errors
    ///
    /// If the tokenizer cannot put the tokens together.
    pub fn after(mut self, ids: &[u32]) -> Result<Self, TokenizerError> {
        for id in &ids[ids.len().saturating_sub(BEFORE)..] {
            self.push(*id)?;
        }
        Ok(self)
    }

    /// Takes the next token, and gives the text that is certain now; it may be empty.
    ///
    /// # Errors
    ///
    /// If the tokenizer cannot put the tokens together.
    pub fn push(&mut self, id: u32) -> Result<String, TokenizerError> {
        if self.skip_special && self.tokenizer.is_special(id) {
            return Ok(String::new());
        }
        self.window.push(id);
        let text = self.text(&self.window)?;
        let certain = certain(&text);
        let more = self.show(&text, certain);
        if certain == text.len() && !more.is_empty() {
            self.start_from(self.context)?;
        } else if self.window.len() > WINDOW {
            let rest = self.show(&text, text.len());
            self.start_from(self.window.len() - 1)?;
            return Ok(more + &rest);
        }
        Ok(more)
    }

    /// Ends the text, and gives what was held back: replacement characters for bytes that became no
    /// character. The stream can take a new text.
    ///
    /// # Errors
    ///
    /// If the tokenizer cannot put the tokens together.
    pub fn finish(&mut self) -> Result<String, TokenizerError> {
        let text = self.text(&self.window)?;
        let rest = self.show(&text, text.len());
        self.window.clear();
        (self.context, self.shown) = (0, 0);
        Ok(rest)
    }

    fn text(&self, ids: &[u32]) -> Result<String, TokenizerError> {
        self.tokenizer.decode_raw(ids, self.skip_special)
    }

    /// The text up to `end` that has not been shown, which now has.
    fn show(&mut self, text: &str, end: usize) -> String {
        let more = text.get(self.shown..end).unwrap_or_default().to_owned();
        self.shown = self.shown.max(end);
        more
    }

    /// Forgets the tokens before `first`; those from there are the context of what comes.
    fn start_from(&mut self, first: usize) -> Result<(), TokenizerError> {
        self.window.drain(..first);
        self.context = self.window.len();
        self.shown = self.text(&self.window)?.len();
        Ok(())
    }
}

/// Where the part of a text ends that further tokens leave as it is.
fn certain(text: &str) -> usize {
    let undecided = text.chars().rev().take(UNDECIDED);
    let undecided = undecided.take_while(|&c| c == char::REPLACEMENT_CHARACTER);
    text.len() - undecided.map(char::len_utf8).sum::<usize>()
}
