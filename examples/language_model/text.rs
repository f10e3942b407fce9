//! The text: the user's, or stories with questions.

use anyhow::Context;
use mtla_train::data::{
    codec::TextCodec,
    corpus::{self, Document, Split},
    story::{Story, StoryWorld},
    vocabulary::Vocabulary,
};

use crate::settings::DataSettings;

/// Documents in three parts, and the stories behind the held-out ones.
pub(crate) struct Text {
    documents: Split<Vec<Document>>,
    /// Held-out stories with their questions; none for the user's own text.
    pub(crate) stories: Vec<Story>,
}

impl Text {
    /// Reads or makes up the text.
    pub(crate) fn load(settings: &DataSettings) -> anyhow::Result<Self> {
        let Some(path) = &settings.path else {
            let counts = Split {
                train: settings.stories,
                validation: settings.held_out_stories,
                held_out: settings.held_out_stories,
            };
            let stories = corpus::stories(StoryWorld::new(settings.seed), counts);
            return Ok(Self {
                documents: stories
                    .clone()
                    .map(|part| part.iter().map(Document::from).collect()),
                stories: stories.held_out,
            });
        };
        let loaded = corpus::load(path, corpus::MAX_BYTES)?;
        if let Some(first) = loaded.skipped.first() {
            println!(
                "left out {} files, such as {}: {}",
                loaded.skipped.len(),
                first.path.display(),
                first.reason
            );
        }
        Ok(Self {
            documents: corpus::split(loaded.documents, settings.seed)?,
            stories: Vec::new(),
        })
    }

    /// A vocabulary of at most `size` tokens, from the training part.
    pub(crate) fn vocabulary(&self, size: usize) -> anyhow::Result<Vocabulary> {
        let texts = self
            .documents
            .train
            .iter()
            .map(|document| document.text.as_str());
        Vocabulary::train(texts, size).context("cannot make a vocabulary")
    }

    /// The tokens of each document with its start and end: its first token is predicted too.
    pub(crate) fn encode(&self, codec: &TextCodec) -> anyhow::Result<Split<Vec<Vec<u32>>>> {
        let part = |documents: &Vec<Document>| -> anyhow::Result<Vec<Vec<u32>>> {
            let encode = |document: &Document| codec.document(&document.text);
            let tokens: Result<_, _> = documents.iter().map(encode).collect();
            tokens.context("the text cannot be encoded")
        };
        Ok(Split {
            train: part(&self.documents.train)?,
            validation: part(&self.documents.validation)?,
            held_out: part(&self.documents.held_out)?,
        })
    }

    /// Prints how much there is.
    pub(crate) fn describe(tokens: &Split<Vec<Vec<u32>>>, codec: &TextCodec) {
        let count = |part: &Vec<Vec<u32>>| part.iter().map(Vec::len).sum::<usize>();
        println!(
            "{} documents, {} tokens to train on, {} to validate on, {} held out; vocabulary {}",
            tokens.train.len(),
            count(&tokens.train),
            count(&tokens.validation),
            count(&tokens.held_out),
            codec.size()
        );
    }

    /// What the model goes on from: the user's prompts, or the beginnings of held-out documents.
    pub(crate) fn prompts(&self, given: &[String]) -> Vec<String> {
        if !given.is_empty() {
            return given.to_vec();
        }
        let beginning = |document: &Document| {
            let end = document
                .text
                .find(['.', '\n'])
                .map_or(document.text.len(), |end| end + 1);
            document.text.chars().take(end.min(200)).collect()
        };
        self.documents
            .held_out
            .iter()
            .take(2)
            .map(beginning)
            .collect()
    }
}
