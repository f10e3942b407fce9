//! The plain tensor forms of the operations: any backend, differentiable where its tensors are.
//!
//! They are exact and readable rather than fast; they are also what faster forms are tested against.

use burn::tensor::{
    DType, FloatDType, IndexingUpdateOp, Int, Tensor, TensorData, activation::softmax,
    backend::Backend,
};

use super::{
    AttendOperands, AttendProblem, AttentionBackend, DecodeOperands, DecodeProblem, HeadMatrices,
    KeyValue, Keys, SlotLayout, Visibility,
};
use crate::{
    rope::Rotary,
    temporal::{apply_folded_gate, running_merge},
};

/// Additive terms on the scores, for masks of the caller's: `columns [1|batch, 1, queries, columns]` and
/// `self_term [1|batch, 1, queries, 1]`.
#[derive(Debug, Clone)]
pub struct Bias<B: Backend> {
    /// Added to the scores of the columns.
    pub columns: Option<Tensor<B, 4>>,
    /// Added to the score of the self term.
    pub self_term: Option<Tensor<B, 4>>,
}

/// What a masked score is set to: far below any score, but finite, so that a row with nothing visible
/// gives numbers without meaning instead of NaN, and a zero cotangent stays zero.
const MASKED: f64 = -1e30;

/// [`AttentionBackend::attend`] in tensor operations.
///
/// # Panics
/// If the operands do not fit the problem.
pub fn attend<B: Backend>(operands: AttendOperands<B>, problem: &AttendProblem) -> Tensor<B, 4> {
    attend_with(operands, problem, None).0
}

/// [`attend`] with additive masks, returning the attention weights before dropout as well:
/// `[batch, heads, queries, columns (+ 1 with a self term)]`.
///
/// # Panics
/// If the operands do not fit the problem.
pub fn attend_with<B: Backend>(
    operands: AttendOperands<B>,
    problem: &AttendProblem,
    bias: Option<Bias<B>>,
) -> (Tensor<B, 4>, Tensor<B, 4>) {
    operands.check(problem);
    let q = operands.q;
    let (columns, self_term) = match operands.keys {
        Keys::Columns { columns, own } => (columns, own),
        Keys::Tokens(kv) => split(kv, problem),
    };
    let (columns, self_term) = (columns.map(join_keys), self_term.map(join_keys));
    let (device, dtype) = (q.device(), q.dtype());
    let p = problem;
    let (column_bias, self_bias) = bias.map_or((None, None), |x| (x.columns, x.self_term));

    let mut scores = Vec::with_capacity(2);
    if let Some(kv) = &columns {
        let s = group(q.clone(), p).matmul(kv.k.clone().swap_dims(2, 3));
        let s = widen(ungroup(s, p)).mul_scalar(p.scale);
        scores.push(add_mask(s, column_mask(p, &device), column_bias));
    }
    if let Some(kv) = &self_term {
        let s = (per_token(q, p) * per_token(kv.k.clone(), p)).sum_dim(4);
        // Flat on the way, for the gradient's sake; see below.
        let s = s.reshape([p.batch * p.queries * p.heads]);
        let s = s.reshape([p.batch, p.queries, p.heads, 1]).swap_dims(1, 2);
        let s = widen(s).mul_scalar(p.scale);
        scores.push(add_mask(s, self_mask(p, &device), self_bias));
    }
    let weights = softmax(Tensor::cat(scores, 3), 3);
    let mut kept = weights.clone();
    if let Some(dropout) = &p.dropout {
        kept = kept.clone() * dropout.mask(kept.dims(), kept.dtype(), &device);
    }
    let kept = to_dtype(kept, dtype);

    let from_columns = columns.map(|kv| {
        let w = kept.clone().narrow(3, 0, p.columns);
        ungroup(group(w, p).matmul(kv.v), p).swap_dims(1, 2)
    });
    let from_self = self_term.map(|kv| {
        let w = kept.narrow(3, p.columns, 1).swap_dims(1, 2);
        // Flat, and so copied: Burn's wgpu backend multiplies a view like this one by the wrong numbers.
        let w = w.reshape([p.batch * p.queries * p.heads]).reshape([
            p.batch,
            p.queries,
            p.kv_heads,
            p.heads / p.kv_heads,
            1,
        ]);
        let x = w * per_token(kv.v, p);
        x.reshape([p.batch, p.queries, p.heads, p.value_width])
    });
    let out = match (from_columns, from_self) {
        (Some(x), Some(y)) => x + y,
        (Some(x), None) | (None, Some(x)) => x,
        (None, None) => unreachable!("the problem was validated"),
    };
    let out = out.swap_dims(1, 2);
    (out, to_dtype(weights, dtype))
}

