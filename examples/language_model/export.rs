//! A trained model for other programs, such as the page in `examples/web`.

use std::{fs, path::Path};

use anyhow::Context;
use burn::tensor::{DType, backend::Backend};
use mtla_models::decoder::{Decoder, DecoderConfig};
use mtla_train::{data::codec::TextCodec, disk::replace};
use serde::Serialize;

use crate::report::Report;

/// Writes a model into a folder, which is made if need be.
pub(crate) fn export<B: Backend>(
    folder: &Path,
    model: &Decoder<B>,
    config: &DecoderConfig,
    codec: &TextCodec,
    report: &Report,
) -> anyhow::Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let write = |name: &str, bytes: &[u8]| {
        let path = folder.join(name);
        replace(&path, bytes).with_context(|| format!("cannot write {}", path.display()))
    };
    write("model.safetensors", &model.to_safetensors(DType::F16)?)?;
    write("decoder.json", &json(config)?)?;
    write("report.json", &json(report)?)?;
    codec.save_pretrained(folder)?;
    println!("exported to {}", folder.display());
    Ok(())
}

fn json(value: &impl Serialize) -> serde_json::Result<Vec<u8>> {
    let mut bytes = serde_json::to_vec_pretty(value)?;
    bytes.push(b'\n');
    Ok(bytes)
}
