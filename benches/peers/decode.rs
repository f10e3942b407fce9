//! This library's side of `compare.py w2`: beam search over a source by a decoder with PyTorch's weights, on the Flex
//! backend.
//!
//! The source's states enter the cache once a sentence, and its beams share them from there on.
//!
//! Speaks lines on standard input and output, as `torch_decode.py` does: `check FILE` writes the chosen tokens and the
//! last log-probabilities; `run` answers the seconds of the first step and of all, and the bytes that the cache has
//! allocated and holds at its largest; `speed` answers the speed of the products of all weights with a row for each beam,
//! in GFLOP/s; `peak` answers the peak memory in KiB.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use burn::{
    module::Param,
    nn::{LayerNormConfig, Linear, norm::Normalization},
    tensor::{Distribution, Tensor, TensorData},
};
use burn_flex::{Flex, FlexDevice};
use mtla_benches::{
    D_MODEL, HEADS,
    peer::{answer_commands, peak, write_tensors},
};
use mtla_core::{
    attention::{Attention, AttentionConfig, QueryProjection},
    cache::Cache,
    linear::multiply,
    testing::{Golden, load_attention},
};
use mtla_models::{
    decoder::{Decoder, DecoderConfig, FeedForwardKind},
    generate::{LanguageModel, ScoredToken, most_probable},
};

/// Keeps the memory of tensors and maps it in large pages, as allocators of deep-learning frameworks do.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

struct Peer {
    decoder: Decoder<Flex>,
    /// `[sentences, frames, d_model]`.
    source: Tensor<Flex, 3>,
    beam: usize,
    /// For each step the row that each row continues.
    parents: Vec<Vec<usize>>,
    /// For each step which of the best tokens of that row each row takes.
    ranks: Vec<Vec<usize>>,
}

/// What a search gives.
#[derive(Default)]
struct Found {
    /// `[steps, rows]`.
    tokens: Vec<i64>,
    /// The best ones of each row after the last step.
    best: Vec<Vec<ScoredToken>>,
    first: Duration,
    all: Duration,
    allocated_bytes: usize,
    live_bytes: usize,
}

impl Peer {
    /// The decoder and the source, as `compare.py` wrote them.
    fn load(directory: &Path) -> anyhow::Result<Self> {
        let case = |name: &str| Golden::load(&directory.join(name).with_extension("json"));
        let whole = case("decoder");
        // Every weight is replaced, and the attention too.
        let config = DecoderConfig::new(
            whole.size("vocab_size"),
            whole.size("layers"),
            AttentionConfig::mha(D_MODEL, HEADS),
        )
        .with_feed_forward(FeedForwardKind::Relu)
        .with_tied_embeddings(false);
        let mut decoder = config.init::<Flex>(&FlexDevice)?;
        decoder.embedding.weight = vector(&whole, "embedding.weight");
        decoder.norm = norm(&whole, "norm");
        decoder.head = Some(linear(&whole, "head"));
        for (number, layer) in decoder.layers.iter_mut().enumerate() {
            let case = case(&format!("layer-{number}"));
            layer.attention = load_attention(&case, &FlexDevice);
            layer.attention_norm = norm(&case, "attention_norm");
            layer.feed_forward_norm = norm(&case, "feed_forward_norm");
            layer.feed_forward.up = linear(&case, "up");
            layer.feed_forward.down = linear(&case, "down");
        }
        Ok(Self {
            decoder,
            source: whole.tensor("source", &FlexDevice),
            beam: whole.size("beam"),
            parents: whole.integers("parents"),
            ranks: whole.integers("ranks"),
        })
    }

    /// An empty cache, and in it a row for each beam that holds the source.
    fn start(&self) -> Cache<Flex> {
        let [sentences, frames, _] = self.source.dims();
        let mut cache = self.decoder.new_cache();
        let rows: Vec<usize> = cache.join(sentences).collect();
        let plan = cache.extend(&rows, &vec![frames; sentences]);
        let layers = &self.decoder.layers;
        let rotary = layers[0].attention.prefill_rotary(&plan, &self.source);
        let plan = plan.with_rotary(Some(rotary));
        for (number, layer) in layers.iter().enumerate() {
            let pool = cache.layer_mut(number);
            layer
                .attention
                .prefill_keys(self.source.clone(), &plan, pool);
        }
        let beams = rows.iter().flat_map(|row| vec![*row; self.beam]);
        cache.reorder(&beams.collect::<Vec<_>>());
        cache
    }

