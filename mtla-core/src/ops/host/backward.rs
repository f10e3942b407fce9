//! The backward pass, written by hand: scores are computed again block by block from the saved logarithms,
//! so that memory stays linear in the number of tokens.
//!
//! With `P` the weights, `M` the dropout mask and `O = (M ∘ P) V`:
//!
//! ```text
//! dV = (M ∘ P)ᵀ dO      dS = P ∘ (M ∘ (dO Vᵀ) − rowsum(dO ∘ O))      dQ = scale · dS K      dK = scale · dSᵀ Q
//! ```

use super::{
    Inputs, Saved,
    matrix::{HeadsWriter, Matrix, NewHeads},
    real::{Real, add_scaled, dot, vectorised},
    tile::{Block, COLUMNS, Plan, QUERIES, Tile, for_each},
};

/// Gradients, each of the shape of what it belongs to; keys and values as in [`Inputs`].
pub(super) struct Gradients<R> {
    pub(super) q: NewHeads<R>,
    pub(super) columns: Option<(NewHeads<R>, NewHeads<R>)>,
    pub(super) own: Option<(NewHeads<R>, NewHeads<R>)>,
}

/// Key/value heads a task works on are few where a small batch shares keys among many heads; then heads are
/// divided among this many tasks, and their parts are added at the end.
const TASKS: usize = 16;

pub(super) fn backward<R: Real>(
    plan: &Plan<'_>,
    inputs: &Inputs<'_, R>,
    saved: &Saved<'_, R>,
) -> Gradients<R> {
    let p = plan.problem;
    let (group, kv_tasks) = (plan.group(), p.batch * p.kv_heads);
    let parts = group.min(TASKS.div_ceil(kv_tasks.max(1))).max(1);
    let mut q = NewHeads::zeros([p.batch, p.heads, p.queries, p.key_width]);
    // A part of its own for each task, as further key/value heads.
    let pair = |n| {
        (
            NewHeads::zeros([p.batch, p.kv_heads * parts, n, p.key_width]),
            NewHeads::zeros([p.batch, p.kv_heads * parts, n, p.value_width]),
        )
    };
    let mut columns = inputs.columns.as_ref().map(|_| pair(p.columns));
    let mut own = inputs.own.as_ref().map(|_| pair(p.queries));
    let writers = Writers {
        q: q.writer(),
        columns: columns.as_mut().map(|(k, v)| (k.writer(), v.writer())),
        own: own.as_mut().map(|(k, v)| (k.writer(), v.writer())),
    };
    for_each(kv_tasks * parts, plan.multiplications(), |task| {
        let (row, part) = (task / parts, task % parts);
        let (batch, kv_head) = (row / p.kv_heads, row % p.kv_heads);
        let heads = group * part / parts..group * (part + 1) / parts;
        let mut task = Task::new(plan, inputs, saved, &writers, kv_head * parts + part);
        for tile in plan.tiles(batch, kv_head * group + heads.start, heads.len()) {
            task.tile(&tile);
        }
        task.finish(batch);
    });
    let merge = |(k, v): (NewHeads<R>, NewHeads<R>)| (k.sum_heads(parts), v.sum_heads(parts));
    Gradients {
        q,
        columns: columns.map(merge),
        own: own.map(merge),
    }
}

/// Where gradients go.
struct Writers<'a, R> {
    q: HeadsWriter<'a, R>,
    columns: Option<(HeadsWriter<'a, R>, HeadsWriter<'a, R>)>,
    own: Option<(HeadsWriter<'a, R>, HeadsWriter<'a, R>)>,
}

/// Some heads of one row of the batch that share their keys and values.
struct Task<'a, R> {
    plan: &'a Plan<'a>,
    inputs: &'a Inputs<'a, R>,
    saved: &'a Saved<'a, R>,
    writers: &'a Writers<'a, R>,
    /// The key/value head to write to.
    target: usize,
    keys: Vec<R>,
    values: Vec<R>,
    scratch: Scratch<R>,
}

