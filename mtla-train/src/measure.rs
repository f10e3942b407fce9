//! What a measurement is told with: versions, backend and device, memory.

use burn::{
    record::{BurnRecord, DefaultRecorder},
    tensor::backend::Backend,
};
use serde_json::{Value, json};

/// Versions, backend, device and system, as JSON.
pub fn environment<B: Backend>(device: &B::Device) -> Value {
    json!({
        "versions": {
            "mtla-train": env!("CARGO_PKG_VERSION"),
            "burn": BurnRecord::<(), B>::new::<DefaultRecorder>(()).metadata.version,
        },
        "backend": B::name(device),
        "device": format!("{device:?}"),
        "system": format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
    })
}

/// The most memory that this process has had so far, in bytes; known on Linux only.
pub fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024)
}

/// A number of bytes as people read it.
///
/// ```
/// use mtla_train::measure::bytes;
///
/// assert_eq!(bytes(960.0), "960 B");
/// assert_eq!(bytes(5.0 * 1024.0 * 1024.0), "5.0 MiB");
/// ```
pub fn bytes(bytes: f64) -> String {
    let mut rest = bytes;
    for unit in ["B", "KiB", "MiB"] {
        if rest < 1024.0 {
            return if unit == "B" {
                format!("{rest:.0} B")
            } else {
                format!("{rest:.1} {unit}")
            };
        }
        rest /= 1024.0;
    }
    format!("{rest:.1} GiB")
}

#[cfg(test)]
mod tests {
    #[cfg(target_os = "linux")]
    #[test]
    fn the_peak_covers_what_was_taken() {
        let taken = vec![1u8; 64 << 20];
        let sum: u64 = taken.iter().map(|x| u64::from(*x)).sum();
        assert!(super::peak_memory().unwrap() >= sum);
    }
}
