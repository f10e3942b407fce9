//! Checkpoints: logits, hidden states, losses and gradients, with and without cache.

use std::path::{Path, PathBuf};

use burn::{
    module::{Module, ModuleVisitor, Param},
    tensor::{Int, Tensor, TensorData, activation::log_softmax, backend::AutodiffBackend},
};
use burn_autodiff::Autodiff;
use mtla_core::{
    backend_tests,
    cache::{Cache, SlotLayout},
    ops::AttentionBackend,
    testing::{Checks, Golden, one_graph},
};
use mtla_models::{
    checkpoint::{Layout, file_name},
    decoder::{Decoder, DecoderInput},
    generate::LanguageModel,
    llama::{KEYS, Llama, LoadOptions, SavedHead},
};

use crate::{cases, common, common::cached::cached_logits, directory_name};

backend_tests!(checkpoints);

/// Absolute, on logits and hidden states.
const LOGITS: f64 = 1e-4;
/// Relative to the largest entry, on gradients.
const GRADIENT: f64 = 1e-4;
/// Python's own ways through a model agree where they differ by less.
const AGREEMENT: f64 = 1e-3;

/// Other directories beside a checkpoint whose name says that they hold the same weights.
fn twins(directory: &Path) -> Vec<PathBuf> {
    let twin = directory.with_file_name(format!("{}_sharded", directory_name(directory)));
    twin.is_dir().then_some(twin).into_iter().collect()
}

fn checkpoints<B: AttentionBackend>(device: &B::Device) {
    let mut checks = Checks::default();
    let cases = cases();
    for (directory, case) in &cases {
        let mut runner = Runner::<B> {
            case,
            llama: Llama::from_pretrained(directory, device)
                .unwrap_or_else(|error| panic!("{}: {error}", case.name)),
            device,
            checks: &mut checks,
        };
        runner.run(directory);
    }
    checks.finish(&format!(
        "{} checkpoints on {}",
        cases.len(),
        B::name(device)
    ));
}

/// Runs the tests of one case.
struct Runner<'a, B: AttentionBackend> {
    case: &'a Golden,
    llama: Llama<B>,
    device: &'a B::Device,
    checks: &'a mut Checks,
}

