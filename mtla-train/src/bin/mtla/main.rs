//! The `mtla` command: continue text with a Llama, convert one to latent attention, look at one.

#![allow(
    rustdoc::broken_intra_doc_links,
    reason = "comments on arguments are the text of --help, where brackets are no links"
)]

mod calibration;
mod convert;
mod generate;
mod info;
mod output;
mod sampling;
mod text;

use std::{io, process::ExitCode};

use clap::{Parser, Subcommand};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Llamas with dense, latent (MLA) and temporal latent attention (MTLA): continue text, convert, look inside.
///
/// A MODEL is a directory as Hugging Face lays it out (config.json, safetensors, tokenizer.json), or
/// hub:owner/name[@revision], which is downloaded once and kept in the cache that Python's programs use.
#[derive(Debug, Parser)]
#[command(version, name = "mtla", after_help = EXAMPLES)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  mtla info models/llama
  mtla generate models/llama --prompt 'Once upon a time' --stream
  mtla convert models/llama models/llama-mtla --text book.txt
  mtla generate --help";

#[derive(Debug, Subcommand)]
enum Command {
    /// Continue prompts: greedy search, sampling or beam search.
    Generate(Box<generate::Generate>),
    /// Turn the dense attention of a Llama into MLA or MTLA.
    Convert(convert::Convert),
    /// Say what a model is and what its cache costs.
    Info(info::Info),
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Generate(command) => command.run(),
        Command::Convert(command) => command.run(),
        Command::Info(command) => command.run(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", explain(&error));
            ExitCode::FAILURE
        }
    }
}

/// Whether whoever read the output has had enough of it.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let error = error.downcast_ref::<io::Error>();
    error.is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// The error and what is behind it, each once: some say themselves what is behind them.
fn explain(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}
