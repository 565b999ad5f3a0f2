"""The compiled pass against transformers' own forward, and against itself in every other mix, cut and order."""

from __future__ import annotations

import dataclasses
import logging
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GlmConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from pingjia.chat import Tokenizer, load_tokenizer
from pingjia.engine import Engine, EngineSettings
from pingjia.engine import fused_abi as abi
from pingjia.engine.fused import FusedRunner, description_for
from pingjia.engine.fused_kv import FusedPool
from pingjia.engine.fused_network import CannotFuseError, Description, Rotation, describe
from pingjia.engine.kv import KVPool, LayerShape, kept_as
from pingjia.engine.lora import AdapterRows, LoraWeights, attach, detach
from pingjia.engine.runner import Runner, probe
from pingjia.engine.sequence import Sequence, Slice
from pingjia.models import family_of, load_model, use_packed_attention
from pingjia.models.chatglm import ChatGLMForCausalLM
from pingjia.models.chatglm2 import ChatGLM2ForCausalLM
from pingjia.models.chatglm_config import ChatGLM2Config, ChatGLMConfig
from pingjia.quant import HalfLinear, kernels, quantize_model
from pingjia.quant.convert import packable
from pingjia.quant.formats import PackedLinear
from pingjia.quant.group import GroupInt4Linear, GroupInt8Linear, pack_groups
from pingjia.types import Completion, Message, Request, Sampling

pytestmark = pytest.mark.skipif(not kernels.available(), reason=f"no kernels: {kernels.why_not()}")

GMASK, SOP = 124, 126
SHAPE: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "llama, odd head size": lambda: LlamaConfig(**SHAPE | {"head_dim": 18, "num_key_value_heads": 8}),
    "llama, one key head": lambda: LlamaConfig(**SHAPE | {"num_key_value_heads": 1, "attention_bias": True}),
    "llama, scaled rotation": lambda: LlamaConfig(**SHAPE, rope_parameters=LLAMA3),
    "mistral": lambda: MistralConfig(**SHAPE, head_dim=32),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=16),
    "glm": lambda: GlmConfig(**SHAPE, head_dim=16),
    "chatglm": lambda: ChatGLMConfig(
        vocab_size=128, hidden_size=64, num_layers=3, num_attention_heads=4, inner_hidden_size=96,
        max_sequence_length=512, mask_token_id=123, gmask_token_id=GMASK, bos_token_id=SOP, eos_token_id=127,
        tie_word_embeddings=False,
    ),
    "chatglm2": lambda: ChatGLM2Config(
        padded_vocab_size=128, hidden_size=64, num_layers=3, num_attention_heads=4, multi_query_group_num=2,
        kv_channels=16, ffn_hidden_size=96, seq_length=512, eos_token_id=2, pad_token_id=0, bos_token_id=1,
    ),
}  # fmt: skip
NAMES = list(CONFIGS)


def make(name: str, seed: int = 0, bits: int | None = 8) -> PreTrainedModel:
    """Random weights, biases and norms, large enough that a wrong mask, position or bias changes the logits."""
    config, generator = CONFIGS[name](), torch.Generator().manual_seed(seed)
    classes: dict[type, Any] = {ChatGLMConfig: ChatGLMForCausalLM, ChatGLM2Config: ChatGLM2ForCausalLM}
    model = classes[type(config)](config) if type(config) in classes else AutoModelForCausalLM.from_config(config)
    for path, parameter in model.named_parameters():
        # ChatGLM's residual weighs 7.5 times as much as what is added to it.
        size = 6.0 if name == "chatglm" and "dense" in path else 1.2
        is_gain = "norm" in path and path.endswith("weight")
        spread = (
            0.2 if is_gain or path.endswith("bias") else 0.5 if "embed" in path else size / parameter.shape[-1] ** 0.5
        )
        parameter.data = torch.randn(parameter.shape, generator=generator) * spread + is_gain
    model.eval()
    return quantize_model(model, bits) if bits else model


