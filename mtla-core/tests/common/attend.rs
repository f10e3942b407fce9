//! Random problems of `attend` with their operands, and what a form of it makes of them.

use burn::tensor::{
    DType, Tensor, TensorData,
    backend::{AutodiffBackend, Backend},
};
use burn_flex::{Flex, FlexDevice};
use mtla_core::{
    ops::{AttendOperands, AttendProblem, Dropout, KeyValue, Keys, Visibility},
    testing::one_graph,
};

use super::{Numbers, values};

/// Which keys an attention has.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Form {
    Tokens,
    Columns,
    Prefix,
}

/// A random problem and its operands as numbers.
pub(crate) struct Case {
    pub(crate) problem: AttendProblem,
    form: Form,
    tokens: usize,
    shared: usize,
    numbers: Numbers,
}

impl Case {
    pub(crate) fn new(seed: u64, form: Form, dropout: bool) -> Self {
        let mut n = Numbers::new(seed);
        let mut pick = |low: usize, high: usize| low + (n.bits() as usize) % (high - low);
        let (batch, kv_heads, group) = (pick(1, 4), pick(1, 4), pick(1, 4));
        let (stride, queries) = (pick(1, 5), pick(1, 300));
        let offsets: Vec<usize> = (0..batch).map(|_| pick(0, 40)).collect();
        let lengths: Vec<usize> = (0..batch).map(|_| pick(0, queries + 1)).collect();
        let last = offsets.iter().zip(&lengths).map(|(a, b)| a + b).max();
        let tokens = last.expect("at least one row").max(1) + pick(0, 5);
        let columns = match form {
            Form::Prefix => pick(1, 300),
            Form::Tokens | Form::Columns => tokens / stride,
        };
        let visibility = match form {
            Form::Prefix => Visibility::Prefix {
                lengths: (0..batch).map(|_| pick(0, columns + 1)).collect(),
            },
            _ => Visibility::Causal { stride, offsets },
        };
        let (key_width, value_width) = (pick(2, 40), pick(1, 40));
        let problem = AttendProblem {
            batch,
            heads: kv_heads * group,
            kv_heads,
            queries,
            columns,
            self_term: form != Form::Prefix && stride > 1,
            key_width,
            value_width,
            visibility,
            lengths,
            scale: (key_width as f64).powf(-0.5),
            dropout: dropout.then_some(Dropout {
                probability: 0.3,
                seed,
            }),
        };
        let shared = pick(0, key_width);
        Self {
            problem,
            form,
            tokens,
            shared,
            numbers: n,
        }
    }

    fn draw(&mut self, shape: [usize; 4]) -> Tensor<Flex, 4> {
        let values = self.numbers.normals(shape.iter().product());
        Tensor::from_data(TensorData::new(values, shape), (&FlexDevice, DType::F64))
    }

    /// A random gradient of the result.
    pub(crate) fn cotangent(&mut self) -> Tensor<Flex, 4> {
        let p = &self.problem;
        self.draw([p.batch, p.heads, p.queries, p.value_width])
    }

    /// The operands, in 64 bits.
    pub(crate) fn operands(&mut self) -> AttendOperands<Flex> {
        let (b, h, g) = (
            self.problem.batch,
            self.problem.heads,
            self.problem.kv_heads,
        );
        let (kw, vw, shared) = (
            self.problem.key_width,
            self.problem.value_width,
            self.shared,
        );
        let queries = self.problem.queries;
        let pair = |case: &mut Self, n: usize| KeyValue {
            k: case.draw([b, g, n, kw - shared]),
            shared: (shared > 0).then(|| case.draw([b, 1, n, shared])),
            v: case.draw([b, g, n, vw]),
        };
        let keys = match self.form {
            Form::Tokens => Keys::Tokens(pair(self, self.tokens)),
            Form::Columns | Form::Prefix => Keys::Columns {
                columns: (self.problem.columns > 0).then(|| pair(self, self.problem.columns)),
                own: self.problem.self_term.then(|| pair(self, queries)),
            },
        };
        AttendOperands {
            q: self.draw([b, h, queries, kw]),
            keys,
        }
    }

