//! The host's forms of the operations against the plain ones, on fresh random inputs at ragged sizes: outputs
//! and the gradients of all operands, with and without dropout, in every type, and which form ran.

#![cfg(feature = "flex")]

mod common;

use burn::tensor::{
    DType, FloatDType, Tensor, TensorData,
    activation::{gelu, silu},
};
use burn_autodiff::Autodiff;
use burn_flex::{Flex, FlexDevice};
use common::{
    Numbers,
    attend::{Case, Form, assert_close, leaf, map, run},
    check, common_slots, values,
};
use mtla_core::{
    attention::{AttentionConfig, AttentionInput},
    cache::Cache,
    ops::{
        Activation, AttendOperands, AttentionBackend, DecodeOperands, DecodeProblem, HeadMatrices,
        LaunchKind, SlotLayout, launches, plain,
    },
    rope::{RotaryConfig, RotaryLayout},
    testing::one_graph,
};
use proptest::prelude::any;

type Train = Autodiff<Flex>;

/// Counters are of the whole process, so tests that read them don't run beside others.
static ALONE: std::sync::Mutex<()> = std::sync::Mutex::new(());

fn alone() -> std::sync::MutexGuard<'static, ()> {
    ALONE
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn compare(form: Form, dropout: bool, dtype: DType, tolerance: f64) {
    let cases = if dtype == DType::F32 { 48 } else { 16 };
    check(cases, any::<u64>(), |seed| {
        let mut case = Case::new(seed, form, dropout);
        let leaf = |x| leaf::<Train>(x, dtype, &FlexDevice);
        let operands = map(&case.operands(), &leaf);
        let cotangent = leaf(case.cotangent()).detach();
        let plain = run(&operands, &case, plain::attend, &cotangent);
        let before = launches(LaunchKind::HostAttendBackward);
        let host = run(&operands, &case, Train::attend, &cotangent);
        assert!(launches(LaunchKind::HostAttendBackward) > before);
        assert_close(&host, &plain, tolerance, &format!("{:?}", case.problem));
    });
}

#[test]
fn attention_is_the_plain_one() {
    let _alone = alone();
    for form in [Form::Tokens, Form::Columns, Form::Prefix] {
        for dropout in [false, true] {
            compare(form, dropout, DType::F32, 1e-5);
            compare(form, dropout, DType::F64, 1e-12);
        }
    }
}

/// In 16 bits the operands are rounded and nothing else is until the end: results and gradients are those of 32 bits
/// from the rounded operands, rounded. The backward pass is given the result rounded, which counts once more.
#[test]
fn half_precision_accumulates_in_32_bits() {
    let _alone = alone();
    for (dtype, unit) in [
        (FloatDType::F16, 2.0f64.powi(-11)),
        (FloatDType::BF16, 2.0f64.powi(-8)),
    ] {
        for form in [Form::Tokens, Form::Columns, Form::Prefix] {
            for dropout in [false, true] {
                check(6, any::<u64>(), |seed| {
                    let mut case = Case::new(seed, form, dropout);
                    let narrow = |x| leaf::<Train>(x, dtype.into(), &FlexDevice);
                    let wide = |x| {
                        let x = narrow(x).inner().cast(FloatDType::F32);
                        Tensor::<Train, 4>::from_inner(x).require_grad()
                    };
                    let (operands, cotangent) = (case.operands(), case.cotangent());
                    let [narrow, wide] = [&narrow, &wide as &dyn Fn(_) -> _]
                        .map(|f| (map(&operands, f), f(cotangent.clone()).detach()));
                    assert_eq!(narrow.0.q.dtype(), dtype.into());
                    let before = launches(LaunchKind::HostAttendBackward);
                    let found = run(&narrow.0, &case, Train::attend, &narrow.1);
                    assert!(launches(LaunchKind::HostAttendBackward) > before);
                    let expected = run(&wide.0, &case, plain::attend, &wide.1);
                    let what = format!("{dtype:?} {:?}", case.problem);
                    let (y, gradients) = (1.01 * unit + 1e-5, 2.0 * unit + 1e-5);
                    assert_close(&found[..1], &expected[..1], y, &what);
                    assert_close(&found[1..], &expected[1..], gradients, &what);
                });
            }
        }
    }
}

