//! The forward pass: an online softmax over blocks of columns, so that no more than a block of scores is ever
//! held.

use super::{
    Inputs,
    matrix::{Matrix, NewHeads},
    real::{Real, add_scaled, vectorised},
    softmax::Softmax,
    threads::for_each,
    tile::{Block, COLUMNS, Plan, QUERIES, Tile},
};

/// What a backward pass needs beside the inputs: the outputs, and for each query the logarithm of the sum of
/// its exponentials, both `[batch, heads, queries, ..]`.
pub(super) struct Forward<R> {
    pub(super) out: NewHeads<R>,
    pub(super) log_sum: NewHeads<R>,
}

pub(super) fn forward<R: Real>(plan: &Plan<'_>, inputs: &Inputs<'_, R>) -> Forward<R> {
    let p = plan.problem;
    let mut out = NewHeads::zeros([p.batch, p.heads, p.queries, p.value_width]);
    let mut log_sum = NewHeads::zeros([p.batch, p.heads, p.queries, 1]);
    let group = plan.group();
    let tiles: Vec<Tile> = (0..p.batch)
        .flat_map(|batch| {
            (0..p.kv_heads).flat_map(move |kv_head| plan.tiles(batch, kv_head * group, group))
        })
        .collect();
    let (outputs, sums) = (out.writer(), log_sum.writer());
    for_each(tiles.len(), plan.multiplications(), |task| {
        // The last tiles of a sequence see most: they go first, so that no core waits for one of them.
        let tile = &tiles[tiles.len() - 1 - task];
        let mut attention = TileAttention::new(plan, inputs, tile);
        for block in plan.blocks(tile) {
            attention.take(&block);
        }
        for i in 0..tile.count {
            let (head, query) = tile.place(i);
            // SAFETY: tiles are disjoint, and each is one task's.
            let (out, log_sum) = unsafe {
                (
                    outputs.row(tile.batch, head, query),
                    sums.row(tile.batch, head, query),
                )
            };
            log_sum[0] = attention.softmax.finish(i, out);
        }
    });
    Forward { out, log_sum }
}

/// The attention of a tile's queries to what they have seen so far.
struct TileAttention<'a, R> {
    plan: &'a Plan<'a>,
    inputs: &'a Inputs<'a, R>,
    tile: &'a Tile,
    queries: Matrix<'a, R>,
    softmax: Softmax<R>,
    scores: Vec<R>,
    /// For keys that have to be put together.
    keys: Vec<R>,
}

impl<'a, R: Real> TileAttention<'a, R> {
    /// Begins with what each query sees of its own chunk.
    fn new(plan: &'a Plan<'a>, inputs: &'a Inputs<'a, R>, tile: &'a Tile) -> Self {
        let width = plan.problem.value_width;
        let mut new = Self {
            plan,
            inputs,
            tile,
            queries: tile.rows_of(&inputs.q),
            softmax: Softmax::new(tile.count, width),
            scores: vec![R::default(); QUERIES.min(tile.count) * COLUMNS.min(plan.problem.columns)],
            keys: Vec::new(),
        };
        let Some(own) = &inputs.own else {
            return new;
        };
        let (p, kv_head) = (plan.problem, tile.head / plan.group());
        let own_column = p.columns;
        vectorised(|| {
            for i in 0..tile.count {
                let (head, query) = tile.place(i);
                if !plan.sees_itself(tile.batch, query) {
                    continue;
                }
                let q = inputs.q.row(tile.batch, head, query);
                let token = plan.own_token(tile.batch, query);
                let score = R::of(p.scale) * own.score(q, [tile.batch, kv_head, token]);
                new.softmax.take(i, &mut [score]);
                let kept = plan
                    .dropout(tile, i)
                    .map_or(R::of(1.0), |dropout| R::of(dropout.factor(own_column)));
                let weighted = &mut new.softmax.weighted[i * width..][..width];
                add_scaled(weighted, kept, own.v.row(tile.batch, kv_head, token));
            }
        });
        new
    }

    /// Takes a block of columns in.
    fn take(&mut self, block: &Block) {
        let Self {
            plan, inputs, tile, ..
        } = *self;
        let Some(columns) = &inputs.columns else {
            return;
        };
        let place = [
            tile.batch,
            tile.head / plan.group(),
            block.column,
            block.count,
        ];
        let (first, rows) = (block.first, tile.count - block.first);
        let keys = columns.keys(place, &mut self.keys);
        let [b, h, column, count] = place;
        let values = columns.v.tokens(b, h, column, count);
        let scale = R::of(plan.problem.scale);
        let queries = self.queries.rows_from(first);
        let scores = &mut self.scores[..rows * block.count];
        queries.times(keys.transposed(), scale, scores, block.count, false);
        let width = plan.problem.value_width;
        vectorised(|| {
            for (i, scores) in scores.chunks_exact_mut(block.count).enumerate() {
                let i = first + i;
                let (seen, hidden) = scores.split_at_mut(plan.visible_in(tile, block, i));
                hidden.fill(R::default());
                self.softmax.take(i, seen);
                if let Some(dropout) = plan.dropout(tile, i) {
                    for (j, weight) in seen.iter_mut().enumerate() {
                        *weight *= R::of(dropout.factor(block.column + j));
                    }
                }
            }
        });
        let weights = Matrix::new(scores, rows, block.count, block.count);
        let weighted = &mut self.softmax.weighted[first * width..];
        weights.times(values, R::of(1.0), weighted, width, true);
    }
}
