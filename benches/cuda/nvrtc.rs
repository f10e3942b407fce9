//! NVIDIA's compiler for CUDA C++ that runs without a GPU.

use std::{
    ffi::{CString, c_char, c_int, c_void},
    path::{Path, PathBuf},
    ptr,
};

use anyhow::{Context, bail, ensure};
use libloading::{Library, Symbol};
use walkdir::WalkDir;

/// The library, and the headers that go with it.
pub(crate) struct Nvrtc {
    library: Library,
    include: Vec<PathBuf>,
}

/// What the assembler says of a kernel.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    /// Registers of a thread.
    pub(crate) registers: usize,
    /// Bytes that a thread keeps outside of them: arrays, and registers that are spilled.
    pub(crate) local: usize,
    /// Bytes that spills store and load.
    pub(crate) spills: usize,
}

impl Nvrtc {
    /// Loads `libnvrtc` from anywhere below a directory: a CUDA toolkit, or a Python environment with NVIDIA's packages.
    pub(crate) fn load(directory: &Path) -> anyhow::Result<Self> {
        let find = |what: &str, is_it: &dyn Fn(&Path) -> bool| -> anyhow::Result<PathBuf> {
            WalkDir::new(directory)
                .follow_links(true)
                .sort_by_file_name()
                .into_iter()
                .filter_map(Result::ok)
                .map(walkdir::DirEntry::into_path)
                .find(|path| is_it(path))
                .with_context(|| {
                    format!(
                        "no {what} below {}: see docs/kernel.md",
                        directory.display()
                    )
                })
        };
        let is_library = |path: &Path| {
            let name = path.file_name().and_then(|name| name.to_str());
            name.is_some_and(|name| name.starts_with("libnvrtc.so"))
        };
        let library = find("libnvrtc.so", &is_library)?;
        // Headers come in several packages, each in a directory of its own.
        let mut include = Vec::new();
        for header in ["cuda_fp16.h", "crt/mma.h"] {
            let path = find(header, &|path| path.ends_with(header))?;
            let depth = Path::new(header).components().count();
            include.extend(path.ancestors().nth(depth).map(Path::to_owned));
        }
        include.push(include[0].join("cccl"));
        // SAFETY: NVIDIA's library, which does nothing when it is loaded.
        let library = unsafe { Library::new(&library) }
            .with_context(|| format!("loading {}", library.display()))?;
        Ok(Self { library, include })
    }

    pub(crate) fn version(&self) -> anyhow::Result<String> {
        let (mut major, mut minor) = (0, 0);
        // SAFETY: the signature is that of `nvrtc.h`.
        unsafe {
            let version: Symbol<unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int> =
                self.library.get("nvrtcVersion")?;
            version(&raw mut major, &raw mut minor);
        }
        Ok(format!("{major}.{minor}"))
    }

    /// Compiles a kernel with the options that `cubecl-cuda` gives, on to the machine code of an architecture.
    pub(crate) fn compile(&self, source: &str, architecture: &str) -> anyhow::Result<Usage> {
        let options = [
            format!("--gpu-architecture={architecture}"),
            "-lineinfo".into(),
            "--ptxas-options=--verbose".into(),
        ];
        let include = self.include.iter();
        let include = include.map(|path| format!("--include-path={}", path.display()));
        let options = options
            .into_iter()
            .chain(include)
            .map(CString::new)
            .collect::<Result<Vec<_>, _>>()?;
        let options: Vec<_> = options.iter().map(|option| option.as_ptr()).collect();
        let source = CString::new(source)?;

        // SAFETY: the signatures are those of `nvrtc.h`, the strings end in a zero and outlive the calls, and the log's
        // buffer is as long as the library says.
        let (status, log) = unsafe {
            let create: Symbol<
                unsafe extern "C" fn(
                    *mut Program,
                    *const c_char,
                    *const c_char,
                    c_int,
                    *const *const c_char,
                    *const *const c_char,
                ) -> c_int,
            > = self.library.get("nvrtcCreateProgram")?;
            let compile: Symbol<
                unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int,
            > = self.library.get("nvrtcCompileProgram")?;
            let log_size: Symbol<unsafe extern "C" fn(Program, *mut usize) -> c_int> =
                self.library.get("nvrtcGetProgramLogSize")?;
            let get_log: Symbol<unsafe extern "C" fn(Program, *mut c_char) -> c_int> =
                self.library.get("nvrtcGetProgramLog")?;
            let destroy: Symbol<unsafe extern "C" fn(*mut Program) -> c_int> =
                self.library.get("nvrtcDestroyProgram")?;

            let mut program = ptr::null_mut();
            let status = create(
                &raw mut program,
                source.as_ptr(),
                ptr::null(),
                0,
                ptr::null(),
                ptr::null(),
            );
            ensure!(status == 0, "nvrtcCreateProgram returned {status}");
            let status = compile(program, options.len() as c_int, options.as_ptr());
            let mut size = 0;
            log_size(program, &raw mut size);
            let mut log = vec![0u8; size];
            get_log(program, log.as_mut_ptr().cast());
            destroy(&raw mut program);
            (status, log)
        };
        let log = String::from_utf8_lossy(&log);
        let log = log.trim_end_matches('\0').trim();
        if status != 0 {
            bail!("NVRTC returned {status}\n{log}");
        }
        usage(log).with_context(|| format!("no numbers in the assembler's log:\n{log}"))
    }
}

type Program = *mut c_void;

/// The numbers in lines such as
///
/// ```text
/// 256 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
/// ptxas info    : Used 21 registers, used 1 barriers, 256 bytes cumulative stack size
/// ```
fn usage(log: &str) -> Option<Usage> {
    let words: Vec<_> = log
        .split([' ', ',', '\n'])
        .filter(|w| !w.is_empty())
        .collect();
    let before = |what: &[&str]| -> Option<usize> {
        let at = words.windows(what.len()).position(|words| words == what)?;
        words.get(at.checked_sub(1)?)?.parse().ok()
    };
    Some(Usage {
        registers: before(&["registers"])?,
        local: before(&["bytes", "stack", "frame"])?,
        spills: before(&["bytes", "spill", "stores"])? + before(&["bytes", "spill", "loads"])?,
    })
}
