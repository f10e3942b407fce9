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
    keys::{KeyGradients, KeyWriter},
    matrix::{HeadsWriter, Matrix, NewHeads},
    real::{Real, dot, vectorised},
    threads::for_each,
    tile::{Block, COLUMNS, Plan, QUERIES, Tile},
};

/// Gradients, each of the shape of what it belongs to.
pub(super) struct Gradients<R> {
    pub(super) q: NewHeads<R>,
    /// Of the keys of tokens, or of columns.
    pub(super) keys: Option<KeyGradients<R>>,
    /// Of the queries' own keys, where they are given for themselves.
    pub(super) own: Option<KeyGradients<R>>,
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
    let zeros = |view, n| KeyGradients::zeros(&view, [p.batch, p.kv_heads * parts, n]);
    let (mut keys, mut own) = match plan.tokens {
        Some(tokens) => (
            inputs
                .columns
                .or(inputs.own)
                .map(|view| zeros(view, tokens)),
            None,
        ),
        None => (
            inputs.columns.map(|view| zeros(view, p.columns)),
            inputs.own.map(|view| zeros(view, p.queries)),
        ),
    };
    let q_writer = q.writer();
    let keys_writer = keys.as_mut().map(KeyGradients::writer);
    let own_writer = own.as_mut().map(KeyGradients::writer);
    let writers = Writers {
        q: &q_writer,
        columns: keys_writer.as_ref(),
        own: own_writer.as_ref().or(keys_writer.as_ref()),
    };
    for_each(kv_tasks * parts, plan.multiplications(), |task| {
        let (row, part) = (task / parts, task % parts);
        let (batch, kv_head) = (row / p.kv_heads, row % p.kv_heads);
        let heads = group * part / parts..group * (part + 1) / parts;
        let place = [batch, kv_head, kv_head * parts + part];
        let mut task = Task::new(plan, inputs, saved, writers, place);
        for tile in plan.tiles(batch, kv_head * group + heads.start, heads.len()) {
            task.tile(&tile);
        }
        task.finish();
    });
    Gradients {
        q,
        keys: keys.map(|keys| keys.sum(parts)),
        own: own.map(|own| own.sum(parts)),
    }
}

/// Where gradients go.
#[derive(Clone, Copy)]
struct Writers<'a, R> {
    q: &'a HeadsWriter<'a, R>,
    columns: Option<&'a KeyWriter<'a, R>>,
    own: Option<&'a KeyWriter<'a, R>>,
}

/// Some heads of one row of the batch that share their keys and values.
struct Task<'a, R> {
    plan: &'a Plan<'a>,
    inputs: &'a Inputs<'a, R>,
    saved: &'a Saved<'a, R>,
    writers: Writers<'a, R>,
    batch: usize,
    kv_head: usize,
    /// The key/value head to write to.
    target: usize,
    /// Gradients of this task's keys and values, one row a column.
    grad_k: Vec<R>,
    grad_v: Vec<R>,
    scratch: Scratch<R>,
}

/// Memory for one block.
struct Scratch<R> {
    /// For keys that have to be put together.
    keys: Vec<R>,
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
        writers: Writers<'a, R>,
        [batch, kv_head, target]: [usize; 3],
    ) -> Self {
        let p = plan.problem;
        let zeros = |n: usize| vec![R::default(); n];
        Self {
            plan,
            inputs,
            saved,
            writers,
            batch,
            kv_head,
            target,
            grad_k: zeros(p.columns * p.key_width),
            grad_v: zeros(p.columns * p.value_width),
            scratch: Scratch {
                keys: Vec::new(),
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
        for (i, grad) in self
            .scratch
            .q
            .chunks_exact(width)
            .take(tile.count)
            .enumerate()
        {
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
            batch,
            kv_head,
            ..
        } = *self;
        let Some(columns) = &inputs.columns else {
            return;
        };
        let p = plan.problem;
        let (first, rows, count) = (block.first, tile.count - block.first, block.count);
        let queries = tile.rows_of(&inputs.q).rows_from(first);
        let grads = tile.rows_of(&saved.grad).rows_from(first);
        let one = R::of(1.0);
        let Scratch {
            keys,
            weights,
            scores,
            q,
            delta,
        } = &mut self.scratch;
        let keys = columns.keys([batch, kv_head, block.column, count], keys);
        let values = columns.v.tokens(batch, kv_head, block.column, count);
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
        let grad_v = &mut self.grad_v[block.column * vw..][..count * vw];
        weights.transposed().times(grads, one, grad_v, vw, true);
        let grad_k = &mut self.grad_k[block.column * kw..][..count * kw];
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
            batch,
            kv_head,
            target,
            ..
        } = *self;
        let (Some(own), Some(writer)) = (&inputs.own, writers.own) else {
            return;
        };
        let p = plan.problem;
        let scale = R::of(p.scale);
        vectorised(|| {
            for i in 0..tile.count {
                let (head, query) = tile.place(i);
                if !plan.sees_itself(batch, query) {
                    continue;
                }
                let token = plan.own_token(batch, query);
                let q = inputs.q.row(batch, head, query);
                let grad = saved.grad.row(batch, head, query);
                let log_sum = saved.log_sum.row(batch, head, query)[0];
                let kept = plan
                    .dropout(tile, i)
                    .map_or(R::of(1.0), |dropout| R::of(dropout.factor(p.columns)));
                let place = [batch, kv_head, token];
                let weight = (scale * own.score(q, place) - log_sum).exp();
                let grad_weight = kept * dot(grad, own.v.row(batch, kv_head, token));
                let score = weight * (grad_weight - self.scratch.delta[i]) * scale;
                let grad_q = &mut self.scratch.q[i * q.len()..][..q.len()];
                own.add_key(grad_q, score, place);
                // SAFETY: this key/value head is this task's alone, and it has one thread.
                unsafe { writer.add([batch, target, token], (score, q), (kept * weight, grad)) };
            }
        });
    }

    /// Writes the gradients of keys and values.
    fn finish(self) {
        let Some(writer) = self.writers.columns else {
            return;
        };
        let p = self.plan.problem;
        let keys = self.grad_k.chunks_exact(p.key_width);
        let values = self.grad_v.chunks_exact(p.value_width);
        let one = R::of(1.0);
        for (column, (key, value)) in keys.zip(values).enumerate() {
            let place = [self.batch, self.target, self.plan.column_token(column)];
            // SAFETY: this key/value head is this task's alone, and it has one thread.
            unsafe { writer.add(place, (one, key), (one, value)) };
        }
    }
}

/// Scores to weights, and gradients of weights to gradients of scores.
#[inline(always)]
#[expect(
    clippy::inline_always,
    reason = "it has to be part of a vectorised caller"
)]
fn softmax_backward<R: Real>(weights: &mut [R], scores: &mut [R], log_sum: R, delta: R) {
    for (weight, score) in weights.iter_mut().zip(scores) {
        *weight = (*weight - log_sum).exp();
        *score = *weight * (*score - delta);
    }
}

/// The same where each weight was multiplied by a factor of a dropout mask; the weights come out multiplied.
#[inline(always)]
#[expect(
    clippy::inline_always,
    reason = "it has to be part of a vectorised caller"
)]
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
