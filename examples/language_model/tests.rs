//! Runs of the whole program on a little text.

use std::{fs, path::Path};

use clap::{CommandFactory, Parser};
use tempfile::TempDir;

use super::*;

const TEXT: &str = "The ferry leaves at seven, and the bell rings twice before it does. ";

/// A folder with a text, and a Llama and another run to start from.
fn folder() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("text.txt"), TEXT.repeat(60)).unwrap();
    for (name, form) in [("llama", &["--llama"][..]), ("plain", &[])] {
        let sizes = ["--layers", "1", "--d-model", "16", "--heads", "2"];
        train(folder.path(), name, &[&sizes[..], form].concat()).unwrap();
    }
    folder
}

/// Two steps on the text in the run directory `name`.
fn train(folder: &Path, name: &str, more: &[&str]) -> anyhow::Result<()> {
    let path = |name: &str| folder.join(name).display().to_string();
    let (text, directory) = (path("text.txt"), path(name));
    let common = [
        "language_model",
        "--data",
        &text,
        "--run",
        &directory,
        "--quiet",
        "--steps",
        "2",
        "--max-new-tokens",
        "2",
    ];
    run(Arguments::try_parse_from([&common[..], more].concat())?)
}

#[test]
fn arguments_do_not_clash() {
    Arguments::command().debug_assert();
}

#[test]
fn a_run_keeps_what_it_started_from() {
    let folder = folder();
    let path = |name: &str| folder.path().join(name).display().to_string();
    for (source, other) in [("llama", "plain"), ("plain", "llama")] {
        let (source, other) = (path(source), path(other));
        let tune = |more: &[&str]| train(folder.path(), &format!("{source}-tuned"), more);
        tune(&["--init", &source]).unwrap();
        // Again, with a slash at the end, and without it.
        tune(&["--init", &format!("{source}/")]).unwrap();
        tune(&[]).unwrap();

        let error = tune(&["--init", &other]).unwrap_err().to_string();
        let told = format!("model.init: {source:?} then, {other:?} now");
        assert!(error.contains(&told), "{error}");
        let error = tune(&["--heads", "4"]).unwrap_err().to_string();
        assert!(
            error.contains("--heads") && error.contains(&source),
            "{error}"
        );
        let error = train(folder.path(), &other, &["--init", &source]);
        let error = error.unwrap_err().to_string();
        assert!(error.contains("model.init: null then"), "{error}");
    }
}

#[test]
fn a_file_of_settings_may_name_what_to_start_from() {
    let folder = folder();
    let (source, file) = (folder.path().join("llama"), folder.path().join("a.toml"));
    let source = source.to_str().unwrap();
    let arguments = ["language_model", "--init", source, "--dropout", "0.25"];
    let (mut settings, _) = Arguments::parse_from(arguments).settings().unwrap();
    settings.trainer.learning_rate.peak = 5e-4;
    let write = |settings: &Settings| fs::write(&file, toml::to_string(settings).unwrap()).unwrap();
    write(&settings);
    let read = Arguments::parse_from(["language_model", "--config", file.to_str().unwrap()]);
    let (again, init) = read.settings().unwrap();
    assert_eq!(again, settings);
    assert!(init.is_some());

    settings.model.n_layers += 1;
    write(&settings);
    let error = read.settings().err().unwrap().to_string();
    assert!(
        error.contains("is not that of") && error.contains(source),
        "{error}"
    );
}

#[test]
fn sampling_is_checked_before_anything_else() {
    let folder = tempfile::tempdir().unwrap();
    for (flag, part) in [
        ("--temperature=-1", "temperature is -1"),
        ("--temperature=NaN", "temperature is NaN"),
        ("--top-p=1.5", "top_p is 1.5"),
        ("--max-new-tokens=0", "max_new_tokens is 0"),
    ] {
        let directory = folder.path().join("run").display().to_string();
        let arguments = [
            "language_model",
            "--data",
            "nowhere",
            "--run",
            &directory,
            flag,
        ];
        let error = run(Arguments::parse_from(arguments)).unwrap_err();
        assert!(error.to_string().contains(part), "{error}");
        assert!(!folder.path().join("run").exists());
    }
}
