"""Settings with `auto` in them -> the numbers an engine keeps to. Arithmetic only; no torch."""

from __future__ import annotations

from dataclasses import dataclass

from pingjia.engine.settings import EngineSettings
from pingjia.errors import RecipeError

SHARE_OF_FREE_MEMORY = 0.25


@dataclass(frozen=True, slots=True)
class Limits:
    """What one engine can hold. `kv_bytes` is allocated once, at the start, and never grows."""

    max_model_len: int
    max_num_seqs: int
    kv_cache_tokens: int
    kv_bytes: int

    def describe(self) -> str:
        """One line for a log."""
        return (
            f"KV cache: {self.kv_cache_tokens} tokens, {self.kv_bytes / 2**30:.2f} GiB; "
            f"at most {self.max_num_seqs} requests at once, {self.max_model_len} tokens each"
        )


def resolve(settings: EngineSettings, *, model_len: int, bytes_per_token: int, free_bytes: int) -> Limits:
    """Turn `auto` into numbers, rounding the pool up to whole pages.

    Raises RecipeError when a request of the wanted length could never fit the pool or the network.
    """
    wanted = settings.max_model_len or model_len
    if wanted > model_len:
        raise RecipeError(f"max_model_len {wanted}: the network was built for {model_len} tokens; give at most that")
    tokens = settings.kv_cache_tokens
    if tokens == "auto":
        tokens = _auto_tokens(settings, wanted, bytes_per_token, free_bytes)
    if settings.max_model_len and settings.max_model_len > tokens:
        raise RecipeError(
            f"max_model_len {settings.max_model_len} needs that many KV tokens, but the pool holds {tokens}; "
            "lower max_model_len or raise kv_cache_tokens (or kv_cache_gib)"
        )
    tokens = -(-tokens // settings.page_size) * settings.page_size
    return Limits(min(wanted, tokens), settings.max_num_seqs, tokens, tokens * bytes_per_token)


def _auto_tokens(settings: EngineSettings, max_model_len: int, bytes_per_token: int, free_bytes: int) -> int:
    budget = min(settings.kv_cache_gib * 2**30, free_bytes * SHARE_OF_FREE_MEMORY)
    affordable = int(budget // bytes_per_token) // settings.page_size * settings.page_size
    if affordable < settings.page_size:
        raise RecipeError(
            f"no room for a KV cache: {free_bytes / 2**20:.0f} MiB are free and a page of {settings.page_size} tokens "
            f"takes {bytes_per_token * settings.page_size / 2**20:.1f} MiB; free some memory or set kv_cache_tokens"
        )
    return min(affordable, settings.max_num_seqs * max_model_len)
