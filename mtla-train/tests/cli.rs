//! The `mtla` command on a small random Llama: what it prints, writes and refuses.

#![cfg(feature = "flex")]

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use burn::{
    module::Module,
    tensor::{Int, Tensor, TensorData, activation::log_softmax, backend::Backend},
};
use burn_flex::{Flex, FlexDevice};
use mtla_models::{
    decoder::DecoderInput,
    llama::{Llama, LlamaConfig},
    tokenizer::Tokenizer,
};
use serde_json::{Value, json};
use tempfile::TempDir;

const TOKENIZER: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../mtla-models/tests/fixtures/llama_mtla/tokenizer"
);
const VOCABULARY: usize = 300;

fn config(vocab_size: usize) -> LlamaConfig {
    LlamaConfig {
        vocab_size,
        hidden_size: 32,
        intermediate_size: 48,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: Some(2),
        max_position_embeddings: 64,
        other: json!({ "bos_token_id": 1, "eos_token_id": 2 })
            .as_object()
            .unwrap()
            .clone(),
        ..LlamaConfig::default()
    }
}

/// A folder with a model, its tokenizer, and room for other files.
struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        Self::of(&config(VOCABULARY))
    }

    fn of(config: &LlamaConfig) -> Self {
        let folder = Self(tempfile::tempdir().unwrap());
        Flex::seed(&FlexDevice, 3);
        let llama = Llama::<Flex>::new(config.clone(), &FlexDevice).unwrap();
        llama.save_pretrained(folder.path("model")).unwrap();
        for name in ["tokenizer.json", "tokenizer_config.json"] {
            fs::copy(
                Path::new(TOKENIZER).join(name),
                folder.path("model").join(name),
            )
            .unwrap();
        }
        folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, contents: &[u8]) {
        fs::write(self.path(name), contents).unwrap();
    }

    /// Runs `mtla` in the folder.
    fn run(&self, arguments: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_mtla"))
            .args(arguments)
            .current_dir(self.0.path())
            .output()
            .unwrap()
    }

    /// What `mtla` prints if all goes well.
    fn text(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {error}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs `mtla` where it has to fail with this code and these words, and to write nothing.
    fn refuse(&self, arguments: &str, code: i32, parts: &[&str]) {
        let output = self.run(&arguments.split_whitespace().collect::<Vec<_>>());
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{arguments}: {error}");
        for part in parts {
            assert!(error.contains(part), "{part:?} in {error} of {arguments}");
        }
        assert!(!self.path("out").exists() && !self.path("out.tmp").exists());
    }

    /// The lines of JSON of `mtla generate`.
    fn lines(&self, arguments: &[&str]) -> Vec<Value> {
        let all = [&["generate", "model", "--json"], arguments].concat();
        let text = self.text(&all);
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }
}

#[test]
fn greedy_text_is_the_same_again_and_streamed() {
    let folder = Folder::new();
    let common = ["generate", "model", "--max-new-tokens", "12"];
    for prompts in [
        &["--prompt", "The ferry leaves"][..],
        &["--prompt", "The ferry", "-p", "é 🙂", "--num-beams", "2"],
    ] {
        let arguments = [&common, prompts].concat();
        let first = folder.text(&arguments);
        assert!(first.trim().len() > 3, "{first:?}");
        assert_eq!(folder.text(&arguments), first);
        assert_eq!(
            folder.text(&[&arguments[..], &["--stream"]].concat()),
            first
        );
    }
}

#[test]
fn a_last_line_tells_speed_and_cache() {
    let folder = Folder::new();
    let output = folder.run(&[
        "generate",
        "model",
        "-p",
        "a",
        "--max-new-tokens",
        "3",
        "--bad-words",
        "</s>",
    ]);
    let error = String::from_utf8(output.stderr).unwrap();
    let last = error.lines().last().unwrap();
    assert!(last.contains("decoding 2 tokens"), "{last}");
    // Two layers, keys and values of two heads, 4 bytes: 256 a token, and the last token never enters.
    let prompt: usize = last.split(' ').nth(1).unwrap().parse().unwrap();
    let cache: usize = (prompt + 2) * 256;
    let told = last.rsplit_once("cache ").unwrap().1;
    assert_eq!(told, mtla_train::measure::bytes(cache as f64));
}