/// The plain form's gradients, and with them the host's, are those of finite differences, in 64 bits.
#[test]
fn gradients_are_finite_differences() {
    let _alone = alone();
    check(8, any::<u64>(), |seed| {
        let mut case = Case::new(seed, Form::Tokens, seed.is_multiple_of(2));
        // Small: every number is moved in turn.
        case.problem.queries = case.problem.queries.min(5);
        let queries = case.problem.queries;
        for length in &mut case.problem.lengths {
            *length = (*length).min(queries);
        }
        let leaf = |x| leaf::<Train>(x, DType::F64, &FlexDevice);
        let operands = map(&case.operands(), &leaf);
        let cotangent = leaf(case.cotangent()).detach();
        for attend in [plain::attend::<Train>, Train::attend] {
            let found = run(&operands, &case, attend, &cotangent);
            let moved = |change: f64, at: usize| {
                let mut q = operands.q.clone().inner().into_data();
                q.as_mut_slice::<f64>().expect("64 bits")[at] += change;
                let q = Tensor::from_data(q, (&FlexDevice, DType::F64));
                let moved = AttendOperands {
                    q: Tensor::from_inner(q).require_grad(),
                    keys: operands.keys.clone(),
                };
                let y = &run(&moved, &case, attend, &cotangent)[0];
                let weights = values(cotangent.clone().inner());
                y.iter().zip(weights).map(|(y, w)| y * w).sum::<f64>()
            };
            let size = operands.q.dims().iter().product::<usize>();
            for at in (0..size).step_by(size.div_ceil(12)) {
                let difference = (moved(1e-5, at) - moved(-1e-5, at)) / 2e-5;
                let gradient = found[1].get(at).copied().unwrap_or(0.0);
                assert!(
                    (gradient - difference).abs() < 1e-7 * difference.abs().max(1.0),
                    "{gradient} is not {difference}"
                );
            }
        }
    });
}

/// Two random factors, each straight, transposed, reversed or a part of something larger.
fn factors(seed: u64, dtype: DType) -> [Tensor<Train, 2>; 2] {
    let mut n = Numbers::new(seed);
    let sizes = [1, 2, 7, 16, 33, 190];
    let mut size = || sizes[n.below(sizes.len())];
    let [m, k, n_] = [size(), size(), size()];
    let mut draw = |rows: usize, columns: usize| {
        let mut of = |rows: usize, columns: usize| {
            let data = TensorData::new(n.normals(rows * columns), [rows, columns]);
            Tensor::<Train, 2>::from_data(data.convert_dtype(dtype), (&FlexDevice, dtype))
        };
        let way = rows * 7 + columns * 3 + seed as usize;
        match way % 4 {
            0 => of(rows, columns),
            1 => of(columns, rows).transpose(),
            2 => of(rows + 3, columns + 2).slice([2..rows + 2, 1..columns + 1]),
            _ => of(rows, columns).flip([0, 1]),
        }
    };
    [draw(m, k), draw(k, n_)]
}

#[test]
fn products_are_those_of_the_backend() {
    check(96, any::<u64>(), |seed| {
        for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::F64, 1e-12), (DType::F16, 0.0)] {
            let [a, b] = factors(seed, dtype);
            let shape = [a.dims()[0], b.dims()[1]];
            let (a, b) = (a.detach().require_grad(), b.detach().require_grad());
            let cotangent = Tensor::<Train, 2>::ones(shape, (&FlexDevice, dtype))
                .cumsum(0)
                .cumsum(1)
                / (1 + shape[0] * shape[1]) as f64;
            let of = |product: fn(Tensor<Train, 2>, Tensor<Train, 2>) -> Tensor<Train, 2>| {
                let _alone = one_graph();
                let y = product(a.clone(), b.clone());
                assert_eq!((y.dims(), y.dtype()), (shape, dtype));
                let grads = (y.clone() * cotangent.clone()).sum().backward();
                let grad = |x: &Tensor<Train, 2>| values(x.grad(&grads).expect("a gradient"));
                [values(y.inner()), grad(&a), grad(&b)]
            };
            let (host, burn) = (of(Train::product), of(Tensor::matmul));
            assert_close(&host, &burn, tolerance, "product");
        }
    });
}

