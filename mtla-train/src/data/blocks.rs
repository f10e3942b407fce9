//! Documents of tokens, cut into the rows a language model is trained on.
//!
//! A row of `n + 1` tokens trains `n` predictions: its inputs are the first `n`, its targets the
//! last `n`. Rows of one document overlap by that one token, so that every token but a document's
//! first is predicted exactly once. [`Packing`] says whether documents are joined into full rows or
//! kept apart in rows of their own length.

use burn::data::dataloader::batcher::Batcher;
use burn::data::dataset::Dataset;
use burn::tensor::backend::Backend;
use burn::tensor::{Int, Tensor, TensorData};
use std::ops::Range;

/// How documents are laid out in rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Packing {
    /// All documents in one stream, cut into full rows. A row may hold the end of one document and
    /// the start of another; what does not fill the last row is left out.
    #[default]
    Stream,
    /// Each document in rows of its own, padded on the right. A document longer than a row goes on
    /// in the next one.
    Documents,
}

/// Documents that cannot be cut into rows.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// The row length is 0.
    #[error("the block length is 0; a row must have room for at least one prediction")]
    ZeroLength,
    /// There is not one row in the text.
    #[error(
        "the text has {tokens} tokens, too few for one row of {needed}; \
         give more text or a smaller block length"
    )]
    TooShort {
        /// Tokens in all documents.
        tokens: usize,
        /// Tokens in a row, one more than the block length.
        needed: usize,
    },
}

/// A row: up to block length + 1 tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// The tokens, at least two.
    pub tokens: Vec<u32>,
}

/// A data set of rows cut from documents.
///
/// ```
/// use burn::data::dataset::Dataset;
/// use mtla_train::data::{Packing, TokenBlocks};
///
/// const END: u32 = 0;
/// let documents = [vec![1, 2, 3, END], vec![4, 5, END]];
///
/// let stream = TokenBlocks::new(&documents, 3, Packing::Stream)?;
/// assert_eq!(stream.get(0).unwrap().tokens, [1, 2, 3, END]);
/// assert_eq!(stream.get(1).unwrap().tokens, [END, 4, 5, END]);
///
/// let rows = TokenBlocks::new(&documents, 3, Packing::Documents)?;
/// assert_eq!(rows.get(1).unwrap().tokens, [4, 5, END]);
/// # Ok::<(), mtla_train::data::BlockError>(())
/// ```
#[derive(Clone, Debug)]
pub struct TokenBlocks {
    tokens: Vec<u32>,
    rows: Vec<Range<usize>>,
}

impl TokenBlocks {
    /// Cuts `documents` into rows that train up to `length` predictions each.
    ///
    /// A document should end with the end-of-text token, as those of
    /// [`encode_document`](super::vocabulary::Vocabulary::encode_document) do: it is what a model
    /// learns to stop by, and in a stream nothing else separates documents.
    ///
    /// # Errors
    ///
    /// If `length` is 0 or there is not enough text for one row.
    pub fn new<D: AsRef<[u32]>>(
        documents: impl IntoIterator<Item = D>,
        length: usize,
        packing: Packing,
    ) -> Result<Self, BlockError> {
        if length == 0 {
            return Err(BlockError::ZeroLength);
        }
        let mut tokens = Vec::new();
        let mut rows = Vec::new();
        for document in documents {
            let start = tokens.len();
            tokens.extend_from_slice(document.as_ref());
            if packing == Packing::Documents {
                rows.extend(cut(start..tokens.len(), length));
            }
        }
        if packing == Packing::Stream {
            rows.extend(cut(0..tokens.len(), length).filter(|row| row.len() > length));
        }
        if rows.is_empty() {
            let needed = if packing == Packing::Stream {
                length + 1
            } else {
                2
            };
            return Err(BlockError::TooShort {
                tokens: tokens.len(),
                needed,
            });
        }
        Ok(Self { tokens, rows })
    }

    /// Predictions in each row, for [`Batches::bucketed`](super::Batches::bucketed).
    pub fn lengths(&self) -> Vec<usize> {
        self.rows.iter().map(|row| row.len() - 1).collect()
    }
}

/// Rows of up to `length + 1` tokens that cover `span` and overlap by one.
fn cut(span: Range<usize>, length: usize) -> impl Iterator<Item = Range<usize>> {
    let predictions = span.start..span.end.saturating_sub(1);
    predictions
        .step_by(length)
        .map(move |start| start..(start + length + 1).min(span.end))
}

impl Dataset<Block> for TokenBlocks {
    fn get(&self, index: usize) -> Option<Block> {
        let row = self.rows.get(index)?;
        Some(Block {
            tokens: self.tokens[row.clone()].to_vec(),
        })
    }

    fn len(&self) -> usize {
        self.rows.len()
    }
}