#[test]
fn samples_as_json_with_log_probabilities() {
    let folder = Folder::new();
    folder.write("prompts.txt", "The ferry\r\nleaves at\n".as_bytes());
    let arguments = [
        "--prompt-file",
        "prompts.txt",
        "--temperature",
        "0.9",
        "--top-k",
        "0",
        "--seed",
        "7",
        "--num-return-sequences",
        "2",
        "--max-new-tokens",
        "6",
        "--log-probs",
        "3",
    ];
    let lines = folder.lines(&arguments);
    let places: Vec<_> = lines
        .iter()
        .map(|line| (line["prompt"].as_u64(), line["sequence"].as_u64()))
        .collect();
    let place = |prompt, sequence| (Some(prompt), Some(sequence));
    assert_eq!(places, [place(0, 0), place(0, 1), place(1, 0), place(1, 1)]);
    for line in &lines {
        let tokens = line["tokens"].as_array().unwrap();
        let log_probabilities = line["log_probabilities"].as_array().unwrap();
        assert_eq!(tokens.len(), log_probabilities.len());
        for (token, place) in tokens.iter().zip(log_probabilities) {
            let chosen = place["chosen"].as_f64().unwrap();
            let top = place["top"].as_array().unwrap();
            let logs: Vec<f64> = top
                .iter()
                .map(|one| one["log_probability"].as_f64().unwrap())
                .collect();
            assert_eq!(logs.len(), 3);
            assert!(
                logs.iter()
                    .chain([&chosen])
                    .all(|x| x.is_finite() && *x < 0.0)
            );
            assert!(logs.is_sorted_by(|a, b| a >= b), "{logs:?}");
            assert!(logs.iter().map(|x| x.exp()).sum::<f64>() < 1.0);
            match top.iter().find(|one| one["token"] == *token) {
                Some(one) => assert_eq!(place["chosen"], one["log_probability"]),
                None => assert!(chosen <= logs[2]),
            }
        }
        assert!(line["text"].is_string() && line["reason"].is_string());
    }
    assert_ne!(lines[0]["tokens"], lines[1]["tokens"]);
    // In parts it is what it is at once.
    let parts = folder.lines(&[&arguments[..], &["--batch-size", "1"]].concat());
    assert_eq!(parts.len(), 4);
    for (part, line) in parts.iter().zip(&lines) {
        assert_eq!(part["tokens"], line["tokens"]);
    }
}

#[test]
fn log_probabilities_are_those_of_the_model() {
    let folder = Folder::new();
    let line = &folder.lines(&[
        "-p",
        "The ferry",
        "--max-new-tokens",
        "1",
        "--log-probs",
        "4",
    ])[0];
    let top = line["log_probabilities"][0]["top"].as_array().unwrap();

    let prompt = Tokenizer::load(folder.path("model")).unwrap();
    let prompt = prompt.encode("The ferry").unwrap();
    let ids = TensorData::new(prompt.clone(), [1, prompt.len()]);
    let ids = Tensor::<Flex, 2, Int>::from_data(ids, &FlexDevice);
    let llama = Llama::<Flex>::from_pretrained(folder.path("model"), &FlexDevice).unwrap();
    let logits = llama.decoder.forward(DecoderInput::new(ids));
    let logs = log_softmax(logits, 2).into_data().to_vec::<f32>().unwrap();
    let last = &logs[logs.len() - VOCABULARY..];
    let mut order: Vec<usize> = (0..VOCABULARY).collect();
    order.sort_by(|a, b| last[*b].total_cmp(&last[*a]));

    assert_eq!(top.len(), 4);
    for (one, token) in top.iter().zip(order) {
        assert_eq!(one["token"], token);
        let told = one["log_probability"].as_f64().unwrap();
        assert!((told - f64::from(last[token])).abs() < 1e-4, "{told}");
    }
    assert_eq!(line["tokens"][0], top[0]["token"]);
    assert_eq!(
        line["log_probabilities"][0]["chosen"],
        top[0]["log_probability"]
    );
}

