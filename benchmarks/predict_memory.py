"""Predicted GPU memory of tuning ChatGLM-6B: exact for weights, adapter and optimizer, estimated for the rest.

Nothing is run: the network is built without storage and counted. What is estimated, and how:
- activations kept per layer and token without checkpointing, in elements (h hidden, i inner, H heads, T row length):
  two norms 2h, query/key/value 3h, attention output 2h, block output h, MLP 2i, and with SDPA no T x T scores: 8h + 2i;
- with gradient checkpointing only one h per layer and token, plus one layer's working set while it is recomputed;
- logits and their gradient in float32, only where a token is learnt (half of the row is assumed): V x T/2 x 8 bytes.
Not counted: the CUDA context (0.3-0.8 GB) and the allocator's fragmentation.

Usage: python benchmarks/predict_memory.py [--rows 1] [--length 1024]
"""

from __future__ import annotations

import argparse
import json

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import pingjia.models  # noqa: F401  registers ChatGLM
from pingjia.models.chatglm_config import ChatGLMConfig
from pingjia.models.registry import family_of

SIZE = {16: 2.0, 8: 1.0, 4: 0.5}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=1024)
    options = parser.parse_args()
    config = ChatGLMConfig(
        vocab_size=130528, hidden_size=4096, inner_hidden_size=16384, num_layers=28, num_attention_heads=32
    )
    family_of(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linears = sum(
        m.weight.numel() for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n
    )
    total = sum(p.numel() for p in model.parameters())
    adapted = get_peft_model(model, LoraConfig(r=16, target_modules=["query_key_value"]))
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    rows = [
        predict(config, total, linears, trainable, bits, checkpointing, options.rows, options.length)
        for bits in (16, 8, 4)
        for checkpointing in (False, True)
    ]
    print(f"ChatGLM-6B, LoRA r=16 on query_key_value: {trainable:,} trainable of {total:,} parameters")
    print(f"{options.rows} x {options.length} tokens, GB:")
    print("base   checkpointing  weights  adapter+optimizer  activations  logits    sum")
    for row in rows:
        sizes = (row["weights"], row["adapter"], row["activations"], row["logits"], row["sum"])
        cells = [f"{size:{width}.2f}" for size, width in zip(sizes, (7, 18, 12, 7, 6), strict=True)]
        print(f"{row['base']:<6} {row['checkpointing']!s:<13}", *cells)
    print(json.dumps({"trainable": trainable, "parameters": total, "settings": rows}))


def predict(config, total, linears, trainable, bits, checkpointing, num_rows, length):  # type: ignore[no-untyped-def]
    tokens, h, i = num_rows * length, config.hidden_size, config.inner_hidden_size
    weights = linears * SIZE[bits] + (total - linears) * 2.0
    layer = (8 * h + 2 * i) * tokens * 2.0
    activations = config.num_layers * h * tokens * 2.0 + layer if checkpointing else config.num_layers * layer
    parts = {
        "weights": weights,
        "adapter": trainable * (4 + 4 + 8),  # float32 matrices, gradients, two Adam moments
        "activations": activations,
        "logits": config.vocab_size * tokens / 2 * 8,
    }
    found = {name: value / 1e9 for name, value in parts.items()}
    return {"base": f"{bits} bit", "checkpointing": checkpointing, **found, "sum": sum(found.values())}


if __name__ == "__main__":
    main()