/// Memory for one block.
struct Scratch<R> {
    weights: Vec<R>,
    scores: Vec<R>,
    q: Vec<R>,
    /// `dO · O` of each query.
    delta: Vec<R>,
}

impl<'a, R: Real> Task<'a, R> {
    fn new(
        plan: &'a Plan<'a>,
        inputs: &'a Inputs<'a, R>,
        saved: &'a Saved<'a, R>,
        writers: &'a Writers<'a, R>,
        target: usize,
    ) -> Self {
        let p = plan.problem;
        let zeros = |n: usize| vec![R::default(); n];
        Self {
            plan,
            inputs,
            saved,
            writers,
            target,
            keys: zeros(p.columns * p.key_width),
            values: zeros(p.columns * p.value_width),
            scratch: Scratch {
                weights: zeros(QUERIES * COLUMNS.min(p.columns)),
                scores: zeros(QUERIES * COLUMNS.min(p.columns)),
                q: zeros(QUERIES * p.key_width),
                delta: zeros(QUERIES),
            },
        }
    }

    fn tile(&mut self, tile: &Tile) {
        let (plan, saved) = (self.plan, self.saved);
        let width = plan.problem.key_width;
        vectorised(|| {
            for i in 0..tile.count {
                let (head, query) = tile.place(i);
                let out = saved.out.row(tile.batch, head, query);
                self.scratch.delta[i] = dot(out, saved.grad.row(tile.batch, head, query));
            }
        });
        self.scratch.q[..tile.count * width].fill(R::default());
        for block in plan.blocks(tile) {
            self.block(tile, &block);
        }
        self.own(tile);
        for (i, grad) in self.scratch.q.chunks_exact(width).take(tile.count).enumerate() {
            let (head, query) = tile.place(i);
            // SAFETY: tiles are disjoint, and each belongs to one task.
            unsafe { self.writers.q.row(tile.batch, head, query) }.copy_from_slice(grad);
        }
    }

    /// One block of columns.
    fn block(&mut self, tile: &Tile, block: &Block) {
        let Self {
            plan,
            inputs,
            saved,
            ..
        } = *self;
        let Some((keys, values)) = &inputs.columns else {
            return;
        };
        let p = plan.problem;
        let kv_head = tile.head / plan.group();
        let (first, rows, count) = (block.first, tile.count - block.first, block.count);
        let keys = keys.tokens(tile.batch, kv_head, block.column, count);
        let values = values.tokens(tile.batch, kv_head, block.column, count);
        let queries = tile.rows_of(&inputs.q).rows_from(first);
        let grads = tile.rows_of(&saved.grad).rows_from(first);
        let one = R::of(1.0);
        let Scratch {
            weights,
            scores,
            q,
            delta,
        } = &mut self.scratch;
        let (weights, scores) = (&mut weights[..rows * count], &mut scores[..rows * count]);
        queries.times(keys.transposed(), R::of(p.scale), weights, count, false);
        grads.times(values.transposed(), one, scores, count, false);
        vectorised(|| {
            let lines = weights
                .chunks_exact_mut(count)
                .zip(scores.chunks_exact_mut(count));
            for (i, (weights, scores)) in lines.enumerate() {
                let i = first + i;
                let (head, query) = tile.place(i);
                let log_sum = saved.log_sum.row(tile.batch, head, query)[0];
                let seen = plan.visible_in(tile, block, i);
                weights[seen..].fill(R::default());
                scores[seen..].fill(R::default());
                let (weights, scores) = (&mut weights[..seen], &mut scores[..seen]);
                match plan.dropout(tile, i) {
                    None => softmax_backward(weights, scores, log_sum, delta[i]),
                    Some(dropout) => {
                        let factor = |j| R::of(dropout.factor(block.column + j));
                        dropped_softmax_backward(weights, scores, factor, log_sum, delta[i]);
                    }
                }
            }
        });
        let weights = Matrix::new(weights, rows, count, count);
        let scores = Matrix::new(scores, rows, count, count);
        let (kw, vw) = (p.key_width, p.value_width);
        let scale = R::of(p.scale);
        let grad_v = &mut self.values[block.column * vw..][..count * vw];
        weights.transposed().times(grads, one, grad_v, vw, true);
        let grad_k = &mut self.keys[block.column * kw..][..count * kw];
        scores.transposed().times(queries, scale, grad_k, kw, true);
        scores.times(keys, scale, &mut q[first * kw..], kw, true);
    }

