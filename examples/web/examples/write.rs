//! Lets a model of the page write natively: what its tests compare a browser with.
//!
//! ```text
//! cargo run --release -p mtla-web --example write -- examples/web/models/mtla "Mia took the ring." 40
//! ```
//!
//! Prints the most probable tokens as a JSON list.

use std::{fs, path::PathBuf};

use anyhow::Context;
use burn::tensor::try_read_sync;
use burn_flex::Flex;
use mtla_web::writer::{Files, Options, Writer};

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let usage = "usage: write FOLDER PROMPT TOKENS";
    let folder: PathBuf = arguments.next().context(usage)?.into();
    let prompt = arguments.next().context(usage)?;
    let max_new_tokens = arguments.next().context(usage)?.parse().context(usage)?;

    let read = |name: &str| {
        let path = folder.join(name);
        fs::read(&path).with_context(|| format!("cannot read {}", path.display()))
    };
    let files = Files {
        config: read("decoder.json")?,
        weights: read("model.safetensors")?,
        tokenizer: read("tokenizer.json")?,
    };
    let mut writer = Writer::<Flex>::new(files, &Default::default())?;
    let options = Options {
        max_new_tokens,
        temperature: 0.0,
        top_p: 1.0,
        seed: 0,
        observe: false,
    };
    writer.start(&prompt, &options)?;
    let mut tokens = Vec::new();
    while let Some(step) = try_read_sync(writer.advance()).context("a CPU answers at once")?? {
        tokens.push(step.token);
    }
    println!("{}", serde_json::to_string(&tokens)?);
    Ok(())
}
