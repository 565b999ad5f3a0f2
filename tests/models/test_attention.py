"""Every family of the list, laid end to end, equals transformers' own attention sequence by sequence."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pingjia.models import family_of, max_model_len, use_packed_attention
from pingjia.models.attention import PackedSequences, prefix_mask, sdpa
from pingjia.models.registry import FAMILIES

SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "sliding_window": None,
}


def network(model_type: str, **changed: Any) -> PreTrainedModel:
    torch.manual_seed(3)
    config = AutoConfig.for_model(model_type, **(SHAPE | changed))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # norms and biases included
    return model.eval()


def sequences(lengths: list[int]) -> list[list[int]]:
    chance = random.Random(5)
    return [[chance.randrange(96) for _ in range(length)] for length in lengths]


def packed_logits(model: PreTrainedModel, rows: list[list[int]]) -> list[torch.Tensor]:
    family = family_of(model)
    positions = torch.cat([family.positions(model.config, row, 0, len(row)) for row in rows], dim=-1)
    logits = model(
        input_ids=torch.tensor([[token for row in rows for token in row]]),
        position_ids=positions.unsqueeze(0),
        packed=PackedSequences.of([len(row) for row in rows]),
        use_cache=False,
    ).logits[0]
    return list(logits.split([len(row) for row in rows]))


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
@torch.no_grad()
def test_packed_equals_one_by_one(model_type: str) -> None:
    model = network(model_type)
    rows = sequences([1, 7, 2, 19, 12])
    expected = [model(input_ids=torch.tensor([row]), use_cache=False).logits[0] for row in rows]
    use_packed_attention(model)
    for got, want in zip(packed_logits(model, rows), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
@torch.no_grad()
def test_a_sequence_does_not_depend_on_its_neighbours(model_type: str) -> None:
    model = network(model_type)
    use_packed_attention(model)
    row, *others = sequences([9, 5, 14])
    alone = packed_logits(model, [row])[0]
    between = packed_logits(model, [others[0], row, others[1]])[1]
    torch.testing.assert_close(between, alone, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_logits_only_where_they_are_wanted() -> None:
    model = network("llama")
    use_packed_attention(model)
    rows = sequences([5, 8])
    everything = torch.cat(packed_logits(model, rows))
    keep = torch.tensor([0, 4, 11])
    some = model(
        input_ids=torch.tensor([[token for row in rows for token in row]]),
        position_ids=torch.cat([torch.arange(5), torch.arange(8)]).unsqueeze(0),
        packed=PackedSequences.of([5, 8]),
        logits_to_keep=keep,
        use_cache=False,
    ).logits[0]
    torch.testing.assert_close(some, everything[keep])


@torch.no_grad()
def test_switching_back_gives_transformers_own_attention_again() -> None:
    model = network("qwen2")
    ids = torch.tensor(sequences([11]))
    before = model(input_ids=ids).logits
    use_packed_attention(model)
    with pytest.raises(AssertionError, match=r"needs packed=\.\.\."):
        model(input_ids=ids)
    model.set_attn_implementation("sdpa")
    assert torch.equal(model(input_ids=ids).logits, before)


def written_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prefix: int, scaling: float) -> torch.Tensor:
    """One sequence, [H, n, D]: who sees whom, spelt out with loops."""
    heads, count, _ = q.shape
    group = heads // k.shape[0]
    out = torch.zeros_like(q)
    for h in range(heads):
        for i in range(count):
            seen = [j for j in range(count) if j <= i or j < prefix]
            weights = torch.softmax(torch.stack([q[h, i] @ k[h // group, j] * scaling for j in seen]), 0)
            out[h, i] = sum(w * v[h // group, j] for w, j in zip(weights, seen, strict=True))
    return out


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.data())
def test_attend_equals_the_definition(lengths: list[int], data: st.DataObject) -> None:
    prefixes = [data.draw(st.integers(0, n)) for n in lengths]
    generator = torch.Generator().manual_seed(sum(lengths))
    q = torch.randn(1, 4, sum(lengths), 8, generator=generator)
    k, v = (torch.randn(1, 2, sum(lengths), 8, generator=generator) for _ in range(2))
    got = PackedSequences.of(lengths, prefixes).attend(0, q, k, v, scaling=0.3)
    assert got.shape == (1, sum(lengths), 4, 8)
    pieces = (t[0].split(lengths, dim=1) for t in (q, k, v))
    expected = [written_out(a, b, c, p, 0.3) for a, b, c, p in zip(*pieces, prefixes, strict=True)]
    torch.testing.assert_close(got[0].transpose(0, 1), torch.cat(expected, dim=1), rtol=1e-4, atol=1e-5)


def test_gradients_stay_within_a_sequence() -> None:
    q = torch.randn(1, 2, 7, 4)
    k, v = torch.randn(1, 2, 7, 4, requires_grad=True), torch.randn(1, 2, 7, 4, requires_grad=True)
    PackedSequences.of([3, 4]).attend(0, q, k, v, scaling=1.0)[:, :3].sum().backward()
    assert v.grad is not None
    assert v.grad[:, :, 3:].abs().max() == 0
    assert v.grad[:, :, :3].abs().min() > 0


def test_the_prefix_mask() -> None:
    rows = ["".join("x" if cell else "." for cell in row) for row in prefix_mask(4, 2, torch.device("cpu"))]
    assert rows == ["xx..", "xx..", "xxx.", "xxxx"]


def test_lengths_and_prefixes_belong_together() -> None:
    with pytest.raises(AssertionError):
        PackedSequences.of([1, 2], [0])
    assert PackedSequences.of([1, 2]) == PackedSequences((1, 2), (0, 0))


def test_dropout_reaches_the_attention() -> None:
    q, k, v = (torch.randn(1, 2, 9, 4) for _ in range(3))
    torch.manual_seed(0)
    plain = sdpa(q, k, v, mask=None, is_causal=True, scaling=1.0)
    assert not torch.equal(sdpa(q, k, v, mask=None, is_causal=True, scaling=1.0, dropout=0.5), plain)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "llama"}, 128),
        ({"model_type": "mistral", "sliding_window": 32}, 32),
        ({"model_type": "mistral", "sliding_window": None}, 128),
        ({"model_type": "mistral", "sliding_window": 4096}, 128),
        ({"model_type": "qwen2", "sliding_window": 32, "use_sliding_window": False}, 128),
        ({"model_type": "qwen2", "sliding_window": 32, "use_sliding_window": True, "max_window_layers": 1}, 32),
    ],
)
def test_a_sliding_window_ends_a_sequence(config: dict[str, Any], expected: int) -> None:
    kind = config.pop("model_type")
    assert max_model_len(AutoConfig.for_model(kind, **(SHAPE | config))) == expected
