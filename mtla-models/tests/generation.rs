//! Generation over a cache and in a batch gives what the whole sequence alone gives.

mod common;

use std::collections::HashSet;

use burn::tensor::{Int, Tensor};
use common::{VOCAB, batch, configs, model, tokens};
use mtla_core::{
    attention::AttentionConfig,
    backend_tests,
    cache::{Cache, PrefillPlan, StepPlan},
    ops::AttentionBackend,
};
use mtla_models::{
    decoder::{Decoder, DecoderConfig, DecoderInput},
    generate::{
        Completion, FinishReason, Generation, GenerationConfig, GenerationError, LanguageModel,
        generate,
        processors::{LogitsProcessor, LogitsProcessors},
        uniform,
    },
};

fn prompts() -> Vec<Vec<u32>> {
    vec![tokens(5, 0), tokens(2, 1), tokens(8, 2), tokens(1, 3)]
}

fn sampling() -> GenerationConfig {
    GenerationConfig::new(7)
        .with_temperature(1.3)
        .with_top_k(12)
        .with_top_p(0.95)
        .with_seed(42)
}

fn mtla<B: AttentionBackend>(device: &B::Device) -> Decoder<B> {
    let attention = AttentionConfig::mtla(16, 4).with_down_rate(3);
    model(
        &DecoderConfig::new(VOCAB, 2, attention).with_tied_embeddings(false),
        device,
    )
}

/// The most probable token, or the one that a random number draws.
fn choose(scores: &[f32], draw: Option<f64>) -> u32 {
    let weights: Vec<f64> = scores.iter().map(|x| f64::from(*x).exp()).collect();
    let Some(draw) = draw else {
        let best = (0..scores.len())
            .rev()
            .max_by(|a, b| weights[*a].total_cmp(&weights[*b]));
        return best.unwrap() as u32;
    };
    let total: f64 = weights.iter().sum();
    let mut reached = 0.0;
    let chosen = weights.iter().position(|weight| {
        reached += weight / total;
        draw < reached
    });
    chosen.unwrap() as u32
}

/// Continues one prompt without a cache: the whole sequence anew for every token.
fn continue_without_cache<B: AttentionBackend>(
    model: &Decoder<B>,
    [prompt, sample]: [usize; 2],
    config: &GenerationConfig,
) -> Vec<u32> {
    let mut sequence = prompts()[prompt].clone();
    let start = sequence.len();
    let processors = LogitsProcessors::new(config, start, &[]);
    for step in 0..config.max_new_tokens.unwrap() {
        let input = batch(&[sequence.clone()], 0, &model.device());
        let logits = model.forward(DecoderInput::new(input));
        let mut scores: Vec<f32> = logits
            .narrow(1, sequence.len() - 1, 1)
            .into_data()
            .iter()
            .collect();
        processors.process(&sequence, &mut scores);
        let draw = uniform(config.seed, prompt as u64, sample as u64, step as u64);
        sequence.push(choose(&scores, config.do_sample.then_some(draw)));
    }
    sequence.split_off(start)
}

fn cached_batches_give_what_whole_sequences_give<B: AttentionBackend>(device: &B::Device) {
    for decoder in configs() {
        let model = model::<B>(&decoder, device);
        let mut processed = sampling().with_num_return_sequences(2);
        processed.repetition_penalty = 1.4;
        processed.no_repeat_ngram_size = 2;
        processed.bad_words_ids = Some(vec![vec![4], vec![5, 6]]);
        let mut greedy = processed.clone().with_temperature(0.0);
        greedy.num_return_sequences = 1;
        for config in [
            GenerationConfig::new(7),
            greedy,
            sampling().with_num_return_sequences(3),
            processed,
        ] {
            let completions = generate(&model, &prompts(), &config).unwrap();
            assert_eq!(completions.len(), 4 * config.num_return_sequences);
            for (i, completion) in completions.iter().enumerate() {
                let place = [
                    i / config.num_return_sequences,
                    i % config.num_return_sequences,
                ];
                assert_eq!([completion.prompt, completion.sample], place);
                let expected = continue_without_cache(&model, place, &config);
                assert_eq!(completion.tokens, expected, "{place:?} of {decoder:?}");
                assert_eq!(completion.finish, FinishReason::Length);
            }
        }
    }
}

fn a_prompt_in_a_batch_is_continued_as_it_is_alone<B: AttentionBackend>(device: &B::Device) {
    let model = mtla::<B>(device);
    for config in [
        GenerationConfig::new(7),
        sampling().with_num_return_sequences(2),
    ] {
        let together = generate(&model, &prompts(), &config).unwrap();
        for (number, prompt) in prompts().into_iter().enumerate() {
            let alone = Generation::new(&model, &[prompt], &config).unwrap();
            for events in alone.with_first_prompt(number).enumerate() {
                let (step, events) = (events.0, events.1.unwrap());
                for event in events {
                    let row = number * config.num_return_sequences + event.sample;
                    assert_eq!(event.token, together[row].tokens[step]);
                }
            }
        }
    }
}

fn stop_tokens_end_their_sample_only<B: AttentionBackend>(device: &B::Device) {
    let model = mtla::<B>(device);
    let config = sampling().with_num_return_sequences(2);
    let free = generate(&model, &prompts(), &config).unwrap();
    let stop = [free[1].tokens[2], free[4].tokens[4]];
    let stopped = generate(&model, &prompts(), &config.with_stop_tokens(stop)).unwrap();
    for (free, stopped) in free.iter().zip(&stopped) {
        let end = free.tokens.iter().position(|token| stop.contains(token));
        let (count, finish) = match end {
            Some(last) => (last + 1, FinishReason::Stop),
            None => (7, FinishReason::Length),
        };
        assert_eq!(stopped.tokens, free.tokens[..count]);
        assert_eq!(stopped.finish, finish);
    }
    let lengths: HashSet<usize> = stopped.iter().map(|x| x.tokens.len()).collect();
    assert!(
        lengths.len() > 1,
        "all samples end at the same step: {stopped:?}"
    );
}