/// Rows ready for a model, left-aligned.
#[derive(Clone, Debug)]
pub struct TextBatch<B: Backend> {
    /// `[batch, length]`; what is behind a row's length is 0.
    pub inputs: Tensor<B, 2, Int>,
    /// `[batch, length]`: the token after each input.
    pub targets: Tensor<B, 2, Int>,
    /// Valid positions of each row.
    pub lengths: Vec<usize>,
}

/// Makes a [`TextBatch`] of [`Block`]s, as long as the longest of them.
#[derive(Clone, Copy, Debug)]
pub struct TextBatcher;

impl<B: Backend> Batcher<B, Block, TextBatch<B>> for TextBatcher {
    fn batch(&self, items: Vec<Block>, device: &B::Device) -> TextBatch<B> {
        let lengths: Vec<usize> = items.iter().map(|block| block.tokens.len() - 1).collect();
        let length = lengths.iter().copied().max().unwrap_or(0);
        let rows = |shift: usize| {
            let mut padded = vec![0i32; items.len() * length];
            for (row, (block, &n)) in padded.chunks_mut(length).zip(items.iter().zip(&lengths)) {
                for (cell, &token) in row.iter_mut().zip(&block.tokens[shift..shift + n]) {
                    *cell = token.cast_signed();
                }
            }
            Tensor::from_data(TensorData::new(padded, [items.len(), length]), device)
        };
        TextBatch {
            inputs: rows(0),
            targets: rows(1),
            lengths,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn_flex::{Flex, FlexDevice};

    const END: u32 = 99;

    fn rows(documents: &[&[u32]], length: usize, packing: Packing) -> Vec<Vec<u32>> {
        let blocks = TokenBlocks::new(documents, length, packing).unwrap();
        assert_eq!(
            blocks.lengths(),
            blocks
                .iter()
                .map(|b| b.tokens.len() - 1)
                .collect::<Vec<_>>()
        );
        blocks.iter().map(|block| block.tokens).collect()
    }

    #[test]
    fn a_stream_is_cut_into_full_rows_that_overlap_by_one() {
        let got = rows(
            &[&[1, 2, 3, END], &[END], &[4, 5, 6, 7, 8, END]],
            3,
            Packing::Stream,
        );
        assert_eq!(got, [[1, 2, 3, END], [END, END, 4, 5], [5, 6, 7, 8]]);
        let exact = rows(&[&[1, 2, 3, 4, 5, 6, END]], 3, Packing::Stream);
        assert_eq!(exact, [[1, 2, 3, 4], [4, 5, 6, END]]);
    }

    #[test]
    fn documents_keep_to_rows_of_their_own() {
        let got = rows(
            &[
                &[1, 2, 3, 4, 5, END],
                &[6, END],
                &[END],
                &[],
                &[7, 8, 9, END],
            ],
            3,
            Packing::Documents,
        );
        let want: [&[u32]; 4] = [&[1, 2, 3, 4], &[4, 5, END], &[6, END], &[7, 8, 9, END]];
        assert_eq!(got, want);
    }

    #[test]
    fn every_token_after_the_first_is_predicted_once() {
        let document: Vec<u32> = (0..50).collect();
        for length in 1..55 {
            let predicted: Vec<u32> = rows(&[&document], length, Packing::Documents)
                .iter()
                .flat_map(|row| row[1..].to_vec())
                .collect();
            assert_eq!(predicted, (1..50).collect::<Vec<_>>(), "length {length}");
        }
    }

    #[test]
    fn too_little_text_is_refused_with_the_numbers() {
        let error = TokenBlocks::new([[1, 2, END]], 3, Packing::Stream).unwrap_err();
        assert!(error.to_string().contains("3 tokens") && error.to_string().contains("row of 4"));
        let none: [Vec<u32>; 1] = [vec![]];
        assert!(TokenBlocks::new(none, 3, Packing::Documents).is_err());
        assert!(TokenBlocks::new([[1, 2]], 0, Packing::Stream).is_err());
    }

    #[test]
    fn batches_shift_targets_by_one_and_pad_on_the_right() {
        let blocks = vec![
            Block {
                tokens: vec![1, 2, 3, 4],
            },
            Block { tokens: vec![5, 6] },
        ];
        let batch: TextBatch<Flex> = TextBatcher.batch(blocks, &FlexDevice);
        let rows =
            |tensor: Tensor<Flex, 2, Int>| tensor.into_data().iter::<i64>().collect::<Vec<_>>();
        assert_eq!(rows(batch.inputs), [1, 2, 3, 5, 0, 0]);
        assert_eq!(rows(batch.targets), [2, 3, 4, 6, 0, 0]);
        assert_eq!(batch.lengths, [3, 1]);
    }
}
