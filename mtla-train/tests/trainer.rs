//! Runs of the trainer in processes of their own, killed, interrupted and starved of disk.
//!
//! Each test starts this test binary again, as `child`, with a [`Scenario`] in the environment.
#![cfg(unix)]

use burn::data::dataset::Dataset;
use burn::module::{Module, ModuleVisitor, Param};
use burn::nn::{Dropout, DropoutConfig, Embedding, EmbeddingConfig, Linear, LinearConfig};
use burn::tensor::activation::gelu;
use burn::tensor::{Tensor, backend::Backend};
use burn_autodiff::Autodiff;
use burn_flex::{Flex, FlexDevice};
use mtla_train::data::{Batches, Block, Packing, TextBatch, TextBatcher, TokenBlocks};
use mtla_train::{
    Decay, Display, Length, Loss, MetricLine, Objective, RunDir, Trainer, TrainerConfig,
    best_checkpoint, load_weights, next_token_loss, read_metrics,
};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

type B = Autodiff<Flex>;

const VOCABULARY: usize = 12;
const VARIABLE: &str = "MTLA_TRAIN_SCENARIO";

/// A small model that uses each source of randomness a model may: the backend's and the seed.
#[derive(Module, Debug)]
struct Tiny<B: Backend> {
    embedding: Embedding<B>,
    dropout: Dropout,
    hidden: Linear<B>,
    head: Linear<B>,
}

impl<B: Backend> Tiny<B> {
    fn new(width: usize, device: &B::Device) -> Self {
        Self {
            embedding: EmbeddingConfig::new(VOCABULARY, width).init(device),
            dropout: DropoutConfig::new(0.1).init(),
            hidden: LinearConfig::new(width, width).init(device),
            head: LinearConfig::new(width, VOCABULARY).init(device),
        }
    }
}

impl<B: Backend> Objective<B> for Tiny<B> {
    type Batch = TextBatch<B>;

    fn loss(&self, batch: TextBatch<B>, seed: Option<u64>) -> Loss<B> {
        let jitter = seed.map_or(1.0, |seed| 1.0 + (seed % 101) as f64 / 1000.0);
        let x = self
            .dropout
            .forward(self.embedding.forward(batch.inputs) * jitter);
        let logits = self.head.forward(gelu(self.hidden.forward(x)));
        next_token_loss(logits, batch.targets, &batch.lengths)
    }
}

/// What a child process does.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Scenario {
    folder: PathBuf,
    config: TrainerConfig,
    width: usize,
    /// Kept as the model's settings; the width is not, so that tests can get past them.
    name: String,
    /// Steps between two tokens in the validation text; in training it is 1.
    stride: u32,
    display: bool,
    panic_at: Option<usize>,
}

impl Scenario {
    fn new(folder: &Path, name: &str) -> Self {
        let mut config = TrainerConfig {
            length: Length::Steps(120),
            batch_size: 8,
            accumulation: 2,
            log_every: 7,
            validate_every: 20,
            checkpoint_every: 3,
            ..Default::default()
        };
        config.learning_rate.peak = 1e-2;
        config.learning_rate.warmup = 10;
        Self {
            folder: folder.join(name),
            config,
            width: 16,
            name: "tiny".into(),
            stride: 1,
            display: false,
            panic_at: None,
        }
    }

    /// Counting, each text from another number, in documents of many lengths.
    fn text(stride: u32, documents: u32) -> TokenBlocks {
        let n = VOCABULARY as u32 - 1;
        let document = |i: u32| {
            (0..5 + i * 7 % 23)
                .map(|t| 1 + (i + t * stride) % n)
                .chain([0])
                .collect()
        };
        let documents: Vec<Vec<u32>> = (0..documents).map(document).collect();
        TokenBlocks::new(documents, 12, Packing::Documents).unwrap()
    }

    fn validation<B: Backend>(&self) -> Batches<B, Block, TextBatch<B>> {
        Batches::sequential(Self::text(self.stride, 10), TextBatcher, 4)
    }

