//! The product of a few rows with a matrix whose columns lie in one piece, as the weights of linear maps do in files
//! (`[outputs, inputs]` there).
//!
//! A general product first copies blocks of its factors to where they are read from. With few rows that costs more
//! than it saves: here each column is read once, in order, and multiplied with all rows while it is at hand. One
//! token a row is what decoding does.

#![expect(
    clippy::inline_always,
    reason = "all of it has to be part of a function with the machine's vector instructions"
)]

use pulp::{Simd, WithSimd};

use super::threads::for_each_mut;

/// Columns of one task.
const COLUMNS: usize = 48;

/// `x [m, k] · weight [n, k]ᵀ`, each matrix with its rows one after the other: `[m, n]`.
pub(super) fn product(x: &[f32], weight: &[f32], [m, k, n]: [usize; 3]) -> Vec<f32> {
    assert!(x.len() == m * k && weight.len() == n * k);
    if m * k == 0 {
        return vec![0.0; m * n];
    }
    let mut by_column = vec![0.0; n * m];
    let arch = pulp::Arch::new();
    let blocks = by_column.chunks_mut(COLUMNS * m);
    let mut tasks: Vec<_> = blocks.zip(weight.chunks(COLUMNS * k)).collect();
    for_each_mut(&mut tasks, m * n * k, |(target, weight)| {
        arch.dispatch(Block {
            x,
            weight,
            target,
            k,
        });
    });
    if m == 1 {
        return by_column;
    }
    let mut by_row = vec![0.0; m * n];
    for (column, values) in by_column.chunks_exact(m).enumerate() {
        for (row, value) in values.iter().enumerate() {
            by_row[row * n + column] = *value;
        }
    }
    by_row
}

/// All rows with some columns: `target [columns, rows]`.
struct Block<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    target: &'a mut [f32],
    k: usize,
}

impl WithSimd for Block<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        // Sums enough that none has to wait for itself, and not more than there are registers, sixteen on most
        // processors, beside what they are made of.
        match self.x.len() / self.k {
            1 => self.all_columns::<S, 8>(simd),
            2 | 3 => self.all_columns::<S, 4>(simd),
            _ => self.all_columns::<S, 3>(simd),
        }
    }
}

impl Block<'_> {
    /// All columns, `C` at a time.
    #[inline(always)]
    fn all_columns<S: Simd, const C: usize>(&mut self, simd: S) {
        let columns = self.weight.len() / self.k;
        let mut column = 0;
        while column + C <= columns {
            self.columns::<S, C>(simd, column);
            column += C;
        }
        while column < columns {
            self.columns::<S, 1>(simd, column);
            column += 1;
        }
    }

    #[inline(always)]
    fn columns<S: Simd, const C: usize>(&mut self, simd: S, column: usize) {
        let rows = self.x.len() / self.k;
        let mut row = 0;
        while row + 4 <= rows {
            self.tile::<S, 4, C>(simd, row, column);
            row += 4;
        }
        while row + 2 <= rows {
            self.tile::<S, 2, C>(simd, row, column);
            row += 2;
        }
        if row < rows {
            self.tile::<S, 1, C>(simd, row, column);
        }
    }

    /// `R` rows with `C` columns.
    #[inline(always)]
    fn tile<S: Simd, const R: usize, const C: usize>(
        &mut self,
        simd: S,
        row: usize,
        column: usize,
    ) {
        let k = self.k;
        let rows = self.x.len() / k;
        // Loops rather than closures, which would not be compiled for the machine's vector instructions.
        let mut x: [(&[S::f32s], &[f32]); R] = [(&[], &[]); R];
        for (i, x) in x.iter_mut().enumerate() {
            *x = S::as_simd_f32s(&self.x[(row + i) * k..][..k]);
        }
        let mut w: [(&[S::f32s], &[f32]); C] = [(&[], &[]); C];
        for (i, w) in w.iter_mut().enumerate() {
            *w = S::as_simd_f32s(&self.weight[(column + i) * k..][..k]);
        }
        let length = k / (size_of::<S::f32s>() / size_of::<f32>());
        for (x, _) in &mut x {
            *x = &x[..length];
        }
        for (w, _) in &mut w {
            *w = &w[..length];
        }
        let mut sums = [[simd.splat_f32s(0.0); C]; R];
        for i in 0..length {
            for r in 0..R {
                for c in 0..C {
                    sums[r][c] = simd.mul_add_e_f32s(x[r].0[i], w[c].0[i], sums[r][c]);
                }
            }
        }
        for r in 0..R {
            for c in 0..C {
                let mut sum = simd.reduce_sum_f32s(sums[r][c]);
                for (x, w) in x[r].1.iter().zip(w[c].1) {
                    sum += x * w;
                }
                self.target[(column + c) * rows + row + r] = sum;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_sums_of_products() {
        let number = |i: usize| ((i * 7919 + 13) % 1009) as f32 / 504.5 - 1.0;
        for m in 1..=9 {
            for k in [1, 7, 8, 9, 33, 190] {
                for n in [1, 2, 3, 8, 47, 48, 49, 100] {
                    let x: Vec<f32> = (0..m * k).map(number).collect();
                    let weight: Vec<f32> = (0..n * k).map(|i| number(i + 5)).collect();
                    let y = product(&x, &weight, [m, k, n]);
                    assert_eq!(y.len(), m * n);
                    for (i, found) in y.iter().enumerate() {
                        let pairs = x[i / n * k..][..k].iter().zip(&weight[i % n * k..][..k]);
                        let expected: f64 = pairs.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                        let error = (f64::from(*found) - expected).abs();
                        assert!(error < 2e-5, "[{m}, {k}, {n}], entry {i}: off by {error}");
                    }
                }
            }
        }
    }

    #[test]
    fn nothing_is_the_sum_of_nothing() {
        assert_eq!(product(&[], &[], [2, 0, 3]), [0.0; 6]);
        assert!(product(&[], &[1.0; 6], [0, 2, 3]).is_empty());
        assert!(product(&[1.0; 4], &[], [2, 2, 0]).is_empty());
    }
}