#[test]
fn beams_come_with_scores_the_best_one_first() {
    let folder = Folder::new();
    let lines = folder.lines(&[
        "-p",
        "The ferry",
        "--num-beams",
        "3",
        "--num-return-sequences",
        "3",
        "--max-new-tokens",
        "5",
        "--early-stopping",
        "never",
        "--length-penalty",
        "-0.5",
        "--log-probs",
    ]);
    let scores: Vec<f64> = lines
        .iter()
        .map(|line| line["score"].as_f64().unwrap())
        .collect();
    assert_eq!(scores.len(), 3);
    assert!(scores.iter().all(|x| x.is_finite() && *x < 0.0));
    // The best one is first, and no two are one text.
    assert!(scores.is_sorted_by(|a, b| a > b), "{scores:?}");
    for (line, score) in lines.iter().zip(scores) {
        let places = line["log_probabilities"].as_array().unwrap();
        let sum: f64 = places
            .iter()
            .map(|place| place["chosen"].as_f64().unwrap())
            .sum();
        let expected = sum / (places.len() as f64).powf(-0.5);
        assert!((score - expected).abs() < 1e-4, "{score} {expected}");
    }
}

#[test]
fn the_checkpoint_has_defaults_and_flags_go_before_them() {
    let folder = Folder::new();
    let defaults = r#"{"max_new_tokens": 4, "do_sample": true, "suppress_tokens": [2]}"#;
    folder.write("model/generation_config.json", defaults.as_bytes());
    let tokens = |arguments: &[&str]| folder.lines(arguments)[0]["tokens"].clone();
    let sampled = tokens(&["-p", "a"]);
    assert_eq!(sampled.as_array().unwrap().len(), 4);
    assert_ne!(sampled, tokens(&["-p", "a", "--seed", "1"]));
    assert_eq!(
        tokens(&["-p", "a", "--greedy"]),
        tokens(&["-p", "a", "--greedy", "--seed", "1"])
    );
    let three = tokens(&["-p", "a", "--max-new-tokens", "3"]);
    assert_eq!(three.as_array().unwrap().len(), 3);
}

#[test]
fn a_stop_string_ends_the_text_with_the_token_that_completes_it() {
    let folder = Folder::new();
    let arguments = ["-p", "a", "--greedy", "--max-new-tokens", "9", "--stop"];
    let whole = folder.lines(&arguments[..5]);
    let text = whole[0]["text"].as_str().unwrap();
    let end = text.chars().skip(1).find(char::is_ascii_graphic);
    let end = end.unwrap().to_string();
    let stops = ["never seen", "--stop", &end];
    let stopped = &folder.lines(&[&arguments[..], &stops].concat())[0];
    assert_eq!(stopped["reason"], "stop_string");
    let tokens = stopped["tokens"].as_array().unwrap();
    let before = &whole[0]["tokens"].as_array().unwrap()[..tokens.len()];
    assert_eq!(tokens, before);
    let stopped = stopped["text"].as_str().unwrap();
    assert!(text.starts_with(stopped) && stopped.contains(&end));
    let tokenizer = Tokenizer::load(folder.path("model")).unwrap();
    let ids = |values: &[Value]| -> Vec<u32> {
        let ids = values.iter().map(|id| id.as_u64().unwrap() as u32);
        ids.collect()
    };
    let earlier = tokenizer.decode(&ids(&tokens[..tokens.len() - 1])).unwrap();
    assert!(!earlier.contains(&end), "{earlier:?}");

    // They take the place of the checkpoint's.
    let defaults = json!({ "stop_strings": [end] }).to_string();
    folder.write("model/generation_config.json", defaults.as_bytes());
    assert_eq!(folder.lines(&arguments[..5])[0]["reason"], "stop_string");
    let other = folder.lines(&[&arguments[..], &["never seen"]].concat());
    assert_eq!(other[0]["tokens"], whole[0]["tokens"]);
}

#[test]
fn a_chat_goes_through_the_template() {
    let folder = Folder::new();
    let template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:";
    folder.write("model/chat_template.jinja", template.as_bytes());
    let common = ["--max-new-tokens", "5", "--greedy"];
    let chat = ["-p", "Hello", "--chat", "--system", "Be brief."];
    let chat = folder.lines(&[&common[..], &chat].concat());
    let text = ["-p", "system: Be brief.\nuser: Hello\nassistant:"];
    let text = folder.lines(&[&common[..], &text].concat());
    assert_eq!(chat[0]["tokens"], text[0]["tokens"]);
}