/// Keys and values of tokens as those of columns and of the queries themselves.
fn split<B: Backend>(
    kv: KeyValue<B>,
    p: &AttendProblem,
) -> (Option<KeyValue<B>>, Option<KeyValue<B>>) {
    let Visibility::Causal { stride, offsets } = &p.visibility else {
        return (Some(kv), None);
    };
    let (s, n) = (*stride, kv.v.dims()[2]);
    let chunk_ends = |x: Tensor<B, 4>| {
        let [batch, heads, _, width] = x.dims();
        x.narrow(2, 0, p.columns * s)
            .reshape([batch, heads, p.columns, s, width])
            .narrow(3, s - 1, 1)
            .reshape([batch, heads, p.columns, width])
    };
    let columns = (p.columns > 0).then(|| kv.clone().map(chunk_ends));
    let rows = row_count(offsets);
    let own = |x: Tensor<B, 4>| {
        let [batch, heads, _, width] = x.dims();
        if rows == 1 && offsets[0] + p.queries <= n {
            return x.narrow(2, offsets[0], p.queries);
        }
        let own: Vec<usize> = offsets
            .iter()
            .flat_map(|offset| (0..p.queries).map(move |i| (offset + i).min(n - 1)))
            .collect();
        let own = ints::<B>(&own, &x.device()).reshape([batch, 1, p.queries, 1]);
        x.gather(2, own.expand([batch, heads, p.queries, width]))
    };
    let own = p.self_term.then(|| kv.map(own));
    (columns, own)
}

/// Keys with their shared channels in every head.
pub(super) fn join_keys<B: Backend>(kv: KeyValue<B>) -> KeyValue<B> {
    let Some(shared) = kv.shared else { return kv };
    let heads = kv.k.dims()[1];
    KeyValue {
        k: Tensor::cat(vec![kv.k, shared.repeat_dim(1, heads)], 3),
        shared: None,
        v: kv.v,
    }
}

/// Heads that share keys as one longer run of queries, so that no key or value is repeated:
/// `[batch, heads, queries, width]` → `[batch, kv_heads, heads/kv_heads · queries, width]`.
fn group<B: Backend>(x: Tensor<B, 4>, p: &AttendProblem) -> Tensor<B, 4> {
    if p.heads == p.kv_heads {
        return x;
    }
    let width = x.dims()[3];
    x.reshape([p.batch, p.kv_heads, p.heads / p.kv_heads * p.queries, width])
}

/// Back from [`group`].
fn ungroup<B: Backend>(x: Tensor<B, 4>, p: &AttendProblem) -> Tensor<B, 4> {
    if p.heads == p.kv_heads {
        return x;
    }
    let width = x.dims()[3];
    x.reshape([p.batch, p.heads, p.queries, width])
}

/// Token by token, the layout that projections leave behind: `[batch, heads, queries, width]` →
/// `[batch, queries, kv_heads, heads/kv_heads, width]` (one head a group for keys and values).
fn per_token<B: Backend>(x: Tensor<B, 4>, p: &AttendProblem) -> Tensor<B, 5> {
    let [batch, heads, queries, width] = x.dims();
    x.swap_dims(1, 2)
        .reshape([batch, queries, p.kv_heads, heads / p.kv_heads, width])
}

fn add_mask<B: Backend>(
    scores: Tensor<B, 4>,
    hidden: Option<Tensor<B, 4, burn::tensor::Bool>>,
    bias: Option<Tensor<B, 4>>,
) -> Tensor<B, 4> {
    let shape = scores.shape();
    let scores = match bias {
        // A caller's mask may hold −∞.
        Some(bias) => (scores + widen(bias)).clamp_min(MASKED),
        None => scores,
    };
    match hidden {
        Some(hidden) => scores.mask_fill(hidden.expand(shape), MASKED),
        None => scores,
    }
}

/// True where a column is hidden from a query, `[1|batch, 1, queries, columns]`.
fn column_mask<B: Backend>(
    p: &AttendProblem,
    device: &B::Device,
) -> Option<Tensor<B, 4, burn::tensor::Bool>> {
    let columns = Tensor::<B, 1, Int>::arange(0..p.columns as i64, device);
    match &p.visibility {
        Visibility::Causal { stride, offsets } => {
            let last_token = columns
                .mul_scalar(*stride as i64)
                .add_scalar(*stride as i64 - 1);
            let last_token = last_token.reshape([1, 1, 1, p.columns]);
            let token =
                tokens(p, offsets, device).expand([row_count(offsets), 1, p.queries, p.columns]);
            Some(token.clone().lower(last_token.expand(token.shape())))
        }
        Visibility::Prefix { lengths } => {
            if lengths.iter().all(|n| *n == p.columns) {
                return None;
            }
            let rows = lengths.len();
            let lengths = ints::<B>(lengths, device).reshape([rows, 1, 1, 1]);
            let columns = columns
                .reshape([1, 1, 1, p.columns])
                .expand([rows, 1, 1, p.columns]);
            Some(
                columns
                    .clone()
                    .greater_equal(lengths.expand(columns.shape())),
            )
        }
    }
}

