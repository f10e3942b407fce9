"""PyTorch's side of `compare.py w2`: beam search over a source, as in the paper's speech and summarisation models.

A decoder of 9 layers (pre-norm, feed-forward networks of width 2048 with ReLU) attends in every layer to the states of an
encoder and to its own tokens before. MTLA is the published package `mtla` with its own cache; MHA and GQA attend with
`scaled_dot_product_attention`, MLA in its absorbed form. As in fairseq each beam has a row of the cache, and rows change
their places at every step.

    torch_decode.py write DIR VARIANT DOWN_RATE SENTENCES BEAM SOURCE NEW_TOKENS   random weights and states, for both sides
    torch_decode.py serve DIR                                     reads commands: check FILE, run, peak
"""

import json
import pathlib
import resource
import sys
import time

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from torch_layer import D_MODEL, HEADS, NOPE, RANK, ROPE, layer, rotate, save, weights

LAYERS, D_FF, VOCABULARY = 9, 2048, 8000


class Layer(nn.Module):
    def __init__(self, variant, down_rate):
        super().__init__()
        self.attention = layer(variant, down_rate)
        self.attention_norm = nn.LayerNorm(D_MODEL)
        self.feed_forward_norm = nn.LayerNorm(D_MODEL)
        self.up = nn.Linear(D_MODEL, D_FF)
        self.down = nn.Linear(D_FF, D_MODEL)

    def forward(self, x, source, positions, cache):
        h = self.attention_norm(x)
        keys = h if source is None else torch.cat([source, h], 1)
        x = x + cache.attend(h, keys, positions)
        return x + self.down(F.relu(self.up(self.feed_forward_norm(x))))


class Decoder(nn.Module):
    def __init__(self, variant, down_rate):
        super().__init__()
        self.cache = {"mla": LatentCache, "mtla": TemporalCache}.get(variant, GroupedCache)
        self.embedding = nn.Embedding(VOCABULARY, D_MODEL)
        self.layers = nn.ModuleList(Layer(variant, down_rate) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(D_MODEL)
        self.head = nn.Linear(D_MODEL, VOCABULARY, bias=False)

    def new_cache(self):
        return [self.cache(layer.attention) for layer in self.layers]

    def step(self, tokens, source, positions, caches):
        """Log-probabilities after `tokens [rows]`, the first time with the source before them."""
        x = self.embedding(tokens[:, None])
        for layer, cache in zip(self.layers, caches):
            x = layer(x, source, positions, cache)
        return F.log_softmax(self.head(self.norm(x[:, -1])), -1)


class Cache:
    """What one layer keeps of each row: tensors `held` whose first dimension are rows, tokens along `axis`."""

    def __init__(self, attention):
        self.attention, self.held = attention, []

    def append(self, new, axis):
        self.held = [torch.cat(pair, axis) for pair in zip(self.held, new)] if self.held else new
        return self.held

    def reorder(self, rows):
        self.held = [x.index_select(0, rows) for x in self.held]

    def bytes(self):
        return sum(x.numel() * x.element_size() for x in self.held)


class GroupedCache(Cache):
    def attend(self, x, keys, positions):
        a, rows = self.attention, len(x)
        q = rotate(a.q_proj(x).view(rows, 1, HEADS, -1), positions[-1:]).transpose(1, 2)
        k = rotate(a.k_proj(keys).view(rows, len(positions), a.kv_heads, -1), positions).transpose(1, 2)
        v = a.v_proj(keys).view(rows, len(positions), a.kv_heads, -1).transpose(1, 2)
        k, v = self.append([k, v], 2)
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=a.kv_heads != HEADS)
        return a.out_proj(y.transpose(1, 2).reshape(rows, 1, -1))


