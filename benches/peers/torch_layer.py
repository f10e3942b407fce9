"""PyTorch's side of `compare.py w1`: one attention layer, forward and backward.

MTLA is the published package `mtla`. MHA, GQA and MLA are written here twice over: `naive`, with the scores,
a causal mask and a softmax as PyTorch operations, and `fused`, with `scaled_dot_product_attention`.

    torch_layer.py write CASE.json VARIANT DOWN_RATE T [BATCH]  random weights and inputs, for both sides
    torch_layer.py serve CASE.json naive|fused                  reads commands: check FILE, time, peak
"""

import contextlib
import io
import json
import pathlib
import resource
import sys
import time

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

D_MODEL, HEADS = 512, 8
RANK, NOPE, ROPE, VALUE = 256, 64, 32, 64


def rotate(x, positions):
    """Interleaved rotary embedding of [batch, tokens, heads, width]."""
    width = x.shape[-1]
    frequencies = 1.0 / 10000 ** (torch.arange(0, width, 2).float() / width)
    angles = (positions[:, None] * frequencies)[None, :, None]
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


def attend(q, k, v, fused):
    """Causal attention over [batch, heads, tokens, width]."""
    grouped = q.shape[1] != k.shape[1]
    if fused:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    if grouped:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    tokens = q.shape[2]
    hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    return scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v


class Grouped(nn.Module):
    def __init__(self, kv_heads):
        super().__init__()
        width = D_MODEL // HEADS
        self.kv_heads = kv_heads
        self.q_proj = nn.Linear(D_MODEL, D_MODEL, bias=False)
        self.k_proj = nn.Linear(D_MODEL, kv_heads * width, bias=False)
        self.v_proj = nn.Linear(D_MODEL, kv_heads * width, bias=False)
        self.out_proj = nn.Linear(D_MODEL, D_MODEL, bias=False)

    def forward(self, x, positions, fused):
        batch, tokens, _ = x.shape
        q = rotate(self.q_proj(x).view(batch, tokens, HEADS, -1), positions)
        k = rotate(self.k_proj(x).view(batch, tokens, self.kv_heads, -1), positions)
        v = self.v_proj(x).view(batch, tokens, self.kv_heads, -1)
        y = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), fused)
        return self.out_proj(y.transpose(1, 2).reshape(batch, tokens, -1))


class Latent(nn.Module):
    def __init__(self):
        super().__init__()
        self.wq = nn.Linear(D_MODEL, HEADS * (NOPE + ROPE), bias=False)
        self.wkv_a = nn.Linear(D_MODEL, RANK + ROPE, bias=False)
        self.kv_norm = nn.LayerNorm(RANK)
        self.wkv_b = nn.Linear(RANK, HEADS * (NOPE + VALUE), bias=False)
        self.wo = nn.Linear(HEADS * VALUE, D_MODEL, bias=False)

    def forward(self, x, positions, fused):
        batch, tokens, _ = x.shape
        q_nope, q_rope = self.wq(x).view(batch, tokens, HEADS, -1).split([NOPE, ROPE], -1)
        latent, k_rope = self.wkv_a(x).split([RANK, ROPE], -1)
        k_rope = rotate(k_rope.unsqueeze(2), positions).expand(-1, -1, HEADS, -1)
        expanded = self.wkv_b(self.kv_norm(latent)).view(batch, tokens, HEADS, -1)
        k_nope, v = expanded.split([NOPE, VALUE], -1)
        q = torch.cat([q_nope, rotate(q_rope, positions)], -1)
        k = torch.cat([k_nope, k_rope], -1)
        y = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), fused)
        return self.wo(y.transpose(1, 2).reshape(batch, tokens, -1))


def mtla(down_rate):
    with contextlib.redirect_stdout(io.StringIO()):  # the package prints when it is imported
        from mtla import MultiheadTemporalLatentAttention
    return MultiheadTemporalLatentAttention(embed_dim=D_MODEL, num_heads=HEADS, down_rate=down_rate)


def layer(variant, down_rate):
    made = {
        "mha": lambda: Grouped(HEADS),
        "gqa": lambda: Grouped(2),
        "mqa": lambda: Grouped(1),
        "mla": Latent,
        "mtla": lambda: mtla(down_rate),
    }
    return made[variant]()


def weights(module):
    """The weights of an attention layer by the names that our side reads."""
    return {f"w.{name}": weight.detach().clone() for name, weight in module.named_parameters()}


def save(case, variant, down_rate, tensors):
    """Writes the description of an attention layer, and tensors beside it."""
    save_file(tensors, pathlib.Path(case).with_suffix(".safetensors"))
    config = dict(embed_dim=D_MODEL, num_heads=HEADS, num_kv_heads=2, down_rate=int(down_rate), bias=False,
                  q_lora_rank=0, kv_lora_rank=RANK, qk_nope_head_dim=NOPE, qk_rope_head_dim=ROPE,
                  v_head_dim=VALUE)
    pathlib.Path(case).write_text(json.dumps(dict(attention=variant.upper(), config=config)))


def write(case, variant, down_rate, tokens, batch=4):
    torch.manual_seed(tokens)
    tensors = weights(layer(variant, int(down_rate)))
    tensors["x"] = torch.randn(batch, tokens, D_MODEL)
    tensors["cotangent"] = torch.randn(batch, tokens, D_MODEL)
    save(case, variant, down_rate, tensors)


def serve(case, form):
    torch.set_num_threads(2)
    spec = json.loads(pathlib.Path(case).read_text())
    tensors = load_file(pathlib.Path(case).with_suffix(".safetensors"))
    variant = spec["attention"].lower()
    module = layer(variant, spec["config"]["down_rate"])
    module.load_state_dict({n[2:]: t for n, t in tensors.items() if n.startswith("w.")})
    x, cotangent = tensors["x"].requires_grad_(), tensors["cotangent"]
    batch, tokens, _ = x.shape
    positions = torch.arange(tokens).float()
    rows = positions[None].repeat(batch, 1)

    def forward():
        if variant == "mtla":
            return module(query=x, key=x, value=x, position=rows)
        return module(x, positions, form == "fused")

    def run():
        x.grad = None
        module.zero_grad()
        y = forward()
        (y * cotangent).sum().backward()
        return y

    for line in sys.stdin:
        command, _, argument = line.strip().partition(" ")
        if command == "check":
            found = {"y": run().detach(), "grad.x": x.grad}
            found |= {f"grad.{n}": w.grad for n, w in module.named_parameters() if w.grad is not None}
            save_file({n: t.contiguous() for n, t in found.items()}, argument)
            print("done", flush=True)
        elif command == "time":
            start = time.perf_counter()
            run()
            print((time.perf_counter() - start) * 1e3, flush=True)
        elif command == "peak":
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True)


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    if what == "write":
        case, variant, *numbers = arguments
        write(case, variant, *map(int, numbers))
    else:
        serve(*arguments)