/// True where a query ends a chunk (its state is a column already), `[1|batch, 1, queries, 1]`.
fn self_mask<B: Backend>(
    p: &AttendProblem,
    device: &B::Device,
) -> Option<Tensor<B, 4, burn::tensor::Bool>> {
    match &p.visibility {
        Visibility::Causal { stride, offsets } => {
            let token = tokens::<B>(p, offsets, device);
            let stride = *stride as i64;
            Some(token.remainder_scalar(stride).equal_elem(stride - 1))
        }
        Visibility::Prefix { .. } => None,
    }
}

/// The absolute index of each query, `[1|batch, 1, queries, 1]`; one row where all rows are alike.
fn tokens<B: Backend>(
    p: &AttendProblem,
    offsets: &[usize],
    device: &B::Device,
) -> Tensor<B, 4, Int> {
    let rows = row_count(offsets);
    let query = Tensor::<B, 1, Int>::arange(0..p.queries as i64, device);
    let query = query
        .reshape([1, 1, p.queries, 1])
        .expand([rows, 1, p.queries, 1]);
    let offset = ints::<B>(&offsets[..rows], device).reshape([rows, 1, 1, 1]);
    query.clone() + offset.expand(query.shape())
}

fn row_count(per_row: &[usize]) -> usize {
    if per_row.iter().all(|x| *x == per_row[0]) {
        1
    } else {
        per_row.len()
    }
}

fn ints<B: Backend>(values: &[usize], device: &B::Device) -> Tensor<B, 1, Int> {
    let values: Vec<i64> = values.iter().map(|x| *x as i64).collect();
    let length = values.len();
    Tensor::from_data(TensorData::new(values, [length]), device)
}

/// Softmax runs in 32 bits at least.
fn widen<B: Backend, const D: usize>(x: Tensor<B, D>) -> Tensor<B, D> {
    match x.dtype() {
        DType::F16 | DType::BF16 => x.cast(FloatDType::F32),
        _ => x,
    }
}

pub(crate) fn to_dtype<B: Backend, const D: usize>(x: Tensor<B, D>, dtype: DType) -> Tensor<B, D> {
    if x.dtype() == dtype { x } else { x.cast(dtype) }
}

/// [`AttentionBackend::multiply_heads`] in tensor operations.
///
/// # Panics
/// If the matrices do not fit `x`.
pub fn multiply_heads<B: Backend>(x: Tensor<B, 3>, matrices: HeadMatrices<B>) -> Tensor<B, 3> {
    matrices.check(&x);
    let ([inputs, _], block) = (matrices.widths(), matrices.block());
    let [_, heads, width] = x.dims();
    let HeadMatrices {
        weight,
        columns,
        transposed,
        ..
    } = matrices;
    let rank = weight.dims()[0];
    let weight = weight
        .reshape([rank, heads, block])
        .narrow(2, columns.start, columns.len());
    let weight = weight.permute(if transposed { [1, 2, 0] } else { [1, 0, 2] });
    let first = x.clone().narrow(2, 0, inputs).swap_dims(0, 1);
    let y = first.matmul(weight).swap_dims(0, 1);
    if inputs == width {
        return y;
    }
    Tensor::cat(vec![y, x.narrow(2, inputs, width - inputs)], 2)
}

