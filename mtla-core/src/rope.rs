//! Rotary position embedding (Su et al. 2021), the decoupled form of MLA included.
//!
//! A rotation turns pairs of channels by `position · frequency`. Two pairings are in use and they are
//! different functions of the same weights: [`Interleaved`](RotaryLayout::Interleaved) turns neighbours
//! `(x₀,x₁), (x₂,x₃), …` (the paper, fairseq, `DeepSeek`), [`HalfSplit`](RotaryLayout::HalfSplit) turns
//! `(x_i, x_{i+r/2})` (Hugging Face Llama). Going from one to the other permutes the channels even-then-odd.
//!
//! Angles are computed on the host in 64 bits from integer positions, so that neither half precision nor
//! position 100,000 makes them coarse. A model computes a [`Rotary`] once per batch and hands it to all of
//! its layers.

use burn::tensor::{DType, FloatDType, Int, Tensor, TensorData, backend::Backend};
use burn_autodiff::{Autodiff, checkpoint::strategy::CheckpointStrategy};
use serde::{Deserialize, Serialize};

/// Which channels form a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RotaryLayout {
    /// Neighbours: `(x₀,x₁), (x₂,x₃), …`.
    #[default]
    Interleaved,
    /// Halves: `(x_i, x_{i+r/2})`.
    HalfSplit,
}

/// Rescaling of the frequencies for contexts longer than those trained on.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum RotaryScaling {
    /// Frequencies as they are.
    #[default]
    None,
    /// Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between blended.
    Llama3 {
        /// Stretch of the longest wavelengths.
        factor: f64,
        /// Wavelengths above `original_context / low_freq_factor` are stretched in full.
        low_freq_factor: f64,
        /// Wavelengths below `original_context / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context length of the original training, in tokens.
        original_context: usize,
    },
}

/// Configuration of a rotary embedding.
///
/// ```
/// use mtla_core::rope::{RotaryConfig, RotaryLayout};
///
/// let rope = RotaryConfig::default();
/// assert_eq!(rope.layout, RotaryLayout::Interleaved);
/// assert_eq!(rope.frequencies(4), vec![1.0, 0.01]);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RotaryConfig {
    /// Base of the frequencies.
    pub theta: f64,
    /// Which channels form a pair.
    pub layout: RotaryLayout,
    /// Rescaling for long contexts.
    pub scaling: RotaryScaling,
}

impl Default for RotaryConfig {
    fn default() -> Self {
        Self {
            theta: 10_000.0,
            layout: RotaryLayout::Interleaved,
            scaling: RotaryScaling::None,
        }
    }
}

impl RotaryConfig {
    /// The `dim / 2` angular frequencies in radians per position: `theta^(−2i/dim)`, rescaled.
    pub fn frequencies(&self, dim: usize) -> Vec<f64> {
        (0..dim / 2)
            .map(|i| self.theta.powf(-2.0 * i as f64 / dim as f64))
            .map(|frequency| self.rescale(frequency))
            .collect()
    }

    fn rescale(&self, frequency: f64) -> f64 {
        let RotaryScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_context,
        } = self.scaling
        else {
            return frequency;
        };
        let turns = original_context as f64 * frequency / std::f64::consts::TAU;
        if turns < low_freq_factor {
            frequency / factor
        } else if turns > high_freq_factor {
            frequency
        } else {
            let keep = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
            frequency * ((1.0 - keep) / factor + keep)
        }
    }

    /// Rotations for `positions`, one list per row (or a single list for all rows); lists are filled up
    /// to the longest with position 0.
    ///
    /// The table is kept in 32 bits, or in 64 where `dtype` is.
    pub fn rotary<B: Backend>(
        &self,
        dim: usize,
        positions: &[Vec<usize>],
        dtype: DType,
        device: &B::Device,
    ) -> Rotary<B> {
        let frequencies = self.frequencies(dim);
        let length = positions.iter().map(Vec::len).max().unwrap_or(0);
        let angles: Vec<f64> = positions
            .iter()
            .flat_map(|row| (0..length).map(move |i| row.get(i).copied().unwrap_or(0)))
            .flat_map(|position| {
                let frequencies = &frequencies;
                (0..dim).map(move |i| position as f64 * frequencies[self.layout.pair(i, dim)])
            })
            .collect();
        let dtype = if dtype == DType::F64 {
            DType::F64
        } else {
            DType::F32
        };
        let tensor = |values: Vec<f64>, shape: &[usize]| {
            TensorData::new(values, shape.to_vec()).convert_dtype(dtype)
        };
        let cos = angles.iter().map(|a| a.cos());
        let table = cos.chain(angles.iter().map(|a| a.sin())).collect();
        let table = tensor(table, &[2, positions.len(), length, dim]);
        let (partners, signs) = self.layout.quarter_turn(dim);
        Rotary {
            layout: self.layout,
            table: Tensor::from_data(table, (device, dtype)),
            partners: Tensor::from_data(TensorData::new(partners, [dim]), device),
            signs: Tensor::from_data(tensor(signs, &[1, dim]), (device, dtype)),
        }
    }
}

impl RotaryLayout {
    /// The pair that channel `i` of `dim` belongs to.
    fn pair(self, i: usize, dim: usize) -> usize {
        match self {
            Self::Interleaved => i / 2,
            Self::HalfSplit => i % (dim / 2),
        }
    }

