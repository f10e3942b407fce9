//! Texts that end a sequence.

use std::{fmt, sync::Arc};

use super::GenerationError;

/// Why tokens are no text.
pub type DecodeError = Box<dyn std::error::Error + Send + Sync>;

/// Makes text of tokens; a closure `Fn(&[u32]) -> Result<String, DecodeError>` does.
///
/// Only the newest few tokens are decoded at a time. What ends in an unfinished character (U+FFFD) waits for
/// the tokens after it.
pub trait TextDecoder: Send + Sync {
    /// The text of `tokens`.
    ///
    /// # Errors
    /// If they are no text.
    fn decode(&self, tokens: &[u32]) -> Result<String, DecodeError>;
}

impl<F> TextDecoder for F
where
    F: Fn(&[u32]) -> Result<String, DecodeError> + Send + Sync,
{
    fn decode(&self, tokens: &[u32]) -> Result<String, DecodeError> {
        self(tokens)
    }
}

/// Tokens before the new ones that are decoded with them, so that what depends on the start of a text (a
/// space that is dropped there) stays as it is.
const CONTEXT: usize = 6;

/// The texts that end a request's sequences.
#[derive(Clone)]
pub(super) struct StopStrings {
    decoder: Arc<dyn TextDecoder>,
    texts: Vec<String>,
    /// Bytes of the longest one.
    longest: usize,
}

impl fmt::Debug for StopStrings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("StopStrings").field(&self.texts).finish()
    }
}

impl StopStrings {
    pub(super) fn new(decoder: Arc<dyn TextDecoder>, texts: &[String]) -> Self {
        Self {
            decoder,
            texts: texts.to_vec(),
            longest: texts.iter().map(String::len).max().unwrap_or(0),
        }
    }

    fn decode(&self, tokens: &[u32]) -> Result<String, GenerationError> {
        self.decoder.decode(tokens).map_err(GenerationError::Decode)
    }

    /// The end of the prompt's text: a stop string may begin there.
    pub(super) fn start(&self, prompt: &[u32]) -> Result<Tail, GenerationError> {
        let mut tail = Tail {
            context: prompt.len().saturating_sub(CONTEXT),
            decoded: prompt.len(),
            text: self.decode(prompt)?,
        };
        tail.cut(self.longest);
        Ok(tail)
    }
}

/// The end of a sequence's text, as far as a stop string may begin in it.
#[derive(Debug, Clone, Default)]
pub(super) struct Tail {
    /// The token that decoding begins at.
    context: usize,
    /// Tokens whose text is known.
    decoded: usize,
    text: String,
}

impl Tail {
    /// Takes the text of the newest of `tokens`; whether a stop string ends in it.
    pub(super) fn extend(
        &mut self,
        stops: &StopStrings,
        tokens: &[u32],
    ) -> Result<bool, GenerationError> {
        let before = stops.decode(&tokens[self.context..self.decoded])?;
        let now = stops.decode(&tokens[self.context..])?;
        let new = now.get(before.len()..).unwrap_or_default();
        if new.is_empty() || new.ends_with('\u{fffd}') {
            return Ok(false);
        }
        let old = self.text.len();
        self.text.push_str(new);
        self.context = self.decoded;
        self.decoded = tokens.len();
        let ends_in_new = |stop: &String| {
            let windows = self.text.as_bytes().windows(stop.len());
            windows
                .enumerate()
                .any(|(start, window)| start + stop.len() > old && window == stop.as_bytes())
        };
        let found = stops.texts.iter().any(ends_in_new);
        self.cut(stops.longest);
        Ok(found)
    }

    /// Keeps one byte less than the longest stop string has, or a little more.
    fn cut(&mut self, longest: usize) {
        let mut start = (self.text.len() + 1).saturating_sub(longest.max(1));
        while !self.text.is_char_boundary(start) {
            start -= 1;
        }
        self.text.drain(..start);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes as tokens.
    #[expect(clippy::unnecessary_wraps, reason = "a decoder may fail")]
    fn bytes(tokens: &[u32]) -> Result<String, DecodeError> {
        let bytes: Vec<u8> = tokens.iter().map(|token| *token as u8).collect();
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The place after which a stop string ends the text, fed byte by byte.
    fn end(prompt: &str, text: &str, stops: &[&str]) -> Option<usize> {
        let stops: Vec<String> = stops.iter().map(ToString::to_string).collect();
        let stops = StopStrings::new(Arc::new(bytes), &stops);
        let mut tokens: Vec<u32> = prompt.bytes().map(u32::from).collect();
        let mut tail = stops.start(&tokens).unwrap();
        text.bytes().map(u32::from).position(|token| {
            tokens.push(token);
            tail.extend(&stops, &tokens).unwrap()
        })
    }

    #[test]
    fn the_first_stop_string_ends_the_text() {
        assert_eq!(end("", "one\n\ntwo", &["\n\n", "two"]), Some(4));
        assert_eq!(end("a", "ananas", &["anas", "nn"]), Some(5));
        assert_eq!(end("", "aaaa", &["aaa"]), Some(2));
        assert_eq!(end("", "nothing", &["x"]), None);
    }

    #[test]
    fn a_stop_string_may_begin_but_not_end_in_the_prompt() {
        assert_eq!(end("sto", "p", &["stop"]), Some(0));
        assert_eq!(end("stop", "ping stop", &["stop"]), Some(8));
    }

    #[test]
    fn characters_of_several_tokens_are_waited_for() {
        assert_eq!(end("ä", "öü€", &["ü€"]), Some(6));
        assert_eq!(end("", "日本", &["本", "語"]), Some(5));
    }
}
