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
        let low = self.seed as u32;
        let high = (self.seed >> 32) as u32;
        let hash = mix(column ^ mix(row ^ mix(high ^ mix(low))));
        f64::from(hash) >= self.probability * 4_294_967_296.0
    }

    /// The whole mask: `1 / (1 − p)` where a weight is kept and 0 where it is dropped.
    pub(crate) fn mask<B: Backend>(
        &self,
        [batch, heads, queries, columns]: [usize; 4],
        dtype: DType,
        device: &B::Device,
    ) -> Tensor<B, 4> {
        let scale = (1.0 / (1.0 - self.probability)) as f32;
        let rows = (batch * heads * queries) as u32;
        let values: Vec<f32> = (0..rows)
            .flat_map(|row| (0..columns as u32).map(move |column| (row, column)))
            .map(|(row, column)| if self.keeps(row, column) { scale } else { 0.0 })
            .collect();
        Tensor::from_data(
            TensorData::new(values, [batch, heads, queries, columns]),
            (device, dtype),
        )
    }
}

/// A 32-bit integer hash with full avalanche (two xor-shift-multiply rounds).
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
