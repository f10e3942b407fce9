//! Requests that run together become what they become alone.

mod common;

use std::{
    collections::BTreeMap,
    pin::pin,
    task::{Context, Poll, Waker},
};

use burn::tensor::{TensorData, try_read_sync};
use common::{VOCAB, model, tokens};
use futures_core::Stream;
use mtla_core::{attention::AttentionConfig, backend_tests, ops::AttentionBackend};
use mtla_models::{
    decoder::{Decoder, DecoderConfig},
    generate::{
        Completion, DecodeError, Engine, EventKind, FinishReason, Generation, GenerationConfig,
        GenerationError, LanguageModel, Request, RequestId, TokenEvent, complete, generate,
        processors::LogitsProcessor,
    },
};
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng, SeedableRng},
};

fn mtla<B: AttentionBackend>(device: &B::Device) -> Decoder<B> {
    let attention = AttentionConfig::mtla(16, 4).with_down_rate(3);
    let config = DecoderConfig::new(VOCAB, 2, attention).with_tied_embeddings(false);
    model(&config, device)
}

fn wait<T>(future: impl Future<Output = T>) -> T {
    try_read_sync(future).expect("this backend answers at once")
}

/// The `kind`-th way to continue, with a length of its own.
fn config(kind: usize, length: usize) -> GenerationConfig {
    let config = GenerationConfig::new(length);
    let sampling = config.clone().with_temperature(1.2).with_seed(kind as u64);
    match kind % 6 {
        0 => config,
        1 => sampling,
        2 => sampling.with_num_return_sequences(3).with_top_p(0.9),
        3 => config
            .with_num_beams(3)
            .with_num_return_sequences(2)
            .with_stop_tokens([1, 5, 9]),
        4 => config
            .with_log_probabilities(2)
            .with_stop_tokens([2, 4, 6, 8]),
        _ => {
            let mut config = config.with_num_beams(2);
            config.no_repeat_ngram_size = 2;
            config
        }
    }
}

fn request((kind, length, prompt): (usize, usize, usize)) -> Request {
    Request::new(tokens(prompt, kind), config(kind, length)).with_number(kind)
}

/// What has become of the requests of an engine.
#[derive(Debug, Default)]
struct Results {
    tokens: BTreeMap<(RequestId, usize), Vec<u32>>,
    finished: BTreeMap<RequestId, Vec<Completion>>,
}

impl Results {
    fn advance<B: AttentionBackend, M: LanguageModel<B>>(&mut self, engine: &mut Engine<B, M>) {
        for event in wait(engine.advance()).unwrap() {
            match event.kind {
                EventKind::Token(TokenEvent { sample, token, .. }) => {
                    let key = (event.request, sample);
                    self.tokens.entry(key).or_default().push(token);
                }
                EventKind::Finished(completions) => {
                    assert!(self.finished.insert(event.request, completions).is_none());
                }
                EventKind::Failed(error) => panic!("{error}"),
            }
        }
    }

    fn tokens(&self, request: RequestId, sample: usize) -> &[u32] {
        self.tokens
            .get(&(request, sample))
            .map_or(&[], Vec::as_slice)
    }
}

/// The same but for rounding.
fn assert_alike(found: &[Completion], expected: &[Completion]) {
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        let exact = |x: &Completion| (x.prompt, x.sample, x.tokens.clone(), x.finish);
        assert_eq!(exact(found), exact(expected));
        let numbers = |x: &Completion| -> Vec<f64> {
            let list = x.log_probabilities.iter().flatten();
            let list = list.flat_map(|x| {
                let top = x.top.iter().map(|x| x.log_probability);
                std::iter::once(x.chosen).chain(top)
            });
            list.chain(x.score).collect()
        };
        let (found, expected) = (numbers(found), numbers(expected));
        assert_eq!(found.len(), expected.len());
        let close = |(a, b): (&f64, &f64)| (a - b).abs() < 1e-4;
        assert!(
            found.iter().zip(&expected).all(close),
            "{found:?}, {expected:?}"
        );
    }
}