/// The report of a conversion into `mtla`, as it is kept and as a table.
fn check_report(folder: &Folder, table: &str) {
    assert_eq!(table.lines().count(), 5, "{table}");
    let kept = fs::read_to_string(folder.path("mtla/conversion.json")).unwrap();
    let kept: Value = serde_json::from_str(&kept).unwrap();
    assert_eq!(kept["conversion"]["kv_lora_rank"], 16);
    assert_eq!(kept["conversion"]["down_rate"], 2);
    let divergence = kept["report"]["divergence"].as_f64().unwrap();
    assert!(divergence > 0.0 && divergence < 1.5, "{divergence}");
    let layers = kept["report"]["layers"].as_array().unwrap();
    assert_eq!(layers.len(), 2);
    for (number, layer) in layers.iter().enumerate() {
        let errors = ["keys", "values", "attention"].map(|name| layer[name].as_f64().unwrap());
        assert!(
            errors.iter().all(|x| (0.0..1.5).contains(x) && *x > 0.0),
            "{errors:?}"
        );
        let [keys, values, attention] = errors;
        let line = format!("{number:>5} {keys:>9.4} {values:>9.4} {attention:>9.4}");
        assert_eq!(table.lines().nth(2 + number), Some(&line[..]));
    }
    assert!(
        table.contains(&format!("{divergence:.4} nats a token")),
        "{table}"
    );
    assert!(kept["made_with"]["versions"]["burn"].is_string());
    assert!(!folder.path("mtla.tmp").exists());
}

#[test]
fn a_converted_model_generates() {
    let folder = Folder::new();
    folder.write(
        "text.txt",
        "The ferry leaves at seven. ".repeat(40).as_bytes(),
    );
    let of_text = [
        "convert",
        "model",
        "mtla",
        "--text",
        "text.txt",
        "--kv-lora-rank",
        "16",
    ];
    check_report(&folder, &folder.text(&of_text));

    // What is there is not lost, unless that is asked for.
    let refused = folder.run(&of_text);
    assert_eq!(refused.status.code(), Some(1));
    let error = String::from_utf8(refused.stderr).unwrap();
    assert!(
        error.contains("mtla is not empty") && error.contains("--force"),
        "{error}"
    );
    folder.text(
        &[
            &of_text[..],
            &["--force", "--down-rate", "3", "--dtype", "bf16"],
        ]
        .concat(),
    );

    let own = [
        "convert",
        "model",
        "mla",
        "--attention",
        "mla",
        "--tokens",
        "128",
        "--seed",
        "5",
    ];
    folder.text(&own);
    for (name, attention) in [
        ("mtla", "mtla, 4 heads, 3 tokens a slot"),
        ("mla", "mla, 4 heads"),
    ] {
        let info = folder.text(&["info", name]);
        assert!(info.contains(attention), "{info}");
        assert!(info.contains("300 tokens"), "{info}");
        let text = folder.text(&["generate", name, "-p", "The ferry", "--max-new-tokens", "5"]);
        assert!(!text.trim().is_empty());
    }
    assert!(folder.text(&["info", "mtla"]).contains("bf16,"));
}

