//! The tokenizer of a model directory: streaming, chats, and files that are wrong or mean harm.

#![cfg(feature = "tokenizer")]

use mtla_models::tokenizer::{Chat, Message, TextStream, Tokenizer, TokenizerError};
use serde_json::{Value, json};
use std::fs;
use tempfile::TempDir;

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures");

fn fixture(name: &str) -> String {
    fs::read_to_string(format!("{FIXTURES}/llama_mtla/tokenizer/{name}")).unwrap()
}

fn fixture_json(name: &str) -> Value {
    serde_json::from_str(&fixture(name)).unwrap()
}

/// A directory with the fixture's vocabulary and further files.
fn directory(files: &[(&str, &str)]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let vocabulary = [("tokenizer.json", &*fixture("tokenizer.json"))];
    for (name, text) in vocabulary.iter().chain(files) {
        fs::write(folder.path().join(name), text).unwrap();
    }
    folder
}

fn load(files: &[(&str, &str)]) -> Result<Tokenizer, TokenizerError> {
    Tokenizer::load(directory(files).path())
}

fn with_template(template: &str) -> Tokenizer {
    let config = fixture("tokenizer_config.json");
    load(&[
        ("tokenizer_config.json", &config),
        ("chat_template.jinja", template),
    ])
    .unwrap()
}

fn stream(mut stream: TextStream<'_>, ids: &[u32]) -> String {
    let mut text: String = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
    text += &stream.finish().unwrap();
    text
}

#[test]
fn tokens_with_a_role_are_known() {
    let config = fixture("tokenizer_config.json");
    let tokenizer = load(&[("tokenizer_config.json", &config)]).unwrap();
    assert_eq!(
        (tokenizer.bos(), tokenizer.eos(), tokenizer.pad()),
        (Some(1), Some(2), Some(0))
    );

    // Older files have the roles in a file of their own.
    let map = fixture("special_tokens_map.json");
    let tokenizer = load(&[("special_tokens_map.json", &map)]).unwrap();
    assert_eq!(
        (tokenizer.bos(), tokenizer.eos(), tokenizer.pad()),
        (Some(1), Some(2), Some(0))
    );

    let tokenizer = load(&[]).unwrap();
    assert_eq!(
        (tokenizer.bos(), tokenizer.eos(), tokenizer.pad()),
        (None, None, None)
    );
}

#[test]
fn tokens_that_only_the_configuration_names_are_added_and_special() {
    let mut config = fixture_json("tokenizer_config.json");
    config["pad_token"] = json!({"content": "<|filler|>", "lstrip": false, "rstrip": false});
    config["additional_special_tokens"] = json!(["<|end|>"]);
    let tokenizer = load(&[("tokenizer_config.json", &config.to_string())]).unwrap();
    assert_eq!(tokenizer.pad(), Some(300));
    assert_eq!(
        tokenizer.encode_bare("a<|filler|><|end|>").unwrap()[1..],
        [300, 301]
    );
    assert_eq!(tokenizer.decode(&[300, 301]).unwrap(), "");
    let error = tokenizer.fits(300).unwrap_err().to_string();
    assert!(
        error.contains("<|filler|>") && error.contains("301"),
        "{error}"
    );
    assert!(tokenizer.fits(302).is_ok());
}

#[test]
fn families_that_decide_what_stands_around_a_text_do() {
    for (bos, eos) in [(true, true), (true, false), (false, true), (false, false)] {
        let mut config = fixture_json("tokenizer_config.json");
        config["tokenizer_class"] = json!("LlamaTokenizerFast");
        config["add_bos_token"] = json!(bos);
        config["add_eos_token"] = json!(eos);
        let tokenizer = load(&[("tokenizer_config.json", &config.to_string())]).unwrap();
        let ids = tokenizer.encode("a").unwrap();
        assert_eq!(ids.first() == Some(&1), bos);
        assert_eq!(ids.last() == Some(&2), eos);
    }
}