class LatentCache(Cache):
    def attend(self, x, keys, positions):
        a, rows = self.attention, len(x)
        to_key, to_value = a.wkv_b.weight.view(HEADS, -1, RANK).split([NOPE, a.wkv_b.out_features // HEADS - NOPE], 1)
        q_nope, q_rope = a.wq(x).view(rows, 1, HEADS, -1).split([NOPE, ROPE], -1)
        latent, k_rope = a.wkv_a(keys).split([RANK, ROPE], -1)
        k_rope = rotate(k_rope.unsqueeze(2), positions).squeeze(2)
        k, = self.append([torch.cat([a.kv_norm(latent), k_rope], -1)], 1)
        q_latent = torch.einsum("bqhd,hdc->bqhc", q_nope, to_key)
        q = torch.cat([q_latent, rotate(q_rope, positions[-1:])], -1)[:, 0]
        weights = (q @ k.transpose(1, 2) * (NOPE + ROPE) ** -0.5).softmax(-1)
        y = torch.einsum("bhc,hdc->bhd", weights @ k[..., :RANK], to_value)
        return a.wo(y.reshape(rows, 1, -1))


class TemporalCache(Cache):
    """The package keeps its cache in a dictionary."""

    def __init__(self, attention):
        self.attention, self.state = attention, {}

    def attend(self, x, keys, positions):
        return self.attention(query=x, key=keys, value=keys, position=positions.expand(len(x), -1),
                              incremental_state=self.state)

    def reorder(self, rows):
        self.attention.reorder_incremental_state(self.state, rows)

    def bytes(self):
        held = [x for buffer in self.state.values() for x in buffer.values() if torch.is_tensor(x)]
        return sum(x.numel() * x.element_size() for x in held)


def beams(sentences, beam, steps):
    """For each step the row that each row continues, and which of that row's best tokens it takes: the rows of a sentence
    that continue the same one take its first, second, … token."""
    parents = torch.randint(0, beam, (steps, sentences, beam)) + beam * torch.arange(sentences)[None, :, None]
    parents = parents.flatten(1)
    same = parents[:, :, None] == parents[:, None, :]
    ranks = same.tril(-1).sum(-1)
    return parents, ranks


def write(directory, variant, down_rate, sentences, beam, source, new_tokens):
    torch.manual_seed(int(source))
    directory = pathlib.Path(directory)
    decoder = Decoder(variant, int(down_rate))
    for number, part in enumerate(decoder.layers):
        tensors = {n: x.detach().clone() for n, x in part.named_parameters() if not n.startswith("attention.")}
        save(directory / f"layer-{number}.json", variant, down_rate, tensors | weights(part.attention))
    parents, ranks = beams(int(sentences), int(beam), int(new_tokens))
    tensors = {n: x.detach().clone() for n, x in decoder.named_parameters() if not n.startswith("layers.")}
    tensors |= dict(source=torch.randn(int(sentences), int(source), D_MODEL), parents=parents, ranks=ranks)
    save_file(tensors, directory / "decoder.safetensors")
    config = dict(vocab_size=VOCABULARY, layers=LAYERS, beam=int(beam), down_rate=int(down_rate))
    (directory / "decoder.json").write_text(json.dumps(dict(attention=variant, config=config)))


class Peer:
    def __init__(self, directory):
        directory = pathlib.Path(directory)
        spec = json.loads((directory / "decoder.json").read_text())
        tensors = load_file(directory / "decoder.safetensors")
        source, self.parents, self.ranks = (tensors.pop(name) for name in ("source", "parents", "ranks"))
        for number in range(LAYERS):
            for name, x in load_file(directory / f"layer-{number}.safetensors").items():
                name = f"attention.{name[2:]}" if name.startswith("w.") else name
                tensors[f"layers.{number}.{name}"] = x
        self.decoder = Decoder(spec["attention"], spec["config"]["down_rate"]).eval()
        self.decoder.load_state_dict(tensors)
        self.beam = spec["config"]["beam"]
        self.source = source.repeat_interleave(self.beam, 0)

    def run(self):
        """Chosen tokens `[steps, rows]`, the last log-probabilities, seconds of the first step and of all, and bytes of the
        cache."""
        rows, length, _ = self.source.shape
        caches, chosen, source = self.decoder.new_cache(), [], self.source
        tokens, positions = torch.zeros(rows, dtype=torch.long), torch.arange(length + 1).float()
        start = time.perf_counter()
        for step, (parents, ranks) in enumerate(zip(self.parents, self.ranks)):
            if step > 0:
                for cache in caches:
                    cache.reorder(self.parents[step - 1])
            probabilities = self.decoder.step(tokens, source, positions, caches)
            best = probabilities.topk(2 * self.beam)
            tokens = best.indices[parents, ranks]
            chosen.append(tokens)
            if step == 0:
                first = time.perf_counter() - start
            source, positions = None, positions[-1:] + 1
        seconds = time.perf_counter() - start
        return torch.stack(chosen), best.values, first, seconds, sum(cache.bytes() for cache in caches)


@torch.inference_mode()
def serve(directory):
    torch.set_num_threads(2)
    peer = Peer(directory)
    for line in sys.stdin:
        command, _, argument = line.strip().partition(" ")
        if command == "check":
            tokens, probabilities, *_ = peer.run()
            save_file(dict(tokens=tokens, log_probabilities=probabilities.contiguous()), argument)
            print("done", flush=True)
        elif command == "run":
            print(*peer.run()[2:], flush=True)
        elif command == "peak":
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True)


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    {"write": write, "serve": serve}[what](*arguments)