    /// Trains, and leaves the weights in `weights.bin`.
    fn run(&self) -> Result<(), Box<dyn std::error::Error>> {
        let text = Self::text(1, 100);
        let (size, lengths) = (self.config.batch_size, text.lengths());
        let train = Batches::bucketed(text, TextBatcher, size, lengths);
        let panic_at = self.panic_at;
        let trained = Trainer::<B, Tiny<B>>::new(&self.folder, self.config.clone(), FlexDevice)
            .model_config(&self.name)
            .display(if self.display {
                Display::Auto
            } else {
                Display::Lines
            })
            .after_validation(|validated| {
                let step = validated.metrics.step;
                assert!(panic_at.is_none_or(|at| step < at), "a panic as ordered");
                let text = format!("{:?}", validated.metrics);
                validated
                    .run
                    .write(format!("samples/step-{step:06}.txt"), text.as_bytes())?;
                Ok(())
            })
            .fit(
                |device| Tiny::new(self.width, device),
                &train,
                &self.validation(),
            )?;
        if trained.finished {
            fs::write(self.folder.join("weights.bin"), weights(&trained.model))?;
        }
        Ok(())
    }

    fn command(&self) -> Command {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "child", "--nocapture", "--quiet"]);
        command.env(VARIABLE, serde_json::to_string(self).unwrap());
        command
    }

    fn spawn(&self) -> Child {
        self.command()
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    }

    fn finish(&self) -> &Self {
        let output = self.command().output().unwrap();
        assert!(output.status.success(), "{}", said(&output));
        self
    }

    /// What it says when it fails.
    fn fail(&self) -> String {
        let output = self.command().output().unwrap();
        assert!(
            !output.status.success(),
            "it should fail\n{}",
            said(&output)
        );
        said(&output)
    }

    fn read(&self, name: &str) -> Vec<u8> {
        let path = self.folder.join(name);
        fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    /// Names of the checkpoints, oldest first.
    fn checkpoints(&self) -> Vec<String> {
        let entries = fs::read_dir(self.folder.join("checkpoints"))
            .into_iter()
            .flatten();
        let mut names: Vec<String> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    fn assert_same_results(&self, other: &Self) {
        assert!(
            self.read("weights.bin") == other.read("weights.bin"),
            "weights differ"
        );
        let text = |scenario: &Self| String::from_utf8(scenario.read("metrics.jsonl")).unwrap();
        assert_eq!(text(self), text(other));
        assert!(
            self.read("loss.svg") == other.read("loss.svg"),
            "plots differ"
        );
        assert_eq!(self.checkpoints(), other.checkpoints());
    }
}

fn said(output: &Output) -> String {
    [&output.stderr[..], &output.stdout[..]]
        .map(String::from_utf8_lossy)
        .concat()
}

/// All parameters, byte for byte.
fn weights<B: Backend>(model: &impl Module<B>) -> Vec<u8> {
    struct Bytes(Vec<u8>);
    impl<B: Backend> ModuleVisitor<B> for Bytes {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            self.0.extend_from_slice(&param.val().into_data().bytes);
        }
    }
    let mut bytes = Bytes(Vec::new());
    model.visit(&mut bytes);
    bytes.0
}

/// Not a test of its own: what the other tests start.
#[test]
fn child() {
    let Ok(scenario) = std::env::var(VARIABLE) else {
        return;
    };
    let scenario: Scenario = serde_json::from_str(&scenario).unwrap();
    // As in a `main`, a panic ends the process without waiting for other threads.
    match std::panic::catch_unwind(|| scenario.run()) {
        Ok(Ok(())) => (),
        Ok(Err(error)) => {
            eprintln!("FAILED: {error}");
            std::process::exit(1);
        }
        Err(_) => std::process::exit(101),
    }
}

