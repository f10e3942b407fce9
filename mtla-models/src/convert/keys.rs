//! From the rotary keys of several heads to one rotary key for all of them and a rest without rotation.
//!
//! A rotation by position turns the two channels of a pair by the same angle in every head. So the heads' pairs
//! of one frequency may be mixed among each other, and one mixture, the direction in which they vary most, can
//! serve all heads: head `g` takes the share `u[g]` of it. What is left of a key after that is kept without
//! rotation. (Mixing heads by frequency is `RoRoPE` of `TransMLA`, Meng et al. 2025.)

use faer::{Mat, MatRef};
use mtla_core::rope::RotaryLayout;

use super::{
    ConvertError,
    linear_algebra::{Inputs, first_direction},
};

/// The sizes of an attention with a key of `width` channels for each of `groups` sets of heads, and of the
/// rotary key that is to serve all of them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    pub(super) heads: usize,
    pub(super) groups: usize,
    pub(super) width: usize,
    pub(super) rope: usize,
    pub(super) layout: RotaryLayout,
}

/// The parts of the keys: matrices from inputs.
pub(super) struct SplitKeys {
    /// `[n, rope]`: the rotary key of all heads.
    pub(super) shared: Mat<f64>,
    /// `[n, groups · width]`: what is left of each key.
    pub(super) rest: Mat<f64>,
    /// For each pair of the rotary key, the share that each group takes of it.
    shares: Vec<Vec<f64>>,
}

impl Shape {
    /// The channels of pair `i` among `width`.
    fn pair(&self, i: usize, width: usize) -> [usize; 2] {
        match self.layout {
            RotaryLayout::Interleaved => [2 * i, 2 * i + 1],
            RotaryLayout::HalfSplit => [i, i + width / 2],
        }
    }

    /// The pair of the old keys that has the frequency of pair `i` of the new one.
    fn source(&self, i: usize) -> usize {
        i * (self.width / self.rope)
    }

    /// The channels in the old keys `[groups · width]` and in the new key of pair `i`, both parts of it.
    fn channels(&self, i: usize, group: usize) -> [[usize; 2]; 2] {
        let old = self.pair(self.source(i), self.width);
        let new = self.pair(i, self.rope);
        [0, 1].map(|part| [group * self.width + old[part], new[part]])
    }

    /// Splits the keys `weight [n, groups · width]` of these inputs.
    pub(super) fn split(
        &self,
        weight: MatRef<'_, f64>,
        inputs: &Inputs,
    ) -> Result<SplitKeys, ConvertError> {
        let n = weight.nrows();
        let mut shared = Mat::<f64>::zeros(n, self.rope);
        let mut rest = weight.to_owned();
        let mut shares = Vec::with_capacity(self.rope / 2);
        for i in 0..self.rope / 2 {
            // How the groups' pairs vary together.
            let mut moments = Mat::<f64>::zeros(self.groups, self.groups);
            for part in 0..2 {
                let columns: Vec<usize> = (0..self.groups)
                    .map(|group| self.channels(i, group)[part][0])
                    .collect();
                let keys = Mat::from_fn(n, self.groups, |row, group| weight[(row, columns[group])]);
                let seen = inputs.seen(keys.as_ref());
                moments += seen.transpose() * &seen;
            }
            let (share, _) = first_direction(&moments)?;
            for part in 0..2 {
                for row in 0..n {
                    let mut sum = 0.0;
                    for (group, share) in share.iter().enumerate() {
                        sum += share * weight[(row, self.channels(i, group)[part][0])];
                    }
                    shared[(row, self.channels(i, 0)[part][1])] = sum;
                    for (group, share) in share.iter().enumerate() {
                        rest[(row, self.channels(i, group)[part][0])] -= share * sum;
                    }
                }
            }
            shares.push(share);
        }
        Ok(SplitKeys {
            shared,
            rest,
            shares,
        })
    }

    /// The queries that go with it: `weight [n, heads · width]` to `[n, heads · (width + rope)]`, per head first
    /// for the rest and then for the rotary key, scaled so that scores stay as they are when they are divided by
    /// the root of the new width.
    pub(super) fn queries(&self, weight: MatRef<'_, f64>, keys: &SplitKeys) -> Mat<f64> {
        let (width, new) = (self.width, self.width + self.rope);
        let scale = (new as f64 / width as f64).sqrt();
        let mut queries = Mat::<f64>::zeros(weight.nrows(), self.heads * new);
        for head in 0..self.heads {
            let group = head / (self.heads / self.groups);
            for row in 0..weight.nrows() {
                for channel in 0..width {
                    queries[(row, head * new + channel)] =
                        scale * weight[(row, head * width + channel)];
                }
                for (i, share) in keys.shares.iter().enumerate() {
                    for [old, new_channel] in self.channels(i, 0) {
                        queries[(row, head * new + width + new_channel)] =
                            scale * share[group] * weight[(row, head * width + old)];
                    }
                }
            }
        }
        queries
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Without rotation, the split changes no score: at position 0 all angles are 0.
    #[test]
    fn scores_without_rotation_stay() {
        for layout in [RotaryLayout::Interleaved, RotaryLayout::HalfSplit] {
            let shape = Shape {
                heads: 4,
                groups: 2,
                width: 8,
                rope: 4,
                layout,
            };
            let matrix = |columns: usize, seed: f64| {
                Mat::from_fn(5, columns, |i, j| {
                    (12.9898 * (i as f64 + 1.0) * (j as f64 + 1.5 + seed)).sin()
                })
            };
            let (wq, wk, x) = (matrix(32, 1.0), matrix(16, 2.0), matrix(5, 3.0));
            let inputs = Inputs::new(&(x.transpose() * &x)).unwrap();
            let keys = shape.split(wk.as_ref(), &inputs).unwrap();
            let (q, new_q) = (&x * &wq, &x * shape.queries(wq.as_ref(), &keys));
            let (k, shared, rest) = (&x * &wk, &x * &keys.shared, &x * &keys.rest);
            for head in 0..4 {
                let group = head / 2;
                let old: f64 = (0..8)
                    .map(|c| q[(0, head * 8 + c)] * k[(1, group * 8 + c)])
                    .sum();
                let new: f64 = (0..8)
                    .map(|c| new_q[(0, head * 12 + c)] * rest[(1, group * 8 + c)])
                    .sum::<f64>()
                    + (0..4)
                        .map(|c| new_q[(0, head * 12 + 8 + c)] * shared[(1, c)])
                        .sum::<f64>();
                let (old, new) = (old / 8f64.sqrt(), new / 12f64.sqrt());
                assert!((old - new).abs() < 1e-10, "{old} {new}");
            }
        }
    }
}
