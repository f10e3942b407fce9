//! Whether a device computes what the CPU does: steps of attention over a cache, on problems of many shapes.

use burn::tensor::{Int, Tensor, TensorData};
use burn_flex::Flex;
use mtla_core::{
    attention::{AttentionConfig, DenseConfig, LatentConfig},
    ops::AttentionBackend,
};
use mtla_models::{
    decoder::DecoderConfig,
    generate::{LanguageModel, uniform},
};
use serde::Serialize;

use crate::writer::{WriterError, decode_launches};

/// Problems of a check.
const CASES: u64 = 16;
/// Tokens that every row is continued by.
const STEPS: usize = 3;
const VOCABULARY: usize = 16;
/// How far a logit may be off, in relation to the largest one.
const TOLERANCE: f32 = 1e-4;

/// What became of a problem.
#[derive(Debug, Clone, Serialize)]
pub struct Checked {
    /// The problem in words.
    pub name: String,
    /// The largest difference of a logit, in relation to the largest one.
    pub error: f32,
    /// Whether that is little, and the kernel has run.
    pub right: bool,
}

/// A random problem: a decoder of one layer, prompts of several lengths, and the rows that go on.
#[derive(Debug)]
struct Case {
    name: String,
    config: DecoderConfig,
    prompts: Vec<Vec<usize>>,
    /// Which prompt each row continues.
    order: Vec<usize>,
}

/// Random numbers of one problem.
struct Draws {
    seed: u64,
    case: u64,
    count: u64,
}

impl Draws {
    fn below(&mut self, limit: usize) -> usize {
        self.count += 1;
        (uniform(self.seed, self.case, 0, self.count) * limit as f64) as usize
    }

    fn pick(&mut self, of: &[usize]) -> usize {
        of[self.below(of.len())]
    }
}

impl Case {
    fn new(seed: u64, case: u64) -> Self {
        let mut draws = Draws {
            seed,
            case,
            count: 0,
        };
        let heads = draws.pick(&[1, 2, 3, 4, 8, 16]);
        let head_dim = draws.pick(&[8, 16, 30, 32, 64]);
        let stride = 1 + draws.below(5);
        let width = 32;
        let dense = DenseConfig {
            head_dim: Some(head_dim),
            ..DenseConfig::new(width, heads)
        };
        let latent = LatentConfig {
            kv_lora_rank: draws.pick(&[16, 36, 64, 128, 256, 512]),
            qk_nope_head_dim: head_dim,
            qk_rope_head_dim: draws.pick(&[8, 16, 32, 64]),
            v_head_dim: head_dim,
            ..LatentConfig::new(width, heads)
        };
        let sizes = format!("{}+{}", latent.kv_lora_rank, latent.qk_rope_head_dim);
        let (kind, attention) = match case % 5 {
            0 => (format!("MHA, {head_dim} wide"), AttentionConfig::Mha(dense)),
            1 => (format!("MQA, {head_dim} wide"), AttentionConfig::Mqa(dense)),
            2 => (format!("MLA, {sizes}"), AttentionConfig::Mla(latent)),
            _ => (
                format!("MTLA, {stride} tokens a slot, {sizes}"),
                AttentionConfig::Mtla {
                    down_rate: stride,
                    latent,
                },
            ),
        };
        let most = draws.pick(&[1, 7, 40, 300]);
        let prompts: Vec<Vec<usize>> = (0..=draws.below(4))
            .map(|_| {
                let length = 1 + draws.below(most);
                (0..length).map(|_| draws.below(VOCABULARY)).collect()
            })
            .collect();
        let rows = 1 + draws.below(12);
        let mut order: Vec<usize> = (0..rows).map(|_| draws.below(prompts.len())).collect();
        order.sort_unstable();
        let longest = prompts.iter().map(Vec::len).max().unwrap_or_default();
        Self {
            name: format!("{kind}, {heads} heads, {rows} rows of up to {longest} tokens"),
            config: DecoderConfig::new(VOCABULARY, 1, attention),
            prompts,
            order,
        }
    }

    /// The logits after every step, and how many launches of the kernel there were.
    async fn logits<B: AttentionBackend>(
        &self,
        weights: Vec<u8>,
        device: &B::Device,
    ) -> Result<(Vec<f32>, u64), WriterError> {
        let model = self.config.load_safetensors::<B>(weights, device)?;
        let mut cache = model.new_cache();
        let rows: Vec<usize> = cache.join(self.prompts.len()).collect();
        let counts: Vec<usize> = self.prompts.iter().map(Vec::len).collect();
        let plan = cache.extend(&rows, &counts);
        let padded = self.prompts.iter().flat_map(|prompt| {
            let padding = std::iter::repeat_n(0, plan.longest() - prompt.len());
            prompt.iter().copied().chain(padding).map(|x| x as i64)
        });
        let shape = [rows.len(), plan.longest()];
        let tokens = TensorData::new(padded.collect::<Vec<_>>(), shape);
        model.prefill(Tensor::from_data(tokens, device), &plan, &mut cache);
        cache.reorder(&self.order);

        let rows: Vec<usize> = (0..self.order.len()).collect();
        let before = decode_launches();
        let mut all = Vec::new();
        for step in 0..STEPS {
            let plan = cache.step(&rows);
            let tokens = rows
                .iter()
                .map(|row| ((row * 7 + step * 3) % VOCABULARY) as i64);
            let tokens = TensorData::new(tokens.collect::<Vec<_>>(), [rows.len()]);
            let tokens = Tensor::<B, 1, Int>::from_data(tokens, device);
            all.push(model.step(tokens, &plan, &mut cache));
        }
        let logits = Tensor::cat(all, 0).into_data_async().await;
        let logits = logits.map_err(mtla_models::generate::GenerationError::Device)?;
        Ok((logits.iter::<f32>().collect(), decode_launches() - before))
    }
}

/// Computes random problems on a device and on the CPU.
///
/// # Errors
/// [`WriterError`] if the device fails.
pub async fn check<B: AttentionBackend>(
    seed: u64,
    device: &B::Device,
) -> Result<Vec<Checked>, WriterError> {
    let mut checked = Vec::new();
    for number in 0..CASES {
        let case = Case::new(seed, number);
        let model = case.config.init::<Flex>(&Default::default());
        let model = model.map_err(mtla_models::decoder::StoreError::Config)?;
        let weights = model.to_safetensors(burn::tensor::DType::F32)?;
        let (expected, _) = case
            .logits::<Flex>(weights.clone(), &Default::default())
            .await?;
        let (found, launches) = case.logits::<B>(weights, device).await?;
        let largest = expected.iter().fold(0f32, |most, x| most.max(x.abs()));
        let error = expected
            .iter()
            .zip(&found)
            .map(|(a, b)| (a - b).abs() / largest)
            // A NaN is the largest of all.
            .fold(0.0, |most, x| if x <= most { most } else { x });
        checked.push(Checked {
            name: case.name,
            error,
            right: error <= TOLERANCE && launches >= STEPS as u64,
        });
    }
    Ok(checked)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use burn::tensor::try_read_sync;

    use super::*;

    #[test]
    fn problems_are_of_many_shapes_and_a_cpu_agrees_with_itself() {
        let names: BTreeSet<String> = (0..CASES).map(|case| Case::new(1, case).name).collect();
        assert_eq!(names.len() as u64, CASES, "{names:#?}");
        let checked = try_read_sync(check::<Flex>(1, &Default::default()));
        for case in checked.unwrap().unwrap() {
            assert!(case.error < 1e-6, "{case:?}");
            assert!(!case.right, "no kernel of a GPU has run");
        }
    }
}
