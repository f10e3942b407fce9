//! The product of a few rows with a matrix whose columns lie in one piece, as the weights of linear maps do in files
//! (`[outputs, inputs]` there).
//!
//! A general product first copies blocks of its factors to where they are read from. With few rows that costs more
//! than it saves: here each column is read once, in order, and multiplied with all rows while it is at hand. One
//! token a row is what decoding does.
//!
//! There are two ways to do it. Very few rows are read as they lie, each sum of products is split over a vector. More
//! rows, of many beams, are put into *stripes* before, so that a vector holds as many rows.

#![expect(
    clippy::inline_always,
    reason = "all of it has to be part of a function with the machine's vector instructions"
)]

use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::threads::for_each_mut;

/// Up to so many rows a product is one of few rows.
pub(super) const MOST: usize = 128;

/// Up to so many rows stay as they lie.
const AS_THEY_LIE: usize = 16;

/// Columns of one task.
const COLUMNS: usize = 48;

/// `x [m, k] · weight [n, k]ᵀ`, each matrix with its rows one after the other: `[m, n]`.
pub(super) fn product(x: &[f32], weight: &[f32], [m, k, n]: [usize; 3]) -> Vec<f32> {
    assert!(x.len() == m * k && weight.len() == n * k);
    if m * k * n == 0 {
        return vec![0.0; m * n];
    }
    let arch = pulp::Arch::new();
    let stripes = (m > AS_THEY_LIE).then(|| Stripes::new(x, m, k, arch.dispatch(Lanes)));
    // Rows of a column, with those that fill up the last stripe.
    let height = stripes
        .as_ref()
        .map_or(m, |stripes| stripes.memory.len() / k);
    let mut by_column = vec![0.0; n * height];
    let blocks = by_column.chunks_mut(COLUMNS * height);
    let mut tasks: Vec<_> = blocks.zip(weight.chunks(COLUMNS * k)).collect();
    for_each_mut(&mut tasks, m * n * k, |(target, weight)| match &stripes {
        Some(stripes) => arch.dispatch(StripedBlock {
            stripes,
            weight,
            target,
        }),
        None => arch.dispatch(Block {
            x,
            weight,
            target,
            k,
        }),
    });
    if m == 1 {
        return by_column;
    }
    by_row(&by_column, m, height)
}

/// Turns `[columns, height]` into `[rows, columns]`.
fn by_row(by_column: &[f32], rows: usize, height: usize) -> Vec<f32> {
    /// Rows of a task, and columns at a time: what is read stays at hand, and is written in whole lines.
    const ROWS: usize = 8;
    const COLUMNS: usize = 16;
    let columns = by_column.len() / height;
    let mut by_row = vec![0.0; rows * columns];
    let mut tasks: Vec<_> = by_row.chunks_mut(ROWS * columns).enumerate().collect();
    for_each_mut(&mut tasks, rows * columns, |(task, target)| {
        let (first, count) = (*task * ROWS, target.len() / columns);
        for (part, block) in by_column.chunks(COLUMNS * height).enumerate() {
            for row in 0..count {
                let target = &mut target[row * columns + part * COLUMNS..];
                for (target, column) in target.iter_mut().zip(block.chunks_exact(height)) {
                    *target = column[first + row];
                }
            }
        }
    });
    by_row
}

/// How many numbers a vector holds.
struct Lanes;

impl WithSimd for Lanes {
    type Output = usize;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> usize {
        S::F32_LANES
    }
}

/// Rows, as many as a vector has lanes together: `[stripes, k, lanes]`, the last stripe filled up with zeros.
struct Stripes {
    memory: Vec<f32>,
    k: usize,
}

impl Stripes {
    fn new(x: &[f32], m: usize, k: usize, lanes: usize) -> Self {
        let mut memory = vec![0.0; m.next_multiple_of(lanes) * k];
        let stripes = memory.chunks_exact_mut(lanes * k);
        let mut tasks: Vec<_> = stripes.zip(x.chunks(lanes * k)).collect();
        for_each_mut(&mut tasks, m * k, |(stripe, x)| {
            for (i, target) in stripe.chunks_exact_mut(lanes).enumerate() {
                for (target, row) in target.iter_mut().zip(x.chunks_exact(k)) {
                    *target = row[i];
                }
            }
        });
        Self { memory, k }
    }
}

