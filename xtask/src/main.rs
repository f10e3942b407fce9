//! Builds the page in which a model writes, and serves it.
//!
//! ```text
//! cargo xtask web      # into target/page: static files, for any server
//! cargo xtask serve    # shows them at http://localhost:8080
//! ```
//!
//! Besides Rust it needs Node.js with npm, for `wasm-opt` (which makes the program smaller and faster) and the server.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use flate2::{Compression, write::GzEncoder};
use serde_json::json;
use sha2::{Digest, Sha256};
use wasm_bindgen_cli_support::Bindgen;

const TARGET: &str = "wasm32-unknown-unknown";
/// The program and all models may be as large as this, in bytes; the program compressed, as servers send it.
const PROGRAM_LIMIT: usize = 6_000_000;
const MODELS_LIMIT: usize = 8_000_000;
/// What a model's training says of it.
const REPORT: &str = "report.json";
/// The files of a model.
const FILES: [&str; 3] = ["decoder.json", "model.safetensors", "tokenizer.json"];

/// Builds the page in which a model writes, and serves it.
#[derive(Debug, Parser)]
enum Task {
    /// Build the page into `target/page`.
    Web,
    /// Serve `target/page` on this machine.
    Serve {
        /// The port.
        #[arg(long, default_value_t = 8080)]
        port: u16,
    },
}

fn main() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .context("the workspace is one folder up")?;
    let page = Page {
        source: root.join("examples/web"),
        target: std::env::var_os("CARGO_TARGET_DIR")
            .map_or_else(|| root.join("target"), |folder| root.join(folder)),
    };
    match Task::parse() {
        Task::Web => page.build(),
        Task::Serve { port } => page.serve(port),
    }
}

struct Page {
    /// `examples/web`.
    source: PathBuf,
    /// Where cargo builds.
    target: PathBuf,
}

impl Page {
    /// Where the finished page is.
    fn out(&self) -> PathBuf {
        self.target.join("page")
    }

    fn build(&self) -> Result<()> {
        let out = self.out();
        // A page that is half of another is worse than none.
        let fresh = self.target.join("page.unfinished");
        if fresh.exists() {
            fs::remove_dir_all(&fresh)?;
        }
        fs::create_dir_all(&fresh)?;
        self.program(&fresh)?;
        copy(&self.source.join("www"), &fresh)?;
        self.models(&fresh)?;
        if out.exists() {
            fs::remove_dir_all(&out)?;
        }
        fs::rename(&fresh, &out)?;
        println!(
            "the page is in {}; `cargo xtask serve` shows it",
            out.display()
        );
        Ok(())
    }

    /// The program: compiled, with what JavaScript needs to call it, and optimised.
    fn program(&self, out: &Path) -> Result<()> {
        let libdir = Command::new("rustc")
            .args(["--print", "target-libdir", "--target", TARGET])
            .output()
            .context("rustc does not run")?;
        if !Path::new(String::from_utf8_lossy(&libdir.stdout).trim()).exists() {
            run(Command::new("rustup").args(["target", "add", TARGET]))?;
        }
        run(Command::new(env!("CARGO"))
            .args([
                "build",
                "--locked",
                "--package",
                "mtla-web",
                "--target",
                TARGET,
            ])
            .args(["--profile", "web", "--target-dir"])
            .arg(&self.target))?;
        let compiled = self.target.join(TARGET).join("web/mtla_web.wasm");
        Bindgen::new()
            .input_path(compiled)
            .web(true)?
            .typescript(false)
            .remove_name_section(true)
            .generate(out)?;

        self.node_modules()?;
        let program = out.join("mtla_web_bg.wasm");
        let features = [
            "simd",
            "bulk-memory",
            "nontrapping-float-to-int",
            "sign-ext",
        ];
        let features = features.map(|feature| format!("--enable-{feature}"));
        run(Command::new(self.source.join("node_modules/.bin/wasm-opt"))
            .args([
                "-Os",
                "--enable-mutable-globals",
                "--enable-reference-types",
            ])
            .args(["--enable-multivalue"])
            .args(features)
            .arg(&program)
            .arg("-o")
            .arg(&program))?;
        let bytes = fs::read(&program)?;
        let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
        encoder.write_all(&bytes)?;
        let compressed = encoder.finish()?.len();
        println!("program: {} bytes, {compressed} compressed", bytes.len());
        ensure!(
            compressed <= PROGRAM_LIMIT,
            "the program has {compressed} bytes compressed; at most {PROGRAM_LIMIT} are to be downloaded"
        );
        Ok(())
    }

    /// The models, and a list of their files with what they have to hash to.
    fn models(&self, out: &Path) -> Result<()> {
        let (mut list, mut total) = (Vec::new(), 0);
        for name in ["mtla", "mha"] {
            let (from, to) = (self.source.join("models").join(name), out.join(name));
            fs::create_dir_all(&to)?;
            let mut files = Vec::new();
            for file in FILES {
                let path = from.join(file);
                let bytes =
                    fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
                fs::write(to.join(file), &bytes)?;
                total += bytes.len();
                files.push(json!({
                    "path": format!("{name}/{file}"),
                    "bytes": bytes.len(),
                    "sha256": format!("{:x}", Sha256::digest(&bytes)),
                }));
            }
            list.push(json!({ "name": name, "files": files }));
            let report = from.join(REPORT);
            fs::copy(&report, to.join(REPORT))
                .with_context(|| format!("cannot copy {}", report.display()))?;
        }
        println!("models: {total} bytes");
        ensure!(
            total <= MODELS_LIMIT,
            "the models have {total} bytes; at most {MODELS_LIMIT} are to be downloaded"
        );
        fs::write(out.join("models.json"), serde_json::to_vec_pretty(&list)?)?;
        Ok(())
    }

    fn node_modules(&self) -> Result<()> {
        // `npm ci` takes what package-lock.json says and nothing else.
        run(Command::new("npm")
            .args(["ci", "--no-audit", "--no-fund", "--silent"])
            .current_dir(&self.source))
        .context("Node.js with npm is needed: https://nodejs.org")
    }

    fn serve(&self, port: u16) -> Result<()> {
        let out = self.out();
        ensure!(
            out.join("index.html").exists(),
            "there is no page in {}; `cargo xtask web` builds it",
            out.display()
        );
        run(Command::new(self.source.join("node_modules/.bin/sirv"))
            .arg(out)
            .args(["--port", &port.to_string(), "--host", "localhost"]))
    }
}

/// Copies the files of a folder into another one.
fn copy(from: &Path, to: &Path) -> Result<()> {
    for entry in fs::read_dir(from).with_context(|| format!("cannot list {}", from.display()))? {
        let entry = entry?;
        fs::copy(entry.path(), to.join(entry.file_name()))?;
    }
    Ok(())
}

fn run(command: &mut Command) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let status = command
        .status()
        .with_context(|| format!("{name} does not run"))?;
    ensure!(status.success(), "{name} failed: {status}");
    Ok(())
}