fn seeds_repeat_and_differ<B: AttentionBackend>(device: &B::Device) {
    let model = mtla::<B>(device);
    let tokens = |config: &GenerationConfig| -> Vec<Vec<u32>> {
        let completions = generate(&model, &prompts(), config).unwrap();
        completions.into_iter().map(|x| x.tokens).collect()
    };
    let config = sampling().with_num_return_sequences(3);
    let first = tokens(&config);
    assert_eq!(first, tokens(&config));
    assert_ne!(first, tokens(&config.clone().with_seed(43)));
    assert_eq!(
        first.iter().collect::<HashSet<_>>().len(),
        12,
        "samples are alike: {first:?}"
    );
    // One candidate leaves no choice.
    let greedy = tokens(&GenerationConfig::new(7));
    assert_eq!(tokens(&sampling().with_top_k(1)), greedy);
    assert_eq!(tokens(&sampling().with_temperature(1e-9)), greedy);
}

fn events_add_up_to_the_completions<B: AttentionBackend>(device: &B::Device) {
    let model = mtla::<B>(device);
    let config = sampling().with_num_return_sequences(2);
    let free = generate(&model, &prompts(), &config).unwrap();
    let config = config.with_stop_tokens([free[0].tokens[1]]);

    let mut collected: Vec<Completion> = Vec::new();
    let mut steps = 0;
    for events in Generation::new(&model, &prompts(), &config).unwrap() {
        steps += 1;
        for event in events.unwrap() {
            let known = collected
                .iter_mut()
                .find(|x| (x.prompt, x.sample) == (event.prompt, event.sample));
            if let Some(known) = known {
                known.tokens.push(event.token);
                known.finish = event.finish.unwrap_or(known.finish);
            } else {
                assert_eq!(steps, 1);
                collected.push(Completion {
                    prompt: event.prompt,
                    sample: event.sample,
                    tokens: vec![event.token],
                    finish: event.finish.unwrap_or(FinishReason::Length),
                    score: None,
                    log_probabilities: None,
                });
            }
        }
    }
    assert_eq!(collected, generate(&model, &prompts(), &config).unwrap());
    assert!(steps <= 7);
}

fn what_cannot_work_is_refused<B: AttentionBackend>(device: &B::Device) {
    let model = mtla::<B>(device);
    let error = |prompts: &[Vec<u32>], config: GenerationConfig| {
        generate(&model, prompts, &config).unwrap_err().to_string()
    };
    let config = GenerationConfig::new(2);
    assert_eq!(
        error(&[vec![1], vec![]], config.clone()),
        "prompt 1 is empty: give at least one token, for instance the begin-of-text token"
    );
    assert!(
        error(&[vec![1], vec![0, 23]], config.clone()).starts_with(
            "prompt 1 has token 23 at place 1, but the model knows the tokens 0 to 22"
        ),
    );
    assert!(
        error(&[vec![1]], config.clone().with_stop_tokens([99])).starts_with(
            "token 99 of eos_token_id never comes: the model knows the tokens 0 to 22"
        ),
    );
    assert_eq!(
        error(&[vec![1]], config.clone().with_temperature(-1.0)),
        "generation configuration: temperature is -1, expected a positive number, or greedy search"
    );
    assert_eq!(generate(&model, &[[0u32; 0]; 0], &config).unwrap(), []);
}

/// A model whose logits turn into NaN at its second token.
#[derive(Debug)]
struct Damaged<B: AttentionBackend>(Decoder<B>);

impl<B: AttentionBackend> LanguageModel<B> for Damaged<B> {
    fn vocab_size(&self) -> usize {
        self.0.vocab_size()
    }

    fn device(&self) -> B::Device {
        self.0.device()
    }

    fn new_cache(&self) -> Cache<B> {
        self.0.new_cache()
    }

    fn prefill(
        &self,
        tokens: Tensor<B, 2, Int>,
        plan: &PrefillPlan<B>,
        cache: &mut Cache<B>,
    ) -> Tensor<B, 2> {
        self.0.prefill(tokens, plan, cache)
    }

    fn step(
        &self,
        tokens: Tensor<B, 1, Int>,
        plan: &StepPlan<B>,
        cache: &mut Cache<B>,
    ) -> Tensor<B, 2> {
        self.0.step(tokens, plan, cache) * f32::NAN
    }
}

fn damaged_logits_end_the_generation<B: AttentionBackend>(device: &B::Device) {
    let model = Damaged(mtla::<B>(device));
    let mut generation = Generation::new(&model, &prompts(), &sampling()).unwrap();
    assert_eq!(generation.next().unwrap().unwrap().len(), 4);
    let error = generation.next().unwrap().unwrap_err();
    let expected = GenerationError::NotFinite {
        prompt: 0,
        sample: 0,
        step: 1,
    };
    assert_eq!(error.to_string(), expected.to_string());
    assert!(generation.is_done() && generation.next().is_none());
}

backend_tests!(
    cached_batches_give_what_whole_sequences_give,
    a_prompt_in_a_batch_is_continued_as_it_is_alone,
    stop_tokens_end_their_sample_only,
    seeds_repeat_and_differ,
    events_add_up_to_the_completions,
    what_cannot_work_is_refused,
    damaged_logits_end_the_generation,
);
