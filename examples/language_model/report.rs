//! What became of a run: perplexity beside n-gram models, answers by distance.

use std::ops::Range;

use mtla_core::ops::AttentionBackend;
use mtla_models::decoder::Decoder;
use mtla_train::{
    data::{codec::TextCodec, corpus::Split},
    language_model::{Answer, Window, answer, perplexity},
    metric::ngram::NgramModel,
    progress,
};
use serde::Serialize;

use crate::{settings::Settings, text::Text};

/// Answers are counted by the tokens between the evidence and the answer.
const DISTANCES: [(&str, Range<usize>); 3] =
    [("near", 0..32), ("middle", 32..72), ("far", 72..usize::MAX)];

/// Scores on held-out text.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    settings: Settings,
    perplexity: Perplexity,
    cache_bytes_per_token: f64,
    parameters: usize,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    answers: Vec<Bucket>,
}

#[derive(Debug, Serialize)]
struct Perplexity {
    model: f64,
    five_gram: f64,
    unigram: f64,
}

#[derive(Debug, Serialize)]
struct Bucket {
    distance: String,
    right: usize,
    /// Of them right by naming what was named last.
    right_by_guess: usize,
    asked: usize,
}

impl Report {
    /// Scores a model.
    pub(crate) fn make<B: AttentionBackend>(
        model: &Decoder<B>,
        settings: &Settings,
        text: &Text,
        tokens: &Split<Vec<Vec<u32>>>,
        codec: &TextCodec,
        device: &B::Device,
    ) -> anyhow::Result<Self> {
        // The n-gram models mark the beginning of a document themselves.
        let unmarked = |documents: &Vec<Vec<u32>>| -> Vec<Vec<u32>> {
            documents
                .iter()
                .map(|tokens| tokens[1..].to_vec())
                .collect()
        };
        let bar = progress::spinner("n-gram models");
        let (train, held_out) = (unmarked(&tokens.train), unmarked(&tokens.held_out));
        let ngram = |order| {
            NgramModel::train(order, &train, settings.model.vocab_size).perplexity(&held_out)
        };
        let (unigram, five_gram) = (ngram(1), ngram(5));
        bar.finish_and_clear();

        let rows = settings.trainer.batch_size;
        let window = Window {
            context: settings.data.context,
            rows,
        };
        let bar = progress::bar("held-out text", 100);
        let seen = |share| bar.set_position((share * 100.0) as u64);
        let of_model = perplexity(model, &tokens.held_out, window, device, seen)?;
        bar.finish_and_clear();

        let bar = progress::bar("questions", 100);
        let seen = |share| bar.set_position((share * 100.0) as u64);
        let answers = answer(model, codec, &text.stories, 64, seen)?;
        bar.finish_and_clear();

        Ok(Self {
            settings: settings.clone(),
            perplexity: Perplexity {
                model: of_model,
                five_gram,
                unigram,
            },
            cache_bytes_per_token: model.cache_bytes_per_token(),
            parameters: burn::module::Module::num_params(model),
            answers: if answers.is_empty() {
                Vec::new()
            } else {
                buckets(&answers)
            },
        })
    }

    /// Prints the scores.
    pub(crate) fn print(&self) {
        let Perplexity {
            model,
            five_gram,
            unigram,
        } = &self.perplexity;
        println!("\nparameters            {:>9}", self.parameters);
        println!("cache, bytes a token  {:>9.0}", self.cache_bytes_per_token);
        println!("held-out perplexity");
        println!("  this model          {model:>9.3}");
        println!("  5-gram              {five_gram:>9.3}");
        println!("  unigram             {unigram:>9.3}");
        if !self.answers.is_empty() {
            println!(
                "answers, by tokens since the evidence; beside them: naming what was named last"
            );
        }
        for Bucket {
            distance,
            right,
            right_by_guess,
            asked,
        } in &self.answers
        {
            let share = |n: usize| 100.0 * n as f64 / (*asked).max(1) as f64;
            let (model, guess) = (share(*right), share(*right_by_guess));
            println!("  {distance:<18} {model:>9.1}%  {guess:>5.1}%  ({right} of {asked})");
        }
    }
}

fn buckets(answers: &[Answer]) -> Vec<Bucket> {
    let mut all = vec![("all", 0..usize::MAX)];
    all.extend(DISTANCES);
    all.into_iter()
        .map(|(name, range)| {
            let asked: Vec<_> = answers
                .iter()
                .filter(|x| range.contains(&x.distance))
                .collect();
            let limits = match (range.start, range.end) {
                (0, usize::MAX) => String::new(),
                (start, usize::MAX) => format!(" (from {start})"),
                (_, end) => format!(" (below {end})"),
            };
            Bucket {
                distance: format!("{name}{limits}"),
                right: asked.iter().filter(|answer| answer.is_correct()).count(),
                right_by_guess: asked.iter().filter(|x| x.guess == x.expected).count(),
                asked: asked.len(),
            }
        })
        .collect()
}
