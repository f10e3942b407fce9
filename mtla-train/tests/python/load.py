"""Loads the model directory DIR as Python users do and prints the tokens of TEXT and their logits as JSON.

    load.py DIR TEXT

Needs torch, transformers==4.51.3 and mtla, all from PyPI.
"""

import json
import sys

import mtla  # noqa: F401  registers llama-mtla
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

directory, text = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(directory)
model = AutoModelForCausalLM.from_pretrained(directory).eval()
ids = tokenizer(text)["input_ids"]
assert model.generation_config.eos_token_id == tokenizer.eos_token_id
assert tokenizer.decode(ids, skip_special_tokens=True) == text
with torch.no_grad():
    logits = model(torch.tensor([ids]), use_cache=False).logits
print(json.dumps({"ids": ids, "logits": logits.flatten().tolist()}))