    fn run(&self) -> anyhow::Result<Found> {
        let start = Instant::now();
        let mut cache = self.start();
        let rows: Vec<usize> = (0..cache.rows()).collect();
        let mut tokens = vec![0; rows.len()];
        let mut found = Found::default();
        for (step, (parents, ranks)) in self.parents.iter().zip(&self.ranks).enumerate() {
            if step > 0 {
                cache.reorder(&self.parents[step - 1]);
            }
            let plan = cache.step(&rows);
            let ids = Tensor::from_data(TensorData::new(tokens, [rows.len()]), &FlexDevice);
            let logits = self.decoder.step(ids, &plan, &mut cache);
            let best = most_probable(logits, 2 * self.beam)?;
            let chosen = parents.iter().zip(ranks);
            tokens = chosen
                .map(|(parent, rank)| i64::from(best[*parent][*rank].token))
                .collect();
            found.tokens.extend(&tokens);
            found.live_bytes = found.live_bytes.max(cache.live_bytes());
            if step == 0 {
                found.first = start.elapsed();
            }
            found.best = best;
        }
        found.all = start.elapsed();
        found.allocated_bytes = cache.allocated_bytes();
        Ok(found)
    }

    fn check(&self, path: &Path) -> anyhow::Result<()> {
        let found = self.run()?;
        let rows = found.best.len();
        let best = found.best.iter().flatten();
        let logs: Vec<f32> = best.map(|best| best.log_probability as f32).collect();
        let tensors = [
            (
                "tokens",
                TensorData::new(found.tokens, [self.parents.len(), rows]),
            ),
            (
                "log_probabilities",
                TensorData::new(logs, [rows, 2 * self.beam]),
            ),
        ];
        write_tensors(path, tensors)
    }

    /// The speed of a product of each weight with a row for each beam, one after the other as a step takes them.
    fn speed(&self) -> f64 {
        let rows = self.parents[0].len();
        let weights = self.decoder.layers.iter().flat_map(|layer| {
            let attention = match &layer.attention {
                Attention::Grouped(x) => vec![&x.q_proj, &x.k_proj, &x.v_proj, &x.out_proj],
                Attention::Latent(x) => {
                    let QueryProjection::Full(wq) = &x.wq else {
                        unreachable!("no low rank")
                    };
                    vec![wq, &x.wkv_a, &x.wo]
                }
            };
            [
                attention,
                vec![&layer.feed_forward.up, &layer.feed_forward.down],
            ]
            .concat()
        });
        let products: Vec<_> = weights
            .chain(&self.decoder.head)
            .map(|linear| {
                let weight = linear.weight.val();
                let shape = [rows, weight.dims()[0]];
                let x = Tensor::<Flex, 2>::random(shape, Distribution::Default, &FlexDevice);
                (x, weight)
            })
            .collect();
        let multiplications = |(x, weight): &(Tensor<Flex, 2>, Tensor<Flex, 2>)| {
            rows * x.dims()[1] * weight.dims()[1]
        };
        let all: usize = products.iter().map(multiplications).sum();
        let start = Instant::now();
        for _ in 0..3 {
            for (x, weight) in &products {
                std::hint::black_box(multiply(x.clone(), weight.clone()));
            }
        }
        6.0 * all as f64 / start.elapsed().as_secs_f64() / 1e9
    }
}

fn vector<const D: usize>(case: &Golden, name: &str) -> Param<Tensor<Flex, D>> {
    Param::from_tensor(case.tensor(name, &FlexDevice))
}

fn linear(case: &Golden, name: &str) -> Linear<Flex> {
    let weight: Tensor<Flex, 2> = case.tensor(&format!("{name}.weight"), &FlexDevice);
    let bias = format!("{name}.bias");
    Linear {
        weight: Param::from_tensor(weight.transpose()),
        bias: case.has(&bias).then(|| vector(case, &bias)),
    }
}

fn norm(case: &Golden, name: &str) -> Normalization<Flex> {
    let mut norm = LayerNormConfig::new(D_MODEL).init(&FlexDevice);
    norm.gamma = vector(case, &format!("{name}.weight"));
    norm.beta = Some(vector(case, &format!("{name}.bias")));
    Normalization::Layer(norm)
}

fn main() -> anyhow::Result<()> {
    let directory = std::env::args()
        .nth(1)
        .context("usage: peer-decode DIRECTORY")?;
    let peer = Peer::load(Path::new(&directory))?;
    answer_commands(|command, argument| {
        Ok(match command {
            "check" => {
                peer.check(Path::new(argument))?;
                "done".into()
            }
            "run" => {
                let found = peer.run()?;
                let [first, all] = [found.first, found.all].map(|time| time.as_secs_f64());
                format!(
                    "{first} {all} {} {}",
                    found.allocated_bytes, found.live_bytes
                )
            }
            "speed" => peer.speed().to_string(),
            "peak" => peak()?.to_string(),
            other => bail!("unknown command {other}"),
        })
    })
}
