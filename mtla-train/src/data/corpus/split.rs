//! The division of a corpus: to train on, to validate on while training, and to hold out.

use super::{CorpusError, Document};
use crate::data::story::{Story, StoryWorld};
use rand::{SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;
use std::collections::HashSet;

/// One of so many bytes is for validation, and as many are held out.
pub(super) const SHARE: usize = 20;

/// Something for each of the three parts of a corpus.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Split<T> {
    /// For the part that a model is trained on.
    pub train: T,
    /// For the part on which its training is watched.
    pub validation: T,
    /// For the part that is read once, when all choices are made.
    pub held_out: T,
}

impl<T> Split<T> {
    /// The same with each part changed by a function.
    pub fn map<U>(self, mut change: impl FnMut(T) -> U) -> Split<U> {
        Split {
            train: change(self.train),
            validation: change(self.validation),
            held_out: change(self.held_out),
        }
    }
}

/// As many different stories of a world as are asked for in each part. The held-out ones and those to
/// validate on do not depend on the number of the others.
///
/// # Example
///
/// ```
/// use mtla_train::data::{corpus::{self, Document, Split}, story::StoryWorld};
///
/// let counts = Split { train: 100, validation: 5, held_out: 10 };
/// let stories = corpus::stories(StoryWorld::new(1), counts);
/// let documents = stories.map(|stories| stories.iter().map(Document::from).collect::<Vec<_>>());
/// assert_eq!(documents.train.len(), 100);
/// assert!(!documents.train.contains(&documents.held_out[0]));
/// ```
pub fn stories(world: StoryWorld, counts: Split<usize>) -> Split<Vec<Story>> {
    let mut told = HashSet::new();
    let mut new = world
        .stories()
        .filter(|story| told.insert(story.text.clone()));
    let mut next = |count| new.by_ref().take(count).collect();
    let held_out = next(counts.held_out);
    let validation = next(counts.validation);
    Split {
        train: next(counts.train),
        validation,
        held_out,
    }
}

/// Divides documents into parts: nine tenths of the text to train on, and a twentieth each to
/// validate on and to hold out. Equal documents and seeds give equal parts.
///
/// Whole documents, chosen at random, make the parts where there are enough of them. Where single
/// documents are too large for that, each is cut instead: its beginning is for training, and its end
/// is held out.
///
/// # Errors
///
/// If the text is too short for each part to have some.
///
/// # Example
///
/// ```
/// use mtla_train::data::corpus::{self, Document};
///
/// let book = Document { name: "book".into(), text: "All happy families are alike. ".repeat(20) };
/// let parts = corpus::split(vec![book], 0)?;
/// assert_eq!(parts.map(|documents| documents[0].text.len()), corpus::Split {
///     train: 540,
///     validation: 30,
///     held_out: 30,
/// });
/// # Ok::<(), corpus::CorpusError>(())
/// ```
pub fn split(documents: Vec<Document>, seed: u64) -> Result<Split<Vec<Document>>, CorpusError> {
    let bytes: usize = documents.iter().map(|document| document.text.len()).sum();
    let share = bytes / SHARE;
    let mut order: Vec<usize> = (0..documents.len()).collect();
    order.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));

    // The field of `Split` that each document goes to, and the bytes still free in the last two.
    let mut fields = vec![0; documents.len()];
    let mut free = [share; 2];
    for index in order {
        let length = documents[index].text.len();
        if let Some(part) = free.iter().position(|&free| length <= free) {
            free[part] -= length;
            fields[index] = part + 1;
        }
    }
    let enough = free.iter().all(|&free| free <= share / 2);
    let mut parts: [Vec<Document>; 3] = Default::default();
    for (document, field) in documents.into_iter().zip(fields) {
        if enough {
            parts[field].push(document);
        } else {
            for (part, piece) in parts.iter_mut().zip(cut(document)) {
                part.extend(piece);
            }
        }
    }
    if parts.iter().any(Vec::is_empty) {
        return Err(CorpusError::TooShort { bytes });
    }
    let [train, validation, held_out] = parts;
    Ok(Split {
        train,
        validation,
        held_out,
    })
}

/// The parts of a document, without those that are empty.
fn cut(Document { name, mut text }: Document) -> [Option<Document>; 3] {
    let share = text.len() / SHARE;
    let held_out = text.split_off(text.floor_char_boundary(text.len() - share));
    let validation = text.split_off(text.floor_char_boundary(text.len() - share));
    [text, validation, held_out].map(|text| {
        (!text.is_empty()).then(|| Document {
            name: name.clone(),
            text,
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fmt::Write;

    #[test]
    fn many_documents_are_split_whole() {
        let documents: Vec<Document> = (0..100)
            .map(|i| Document {
                name: i.to_string(),
                text: format!("document {i:05}"),
            })
            .collect();
        let parts = split(documents.clone(), 3).unwrap();
        let sizes = Split {
            train: 90,
            validation: 5,
            held_out: 5,
        };
        assert_eq!(parts.clone().map(|part| part.len()), sizes);
        assert_eq!(split(documents.clone(), 3).unwrap(), parts);
        assert_ne!(split(documents.clone(), 4).unwrap(), parts);

        let mut all = [parts.train, parts.validation, parts.held_out].concat();
        all.sort_by_key(|document| document.text.clone());
        assert_eq!(all, documents);
    }

    #[test]
    fn large_documents_are_cut_between_characters() {
        let mut text = String::new();
        for number in 0..500 {
            write!(text, "№{number} ").unwrap();
        }
        let parts = split(
            vec![Document {
                name: "all".into(),
                text: text.clone(),
            }],
            0,
        )
        .unwrap();
        let lengths = parts.clone().map(|part| part[0].text.len());
        assert!(
            lengths.validation.abs_diff(text.len() / 20) < 4,
            "{lengths:?}"
        );
        assert!(
            lengths.held_out.abs_diff(text.len() / 20) < 4,
            "{lengths:?}"
        );
        let joined = [parts.train, parts.validation, parts.held_out].concat();
        assert_eq!(
            joined
                .iter()
                .map(|part| part.text.as_str())
                .collect::<String>(),
            text
        );
    }

    #[test]
    fn too_little_text_is_an_error() {
        let document = Document {
            name: "note".into(),
            text: "too short".into(),
        };
        let error = split(vec![document], 0).unwrap_err();
        assert!(matches!(error, CorpusError::TooShort { bytes: 9 }));
        assert!(matches!(
            split(Vec::new(), 0),
            Err(CorpusError::TooShort { bytes: 0 })
        ));
    }

    #[test]
    fn stories_of_different_parts_are_different() {
        let counts = Split {
            train: 300,
            validation: 20,
            held_out: 30,
        };
        let parts = stories(StoryWorld::new(5), counts);
        assert_eq!(parts.clone().map(|part| part.len()), counts);
        let texts = [&parts.train, &parts.validation, &parts.held_out]
            .into_iter()
            .flatten();
        assert_eq!(
            texts.map(|story| &story.text).collect::<HashSet<_>>().len(),
            350
        );

        // More training text leaves what is measured as it was.
        let larger = stories(
            StoryWorld::new(5),
            Split {
                train: 400,
                ..counts
            },
        );
        assert_eq!(larger.held_out, parts.held_out);
        assert_eq!(larger.validation, parts.validation);
        assert_eq!(larger.train[..300], parts.train);
    }
}