#[test]
fn the_same_seed_gives_the_same_run_and_another_seed_another() {
    let folder = tempfile::tempdir().unwrap();
    let first = Scenario::new(folder.path(), "first");
    let second = Scenario::new(folder.path(), "second");
    first.finish().assert_same_results(second.finish());

    let mut other = Scenario::new(folder.path(), "other");
    other.config.seed += 1;
    assert_ne!(
        other.finish().read("weights.bin"),
        first.read("weights.bin")
    );

    // Starting a finished run again changes nothing.
    let before = first.read("metrics.jsonl");
    assert_eq!(first.finish().read("metrics.jsonl"), before);
    first.assert_same_results(&second);
}

#[test]
fn a_run_learns_and_leaves_what_it_promises() {
    let folder = tempfile::tempdir().unwrap();
    let run = Scenario::new(folder.path(), "run");
    run.finish();
    let lines = read_metrics(&run.folder.join("metrics.jsonl")).unwrap();
    let (mut train, mut valid) = (Vec::new(), Vec::new());
    for line in lines {
        match line {
            MetricLine::Train(line) => train.push(line),
            MetricLine::Valid(line) => valid.push(line),
        }
    }
    let steps: Vec<_> = train.iter().map(|line| line.step).collect();
    assert_eq!(steps, (7..120).step_by(7).chain([120]).collect::<Vec<_>>());
    assert_eq!(
        valid.iter().map(|line| line.step).collect::<Vec<_>>(),
        [20, 40, 60, 80, 100, 120]
    );
    assert!(
        train[0].loss > 2.0 && train.last().unwrap().loss < 0.7,
        "{train:?}"
    );
    assert!((valid[0].perplexity - valid[0].loss.exp()).abs() < 1e-9);
    assert!(train.windows(2).all(|pair| pair[0].epoch <= pair[1].epoch));
    assert!(train.last().unwrap().epoch > 5);
    assert!((train[0].learning_rate - 7e-3).abs() < 1e-12);

    let config: serde_json::Value = serde_json::from_slice(&run.read("config.json")).unwrap();
    assert_eq!(config["settings"]["trainer"]["seed"], 42);
    assert_eq!(config["settings"]["model"], "tiny");
    assert_eq!(config["versions"]["burn"], "0.21.0");
    assert!(
        config["backend"].as_str().unwrap().contains("flex"),
        "{config}"
    );
    let log = String::from_utf8(run.read("train.log")).unwrap();
    assert!(log.contains("step 120/120: finished"), "{log}");
    assert!(
        String::from_utf8(run.read("loss.svg"))
            .unwrap()
            .contains("validation")
    );
    assert!(!run.read("samples/step-000020.txt").is_empty());
}

#[test]
fn a_run_killed_at_random_moments_ends_as_one_that_was_not() {
    let folder = tempfile::tempdir().unwrap();
    let quiet = Scenario::new(folder.path(), "quiet");
    quiet.finish();

    let hunted = Scenario::new(folder.path(), "hunted");
    let newest = || {
        hunted
            .checkpoints()
            .into_iter()
            .rfind(|name| !name.contains("tmp"))
    };
    let mut kills = 0;
    while kills < 25 {
        let before = newest();
        let mut child = hunted.spawn();
        // It is let make a checkpoint and then live for 0 to 30 ms, in no order.
        wait_for(|| newest() > before || child.try_wait().unwrap().is_some());
        std::thread::sleep(Duration::from_millis(kills * 7919 % 31));
        child.kill().unwrap();
        match child.wait().unwrap().signal() {
            Some(9) => kills += 1,
            _ => break,
        }
    }
    assert!(kills >= 4, "killed {kills} times only");
    hunted.finish().assert_same_results(&quiet);
    assert!(
        hunted
            .checkpoints()
            .iter()
            .all(|name| !name.contains("tmp"))
    );
}