#[test]
fn a_converted_model_is_written_even_if_nobody_reads_the_table() {
    let folder = Folder::new();
    let mut child = Command::new(env!("CARGO_BIN_EXE_mtla"))
        .args(["convert", "model", "out", "--tokens", "128"])
        .current_dir(folder.0.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    assert!(child.wait().unwrap().success());
    assert!(folder.path("out/conversion.json").exists());
    folder.text(&["generate", "out", "-p", "a", "--max-new-tokens", "2"]);
}

#[test]
fn nothing_is_left_of_a_model_that_is_replaced() {
    let folder = Folder::new();
    fs::create_dir(folder.path("out")).unwrap();
    for name in [
        "chat_template.jinja",
        "added_tokens.json",
        "special_tokens_map.json",
        "generation_config.json",
        "notes.txt",
    ] {
        folder.write(&format!("out/{name}"), b"{}");
    }
    folder.text(&["convert", "model", "out", "--force", "--tokens", "128"]);
    let mut names: Vec<_> = fs::read_dir(folder.path("out"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    names.sort();
    let expected = [
        "config.json",
        "conversion.json",
        "model.safetensors",
        "notes.txt",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    assert_eq!(names, expected);
}

#[test]
fn info_tells_what_a_model_is() {
    let folder = Folder::new();
    let info = folder.text(&["info", "model"]);
    let llama = Llama::<Flex>::from_pretrained(folder.path("model"), &FlexDevice).unwrap();
    let parameters = llama.decoder.num_params();
    let weights = mtla_train::measure::bytes(4.0 * parameters as f64);
    for line in [
        &format!("parameters            {parameters}")[..],
        &format!("weights               f32, {weights}"),
        "tokenizer             300 tokens",
        "model type            llama",
        "attention             gqa, 4 heads, keys and values of 2",
        "layers                2",
        "cache, bytes a token  256 (f32), 128 (f16, bf16)",
        "context length        64",
    ] {
        assert!(info.lines().any(|found| found == line), "{line} in {info}");
    }
}

#[test]
fn generation_that_cannot_work_is_told() {
    let folder = Folder::new();
    folder.write("bad.txt", b"first\nsecond \xff");
    folder.write("empty.txt", b"");
    let refuse = |more: &str, code, parts: &[&str]| {
        folder.refuse(&format!("generate model {more}"), code, parts);
    };
    refuse("", 2, &["--prompt"]);
    let bad = ["bad.txt", "byte 13", "line 2"];
    refuse("--prompt-file bad.txt", 1, &bad);
    refuse("--prompt-file empty.txt", 1, &["empty.txt is empty"]);
    refuse("--prompt-file gone.txt", 1, &["gone.txt cannot be read"]);
    refuse("-p a --temperature 0", 2, &["--temperature", "--greedy"]);
    refuse("-p a --temperature -1", 2, &["positive number"]);
    refuse("-p a --top-p 1.5", 1, &["top_p is 1.5"]);
    refuse("-p a --chat", 1, &["no chat template"]);
    refuse("-p a --log-probs", 2, &["--json"]);
    refuse("-p a --batch-size 0", 2, &["--batch-size"]);
    refuse("-p a --num-beams 2 --top-k 5", 1, &["num_beams is 2"]);
    let two = "-p a --num-return-sequences 2";
    refuse(two, 1, &["num_return_sequences is 2"]);
    refuse(&format!("{two} --top-k 5 --stream"), 1, &["--stream"]);
    let nowhere = ["nowhere is no directory", "hub:"];
    folder.refuse("generate nowhere -p a", 1, &nowhere);
    folder.refuse("info nowhere", 1, &nowhere);

    // Before any weights are read.
    folder.write("model/model.safetensors", b"damaged");
    refuse("-p a --top-p 1.5", 1, &["top_p is 1.5"]);
    refuse("-p a --chat", 1, &["no chat template"]);
    refuse("-p a", 1, &["not a whole safetensors file"]);
    folder.write("model/generation_config.json", br#"{"top_k": "x"}"#);
    refuse("-p a", 1, &["generation_config.json cannot be understood"]);

    let bare = Folder::new();
    fs::remove_file(bare.path("model/tokenizer.json")).unwrap();
    bare.refuse("generate model -p a", 1, &["tokenizer.json cannot be read"]);
    let small = Folder::of(&config(100));
    small.refuse("generate model -p a", 1, &["tokenizer.json", "id 100"]);
}

#[test]
fn conversion_that_cannot_work_is_told() {
    let folder = Folder::new();
    folder.write("bad.txt", b"\xff");
    folder.write("short.txt", b"Too short.");
    let refuse = |more: &str, code, parts: &[&str]| {
        folder.refuse(&format!("convert model {more}"), code, parts);
    };
    refuse("out --text short.txt", 1, &["short.txt has", "too few"]);
    refuse("out --text bad.txt", 1, &["bad.txt is not UTF-8"]);
    refuse("out --kv-lora-rank 99", 1, &["kv_lora_rank is 99"]);
    refuse("out --rope-dim 3", 1, &["qk_rope_head_dim is 3"]);
    refuse("out --attention mla --down-rate 2", 2, &["--down-rate"]);
    refuse("out --tokens 20", 1, &["--tokens is 20"]);
    refuse("model --force", 1, &["model is the model itself"]);
    for place in [".", "..", "model/..", "/"] {
        let told = [&format!("{place} is no name for a new directory")[..]];
        refuse(&format!("{place} --force"), 1, &told);
    }
    refuse("short.txt", 1, &["short.txt is not a directory"]);

    let biased = Folder::of(&LlamaConfig {
        attention_bias: true,
        ..config(VOCABULARY)
    });
    let parts = ["config.json", "attention_bias"];
    biased.refuse("convert model out", 1, &parts);
}

#[test]
fn help_has_examples() {
    let folder = Folder(tempfile::tempdir().unwrap());
    for command in ["generate", "convert", "info"] {
        let help = folder.text(&[command, "--help"]);
        assert!(
            help.contains(&format!("Examples:\n  mtla {command}")),
            "{help}"
        );
    }
}