    /// Every pair turned by 90°, `(a, b) → (−b, a)`: for each channel its partner, and the sign that this gets.
    fn quarter_turn(self, dim: usize) -> (Vec<i64>, Vec<f64>) {
        (0..dim)
            .map(|i| {
                let (is_first, distance) = match self {
                    Self::Interleaved => (i % 2 == 0, 1),
                    Self::HalfSplit => (i < dim / 2, dim / 2),
                };
                if is_first {
                    ((i + distance) as i64, -1.0)
                } else {
                    ((i - distance) as i64, 1.0)
                }
            })
            .unzip()
    }
}

/// Rotations for the positions of one batch: `x cos + turn(x) sin`, where `turn` turns every pair by 90°.
#[derive(Debug, Clone)]
pub struct Rotary<B: Backend> {
    pub(crate) layout: RotaryLayout,
    /// Cosines, and sines, of every channel's angle: `[2, rows|1, tokens, dim]`.
    pub(crate) table: Tensor<B, 4>,
    /// The turn: of each channel its partner `[dim]`, and the sign `[1, dim]` that this gets.
    partners: Tensor<B, 1, Int>,
    signs: Tensor<B, 2>,
}

impl<B: Backend> Rotary<B> {
    /// One token a row, picked by its number among `rows · tokens`: `[rows, 1, dim]`.
    pub(crate) fn select(&self, tokens: Tensor<B, 1, Int>) -> Self {
        let rows = tokens.dims()[0];
        let [two, from, length, dim] = self.table.dims();
        assert_eq!(
            from, rows,
            "a rotary table with {from} rows for {rows} rows"
        );
        let table = self.table.clone().reshape([two, from * length, dim]);
        Self {
            table: table.select(1, tokens).reshape([two, rows, 1, dim]),
            layout: self.layout,
            partners: self.partners.clone(),
            signs: self.signs.clone(),
        }
    }

    /// The rotations that undo these.
    pub(crate) fn inverse(self) -> Self {
        let [cos, sin] = [0, 1].map(|which| self.table.clone().narrow(0, which, 1));
        Self {
            table: Tensor::cat(vec![cos, sin.neg()], 0),
            ..self
        }
    }

    /// Rotates `x [rows, tokens, heads, dim]`; computed in 32 bits where `x` is narrower.
    ///
    /// # Panics
    /// If the tokens or the width of `x` are not those of the table.
    pub fn apply(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        let [rows, tokens, heads, dim] = x.dims();
        let dtype = x.dtype();
        let x = match dtype {
            DType::F16 | DType::BF16 => x.cast(FloatDType::F32),
            _ => x,
        };
        let turned = x
            .clone()
            .reshape([rows * tokens * heads, dim])
            .select(1, self.partners.clone())
            * self.signs.clone();
        let width = tokens * heads * dim;
        let [_, from, length, columns] = self.table.dims();
        assert!(
            length == tokens && columns == dim && (from == 1 || from == rows),
            "a rotary table of {from} rows, {length} tokens and {columns} channels does not fit x [{rows}, {tokens}, \
             {heads}, {dim}]"
        );
        let [cos, sin] = [0, 1].map(|which| {
            let table = self.table.clone().narrow(0, which, 1);
            let table = table.reshape([from, tokens, 1, dim]);
            table.repeat_dim(2, heads).reshape([from, width])
        });
        let rotated = x.reshape([rows, width]) * cos + turned.reshape([rows, width]) * sin;
        let rotated = rotated.reshape([rows, tokens, heads, dim]);
        if rotated.dtype() == dtype {
            rotated
        } else {
            rotated.cast(dtype)
        }
    }
}

impl<B: Backend, C: CheckpointStrategy> Rotary<Autodiff<B, C>> {
    /// Without the autodiff graph.
    pub(crate) fn inner(self) -> Rotary<B> {
        Rotary {
            layout: self.layout,
            table: self.table.inner(),
            partners: self.partners.inner(),
            signs: self.signs.inner(),
        }
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use burn_flex::Flex;

    #[test]
    fn turns_by_position_times_frequency() {
        let device = Default::default();
        let x = Tensor::<Flex, 4>::from_data([[[[1.0, 0.0, 0.0, 1.0]]]], &device);
        let rope = RotaryConfig::default();
        let y = rope
            .rotary(4, &[vec![3]], DType::F32, &device)
            .apply(x.clone());
        let (a, b) = (3.0f32, 0.03f32);
        let expected = TensorData::from([[[[a.cos(), a.sin(), -b.sin(), b.cos()]]]]);
        y.into_data()
            .assert_approx_eq::<f32>(&expected, burn::tensor::Tolerance::absolute(1e-6));

        let halves = RotaryConfig {
            layout: RotaryLayout::HalfSplit,
            ..rope
        };
        let y = halves.rotary(4, &[vec![3]], DType::F32, &device).apply(x);
        // Pairs (x0, x2) = (1, 0) and (x1, x3) = (0, 1).
        let expected = TensorData::from([[[[a.cos(), -b.sin(), a.sin(), b.cos()]]]]);
        y.into_data()
            .assert_approx_eq::<f32>(&expected, burn::tensor::Tolerance::absolute(1e-6));
    }

    #[test]
    fn llama3_scaling_keeps_short_and_stretches_long_wavelengths() {
        let rope = RotaryConfig {
            theta: 500_000.0,
            scaling: RotaryScaling::Llama3 {
                factor: 8.0,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_context: 8192,
            },
            ..Default::default()
        };
        let plain = RotaryConfig {
            scaling: RotaryScaling::None,
            ..rope
        }
        .frequencies(128);
        let scaled = rope.frequencies(128);
        assert!((scaled[0] - plain[0]).abs() < 1e-15);
        assert!((scaled[63] / plain[63] - 1.0 / 8.0).abs() < 1e-12);
        assert!(scaled.windows(2).all(|w| w[0] > w[1]));
    }
}
