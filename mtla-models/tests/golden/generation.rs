//! What recorded checkpoints generate: tokens exactly, scores of beam search, log-probabilities.

use burn::tensor::try_read_sync;
use mtla_core::{
    backend_tests,
    ops::AttentionBackend,
    testing::{Checks, Golden},
};
use mtla_models::{
    generate::{Completion, Engine, EventKind, GenerationConfig, Request, generate},
    llama::Llama,
};
use serde_json::{Map, Value};

use crate::cases;

backend_tests!(generation);

/// Absolute, on scores and log-probabilities.
const SCORE: f64 = 1e-4;

fn generation<B: AttentionBackend>(device: &B::Device) {
    let mut checks = Checks::default();
    let mut settings = 0;
    for (directory, case) in cases() {
        let Some(recorded) = case.json["generate"].as_object() else {
            continue;
        };
        let llama = Llama::<B>::from_pretrained(&directory, device).expect("a checkpoint");
        for (name, setting) in recorded {
            settings += 1;
            Setting::new(&case, &llama, name, setting).run(&llama, &mut checks);
        }
    }
    assert!(settings > 0, "no generation is recorded");
    checks.finish(&format!("{settings} generations on {}", B::name(device)));
}

/// One recorded call of Python's `generate`.
struct Setting<'a> {
    case: &'a Golden,
    name: &'a str,
    config: GenerationConfig,
    prompts: Vec<Prompt>,
    /// Tokens of a recorded row before the first new one.
    width: usize,
}

struct Prompt {
    tokens: Vec<u32>,
    padded: bool,
}

impl<'a> Setting<'a> {
    fn new<B: AttentionBackend>(
        case: &'a Golden,
        llama: &Llama<B>,
        name: &'a str,
        setting: &Value,
    ) -> Self {
        // What was asked for, over what the checkpoint's own file says.
        let mut fields: Map<String, Value> = llama.generation.clone().expect("a file beside it");
        fields.insert("max_new_tokens".into(), setting["max_new_tokens"].clone());
        fields.extend(setting["arguments"].as_object().expect("arguments").clone());
        let mut config: GenerationConfig =
            serde_json::from_value(fields.into()).expect("a configuration");
        if config.num_beams == 1 {
            config.log_probabilities = Some(0);
        }
        let (group, _) = name.split_once('.').expect("a name of two parts");
        let masks = case.integers(&format!("gen.{group}.attention_mask"));
        let rows = case.integers(&format!("gen.{group}.input_ids"));
        let width = rows[0].len();
        let prompts = rows.iter().zip(&masks).map(|(row, mask)| {
            let valid = row.iter().zip(mask).filter(|(_, valid)| **valid == 1);
            let tokens: Vec<u32> = valid.map(|(token, _)| *token as u32).collect();
            let padded = tokens.len() < width;
            Prompt { tokens, padded }
        });
        Self {
            case,
            name,
            config,
            prompts: prompts.collect(),
            width,
        }
    }

    fn run<B: AttentionBackend>(&self, llama: &Llama<B>, checks: &mut Checks) {
        let found = self.generate(llama);
        let each = self.config.num_return_sequences;
        checks.holds(
            &format!("{} {}: number of sequences", self.case.name, self.name),
            found.len() == self.prompts.len() * each,
        );
        for (number, prompt) in self.prompts.iter().enumerate() {
            let found = &found[number * each..][..each];
            // Python's temporal attention goes wrong where a row is padded on the left: ours is as without.
            if prompt.padded && self.case.json["config"]["down_rate"].as_u64() > Some(1) {
                let alone = generate(&llama.decoder, &[&prompt.tokens[..]], &self.config);
                self.compare_alone(number, found, &alone.expect("completions"), checks);
            } else {
                self.compare(number, found, checks);
            }
        }
    }