def make_grouped(name: str, bits: int) -> PreTrainedModel:
    """The same network with a scale per 32 columns, as `pingjia quantize` stores it."""
    model = make(name, bits=None)
    for path in packable(model):
        linear = model.get_submodule(path)
        values, scale = rounded_in_groups(linear.weight.detach(), bits)
        kind = GroupInt8Linear if bits == 8 else GroupInt4Linear
        grouped = kind(linear.in_features, linear.out_features, linear.bias is not None, group_size=32)
        grouped.weight = nn.Parameter(values if bits == 8 else pack_groups(values), requires_grad=False)
        grouped.weight_scale, grouped.bias = scale, linear.bias
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, grouped)
    return model


def rounded_in_groups(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    grouped = weight.unflatten(1, (-1, 32))
    scale = (grouped.abs().amax(-1) / (2 ** (bits - 1) - 1)).half()
    return (grouped / scale.float()[..., None]).round().flatten(1).to(torch.int8), scale


# ---- references


class RoundedLinear(nn.Module):
    """A packed linear in floats whose input is rounded as the kernels round it, with one scale per 32 columns.

    To int8 beside INT4 weights. Beside INT8 ones they keep 16 bits, which float32 does not tell from no rounding.
    """

    def __init__(self, packed: PackedLinear) -> None:
        super().__init__()
        self.weight, self.bias = packed.dequantize(), packed.bias
        self.in_features, self.out_features, self.bits = packed.in_features, packed.out_features, packed.bits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.bits == 8:
            return F.linear(x.float(), self.weight, self.bias)
        groups = F.pad(x.float(), (0, -x.shape[-1] % 32)).unflatten(-1, (-1, 32))
        scale = groups.abs().amax(-1, keepdim=True) / 127
        rounded = (groups / torch.where(scale > 0, scale, 1.0)).round() * scale
        return F.linear(rounded.flatten(-2)[..., : x.shape[-1]], self.weight, self.bias)


def rounded_copy(name: str, seed: int = 0, bits: int = 8) -> PreTrainedModel:
    """The same network for transformers' own forward: float products of rounded inputs."""
    return with_rounded_inputs(make(name, seed, bits))


def with_rounded_inputs(model: PreTrainedModel) -> PreTrainedModel:
    for path, module in list(model.named_modules()):
        if isinstance(module, PackedLinear):
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, RoundedLinear(module))
    return model


