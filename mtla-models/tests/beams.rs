//! Beam search over a cache gives what a slow and plain one over whole sequences gives.

mod common;

use burn::tensor::Tensor;
use common::{VOCAB, batch, configs, model, tokens};
use mtla_core::{attention::AttentionConfig, backend_tests, ops::AttentionBackend};
use mtla_models::{
    decoder::{Decoder, DecoderConfig, DecoderInput},
    generate::{
        Completion, EarlyStopping, FinishReason, Generation, GenerationConfig, LanguageModel,
        generate,
        processors::{LogitsProcessor, LogitsProcessors},
    },
};

/// What stands for a sequence that is not there, as in Hugging Face's code.
const IMPOSSIBLE: f64 = -1e9;

/// Log-probabilities after each sequence, each computed anew.
fn log_probabilities<B: AttentionBackend>(
    model: &Decoder<B>,
    sequences: &[Vec<u32>],
) -> Vec<Vec<f32>> {
    let length = sequences[0].len();
    let input = batch(sequences, 0, &model.device());
    let logits: Tensor<B, 3> = model.forward(DecoderInput::new(input));
    let logits: Vec<f32> = logits.narrow(1, length - 1, 1).into_data().iter().collect();
    logits
        .chunks_exact(VOCAB)
        .map(|row| {
            let sum: f64 = row.iter().map(|x| f64::from(*x).exp()).sum();
            row.iter()
                .map(|x| (f64::from(*x) - sum.ln()) as f32)
                .collect()
        })
        .collect()
}

#[derive(Debug, Clone)]
struct Entry {
    tokens: Vec<u32>,
    score: f64,
    finished: bool,
}

/// The best `count` of a list, the best one first.
fn top(mut list: Vec<Entry>, count: usize) -> Vec<Entry> {
    list.sort_by(|a, b| b.score.total_cmp(&a.score));
    list.truncate(count);
    list
}

/// Beam search, step by step as Hugging Face's `_beam_search` does it for one prompt.
fn search_plainly<B: AttentionBackend>(
    model: &Decoder<B>,
    prompt: &[u32],
    config: &GenerationConfig,
) -> Vec<(Vec<u32>, f64)> {
    let beams = config.num_beams;
    let max_new = config.max_new_tokens.unwrap();
    let kept = (1 + config.eos_token_id.len()).max(2) * beams;
    let processors = LogitsProcessors::new(config, prompt.len(), &[]);
    let entry = |score| Entry {
        tokens: prompt.to_vec(),
        score,
        finished: false,
    };
    let mut running = vec![entry(IMPOSSIBLE); beams];
    running[0].score = 0.0;
    let mut finished = vec![entry(IMPOSSIBLE); beams];
    for step in 1.. {
        let sequences: Vec<Vec<u32>> = running.iter().map(|x| x.tokens.clone()).collect();
        let mut continued = Vec::new();
        for (beam, mut scores) in running.iter().zip(log_probabilities(model, &sequences)) {
            processors.process(&beam.tokens, &mut scores);
            continued.extend((0..).zip(scores).map(|(token, score)| Entry {
                tokens: [&beam.tokens[..], &[token]].concat(),
                score: beam.score + f64::from(score),
                finished: config.eos_token_id.contains(&token) || step == max_new,
            }));
        }
        let continued = top(continued, kept);
        let mut next = continued.clone();
        for entry in next.iter_mut().filter(|x| x.finished) {
            entry.score += IMPOSSIBLE;
        }
        running = top(next, beams);

        let full = finished.iter().all(|x| x.finished);
        let always = config.early_stopping == EarlyStopping::Always;
        let power = |tokens: usize| (tokens as f64).powf(config.length_penalty);
        for (rank, mut entry) in continued.iter().cloned().enumerate() {
            entry.finished &= rank < beams;
            entry.score /= power(step);
            if !entry.finished || (full && always) {
                entry.score += IMPOSSIBLE;
            }
            finished.push(entry);
        }
        finished = top(finished, beams);

        let full = finished.iter().all(|x| x.finished);
        let never = config.early_stopping == EarlyStopping::Never;
        let longest = if never && config.length_penalty > 0.0 {
            max_new
        } else {
            step
        };
        let worst = if full {
            finished[beams - 1].score
        } else {
            IMPOSSIBLE
        };
        let improvable = running[0].score / power(longest) > worst;
        if !improvable || (full && always) || continued.iter().all(|x| x.finished) {
            break;
        }
    }
    let best = finished.into_iter().take(config.num_return_sequences);
    best.map(|x| (x.tokens[prompt.len()..].to_vec(), x.score))
        .collect()
}