impl<B: AttentionBackend> Runner<'_, B> {
    fn run(&mut self, directory: &Path) {
        if self.case.has("logits.before_saving") {
            self.saved_head(directory);
            return;
        }
        self.whole();
        for twin in twins(directory) {
            let twin = Llama::<B>::from_pretrained(&twin, self.device).expect("the same weights");
            let logits = twin.decoder.forward(self.input("input_ids")).into_data();
            let found = self.case.values("logits");
            self.close("logits of the twin", logits, found);
        }
        self.loss_and_gradients(directory);
        let tests = self.case.json["tests"].as_array();
        let tests = tests.expect("a list of tests").clone();
        for test in &tests {
            let name = test.as_str().expect("a name");
            match name.split('.').next().expect("a name") {
                "cached" => self.cached(name),
                "pad_right" | "pad_left" => self.padded(name),
                other => panic!("{}: unknown test {other}", self.case.name),
            }
        }
        self.prompts();
    }

    /// A head that the file has though the embeddings are tied: the trained one by default, none as in Python.
    fn saved_head(&mut self, directory: &Path) {
        let case = self.case;
        let input = self.input("input_ids");
        let logits = self.llama.decoder.forward(input.clone()).into_data();
        let expected = case.values("logits.before_saving");
        self.close("logits.before_saving", logits, expected);
        let options = LoadOptions {
            saved_head: SavedHead::Drop,
            ..LoadOptions::default()
        };
        let dropped = Llama::<B>::from_pretrained_with(directory, &options, self.device);
        let dropped = dropped.expect("a checkpoint").decoder;
        let logits = dropped.forward(input).into_data();
        let expected = case.values("logits.after_loading");
        self.close("logits.after_loading", logits, expected);
    }

    fn close(&mut self, what: &str, found: TensorData, expected: &[f32]) {
        let what = format!("{} {what}", self.case.name);
        self.checks.close(&what, &found, expected, LOGITS, 0.0);
    }

    fn input<C: AttentionBackend<Device = B::Device>>(&self, name: &str) -> DecoderInput<C> {
        DecoderInput::new(ids(&self.case.integers(name), self.device))
    }

    /// Whole sequences: logits, hidden states, other positions.
    fn whole(&mut self) {
        let case = self.case;
        let logits = self.llama.decoder.forward(self.input("input_ids"));
        self.close("logits", logits.into_data(), case.values("logits"));
        if case.has("hidden.0") {
            let states = self.llama.decoder.hidden_states(self.input("input_ids"));
            for (number, state) in states.into_iter().enumerate() {
                let name = format!("hidden.{number}");
                self.close(&name, state.into_data(), case.values(&name));
            }
        }
        let custom = "logits.custom_positions";
        if case.has(custom) {
            let positions = case.integers("position_ids.custom");
            let input = self.input("input_ids").with_positions(positions);
            let logits = self.llama.decoder.forward(input);
            self.close(custom, logits.into_data(), case.values(custom));
        }
    }

    fn loss_and_gradients(&mut self, directory: &Path) {
        let case = self.case;
        if !case.has("loss") {
            return;
        }
        let llama = Llama::<Autodiff<B>>::from_pretrained(directory, self.device);
        let decoder = llama.expect("a checkpoint").decoder;
        let _alone = one_graph();
        let logits = decoder.forward(self.input("input_ids"));
        let loss = mean_cross_entropy(logits, case.values("labels"));
        self.close(
            "loss",
            loss.clone().inner().into_data(),
            case.values("loss"),
        );
        if case.names("grad.").next().is_none() {
            return;
        }
        let grads = loss.backward();
        let mut found = Gradients::<B> {
            path: Vec::new(),
            grads: &grads,
            found: Vec::new(),
        };
        decoder.visit(&mut found);
        for golden in case.names("grad.") {
            let what = format!("{} {golden}", case.name);
            let found = found
                .found
                .iter()
                .find(|(name, _)| golden["grad.".len()..] == *name);
            match found {
                Some((_, gradient)) => {
                    let expected = case.values(golden);
                    self.checks.close(&what, gradient, expected, 1e-7, GRADIENT);
                }
                None => self.checks.holds(&what, false),
            }
        }
    }

    /// How far Python's cached logits are from its uncached ones.
    fn agrees(&self, name: &str) -> bool {
        let field = format!("{name}.logits vs logits");
        self.case.json["agreement"][&field]
            .as_f64()
            .is_some_and(|difference| difference < AGREEMENT)
    }

    /// A prompt, then one token at a time: as recorded, or where Python disagrees with itself as without cache.
    fn cached(&mut self, name: &str) {
        let case = self.case;
        let prompt = name.rsplit('P').next().and_then(|p| p.parse().ok());
        let prompt: usize = prompt.expect("the prompt's length");
        let rows = case.integers("input_ids");
        let (logits, cache) = cached_logits(&self.llama.decoder, &rows, &[prompt]);
        let logits = logits.into_data();
        let agrees = self.agrees(name);
        let recorded = format!("{name}.logits");
        let golden = if agrees { &recorded } else { "logits" };
        let expected = self.from(golden, prompt - 1);
        self.close(&format!("{name} ({golden})"), logits, &expected);
        if agrees {
            self.compare_cache(name, &cache);
        } else {
            let error = case
                .values(&recorded)
                .iter()
                .zip(case.values("logits"))
                .fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
            let what = format!("{} {name}: the recording has Python's mistake", case.name);
            self.checks.holds(&what, f64::from(error) > AGREEMENT);
        }
    }

    /// Recorded logits `[batch, tokens, vocab]` of the tokens from `first` on.
    fn from(&self, name: &str, first: usize) -> Vec<f32> {
        let logits: Tensor<B, 3> = self.case.tensor(name, self.device);
        let tokens = logits.dims()[1];
        let part = logits.narrow(1, first, tokens - first).into_data();
        part.iter::<f32>().collect()
    }

    fn compare_cache(&mut self, name: &str, cache: &Cache<B>) {
        let case = self.case;
        let SlotLayout::Latent { rank, rope_dim } = cache.spec().layout else {
            return;
        };
        let rows: Vec<usize> = (0..cache.rows()).collect();
        for layer in 0..self.llama.decoder.layers.len() {
            let slots = cache.table(&rows).gather(cache.layer(layer).slots());
            let parts = [("kv", 0, rank), ("kpe", rank, rope_dim)];
            for (part, start, width) in parts {
                let golden = format!("{name}.{part}.{layer}");
                if case.has(&golden) {
                    let found = slots.clone().narrow(2, start, width).into_data();
                    self.close(&golden, found, case.values(&golden));
                }
            }
        }
    }

    /// Prompts that Python fails on: of one token, and in several pieces on a warm cache.
    fn prompts(&mut self) {
        let rows = self.case.integers("input_ids");
        for pieces in [&[1][..], &[1, 3], &[2, 1, 4]] {
            let (logits, _) = cached_logits(&self.llama.decoder, &rows, pieces);
            let expected = self.from("logits", pieces.iter().sum::<usize>() - 1);
            let what = format!("prompt in pieces of {pieces:?}");
            self.close(&what, logits.into_data(), &expected);
        }
    }

    /// A padded batch, given by the lengths of its rows: each row as alone.
    fn padded(&mut self, name: &str) {
        let case = self.case;
        let masks = case.integers(&format!("{name}.attention_mask"));
        let rows: Vec<Vec<usize>> = case
            .integers(&format!("{name}.input_ids"))
            .iter()
            .zip(&masks)
            .map(|(row, mask)| {
                let valid = row.iter().zip(mask).filter(|(_, valid)| **valid == 1);
                valid.map(|(id, _)| *id).collect()
            })
            .collect();
        let lengths: Vec<usize> = rows.iter().map(Vec::len).collect();
        let input = DecoderInput::new(ids(&rows, self.device)).with_lengths(lengths.clone());
        let logits = self.llama.decoder.forward(input);
        for (number, row) in rows.iter().enumerate() {
            let found = logits.clone().narrow(0, number, 1);
            let found = found.narrow(1, 0, row.len()).into_data();
            let alone = self.alone(name, &rows, number);
            self.close(&format!("{name} row {number}"), found, &alone);
        }
        let steps = self.llama.decoder.clone();
        self.ragged(name, &steps, &rows);
    }

    /// The same rows in one cache: prompts of unequal length, then their last two tokens one by one.
    fn ragged(&mut self, name: &str, decoder: &Decoder<B>, rows: &[Vec<usize>]) {
        let prompts: Vec<Vec<usize>> = rows
            .iter()
            .map(|row| row[..row.len() - 2].to_vec())
            .collect();
        let mut held: Vec<usize> = prompts.iter().map(Vec::len).collect();
        let mut cache = decoder.new_cache();
        let all: Vec<usize> = cache.join(rows.len()).collect();
        let plan = cache.extend(&all, &held);
        let mut last = decoder.prefill(ids(&prompts, self.device), &plan, &mut cache);
        for step in 0..3 {
            for (number, row) in rows.iter().enumerate() {
                let found = last.clone().narrow(0, number, 1).into_data();
                let alone = self.alone(name, rows, number);
                let expected = &alone[(held[number] - 1) * (alone.len() / row.len())..];
                let expected = &expected[..found.num_elements()];
                self.close(
                    &format!("{name} row {number}, step {step}"),
                    found,
                    expected,
                );
            }
            if step == 2 {
                return;
            }
            let next: Vec<Vec<usize>> = rows.iter().zip(&held).map(|(r, n)| vec![r[*n]]).collect();
            let plan = cache.step(&all);
            let tokens = ids(&next, self.device).reshape([rows.len()]);
            last = decoder.step(tokens, &plan, &mut cache);
            for n in &mut held {
                *n += 1;
            }
        }
    }

    /// The logits of a row that is alone: recorded for the last one.
    fn alone(&self, name: &str, rows: &[Vec<usize>], number: usize) -> Vec<f32> {
        if number + 1 == rows.len() {
            return self.case.values(&format!("{name}.alone_logits")).to_vec();
        }
        let row = std::slice::from_ref(&rows[number]);
        let alone = self
            .llama
            .decoder
            .forward(DecoderInput::new(ids(row, self.device)));
        alone.into_data().iter::<f32>().collect()
    }
}