#[test]
fn leftovers_of_a_crash_do_no_harm() {
    let folder = tempfile::tempdir().unwrap();
    let clean = Scenario::new(folder.path(), "clean");
    let littered = Scenario::new(folder.path(), "littered");
    clean.finish();
    let checkpoints = littered.folder.join("checkpoints");
    fs::create_dir_all(checkpoints.join("step-00000999.tmp")).unwrap();
    fs::write(checkpoints.join("step-00000999.tmp/model.mpk"), "half").unwrap();
    fs::write(littered.folder.join("metrics.jsonl"), "{\"split\":\"tr").unwrap();
    fs::write(littered.folder.join("config.json.tmp"), "{").unwrap();
    littered.finish().assert_same_results(&clean);
}

#[test]
fn a_signal_stops_the_run_with_a_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let quiet = Scenario::new(folder.path(), "quiet");
    let mut stopped = Scenario::new(folder.path(), "stopped");
    for scenario in [&quiet, &stopped] {
        assert_eq!(scenario.config.checkpoint_every, 3);
    }
    // Only a checkpoint made because of the signal can be there.
    stopped.config.checkpoint_every = 1000;
    stopped.config.validate_every = 1000;
    let child = stopped
        .command()
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    wait_for(|| fs::read(stopped.folder.join("metrics.jsonl")).is_ok_and(|text| !text.is_empty()));
    assert!(
        Command::new("kill")
            .args(["-INT", &child.id().to_string()])
            .status()
            .unwrap()
            .success()
    );
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    assert!(
        said(&output).contains("start again to go on"),
        "{}",
        said(&output)
    );
    assert_eq!(stopped.checkpoints().len(), 1);

    let mut whole = Scenario::new(folder.path(), "whole");
    whole.config.validate_every = 1000;
    whole.finish();
    stopped.finish();
    assert!(stopped.read("weights.bin") == whole.read("weights.bin"));
    assert_eq!(stopped.read("metrics.jsonl"), whole.read("metrics.jsonl"));
    drop(quiet);
}

fn wait_for(mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(Instant::now() < deadline, "waited for too long");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_checkpoint_that_cannot_be_written_is_an_error_and_the_last_one_stays() {
    let folder = tempfile::tempdir().unwrap();
    let mut run = Scenario::new(folder.path(), "run");
    run.width = 64;
    run.config.length = Length::Steps(40);
    // The shell's limit on the size of a file is in blocks of 512 or 1024 bytes: the weights and
    // the optimizer are larger, all else is smaller. XFSZ would kill where a full disk would not.
    let limited = |blocks: usize| {
        let command = run.command();
        let mut shell = Command::new("sh");
        let script = format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$0\" \"$@\"");
        shell
            .arg("-c")
            .arg(script)
            .arg(command.get_program())
            .args(command.get_args());
        shell.envs(
            command
                .get_envs()
                .filter_map(|(key, value)| Some((key, value?))),
        );
        shell.output().unwrap()
    };
    let output = limited(24);
    assert!(!output.status.success());
    let text = said(&output);
    assert!(
        text.contains("cannot write") && text.contains("step-00000003.tmp/model.mpk"),
        "{text}"
    );
    assert!(text.contains("File too large"), "{text}");
    assert!(
        run.checkpoints().is_empty(),
        "nothing half-written stays: {:?}",
        run.checkpoints()
    );

    let mut short = run.clone();
    short.config.length = Length::Steps(40);
    short.panic_at = Some(20);
    assert!(short.fail().contains("a panic as ordered"));
    let before = run.checkpoints();
    assert_eq!(before.last().unwrap(), "step-00000018");
    assert!(!limited(24).status.success());
    assert_eq!(run.checkpoints(), before);

    let mut whole = Scenario::new(folder.path(), "whole");
    (whole.width, whole.config.length) = (64, Length::Steps(40));
    run.finish().assert_same_results(whole.finish());
}