/// [`AttentionBackend::decode`] in tensor operations: rotate, gather the open slots, merge, write back, gather
/// all slots of the tables, attend.
///
/// # Panics
/// If the operands do not fit the problem.
pub fn decode<B: AttentionBackend>(
    operands: DecodeOperands<B>,
    problem: &DecodeProblem,
) -> (Tensor<B, 3>, Tensor<B, 2>) {
    operands.check(problem);
    let p = problem;
    let DecodeOperands {
        q,
        row,
        gates,
        pool,
        table,
        ..
    } = rotated(operands, p);
    let rows = p.starts.len();
    let start = table.clone().narrow(1, 0, 1);
    let slots = table.narrow(1, 1, p.max_slots);
    let chunk = start.clone().div_scalar(p.stride as i64);
    let current = slots.clone().gather(1, chunk.clone()).reshape([rows]);

    let held = pool.clone().select(0, current.clone());
    let opens = start.remainder_scalar(p.stride as i64).equal_elem(0);
    let row = merge(row, held, opens, gates, chunk.clone(), p);
    let pool_dtype = pool.dtype();
    let pool = B::write_slots(pool, current, to_dtype(row, pool_dtype));

    let (k, v) = slots_as_keys(pool.clone(), slots, q.dtype(), p);
    let (g, dtype) = (p.layout.kv_heads(), q.dtype());
    let q = q
        .mul_scalar(p.scale)
        .reshape([rows, g, p.heads / g, p.layout.key_width()]);
    let weights = slot_weights(widen(q.matmul(k.swap_dims(2, 3))), chunk, p);
    let out = to_dtype(weights, dtype)
        .matmul(v)
        .reshape([rows, p.heads, p.layout.value_width()]);
    (out, pool)
}

/// The operands of a step whose rotation is done.
pub(super) fn rotated<B: AttentionBackend>(
    operands: DecodeOperands<B>,
    p: &DecodeProblem,
) -> DecodeOperands<B> {
    let Some(rotary) = operands.rotary else {
        return operands;
    };
    let [rows, width] = operands.row.dims();
    let row = match p.layout {
        SlotLayout::Dense { kv_heads, head_dim } => {
            let keys = operands.row.clone().narrow(1, 0, width / 2);
            let keys = rotate_heads(keys.reshape([rows, kv_heads, head_dim]), &rotary, p);
            let values = operands.row.narrow(1, width / 2, width / 2);
            Tensor::cat(vec![keys.reshape([rows, width / 2]), values], 1)
        }
        SlotLayout::Latent { .. } => {
            let key = operands.row.reshape([rows, 1, width]);
            rotate_heads(key, &rotary, p).reshape([rows, width])
        }
    };
    DecodeOperands {
        q: rotate_heads(operands.q, &rotary, p),
        row,
        rotary: None,
        ..operands
    }
}

/// Queries or keys `[rows, heads, key_width]` of one token a row, rotated.
fn rotate_heads<B: AttentionBackend>(
    x: Tensor<B, 3>,
    rotary: &Rotary<B>,
    p: &DecodeProblem,
) -> Tensor<B, 3> {
    B::rotate(x.unsqueeze_dim(1), rotary, p.layout.rotated().start).squeeze_dim(1)
}

/// The attention weights of a decoding step, `[rows, heads, max_slots]`: of the slots of each row's table in order, and 0
/// after them. `q` and `rotary` are what the step was given, and `pool` is what it gave back.
///
/// # Panics
/// If the shapes do not fit the problem.
pub fn decode_weights<B: AttentionBackend>(
    q: Tensor<B, 3>,
    rotary: Option<&Rotary<B>>,
    pool: Tensor<B, 2>,
    table: Tensor<B, 2, Int>,
    problem: &DecodeProblem,
) -> Tensor<B, 3> {
    let p = problem;
    let q = match rotary {
        Some(rotary) => rotate_heads(q, rotary, p),
        None => q,
    };
    let ([rows, heads, _], dtype) = (q.dims(), q.dtype());
    let chunk = table.clone().narrow(1, 0, 1).div_scalar(p.stride as i64);
    let (k, _) = slots_as_keys(pool, table.narrow(1, 1, p.max_slots), q.dtype(), p);
    let (g, width) = (p.layout.kv_heads(), p.layout.key_width());
    // A product of every row for itself would be a kernel of its own for each number of slots.
    let q = q.reshape([rows, g, heads / g, 1, width]);
    let k = k.reshape([rows, g, 1, p.max_slots, width]);
    let scores = (widen(q).mul_scalar(p.scale) * widen(k))
        .sum_dim(4)
        .reshape([rows, g, heads / g, p.max_slots]);
    let weights = slot_weights(scores, chunk, p).reshape([rows, heads, p.max_slots]);
    to_dtype(weights, dtype)
}

/// Weights `[rows, kv_heads, heads/kv_heads, max_slots]` of such scores, in 32 bits at least.
fn slot_weights<B: Backend>(
    scores: Tensor<B, 4>,
    chunk: Tensor<B, 2, Int>,
    p: &DecodeProblem,
) -> Tensor<B, 4> {
    let [rows, ..] = scores.dims();
    let hidden = Tensor::<B, 1, Int>::arange(0..p.max_slots as i64, &scores.device())
        .reshape([1, p.max_slots])
        .expand([rows, p.max_slots])
        .greater(chunk.expand([rows, p.max_slots]))
        .reshape([rows, 1, 1, p.max_slots])
        .expand(scores.shape());
    softmax(scores.mask_fill(hidden, MASKED), 3)
}