/// Random requests, and what happens before the next one comes.
fn history(seed: u64) -> Vec<(Request, usize, bool)> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut below = |bound: u32| (random.next_u32() % bound) as usize;
    let count = 1 + below(7);
    let requests = (0..count).map(|_| {
        let request = request((below(6), 1 + below(6), 1 + below(8)));
        (request, below(4), below(3) == 0)
    });
    requests.collect()
}

fn requests_that_join_become_what_they_become_alone<B: AttentionBackend>(device: &B::Device) {
    let model = mtla::<B>(device);
    for seed in 0..24 {
        let rows = 3 + seed as usize % 9;
        let mut engine = Engine::new(&model).with_max_rows(rows);
        let mut results = Results::default();
        let mut submitted = Vec::new();
        for (request, steps, cancelled) in history(seed) {
            let id = engine.submit(request.clone()).unwrap();
            // Some are cancelled two steps after they were submitted, if they are still there.
            for step in 0..steps {
                results.advance(&mut engine);
                if cancelled && step == 1 {
                    engine.cancel(id);
                }
            }
            submitted.push((id, request, cancelled && steps > 1));
        }
        while !engine.is_idle() {
            results.advance(&mut engine);
        }
        assert_eq!(engine.live_bytes(), 0);
        for (id, request, cancelled) in submitted {
            let alone = wait(complete(&model, [request])).unwrap();
            match results.finished.get(&id) {
                Some(found) => assert_alike(found, &alone),
                None => assert!(cancelled, "history {seed}"),
            }
            for completion in &alone {
                let told = results.tokens(id, completion.sample);
                let whole = results.finished.contains_key(&id);
                assert!(completion.tokens.starts_with(told));
                assert!(!whole || told == completion.tokens);
            }
        }
    }
}

fn samples_and_beams_share_the_prompt<B: AttentionBackend>(device: &B::Device) {
    let attention = AttentionConfig::mtla(8, 2);
    let model: Decoder<B> = DecoderConfig::new(11, 1, attention).init(device).unwrap();
    // Rank 16 and rope 2, in 32 bits.
    let slot = 18 * 4;
    let live = |config: &GenerationConfig| {
        let mut engine = Engine::new(&model);
        engine
            .submit(Request::new([1, 2, 3], config.clone()))
            .unwrap();
        let mut bytes = Vec::new();
        while !engine.is_idle() {
            wait(engine.advance()).unwrap();
            bytes.push(engine.live_bytes());
        }
        bytes
    };
    // Two prompt slots for all. Then each sample continues the open one, three of them in a copy, and then
    // each gets a slot of its own. The last token ends the samples.
    let samples = GenerationConfig::new(3)
        .with_temperature(1.0)
        .with_num_return_sequences(4);
    assert_eq!(live(&samples), [2 * slot, (1 + 4) * slot, 0]);
    // Beams may have left together with the copies that they came of.
    let beams = live(&GenerationConfig::new(3).with_num_beams(4));
    assert_eq!((beams[0], beams[2]), (2 * slot, 0));
    assert!(beams[1] <= (1 + 4) * slot);
}

/// Token 0 is "a", and so on.
#[expect(clippy::unnecessary_wraps, reason = "a decoder may fail")]
fn letters(tokens: &[u32]) -> Result<String, DecodeError> {
    Ok(tokens
        .iter()
        .map(|token| char::from(b'a' + *token as u8))
        .collect())
}