#[test]
fn spaces_are_cleaned_up_where_the_configuration_says_so() {
    let text = "Yes , it 's done .";
    for (clean_up, expected) in [(true, "Yes, it's done."), (false, text)] {
        let mut config = fixture_json("tokenizer_config.json");
        config["clean_up_tokenization_spaces"] = json!(clean_up);
        let tokenizer = load(&[("tokenizer_config.json", &config.to_string())]).unwrap();
        let ids = tokenizer.encode(text).unwrap();
        assert_eq!(tokenizer.decode(&ids).unwrap(), expected);
    }
}

#[test]
fn the_file_does_not_pad_or_cut_texts() {
    let mut vocabulary = fixture_json("tokenizer.json");
    vocabulary["padding"] = json!({
        "strategy": {"Fixed": 1_000_000_000_000_u64}, "direction": "Right", "pad_to_multiple_of": null,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>",
    });
    vocabulary["truncation"] = json!({
        "direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0,
    });
    let tokenizer = load(&[("tokenizer.json", &vocabulary.to_string())]).unwrap();
    let plain = load(&[]).unwrap();
    let text = "The ferry leaves at seven.";
    assert_eq!(tokenizer.encode(text).unwrap(), plain.encode(text).unwrap());
}

#[test]
fn streams_show_any_bytes_as_the_whole_text_does() {
    let tokenizer = load(&[]).unwrap();
    let mut state = 7_u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 16) % 310
    };
    for length in (0..400).map(|case| case % 120) {
        // Mostly bytes that are no text, some special tokens and some ids without a token.
        let ids: Vec<u32> = (0..length).map(|_| next()).collect();
        assert_eq!(
            stream(tokenizer.stream(), &ids),
            tokenizer.decode(&ids).unwrap(),
            "{ids:?}"
        );
        let whole = tokenizer.decode_with_special(&ids).unwrap();
        assert_eq!(
            stream(tokenizer.stream_with_special(), &ids),
            whole,
            "{ids:?}"
        );
    }
}

#[test]
fn streams_go_on_after_a_prompt() {
    let tokenizer = load(&[]).unwrap();
    let whole = "The ferry leaves, then é and 🙂 and the boat.";
    let ids = tokenizer.encode(whole).unwrap();
    for (prompt, text) in (0..ids.len()).map(|place| ids.split_at(place)) {
        let shown = stream(tokenizer.stream().after(prompt).unwrap(), text);
        assert!(whole.ends_with(&shown), "{shown} after {prompt:?}");
        let prompt = tokenizer.decode(prompt).unwrap();
        let prompt = prompt.trim_end_matches(char::REPLACEMENT_CHARACTER);
        assert_eq!(format!("{prompt}{shown}"), whole);
    }
}

#[test]
fn streams_end_where_bytes_never_become_text() {
    let tokenizer = load(&[]).unwrap();
    let byte = tokenizer.encode_bare("猫").unwrap()[0];
    let mut stream = tokenizer.stream();
    let shown: String = (0..1000).map(|_| stream.push(byte).unwrap()).collect();
    assert!(shown.chars().count() > 900);
    assert!(shown.chars().all(|c| c == char::REPLACEMENT_CHARACTER));
}