#[test]
fn products_of_few_rows_are_those_of_the_backend() {
    check(64, any::<u64>(), |seed| {
        let mut n = Numbers::new(seed);
        let mut pick = |sizes: &[usize]| sizes[n.below(sizes.len())];
        let rows = pick(&[1, 2, 3, 4, 7, 8, 15, 16, 17]);
        let (inputs, outputs) = (
            pick(&[1, 5, 8, 31, 64, 190]),
            pick(&[1, 2, 3, 47, 48, 97, 200]),
        );
        let mut draw = |rows: usize, columns: usize| {
            let data = TensorData::new(n.normals(rows * columns), [rows, columns]);
            Tensor::<Flex, 2>::from_data(data.convert_dtype(DType::F32), &FlexDevice)
        };
        // Weights as in a file, and as a part of a larger one.
        let weight = draw(outputs + 2, inputs);
        for first in [0, 2] {
            let weight = weight.clone().narrow(0, first, outputs).transpose();
            let x = draw(rows + 1, inputs).narrow(0, 1, rows);
            let [host, burn] = [Flex::product(x.clone(), weight.clone()), x.matmul(weight)];
            assert_close(&[values(host)], &[values(burn)], 1e-5, "product");
        }
    });
}

#[test]
fn products_of_nothing_are_zeros() {
    for [m, k, n] in [[0, 3, 2], [3, 0, 2], [3, 2, 0], [0, 0, 0]] {
        let ones = |shape| Tensor::<Flex, 2>::ones(shape, &FlexDevice);
        let y = Flex::product(ones([m, k]), ones([k, n]));
        assert_eq!(y.dims(), [m, n]);
        assert!(values(y).iter().all(|x| *x == 0.0));
    }
}

#[test]
fn a_constant_factor_gets_no_gradient() {
    let [a, b] = [(), ()].map(|()| Tensor::<Train, 2>::ones([3, 3], &FlexDevice));
    let a = a.require_grad();
    let _alone = one_graph();
    let grads = Train::product(a.clone(), b.clone()).sum().backward();
    assert!(a.grad(&grads).is_some() && b.grad(&grads).is_none());
}

#[test]
#[should_panic(expected = "product of [2, 3] and [4, 5]: the inner lengths differ")]
fn factors_that_do_not_fit_are_told() {
    let ones = |shape| Tensor::<Flex, 2>::ones(shape, &FlexDevice);
    let _ = Flex::product(ones([2, 3]), ones([4, 5]));
}

#[test]
fn activations_are_those_of_the_backend() {
    let mut n = Numbers::new(5);
    let mut numbers = n.normals(9991);
    numbers.extend([0.0, -0.0, 30.0, -30.0, 200.0, -200.0, 1e30, -1e30, 1e-30]);
    for (dtype, tolerance) in [(DType::F32, 5e-7), (DType::F64, 1e-12), (DType::F16, 1e-3)] {
        // No number above what the type holds.
        let most = if dtype == DType::F16 { 6e4 } else { 1e30 };
        let numbers = numbers.iter().map(|x| x.clamp(-most, most)).collect();
        let data = TensorData::new::<f64, _>(numbers, [1250, 8]).convert_dtype(dtype);
        let x = Tensor::<Train, 2>::from_data(data, (&FlexDevice, dtype)).require_grad();
        for activation in [Activation::Gelu, Activation::Silu] {
            let of = |f: &dyn Fn(Tensor<Train, 2>) -> Tensor<Train, 2>| {
                let _alone = one_graph();
                let y = f(x.clone());
                let grads = y.clone().sum().backward();
                let grad = values(x.grad(&grads).expect("a gradient"));
                [values(y.inner()), grad]
            };
            let host = of(&|x| Train::activate(x, activation));
            let burn = of(&|x| match activation {
                Activation::Gelu => gelu(x),
                Activation::Silu => silu(x),
            });
            for (host, burn) in host.iter().flatten().zip(burn.iter().flatten()) {
                let close = (host - burn).abs() <= tolerance * burn.abs().max(1.0);
                assert!(
                    close,
                    "{activation:?} in {dtype:?}: {host}, expected {burn}"
                );
            }
        }
    }
}

