//! The element types that the host computes in, and the passes over short rows of them.
//!
//! The passes are plain loops over slices that compilers vectorise; [`vectorised`] runs them with the widest
//! instructions that the machine has.

use burn::tensor::Element;

/// `f32` or `f64`.
pub(super) trait Real:
    Element
    + bytemuck::Pod
    + Default
    + PartialOrd
    + std::ops::Add<Output = Self>
    + std::ops::Sub<Output = Self>
    + std::ops::Mul<Output = Self>
    + std::ops::Div<Output = Self>
    + std::ops::AddAssign
    + std::ops::MulAssign
{
    /// Below every score.
    const LOWEST: Self;

    fn of(x: f64) -> Self;

    fn exp(self) -> Self;

    fn ln(self) -> Self;
}

impl Real for f32 {
    const LOWEST: Self = f32::NEG_INFINITY;

    fn of(x: f64) -> Self {
        x as f32
    }

    /// e^x to 2 ulp for `x ≤ 88`, without a branch, so that loops over it vectorise. Below −87 it stays at
    /// e^−87, which is 0 for a softmax; NaN stays NaN.
    #[inline(always)]
    fn exp(self) -> Self {
        // 1.5 · 2^23: adding it rounds to an integer, which then stands in the lowest bits.
        const ROUND: f32 = 12_582_912.0;
        const LN_2_HIGH: f32 = 0.693_359_4;
        const LN_2_LOW: f32 = -2.121_944_4e-4;
        let x = if -87.0 > self { -87.0 } else { self };
        let rounded = x * std::f32::consts::LOG2_E + ROUND;
        let n = rounded - ROUND;
        let r = x - n * LN_2_HIGH - n * LN_2_LOW;
        // The minimax polynomial of the Cephes library for |r| ≤ ln 2 / 2.
        let p = 1.987_569_2e-4f32;
        let p = p * r + 1.398_2e-3;
        let p = p * r + 8.333_452e-3;
        let p = p * r + 4.166_579_6e-2;
        let p = p * r + 1.666_666_5e-1;
        let p = p * r + 0.5;
        let p = p * r * r + r + 1.0;
        let exponent = rounded.to_bits().wrapping_add(127).wrapping_shl(23);
        p * f32::from_bits(exponent)
    }

    fn ln(self) -> Self {
        f32::ln(self)
    }
}

impl Real for f64 {
    const LOWEST: Self = f64::NEG_INFINITY;

    fn of(x: f64) -> Self {
        x
    }

    fn exp(self) -> Self {
        f64::exp(self)
    }

    fn ln(self) -> Self {
        f64::ln(self)
    }
}

/// Runs `work`, and the loops that are inlined into it, with the machine's vector instructions.
#[inline]
pub(super) fn vectorised<T>(work: impl FnOnce() -> T) -> T {
    pulp::Arch::new().dispatch(work)
}

/// Partial results of a reduction, enough of them for two of the widest registers.
const LANES: usize = 32;

/// `Σ f(x_i, y_i)` in a fixed order that does not depend on the machine.
#[inline(always)]
#[expect(
    clippy::inline_always,
    reason = "it has to be part of a vectorised caller"
)]
fn fold<R: Real>(
    x: &[R],
    y: &[R],
    start: R,
    f: impl Fn(R, R, R) -> R,
    join: impl Fn(R, R) -> R,
) -> R {
    let mut lanes = [start; LANES];
    let (x, x_rest) = x.as_chunks::<LANES>();
    let (y, y_rest) = y.as_chunks::<LANES>();
    for (x, y) in x.iter().zip(y) {
        for lane in 0..LANES {
            lanes[lane] = f(lanes[lane], x[lane], y[lane]);
        }
    }
    for (lane, (x, y)) in x_rest.iter().zip(y_rest).enumerate() {
        lanes[lane] = f(lanes[lane], *x, *y);
    }
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] = join(lanes[lane], lanes[lane + width]);
        }
        width /= 2;
    }
    lanes[0]
}

/// `x · y`.
#[inline(always)]
#[expect(
    clippy::inline_always,
    reason = "it has to be part of a vectorised caller"
)]
pub(super) fn dot<R: Real>(x: &[R], y: &[R]) -> R {
    fold(x, y, R::default(), |sum, x, y| sum + x * y, |a, b| a + b)
}

#[inline(always)]
#[expect(
    clippy::inline_always,
    reason = "it has to be part of a vectorised caller"
)]
pub(super) fn sum<R: Real>(x: &[R]) -> R {
    fold(x, x, R::default(), |sum, x, _| sum + x, |a, b| a + b)
}

/// The largest entry; NaN does not count.
#[inline(always)]
#[expect(
    clippy::inline_always,
    reason = "it has to be part of a vectorised caller"
)]
pub(super) fn max<R: Real>(x: &[R]) -> R {
    let larger = |a: R, b: R| if b > a { b } else { a };
    fold(x, x, R::LOWEST, |m, x, _| larger(m, x), larger)
}

/// `y += a x`.
#[inline(always)]
#[expect(
    clippy::inline_always,
    reason = "it has to be part of a vectorised caller"
)]
pub(super) fn add_scaled<R: Real>(y: &mut [R], a: R, x: &[R]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += a * *x;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponentials_are_right_to_two_units_in_the_last_place() {
        for i in 0..=2_000_000 {
            let x = -87.0 + i as f32 * (175.0 / 2_000_000.0);
            if x > 88.0 {
                break;
            }
            let expected = f64::from(x).exp();
            let error = (f64::from(Real::exp(x)) / expected - 1.0).abs();
            assert!(error < 2.5e-7, "e^{x}: off by {error}");
        }
        assert!(Real::exp(f32::NEG_INFINITY) < 2e-38);
        assert!(Real::exp(f32::NAN).is_nan());
        assert!((Real::exp(0.0f32) - 1.0).abs() < f32::EPSILON);
    }

    #[test]
    fn reductions_take_every_entry_once() {
        for n in [0, 1, 31, 32, 33, 100] {
            let x: Vec<f64> = (0..n).map(f64::from).collect();
            assert!((sum(&x) - x.iter().sum::<f64>()).abs() < 1e-9);
            assert!((dot(&x, &x) - x.iter().map(|x| x * x).sum::<f64>()).abs() < 1e-9);
            let largest = x.last().copied().unwrap_or(f64::NEG_INFINITY);
            assert!((max(&x) - largest).abs() < 1e-9 || n == 0 && max(&x) == f64::NEG_INFINITY);
        }
    }
}
