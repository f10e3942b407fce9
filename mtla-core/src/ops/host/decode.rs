//! One decoding step over a slot pool.
//!
//! Every row's new token is rotated and merged into its slot first, in place. Then each row's heads that share keys attend
//! to its slots together: a run of neighbouring slots (a prompt, above all) is read where it lies, as one
//! matrix; scattered slots are gathered into a block before. Rows that begin with the same slots, as the beams of a
//! prompt do, attend to these together too.

use std::ops::Range;

use burn::tensor::{DType, Element, Int, Tensor, TensorPrimitive};
use burn_flex::{Flex, FlexTensor};

use super::{
    super::{
        DecodeOperands, DecodeProblem, LaunchKind, SlotLayout, launches,
        plain::{rotated, to_dtype},
    },
    matrix::{HeadsWriter, Matrix, NewHeads},
    merge::sigmoid,
    primitive,
    real::{Real, dot, vectorised},
    softmax::Softmax,
    tensor,
    threads::for_each,
};

/// Slots attended to at a time, and the shortest run that is not copied.
const SLOTS: usize = 128;
const RUN: usize = 16;

/// Queries that attend together to the slots that their rows share.
const QUERIES: usize = 64;

/// [`decode`](crate::ops::AttentionBackend::decode).
///
/// # Panics
/// If the operands do not fit the problem.
pub(in crate::ops) fn decode(
    operands: DecodeOperands<Flex>,
    problem: &DecodeProblem,
) -> (Tensor<Flex, 3>, Tensor<Flex, 2>) {
    operands.check(problem);
    launches::count(LaunchKind::HostDecode);
    let dtype = operands.q.dtype();
    let operands = rotated(operands, problem);
    let table = integers(operands.table);
    let mut pool = operands.pool.into_primitive().tensor().to_contiguous();
    let floats = Floats {
        q: primitive(operands.q).to_contiguous(),
        row: primitive(operands.row).to_contiguous(),
        gates: operands.gates.map(|gates| primitive(gates).to_contiguous()),
    };
    let out = match (floats.q.dtype(), pool.dtype()) {
        (DType::F64, DType::F64) => run::<f64, f64>(&floats, &mut pool, &table, problem),
        (DType::F64, DType::F32) => run::<f64, f32>(&floats, &mut pool, &table, problem),
        (_, DType::F64) => run::<f32, f64>(&floats, &mut pool, &table, problem),
        (_, DType::F16) => run::<f32, burn::tensor::f16>(&floats, &mut pool, &table, problem),
        (_, DType::BF16) => run::<f32, burn::tensor::bf16>(&floats, &mut pool, &table, problem),
        _ => run::<f32, f32>(&floats, &mut pool, &table, problem),
    };
    (
        to_dtype(tensor(out), dtype),
        Tensor::from_primitive(TensorPrimitive::Float(pool)),
    )
}

struct Floats {
    q: FlexTensor,
    row: FlexTensor,
    gates: Option<FlexTensor>,
}

fn integers(table: Tensor<Flex, 2, Int>) -> Vec<usize> {
    let table = table.into_primitive().to_contiguous();
    match table.dtype() {
        DType::I64 => table.storage::<i64>().iter().map(|x| *x as usize).collect(),
        _ => table.storage::<i32>().iter().map(|x| *x as usize).collect(),
    }
}

fn run<R: Real, P: Stored<R>>(
    floats: &Floats,
    pool: &mut FlexTensor,
    table: &[usize],
    problem: &DecodeProblem,
) -> FlexTensor {
    let p = problem;
    let gates = floats.gates.as_ref().map(FlexTensor::storage::<R>);
    merge::<R, P>(pool.storage_mut(), floats.row.storage(), gates, table, p);
    let step = Step {
        problem: p,
        q: floats.q.storage::<R>(),
        pool: pool.storage::<P>(),
        table,
    };
    let (rows, kv_heads) = (p.starts.len(), p.layout.kv_heads());
    let teams = teams(p, QUERIES * kv_heads / p.heads);
    let mut out = NewHeads::zeros([rows, p.heads, 1, p.layout.value_width()]);
    let writer = out.writer();
    let slots: usize = (0..rows).map(|row| p.slots(row)).sum();
    for_each(
        teams.len() * kv_heads,
        slots * p.heads * p.layout.width(),
        |task| {
            step.attend(&teams[task / kv_heads], task % kv_heads, &writer);
        },
    );
    out.into_tokens()
}

