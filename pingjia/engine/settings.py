"""The recipe section `engine:`. Light: no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pingjia.recipe import Section


class EngineSettings(Section):
    """How many requests share a step, and how much memory their keys and values may take."""

    max_num_seqs: int = Field(16, ge=1, le=1024)
    """Requests computed together; the others wait."""
    max_num_batched_tokens: int = Field(512, ge=1)
    """Tokens of one step. Long prompts go in pieces of it; a two-way one (ChatGLM-6B) goes whole and may exceed it."""
    page_size: int = Field(16, ge=1, le=1024)
    """Tokens per KV page; prompts share whole pages."""
    kv_cache_tokens: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Tokens whose keys and values are kept. auto: what all seats can use, at most `kv_cache_gib` and a quarter of the
    memory that is free at the start."""
    kv_cache_gib: float = Field(2.0, gt=0)
    """Upper bound of the automatic pool."""
    kv_cache_dtype: Literal["auto", "float32", "float16", "int8"] = "auto"
    """Number format of kept keys and values. auto: float16 in the compiled pass, else what the network computes in."""
    fused: Literal["auto", "off"] = "auto"
    """auto: packed networks on a CPU compute a step in one call of compiled code, when every part of them is known."""
    quantize_head: bool = True
    """In the compiled pass: multiply by an INT8 copy of a head that is stored in floats."""
    max_model_len: int | None = Field(None, ge=2)
    """Prompt plus answer of one request. Default: what the network was built for, or the pool if that is smaller."""
    prefix_caching: bool = True
    """Keep the pages of ended requests and use them again for equal beginnings."""
    prompt_lookup: Literal["auto", "off"] = "auto"
    """auto: greedy answers guess at tokens that stood in the prompt or the answer before; the network confirms them."""
    max_loras: int = Field(16, ge=1)
    """Adapters that may be loaded at a time."""
    max_lora_rank: int = Field(256, ge=1)
    """Highest rank of an adapter."""
    seed: int | None = None
    """Where requests without a seed of their own take theirs from; default: the operating system."""
