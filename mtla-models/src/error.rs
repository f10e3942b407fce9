//! Configurations that cannot work.

/// A configuration that cannot work. The message names the field, its value and what would work.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A field of the model or of the generation.
    #[error("{of} configuration: {field} is {found}, expected {expected}")]
    Field {
        /// Which configuration.
        of: &'static str,
        /// The field at fault.
        field: &'static str,
        /// Its value.
        found: String,
        /// What would work.
        expected: String,
    },
    /// A field of the attention.
    #[error(transparent)]
    Attention(#[from] mtla_core::attention::ConfigError),
}

/// Makes checks of the fields of one configuration: `check(holds, field, found, expected)`.
pub(crate) fn checker(
    of: &'static str,
) -> impl Fn(bool, &'static str, &dyn ToString, &str) -> Result<(), ConfigError> {
    move |holds, field, found, expected| {
        if holds {
            return Ok(());
        }
        Err(ConfigError::Field {
            of,
            field,
            found: found.to_string(),
            expected: expected.to_owned(),
        })
    }
}