#[test]
fn chats_are_written_by_the_template() {
    // The layout of most: trimmed blocks, python's methods and slices, loop variables, json of tools.
    let template = r#"{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'].strip() %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{{- bos_token }}
{%- if system %}
{{- '<<' + system.upper() + '>>\n' }}
{%- endif %}
{%- if tools is not none %}
    {%- for tool in tools %}
        {{- tool | tojson }}
        {{- "\n" }}
        {{- tool | tojson(indent=2) }}
    {%- endfor %}
{%- endif %}
{% for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('roles must alternate') }}
    {% endif %}
    {% generation %}
{{ message.role.title() }}: {{ message.content.split('|')[-1] | trim }}{{ eos_token if loop.last }}
    {% endgeneration %}
    {% if loop.index > 5 %}{% break %}{% endif %}
{% endfor %}
{% if add_generation_prompt %}
Assistant: {{ thinking }}
{%- endif %}"#;
    let tokenizer = with_template(template);
    let messages = [
        Message::system(" be brief <&> "),
        Message::user("secret| Grüße & 'quotes' "),
        Message::assistant("Hello"),
    ];
    let tools = [json!({"a": [1, true, null], "b": {"ü": "x\n"}, "c": []})];
    let chat = Chat::new(&messages)
        .with_tools(&tools)
        .with("thinking", &true)
        .with_generation_prompt();
    let expected = "<s><<BE BRIEF <&>>>\n\
        {\"a\": [1, true, null], \"b\": {\"ü\": \"x\\n\"}, \"c\": []}\n\
        {\n  \"a\": [\n    1,\n    true,\n    null\n  ],\n  \"b\": {\n    \"ü\": \"x\\n\"\n  },\n  \"c\": []\n}\
        User: Grüße & 'quotes'\nAssistant: Hello</s>\nAssistant: True";
    assert_eq!(tokenizer.render_chat(&chat).unwrap(), expected);
    let ids = tokenizer.encode_chat(&chat).unwrap();
    assert_eq!(
        ids.iter()
            .filter(|&&id| Some(id) == tokenizer.bos())
            .count(),
        1
    );

    let error = tokenizer
        .render_chat(&Chat::new(&messages[2..]))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("roles must alternate") && error.contains("line 20"),
        "{error}"
    );
}

#[test]
fn lists_are_written_as_python_does() {
    let tokenizer = with_template("{{ messages }} {{ tools }} {{ 1.5 }} {{ true }}");
    let messages = [json!({"a": [1, true, null, "it's"], "b": {"c": "x\n'\""}})];
    let written = tokenizer.render_chat(&Chat::new(&messages)).unwrap();
    let expected = r#"[{'a': [1, True, None, "it's"], 'b': {'c': 'x\n\'"'}}] None 1.5 True"#;
    assert_eq!(written, expected);
}

#[test]
fn templates_may_have_names_and_know_the_time() {
    let mut config = fixture_json("tokenizer_config.json");
    config["chat_template"] = json!([
        {"name": "default", "template": "plain {{ strftime_now('%Y') }}"},
        {"name": "tool_use", "template": "tools"},
        {"name": "rag", "template": "{{ documents | length }} documents"},
    ]);
    let tokenizer = load(&[("tokenizer_config.json", &config.to_string())]).unwrap();
    let chat = Chat::new(&[Message::user("?")]);
    let plain = tokenizer.render_chat(&chat).unwrap();
    let year = plain.strip_prefix("plain ").unwrap();
    assert!(year.len() == 4 && year.starts_with("20"), "{plain}");
    let with_tools = chat.clone().with_tools(&[json!({})]);
    assert_eq!(tokenizer.render_chat(&with_tools).unwrap(), "tools");
    let rag = chat.clone().with_template("rag").with("documents", &[1, 2]);
    assert_eq!(tokenizer.render_chat(&rag).unwrap(), "2 documents");
    let error = tokenizer
        .render_chat(&chat.clone().with_template("other"))
        .unwrap_err();
    assert!(error.to_string().contains("`other`"), "{error}");

    let none = load(&[]).unwrap();
    assert!(!none.has_chat_template());
    assert!(matches!(
        none.render_chat(&chat).unwrap_err(),
        TokenizerError::NoChatTemplate { .. }
    ));
}

