//! What a model is trained to make small.
//!
//! The trainer knows nothing of a model but [`Objective`]: a batch goes in, a [`Loss`] comes out.
//! Language models, translation and recognition differ only in what they implement here.

use burn::module::Module;
use burn::tensor::activation::log_softmax;
use burn::tensor::backend::Backend;
use burn::tensor::{Bool, Int, Tensor, TensorData};

/// A loss over the tokens of a batch, still on the device.
#[derive(Clone, Debug)]
pub struct Loss<B: Backend> {
    /// Mean over the tokens, in nats. Shape `[1]`.
    pub mean: Tensor<B, 1>,
    /// How many tokens the mean is over; batches are weighted by it.
    pub tokens: usize,
}

/// A model that can be trained: it gives a loss for a batch.
///
/// Implement it once, for any backend; the trainer uses it on the autodiff backend for training and
/// on the inner one for validation.
///
/// ```
/// use burn::{module::Module, nn::{Embedding, Linear}, tensor::backend::Backend};
/// use mtla_train::data::TextBatch;
/// use mtla_train::{Loss, Objective, next_token_loss};
///
/// #[derive(Module, Debug)]
/// struct Bigram<B: Backend> {
///     embedding: Embedding<B>,
///     head: Linear<B>,
/// }
///
/// impl<B: Backend> Objective<B> for Bigram<B> {
///     type Batch = TextBatch<B>;
///
///     fn loss(&self, batch: TextBatch<B>, _seed: Option<u64>) -> Loss<B> {
///         let logits = self.head.forward(self.embedding.forward(batch.inputs));
///         next_token_loss(logits, batch.targets, &batch.lengths)
///     }
/// }
/// ```
pub trait Objective<B: Backend>: Module<B> {
    /// What the data gives for a step.
    type Batch: Send + 'static;

    /// The loss of `batch`.
    ///
    /// `seed` is given in training and never twice the same: what is random in the forward pass
    /// (dropout) may depend on it and on the backend's own generator, which the trainer has seeded
    /// before, and on nothing else. It is `None` in validation, where nothing is random.
    fn loss(&self, batch: Self::Batch, seed: Option<u64>) -> Loss<B>;
}

/// Cross-entropy between `logits` and the tokens that came next, over the valid positions.
///
/// # Shapes
///
/// - `logits`: `[batch, length, vocabulary]`
/// - `targets`: `[batch, length]`
/// - `lengths`: `batch` numbers; row `i` is valid in its first `lengths[i]` positions
///
/// # Panics
///
/// If the shapes do not belong together or a length is beyond the row.
pub fn next_token_loss<B: Backend>(
    logits: Tensor<B, 3>,
    targets: Tensor<B, 2, Int>,
    lengths: &[usize],
) -> Loss<B> {
    let [rows, length, _] = logits.dims();
    assert_eq!(
        targets.dims(),
        [rows, length],
        "targets must be [batch, length] of the logits"
    );
    assert_eq!(
        lengths.len(),
        rows,
        "one length for each of the {rows} rows"
    );
    assert!(
        lengths.iter().all(|&n| n <= length),
        "{lengths:?} in rows of {length}"
    );

    let tokens = lengths.iter().sum();
    let log_likelihood = log_softmax(logits, 2).gather(2, targets.unsqueeze_dim(2));
    let mut log_likelihood = log_likelihood.squeeze_dim::<2>(2);
    if tokens < rows * length {
        let padding = padding(lengths, length, &log_likelihood.device());
        log_likelihood = log_likelihood.mask_fill(padding, 0.0);
    }
    Loss {
        mean: log_likelihood.sum().neg() / tokens as f64,
        tokens,
    }
}

/// `[rows, length]`, true behind the end of each row.
fn padding<B: Backend>(lengths: &[usize], length: usize, device: &B::Device) -> Tensor<B, 2, Bool> {
    let mask: Vec<bool> = lengths
        .iter()
        .flat_map(|&n| (0..length).map(move |t| t >= n))
        .collect();
    Tensor::from_data(TensorData::new(mask, [lengths.len(), length]), device)
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn_flex::{Flex, FlexDevice};

    fn loss(lengths: &[usize]) -> (f32, usize) {
        let device = FlexDevice;
        // Probabilities 3/4 and 1/4 everywhere.
        let logits = Tensor::<Flex, 1>::from_floats([3f32.ln(), 0.0], &device);
        let logits = logits.reshape([1, 1, 2]).repeat(&[2, 3, 1]);
        let targets = Tensor::<Flex, 2, Int>::from_ints([[0, 1, 0], [1, 1, 1]], &device);
        let Loss { mean, tokens } = next_token_loss(logits, targets, lengths);
        (mean.into_scalar(), tokens)
    }

    #[test]
    fn averages_over_valid_tokens_only() {
        let (likely, unlikely) = (-(0.75f32.ln()), -(0.25f32.ln()));
        let close = |(got, n): (f32, usize), want: f32, tokens| {
            assert!((got - want).abs() < 1e-6, "{got} {want}");
            assert_eq!(n, tokens);
        };
        close(loss(&[3, 3]), (2.0 * likely + 4.0 * unlikely) / 6.0, 6);
        close(loss(&[1, 2]), (likely + 2.0 * unlikely) / 3.0, 3);
        close(loss(&[1, 0]), likely, 1);
    }

    #[test]
    #[should_panic(expected = "in rows of 3")]
    fn refuses_lengths_beyond_the_row() {
        loss(&[4, 1]);
    }
}
