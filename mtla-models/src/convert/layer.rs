//! One attention: the weights of a latent one from those of a dense one.

use burn::{
    module::Param,
    nn::Linear,
    tensor::{DType, Tensor, TensorData, backend::Backend},
};
use faer::Mat;
use mtla_core::{
    attention::{GroupedAttention, LatentAttention, LatentConfig, QueryProjection},
    linear::project,
    ops::AttentionBackend,
};

use super::{ConvertError, keys::Shape, linear_algebra::Inputs};

/// Errors of what keys and values become, in relation to their size.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reconstruction {
    pub(super) keys: f64,
    pub(super) values: f64,
}

/// Fills `new` with what stands for `old` under the inputs `x` (each `[batch, tokens, d_model]`), which are
/// what the layer's norm gives.
pub(super) async fn convert<B: AttentionBackend>(
    old: &GroupedAttention<B>,
    new: &mut LatentAttention<B>,
    (shape, config): (Shape, &LatentConfig),
    x: &[Tensor<B, 3>],
) -> Result<Reconstruction, ConvertError> {
    let affine = config.bias;
    let inputs = Inputs::new(&moments(x, affine).await?)?;
    let wq = matrix(&old.q_proj, affine).await?;
    let wk = matrix(&old.k_proj, affine).await?;
    let wv = matrix(&old.v_proj, affine).await?;
    let keys = shape.split(wk.as_ref(), &inputs)?;

    // Keys and values count alike: they are factorised together, as large as each other.
    let (n, width) = (wk.nrows(), wk.ncols());
    let (rest, values) = (inputs.size(keys.rest.as_ref()), inputs.size(wv.as_ref()));
    let balance = if rest > 0.0 && values > 0.0 {
        values / rest
    } else {
        1.0
    };
    let joint = Mat::from_fn(n, 2 * width, |i, j| {
        if j < width {
            balance * keys.rest[(i, j)]
        } else {
            wv[(i, j - width)]
        }
    });
    let rank = config.kv_lora_rank;
    let factors = inputs.factorise(joint.as_ref(), rank)?;
    let found = &factors.a * &factors.b;
    let found_rest = Mat::from_fn(n, width, |i, j| found[(i, j)] / balance);
    let key_size = inputs.size(wk.as_ref());
    let lost = inputs.size((&keys.rest - &found_rest).as_ref());
    let errors = Reconstruction {
        keys: if key_size > 0.0 { lost / key_size } else { 0.0 },
        values: inputs.error(wv.as_ref(), found.subcols(width, width)),
    };

    let QueryProjection::Full(new_wq) = &mut new.wq else {
        unreachable!("the configuration has no q_lora_rank");
    };
    set(new_wq, &shape.queries(wq.as_ref(), &keys));
    let down = Mat::from_fn(n, rank + shape.rope, |i, j| {
        if j < rank {
            factors.a[(i, j)]
        } else {
            keys.shared[(i, j - rank)]
        }
    });
    set(&mut new.wkv_a, &down);
    // For each head the keys and values of its group.
    let head = 2 * shape.width;
    let up = Mat::from_fn(rank, shape.heads * head, |i, j| {
        let (group, channel) = (
            j / head / (shape.heads / shape.groups),
            j % head % shape.width,
        );
        let column = group * shape.width + channel;
        if j % head < shape.width {
            factors.b[(i, column)] / balance
        } else {
            factors.b[(i, width + column)]
        }
    });
    let up = tensor(&up, &new.wkv_b.weight.val());
    new.wkv_b.weight = Param::from_tensor(up);
    new.wo = old.out_proj.clone();
    let norm = mean_deviation(new, rank, x).await?;
    let gamma = new.kv_norm.gamma.val();
    new.kv_norm.gamma = Param::from_tensor(gamma.full_like(norm));
    Ok(errors)
}

/// The mean over tokens of the standard deviation of a latent, by which the norm divides.
async fn mean_deviation<B: AttentionBackend>(
    new: &LatentAttention<B>,
    rank: usize,
    x: &[Tensor<B, 3>],
) -> Result<f64, ConvertError> {
    let (mut sum, mut tokens) = (0.0, 0);
    for x in x {
        let latents = project(&new.wkv_a, x.clone()).narrow(2, 0, rank);
        let [batch, length, _] = latents.dims();
        let centred = latents.clone() - latents.mean_dim(2);
        let deviations = centred.square().mean_dim(2).sqrt().sum();
        sum += numbers(deviations).await?[0];
        tokens += batch * length;
    }
    Ok(sum / tokens as f64)
}

/// `Σ xᵀ x` over all tokens, with a 1 behind each `x` if `affine`.
async fn moments<B: AttentionBackend>(
    x: &[Tensor<B, 3>],
    affine: bool,
) -> Result<Mat<f64>, ConvertError> {
    let [_, _, width] = x[0].dims();
    let n = width + usize::from(affine);
    let mut sum = Mat::<f64>::zeros(n, n);
    for x in x {
        let [batch, length, _] = x.dims();
        let mut rows = x.clone().reshape([batch * length, width]);
        if affine {
            let ones = rows.clone().narrow(1, 0, 1).ones_like();
            rows = Tensor::cat(vec![rows, ones], 1);
        }
        let product = numbers(B::product(rows.clone().transpose(), rows)).await?;
        sum += Mat::from_fn(n, n, |i, j| product[i * n + j]);
    }
    Ok(sum)
}

/// The weight of a linear map, its bias as a last row if `affine`.
async fn matrix<B: Backend>(linear: &Linear<B>, affine: bool) -> Result<Mat<f64>, ConvertError> {
    let [inputs, outputs] = linear.weight.dims();
    let mut values = numbers(linear.weight.val()).await?;
    if affine {
        match &linear.bias {
            Some(bias) => values.extend(numbers(bias.val()).await?),
            None => values.resize((inputs + 1) * outputs, 0.0),
        }
    }
    Ok(Mat::from_fn(
        inputs + usize::from(affine),
        outputs,
        |i, j| values[i * outputs + j],
    ))
}

async fn numbers<B: Backend, const D: usize>(x: Tensor<B, D>) -> Result<Vec<f64>, ConvertError> {
    let data = x.into_data_async().await.map_err(ConvertError::Device)?;
    Ok(data.iter::<f64>().collect())
}

/// Replaces weight and bias; the bias is the row behind the weight's.
fn set<B: Backend>(linear: &mut Linear<B>, matrix: &Mat<f64>) {
    let [inputs, outputs] = linear.weight.dims();
    let weight = matrix.subrows(0, inputs).to_owned();
    linear.weight = Param::from_tensor(tensor(&weight, &linear.weight.val()));
    if let Some(bias) = &linear.bias {
        let row = matrix.subrows(inputs, 1).to_owned();
        let bias = tensor(&row, &bias.val().unsqueeze::<2>()).reshape([outputs]);
        linear.bias = Some(Param::from_tensor(bias));
    }
}

/// As a tensor of the type and on the device of `like`.
fn tensor<B: Backend>(matrix: &Mat<f64>, like: &Tensor<B, 2>) -> Tensor<B, 2> {
    let (rows, columns) = (matrix.nrows(), matrix.ncols());
    let dtype: DType = like.dtype();
    let values: Vec<f64> = (0..rows)
        .flat_map(|i| (0..columns).map(move |j| (i, j)))
        .map(|place| matrix[place])
        .collect();
    let data = TensorData::new(values, [rows, columns]).convert_dtype(dtype);
    Tensor::from_data(data, (&like.device(), dtype))
}