#[test]
fn other_settings_and_other_models_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let mut run = Scenario::new(folder.path(), "run");
    run.config.length = Length::Steps(12);
    run.config.learning_rate.warmup = 2;
    run.finish();
    let with = |change: fn(&mut Scenario)| {
        let mut changed = run.clone();
        change(&mut changed);
        changed.fail()
    };
    let text = with(|run| run.config.learning_rate.decay = Decay::Linear);
    assert!(
        text.contains(r#"trainer.learning_rate.decay: "cosine" then, "linear" now"#),
        "{text}"
    );
    let text = with(|run| run.name = "small".into());
    assert!(
        text.contains(r#"model: "tiny" then, "small" now"#),
        "{text}"
    );
    let text = with(|run| run.config.batch_size = 16);
    assert!(
        text.contains("data.train_batches: ") && text.contains("trainer.batch_size"),
        "{text}"
    );
    let text = with(|run| run.width = 17);
    let shapes = "embedding.weight is [12, 16] in the checkpoint, [12, 17] in the model";
    assert!(text.contains(shapes), "{text}");

    // How many checkpoints there are may change.
    run.config.keep_last = 1;
    run.config.checkpoint_every = 5;
    run.finish();
}

#[test]
fn damaged_files_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let mut run = Scenario::new(folder.path(), "run");
    run.config.length = Length::Steps(12);
    run.config.learning_rate.warmup = 2;
    run.finish();
    let newest = run
        .folder
        .join("checkpoints")
        .join(run.checkpoints().last().unwrap());
    for name in ["model.mpk", "optimizer.mpk", "state.json"] {
        let path = newest.join(name);
        let good = fs::read(&path).unwrap();
        let mut bad = good.clone();
        let middle = bad.len() / 2;
        bad[middle] ^= 0x80;
        for bad in [bad, good[..middle].to_vec()] {
            fs::write(&path, bad).unwrap();
            let text = run.fail();
            assert!(text.contains(&format!("{name} is damaged")), "{text}");
            assert!(text.contains("remove this checkpoint"), "{text}");
        }
        fs::write(&path, good).unwrap();
    }
    fs::write(run.folder.join("metrics.jsonl"), "").unwrap();
    assert!(run.fail().contains("metrics.jsonl is damaged"));
}

#[test]
fn divergence_is_told_with_its_step_and_the_last_good_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let mut run = Scenario::new(folder.path(), "run");
    run.config.learning_rate.peak = 1e37;
    run.config.learning_rate.warmup = 100;
    run.config.clip_norm = None;
    run.config.checkpoint_every = 1;
    run.config.optimizer.weight_decay = 0.0;
    let text = run.fail();
    assert!(
        text.contains("became NaN at step") || text.contains("became inf at step"),
        "{text}"
    );
    let newest = run.checkpoints().pop().unwrap();
    assert!(
        text.contains(&format!(
            "The last good checkpoint is {}",
            run.folder.display()
        )),
        "{text}"
    );
    assert!(text.contains(&newest), "{text}");
    let model = Tiny::<Flex>::new(run.width, &FlexDevice);
    let path = run.folder.join("checkpoints").join(newest);
    let model = load_weights(&path, model, &FlexDevice).unwrap();
    let sound = |bytes: &[u8]| f32::from_le_bytes(bytes.try_into().unwrap()).is_finite();
    assert!(weights(&model).chunks(4).all(sound));
}