#[test]
fn rotation_is_the_plain_one() {
    check(48, any::<u64>(), |seed| {
        let mut n = Numbers::new(seed);
        let mut pick = |low: usize, high: usize| low + (n.bits() as usize) % (high - low);
        let [rows, tokens, heads] = [pick(1, 4), pick(1, 60), pick(1, 5)];
        let (first, dim) = (pick(0, 9), 2 * pick(1, 9));
        let rope = RotaryConfig {
            layout: if seed.is_multiple_of(2) {
                RotaryLayout::Interleaved
            } else {
                RotaryLayout::HalfSplit
            },
            ..RotaryConfig::default()
        };
        let lists = if pick(0, 2) == 0 { 1 } else { rows };
        let positions: Vec<Vec<usize>> = (0..lists)
            .map(|_| (0..tokens).map(|_| pick(0, 5000)).collect())
            .collect();
        let shape = [rows, tokens, heads, first + dim];
        for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::F64, 1e-12)] {
            let draw = |n: &mut Numbers| {
                let data =
                    TensorData::new(n.normals(shape.iter().product()), shape).convert_dtype(dtype);
                Tensor::<Train, 4>::from_data(data, (&FlexDevice, dtype))
            };
            let (x, cotangent) = (draw(&mut n).require_grad(), draw(&mut n));
            let rotary = rope.rotary::<Train>(dim, &positions, dtype, &FlexDevice);
            let flex_rotary = rope.rotary::<Flex>(dim, &positions, dtype, &FlexDevice);
            let results = [plain::rotate::<Train>, Train::rotate].map(|rotate| {
                let _alone = one_graph();
                let y = rotate(x.clone(), &rotary, first);
                let grads = (y.clone() * cotangent.clone()).sum().backward();
                [
                    values(y.inner()),
                    values(x.grad(&grads).expect("a gradient")),
                ]
            });
            assert_close(&results[1], &results[0], tolerance, "rotation");
            // The first rows of a larger tensor are rotated as they are alone.
            let larger = Tensor::cat(vec![x.clone(), cotangent.clone()], 0).inner();
            let part = Flex::rotate(larger.narrow(0, 0, rows), &flex_rotary, first);
            assert_eq!(vec![values(part)], results[1][..1]);
            // What it is given stays as it was, though it works in place where it can.
            let before = values(x.clone().inner());
            let _ = Train::rotate(x.clone(), &rotary, first);
            assert_eq!(values(x.inner()), before);
        }
    });
}

#[test]
fn gate_and_merge_is_the_plain_one() {
    check(48, any::<u64>(), |seed| {
        let mut n = Numbers::new(seed);
        let mut pick = |low: usize, high: usize| low + (n.bits() as usize) % (high - low);
        let [batch, tokens, rank, stride] = [pick(1, 4), pick(1, 90), pick(4, 40), pick(1, 6)];
        let gates = tokens.div_ceil(stride) + pick(0, 3);
        for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::F64, 1e-12)] {
            let mut draw = |shape: &[usize]| {
                let values = n.normals(shape.iter().product());
                TensorData::new(values, shape.to_vec()).convert_dtype(dtype)
            };
            let place = (&FlexDevice, dtype);
            let latents = Tensor::<Train, 3>::from_data(draw(&[batch, tokens, rank]), place);
            let cotangent = Tensor::<Train, 3>::from_data(draw(&[batch, tokens, rank]), place);
            let table = Tensor::<Train, 2>::from_data(draw(&[gates, rank + 1]), place);
            let (latents, table) = (latents.require_grad(), table.require_grad());
            let results = [plain::gate_and_merge::<Train>, Train::gate_and_merge].map(|merge| {
                let _alone = one_graph();
                let y = merge(latents.clone(), table.clone(), stride);
                let grads = (y.clone() * cotangent.clone()).sum().backward();
                let grad = |x: Option<Tensor<Flex, 3>>| values(x.expect("a gradient"));
                vec![
                    values(y.inner()),
                    grad(latents.grad(&grads)),
                    values(table.grad(&grads).expect("a gradient")),
                ]
            });
            assert_close(&results[1], &results[0], tolerance, "gate and merge");
        }
    });
}

