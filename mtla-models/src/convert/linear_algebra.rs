//! Factorisations of a linear map that keep what it does to typical inputs, in 64 bits.

use faer::{Mat, MatRef, Side};

use super::ConvertError;

/// What typical inputs `x [.., n]` are like: `E[xᵀ x]`, as its eigenvectors (columns) and eigenvalues.
pub(super) struct Inputs {
    vectors: Mat<f64>,
    /// The square roots of the eigenvalues, none of them 0.
    scales: Vec<f64>,
}

/// `a · b` stands for a matrix; see [`Inputs::factorise`].
pub(super) struct Factors {
    pub(super) a: Mat<f64>,
    pub(super) b: Mat<f64>,
}

impl Inputs {
    /// From the second moments `[n, n]`. Directions that the inputs never take count a millionth of an average
    /// one, so that nothing that is seen later is undefined.
    pub(super) fn new(moments: &Mat<f64>) -> Result<Self, ConvertError> {
        let eigen = moments
            .self_adjoint_eigen(Side::Lower)
            .map_err(|_| ConvertError::NotFinite)?;
        let values: Vec<f64> = eigen.S().column_vector().iter().copied().collect();
        let mean = values.iter().sum::<f64>() / values.len().max(1) as f64;
        if !mean.is_finite() || mean <= 0.0 {
            return Err(ConvertError::NotFinite);
        }
        Ok(Self {
            vectors: eigen.U().to_owned(),
            scales: values
                .iter()
                .map(|value| value.max(1e-6 * mean).sqrt())
                .collect(),
        })
    }

    /// `W` seen by these inputs: the root mean square of `x W` is the Frobenius norm of this.
    pub(super) fn seen(&self, weight: MatRef<'_, f64>) -> Mat<f64> {
        let mut seen = self.vectors.transpose() * weight;
        for (i, scale) in self.scales.iter().enumerate() {
            for j in 0..seen.ncols() {
                seen[(i, j)] *= scale;
            }
        }
        seen
    }

    /// The root mean square of `x W`.
    pub(super) fn size(&self, weight: MatRef<'_, f64>) -> f64 {
        self.seen(weight).norm_l2()
    }

    /// The root mean square of `x (W − V)` in relation to that of `x W`.
    pub(super) fn error(&self, weight: MatRef<'_, f64>, other: MatRef<'_, f64>) -> f64 {
        let size = self.size(weight);
        if size == 0.0 {
            return 0.0;
        }
        self.size((weight - other).as_ref()) / size
    }

    /// The best `a [n, rank] · b [rank, m]` for `weight [n, m]`, in the mean square of what inputs become.
    ///
    /// `x a` has second moments of 1 in every direction, and its mean over channels is the direction that
    /// matters least: a layer norm of it takes little away and divides by nearly the same number everywhere.
    pub(super) fn factorise(
        &self,
        weight: MatRef<'_, f64>,
        rank: usize,
    ) -> Result<Factors, ConvertError> {
        let svd = self
            .seen(weight)
            .thin_svd()
            .map_err(|_| ConvertError::NotFinite)?;
        let values: Vec<f64> = svd.S().column_vector().iter().copied().collect();
        let mut left = svd.U().subcols(0, rank).to_owned();
        for (i, scale) in self.scales.iter().enumerate() {
            for j in 0..rank {
                left[(i, j)] /= scale;
            }
        }
        let mut right = svd.V().subcols(0, rank).transpose().to_owned();
        for (i, value) in values[..rank].iter().enumerate() {
            for j in 0..right.ncols() {
                right[(i, j)] *= value;
            }
        }
        let turn = last_to_mean(rank);
        Ok(Factors {
            a: &self.vectors * left * &turn,
            b: turn.transpose() * right,
        })
    }
}

/// The first eigenvector of a symmetric matrix, and its eigenvalue.
pub(super) fn first_direction(matrix: &Mat<f64>) -> Result<(Vec<f64>, f64), ConvertError> {
    let eigen = matrix
        .self_adjoint_eigen(Side::Lower)
        .map_err(|_| ConvertError::NotFinite)?;
    let last = matrix.nrows() - 1;
    let vector = eigen.U().col(last).iter().copied().collect();
    let value = eigen.S().column_vector()[last];
    Ok((vector, value.max(0.0)))
}

/// The reflection `[n, n]` that takes the last axis to `(1, …, 1)/√n`.
fn last_to_mean(n: usize) -> Mat<f64> {
    let mean = (n as f64).powf(-0.5);
    let v: Vec<f64> = (0..n)
        .map(|i| f64::from(u8::from(i + 1 == n)) - mean)
        .collect();
    let square: f64 = v.iter().map(|x| x * x).sum();
    Mat::from_fn(n, n, |i, j| {
        let identity = f64::from(u8::from(i == j));
        if square == 0.0 {
            identity
        } else {
            identity - 2.0 * v[i] * v[j] / square
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers that look random.
    fn matrix(rows: usize, columns: usize, seed: f64) -> Mat<f64> {
        Mat::from_fn(rows, columns, |i, j| {
            (12.9898 * (i as f64 + 1.0) * (j as f64 + 1.5 + seed)).sin()
        })
    }

    fn inputs() -> Inputs {
        let x = matrix(40, 6, 3.0);
        Inputs::new(&(x.transpose() * &x)).unwrap()
    }

    #[test]
    fn full_rank_is_exact_and_less_is_monotonic() {
        let (inputs, weight) = (inputs(), matrix(6, 9, 1.0));
        let errors: Vec<f64> = (1..=6)
            .map(|rank| {
                let Factors { a, b } = inputs.factorise(weight.as_ref(), rank).unwrap();
                inputs.error(weight.as_ref(), (a * b).as_ref())
            })
            .collect();
        assert!(errors.is_sorted_by(|a, b| a > b), "{errors:?}");
        assert!(errors[5] < 1e-10 && errors[0] > 0.1, "{errors:?}");
    }

    #[test]
    fn latents_are_white_and_their_mean_matters_least() {
        let x = matrix(40, 6, 3.0);
        let inputs = Inputs::new(&(x.transpose() * &x)).unwrap();
        let weight = matrix(6, 9, 1.0);
        let Factors { a, b } = inputs.factorise(weight.as_ref(), 4).unwrap();
        let latents = &x * &a;
        let moments = latents.transpose() * &latents;
        for i in 0..4 {
            for j in 0..4 {
                let expected = f64::from(u8::from(i == j));
                assert!((moments[(i, j)] - expected).abs() < 1e-9);
            }
        }
        // The rank-4 map without the latents' mean is the rank-3 map.
        let centre = Mat::from_fn(4, 4, |i, j| f64::from(u8::from(i == j)) - 0.25);
        let three = inputs.factorise(weight.as_ref(), 3).unwrap();
        let difference = &a * centre * &b - three.a * three.b;
        assert!(inputs.size(difference.as_ref()) < 1e-9);
    }
}