@torch.inference_mode()
def plain_logits(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """[T, V] of transformers' own forward over the whole sequence."""
    model.set_attn_implementation("sdpa")
    return model(input_ids=torch.tensor([ids])).logits[0]


# ---- the pass, without an engine around it


class Bench:
    """A runner with pages for a few sequences. `describe_` may change the description: planted faults."""

    def __init__(
        self, model: PreTrainedModel, page_size: int = 16, kv_dtype: torch.dtype = torch.float32,
        describe_: Callable[[Description], Description] = lambda d: d, *, quantize_head: bool = False,
        num_pages: int = 200,
    ) -> None:  # fmt: skip
        self.model, self.family = model, family_of(model)
        use_packed_attention(model)
        layers, _ = probe(model, self.family, [5, GMASK, SOP])
        self.pool = FusedPool(kept_as(layers, kv_dtype), num_pages, page_size)
        self.adapter_rows = AdapterRows()
        self.runner = FusedRunner(
            model,
            self.family,
            describe_(describe(model, 512)),
            self.pool,
            self.adapter_rows,
            quantize_head=quantize_head,
        )
        self._free = list(range(num_pages))
        random.Random(1).shuffle(self._free)

    def sequence(self, ids: list[int], adapter: str | None = None) -> Sequence:
        found = Sequence("s", 0, list(ids), prefix_len=self.family.prefix_len(self.model.config, ids), adapter=adapter)
        count = -(-len(ids) // self.pool.page_size)
        found.pages, self._free = self._free[:count], self._free[count:]
        return found

    def run(self, *pieces: tuple[Sequence, int, int]) -> torch.Tensor:
        return self.runner.run([Slice(sequence, start, stop, True) for sequence, start, stop in pieces])

    def token_by_token(self, ids: list[int], adapter: str | None = None) -> torch.Tensor:
        """[T, V]; a two-way prefix goes whole, and its rows but the last are missing."""
        sequence = self.sequence(ids, adapter)
        first = max(sequence.prefix_len, 1)
        rows = [self.run((sequence, 0, first))]
        return torch.cat(rows + [self.run((sequence, i, i + 1)) for i in range(first, len(ids))])


def prompt(name: str, length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    ids = [rng.randrange(3, 120) for _ in range(length)]
    return [*ids[: length * 2 // 3], GMASK, SOP, *ids[length * 2 // 3 :]] if name == "chatglm" else ids


def off_by(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square difference over the spread of what was expected."""
    return float((found - expected).pow(2).mean().sqrt() / expected.std())


# A rounding that falls the other way in one column is the only difference to expect; planted faults give 10 % and more.
CLOSE = 0.02


@pytest.fixture(params=kernels.isa_names() if kernels.available() else [])
def every_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = kernels.isa()
    kernels.choose_isa(request.param)
    yield request.param
    kernels.choose_isa(before)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", NAMES)
def test_every_family_equals_its_own_forward(name: str, bits: int) -> None:
    ids = prompt(name, 61)
    expected = plain_logits(rounded_copy(name, bits=bits), ids)
    found = Bench(make(name, bits=bits)).token_by_token(ids)
    assert off_by(found, expected[-len(found) :]) < CLOSE
    assert len(found) > 15


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ["llama", "chatglm", "chatglm2"])
def test_weights_in_groups_equal_the_forward_of_their_own_values(name: str, bits: int) -> None:
    ids = prompt(name, 61)
    expected = plain_logits(with_rounded_inputs(make_grouped(name, bits)), ids)
    found = Bench(make_grouped(name, bits)).token_by_token(ids)
    assert off_by(found, expected[-len(found) :]) < CLOSE


@pytest.mark.parametrize("name", ["llama", "llama, odd head size", "chatglm", "chatglm2"])
def test_every_instruction_set_gives_the_same(name: str, every_isa: str) -> None:
    ids = prompt(name, 40)
    expected = plain_logits(rounded_copy(name), ids)
    for kv_dtype in (torch.float32, torch.float16, torch.int8):
        found = Bench(make(name), kv_dtype=kv_dtype).token_by_token(ids)
        assert off_by(found, expected[-len(found) :]) < (CLOSE if kv_dtype != torch.int8 else 0.05)


def swapped_rotation(d: Description) -> Description:
    kinds = {abi.ROPE_HALVES: abi.ROPE_PAIRS, abi.ROPE_PAIRS: abi.ROPE_HALVES, abi.ROPE_TWO_HALVES: abi.ROPE_HALVES}
    return dataclasses.replace(d, rotation=dataclasses.replace(d.rotation, kind=kinds[d.rotation.kind]))


def backward_rotation(d: Description) -> Description:
    return dataclasses.replace(d, rotation=Rotation(d.rotation.kind, d.rotation.cos_PF, -d.rotation.sin_PF.roll(1, 0)))


def other_scaling(d: Description) -> Description:
    return dataclasses.replace(d, heads=dataclasses.replace(d.heads, scaling=d.heads.scaling * 1.5))


def other_residual(d: Description) -> Description:
    return dataclasses.replace(d, residual=1.0 if d.residual is None else None)


def swapped_norms(d: Description) -> Description:
    return dataclasses.replace(d, blocks=tuple(
        dataclasses.replace(b, attention_norm=b.mlp_norm, mlp_norm=b.attention_norm) for b in d.blocks
    ))  # fmt: skip


def swapped_layers(d: Description) -> Description:
    return dataclasses.replace(d, blocks=(d.blocks[1], d.blocks[0], *d.blocks[2:]))


FAULTS = [swapped_rotation, backward_rotation, other_scaling, other_residual, swapped_norms, swapped_layers]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["llama", "chatglm", "chatglm2"])
def test_a_planted_fault_is_caught(name: str, fault: Callable[[Description], Description]) -> None:
    ids = prompt(name, 61)
    expected = plain_logits(rounded_copy(name), ids)
    found = Bench(make(name), describe_=fault).token_by_token(ids)
    assert off_by(found, expected[-len(found) :]) > 2 * CLOSE


def test_a_two_way_prompt_read_one_way_is_caught() -> None:
    ids = prompt("chatglm", 61)
    bench = Bench(make("chatglm"))
    sequence = bench.sequence(ids)
    sequence.prefix_len = 0
    assert off_by(bench.run((sequence, 0, len(ids))), plain_logits(rounded_copy("chatglm"), ids)[-1:]) > 2 * CLOSE


# ---- the same bits, whoever shares the step


@pytest.mark.parametrize("page_size", [1, 4, 16, 20, 64])
@pytest.mark.parametrize("name", ["llama", "llama, odd head size", "qwen3", "chatglm", "chatglm2"])
def test_a_row_does_not_depend_on_how_a_prompt_is_cut_or_who_shares_the_step(name: str, page_size: int) -> None:
    model = make(name)
    bench = Bench(model, page_size, num_pages=900)
    prompts = [prompt(name, length, seed=length) for length in (3, 17, 150, 40, 33)]
    alone = [bench.token_by_token(ids) for ids in prompts]
    rng = random.Random(page_size)
    sequences = [bench.sequence(ids) for ids in prompts]
    at = dict.fromkeys(range(len(prompts)), 0)
    while at:
        pieces = []
        for i in rng.sample(sorted(at), rng.randrange(1, len(at) + 1)):
            whole = max(sequences[i].prefix_len - at[i], 1)
            stop = min(at[i] + max(whole, rng.choice((1, 1, 5, 30))), len(prompts[i]))
            pieces.append((i, at[i], stop))
        logits = bench.run(*((sequences[i], start, stop) for i, start, stop in pieces))
        for row, (i, _, stop) in zip(logits, pieces, strict=True):
            assert torch.equal(row, alone[i][stop - 1 - (len(prompts[i]) - len(alone[i]))])
            at[i] = stop
            if stop == len(prompts[i]):
                del at[i]


def test_one_thread_and_several_give_the_same_bits() -> None:
    ids, threads = prompt("llama", 300), kernels.num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            kernels.set_num_threads(count)
            bench = Bench(make("llama"))
            whole = bench.run((bench.sequence(ids), 0, len(ids)))
            found.append(torch.cat([whole, bench.token_by_token(ids)[-5:]]))
    finally:
        kernels.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert torch.equal(found[0][0], found[0][-1])


def test_a_sequence_of_nothing_but_numbers_that_are_none_hurts_only_itself() -> None:
    bench = Bench(make("llama"))
    sound, broken = bench.sequence(prompt("llama", 20)), bench.sequence(prompt("llama", 20, seed=1))
    expected = bench.run((sound, 0, 20))
    bench.run((broken, 0, 19))
    bench.pool.v[1][broken.pages[0]] = torch.nan
    logits = bench.run((broken, 19, 20), (sound, 0, 20))
    assert bench.runner.judge(logits)[0] == [False, True]
    assert torch.equal(logits[1], expected[0])


def test_the_judgement_is_that_of_the_logits() -> None:
    bench = Bench(make("llama"))
    logits = bench.run(*((bench.sequence(prompt("llama", n, seed=n)), 0, n) for n in range(3, 12)))
    assert bench.runner.judge(logits) == ([True] * 9, logits.argmax(-1).tolist())
    assert bench.runner.judge(logits * torch.nan)[0] == [False] * 9


def test_a_position_beyond_the_table_computes_nothing() -> None:
    bench = Bench(make("llama"), page_size=64)
    long = bench.sequence(prompt("llama", 600))
    with pytest.raises(IndexError, match="beyond the tables"):
        bench.run((long, 0, 600))


# ---- heads, pages


def test_a_head_of_floats_is_exact_and_its_int8_copy_near() -> None:
    ids = prompt("llama", 40)
    hidden = plain_hidden(ids)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        model = make("llama")
        model.lm_head.weight.data = model.lm_head.weight.data.to(dtype)
        expected = hidden @ model.lm_head.weight.detach().float().T
        model.lm_head.__class__ = HalfLinear
        assert off_by(Bench(model).token_by_token(ids), expected) < CLOSE
        assert off_by(Bench(model, quantize_head=True).token_by_token(ids), expected) < 1.5 * CLOSE


def test_a_head_kept_in_floats_is_not_rounded() -> None:
    bench, ids = Bench(make("llama")), prompt("llama", 20)
    logits = bench.run((bench.sequence(ids), 0, 20))
    assert not torch.equal(logits, Bench(bench.model, quantize_head=True).run((bench.sequence(ids), 0, 20)))


@torch.no_grad()
def plain_hidden(ids: list[int]) -> torch.Tensor:
    model = rounded_copy("llama")
    model.set_attn_implementation("sdpa")
    return model.model(input_ids=torch.tensor([ids])).last_hidden_state[0]


@pytest.mark.parametrize("name", ["llama", "chatglm"])
def test_rounded_pages_change_little(name: str) -> None:
    ids = prompt(name, 200)
    found = {
        dtype: Bench(make(name), kv_dtype=dtype).token_by_token(ids)
        for dtype in (torch.float32, torch.float16, torch.int8)
    }
    exact = found[torch.float32]
    assert 0 < off_by(found[torch.float16], exact) < CLOSE
    assert 0 < off_by(found[torch.int8], exact) < 2.5 * CLOSE


def test_bytes_of_a_token_are_what_the_pools_allocate() -> None:
    shape = LayerShape(2, 24, torch.float32, torch.device("cpu"))
    for dtype, expected in ((torch.float32, 384), (torch.float16, 192), (torch.int8, 112)):
        layers = kept_as({0: shape, 1: shape}, dtype)
        assert layers[0].bytes_per_token == expected
        for pool in (KVPool(layers, 3, 16), FusedPool(layers, 3, 16)):
            assert pool.num_bytes == 2 * 3 * 16 * expected


@pytest.mark.parametrize("stored", [torch.float16, torch.int8])
def test_the_torch_path_reads_rounded_pages_alike_however_a_prompt_is_cut(stored: torch.dtype) -> None:
    model = make("llama", bits=None)
    expected = plain_logits(model, ids := prompt("llama", 90))[-1]
    use_packed_attention(model)
    layers, _ = probe(model, family_of(model), [5, 6])

    def last(*ends: int) -> torch.Tensor:
        pool = KVPool(kept_as(layers, stored), 20, 16)
        runner, sequence = Runner(model, family_of(model), pool, AdapterRows()), Sequence("s", 0, list(ids))
        sequence.pages = [3, 7, 1, 0, 9, 12]
        for start, stop in zip((0, *ends), (*ends, 90), strict=True):
            logits = runner.run([Slice(sequence, start, stop, True)])
        return logits[0]

    assert 0 < off_by(last(), expected) < 2 * CLOSE
    assert torch.allclose(last(), last(1, 16, 50, 51), atol=2e-3)


# ---- adapters


def lora_for(model: PreTrainedModel, endings: tuple[str, ...], seed: int, rank: int) -> dict[str, LoraWeights]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for path, linear in model.named_modules():
        if path.endswith(endings):
            a = torch.randn(rank, linear.in_features, generator=generator) * 0.1
            found[path] = LoraWeights(a, torch.randn(linear.out_features, rank, generator=generator) * 0.1)
    return found


ENDINGS = {
    "llama": ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "chatglm": ("query_key_value", "dense_4h_to_h"),
    "chatglm2": ("query_key_value", "dense_h_to_4h", "self_attention.dense"),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_adapters_in_one_step_equal_each_alone_and_the_torch_path(name: str) -> None:
    model, twin = make(name), rounded_copy(name)
    adapters = {f"a{i}": lora_for(model, ENDINGS[name], i, rank=(3, 16)[i % 2]) for i in range(3)}
    bench = Bench(model, num_pages=400)
    for key, weights in adapters.items():
        attach(model, key, weights, bench.adapter_rows)
    bench.runner.adapters_changed()
    prompts = {key: prompt(name, 30, seed=5) for key in [*adapters, None]}
    alone = {key: bench.token_by_token(ids, key) for key, ids in prompts.items()}
    mixed = bench.run(*((bench.sequence(ids, key), 0, len(ids)) for key, ids in prompts.items()))
    for row, (key, ids) in zip(mixed, prompts.items(), strict=True):
        assert torch.equal(row, alone[key][-1])
        assert off_by(row, torch_path(twin, adapters, key, ids)) < 2 * CLOSE
    assert len({tuple(row.tolist()) for row in mixed}) == 4


def torch_path(
    model: PreTrainedModel, adapters: dict[str, dict[str, LoraWeights]], key: str | None, ids: list[int]
) -> torch.Tensor:
    """The last row of logits of the torch runner, one adapter attached."""
    rows, family = AdapterRows(), family_of(model)
    use_packed_attention(model)
    if key:
        attach(model, key, adapters[key], rows)
    layers, _ = probe(model, family, [5, GMASK, SOP])
    sequence = Sequence("s", 0, ids, prefix_len=family.prefix_len(model.config, ids), adapter=key)
    sequence.pages = list(range(8))
    logits = Runner(model, family, KVPool(layers, 8, 16), rows).run([Slice(sequence, 0, len(ids), True)])
    if key:
        detach(model, key)
    return logits[0]


def test_an_adapter_that_is_taken_away_is_gone() -> None:
    model, ids = make("llama"), prompt("llama", 20)
    bench = Bench(model)
    base = bench.token_by_token(ids)
    attach(model, "a", lora_for(model, ENDINGS["llama"], 0, 4), bench.adapter_rows)
    bench.runner.adapters_changed()
    assert torch.equal(bench.token_by_token(ids), base)
    assert not torch.equal(bench.token_by_token(ids, "a"), base)
    detach(model, "a")
    bench.runner.adapters_changed()
    assert torch.equal(bench.token_by_token(ids, "a"), base)


# ---- which networks


def test_what_is_not_known_runs_in_torch_and_says_why(letters: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    def runner_of(model: PreTrainedModel, **settings: Any) -> str:
        return type(Engine(model, tokenizer=letters, settings=EngineSettings(**settings))._runner).__name__

    with caplog.at_level(logging.INFO, "pingjia.engine"):
        assert runner_of(make("llama")) == "FusedRunner"
        assert runner_of(make("llama"), fused="off") == "Runner"
        assert "engine.fused is off" in caplog.text
        assert runner_of(make("llama", bits=None)) == "Runner"
        assert "is not packed" in caplog.text
        model = make("llama")
        model.model.layers[1].mlp.act_fn = nn.GELU()
        assert runner_of(model) == "Runner"
        assert "activation GELU, not SiLU" in caplog.text


def test_a_network_with_other_parts_is_refused() -> None:
    def reason(change: Callable[[Any], Any]) -> str:
        model = make("llama")
        change(model)
        with pytest.raises(CannotFuseError) as caught:
            describe(model, 64)
        return str(caught.value)

    assert "extra" in reason(lambda m: m.model.layers[2].self_attn.add_module("extra", nn.Identity()))
    assert "unknown norm" in reason(lambda m: setattr(m.model, "norm", nn.Identity()))
    assert "forward hooks" in reason(lambda m: m.model.layers[0].register_forward_hook(lambda *_: None))
    assert "dynamic" in reason(lambda m: setattr(m.model.rotary_emb, "rope_type", "dynamic"))
    assert "o_proj is not packed" in reason(lambda m: setattr(m.model.layers[0].self_attn, "o_proj", nn.Linear(64, 64)))


def test_no_kernels_no_compiled_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "available", lambda: False)
    monkeypatch.setattr(kernels, "why_not", lambda: "not built")
    assert description_for(make("llama"), 64, "auto") is None


# ---- the engine around it


class GLMLetters:
    def __init__(self, letters: Tokenizer) -> None:
        self._letters = letters
        self.stop_ids = frozenset({127})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._letters, name)

    def render_text(self, text: str) -> list[int]:
        return [*map(ord, text), GMASK, SOP]


def texts() -> list[str]:
    """Many begin alike; two are equal."""
    rng = random.Random(0)
    beginning = "".join(chr(rng.randrange(32, 120)) for _ in range(40))
    ends = ["".join(chr(rng.randrange(32, 120)) for _ in range(rng.randrange(1, 30))) for _ in range(6)]
    return [beginning + end for end in ends] + ends[:3] + [beginning + ends[0]]


def ids_of(answers: list[Completion]) -> list[list[int]]:
    return [list(answer.token_ids) for answer in answers]


SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "pieces": {"max_num_batched_tokens": 7},
    "preemption": {"page_size": 4, "kv_cache_tokens": 200},
    "no reuse, int8": {"prefix_caching": False, "kv_cache_dtype": "int8"},
    "int8, pieces, reuse": {"kv_cache_dtype": "int8", "max_num_batched_tokens": 9, "page_size": 8},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("name", ["llama", "chatglm", "chatglm2"])
def test_answers_are_the_same_alone_and_in_any_company(name: str, settings: Any, letters: Tokenizer) -> None:
    tokenizer: Any = GLMLetters(letters) if name == "chatglm" else letters
    sampling = Sampling(max_tokens=25)

    def engine(**changes: Any) -> Engine:
        found = Engine(make(name), tokenizer=tokenizer, settings=EngineSettings(**settings | changes))
        assert isinstance(found._runner, FusedRunner)
        return found

    one_by_one = engine(max_num_seqs=1, prefix_caching=False)
    expected = [ids_of(one_by_one.generate(text, sampling))[0] for text in texts()]
    assert len({tuple(ids) for ids in expected}) >= 8, "answers must differ, or a mix-up would not show"
    together = engine()
    for _ in range(2):
        assert ids_of(together.generate(texts(), sampling)) == expected
    if "kv_cache_tokens" in settings:
        assert together._scheduler.num_preemptions > 0
    elif settings.get("prefix_caching", True):
        assert together.stats().cached_tokens_total > 0


def test_a_cancelled_request_leaves_the_others_as_they_are(letters: Tokenizer) -> None:
    sampling = Sampling(max_tokens=20)
    engine = Engine(make("llama"), tokenizer=letters, settings=EngineSettings(max_num_batched_tokens=16))
    expected = ids_of(engine.generate(texts()[:4], sampling))
    engine = Engine(make("llama"), tokenizer=letters, settings=EngineSettings(max_num_batched_tokens=16))
    for i, text in enumerate(texts()[:4]):
        engine.add(Request(str(i), tuple(letters.render_text(text)), sampling))
    engine.add(Request("doomed", tuple(letters.render_text("x" * 50)), sampling))
    got: dict[str, list[int]] = {}
    while engine.has_work():
        for request_id, chunk in engine.step():
            got.setdefault(request_id, []).extend(chunk.token_ids)
        if engine.stats().num_steps == 6:
            engine.cancel("doomed")
    assert [got[str(i)] for i in range(4)] == expected


FIXTURES = Path(__file__).resolve().parents[2] / ".." / "shared" / "fixtures" / "chatglm"


@pytest.mark.parametrize("name", ["tiny_v1_chat_int8", "tiny_v1_chat_int4"])
def test_trained_chatglm_answers_as_it_does_in_torch(name: str) -> None:
    if not (FIXTURES / name).is_dir():
        pytest.skip(f"no {name} in ../shared/fixtures/chatglm beside the repository")
    tokenizer = load_tokenizer(FIXTURES / name)
    chats = [[Message("user", text)] for text in ("你好", "介绍一下清华大学", "hello", "你好，你是谁？")]
    answers = {}
    for fused in ("off", "auto"):
        engine = Engine(load_model(FIXTURES / name), tokenizer=tokenizer, settings=EngineSettings(fused=fused))
        answers[fused] = [a.text for a in engine.generate(chats, Sampling(max_tokens=30))]
        assert isinstance(engine._runner, FusedRunner) == (fused == "auto")
    assert answers["auto"] == answers["off"]
    assert len(set(answers["auto"])) > 2
