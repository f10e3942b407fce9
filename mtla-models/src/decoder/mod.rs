//! A decoder-only transformer over any attention variant.
//!
//! ```text
//! x = embedding(tokens)
//! x = x + attention(norm(x))          in every layer ("pre-norm": the residual stream itself is
//! x = x + feed_forward(norm(x))       never normalised)
//! logits = head(norm(x))
//! ```
//!
//! The position of a token enters through the rotary embedding of the attention alone; its rotations are
//! computed once a call and shared by all layers.
//!
//! There are two ways through the same weights. [`Decoder::forward`] takes whole sequences and is
//! trainable. [`prefill`](LanguageModel::prefill) and [`step`](LanguageModel::step) of the
//! [`LanguageModel`] trait go token by token over a [`Cache`], which is what [`generate`](crate::generate)
//! works with. Both give the same logits.

mod config;
mod layer;
#[cfg(feature = "store")]
mod store;

use burn::{
    module::Module,
    nn::{Embedding, Linear, norm::Normalization},
    tensor::{Int, Tensor, backend::Backend},
};
use mtla_core::{
    attention::AttentionInput,
    cache::{Cache, CacheSpec, PrefillPlan, StepPlan},
    linear::{multiply, project},
    ops::AttentionBackend,
};

use crate::generate::LanguageModel;
pub use config::{DecoderConfig, FeedForwardKind, NormKind};
use layer::Dropout;
pub use layer::{DecoderLayer, FeedForward};
#[cfg(feature = "store")]
pub use store::StoreError;

/// A decoder-only transformer. Made by [`DecoderConfig::init`].
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::{module::Module, tensor::{Int, Tensor}};
/// use burn_flex::Flex;
/// use mtla_core::attention::AttentionConfig;
/// use mtla_models::decoder::{DecoderConfig, DecoderInput};
///
/// let device = Default::default();
/// let config = DecoderConfig::new(100, 2, AttentionConfig::mtla(32, 4));
/// let model = config.init::<Flex>(&device).unwrap();
///
/// // Two rows, the second one two tokens shorter.
/// let tokens = Tensor::<Flex, 2, Int>::from_ints([[5, 6, 7, 8], [9, 10, 0, 0]], &device);
/// let logits = model.forward(DecoderInput::new(tokens).with_lengths(vec![4, 2]));
/// assert_eq!(logits.dims(), [2, 4, 100]);
/// assert_eq!(model.num_params(), 32_608);
/// # }
/// ```
#[derive(Module, Debug)]
pub struct Decoder<B: Backend> {
    /// `[vocab_size, d_model]`.
    pub embedding: Embedding<B>,
    /// The layers.
    pub layers: Vec<DecoderLayer<B>>,
    /// Norm of the last layer's output.
    pub norm: Normalization<B>,
    /// `d_model → vocab_size`; `None` where the embedding is used for it.
    pub head: Option<Linear<B>>,
    dropout: f64,
}

/// A batch of whole token sequences for [`Decoder::forward`].
///
/// Rows are left-aligned: row `b` is its first `lengths[b]` tokens. What comes after is padding (any token
/// ids of the vocabulary), has no influence on the row, and its logits mean nothing.
#[derive(Debug, Clone)]
pub struct DecoderInput<B: Backend> {
    tokens: Tensor<B, 2, Int>,
    lengths: Vec<usize>,
    positions: Option<Vec<Vec<usize>>>,
    dropout_seed: Option<u64>,
}

impl<B: Backend> DecoderInput<B> {
    /// `tokens [batch, tokens]`, without padding and dropout.
    pub fn new(tokens: Tensor<B, 2, Int>) -> Self {
        let [batch, length] = tokens.dims();
        Self {
            tokens,
            lengths: vec![length; batch],
            positions: None,
            dropout_seed: None,
        }
    }

    /// Valid tokens of each row.
    #[must_use]
    pub fn with_lengths(mut self, lengths: Vec<usize>) -> Self {
        self.lengths = lengths;
        self
    }

    /// Positions of the tokens for the rotary embedding: one list per row, or one list for all rows;
    /// `0, 1, 2, …` unless given.
    #[must_use]
    pub fn with_positions(mut self, positions: Vec<Vec<usize>>) -> Self {
        self.positions = Some(positions);
        self
    }

    /// Applies the configured dropout; without a seed nothing is dropped.
    ///
    /// The same seed drops the same things again. The masks on activations come from the backend's random
    /// numbers, which the call seeds ([`Backend::seed`], one state for the whole process on most
    /// backends): don't draw from the same backend in another thread if you rely on it.
    #[must_use]
    pub fn with_dropout_seed(mut self, seed: Option<u64>) -> Self {
        self.dropout_seed = seed;
        self
    }
}

impl<B: Backend> Decoder<B> {
    /// What the cache of each layer looks like; slots have the element type of the weights.
    pub fn cache_spec(&self) -> CacheSpec {
        let spec = self.layers[0].attention.cache_spec();
        spec.with_dtype(self.embedding.weight.dtype())
    }

