//! Decoders as safetensors in memory, for programs without a disk.

use std::rc::Rc;

use burn::{
    module::Module,
    tensor::{DType, Tensor, backend::Backend},
};
use burn_store::{
    ModuleAdapter, ModuleSnapshot, SafetensorsStore, SafetensorsStoreError, TensorSnapshot,
};

use super::{Decoder, DecoderConfig};
use crate::error::ConfigError;

/// Why a decoder cannot be read from bytes, or written.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The bytes are not safetensors, or lack a weight, or one has another shape.
    #[error("the weights do not fit the configuration: {0}")]
    Weights(#[from] SafetensorsStoreError),
    /// A weight that the decoder does not have.
    #[error("the weights have `{0}`, which a decoder of this configuration does not have")]
    Unknown(String),
}

/// Numbers in another type of floats.
#[derive(Debug, Clone)]
struct Cast(DType);

impl ModuleAdapter for Cast {
    fn adapt(&self, snapshot: &TensorSnapshot) -> TensorSnapshot {
        let dtype = self.0;
        if snapshot.dtype == dtype || !snapshot.dtype.is_float() {
            return snapshot.clone();
        }
        let data = snapshot.clone_data_fn();
        TensorSnapshot::from_closure(
            Rc::new(move || Ok(data()?.convert_dtype(dtype))),
            dtype,
            snapshot.shape.clone(),
            snapshot.path_stack.clone().unwrap_or_default(),
            snapshot.container_stack.clone().unwrap_or_default(),
            snapshot.tensor_id.unwrap_or_default(),
        )
    }

    fn clone_box(&self) -> Box<dyn ModuleAdapter> {
        Box::new(self.clone())
    }
}

impl DecoderConfig {
    /// A decoder with the weights that [`Decoder::to_safetensors`] wrote, in the device's default type of floats.
    ///
    /// # Errors
    /// [`StoreError`] if the sizes cannot be, or the weights are damaged or those of another decoder.
    ///
    /// ```
    /// # #[cfg(feature = "flex")] {
    /// use burn::tensor::DType;
    /// use burn_flex::Flex;
    /// use mtla_core::attention::AttentionConfig;
    /// use mtla_models::decoder::DecoderConfig;
    ///
    /// let device = Default::default();
    /// let config = DecoderConfig::new(100, 2, AttentionConfig::mtla(32, 4));
    /// let model = config.init::<Flex>(&device).unwrap();
    /// let bytes = model.to_safetensors(DType::F16).unwrap();
    /// let again = config.load_safetensors::<Flex>(bytes, &device).unwrap();
    ///
    /// let other = DecoderConfig::new(101, 2, AttentionConfig::mtla(32, 4));
    /// # let bytes = model.to_safetensors(DType::F16).unwrap();
    /// assert!(other.load_safetensors::<Flex>(bytes, &device).is_err());
    /// # let _ = again;
    /// # }
    /// ```
    pub fn load_safetensors<B: Backend>(
        &self,
        bytes: Vec<u8>,
        device: &B::Device,
    ) -> Result<Decoder<B>, StoreError> {
        let mut decoder = self.init_lazy(device)?;
        let dtype = Tensor::<B, 1>::zeros([1], device).dtype();
        let mut store = SafetensorsStore::from_bytes(Some(bytes)).with_from_adapter(Cast(dtype));
        let result = decoder.load_from(&mut store)?;
        match result.unused.into_iter().next() {
            Some(name) => Err(StoreError::Unknown(name)),
            None => Ok(decoder.no_grad()),
        }
    }
}

impl<B: Backend> Decoder<B> {
    /// All weights as safetensors, in the type of floats `dtype`, under the names of the fields here. Hugging Face knows
    /// other names: for these a [`Llama`](crate::llama::Llama) writes its files.
    ///
    /// # Errors
    /// [`StoreError`] if safetensors have no such type.
    pub fn to_safetensors(&self, dtype: DType) -> Result<Vec<u8>, StoreError> {
        let mut store = SafetensorsStore::from_bytes(None).with_to_adapter(Cast(dtype));
        self.save_into(&mut store)?;
        Ok(store.get_bytes()?)
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn_flex::{Flex, FlexDevice};
    use mtla_core::attention::AttentionConfig;

    use super::*;
    use crate::decoder::DecoderInput;

    fn config(attention: AttentionConfig) -> DecoderConfig {
        DecoderConfig::new(40, 2, attention)
    }

    fn logits(model: &Decoder<Flex>) -> Vec<f32> {
        let tokens = Tensor::from_ints([[5, 6, 7, 8, 9, 10, 11]], &FlexDevice);
        let logits = model.forward(DecoderInput::new(tokens));
        logits.into_data().iter().collect()
    }

    #[test]
    fn the_numbers_come_back() {
        for attention in [AttentionConfig::mtla(16, 2), AttentionConfig::gqa(16, 2, 1)] {
            let config = config(attention.with_bias(true)).with_tied_embeddings(false);
            let model = config.init::<Flex>(&FlexDevice).unwrap();
            let expected = logits(&model);
            for (dtype, bound) in [(DType::F32, 0.0), (DType::F16, 2e-2)] {
                let bytes = model.to_safetensors(dtype).unwrap();
                let numbers = bytes.len() / dtype.size();
                assert!(numbers.abs_diff(model.num_params()) < 3000, "{numbers}");
                let again = config.load_safetensors(bytes, &FlexDevice).unwrap();
                let errors = expected.iter().zip(logits(&again));
                let largest = errors.fold(0f32, |most, (a, b)| most.max((a - b).abs()));
                assert!(largest <= bound, "{dtype:?}: {largest}");
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let model = config(AttentionConfig::mtla(16, 2))
            .init::<Flex>(&FlexDevice)
            .unwrap();
        let bytes = model.to_safetensors(DType::F32).unwrap();
        let load = |config: DecoderConfig, bytes| {
            let loaded = config.load_safetensors::<Flex>(bytes, &FlexDevice);
            loaded.err().map(|error| error.to_string())
        };
        let same = || config(AttentionConfig::mtla(16, 2));
        let wider = config(AttentionConfig::mtla(16, 2)).with_d_ff(32);
        let wider = load(wider, bytes.clone()).unwrap();
        assert!(wider.contains("feed_forward"), "{wider}");
        let dense = load(config(AttentionConfig::mha(16, 2)), bytes.clone()).unwrap();
        assert!(dense.contains("q_proj"), "{dense}");
        let fewer = DecoderConfig {
            n_layers: 1,
            ..same()
        };
        let fewer = load(fewer, bytes.clone()).unwrap();
        assert!(fewer.contains("layers.1."), "{fewer}");
        for cut in [0, 7, 100, bytes.len() - 1] {
            assert!(load(same(), bytes[..cut].to_vec()).is_some(), "{cut}");
        }
    }
}
