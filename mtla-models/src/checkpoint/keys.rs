//! Names of weights in a file, and where they live in a module: a table, one line a weight.

/// How a weight lies in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// As here.
    Same,
    /// `[outputs, inputs]` in the file, as PyTorch's linear maps are; `[inputs, outputs]` here, which after loading is
    /// a view of what the file has: products of a few rows read it in that order.
    Transposed,
    /// The same, laid out anew when it is loaded: for a matrix of which parts are taken.
    Rearranged,
}

/// One weight, or one weight of each layer: `{}` stands for the number of the layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key {
    /// The name in the file.
    pub file: &'static str,
    /// The path of the parameter here, with the names of fields and enum variants.
    pub ours: &'static str,
    /// How it lies in the file.
    pub layout: Layout,
}

impl Key {
    /// A weight that lies in the file as it does here.
    pub const fn same(file: &'static str, ours: &'static str) -> Self {
        Self {
            file,
            ours,
            layout: Layout::Same,
        }
    }

    /// The matrix of a linear map.
    pub const fn transposed(file: &'static str, ours: &'static str) -> Self {
        Self {
            file,
            ours,
            layout: Layout::Transposed,
        }
    }

    /// A matrix like that of a linear map, of which parts are taken.
    pub const fn rearranged(file: &'static str, ours: &'static str) -> Self {
        Self {
            file,
            ours,
            layout: Layout::Rearranged,
        }
    }
}

/// The name in the file of the parameter at `path`, and how it lies there; `None` if the table has no line for
/// it.
///
/// ```
/// use mtla_models::{checkpoint::{Layout, file_name}, llama};
///
/// let found = file_name(llama::KEYS, "layers.3.feed_forward.up.weight");
/// let expected = "model.layers.3.mlp.up_proj.weight".to_owned();
/// assert_eq!(found, Some((expected, Layout::Transposed)));
/// ```
pub fn file_name(keys: &[Key], path: &str) -> Option<(String, Layout)> {
    keys.iter().find_map(|key| {
        let layer = placeholder(key.ours, path)?;
        Some((key.file.replace("{}", layer), key.layout))
    })
}

/// Whether `name` is of the form `pattern`.
#[cfg(feature = "files")]
pub(super) fn matches(pattern: &str, name: &str) -> bool {
    placeholder(pattern, name).is_some()
}

/// What stands in the place of `{}` if the name is of the pattern's form; nothing if the pattern has no such place.
fn placeholder<'a>(pattern: &str, name: &'a str) -> Option<&'a str> {
    let Some((before, after)) = pattern.split_once("{}") else {
        return (pattern == name).then_some("");
    };
    let number = name.strip_prefix(before)?.strip_suffix(after)?;
    let is_number = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
    is_number.then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_number_stands_for_the_layer() {
        let keys = [Key::same("a.{}.b", "x.{}.y"), Key::same("c", "z")];
        let found = |path| file_name(&keys, path).map(|(name, _)| name);
        assert_eq!(found("x.12.y").as_deref(), Some("a.12.b"));
        assert_eq!(found("z").as_deref(), Some("c"));
        for path in ["x..y", "x.1.2.y", "x.one.y", "x.1.y.y", "zz", ""] {
            assert_eq!(found(path), None, "{path}");
        }
    }
}