/// Writes each row's new token into its slot, or adds it to what the slot holds.
fn merge<R: Real, P: Stored<R>>(
    pool: &mut [P],
    new: &[R],
    gates: Option<&[R]>,
    table: &[usize],
    p: &DecodeProblem,
) {
    let width = p.layout.width();
    let lines = table
        .chunks_exact(1 + p.max_slots)
        .zip(new.chunks_exact(width));
    for (table, new) in lines {
        let (start, chunk) = (table[0], table[0] / p.stride);
        let slot = &mut pool[table[1 + chunk] * width..][..width];
        let (SlotLayout::Latent { rank, .. }, Some(gates)) = (p.layout, gates) else {
            for (slot, new) in slot.iter_mut().zip(new) {
                *slot = P::store(*new);
            }
            continue;
        };
        let opens = start.is_multiple_of(p.stride);
        vectorised(|| {
            let (g, beta) = gates[chunk * (rank + 1)..][..=rank].split_at(rank);
            let weight = sigmoid(dot(g, &new[..rank]) + beta[0]);
            for (i, (slot, new)) in slot.iter_mut().zip(new).enumerate() {
                *slot = match (i < rank, opens) {
                    (true, true) => P::store(weight * *new),
                    (true, false) => P::store(slot.load() + weight * *new),
                    (false, _) => P::store(*new),
                };
            }
        });
    }
}

/// What all rows of a step share.
struct Step<'a, R, P> {
    problem: &'a DecodeProblem,
    q: &'a [R],
    pool: &'a [P],
    table: &'a [usize],
}

