//! Dropout by a counter-based mask: whether a weight is kept is a pure function of a seed and of the
//! weight's place, so that a backward pass (or another backend, or a resumed run) replays the same mask
//! without storing it. 32-bit arithmetic only, so that a GPU kernel can compute the same bits.

use burn::tensor::{DType, Tensor, TensorData, backend::Backend};

/// Dropout with probability `probability`, replayed from `seed`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    /// Probability of dropping an attention weight, in `[0, 1)`.
    pub probability: f64,
    /// The seed of this call's mask.
    pub seed: u64,
}

impl Dropout {
    /// Whether the weight in `row` (rows of the score matrix are numbered `(batch·heads + head)·queries +
    /// query`) and `column` (the self term has the number after the last column) is kept.
    pub fn keeps(&self, row: u32, column: u32) -> bool {
        self.row(row).keeps(column)
    }

    /// What a row of the mask is made of.
    pub(crate) fn numbers(&self) -> DropoutNumbers {
        let (low, high) = (self.seed as u32, (self.seed >> 32) as u32);
        DropoutNumbers {
            seed: mix(high ^ mix(low)),
            // As many of the 2^32 hashes are below it as are to be dropped; `p < 1`, so it fits.
            threshold: (self.probability * 4_294_967_296.0).ceil() as u32,
            factor: (1.0 / (1.0 - self.probability)) as f32,
        }
    }

    /// One row of the mask.
    pub(crate) fn row(&self, row: u32) -> DropoutRow {
        let numbers = self.numbers();
        DropoutRow {
            hash: mix(row ^ numbers.seed),
            numbers,
        }
    }

    /// The whole mask: `1 / (1 − p)` where a weight is kept and 0 where it is dropped.
    pub(crate) fn mask<B: Backend>(
        &self,
        [batch, heads, queries, columns]: [usize; 4],
        dtype: DType,
        device: &B::Device,
    ) -> Tensor<B, 4> {
        let rows = (batch * heads * queries) as u32;
        let values: Vec<f32> = (0..rows)
            .map(|row| self.row(row))
            .flat_map(|row| (0..columns).map(move |column| row.factor(column) as f32))
            .collect();
        Tensor::from_data(
            TensorData::new(values, [batch, heads, queries, columns]),
            (device, dtype),
        )
    }
}

/// One row of a mask.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DropoutRow {
    hash: u32,
    numbers: DropoutNumbers,
}

/// A mask in three numbers.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct DropoutNumbers {
    /// The hash of the seed.
    pub(crate) seed: u32,
    /// Weights are kept whose hash is not below it.
    pub(crate) threshold: u32,
    /// What kept weights are multiplied by.
    pub(crate) factor: f32,
}

impl DropoutRow {
    #[inline]
    fn keeps(self, column: u32) -> bool {
        mix(column ^ self.hash) >= self.numbers.threshold
    }

    /// What a weight is multiplied by: `1 / (1 − p)` where it is kept and 0 where it is dropped.
    #[inline]
    pub(crate) fn factor(self, column: usize) -> f64 {
        let factor = if self.keeps(column as u32) {
            self.numbers.factor
        } else {
            0.0
        };
        f64::from(factor)
    }
}

/// A 32-bit integer hash with full avalanche (two xor-shift-multiply rounds).
#[inline]
fn mix(mut x: u32) -> u32 {
    x = x.wrapping_add(0x9e37_79b9);
    x ^= x >> 16;
    x = x.wrapping_mul(0x7feb_352d);
    x ^= x >> 15;
    x = x.wrapping_mul(0x846c_a68b);
    x ^ (x >> 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_asked_share_and_differs_by_seed() {
        let share = |seed, probability| {
            let dropout = Dropout { probability, seed };
            let kept = (0..100u32)
                .flat_map(|r| (0..1000u32).map(move |c| (r, c)))
                .filter(|(r, c)| dropout.keeps(*r, *c))
                .count();
            kept as f64 / 100_000.0
        };
        assert!((share(1, 0.1) - 0.9).abs() < 0.01);
        assert!((share(2, 0.5) - 0.5).abs() < 0.01);
        assert!((share(3, 0.0) - 1.0).abs() < f64::EPSILON);
        let agree = (0..10_000u32)
            .filter(|c| {
                let a = Dropout {
                    probability: 0.5,
                    seed: 1 << 40,
                };
                let b = Dropout {
                    probability: 0.5,
                    seed: 2 << 40,
                };
                a.keeps(0, *c) == b.keeps(0, *c)
            })
            .count();
        assert!((4_800..5_200).contains(&agree), "{agree} of 10000 agree");
    }
}