#[test]
fn products_of_heads_are_the_plain_ones() {
    let _alone = alone();
    check(64, any::<u64>(), |seed| {
        let mut n = Numbers::new(seed);
        let mut pick = |low: usize, high: usize| low + (n.bits() as usize) % (high - low);
        let (rows, heads, rank) = (pick(1, 70), pick(1, 6), pick(1, 40));
        let (first, count, rest) = (pick(0, 9), pick(1, 30), pick(0, 3) * pick(0, 9));
        let (block, transposed, turned) =
            (first + count + pick(0, 9), pick(0, 2) > 0, pick(0, 2) > 0);
        let width = rest + if transposed { count } else { rank };
        for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::F64, 1e-12), (DType::BF16, 1e-9)] {
            let mut draw = |shape: &[usize]| {
                let values = n.normals(shape.iter().product());
                TensorData::new(values, shape.to_vec()).convert_dtype(dtype)
            };
            let place = (&FlexDevice, dtype);
            let x = Tensor::<Flex, 3>::from_data(draw(&[rows, heads, width]), place);
            let weight = if turned {
                Tensor::<Flex, 2>::from_data(draw(&[heads * block, rank]), place).transpose()
            } else {
                Tensor::from_data(draw(&[rank, heads * block]), place)
            };
            let matrices = HeadMatrices {
                weight,
                heads,
                columns: first..first + count,
                transposed,
            };
            let expected = values(plain::multiply_heads(x.clone(), matrices.clone()));
            let found = values(Flex::multiply_heads(x, matrices));
            assert_close(&[found], &[expected], tolerance, "products of heads");
        }
    });
}

/// A decoding step over random tables: shared and scattered slots, long runs, open and new slots.
struct Step {
    problem: DecodeProblem,
    rotary: Option<(RotaryConfig, Vec<Vec<usize>>)>,
    table: Vec<i64>,
    /// Slots of the pool.
    slots: usize,
}

impl Step {
    fn new(n: &mut Numbers) -> Self {
        let mut pick = |low: usize, high: usize| low + (n.bits() as usize) % (high - low);
        let (kv_heads, group, latent) = (pick(1, 4), pick(1, 5), pick(0, 3) > 0);
        let layout = if latent {
            SlotLayout::Latent {
                rank: pick(4, 40),
                rope_dim: pick(0, 10),
            }
        } else {
            SlotLayout::Dense {
                kv_heads,
                head_dim: pick(1, 20),
            }
        };
        let (stride, rows) = (if latent { pick(1, 5) } else { 1 }, pick(1, 24));
        let starts: Vec<usize> = (0..rows).map(|_| pick(0, 400)).collect();
        let max_slots = starts.iter().map(|s| s / stride + 1).max().unwrap_or(1) + pick(0, 3);
        let prefix = pick(0, max_slots);
        let (mut table, mut tables) = (Vec::new(), Vec::new());
        for (row, start) in starts.iter().enumerate() {
            let used = start / stride + 1;
            table.push(*start as i64);
            // A shared prefix in one run, then slots of its own in leaps; the newest one is always its own.
            let own = |i: usize| prefix + row + rows * i;
            let slot = |i: usize| {
                if i < prefix && i + 1 < used {
                    i
                } else {
                    own(i)
                }
            };
            let line: Vec<usize> = (0..used).map(slot).collect();
            let filled = (0..max_slots).map(|i| line[i.min(used - 1)] as i64);
            table.extend(filled);
            tables.push(line);
        }
        let channels = layout.rotated().len();
        let is_rotated = channels > 0 && channels.is_multiple_of(2) && pick(0, 4) > 0;
        let rotary = is_rotated.then(|| {
            let pairs = [RotaryLayout::HalfSplit, RotaryLayout::Interleaved];
            let rope = RotaryConfig {
                layout: pairs[pick(0, 2)],
                ..RotaryConfig::default()
            };
            let lists = [1, rows][pick(0, 2)];
            (rope, (0..lists).map(|_| vec![pick(0, 5000)]).collect())
        });
        let problem = DecodeProblem {
            heads: group * layout.kv_heads(),
            layout,
            stride,
            starts,
            max_slots,
            common: common_slots(&tables),
            scale: (layout.key_width() as f64).powf(-0.5),
        };
        Self {
            problem,
            rotary,
            table,
            slots: prefix + rows * max_slots,
        }
    }

