#!/usr/bin/env python3
"""This library beside PyTorch, on the same machine, in one run.

    python3 -m pip install torch mtla safetensors numpy
    benches/peers/compare.py w1                     one attention layer, forward and backward
    benches/peers/compare.py w1 mtla:2 --tokens 256,2048
    benches/peers/compare.py memory                 peak memory of the same, up to 16k tokens

    benches/peers/compare.py w2                     beam search over a source, as in the paper
    benches/peers/compare.py w2long                 the same with longer sources and wider beams

    python3 -m pip install transformers==4.51.3
    benches/peers/compare.py llama                  a Hugging Face checkpoint: a prompt, then token by token
    benches/peers/compare.py llama mtla:4 mha:1 --batches 1 --tokens 1024

Both sides get the same weights and inputs, which PyTorch makes. Before anything is timed, outputs and all gradients (of
`llama`: logits; of `w2`: every chosen token, and the last log-probabilities) have to agree. Then both run in turns, two
threads each; the median counts. One JSON object is printed per row:

    variant, down_rate, T       what was run: batch 4, d_model 512, 8 heads, f32
    ours_ms, torch_ms, ratio    medians, and torch/ours. For mtla, torch is the published package; for the
                                others a naive form in PyTorch
    torch_fused_ms              the same with scaled_dot_product_attention
    floor_ms                    all matrix products at the speed of one large product on our side
    ours_peak_mib, torch_peak_mib   the largest resident set of each process, which keeps what it frees here
    largest_difference          between the two sides, relative to the largest entry of each tensor

of `w2` and `w2long` (a decoder of 9 layers, d_model 512, 8 heads, feed-forward networks of width 2048, vocabulary 8000, f32;
mtla by the published package, mha and gqa with scaled_dot_product_attention, mla in its absorbed form):

    sentences, beam, source, new_tokens   sources, beams and frames of each, tokens generated; beams change places at each
    ours_s, torch_s, ratio                the source and all tokens; torch/ours
    ours_first_s, torch_first_s           of that the source and the first token: ours reads each source once, PyTorch's rows
                                          each read their own, as in fairseq
    floor_s                               the matrix products alone, at the speed that products of the same weights with as
                                          many rows have on our side
    ours_cache_bytes, torch_cache_bytes   allocated at the end; ours_live_bytes is what our rows hold of it at most

and of `llama` (12 layers, hidden size 768, 12 heads, vocabulary 32000, f32; mtla by Python's package of that name,
mha and gqa by transformers):

    batch, prompt, new_tokens   rows, tokens of each prompt, tokens generated greedily after it
    ours_prefill_ms, torch_prefill_ms, prefill_ratio    until the first new token; torch/ours
    ours_tokens_per_s, torch_tokens_per_s, ratio        of the others, all rows together; ours/torch
    ours_cache_bytes, torch_cache_bytes                 held at the end
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TORCH = [sys.executable, str(HERE / "torch_layer.py")]
TORCH_DECODE = [sys.executable, str(HERE / "torch_decode.py")]
TORCH_LLAMA = [sys.executable, str(HERE / "torch_llama.py")]
SEARCHES = {"w2": dict(sentences=4, beam=10, source=200, new_tokens=60),
            "w2long": dict(sentences=2, beam=50, source=250, new_tokens=40)}
VARIANTS = ["mtla:2", "mtla:3", "mtla:4", "mha:1", "gqa:1", "mla:1"]
THREADS = "2"
TOLERANCE = 1e-4
# Sides take turns: without this each would give its memory back while the other runs, which no training does.
KEEP_MEMORY = {"MIMALLOC_PURGE_DELAY": "-1", "MALLOC_TRIM_THRESHOLD_": "4000000000",
               "MALLOC_MMAP_THRESHOLD_": "4000000000"}


class Side:
    """A process that answers commands, a line each."""

    def __init__(self, *command, settings=None):
        env = os.environ | {"RAYON_NUM_THREADS": THREADS, "OMP_NUM_THREADS": THREADS} | (settings or {})
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def ask(self, command):
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().strip()
        if not answer:
            raise SystemExit(f"{self.process.args} did not answer {command!r}")
        return answer

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def build(program):
    """Compiles our side and returns its path."""
    command = ["cargo", "build", "--release", "--locked", "-p", "mtla-benches", "--bin", program,
               "--message-format", "json"]
    lines = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    built = [json.loads(line).get("executable") for line in lines]
    return next(path for path in built if path)


def write(case, variant, rate, tokens, batch):
    subprocess.run([*TORCH, "write", case, variant, rate, str(tokens), str(batch)], check=True)


def difference(ours, torch):
    """The largest difference of all tensors, each relative to its largest entry."""
    from safetensors.numpy import load_file

    ours, torch = load_file(ours), load_file(torch)
    missing = torch.keys() ^ ours.keys()
    if missing:
        raise SystemExit(f"only one side has {sorted(missing)}")
    # A gradient that is 0 on paper is rounding noise on both sides: compared by the input's scale.
    least = 1e-3 * max(abs(x).max() for x in torch.values())
    return max(float(abs(ours[n] - torch[n]).max() / max(abs(torch[n]).max(), least)) for n in torch)


D, H, RANK, NOPE, ROPE, VALUE = 512, 8, 256, 64, 32, 64


def attention_products(variant):
    """Multiplications of a token in the projections of queries and output, in those of keys and values, in the expansion of
    latents (or of queries and sums to them); widths of keys and of values."""
    if variant in ("mla", "mtla"):
        return D * H * (NOPE + ROPE) + H * VALUE * D, D * (RANK + ROPE), RANK * H * (NOPE + VALUE), NOPE + ROPE, VALUE
    width, kv_heads = D // H, {"mha": H, "gqa": 2, "mqa": 1}[variant]
    return 2 * D * D, 2 * D * kv_heads * width, 0, width, width


def floor(variant, rate, tokens, batch, gflops):
    """Milliseconds of the products that cannot be avoided, forward and backward."""
    *parts, key, value = attention_products(variant)
    pairs = batch * H * sum((i + 1) // rate + ((i + 1) % rate != 0) for i in range(tokens))
    # Forward, and in the backward pass the gradients of input and weight; scores and weights, and in the
    # backward pass the scores again, the weights' gradients and those of queries, keys and values.
    products = 3 * batch * tokens * sum(parts) + pairs * ((key + value) + (3 * key + 2 * value))
    return 2 * products / gflops / 1e6


def w1(binary, variants, lengths, batch, runs):
    for variant, rate in (name.split(":") for name in variants):
        for tokens in lengths:
            with tempfile.TemporaryDirectory() as folder:
                case = f"{folder}/case.json"
                write(case, variant, rate, tokens, batch)
                forms = ["naive"] if variant == "mtla" else ["naive", "fused"]
                ours = Side(binary, case, settings=KEEP_MEMORY)
                torch = {form: Side(*TORCH, "serve", case, form, settings=KEEP_MEMORY) for form in forms}
                ours.ask(f"check {folder}/ours")
                worst = 0.0
                for form, side in torch.items():
                    side.ask(f"check {folder}/{form}")
                    worst = max(worst, difference(f"{folder}/ours", f"{folder}/{form}"))
                if not worst < TOLERANCE:
                    raise SystemExit(f"{variant}, T = {tokens}: the sides differ by {worst}")
                times = {side: [] for side in ["ours", *forms]}
                speeds = []
                for _ in range(runs):
                    speeds.append(float(ours.ask("speed")))
                    times["ours"].append(float(ours.ask("time")))
                    for form, side in torch.items():
                        times[form].append(float(side.ask("time")))
                ms = {side: statistics.median(found) for side, found in times.items()}
                row = dict(variant=variant, down_rate=int(rate), T=tokens, ours_ms=round(ms["ours"], 1),
                           torch_ms=round(ms["naive"], 1), ratio=round(ms["naive"] / ms["ours"], 2))
                if "fused" in ms:
                    row["torch_fused_ms"] = round(ms["fused"], 1)
                row |= dict(ours_peak_mib=int(ours.ask("peak")) // 1024,
                            torch_peak_mib=int(torch["naive"].ask("peak")) // 1024,
                            floor_ms=round(floor(variant, int(rate), tokens, batch, statistics.median(speeds)), 1),
                            largest_difference=float(f"{worst:.1e}"))
                print(json.dumps(row), flush=True)
                for side in [ours, *torch.values()]:
                    side.close()


def search_floor(variant, rate, gflops, sentences, beam, source, new_tokens):
    """Seconds of the products that cannot be avoided in a search, with the latents as keys and values."""
    layers, d_ff, vocabulary = 9, 2048, 8000
    outer, inner, absorbed, key, value = attention_products(variant)
    if absorbed:
        key, value = RANK + ROPE, RANK
    rows = sentences * beam
    slots = sum((source + i) // rate + 1 for i in range(new_tokens))
    token = outer + inner + absorbed + 2 * D * d_ff
    products = layers * (sentences * source * inner + rows * (new_tokens * token + slots * H * (key + value)))
    return 2 * (products + rows * new_tokens * D * vocabulary) / gflops / 1e9


def search(binary, variants, sizes, runs):
    from safetensors.numpy import load_file

    for variant, rate in (name.split(":") for name in variants):
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([*TORCH_DECODE, "write", folder, variant, rate, *map(str, sizes.values())], check=True)
            sides = {"ours": Side(binary, folder, settings=KEEP_MEMORY),
                     "torch": Side(*TORCH_DECODE, "serve", folder, settings=KEEP_MEMORY)}
            for name, side in sides.items():
                side.ask(f"check {folder}/{name}")
            ours, torch = (load_file(f"{folder}/{name}")["tokens"] for name in sides)
            if (ours != torch).any():
                step = int((ours != torch).any(1).argmax())
                raise SystemExit(f"{variant}:{rate}: the sides choose different tokens from step {step} on")
            worst = difference(f"{folder}/ours", f"{folder}/torch")
            if not worst < TOLERANCE:
                raise SystemExit(f"{variant}:{rate}: the sides differ by {worst}")
            found, speeds = {name: [] for name in sides}, []
            for _ in range(runs):
                speeds.append(float(sides["ours"].ask("speed")))
                for name, side in sides.items():
                    found[name].append([float(x) for x in side.ask("run").split()])
            median = {name: [statistics.median(column) for column in zip(*runs)] for name, runs in found.items()}
            row = dict(variant=variant, down_rate=int(rate), **sizes)
            row |= {f"{name}_s": round(median[name][1], 3) for name in sides}
            row["ratio"] = round(median["torch"][1] / median["ours"][1], 2)
            row |= {f"{name}_first_s": round(median[name][0], 3) for name in sides}
            row["floor_s"] = round(search_floor(variant, int(rate), statistics.median(speeds), **sizes), 3)
            row |= {f"{name}_cache_bytes": int(median[name][2]) for name in sides}
            row |= dict(ours_live_bytes=int(median["ours"][3]), largest_difference=float(f"{worst:.1e}"))
            print(json.dumps(row), flush=True)
            for side in sides.values():
                side.close()


def memory(binary, variants, lengths):
    """Peak memory of one row; PyTorch only while its scores fit."""
    for variant, rate in (name.split(":") for name in variants):
        for tokens in lengths:
            with tempfile.TemporaryDirectory() as folder:
                case = f"{folder}/case.json"
                write(case, variant, rate, tokens, 1)
                row = dict(variant=variant, down_rate=int(rate), T=tokens)
                sides = {"ours": [binary, case]}
                if tokens <= 4096:
                    sides["torch"] = [*TORCH, "serve", case, "naive"]
                for name, command in sides.items():
                    side = Side(*command)
                    before = int(side.ask("peak"))
                    side.ask("time")
                    row[f"{name}_mib"] = round((int(side.ask("peak")) - before) / 1024, 1)
                    side.close()
                print(json.dumps(row), flush=True)


def llama(binary, variants, batches, prompt, new_tokens, runs):
    for variant, rate in (name.split(":") for name in variants):
        for batch in batches:
            with tempfile.TemporaryDirectory() as folder:
                subprocess.run([*TORCH_LLAMA, "write", folder, variant, rate, str(batch), str(prompt)], check=True)
                sides = {"ours": Side(binary, folder, settings=KEEP_MEMORY),
                         "torch": Side(*TORCH_LLAMA, "serve", folder, settings=KEEP_MEMORY)}
                for name, side in sides.items():
                    side.ask(f"check {folder}/{name}")
                worst = difference(f"{folder}/ours", f"{folder}/torch")
                if not worst < TOLERANCE:
                    raise SystemExit(f"{variant}, batch {batch}: the sides differ by {worst}")
                found = {name: [] for name in sides}
                for _ in range(runs):
                    for name, side in sides.items():
                        found[name].append([float(x) for x in side.ask(f"run {new_tokens}").split()])
                prefill, decode, held = ({name: statistics.median(run[i] for run in found[name]) for name in sides}
                                         for i in range(3))
                speed = {name: batch * (new_tokens - 1) / decode[name] * 1e3 for name in sides}
                row = dict(variant=variant, down_rate=int(rate), batch=batch, prompt=prompt, new_tokens=new_tokens)
                row |= {f"{name}_prefill_ms": round(prefill[name]) for name in sides}
                row["prefill_ratio"] = round(prefill["torch"] / prefill["ours"], 2)
                row |= {f"{name}_tokens_per_s": round(speed[name], 1) for name in sides}
                row["ratio"] = round(speed["ours"] / speed["torch"], 2)
                row |= {f"{name}_cache_bytes": int(held[name]) for name in sides}
                row |= {f"{name}_peak_mib": int(side.ask("peak")) // 1024 for name, side in sides.items()}
                row["largest_difference"] = float(f"{worst:.1e}")
                print(json.dumps(row), flush=True)
                for side in sides.values():
                    side.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=["w1", "w2", "w2long", "memory", "llama"])
    parser.add_argument("variants", nargs="*", help="such as mtla:2 or mha:1 (variant and down rate)")
    parser.add_argument("--tokens", help="lengths, such as 256,512")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--batches", default="1,8", help="of llama, such as 1,8")
    parser.add_argument("--new-tokens", type=int, default=128, help="of llama")
    parser.add_argument("--runs", type=int, help="timed runs of each side")
    arguments = parser.parse_args()
    numbers = [int(n) for n in arguments.tokens.split(",")] if arguments.tokens else None
    if arguments.work == "llama":
        batches = [int(n) for n in arguments.batches.split(",")]
        for prompt in numbers or [512]:
            llama(build("peer-llama"), arguments.variants or ["mtla:2", "mtla:4", "mha:1"], batches, prompt,
                  arguments.new_tokens, arguments.runs or 3)
    elif arguments.work in SEARCHES:
        search(build("peer-decode"), arguments.variants or VARIANTS, SEARCHES[arguments.work], arguments.runs or 3)
    elif arguments.work == "w1":
        lengths = numbers or [256, 512, 1024, 2048]
        w1(build("peer-layer"), arguments.variants or VARIANTS, lengths, arguments.batch, arguments.runs or 7)
    else:
        memory(build("peer-layer"), arguments.variants or ["mtla:2", "mha:1"], numbers or [1024, 2048, 4096, 8192, 16384])


if __name__ == "__main__":
    main()
