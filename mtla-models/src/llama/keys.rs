//! The names of weights in Hugging Face checkpoints.

use crate::checkpoint::Key;

/// Where each weight of a checkpoint lives in a [`Decoder`](crate::decoder::Decoder).
///
/// `{}` is the number of the layer. Linear maps are `[outputs, inputs]` in the file and `[inputs, outputs]`
/// here; norms, biases and the embedding are the same.
///
/// | in the file | here |
/// |---|---|
/// | `model.embed_tokens.weight` | `embedding.weight` |
/// | `model.norm.weight` | `norm` (`Rms.gamma`) |
/// | `lm_head.weight` | `head.weight`; neither exists where embeddings are tied |
/// | **`model.layers.{}.`** | **`layers.{}.`** |
/// | `input_layernorm.weight` | `attention_norm` (`Rms.gamma`) |
/// | `post_attention_layernorm.weight` | `feed_forward_norm` (`Rms.gamma`) |
/// | `mlp.gate_proj.weight`, `up_proj`, `down_proj` | `feed_forward.gate.weight`, `up`, `down` |
/// | **`model.layers.{}.self_attn.`** (`llama`) | **`layers.{}.attention.Grouped.`** |
/// | `q_proj.weight`, `.bias` (with `attention_bias`) | `q_proj` |
/// | `k_proj`, `v_proj` | `k_proj`, `v_proj` |
/// | `o_proj` | `out_proj` |
/// | **`model.layers.{}.self_attn.`** (`llama-mla`, `llama-mtla`) | **`layers.{}.attention.Latent.`** |
/// | `wq.weight` (`q_lora_rank` 0) | `wq.Full.weight` |
/// | `wq_a.weight`, `q_norm.weight`, `.bias`, `wq_b.weight` | `wq.LowRank`: `wq_a`, `q_norm` (`gamma`, `beta`), `wq_b` |
/// | `wkv_a.weight` | `wkv_a.weight` |
/// | `kv_norm.weight`, `.bias` | `kv_norm` (`gamma`, `beta`) |
/// | `wkv_b.weight` | `wkv_b.weight` |
/// | `wo.weight` | `wo.weight` |
/// | `hypernet_down.fc_c.weight`, `.bias`, `fc_p` (`llama-mtla`) | `gate.fc_c`, `gate.fc_p` |
#[rustfmt::skip]
pub const KEYS: &[Key] = &[
    Key::same("model.embed_tokens.weight", "embedding.weight"),
    Key::same("model.norm.weight", "norm.Rms.gamma"),
    Key::transposed("lm_head.weight", "head.weight"),

    Key::same("model.layers.{}.input_layernorm.weight", "layers.{}.attention_norm.Rms.gamma"),
    Key::same("model.layers.{}.post_attention_layernorm.weight", "layers.{}.feed_forward_norm.Rms.gamma"),
    Key::transposed("model.layers.{}.mlp.gate_proj.weight", "layers.{}.feed_forward.gate.weight"),
    Key::transposed("model.layers.{}.mlp.up_proj.weight", "layers.{}.feed_forward.up.weight"),
    Key::transposed("model.layers.{}.mlp.down_proj.weight", "layers.{}.feed_forward.down.weight"),

    Key::transposed("model.layers.{}.self_attn.q_proj.weight", "layers.{}.attention.Grouped.q_proj.weight"),
    Key::same("model.layers.{}.self_attn.q_proj.bias", "layers.{}.attention.Grouped.q_proj.bias"),
    Key::transposed("model.layers.{}.self_attn.k_proj.weight", "layers.{}.attention.Grouped.k_proj.weight"),
    Key::same("model.layers.{}.self_attn.k_proj.bias", "layers.{}.attention.Grouped.k_proj.bias"),
    Key::transposed("model.layers.{}.self_attn.v_proj.weight", "layers.{}.attention.Grouped.v_proj.weight"),
    Key::same("model.layers.{}.self_attn.v_proj.bias", "layers.{}.attention.Grouped.v_proj.bias"),
    Key::transposed("model.layers.{}.self_attn.o_proj.weight", "layers.{}.attention.Grouped.out_proj.weight"),
    Key::same("model.layers.{}.self_attn.o_proj.bias", "layers.{}.attention.Grouped.out_proj.bias"),

    Key::transposed("model.layers.{}.self_attn.wq.weight", "layers.{}.attention.Latent.wq.Full.weight"),
    Key::transposed("model.layers.{}.self_attn.wq_a.weight", "layers.{}.attention.Latent.wq.LowRank.wq_a.weight"),
    Key::same("model.layers.{}.self_attn.q_norm.weight", "layers.{}.attention.Latent.wq.LowRank.q_norm.gamma"),
    Key::same("model.layers.{}.self_attn.q_norm.bias", "layers.{}.attention.Latent.wq.LowRank.q_norm.beta"),
    Key::transposed("model.layers.{}.self_attn.wq_b.weight", "layers.{}.attention.Latent.wq.LowRank.wq_b.weight"),
    Key::transposed("model.layers.{}.self_attn.wkv_a.weight", "layers.{}.attention.Latent.wkv_a.weight"),
    Key::same("model.layers.{}.self_attn.kv_norm.weight", "layers.{}.attention.Latent.kv_norm.gamma"),
    Key::same("model.layers.{}.self_attn.kv_norm.bias", "layers.{}.attention.Latent.kv_norm.beta"),
    Key::rearranged("model.layers.{}.self_attn.wkv_b.weight", "layers.{}.attention.Latent.wkv_b.weight"),
    Key::transposed("model.layers.{}.self_attn.wo.weight", "layers.{}.attention.Latent.wo.weight"),
    Key::transposed("model.layers.{}.self_attn.hypernet_down.fc_c.weight", "layers.{}.attention.Latent.gate.fc_c.weight"),
    Key::same("model.layers.{}.self_attn.hypernet_down.fc_c.bias", "layers.{}.attention.Latent.gate.fc_c.bias"),
    Key::transposed("model.layers.{}.self_attn.hypernet_down.fc_p.weight", "layers.{}.attention.Latent.gate.fc_p.weight"),
    Key::same("model.layers.{}.self_attn.hypernet_down.fc_p.bias", "layers.{}.attention.Latent.gate.fc_p.bias"),
];

/// Names that older files have and that are no weights: the frequencies of the rotary embedding.
#[cfg(feature = "files")]
pub(super) const NO_WEIGHTS: &[&str] = &["model.layers.{}.self_attn.rotary_emb.inv_freq"];
