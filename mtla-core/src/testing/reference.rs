//! Weights by the reference implementation's names, and where they live in our modules.

use burn::{
    module::Param,
    nn::{LayerNorm, Linear},
    tensor::{Tensor, backend::Backend},
};

use super::Golden;
use crate::{
    attention::{
        Attention, AttentionConfig, CrossAttention, CrossAttentionConfig, DenseConfig,
        LatentConfig, LatentExpansion, QueryProjection,
    },
    temporal::TemporalGate,
};

/// A weight of ours as the reference names and lays it out.
pub mod names {
    /// Called with a name and the tensor in the reference's layout (`[out, in]` for linear maps).
    pub type Visit<'a, B> = dyn FnMut(&str, Access<'a, B>) + 'a;

    /// A weight: the parameter, and whether the reference stores it transposed.
    pub enum Access<'a, B: burn::tensor::backend::Backend> {
        /// A matrix, `[in, out]` here and `[out, in]` there.
        Matrix(&'a mut burn::module::Param<burn::tensor::Tensor<B, 2>>),
        /// A vector.
        Vector(&'a mut burn::module::Param<burn::tensor::Tensor<B, 1>>),
    }
}

use names::{Access, Visit};

fn linear<'a, B: Backend>(name: &str, module: &'a mut Linear<B>, visit: &mut Visit<'a, B>) {
    visit(
        &format!("{name}.weight"),
        Access::Matrix(&mut module.weight),
    );
    if let Some(bias) = &mut module.bias {
        visit(&format!("{name}.bias"), Access::Vector(bias));
    }
}

fn norm<'a, B: Backend>(name: &str, module: &'a mut LayerNorm<B>, visit: &mut Visit<'a, B>) {
    visit(&format!("{name}.weight"), Access::Vector(&mut module.gamma));
    if let Some(beta) = &mut module.beta {
        visit(&format!("{name}.bias"), Access::Vector(beta));
    }
}

fn query<'a, B: Backend>(module: &'a mut QueryProjection<B>, visit: &mut Visit<'a, B>) {
    match module {
        QueryProjection::Full(wq) => linear("wq", wq, visit),
        QueryProjection::LowRank(q) => {
            linear("wq_a", &mut q.wq_a, visit);
            norm("q_norm", &mut q.q_norm, visit);
            linear("wq_b", &mut q.wq_b, visit);
        }
    }
}

fn expansion<'a, B: Backend>(module: &'a mut LatentExpansion<B>, visit: &mut Visit<'a, B>) {
    visit("wkv_b.weight", Access::Matrix(&mut module.weight));
}

fn gate<'a, B: Backend>(module: &'a mut TemporalGate<B>, visit: &mut Visit<'a, B>) {
    linear("hypernet_down.fc_c", &mut module.fc_c, visit);
    linear("hypernet_down.fc_p", &mut module.fc_p, visit);
}

impl<B: Backend> Attention<B> {
    /// Visits every weight under the reference's name.
    pub fn visit_reference<'a>(&'a mut self, visit: &mut Visit<'a, B>) {
        match self {
            Self::Grouped(x) => {
                linear("q_proj", &mut x.q_proj, visit);
                linear("k_proj", &mut x.k_proj, visit);
                linear("v_proj", &mut x.v_proj, visit);
                linear("out_proj", &mut x.out_proj, visit);
            }
            Self::Latent(x) => {
                query(&mut x.wq, visit);
                linear("wkv_a", &mut x.wkv_a, visit);
                norm("kv_norm", &mut x.kv_norm, visit);
                expansion(&mut x.wkv_b, visit);
                linear("wo", &mut x.wo, visit);
                if let Some(module) = &mut x.gate {
                    gate(module, visit);
                }
            }
        }
    }
}

impl<B: Backend> CrossAttention<B> {
    /// Visits every weight under the reference's name.
    pub fn visit_reference<'a>(&'a mut self, visit: &mut Visit<'a, B>) {
        query(&mut self.wq, visit);
        linear("wkv_a", &mut self.wkv_a, visit);
        norm("kv_norm", &mut self.kv_norm, visit);
        expansion(&mut self.wkv_b, visit);
        linear("wo", &mut self.wo, visit);
        gate(&mut self.gate, visit);
    }
}

fn fill<'a, B: Backend>(
    case: &'a Golden,
    device: &'a B::Device,
) -> impl FnMut(&str, Access<'_, B>) + 'a {
    move |name, access| {
        let name = format!("w.{name}");
        match access {
            Access::Matrix(param) => {
                let value: Tensor<B, 2> = case.tensor(&name, device);
                assert_eq!(value.dims(), [param.dims()[1], param.dims()[0]], "{name}");
                *param = Param::from_tensor(value.transpose());
            }
            Access::Vector(param) => {
                let value: Tensor<B, 1> = case.tensor(&name, device);
                assert_eq!(value.dims(), param.dims(), "{name}");
                *param = Param::from_tensor(value);
            }
        }
    }
}

/// The attention layer of a recorded case, with its weights.
///
/// # Panics
/// If the case is not of a self-attention variant, or a weight is missing or has another shape.
pub fn load_attention<B: Backend>(case: &Golden, device: &B::Device) -> Attention<B> {
    let mut attention = self_attention_config(case)
        .init(device)
        .unwrap_or_else(|error| panic!("{}: {error}", case.name));
    attention.visit_reference(&mut fill(case, device));
    attention
}

fn self_attention_config(case: &Golden) -> AttentionConfig {
    let (d_model, n_heads) = (case.size("embed_dim"), case.size("num_heads"));
    let dense = DenseConfig {
        bias: case.flag("bias"),
        ..DenseConfig::new(d_model, n_heads)
    };
    let latent = || LatentConfig {
        q_lora_rank: case.size("q_lora_rank"),
        kv_lora_rank: case.size("kv_lora_rank"),
        qk_nope_head_dim: case.size("qk_nope_head_dim"),
        qk_rope_head_dim: case.size("qk_rope_head_dim"),
        v_head_dim: case.size("v_head_dim"),
        bias: case.flag("bias"),
        ..LatentConfig::new(d_model, n_heads)
    };
    match case.json["attention"]
        .as_str()
        .expect("the attention's name")
    {
        "MHA" => AttentionConfig::Mha(dense),
        "MQA" => AttentionConfig::Mqa(dense),
        "GQA" => AttentionConfig::Gqa {
            n_kv_heads: case.size("num_kv_heads"),
            dense,
        },
        "MLA" => AttentionConfig::Mla(latent()),
        _ => AttentionConfig::Mtla {
            down_rate: case.size("down_rate"),
            latent: latent(),
        },
    }
}

/// The cross-attention layer of a recorded case, with its weights.
///
/// # Panics
/// If a weight is missing or has another shape.
pub fn load_cross_attention<B: Backend>(case: &Golden, device: &B::Device) -> CrossAttention<B> {
    let config = CrossAttentionConfig {
        q_lora_rank: case.size("q_lora_rank"),
        kv_lora_rank: case.size("kv_lora_rank"),
        qk_head_dim: case.size("qk_nope_head_dim"),
        v_head_dim: case.size("v_head_dim"),
        down_rate: case.size("down_rate"),
        bias: case.flag("bias"),
        ..CrossAttentionConfig::new(case.size("embed_dim"), case.size("num_heads"))
    };
    let mut attention = config
        .init(device)
        .unwrap_or_else(|error| panic!("{}: {error}", case.name));
    attention.visit_reference(&mut fill(case, device));
    attention
}