    /// The queries' own chunks.
    fn own(&mut self, tile: &Tile) {
        let Self {
            plan,
            inputs,
            saved,
            writers,
            target,
            ..
        } = *self;
        let (Some((keys, values)), Some((grad_k, grad_v))) = (&inputs.own, &writers.own) else {
            return;
        };
        let p = plan.problem;
        let (scale, kv_head) = (R::of(p.scale), tile.head / plan.group());
        vectorised(|| {
            for i in 0..tile.count {
                let (head, query) = tile.place(i);
                if !plan.sees_itself(tile.batch, query) {
                    continue;
                }
                let q = inputs.q.row(tile.batch, head, query);
                let k = keys.row(tile.batch, kv_head, query);
                let v = values.row(tile.batch, kv_head, query);
                let grad = saved.grad.row(tile.batch, head, query);
                let log_sum = saved.log_sum.row(tile.batch, head, query)[0];
                let kept = plan
                    .dropout(tile, i)
                    .map_or(R::of(1.0), |dropout| R::of(dropout.factor(p.columns)));
                let weight = (scale * dot(q, k) - log_sum).exp();
                let score = weight * (kept * dot(grad, v) - self.scratch.delta[i]) * scale;
                add_scaled(&mut self.scratch.q[i * k.len()..][..k.len()], score, k);
                // SAFETY: this key/value head is this task's alone, and it has one thread.
                unsafe {
                    add_scaled(grad_k.row(tile.batch, target, query), score, q);
                    add_scaled(grad_v.row(tile.batch, target, query), kept * weight, grad);
                }
            }
        });
    }

    /// Writes the gradients of keys and values.
    fn finish(self, batch: usize) {
        let Some((keys, values)) = &self.writers.columns else {
            return;
        };
        for (writer, grads) in [(keys, &self.keys), (values, &self.values)] {
            let width = writer.width();
            for (column, grad) in grads.chunks_exact(width).enumerate() {
                // SAFETY: this key/value head is this task's alone.
                unsafe { writer.row(batch, self.target, column) }.copy_from_slice(grad);
            }
        }
    }
}

/// Scores to weights, and gradients of weights to gradients of scores.
#[inline(always)]
#[expect(clippy::inline_always, reason = "it has to be part of a vectorised caller")]
fn softmax_backward<R: Real>(weights: &mut [R], scores: &mut [R], log_sum: R, delta: R) {
    for (weight, score) in weights.iter_mut().zip(scores) {
        *weight = (*weight - log_sum).exp();
        *score = *weight * (*score - delta);
    }
}

/// The same where each weight was multiplied by a factor of a dropout mask; the weights come out multiplied.
#[inline(always)]
#[expect(clippy::inline_always, reason = "it has to be part of a vectorised caller")]
fn dropped_softmax_backward<R: Real>(
    weights: &mut [R],
    scores: &mut [R],
    factor: impl Fn(usize) -> R,
    log_sum: R,
    delta: R,
) {
    for (j, (weight, score)) in weights.iter_mut().zip(scores).enumerate() {
        let factor = factor(j);
        let kept = (*weight - log_sum).exp();
        *score = kept * (factor * *score - delta);
        *weight = factor * kept;
    }
}