#[test]
fn templates_that_mean_harm_end_with_an_error() {
    let endless = [
        "{% for i in range(100000) %}{% for j in range(100000) %}x{% endfor %}{% endfor %}",
        "{% macro f(x) %}{{ f(x + 1) }}{% endmacro %}{{ f(0) }}",
        "{% set n = namespace(t='x') %}{% for i in range(64) %}{% set n.t = n.t + n.t %}{% endfor %}{{ n.t }}",
        "{{ 'x' * 1000000000000 }}",
        "{% set n = namespace(a=[1]) %}{% for i in range(64) %}{% set n.a = [n.a, n.a] %}{% endfor %}\
         {{ n.a | tojson }}",
        "{% set n = namespace(a=[1]) %}{% for i in range(64) %}{% set n.a = [n.a, n.a] %}{% endfor %}{{ n.a }}",
        "{% set n = namespace(a=[1]) %}{% for i in range(50) %}{% set n.a = [n.a] %}{% endfor %}\
         {% for i in range(100000) %}{{ n.a | tojson(indent=999999999) }}{% endfor %}",
        "{% set n = namespace(a=[1]) %}{% for i in range(500) %}{% set n.a = [n.a] %}{% endfor %}\
         {{ n.a | tojson }}",
        "{% include 'tokenizer.json' %}",
        "{{ strftime_now('%') }}{{ strftime_now('%!') }}",
        "{{ messages.clear() }}",
        "{% if %}",
        &"{% if true %}".repeat(10_000),
        &format!("{{{{ {} }}}}", "(".repeat(100_000)),
    ];
    for template in endless {
        let start = &template[..template.len().min(80)];
        let tokenizer = with_template(template);
        let error = tokenizer
            .render_chat(&Chat::new(&[Message::user("?")]))
            .expect_err(start);
        assert!(error.to_string().contains("chat_template.jinja"), "{error}");
    }
}

#[test]
fn wrong_files_are_named_with_the_place_in_them() {
    let good = fixture("tokenizer.json");
    let broken = [
        ("tokenizer.json", good[..good.len() / 2].to_owned(), "line"),
        ("tokenizer.json", "{}".to_owned(), "tokenizer.json"),
        ("tokenizer.json", "[".repeat(1_000_000), "recursion limit"),
        (
            "tokenizer.json",
            good.replacen("\"special_tokens\"", "\"specials\"", 1),
            "tokenizer.json",
        ),
        (
            "tokenizer.json",
            good.replace("\"id\": \"<s>\"", "\"id\": \"<t>\""),
            "tokenizer.json",
        ),
        (
            "tokenizer_config.json",
            "{\"bos_token\": 3}".to_owned(),
            "line 1",
        ),
        (
            "tokenizer_config.json",
            "{".repeat(10),
            "tokenizer_config.json",
        ),
        (
            "special_tokens_map.json",
            "[]".to_owned(),
            "special_tokens_map.json",
        ),
    ];
    for (name, text, place) in broken {
        let error = load(&[(name, &text)]).expect_err(place).to_string();
        assert!(error.contains(name) && error.contains(place), "{error}");
    }
    let folder = tempfile::tempdir().unwrap();
    let error = Tokenizer::load(folder.path()).unwrap_err();
    assert!(matches!(error, TokenizerError::Read { .. }));
    let binary = directory(&[]);
    fs::write(binary.path().join("chat_template.jinja"), [0xff, 0xfe]).unwrap();
    let error = Tokenizer::load(binary.path()).unwrap_err().to_string();
    assert!(
        error.contains("chat_template.jinja") && error.contains("UTF-8"),
        "{error}"
    );
}

#[test]
fn damaged_files_never_panic() {
    let good = fixture("tokenizer.json");
    let good = good.trim();
    let mut state = 3_u32;
    let mut next = move |below: usize| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as usize % below
    };
    // Bytes of the part before the long list of pieces are where the harm is.
    let head = good.find("\"vocab\"").unwrap();
    for _ in 0..300 {
        let mut bytes = good.as_bytes().to_vec();
        let alphabet = b"0123456789-\"[]{},:nulltruefalseAB<s>";
        for _ in 0..=next(3) {
            bytes[next(head)] = alphabet[next(alphabet.len())];
        }
        let text = String::from_utf8(bytes).unwrap();
        if let Ok(tokenizer) = load(&[("tokenizer.json", &text)]) {
            let ids = tokenizer.encode("naïve <s> café 日本").unwrap_or_default();
            tokenizer.decode(&ids).ok();
            tokenizer.fits(300).ok();
        }
    }
}
