"""PyTorch's side of `compare.py llama`: a Llama with temporal attention (the published package `mtla`) or with
plain attention (`transformers`), as a Hugging Face checkpoint.

    torch_llama.py write DIR VARIANT DOWN_RATE BATCH PROMPT   random weights and tokens, for both sides
    torch_llama.py serve DIR                                  reads commands: check FILE, run NEW_TOKENS, peak
"""

import contextlib
import io
import pathlib
import resource
import sys
import time

import torch
from safetensors.torch import load_file, save_file

with contextlib.redirect_stdout(io.StringIO()):  # the package prints when it is imported
    from mtla import LlamaMTLAConfig, LlamaMTLAForCausalLM
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

SIZES = dict(vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
             num_attention_heads=12, max_position_embeddings=2048)
FORCED = 6  # tokens after the prompt whose logits are compared


def write(directory, variant, down_rate, batch, prompt):
    torch.manual_seed(prompt + batch)
    model = {
        "mtla": lambda: LlamaMTLAForCausalLM(LlamaMTLAConfig(**SIZES, down_rate=int(down_rate))),
        "mha": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
        "gqa": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=4)),
    }[variant]()
    model.save_pretrained(directory)
    tokens = torch.randint(3, SIZES["vocab_size"], (int(batch), int(prompt) + FORCED), dtype=torch.int64)
    save_file({"tokens": tokens}, pathlib.Path(directory) / "tokens.safetensors")


class Generator:
    """The model's own cached path, called directly: no time goes to what `generate` does around it."""

    def __init__(self, model):
        self.model = model
        self.cache = None

    def step(self, tokens):
        out = self.model(tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = out.past_key_values
        return out.logits[:, -1]

    def bytes(self):
        held = [self.cache.key_cache, self.cache.value_cache]
        parts = [x for part in held for x in (part.values() if isinstance(part, dict) else part)]
        return sum(x.numel() * x.element_size() for x in parts)


@torch.inference_mode()
def serve(directory):
    torch.set_num_threads(2)
    with contextlib.redirect_stdout(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(directory, torch_dtype=torch.float32).eval()
    tokens = load_file(pathlib.Path(directory) / "tokens.safetensors")["tokens"]
    prompt, forced = tokens[:, :-FORCED], tokens[:, -FORCED:]
    for line in sys.stdin:
        command, _, argument = line.strip().partition(" ")
        if command == "check":
            generator = Generator(model)
            logits = [generator.step(prompt)]
            logits += [generator.step(forced[:, i:i + 1]) for i in range(FORCED)]
            save_file({"logits": torch.stack(logits).contiguous()}, argument)
            print("done", flush=True)
        elif command == "run":
            generator = Generator(model)
            start = time.perf_counter()
            chosen = generator.step(prompt).argmax(-1, keepdim=True)
            prefilled = time.perf_counter()
            for _ in range(int(argument) - 1):
                chosen = generator.step(chosen).argmax(-1, keepdim=True)
            ended = time.perf_counter()
            print((prefilled - start) * 1e3, (ended - prefilled) * 1e3, generator.bytes(), flush=True)
        elif command == "peak":
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True)


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    {"write": write, "serve": serve}[what](*arguments)
