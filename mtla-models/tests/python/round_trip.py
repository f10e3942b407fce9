"""Checkpoints between Python and Rust; called by tests/checkpoint/python.rs.

    round_trip.py logits DIR       loads DIR and writes DIR/logits.safetensors (input_ids, logits) and logits.json
    round_trip.py make KIND DIR    saves a random model of some kind in DIR, then the same

Needs torch, transformers==4.51.3 and mtla, all from PyPI.
"""

import json
import sys
from pathlib import Path

import mtla  # noqa: F401  registers llama-mtla
import torch
from mtla import LlamaMTLAConfig, LlamaMTLAForCausalLM
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


def sizes(**more):
    return dict(
        vocab_size=37,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=64,
        **more,
    )


def latent(**more):
    return sizes(
        q_lora_rank=10,
        kv_lora_rank=12,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=6,
        **more,
    )


KINDS = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(**sizes(num_key_value_heads=1, head_dim=6, attention_bias=True))
    ),
    "llama_bf16": lambda: LlamaForCausalLM(LlamaConfig(**sizes())).to(torch.bfloat16),
    "mtla": lambda: LlamaMTLAForCausalLM(
        LlamaMTLAConfig(**latent(down_rate=3, rope_theta=5e4))
    ),
    "mtla_tied": lambda: LlamaMTLAForCausalLM(
        LlamaMTLAConfig(**latent(tie_word_embeddings=True))
    ),
    "mtla_sharded": lambda: LlamaMTLAForCausalLM(LlamaMTLAConfig(**latent())),
}


def make(kind, directory):
    torch.manual_seed(1)
    model = KINDS[kind]()
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    for parameter in model.parameters():
        spread = 1.0 if parameter.dim() == 1 else 2.0 / parameter.shape[-1] ** 0.5
        parameter.data.normal_(0, spread)
    shard = "4KB" if kind.endswith("sharded") else "5GB"
    model.save_pretrained(directory, max_shard_size=shard)


def logits(directory):
    # The numbers of the file in 32 bits: the type in which they are compared.
    model = AutoModelForCausalLM.from_pretrained(directory, torch_dtype=torch.float32)
    model.eval()
    torch.manual_seed(2)
    ids = torch.randint(3, model.config.vocab_size, (2, 9))
    with torch.no_grad():
        found = model(ids, use_cache=False).logits
    save_file(
        {"input_ids": ids, "logits": found.contiguous()},
        Path(directory) / "logits.safetensors",
    )
    (Path(directory) / "logits.json").write_text(json.dumps({}))


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    if command == "make":
        make(*arguments)
    logits(arguments[-1])
