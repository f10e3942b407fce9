//! A softmax that takes its scores in pieces (Milakov & Gimelshein 2018).

use super::real::{Real, max, sum};

/// Weighted sums of values over what some queries have seen so far.
pub(super) struct Softmax<R> {
    /// The largest score of each query.
    largest: Vec<R>,
    /// `Σ e^(score − largest)`.
    total: Vec<R>,
    /// `Σ e^(score − largest) value`, one row a query; whoever takes weights in adds to it.
    pub(super) weighted: Vec<R>,
    width: usize,
}

impl<R: Real> Softmax<R> {
    /// `queries` that have seen nothing, over values of this width.
    pub(super) fn new(queries: usize, width: usize) -> Self {
        Self {
            largest: vec![R::LOWEST; queries],
            total: vec![R::default(); queries],
            weighted: vec![R::default(); queries * width],
            width,
        }
    }

    /// Takes in further scores of query `i`, turning them into weights of their values.
    #[inline(always)]
    #[expect(
        clippy::inline_always,
        reason = "it has to be part of a vectorised caller"
    )]
    pub(super) fn take(&mut self, i: usize, scores: &mut [R]) {
        let before = self.largest[i];
        let largest = max(scores);
        let largest = if before > largest { before } else { largest };
        for score in scores.iter_mut() {
            *score = (*score - largest).exp();
        }
        if largest > before {
            let factor = (before - largest).exp();
            self.total[i] *= factor;
            for x in &mut self.weighted[i * self.width..][..self.width] {
                *x *= factor;
            }
            self.largest[i] = largest;
        }
        self.total[i] += sum(scores);
    }

    /// Writes the output of query `i` and returns the logarithm of its sum. A query that sees nothing gets 0.
    pub(super) fn finish(&self, i: usize, out: &mut [R]) -> R {
        let total = self.total[i];
        if total == R::default() {
            return R::default();
        }
        let weighted = &self.weighted[i * self.width..][..self.width];
        for (out, x) in out.iter_mut().zip(weighted) {
            *out = *x / total;
        }
        self.largest[i] + total.ln()
    }
}