#[test]
fn the_best_checkpoint_is_kept_and_has_the_loss_it_says() {
    let folder = tempfile::tempdir().unwrap();
    let mut run = Scenario::new(folder.path(), "run");
    run.stride = 2; // Validation is on another text: the more is learnt, the worse it gets.
    run.config.keep_last = 1;
    run.finish();
    let lines = read_metrics(&run.folder.join("metrics.jsonl")).unwrap();
    let valid = lines.iter().filter_map(|line| match line {
        MetricLine::Valid(line) => Some(line),
        MetricLine::Train(_) => None,
    });
    let best = valid.min_by(|a, b| a.loss.total_cmp(&b.loss)).unwrap();
    assert!(
        best.step < 120,
        "the test needs a best validation before the last"
    );
    let path = best_checkpoint(&run.folder).unwrap().unwrap();
    let name = format!("step-{:08}", best.step);
    assert_eq!(run.checkpoints(), [name.as_str(), "step-00000120"]);
    assert!(path.ends_with(name));

    let model = Tiny::<Flex>::new(run.width, &FlexDevice);
    let model = load_weights(&path, model, &FlexDevice).unwrap();
    let (mut sum, mut tokens) = (0.0, 0);
    let blocks = Scenario::text(run.stride, 10);
    for index in 0..blocks.len() {
        use burn::data::dataloader::batcher::Batcher;
        let batch = TextBatcher.batch(vec![blocks.get(index).unwrap()], &FlexDevice);
        let loss = model.loss(batch, None);
        sum += f64::from(loss.mean.into_scalar()) * loss.tokens as f64;
        tokens += loss.tokens;
    }
    assert!((sum / tokens as f64 - best.loss).abs() < 1e-5);
}

#[test]
fn two_processes_cannot_train_in_one_directory() {
    let folder = tempfile::tempdir().unwrap();
    let run = Scenario::new(folder.path(), "run");
    let _open = RunDir::open(&run.folder).unwrap();
    assert!(run.fail().contains("in use by another process"));
}

/// Runs a scenario on a terminal, as far as `script` makes one.
fn on_a_terminal(scenario: &Scenario, mut meanwhile: impl FnMut(&mut dyn Write)) -> String {
    let command = scenario.command();
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let line: Vec<_> = words
        .map(|word| format!("'{}'", word.to_str().unwrap()))
        .collect();
    let mut script = Command::new("script");
    script
        .args(["-qefc", &line.join(" "), "/dev/null"])
        .env("TERM", "xterm-256color");
    script.envs(
        command
            .get_envs()
            .filter_map(|(key, value)| Some((key, value?))),
    );
    let script = script.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let mut script = script.expect("`script` of util-linux");
    let mut output = script.stdout.take().unwrap();
    let reader = std::thread::spawn(move || {
        let mut text = Vec::new();
        output.read_to_end(&mut text).unwrap();
        String::from_utf8_lossy(&text).into_owned()
    });
    meanwhile(script.stdin.as_mut().unwrap());
    wait_for(|| script.try_wait().unwrap().is_some());
    reader.join().unwrap()
}

/// The interface was there, and what it has switched on at the end is off.
fn assert_terminal_is_sane(text: &str) {
    let last = |code: &str| text.rfind(code);
    let (entered, left) = (last("\x1b[?1049h"), last("\x1b[?1049l"));
    assert!(entered.is_some(), "the interface was never shown: {text}");
    assert!(left > entered, "still on the alternate screen");
    assert!(
        last("\x1b[?25h") > last("\x1b[?25l"),
        "the cursor is hidden"
    );
}

#[cfg(target_os = "linux")]
#[test]
fn ctrl_c_on_a_terminal_saves_and_gives_the_terminal_back() {
    let folder = tempfile::tempdir().unwrap();
    let mut run = Scenario::new(folder.path(), "run");
    (run.display, run.config.length) = (true, Length::Steps(1_000_000));
    let text = on_a_terminal(&run, |keys| {
        wait_for(|| run.checkpoints().len() > 1);
        keys.write_all(b"\x03").unwrap();
        keys.flush().unwrap();
    });
    assert_terminal_is_sane(&text);
    assert!(text.contains("start again to go on"), "{text}");
}

#[cfg(target_os = "linux")]
#[test]
fn a_panic_gives_the_terminal_back() {
    let folder = tempfile::tempdir().unwrap();
    let mut run = Scenario::new(folder.path(), "run");
    (run.display, run.panic_at) = (true, Some(20));
    let text = on_a_terminal(&run, |_| ());
    assert_terminal_is_sane(&text);
    assert!(text.contains("a panic as ordered"), "{text}");
}