fn stop_strings_end_a_sequence<B: AttentionBackend>(device: &B::Device) {
    let model = mtla::<B>(device);
    let prompt = tokens(3, 0);
    let config = GenerationConfig::new(8).with_temperature(1.5);
    let free = generate(&model, &[&prompt], &config).unwrap();
    let text = letters(&free[0].tokens).unwrap();
    let stop = &text[2..5];
    let stopping = config.with_stop_strings([stop]);
    let request = |config: &GenerationConfig| Request::new(prompt.clone(), config.clone());
    let run = |request: Request| wait(complete(&model, [request]));
    let stopped = run(request(&stopping).with_text(letters)).unwrap();
    let end = text.find(stop).unwrap() + 3;
    assert_eq!(stopped[0].tokens, free[0].tokens[..end]);
    assert_eq!(stopped[0].finish, FinishReason::StopString);

    let beams = GenerationConfig::new(8).with_num_beams(3);
    let free = run(request(&beams)).unwrap();
    let text = letters(&free[0].tokens).unwrap();
    let beams = beams
        .with_stop_strings([&text[1..3]])
        .with_num_return_sequences(3);
    let stopped = run(request(&beams).with_text(letters)).unwrap();
    for completion in stopped {
        let found = letters(&completion.tokens).unwrap();
        let ends = found.ends_with(&text[1..3]);
        assert_eq!(ends, completion.finish == FinishReason::StopString);
    }

    let error = run(request(&stopping)).unwrap_err();
    assert!(error.to_string().contains("Request::with_text"), "{error}");
    let broken = |_: &[u32]| Err(DecodeError::from("no text"));
    let error = run(request(&stopping).with_text(broken)).unwrap_err();
    assert!(matches!(error, GenerationError::Decode(_)));
}

fn log_probabilities_are_those_of_the_model<B: AttentionBackend>(device: &B::Device) {
    let model = mtla::<B>(device);
    let plain = GenerationConfig::new(5);
    let asked = plain.clone().with_log_probabilities(VOCAB);
    let with = generate(&model, &[tokens(4, 1)], &asked).unwrap().remove(0);
    let without = generate(&model, &[tokens(4, 1)], &plain).unwrap().remove(0);
    assert_eq!(with.tokens, without.tokens);
    assert_eq!(without.log_probabilities, None);
    let list = with.log_probabilities.unwrap();
    assert_eq!(list.len(), 5);
    for (token, probability) in with.tokens.iter().zip(list) {
        assert_eq!(probability.top[0].token, *token);
        let off = probability.top[0].log_probability - probability.chosen;
        assert!(off.abs() < 1e-12);
        let total: f64 = probability
            .top
            .iter()
            .map(|x| x.log_probability.exp())
            .sum();
        assert!((total - 1.0).abs() < 1e-5);
    }
}

/// Forbids everything after some tokens.
#[derive(Debug)]
struct Nothing(usize);

impl LogitsProcessor for Nothing {
    fn process(&self, tokens: &[u32], scores: &mut [f32]) {
        if tokens.len() >= self.0 {
            scores.fill(f32::NEG_INFINITY);
        }
    }
}

fn a_request_that_fails_leaves_the_others<B: AttentionBackend>(device: &B::Device) {
    let model = mtla::<B>(device);
    let mut engine = Engine::new(&model);
    let good = request((1, 4, 3));
    let expected = wait(complete(&model, [good.clone()])).unwrap();
    for config in [config(0, 4), config(2, 4), config(5, 4)] {
        let bad = Request::new([1, 2], config).with_processor(Nothing(4));
        let bad = engine.submit(bad).unwrap();
        let good = engine.submit(good.clone()).unwrap();
        let mut failed = None;
        while !engine.is_idle() {
            for event in wait(engine.advance()).unwrap() {
                match event.kind {
                    EventKind::Failed(error) => failed = Some((event.request, error)),
                    EventKind::Finished(found) => {
                        assert_eq!(event.request, good);
                        assert_alike(&found, &expected);
                    }
                    EventKind::Token(_) => {}
                }
            }
        }
        let (id, error) = failed.unwrap();
        assert_eq!(id, bad);
        let start = "after 2 tokens of prompt 0, sample 0 every token is forbidden";
        assert!(error.to_string().starts_with(start), "{error}");
    }
}