    /// Random operands, with a pool of another type.
    fn operands(&self, n: &mut Numbers, dtype: DType, stored: DType) -> DecodeOperands<Flex> {
        let p = &self.problem;
        let mut draw = |shape: [usize; 2], dtype: DType| {
            let data = TensorData::new(n.normals(shape[0] * shape[1]), shape);
            Tensor::<Flex, 2>::from_data(data.convert_dtype(dtype), (&FlexDevice, dtype))
        };
        let (rows, width, key) = (p.starts.len(), p.layout.width(), p.layout.key_width());
        let gates = (p.stride > 1).then(|| draw([p.max_slots, p.layout.value_width() + 1], dtype));
        DecodeOperands {
            q: draw([rows, p.heads * key], dtype).reshape([rows, p.heads, key]),
            row: draw([rows, width], dtype),
            rotary: self.rotary.as_ref().map(|(rope, positions)| {
                rope.rotary(p.layout.rotated().len(), positions, dtype, &FlexDevice)
            }),
            gates,
            pool: draw([self.slots, width], stored),
            table: Tensor::from_data(
                TensorData::new(self.table.clone(), [rows, 1 + p.max_slots]),
                &FlexDevice,
            ),
        }
    }
}

#[test]
fn decoding_is_the_plain_one() {
    let _alone = alone();
    check(64, any::<u64>(), |seed| {
        let mut n = Numbers::new(seed);
        let step = Step::new(&mut n);
        let types = [
            (DType::F32, DType::F32, 1e-5),
            (DType::F64, DType::F64, 1e-12),
            (DType::F32, DType::F16, 1e-3),
            (DType::F32, DType::BF16, 1e-2),
        ];
        for (dtype, stored, tolerance) in types {
            let operands = step.operands(&mut n, dtype, stored);
            let (expected, expected_pool) = plain::decode(operands.clone(), &step.problem);
            let before = launches(LaunchKind::HostDecode);
            let (found, pool) = Flex::decode(operands, &step.problem);
            assert_eq!(launches(LaunchKind::HostDecode), before + 1);
            let (found, expected) = (values(found), values(expected));
            assert_close(&[found], &[expected], tolerance, "output");
            assert_eq!(pool.dtype(), stored);
            let (found, expected) = (values(pool), values(expected_pool));
            assert_close(&[found], &[expected], tolerance, "pool");
        }
    });
}

/// Every variant trains, prefills and decodes through the host's operations, with dropout too.
#[test]
fn every_variant_takes_the_fast_path() {
    let _alone = alone();
    let variants = [
        AttentionConfig::mha(32, 4),
        AttentionConfig::mqa(32, 4),
        AttentionConfig::gqa(32, 4, 2),
        AttentionConfig::mla(32, 4),
        AttentionConfig::mtla(32, 4),
        AttentionConfig::mtla(32, 4).with_down_rate(3),
    ];
    let counts = || {
        [
            launches(LaunchKind::HostAttend),
            launches(LaunchKind::HostAttendBackward),
            launches(LaunchKind::HostDecode),
        ]
    };
    let ran = |work: &dyn Fn()| {
        let before = counts();
        work();
        let after = counts();
        [0, 1, 2].map(|i| after[i] - before[i])
    };
    for config in variants {
        let config = config.with_dropout(0.2);
        for seed in [None, Some(5)] {
            let layer = config.init::<Train>(&FlexDevice).unwrap();
            let x = Tensor::<Train, 3>::ones([2, 9, 32], &FlexDevice).require_grad();
            let trained = ran(&|| {
                let input = AttentionInput::new(x.clone())
                    .with_lengths(vec![9, 4])
                    .with_dropout_seed(seed);
                let _alone = one_graph();
                layer.forward(input).context.sum().backward();
            });
            assert_eq!(trained, [1, 1, 0], "{config:?}");
        }
        let layer = config.init::<Flex>(&FlexDevice).unwrap();
        let cached = ran(&|| {
            let mut cache = Cache::new(layer.cache_spec(), 1, &FlexDevice);
            cache.join(2);
            let plan = cache.extend(&[0, 1], &[5, 3]);
            let x = Tensor::<Flex, 3>::ones([2, 5, 32], &FlexDevice);
            layer.prefill(x, &plan, cache.layer_mut(0));
            let plan = cache.step(&[0, 1]);
            let x = Tensor::<Flex, 2>::ones([2, 32], &FlexDevice);
            layer.step(x, &plan, cache.layer_mut(0));
        });
        assert_eq!(cached, [1, 0, 1], "{config:?}");
    }
}
