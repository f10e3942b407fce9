//! Small Llamas and their weights.

use std::{collections::BTreeMap, fs, path::Path};

use burn::{
    module::{Module, ModuleVisitor, Param},
    tensor::{Tensor, TensorData},
};
use burn_flex::{Flex, FlexDevice};
use mtla_models::{
    decoder::Decoder,
    llama::{Llama, LlamaConfig},
};

use crate::common;
pub(crate) use crate::common::llama as config;

/// The same with MTLA.
pub(crate) fn mtla() -> LlamaConfig {
    config().with_mtla(common::latent_sizes(), 2).unwrap()
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
