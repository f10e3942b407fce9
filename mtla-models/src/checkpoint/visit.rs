//! The parameters of a module by the names that a file gives them.

use burn::{
    module::{Module, ModuleVisitor, Param},
    tensor::{Tensor, backend::Backend},
};

use super::{CheckpointError, Key, Layout, file_name};

/// A parameter as a file would have it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    /// The name in the file.
    pub(super) name: String,
    /// How it lies there.
    pub(super) layout: Layout,
    /// Its shape there.
    pub(super) shape: Vec<usize>,
}

/// The fields that lead to a parameter.
#[derive(Debug, Default)]
pub(super) struct Path(Vec<String>);

impl Path {
    pub(super) fn enter(&mut self, name: &str) {
        self.0.push(name.into());
    }

    pub(super) fn exit(&mut self) {
        self.0.pop();
    }

    /// What the file has for the parameter of shape `shape` here.
    pub(super) fn entry(&self, keys: &[Key], shape: &[usize]) -> Result<Entry, CheckpointError> {
        let path = self.0.join(".");
        let (name, layout) = file_name(keys, &path).ok_or(CheckpointError::NoName { path })?;
        let mut shape = shape.to_vec();
        if layout != Layout::Same {
            shape.reverse();
        }
        Ok(Entry {
            name,
            layout,
            shape,
        })
    }
}

/// All parameters of a module, in order. Weights that are not drawn yet stay so.
pub(super) fn entries<B: Backend, M: Module<B>>(
    module: &M,
    keys: &[Key],
) -> Result<Vec<Entry>, CheckpointError> {
    struct Visitor<'a> {
        keys: &'a [Key],
        path: Path,
        found: Result<Vec<Entry>, CheckpointError>,
    }

    impl<B: Backend> ModuleVisitor<B> for Visitor<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            let Ok(found) = &mut self.found else { return };
            match self.path.entry(self.keys, &param.lazy_shape()) {
                Ok(entry) => found.push(entry),
                Err(error) => self.found = Err(error),
            }
        }

        fn enter_module(&mut self, name: &str, _container: &str) {
            self.path.enter(name);
        }

        fn exit_module(&mut self, _name: &str, _container: &str) {
            self.path.exit();
        }
    }

    let mut visitor = Visitor {
        keys,
        path: Path::default(),
        found: Ok(Vec::new()),
    };
    module.visit(&mut visitor);
    visitor.found
}