    /// All prompts in one batch, as Python takes them.
    fn generate<B: AttentionBackend>(&self, llama: &Llama<B>) -> Vec<Completion> {
        let mut engine = Engine::new(&llama.decoder).with_joint_stopping();
        for prompt in &self.prompts {
            let request = Request::new(prompt.tokens.clone(), self.config.clone());
            engine.submit(request).expect("a request that can work");
        }
        let mut finished = Vec::new();
        while !engine.is_idle() {
            let events = try_read_sync(engine.advance()).expect("a native target");
            for event in events.expect("a step") {
                match event.kind {
                    EventKind::Token(_) => {}
                    EventKind::Finished(completions) => finished.push((event.request, completions)),
                    EventKind::Failed(error) => panic!("{}: {error}", self.name),
                }
            }
        }
        finished.sort_by_key(|(request, _)| *request);
        finished
            .into_iter()
            .flat_map(|(_, completions)| completions)
            .collect()
    }

    /// With what was recorded without cache: with one, some of Python's ways differ from themselves.
    fn compare(&self, prompt: usize, found: &[Completion], checks: &mut Checks) {
        let recorded = format!("gen.{}.nocache", self.name);
        let sequences = self.case.integers(&format!("{recorded}.sequences"));
        for (number, completion) in found.iter().enumerate() {
            let row = prompt * found.len() + number;
            let what = format!("{} {recorded} row {row}", self.case.name);
            let expected = self.continuation(&sequences[row]);
            if completion.tokens != expected {
                println!("{what}: {:?}, expected {expected:?}", completion.tokens);
            }
            checks.holds(&what, completion.tokens == expected);
            let scores = format!("{recorded}.sequences_scores");
            if self.case.has(&scores) {
                let score = completion.score.expect("beam search has scores");
                let expected = f64::from(self.case.values(&scores)[row]);
                checks.holds(
                    &format!("{what}: score {score}, expected {expected}"),
                    (score - expected).abs() <= SCORE,
                );
            }
            let scores = format!("{recorded}.scores");
            if self.case.has(&scores) {
                self.compare_probabilities(&what, completion, row, &scores, checks);
            }
        }
    }

    /// The log-probability of every token, from the recorded scores `[rows, steps, vocab]` before any processing.
    fn compare_probabilities(
        &self,
        what: &str,
        completion: &Completion,
        row: usize,
        scores: &str,
        checks: &mut Checks,
    ) {
        let vocab = self.case.size("vocab_size");
        let all = self.case.values(scores);
        let steps = all.len() / vocab / self.prompts.len();
        let found = completion.log_probabilities.as_ref().expect("asked for");
        for (step, (token, found)) in completion.tokens.iter().zip(found).enumerate() {
            let scores = &all[(row * steps + step) * vocab..][..vocab];
            let total: f64 = scores.iter().map(|score| f64::from(*score).exp()).sum();
            let expected = f64::from(scores[*token as usize]) - total.ln();
            checks.holds(
                &format!("{what} step {step}: {} and {expected}", found.chosen),
                (found.chosen - expected).abs() <= SCORE,
            );
        }
    }

    fn compare_alone(
        &self,
        prompt: usize,
        found: &[Completion],
        alone: &[Completion],
        checks: &mut Checks,
    ) {
        for (found, alone) in found.iter().zip(alone) {
            let near = match (found.score, alone.score) {
                (Some(found), Some(alone)) => (found - alone).abs() <= SCORE,
                (found, alone) => found == alone,
            };
            checks.holds(
                &format!("{} {} row {prompt}: as alone", self.case.name, self.name),
                found.tokens == alone.tokens && near,
            );
        }
    }

    /// New tokens of a recorded row, up to the first stop token; what follows is filling.
    fn continuation(&self, row: &[usize]) -> Vec<u32> {
        let new: Vec<u32> = row[self.width..].iter().map(|id| *id as u32).collect();
        let end = new
            .iter()
            .position(|id| self.config.eos_token_id.contains(id));
        new[..end.map_or(new.len(), |end| end + 1)].to_vec()
    }
}