/// All stripes with some columns: `target [columns, stripes · lanes]`.
struct StripedBlock<'a> {
    stripes: &'a Stripes,
    weight: &'a [f32],
    target: &'a mut [f32],
}

impl WithSimd for StripedBlock<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        /// Products of a sum at a time, so that three stripes stay in the nearest cache.
        const PLACES: usize = 256;
        let k = self.stripes.k;
        let count = self.stripes.memory.len() / (k * S::F32_LANES);
        for start in (0..k).step_by(PLACES) {
            let places = start..k.min(start + PLACES);
            let mut stripe = 0;
            // Three at a time, but none left alone: sums of one would have to wait for themselves.
            while stripe < count {
                stripe += match count - stripe {
                    1 => self.all_columns::<S, 1>(simd, stripe, &places),
                    2 | 4 => self.all_columns::<S, 2>(simd, stripe, &places),
                    _ => self.all_columns::<S, 3>(simd, stripe, &places),
                };
            }
        }
    }
}

impl StripedBlock<'_> {
    /// `V` stripes with all columns; returns `V`.
    #[inline(always)]
    fn all_columns<S: Simd, const V: usize>(
        &mut self,
        simd: S,
        stripe: usize,
        places: &Range<usize>,
    ) -> usize {
        let columns = self.weight.len() / self.stripes.k;
        let mut column = 0;
        while column + 4 <= columns {
            self.tile::<S, V, 4>(simd, stripe, column, places);
            column += 4;
        }
        while column < columns {
            self.tile::<S, V, 1>(simd, stripe, column, places);
            column += 1;
        }
        V
    }

    /// `V` stripes with `C` columns.
    #[inline(always)]
    fn tile<S: Simd, const V: usize, const C: usize>(
        &mut self,
        simd: S,
        stripe: usize,
        column: usize,
        places: &Range<usize>,
    ) {
        let (k, lanes, length) = (self.stripes.k, S::F32_LANES, places.len());
        let height = self.stripes.memory.len() / k;
        let mut x: [&[S::f32s]; V] = [&[]; V];
        for (i, x) in x.iter_mut().enumerate() {
            let start = ((stripe + i) * k + places.start) * lanes;
            let (vectors, _) = S::as_simd_f32s(&self.stripes.memory[start..][..length * lanes]);
            *x = &vectors[..length];
        }
        let mut w: [&[f32]; C] = [&[]; C];
        for (i, w) in w.iter_mut().enumerate() {
            *w = &self.weight[(column + i) * k + places.start..][..length];
        }
        let mut sums = [[simd.splat_f32s(0.0); V]; C];
        for i in 0..length {
            for c in 0..C {
                let w = simd.splat_f32s(w[c][i]);
                for v in 0..V {
                    sums[c][v] = simd.mul_add_e_f32s(x[v][i], w, sums[c][v]);
                }
            }
        }
        for (c, sums) in sums.iter().enumerate() {
            let start = (column + c) * height + stripe * lanes;
            let (target, _) = S::as_mut_simd_f32s(&mut self.target[start..][..V * lanes]);
            for (target, sum) in target.iter_mut().zip(sums) {
                *target = simd.add_f32s(*target, *sum);
            }
        }
    }
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
        for m in (1..=9).chain([15, 16, 17, 23, 24, 25, 40, 65, 100, 128]) {
            for k in [1, 7, 8, 9, 33, 190, 300] {
                for n in [1, 2, 3, 8, 47, 48, 49, 100] {
                    let x: Vec<f32> = (0..m * k).map(number).collect();
                    let weight: Vec<f32> = (0..n * k).map(|i| number(i + 5)).collect();
                    let y = product(&x, &weight, [m, k, n]);
                    assert_eq!(y.len(), m * n);
                    for (i, found) in y.iter().enumerate() {
                        let pairs = x[i / n * k..][..k].iter().zip(&weight[i % n * k..][..k]);
                        let expected: f64 = pairs.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                        let error = (f64::from(*found) - expected).abs();
                        assert!(
                            error < 1e-6 + 3e-7 * k as f64,
                            "[{m}, {k}, {n}], entry {i}: off by {error}"
                        );
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
