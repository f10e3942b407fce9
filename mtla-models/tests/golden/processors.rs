//! The logits processors: every recorded one is applied and compared with Hugging Face's.

use mtla_core::testing::{Checks, Golden};
use mtla_models::generate::processors::{
    BadWords, EpsilonCutoff, EtaCutoff, ExponentialDecay, ForcedLast, LogitsProcessor, MinLength,
    MinP, NoRepeatNgram, RepetitionPenalty, SuppressTokens, Temperature, TopK, TopP, TypicalP,
};
use mtla_models::generate::{GenerationConfig, processors::LogitsProcessors};

/// Absolute, on scores.
const SCORE: f32 = 1e-5;

/// The number that begins somewhere in a name, for instance 0.9 of `top_p_0.9`.
fn number(name: &str, before: &str) -> f64 {
    let rest = name.split_once(before).expect("a name with a number").1;
    let end = rest.find('_').unwrap_or(rest.len());
    rest[..end].parse().expect("a number")
}

/// The processor of a recorded case; `None` for one that is not known.
fn processor(name: &str, class: &str) -> Option<Box<dyn LogitsProcessor>> {
    let keep = if name.contains("_min") {
        number(name, "_min")
    } else {
        1.0
    } as usize;
    Some(match class {
        "TemperatureLogitsWarper" => Box::new(Temperature {
            temperature: number(name, "temperature_"),
        }),
        "TopKLogitsWarper" => Box::new(TopK {
            top_k: (number(name, "top_k_") as usize).max(keep),
        }),
        "TopPLogitsWarper" => Box::new(TopP {
            top_p: number(name, "top_p_"),
            keep,
        }),
        "MinPLogitsWarper" => Box::new(MinP {
            min_p: number(name, "min_p_"),
            keep: 1,
        }),
        "TypicalLogitsWarper" => Box::new(TypicalP {
            mass: number(name, "typical_"),
            keep: 1,
        }),
        "EpsilonLogitsWarper" => Box::new(EpsilonCutoff {
            epsilon: number(name, "epsilon_"),
        }),
        "EtaLogitsWarper" => Box::new(EtaCutoff {
            epsilon: number(name, "eta_"),
        }),
        "RepetitionPenaltyLogitsProcessor" => Box::new(RepetitionPenalty {
            penalty: number(name, "repetition_"),
        }),
        "NoRepeatNGramLogitsProcessor" => Box::new(NoRepeatNgram {
            size: number(name, "ngram_") as usize,
        }),
        "MinLengthLogitsProcessor" => Box::new(MinLength {
            min_length: number(name, "min_length_") as usize,
            ends: vec![2],
        }),
        "MinNewTokensLengthLogitsProcessor" => Box::new(MinLength {
            // Four new tokens after a prompt of five are the nine that there are, yet the end is forbidden.
            min_length: 10,
            ends: vec![2],
        }),
        "ForcedEOSTokenLogitsProcessor" => Box::new(ForcedLast {
            max_length: number(name, "max") as usize,
            tokens: vec![2],
        }),
        // The recorded case does not say these; they follow from what it forbids and adds.
        "NoBadWordsLogitsProcessor" => {
            let words = [vec![3], vec![8, 9], vec![7, 8, 11]];
            Box::new(BadWords::new(&words, &[2]))
        }
        "ExponentialDecayLengthPenalty" => Box::new(ExponentialDecay {
            start: 6,
            factor: 1.4,
            ends: vec![2],
        }),
        "SuppressTokensLogitsProcessor" => Box::new(SuppressTokens(vec![4, 5])),
        _ => return None,
    })
}

/// The largest difference of what is kept; infinite if something else is kept.
fn difference(found: &[f32], expected: &[f32]) -> f32 {
    let pairs = found.iter().zip(expected);
    pairs.fold(0.0, |worst: f32, (found, expected)| {
        // Two infinities have no difference.
        if found.to_bits() == expected.to_bits() {
            return worst;
        }
        let difference = (found - expected).abs();
        worst.max(if difference.is_nan() {
            f32::INFINITY
        } else {
            difference
        })
    })
}

#[test]
fn processors_do_what_hugging_face_does() {
    let golden = Golden::load(&crate::root().join("llama_mtla/logits_processors.json"));
    let histories: Vec<Vec<u32>> = golden
        .integers("input_ids")
        .iter()
        .map(|row| row.iter().map(|token| *token as u32).collect())
        .collect();
    let logits = golden.values("logits");
    let vocab_size = logits.len() / histories.len();
    let mut checks = Checks::default();
    let mut check = |name: &str, processor: &dyn LogitsProcessor| {
        let mut scores = logits.to_vec();
        for (scores, history) in scores.chunks_exact_mut(vocab_size).zip(&histories) {
            processor.process(history, scores);
        }
        let worst = difference(&scores, golden.values(&format!("out.{name}")));
        checks.holds(&format!("{name}: off by {worst}"), worst <= SCORE);
    };
    for entry in golden.json["processors"].as_array().expect("a list") {
        let name = entry["name"].as_str().expect("a name");
        let class = entry["class"].as_str().expect("a class");
        let processor = processor(name, class).unwrap_or_else(|| panic!("unknown class {class}"));
        check(name, &*processor);
    }
    let mut chain = GenerationConfig::new(1)
        .with_temperature(0.8)
        .with_top_k(20)
        .with_top_p(0.9);
    chain.repetition_penalty = 1.2;
    chain.no_repeat_ngram_size = 2;
    chain.min_p = Some(0.02);
    check(
        "chain",
        &LogitsProcessors::new(&chain, histories[0].len(), &[]),
    );
    checks.finish("logits processors");
}
