//! Small Llamas and their weights.

use std::{collections::BTreeMap, fs, path::Path};

use burn::{
    module::{Module, ModuleVisitor, Param},
    tensor::{Tensor, TensorData},
};
use burn_flex::{Flex, FlexDevice};
use mtla_models::{
    decoder::Decoder,
    llama::{LatentSizes, Llama, LlamaConfig},
};

use crate::common;

/// Two layers of width 24.
pub(crate) fn config() -> LlamaConfig {
    LlamaConfig {
        vocab_size: common::VOCAB,
        hidden_size: 24,
        intermediate_size: 20,
        num_hidden_layers: 2,
        num_attention_heads: 3,
        max_position_embeddings: 64,
        ..LlamaConfig::default()
    }
}

/// The same with MTLA and a low-rank query; no two of its sizes are equal, nor is a head as wide as in the Llama.
pub(crate) fn mtla() -> LlamaConfig {
    let sizes = LatentSizes {
        q_lora_rank: 10,
        kv_lora_rank: 12,
        qk_nope_head_dim: 14,
        qk_rope_head_dim: 4,
        v_head_dim: 6,
    };
    config().with_mtla(sizes, 2).unwrap()
}

/// A Llama of which no parameter is at its start.
pub(crate) fn llama(config: LlamaConfig) -> Llama<Flex> {
    let mut llama = Llama::new(config, &FlexDevice).unwrap();
    llama.decoder = common::model(&llama.config.decoder().unwrap(), &FlexDevice);
    llama
}

/// All parameters by their path.
pub(crate) fn weights(decoder: &Decoder<Flex>) -> BTreeMap<String, TensorData> {
    #[derive(Default)]
    struct Visitor {
        path: Vec<String>,
        found: BTreeMap<String, TensorData>,
    }

    impl ModuleVisitor<Flex> for Visitor {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<Flex, D>>) {
            let data = param.val().into_data();
            self.found.insert(self.path.join("."), data);
        }

        fn enter_module(&mut self, name: &str, _container: &str) {
            self.path.push(name.into());
        }

        fn exit_module(&mut self, _name: &str, _container: &str) {
            self.path.pop();
        }
    }

    let mut visitor = Visitor::default();
    decoder.visit(&mut visitor);
    visitor.found
}

/// All files of a directory by name.
pub(crate) fn files(directory: &Path) -> BTreeMap<String, Vec<u8>> {
    fs::read_dir(directory)
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            (name, fs::read(entry.path()).unwrap())
        })
        .collect()
}