impl<R: Real, P: Stored<R>> Step<'_, R, P> {
    /// The slots of a row.
    fn slots(&self, row: usize) -> &[usize] {
        let line = &self.table[row * (1 + self.problem.max_slots)..][..=self.problem.max_slots];
        &line[1..=self.problem.slots(row)]
    }

    /// The heads of one key/value head of some rows.
    fn attend(&self, team: &Team, kv_head: usize, out: &HeadsWriter<'_, R>) {
        let p = self.problem;
        let (group, key) = (p.heads / p.layout.kv_heads(), p.layout.key_width());
        let mut queries = Vec::with_capacity(team.rows.len() * group * key);
        for row in team.rows.clone() {
            let first = (row * p.heads + kv_head * group) * key;
            queries.extend_from_slice(&self.q[first..][..group * key]);
        }
        let mut softmax = Softmax::new(team.rows.len() * group, p.layout.value_width());
        let mut scratch = Scratch::default();
        let shared = &self.slots(team.rows.start)[..team.shared];
        self.look(kv_head, shared, &queries, &mut softmax, 0, &mut scratch);
        for (i, row) in team.rows.clone().enumerate() {
            let own = &self.slots(row)[team.shared..];
            let queries = &queries[i * group * key..][..group * key];
            self.look(kv_head, own, queries, &mut softmax, i * group, &mut scratch);
            for head in 0..group {
                // SAFETY: each head of each row belongs to one task.
                let out = unsafe { out.row(row, kv_head * group + head, 0) };
                softmax.finish(i * group + head, out);
            }
        }
    }

    /// Takes some slots into the softmax of `queries`, which are those from number `first` on there.
    fn look(
        &self,
        kv_head: usize,
        slots: &[usize],
        queries: &[R],
        softmax: &mut Softmax<R>,
        first: usize,
        Scratch { scores, gathered }: &mut Scratch<R>,
    ) {
        let p = self.problem;
        let width = p.layout.width();
        let (key, value) = (p.layout.key_width(), p.layout.value_width());
        let (key_start, value_start) = match p.layout {
            SlotLayout::Dense { kv_heads, head_dim } => {
                (kv_head * head_dim, (kv_heads + kv_head) * head_dim)
            }
            SlotLayout::Latent { .. } => (0, 0),
        };
        let m = queries.len() / key;
        let queries = Matrix::new(queries, m, key, key);
        for block in blocks(slots) {
            let memory = self.block(block, width, gathered);
            let n = block.len();
            let keys = Matrix::new(&memory[key_start..], n, key, width);
            let values = Matrix::new(&memory[value_start..], n, value, width);
            scores.resize(m * n, R::default());
            queries.times(keys.transposed(), R::of(p.scale), scores, n, false);
            vectorised(|| {
                for (i, scores) in scores.chunks_exact_mut(n).enumerate() {
                    softmax.take(first + i, scores);
                }
            });
            let weights = Matrix::new(scores, m, n, n);
            let weighted = &mut softmax.weighted[first * value..][..m * value];
            weights.times(values, R::of(1.0), weighted, value, true);
        }
    }

    /// The slots of a block one after the other: in the pool where they lie so, else copied.
    fn block<'b>(&'b self, slots: &[usize], width: usize, gathered: &'b mut Vec<R>) -> &'b [R] {
        if is_run(slots)
            && let Some(pool) = P::as_computed(self.pool)
        {
            return &pool[slots[0] * width..][..slots.len() * width];
        }
        gathered.clear();
        for slot in slots {
            let slot = &self.pool[slot * width..][..width];
            gathered.extend(slot.iter().map(Stored::load));
        }
        gathered
    }
}

/// Memory that is used again.
#[derive(Default)]
struct Scratch<R> {
    scores: Vec<R>,
    gathered: Vec<R>,
}

/// Neighbouring rows that attend together to their first slots.
#[derive(Debug, PartialEq)]
struct Team {
    rows: Range<usize>,
    /// Slots that all of them begin with.
    shared: usize,
}

/// Cuts rows into teams of at most `most` rows, or of one where that is more; rows that share less than a long run stay
/// alone.
fn teams(p: &DecodeProblem, most: usize) -> Vec<Team> {
    let mut teams = Vec::new();
    let mut first = 0;
    while first < p.common.len() {
        let others = p.common[first + 1..].iter();
        let count = 1 + others.take_while(|common| **common >= RUN).count();
        // Teams of one size, so that no core waits long for another.
        let parts = count.div_ceil(most.max(1));
        for part in 0..parts {
            let rows = first + part * count / parts..first + (part + 1) * count / parts;
            teams.push(Team {
                shared: p.shared(rows.clone()),
                rows,
            });
        }
        first += count;
    }
    teams
}

fn is_run(slots: &[usize]) -> bool {
    slots.windows(2).all(|pair| pair[0] + 1 == pair[1])
}

/// Cuts a row's slots into blocks: long runs for themselves, what lies scattered between them together.
fn blocks(mut slots: &[usize]) -> impl Iterator<Item = &[usize]> {
    let run = |slots: &[usize]| {
        let pairs = slots.windows(2).take(SLOTS - 1);
        1 + pairs.take_while(|pair| pair[0] + 1 == pair[1]).count()
    };
    std::iter::from_fn(move || {
        let mut length = run(slots.first().map(|_| slots)?);
        if length < RUN {
            // Scattered: up to the next long run.
            while length < slots.len().min(SLOTS) {
                let next = run(&slots[length..]);
                if next >= RUN {
                    break;
                }
                length = (length + next).min(SLOTS);
            }
        }
        let (block, rest) = slots.split_at(length);
        slots = rest;
        Some(block)
    })
}