fn what_does_not_fit_is_refused<B: AttentionBackend>(device: &B::Device) {
    let model = mtla::<B>(device);
    let mut engine = Engine::new(&model).with_max_rows(2);
    let beams = GenerationConfig::new(3).with_num_beams(3);
    let error = engine.submit(Request::new([1], beams)).unwrap_err();
    assert!(matches!(
        error,
        GenerationError::TooManyRows {
            rows: 3,
            max_rows: 2
        }
    ));
    let short = GenerationConfig {
        max_length: Some(4),
        ..GenerationConfig::default()
    };
    let error = engine
        .submit(Request::new(tokens(4, 0), short))
        .unwrap_err();
    assert!(
        error
            .to_string()
            .contains("has 4 tokens and max_length is 4"),
        "{error}"
    );
    assert!(engine.is_idle() && wait(engine.advance()).unwrap().is_empty());
}

fn a_stream_gives_what_the_iterator_gives<B: AttentionBackend>(device: &B::Device) {
    let model = mtla::<B>(device);
    let config = config(2, 5);
    let prompts = [tokens(3, 0), tokens(1, 1)];
    let generation = || Generation::new(&model, &prompts, &config).unwrap();
    let expected: Vec<_> = generation().map(Result::unwrap).collect();
    let mut stream = pin!(generation().into_stream());
    let mut found = Vec::new();
    let mut context = Context::from_waker(Waker::noop());
    while let Poll::Ready(Some(step)) = stream.as_mut().poll_next(&mut context) {
        found.push(step.unwrap());
    }
    assert_eq!(found, expected);
}

/// What layers do is read back beside the tokens, and changes none of them.
fn observed_layers_say_what_they_did<B: AttentionBackend>(device: &B::Device) {
    let model = mtla::<B>(device);
    let run = |layers: &[usize]| {
        let mut engine = Engine::new(&model);
        engine.observe(layers);
        let mut results = Results::default();
        // The second request comes when the first has two tokens: a step of one row and a prompt together.
        engine.submit(request((0, 9, 7))).unwrap();
        results.advance(&mut engine);
        results.advance(&mut engine);
        engine.submit(request((2, 6, 5))).unwrap();
        let mut shapes = Vec::new();
        while !engine.is_idle() {
            results.advance(&mut engine);
            let list = |data: &TensorData| data.shape.to_vec();
            for observed in engine.observed() {
                let gates = observed.gates.as_ref().unwrap();
                assert!(gates.iter::<f32>().all(|gate| (0.0..=1.0).contains(&gate)));
                let weights = observed.weights.as_ref();
                if let Some(weights) = weights {
                    let numbers: Vec<f32> = weights.iter().collect();
                    for head in numbers.chunks(weights.shape[2]) {
                        assert!((head.iter().sum::<f32>() - 1.0).abs() < 1e-5, "{head:?}");
                    }
                }
                shapes.push((observed.layer, list(gates), weights.map(list)));
            }
        }
        (results.finished, shapes)
    };
    let (expected, nothing) = run(&[]);
    assert!(nothing.is_empty());
    let (found, shapes) = run(&[1]);
    for (request, completions) in &expected {
        assert_alike(&found[request], completions);
    }
    // The first row has nine tokens then, in three slots, and the prompt five; then all four rows go on.
    let first = [(1, vec![1, 1], Some(vec![1, 4, 3])), (1, vec![1, 5], None)];
    assert_eq!(shapes[..2], first);
    assert_eq!(shapes[2], (1, vec![4, 1], Some(vec![4, 4, 4])));
    assert_eq!(run(&[0, 1]).1.len(), 2 * shapes.len());
}

backend_tests!(
    observed_layers_say_what_they_did,
    requests_that_join_become_what_they_become_alone,
    samples_and_beams_share_the_prompt,
    stop_strings_end_a_sequence,
    log_probabilities_are_those_of_the_model,
    a_request_that_fails_leaves_the_others,
    what_does_not_fit_is_refused,
    a_stream_gives_what_the_iterator_gives,
);