/// Keys and values `[rows, kv_heads, max_slots, ..]` of the slots that a table `[rows, max_slots]` names.
fn slots_as_keys<B: Backend>(
    pool: Tensor<B, 2>,
    slots: Tensor<B, 2, Int>,
    dtype: DType,
    p: &DecodeProblem,
) -> (Tensor<B, 4>, Tensor<B, 4>) {
    let [rows, count] = slots.dims();
    let held = to_dtype(pool.select(0, slots.reshape([rows * count])), dtype);
    match p.layout {
        SlotLayout::Dense { kv_heads, head_dim } => {
            let kv = held
                .reshape([rows, count, 2 * kv_heads, head_dim])
                .swap_dims(1, 2);
            (
                kv.clone().narrow(1, 0, kv_heads),
                kv.narrow(1, kv_heads, kv_heads),
            )
        }
        SlotLayout::Latent { rank, .. } => {
            let kv = held.reshape([rows, 1, count, p.layout.width()]);
            (kv.clone(), kv.narrow(3, 0, rank))
        }
    }
}

/// The row that a slot holds after this token: gated latents add up, the newest rope key wins.
fn merge<B: Backend>(
    row: Tensor<B, 2>,
    held: Tensor<B, 2>,
    opens: Tensor<B, 2, burn::tensor::Bool>,
    gates: Option<Tensor<B, 2>>,
    chunk: Tensor<B, 2, Int>,
    p: &DecodeProblem,
) -> Tensor<B, 2> {
    let Some(gates) = gates else { return row };
    let SlotLayout::Latent { rank, rope_dim } = p.layout else {
        return row;
    };
    let gates = gates.select(0, chunk.reshape([p.starts.len()]));
    let latent = apply_folded_gate(row.clone().narrow(1, 0, rank), gates);
    let before = to_dtype(held.narrow(1, 0, rank), row.dtype());
    let shape = before.shape();
    let latent = before.mask_fill(opens.expand(shape), 0.0) + latent;
    if rope_dim == 0 {
        return latent;
    }
    Tensor::cat(vec![latent, row.narrow(1, rank, rope_dim)], 1)
}

/// [`AttentionBackend::rotate`] in tensor operations.
///
/// # Panics
/// If the table does not fit `x`.
pub fn rotate<B: Backend>(x: Tensor<B, 4>, rotary: &Rotary<B>, first: usize) -> Tensor<B, 4> {
    if first == 0 {
        return rotary.apply(x);
    }
    let width = x.dims()[3];
    let turned = rotary.apply(x.clone().narrow(3, first, width - first));
    Tensor::cat(vec![x.narrow(3, 0, first), turned], 3)
}

/// [`AttentionBackend::gate_and_merge`] in tensor operations.
///
/// # Panics
/// If there are fewer gates than chunks, or they have another rank.
pub fn gate_and_merge<B: Backend>(
    latents: Tensor<B, 3>,
    gates: Tensor<B, 2>,
    stride: usize,
) -> Tensor<B, 3> {
    let [batch, tokens, rank] = latents.dims();
    let chunks = tokens.div_ceil(stride);
    let missing = chunks * stride - tokens;
    let latents = if missing == 0 {
        latents
    } else {
        let (device, dtype) = (latents.device(), latents.dtype());
        let zeros = Tensor::zeros([batch, missing, rank], (&device, dtype));
        Tensor::cat(vec![latents, zeros], 1)
    };
    // Every token gets its chunk's row.
    let gates = gates
        .narrow(0, 0, chunks)
        .reshape([1, chunks, 1, rank + 1])
        .repeat_dim(2, stride)
        .repeat_dim(0, batch)
        .reshape([batch * chunks * stride, rank + 1]);
    let gated = apply_folded_gate(latents.reshape([batch * chunks * stride, rank]), gates);
    running_merge(gated.reshape([batch, chunks, stride, rank]))
        .reshape([batch, chunks * stride, rank])
        .narrow(1, 0, tokens)
}

/// [`AttentionBackend::write_slots`] in tensor operations.
pub fn write_slots<B: Backend>(
    pool: Tensor<B, 2>,
    slots: Tensor<B, 1, Int>,
    rows: Tensor<B, 2>,
) -> Tensor<B, 2> {
    let n = slots.dims()[0];
    pool.scatter_nd(slots.reshape([n, 1]), rows, IndexingUpdateOp::Assign)
}
