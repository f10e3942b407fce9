//! This library's side of `compare.py w1`: one attention layer with PyTorch's weights, forward and backward,
//! on the Flex backend.
//!
//! Speaks lines on standard input and output, as `torch_layer.py` does: `check FILE` writes the output and all
//! gradients, `time` runs once and answers milliseconds, `peak` answers the peak memory in KiB, `speed`
//! answers the speed of a large matrix product in GFLOP/s.

use std::{path::Path, time::Instant};

use anyhow::{Context, bail};
use burn::tensor::{Distribution, Tensor};
use burn_autodiff::{Autodiff, grads::Gradients};
use burn_flex::{Flex, FlexDevice};
use mtla_benches::peer::{answer_commands, peak, write_tensors};
use mtla_core::{
    attention::{Attention, AttentionInput},
    testing::{Golden, load_attention, names::Access},
};

/// Keeps the memory of tensors and maps it in large pages, as allocators of deep-learning frameworks do.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

type Backend = Autodiff<Flex>;

struct Layer {
    attention: Attention<Backend>,
    x: Tensor<Backend, 3>,
    cotangent: Tensor<Flex, 3>,
}

impl Layer {
    /// The layer and its input, as `compare.py` wrote them.
    fn load(case: &Path) -> Self {
        let case = Golden::load(case);
        Self {
            attention: load_attention(&case, &FlexDevice),
            x: case.tensor("x", &FlexDevice),
            cotangent: case.tensor("cotangent", &FlexDevice),
        }
    }

    fn run(&self) -> (Tensor<Flex, 3>, Tensor<Backend, 3>, Gradients) {
        let x = self.x.clone().require_grad();
        let input = AttentionInput::new(x.clone());
        let y = self.attention.forward(input).context;
        let loss = (y.clone() * Tensor::from_inner(self.cotangent.clone())).sum();
        (y.inner(), x, loss.backward())
    }

    /// Writes the output and the gradients by the reference's names and in its layout.
    fn check(&mut self, path: &Path) -> anyhow::Result<()> {
        let (y, x, grads) = self.run();
        let mut found = Vec::new();
        found.push(("y".to_owned(), y.into_data()));
        let grad = x.grad(&grads).context("the input has a gradient")?;
        found.push(("grad.x".to_owned(), grad.into_data()));
        self.attention.visit_reference(&mut |name, access| {
            let grad = match access {
                Access::Matrix(weight) => weight
                    .val()
                    .grad(&grads)
                    .map(|grad| grad.transpose().into_data()),
                Access::Vector(weight) => weight.val().grad(&grads).map(Tensor::into_data),
            };
            if let Some(grad) = grad {
                found.push((format!("grad.{name}"), grad));
            }
        });
        write_tensors(path, found)
    }

    fn time(&self) -> f64 {
        let start = Instant::now();
        std::hint::black_box(self.run());
        start.elapsed().as_secs_f64() * 1e3
    }
}

/// The speed of products of 1536 rows and columns, in GFLOP/s.
fn speed() -> f64 {
    const N: usize = 1536;
    let random = || Tensor::<Flex, 2>::random([N, N], Distribution::Default, &FlexDevice);
    let (a, b) = (random(), random());
    let start = Instant::now();
    for _ in 0..3 {
        std::hint::black_box(a.clone().matmul(b.clone()));
    }
    let seconds = start.elapsed().as_secs_f64() / 3.0;
    2.0 * (N as f64).powi(3) / seconds / 1e9
}

fn main() -> anyhow::Result<()> {
    let case = std::env::args()
        .nth(1)
        .context("usage: peer-layer CASE.json")?;
    let mut layer = Layer::load(Path::new(&case));
    answer_commands(|command, argument| {
        Ok(match command {
            "check" => {
                layer.check(Path::new(argument))?;
                "done".into()
            }
            "time" => layer.time().to_string(),
            "peak" => peak()?.to_string(),
            "speed" => speed().to_string(),
            other => bail!("unknown command {other}"),
        })
    })
}
