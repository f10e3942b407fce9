//! What a call did with its tokens, for pictures.

use burn::tensor::{Int, Tensor, TensorData, backend::Backend};

use super::{Cache, LayerPool, NewTokens};
use crate::{
    ops::{AttentionBackend, DecodeProblem},
    temporal::folded_gates,
};

/// What a layer did with the tokens of the last call that went over its pool. See [`Cache::observe`].
#[derive(Debug, Clone)]
pub struct Observation<B: Backend> {
    /// The gates `[rows, tokens]` with which the new tokens were merged into their slots; those after a row's last
    /// token mean nothing. `None` where nothing is gated.
    pub gates: Option<Tensor<B, 2>>,
    /// After a step, the attention weights `[rows, heads, slots]`: of the slots of each row in their order
    /// ([`Cache::row_slots`]), and 0 after a row's last.
    pub weights: Option<Tensor<B, 3>>,
}

impl<B: AttentionBackend> Cache<B> {
    /// Keeps from now on what `layers` do, and of no others. What is kept is on the device and costs a few operations
    /// of tensors more a call; [`LayerPool::observation`] gives it out.
    ///
    /// ```
    /// # #[cfg(feature = "flex")] {
    /// use burn::tensor::{Distribution, Tensor};
    /// use burn_flex::Flex;
    /// use mtla_core::{attention::AttentionConfig, cache::Cache};
    ///
    /// let device = Default::default();
    /// let attention = AttentionConfig::mtla(64, 4).init::<Flex>(&device).unwrap();
    /// let mut cache = Cache::new(attention.cache_spec(), 1, &device);
    /// cache.observe(&[0]);
    /// cache.join(1);
    /// for _ in 0..3 {
    ///     let plan = cache.step(&[0]);
    ///     let x = Tensor::random([1, 64], Distribution::Default, &device);
    ///     attention.step(x, &plan, cache.layer_mut(0));
    /// }
    /// let observation = cache.layer(0).observation().unwrap();
    /// assert_eq!(observation.gates.as_ref().unwrap().dims(), [1, 1]);
    /// // Three tokens in two slots.
    /// assert_eq!(observation.weights.as_ref().unwrap().dims(), [1, 4, 2]);
    /// # }
    /// ```
    ///
    /// # Panics
    /// If there is no such layer.
    pub fn observe(&mut self, layers: &[usize]) {
        for pool in &mut self.layers {
            (pool.is_observed, pool.observation) = (false, None);
        }
        for layer in layers {
            self.layer_mut(*layer).is_observed = true;
        }
    }
}

impl<B: Backend> LayerPool<B> {
    /// What the last call did; `None` if that is not [kept](Cache::observe), or it was a prompt and nothing is gated.
    pub fn observation(&self) -> Option<&Observation<B>> {
        self.observation.as_ref()
    }

    /// Keeps the gates of whole prompts, `[rows · tokens, 1]`.
    pub(super) fn observe_prefill(&mut self, gates: &Tensor<B, 2>, rows: usize) {
        if self.is_observed {
            let tokens = gates.dims()[0] / rows;
            self.observation = Some(Observation {
                gates: Some(gates.clone().reshape([rows, tokens]).detach()),
                weights: None,
            });
        }
    }

    /// The gates `[rows, 1]` of new tokens.
    pub(super) fn step_gates(new: &NewTokens<B>, problem: &DecodeProblem) -> Option<Tensor<B, 2>> {
        let table = new.gates.as_ref()?;
        let chunks: Vec<i64> = problem
            .starts
            .iter()
            .map(|start| (start / problem.stride) as i64)
            .collect();
        let rows = chunks.len();
        let chunks = TensorData::new(chunks, [rows]);
        let chunks = Tensor::<B, 1, Int>::from_data(chunks, &new.row.device());
        let latents = new.row.clone().narrow(1, 0, table.dims()[1] - 1);
        Some(folded_gates(latents, table.clone().select(0, chunks)))
    }
}
