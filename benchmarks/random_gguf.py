"""A GGUF file of random Q4_0 weights shaped like a Llama network: what llama.cpp is measured with at a real size."""

from __future__ import annotations

from pathlib import Path

import numpy as np

BLOCK = 32  # weights of one Q4_0 block: an fp16 scale and 16 bytes of nibbles
BLOCK_BYTES = 18


def write(
    path: Path, *, layers: int, hidden: int, inner: int, heads: int, vocab: int, context: int = 2048, seed: int = 0
) -> int:
    """Write the file; return how many weights it holds. Head and embeddings are one table, as in ChatGLM-6B."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama", use_temp_file=False)
    writer.add_context_length(context)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("none")
    matrices = {"token_embd": (vocab, hidden)}
    norms = {"output_norm": hidden}
    for layer in range(layers):
        block = f"blk.{layer}"
        matrices |= {f"{block}.attn_{name}": (hidden, hidden) for name in ("q", "k", "v", "output")}
        matrices |= {f"{block}.ffn_{name}": (inner, hidden) for name in ("gate", "up")}
        matrices |= {f"{block}.ffn_down": (hidden, inner)}
        norms |= {f"{block}.attn_norm": hidden, f"{block}.ffn_norm": hidden}
    kind = gguf.GGMLQuantizationType.Q4_0
    for name, (rows, columns) in matrices.items():
        stored = (rows, columns // BLOCK * BLOCK_BYTES)
        writer.add_tensor_info(f"{name}.weight", stored, np.dtype(np.uint8), rows * stored[1], raw_dtype=kind)
    for name, size in norms.items():
        writer.add_tensor_info(f"{name}.weight", (size,), np.dtype(np.float32), size * 4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    random = np.random.default_rng(seed)
    for rows, columns in matrices.values():
        writer.write_tensor_data(_random_q4_0(random, rows, columns))
    for size in norms.values():
        writer.write_tensor_data(np.ones(size, np.float32))
    writer.close()
    return sum(rows * columns for rows, columns in matrices.values())


def _random_q4_0(random: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    blocks = random.integers(0, 256, (rows, columns // BLOCK, BLOCK_BYTES), dtype=np.uint8)
    scale = np.float16(columns**-0.5 / 4)
    blocks[:, :, :2] = np.frombuffer(scale.tobytes(), np.uint8)
    return blocks.reshape(rows, -1)