/// Rows of ids, the shorter ones filled up with 0.
fn ids<B: AttentionBackend>(rows: &[Vec<usize>], device: &B::Device) -> Tensor<B, 2, Int> {
    let rows: Vec<Vec<u32>> = rows
        .iter()
        .map(|row| row.iter().map(|id| *id as u32).collect())
        .collect();
    common::batch(&rows, 0, device)
}

/// Mean cross entropy `[1]` of the labels, each compared with the logits one place before it; −100 is left out.
fn mean_cross_entropy<B: AttentionBackend>(logits: Tensor<B, 3>, labels: &[f32]) -> Tensor<B, 1> {
    let [batch, tokens, vocab] = logits.dims();
    let places: Vec<i64> = (0..batch * tokens)
        .filter(|i| i % tokens > 0 && labels[*i] >= 0.0)
        .map(|i| (i as i64 - 1) * vocab as i64 + labels[i] as i64)
        .collect();
    let count = places.len();
    let device = logits.device();
    let places = Tensor::<B, 1, Int>::from_data(TensorData::new(places, [count]), &device);
    let log = log_softmax(logits.reshape([batch * tokens, vocab]), 1);
    log.reshape([batch * tokens * vocab])
        .select(0, places)
        .mean()
        .neg()
}

/// Gradients under the names of the file, in its layout.
struct Gradients<'a, B: AttentionBackend> {
    path: Vec<String>,
    grads: &'a <Autodiff<B> as AutodiffBackend>::Gradients,
    found: Vec<(String, TensorData)>,
}

impl<B: AttentionBackend> ModuleVisitor<Autodiff<B>> for Gradients<'_, B> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<Autodiff<B>, D>>) {
        let path = self.path.join(".");
        let (name, layout) = file_name(KEYS, &path).expect("a name for every weight");
        let gradient = param.val().grad(self.grads).expect("a gradient");
        let gradient = match layout {
            Layout::Same => gradient,
            Layout::Transposed | Layout::Rearranged => gradient.transpose(),
        };
        self.found.push((name, gradient.into_data()));
    }

    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }
}
