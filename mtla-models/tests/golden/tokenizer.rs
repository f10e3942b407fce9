//! The tokenizer: recorded ids, pieces and texts.

use std::fs;

use mtla_models::tokenizer::{TextStream, Tokenizer};
use serde_json::{Value, json};

fn stream(mut stream: TextStream<'_>, ids: &[u32]) -> String {
    let mut text: String = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
    text += &stream.finish().unwrap();
    text
}

#[test]
fn tokenizer_gives_the_recorded_ids_and_texts() {
    let folder = crate::root().join("llama_mtla/tokenizer");
    let golden = fs::read_to_string(folder.join("tokenizer_golden.json")).unwrap();
    let golden: Value = serde_json::from_str(&golden).unwrap();
    let tokenizer = Tokenizer::load(&folder).unwrap();
    assert_eq!(tokenizer.size() as u64, golden["vocab_size"]);

    let samples = golden["samples"].as_array().unwrap();
    assert!(!samples.is_empty());
    for sample in samples {
        let text = sample["text"].as_str().unwrap();
        let ids = tokenizer.encode(text).unwrap();
        assert_eq!(json!(ids), sample["ids"], "{text}");
        assert_eq!(
            json!(tokenizer.encode_bare(text).unwrap()),
            sample["ids_no_special"],
            "{text}"
        );
        let tokens: Vec<String> = ids.iter().map(|&id| tokenizer.token(id).unwrap()).collect();
        assert_eq!(json!(tokens), sample["tokens"], "{text}");
        assert_eq!(
            tokenizer.decode(&ids).unwrap(),
            sample["decode_skip_special"]
        );
        assert_eq!(
            tokenizer.decode_with_special(&ids).unwrap(),
            sample["decode"]
        );
        assert_eq!(
            stream(tokenizer.stream(), &ids),
            sample["decode_skip_special"]
        );
        assert_eq!(
            stream(tokenizer.stream_with_special(), &ids),
            sample["decode"]
        );
    }
    println!("{} texts", samples.len());
}
