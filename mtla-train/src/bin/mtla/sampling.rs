//! How tokens are chosen: the checkpoint's defaults, then the command line.

use clap::{Args, ValueEnum};
use mtla_models::{
    generate::{EarlyStopping, GenerationConfig},
    tokenizer::{Tokenizer, TokenizerError},
};

/// Tokens after the prompt where neither the checkpoint nor the command line says.
const NEW_TOKENS: usize = 128;

#[derive(Debug, Args)]
#[command(
    next_help_heading = "Search (defaults: the checkpoint's generation_config.json, then those shown)"
)]
pub(crate) struct Sampling {
    /// Most tokens after the prompt [128].
    #[arg(long, value_name = "N")]
    max_new_tokens: Option<usize>,
    /// Tokens before which no text ends by itself [0].
    #[arg(long, value_name = "N")]
    min_new_tokens: Option<usize>,
    /// Take the most probable token each time, even if the checkpoint says to sample.
    #[arg(long, conflicts_with_all = ["temperature", "top_k", "top_p", "min_p", "typical_p"])]
    greedy: bool,
    /// Sample; below 1 nearer to the most probable tokens, above 1 further from them [1].
    #[arg(long, value_name = "X", value_parser = temperature, allow_negative_numbers = true)]
    temperature: Option<f64>,
    /// Sample among the K most probable tokens; 0 for all [50].
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Sample among the most probable tokens that have probability P together.
    #[arg(long, value_name = "P")]
    top_p: Option<f64>,
    /// Sample among tokens that have at least this share of the most probable one's probability.
    #[arg(long, value_name = "P")]
    min_p: Option<f64>,
    /// Sample among the tokens nearest to the average information that have probability P together.
    #[arg(long, value_name = "P")]
    typical_p: Option<f64>,
    /// Seed of the sampling; the same one gives the same text [0].
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Above 1 makes tokens less probable that there have been [1].
    #[arg(long, value_name = "X")]
    repetition_penalty: Option<f64>,
    /// No sequence of N tokens comes twice; 0 allows it [0].
    #[arg(long, value_name = "N")]
    no_repeat_ngram_size: Option<usize>,
    /// Beams of beam search; 1 for none [1].
    #[arg(long, value_name = "N")]
    num_beams: Option<usize>,
    /// Beam search: above 0 favours long texts, below 0 short ones [1].
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    length_penalty: Option<f64>,
    /// Beam search: stop when there are as many texts as beams (true), when better ones are unlikely (false), or
    /// when there can be none (never) [false].
    #[arg(
        long,
        value_enum,
        hide_possible_values = true,
        value_name = "true|false|never"
    )]
    early_stopping: Option<Stopping>,
    /// Texts for each prompt: samples, or the best ones of beam search [1].
    #[arg(long, value_name = "N")]
    num_return_sequences: Option<usize>,
    /// A string that ends a text; may be given several times, in place of those of the checkpoint. It is printed, as is
    /// the rest of the token that completes it; it may begin in the prompt.
    #[arg(long, value_name = "STRING")]
    stop: Vec<String>,
    /// Words that never come, alone or after a space; may be given several times.
    #[arg(long, value_name = "WORD")]
    bad_words: Vec<String>,
}

/// When beam search stops.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Stopping {
    True,
    False,
    Never,
}

fn temperature(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(x) if x > 0.0 && x.is_finite() => Ok(x),
        Ok(0.0) => {
            Err("0 stands for no sampling, which is --greedy; give a positive number".into())
        }
        _ => Err("give a positive number".into()),
    }
}

impl Sampling {
    /// Changes what a checkpoint says by what the command line says.
    pub(crate) fn change(
        &self,
        config: &mut GenerationConfig,
        tokenizer: &Tokenizer,
    ) -> Result<(), TokenizerError> {
        self.change_search(config);
        if config.max_length.is_none() && config.max_new_tokens.is_none() {
            config.max_new_tokens = Some(NEW_TOKENS);
        }
        set_some(&mut config.max_new_tokens, self.max_new_tokens);
        set_some(&mut config.min_new_tokens, self.min_new_tokens);
        set(&mut config.seed, self.seed);
        set(&mut config.repetition_penalty, self.repetition_penalty);
        set(&mut config.no_repeat_ngram_size, self.no_repeat_ngram_size);
        set(&mut config.num_return_sequences, self.num_return_sequences);
        if !self.stop.is_empty() {
            config.stop_strings.clone_from(&self.stop);
        }
        if !self.bad_words.is_empty() {
            let mut words = Vec::new();
            for word in &self.bad_words {
                for text in [word.clone(), format!(" {word}")] {
                    let tokens = tokenizer.encode_bare(&text)?;
                    if !words.contains(&tokens) {
                        words.push(tokens);
                    }
                }
            }
            config.bad_words_ids = Some(words);
        }
        Ok(())
    }

    /// Greedy, samples or beams.
    fn change_search(&self, config: &mut GenerationConfig) {
        let samples = [self.temperature, self.top_p, self.min_p, self.typical_p]
            .iter()
            .any(Option::is_some)
            || self.top_k.is_some();
        let beams = self.num_beams.is_some_and(|n| n > 1);
        if samples {
            config.do_sample = true;
            config.num_beams = 1;
        } else if self.greedy || beams {
            config.do_sample = false;
            config.num_beams = 1;
        }
        set(&mut config.temperature, self.temperature);
        set_some(&mut config.top_k, self.top_k);
        set_some(&mut config.top_p, self.top_p);
        set_some(&mut config.min_p, self.min_p);
        set_some(&mut config.typical_p, self.typical_p);
        set(&mut config.num_beams, self.num_beams);
        set(&mut config.length_penalty, self.length_penalty);
        let stopping = self.early_stopping.map(|stopping| match stopping {
            Stopping::True => EarlyStopping::Always,
            Stopping::False => EarlyStopping::Heuristic,
            Stopping::Never => EarlyStopping::Never,
        });
        set(&mut config.early_stopping, stopping);
    }
}

fn set<T>(field: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *field = value;
    }
}

fn set_some<T>(field: &mut Option<T>, value: Option<T>) {
    if value.is_some() {
        *field = value;
    }
}