    /// Bytes of cache that a token of a long sequence takes, over all layers.
    pub fn cache_bytes_per_token(&self) -> f64 {
        let spec = self.cache_spec();
        let slot = spec.layout.width() * self.embedding.weight.dtype().size();
        (slot * self.layers.len()) as f64 / spec.stride as f64
    }
}

impl<B: AttentionBackend> Decoder<B> {
    /// Logits of hidden states: `x [.., d_model]` → `[.., vocab_size]`.
    fn logits<const D: usize>(&self, x: Tensor<B, D>) -> Tensor<B, D> {
        let x = self.norm.forward(x);
        match &self.head {
            Some(head) => project(head, x),
            None => multiply(x, self.embedding.weight.val().transpose()),
        }
    }

    /// Logits of the next token at every place, trainable: tokens `[batch, tokens]` →
    /// `[batch, tokens, vocab_size]`.
    ///
    /// # Panics
    /// If there is not one length a row, or one is more than there are tokens, or positions are given and do
    /// not fit the tokens. What a token id outside the vocabulary does is up to the backend.
    pub fn forward(&self, input: DecoderInput<B>) -> Tensor<B, 3> {
        let x = self.run(input, |_| {});
        self.logits(x)
    }

    /// The residual stream `[batch, tokens, d_model]` of [`forward`](Self::forward): the embeddings, then what
    /// comes out of each layer, the last one through the norm before the head.
    ///
    /// # Panics
    /// As [`forward`](Self::forward).
    pub fn hidden_states(&self, input: DecoderInput<B>) -> Vec<Tensor<B, 3>> {
        let mut states = Vec::with_capacity(self.layers.len() + 1);
        let last = self.run(input, |x| states.push(x.clone()));
        states.push(self.norm.forward(last));
        states
    }

    /// The output of the last layer; `before` is shown the input of every layer.
    fn run(&self, input: DecoderInput<B>, mut before: impl FnMut(&Tensor<B, 3>)) -> Tensor<B, 3> {
        let DecoderInput {
            tokens,
            lengths,
            positions,
            dropout_seed,
        } = input;
        let dropout = match dropout_seed {
            Some(seed) => {
                B::seed(&tokens.device(), seed);
                Dropout(self.dropout)
            }
            None => Dropout::NONE,
        };
        let mut x = dropout.apply(self.embedding.forward(tokens));
        let mut example = AttentionInput::new(x.clone());
        if let Some(positions) = positions {
            example = example.with_positions(positions);
        }
        let rotary = self.layers[0].attention.rotary(&example);
        for (number, layer) in self.layers.iter().enumerate() {
            before(&x);
            x = layer.forward(x, dropout, |attention, x| {
                let input = AttentionInput::new(x)
                    .with_lengths(lengths.clone())
                    .with_rotary(Some(rotary.clone()))
                    .with_dropout_seed(dropout_seed.map(|seed| layer_seed(seed, number)));
                attention.forward(input).context
            });
        }
        x
    }
}

impl<B: AttentionBackend> LanguageModel<B> for Decoder<B> {
    fn vocab_size(&self) -> usize {
        self.embedding.weight.dims()[0]
    }

    fn device(&self) -> B::Device {
        self.embedding.weight.device()
    }

    fn new_cache(&self) -> Cache<B> {
        Cache::new(self.cache_spec(), self.layers.len(), &self.device())
    }

    fn prefill(
        &self,
        tokens: Tensor<B, 2, Int>,
        plan: &PrefillPlan<B>,
        cache: &mut Cache<B>,
    ) -> Tensor<B, 2> {
        let mut x = self.embedding.forward(tokens);
        let (last, before) = self.layers.split_last().expect("at least one layer");
        let rotary = last.attention.prefill_rotary(plan, &x);
        let plan = plan.clone().with_rotary(Some(rotary));
        for (number, layer) in before.iter().enumerate() {
            let pool = cache.layer_mut(number);
            x = layer.forward(x, Dropout::NONE, |attention, x| {
                attention.prefill(x, &plan, pool)
            });
        }
        // All tokens enter the last layer's cache, but only the last ones come out of it.
        let pool = cache.layer_mut(before.len());
        let normed = last.attention_norm.forward(x.clone());
        let attended = last.attention.prefill_last(normed, &plan, pool);
        self.logits(last.feed_forward(plan.select_last(x) + attended, Dropout::NONE))
    }

    fn step(
        &self,
        tokens: Tensor<B, 1, Int>,
        plan: &StepPlan<B>,
        cache: &mut Cache<B>,
    ) -> Tensor<B, 2> {
        let mut x = self.embedding.weight.val().select(0, tokens);
        let rotary = self.layers[0].attention.step_rotary(plan, &x);
        let plan = plan.clone().with_rotary(Some(rotary));
        for (number, layer) in self.layers.iter().enumerate() {
            let pool = cache.layer_mut(number);
            x = layer.forward(x, Dropout::NONE, |attention, x| {
                attention.step(x, &plan, pool)
            });
        }
        self.logits(x)
    }
}

/// A seed of its own for the attention of each layer: multiples of the golden ratio, which are far apart.
fn layer_seed(seed: u64, layer: usize) -> u64 {
    seed.wrapping_add((layer as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15))
}
