//! CUDA without a GPU: the CUDA C++ of this library's kernels, as CubeCL generates it for a GPU, compiled by NVRTC where
//! that is at hand.
//!
//! Fails if a kernel cannot be generated, does not compile, or does not fit into the registers of a thread. See
//! `docs/kernel.md`.

mod cases;
mod gpu;
mod nvrtc;

use std::{
    collections::HashSet,
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail, ensure};
use clap::Parser;

use gpu::{Gpu, Kernel};
use nvrtc::{Nvrtc, Usage};

/// Compute capabilities to compile for.
const CAPABILITIES: [u16; 2] = [80, 90];

/// What a thread may keep outside its registers, in bytes. The assembler moves a few numbers there on purpose, so that
/// more blocks fit on a multiprocessor, and versions of it differ in where.
const LOCAL_MEMORY: usize = 64;

/// Generates the CUDA C++ of all kernels, and compiles it where NVRTC is found.
#[derive(Parser)]
struct Arguments {
    /// Where the sources go.
    #[arg(long, default_value = "target/cuda-kernels")]
    out: PathBuf,
    /// A directory with libnvrtc and CUDA's headers anywhere below it: a toolkit, or a Python environment with
    /// NVIDIA's packages. Without it, the environment variable `CUDA_PATH`, and then /usr/local/cuda.
    #[arg(long)]
    cuda_path: Option<PathBuf>,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    run(&arguments.out, nvrtc(arguments.cuda_path)?.as_ref())
}

/// NVRTC where somebody says that it is, or where toolkits are; none where there is no toolkit.
fn nvrtc(directory: Option<PathBuf>) -> anyhow::Result<Option<Nvrtc>> {
    let given = directory.or_else(|| env::var_os("CUDA_PATH").map(PathBuf::from));
    let usual = || Some(PathBuf::from("/usr/local/cuda")).filter(|path| path.is_dir());
    given
        .or_else(usual)
        .map(|path| Nvrtc::load(&path))
        .transpose()
}

fn run(out: &Path, nvrtc: Option<&Nvrtc>) -> anyhow::Result<()> {
    fs::create_dir_all(out).with_context(|| format!("creating {}", out.display()))?;
    println!(
        "{:15} {:36} {:7} {:>7} {:>6} {:>9} {:>5} {:>6}",
        "kernel", "case", "for", "threads", "shared", "registers", "local", "spills"
    );
    let (mut kernels, mut failures) = (0, 0);
    for capability in CAPABILITIES {
        let gpu = Gpu { capability };
        let architecture = gpu.architecture();
        // Some cases share a kernel.
        let mut seen = HashSet::new();
        for cases::Case { name, run } in cases::all() {
            run(&gpu).with_context(|| format!("{name}, {architecture}"))?;
            let launched = gpu.launched()?;
            ensure!(!launched.is_empty(), "{name} launched no kernel");
            for kernel in launched {
                let kernel = kernel.map_err(anyhow::Error::msg).with_context(|| {
                    format!("a kernel of {name} cannot be generated for {architecture}")
                })?;
                if !seen.insert(kernel.source.clone()) {
                    continue;
                }
                kernels += 1;
                let file = format!("{}-{name}-{architecture}.cu", kernel.name);
                fs::write(out.join(file.replace([' ', '/'], "-")), &kernel.source)?;
                print!(
                    "{:15} {name:36} {architecture:7} {:>7} {:>6}",
                    kernel.name, kernel.threads, kernel.shared
                );
                match nvrtc.map(|nvrtc| compile(nvrtc, &kernel, &architecture)) {
                    None => println!(),
                    Some(Ok(usage)) => println!(
                        " {:>9} {:>5} {:>6}",
                        usage.registers, usage.local, usage.spills
                    ),
                    Some(Err(error)) => {
                        println!(" {error:#}");
                        failures += 1;
                    }
                }
            }
        }
    }
    println!("{kernels} kernels are in {}.", out.display());
    match nvrtc {
        None => println!("They were not compiled: no NVRTC (--cuda-path, CUDA_PATH)."),
        Some(_) if failures > 0 => bail!("{failures} of {kernels} kernels failed"),
        Some(nvrtc) => println!("NVRTC {} compiled them.", nvrtc.version()?),
    }
    Ok(())
}

/// # Errors
/// If it does not compile, or does not fit into the registers.
fn compile(nvrtc: &Nvrtc, kernel: &Kernel, architecture: &str) -> anyhow::Result<Usage> {
    let usage = nvrtc.compile(&kernel.source, architecture)?;
    ensure!(
        usage.local <= LOCAL_MEMORY,
        "{} bytes do not fit into the {} registers of a thread",
        usage.local,
        usage.registers
    );
    Ok(usage)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All kernels, and what must fail does.
    #[test]
    fn kernels_compile() {
        let out = env::temp_dir().join(format!("cuda-kernels-{}", std::process::id()));
        let nvrtc = nvrtc(None).unwrap();
        let result = run(&out, nvrtc.as_ref());
        fs::remove_dir_all(&out).unwrap();
        result.unwrap();

        let Some(nvrtc) = nvrtc else { return };
        let failure = |body: &str| {
            let kernel = Kernel {
                name: "bad".into(),
                source: format!("extern \"C\" __global__ void bad(float* x, int n) {{ {body} }}"),
                threads: 32,
                shared: 0,
            };
            compile(&nvrtc, &kernel, "sm_80").unwrap_err().to_string()
        };
        let message = failure("x[0] = undefined;");
        assert!(message.contains("\"undefined\" is undefined"), "{message}");
        let message = failure(
            "float all[64]; for (int i = 0; i < n; i++) all[i % 64] += x[i]; x[0] = all[n % 64];",
        );
        assert!(message.starts_with("256 bytes do not fit"), "{message}");
    }
}