/// Settings of every kind; half of the vocabulary ends a sequence in some of them, so that many do.
fn settings() -> Vec<GenerationConfig> {
    let mut settings = Vec::new();
    for early_stopping in [
        EarlyStopping::Heuristic,
        EarlyStopping::Always,
        EarlyStopping::Never,
    ] {
        for (i, length_penalty) in [-1.0, 0.0, 0.6, 1.0, 2.0].into_iter().enumerate() {
            let beams = 2 + i % 3;
            let mut config = GenerationConfig::new(6)
                .with_num_beams(beams)
                .with_num_return_sequences(1 + i % beams);
            config.early_stopping = early_stopping;
            config.length_penalty = length_penalty;
            let mut processed = config.clone().with_stop_tokens([3, 7]);
            processed.min_new_tokens = Some(2);
            processed.repetition_penalty = 1.3;
            processed.no_repeat_ngram_size = 2;
            settings.push(config.clone());
            settings.push(config.clone().with_stop_tokens([3]));
            settings.push(config.with_stop_tokens((0..VOCAB as u32 / 3).collect::<Vec<_>>()));
            settings.push(processed);
        }
    }
    settings
}

#[track_caller]
fn assert_equal(found: &[Completion], expected: &[(Vec<u32>, f64)], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (rank, (found, (tokens, score))) in found.iter().zip(expected).enumerate() {
        assert_eq!(found.sample, rank);
        assert_eq!(&found.tokens, tokens, "{what}, sequence {rank}");
        let off = (found.score.unwrap() - score).abs();
        assert!(off < 1e-4, "{what}, sequence {rank}: score off by {off}");
    }
}

fn beams_are_those_of_a_plain_search<B: AttentionBackend>(device: &B::Device) {
    let prompts = [tokens(5, 0), tokens(2, 1), tokens(1, 3)];
    let mut lengths = std::collections::HashSet::new();
    for (number, decoder) in configs().into_iter().enumerate() {
        let model = model::<B>(&decoder, device);
        let settings = settings();
        // All settings for the last model, which is MTLA's, and some for the others.
        let stride = if number == 5 { 1 } else { 7 };
        for config in settings.iter().skip(number % stride).step_by(stride) {
            let together = generate(&model, &prompts, config).unwrap();
            let of_prompt = together.chunks(config.num_return_sequences);
            for (prompt, found) in prompts.iter().zip(of_prompt) {
                let expected = search_plainly(&model, prompt, config);
                assert_equal(found, &expected, &format!("{config:?}"));
                lengths.extend(found.iter().map(|x| (x.tokens.len(), x.finish)));
            }
        }
    }
    assert!(lengths.len() > 4, "all sequences are alike: {lengths:?}");
}

fn mtla<B: AttentionBackend>(device: &B::Device) -> Decoder<B> {
    let attention = AttentionConfig::mtla(16, 4).with_down_rate(3);
    let config = DecoderConfig::new(VOCAB, 2, attention).with_tied_embeddings(false);
    model(&config, device)
}

fn one_beam_is_greedy_search<B: AttentionBackend>(device: &B::Device) {
    let model = mtla::<B>(device);
    for config in settings() {
        let config = config.with_num_beams(1).with_num_return_sequences(1);
        let prompt = tokens(4, 2);
        let greedy = generate(&model, &[&prompt], &config).unwrap();
        if config.no_repeat_ngram_size == 0 {
            let expected = search_plainly(&model, &prompt, &config);
            // It ends at the first end, where beam search may look for a better one.
            if config.eos_token_id.is_empty() {
                assert_eq!(greedy[0].tokens, expected[0].0);
            }
        }
        assert_eq!(greedy[0].score, None);
    }
}

fn tokens_of_beams_come_at_the_end<B: AttentionBackend>(device: &B::Device) {
    let model = mtla::<B>(device);
    let config = GenerationConfig::new(5)
        .with_num_beams(3)
        .with_num_return_sequences(2)
        .with_log_probabilities(1);
    let completions = generate(&model, &[tokens(3, 0)], &config).unwrap();
    let generation = Generation::new(&model, &[tokens(3, 0)], &config).unwrap();
    let steps: Vec<_> = generation.map(Result::unwrap).collect();
    assert!(steps[..4].iter().all(Vec::is_empty));
    for completion in &completions {
        let events = steps[4].iter().filter(|x| x.sample == completion.sample);
        let events: Vec<_> = events.cloned().collect();
        let tokens: Vec<u32> = events.iter().map(|x| x.token).collect();
        assert_eq!(tokens, completion.tokens);
        assert_eq!(events[4].finish, Some(FinishReason::Length));
        // Nothing changes the log-probabilities here, so the score is their mean.
        let sum: f64 = events
            .iter()
            .map(|x| x.log_probability.as_ref().unwrap().chosen)
            .sum();
        assert!((sum / 5.0 - completion.score.unwrap()).abs() < 1e-5);
    }
}

backend_tests!(
    beams_are_those_of_a_plain_search,
    one_beam_is_greedy_search,
    tokens_of_beams_come_at_the_end,
);