/// An element type of a pool, and how it is computed with.
trait Stored<R>: Element + bytemuck::Pod {
    fn load(&self) -> R;
    fn store(x: R) -> Self;

    /// The pool as it is, if it is of the type to compute in.
    fn as_computed(_: &[Self]) -> Option<&[R]> {
        None
    }
}

macro_rules! stored {
    ($stored:ty as $computed:ty) => {
        impl Stored<$computed> for $stored {
            #[inline]
            fn load(&self) -> $computed {
                <$computed>::from(*self)
            }

            #[inline]
            fn store(x: $computed) -> Self {
                x
            }

            fn as_computed(pool: &[Self]) -> Option<&[$computed]> {
                Some(pool)
            }
        }
    };
    ($stored:ty as $computed:ty, $load:expr, $store:expr) => {
        impl Stored<$computed> for $stored {
            #[inline]
            fn load(&self) -> $computed {
                $load(*self)
            }

            #[inline]
            fn store(x: $computed) -> Self {
                $store(x)
            }
        }
    };
}

stored!(f32 as f32);
stored!(f64 as f64);
stored!(f32 as f64, f64::from, |x| x as f32);
stored!(f64 as f32, |x| x as f32, f64::from);
stored!(
    burn::tensor::f16 as f32,
    f32::from,
    burn::tensor::f16::from_f32
);
stored!(
    burn::tensor::bf16 as f32,
    f32::from,
    burn::tensor::bf16::from_f32
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_keep_long_runs_and_join_what_is_scattered() {
        let cut = |slots: &[usize]| -> Vec<usize> { blocks(slots).map(<[usize]>::len).collect() };
        assert_eq!(cut(&[]), Vec::<usize>::new());
        assert_eq!(cut(&[7]), [1]);
        let run: Vec<usize> = (100..400).collect();
        assert_eq!(cut(&run), [128, 128, 44]);
        let scattered: Vec<usize> = (0..150).map(|i| i * 2).collect();
        assert_eq!(cut(&scattered), [128, 22]);
        let mixed = [&[9, 3, 5, 6], &run[..50], &[1, 2, 90]].concat();
        assert_eq!(cut(&mixed), [4, 50, 3]);
    }

    #[test]
    fn rows_that_begin_alike_are_a_team() {
        let cut = |common: &[usize], slots: usize, most| -> Vec<(Range<usize>, usize)> {
            let problem = DecodeProblem {
                heads: 1,
                layout: SlotLayout::Latent {
                    rank: 1,
                    rope_dim: 0,
                },
                stride: 1,
                starts: vec![slots - 1; common.len()],
                max_slots: slots,
                common: common.to_vec(),
                scale: 1.0,
            };
            let teams = teams(&problem, most).into_iter();
            teams.map(|team| (team.rows, team.shared)).collect()
        };
        assert_eq!(cut(&[], 60, 8), []);
        let rows = [0, 51, 50, 52, 0, RUN - 1];
        assert_eq!(cut(&rows, 60, 8), [(0..4, 50), (4..5, 0), (5..6, 0)]);
        assert_eq!(
            cut(&rows, 60, 3),
            [(0..2, 51), (2..4, 52), (4..5, 0), (5..6, 0)]
        );
        assert_eq!(cut(&rows, 60, 0).len(), rows.len());
        // The newest slot is each row's own, whatever is said of it.
        assert_eq!(cut(&[0, 50], 50, 8), [(0..2, 49)]);
    }

    #[test]
    fn blocks_cover_the_slots_in_order() {
        let mut slots = Vec::new();
        for i in 0..200usize {
            slots.extend((0..i % 23).map(|k| i * 1000 + k));
        }
        assert_eq!(blocks(&slots).collect::<Vec<_>>().concat(), slots);
        assert!(blocks(&slots).all(|block| block.len() <= SLOTS));
    }
}