    /// 1 for the queries that count and see something, 0 for the others.
    fn counts<B: Backend>(&self, dtype: DType, device: &B::Device) -> Tensor<B, 4> {
        let p = &self.problem;
        let [b, h, t] = [p.batch, p.heads, p.queries];
        let seen = |row: usize, query: usize| match &p.visibility {
            Visibility::Prefix { lengths } => lengths[row] > 0,
            Visibility::Causal { .. } => query < p.lengths[row],
        };
        let values: Vec<f64> = (0..b * h * t)
            .map(|i| {
                let (row, query) = (i / (h * t), i % t);
                f64::from(u8::from(query < p.lengths[row] && seen(row, query)))
            })
            .collect();
        let data = TensorData::new(values, [b, h, t, 1]).convert_dtype(dtype);
        Tensor::from_data(data, (device, dtype))
    }
}

fn leaves<B: Backend>(operands: &AttendOperands<B>) -> Vec<Tensor<B, 4>> {
    let of = |kv: &KeyValue<B>| {
        let mut all = vec![kv.k.clone(), kv.v.clone()];
        all.extend(kv.shared.clone());
        all
    };
    let mut all = vec![operands.q.clone()];
    match &operands.keys {
        Keys::Tokens(kv) => all.extend(of(kv)),
        Keys::Columns { columns, own } => all.extend(columns.iter().chain(own).flat_map(of)),
    }
    all
}

/// The output where it counts, and 0 elsewhere.
pub(crate) fn counted<B: Backend>(case: &Case, y: Tensor<B, 4>) -> Vec<f64> {
    let counts = case.counts(y.dtype(), &y.device());
    values(y.clone() * counts.expand(y.shape()))
}

/// The output where it counts, and the gradients of all operands under a random cotangent.
pub(crate) fn run<B: AutodiffBackend>(
    operands: &AttendOperands<B>,
    case: &Case,
    attend: impl Fn(AttendOperands<B>, &AttendProblem) -> Tensor<B, 4>,
    cotangent: &Tensor<B, 4>,
) -> Vec<Vec<f64>> {
    let counts = case.counts(operands.q.dtype(), &operands.q.device());
    let _alone = one_graph();
    let y = attend(operands.clone(), &case.problem);
    let y = y.clone() * counts.expand(y.shape());
    let grads = (y.clone() * cotangent.clone()).sum().backward();
    let mut found = vec![values(y.inner())];
    for leaf in leaves(operands) {
        let grad = leaf.grad(&grads).map(values);
        found.push(grad.unwrap_or_default());
    }
    found
}

#[track_caller]
pub(crate) fn assert_close(found: &[Vec<f64>], expected: &[Vec<f64>], tolerance: f64, what: &str) {
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        // A gradient that nothing flows into may be missing on one side.
        let zeros = vec![0.0; found.len().max(expected.len())];
        let of = |x: &Vec<f64>| {
            if x.is_empty() {
                zeros.clone()
            } else {
                x.clone()
            }
        };
        let (found, expected) = (of(found), of(expected));
        assert_eq!(found.len(), expected.len());
        let size = expected.iter().fold(1.0f64, |m, x| m.max(x.abs()));
        for (a, b) in found.iter().zip(&expected) {
            assert!(
                (a - b).abs() <= tolerance * size,
                "{what}: tensor {i}: {a}, expected {b} (largest {size})"
            );
        }
    }
}

/// A leaf of the graph of another backend, in another type.
pub(crate) fn leaf<B: AutodiffBackend>(
    x: Tensor<Flex, 4>,
    dtype: DType,
    device: &B::Device,
) -> Tensor<B, 4> {
    let data = x.into_data().convert_dtype(dtype);
    Tensor::from_data(data, (device, dtype)).require_grad()
}

/// The operands with `f` of each tensor.
pub(crate) fn map<A: Backend, B: Backend>(
    operands: &AttendOperands<A>,
    f: &dyn Fn(Tensor<A, 4>) -> Tensor<B, 4>,
) -> AttendOperands<B> {
    let pair = |kv: &KeyValue<A>| KeyValue {
        k: f(kv.k.clone()),
        shared: kv.shared.clone().map(f),
        v: f(kv.v.clone()),
    };
    AttendOperands {
        q: f(operands.q.clone()),
        keys: match &operands.keys {
            Keys::Tokens(kv) => Keys::Tokens(pair(kv)),
            Keys::Columns { columns, own } => Keys::Columns {
                columns: columns.as_ref().map(pair),
                own: own.as_ref().map(pair),
            },
        },
    }
}
