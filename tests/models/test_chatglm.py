"""ChatGLM networks of all generations: the ways they are run must agree, and misuse must say so."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from pingjia.errors import ModelError
from pingjia.models.attention import PackedSequences, sdpa, use_packed_attention
from pingjia.models.chatglm import (
    ALPHA,
    ChatGLMForCausalLM,
    ChatGLMModel,
    glm_positions,
    glm_prefix_len,
    prefix_cache,
    rotary_tables,
)
from pingjia.models.chatglm import FAMILY as V1_FAMILY
from pingjia.models.chatglm2 import FAMILY as V2_FAMILY
from pingjia.models.chatglm2 import ChatGLM2ForCausalLM, ChatGLM2Model
from pingjia.models.chatglm_config import ChatGLM2Config, ChatGLMConfig
from pingjia.models.family import Family
from pingjia.quant import quantize_model

BOTH = pytest.mark.parametrize(("network", "generation"), [("v1", "v1"), ("v2", "v2")], indirect=["network"])
Prompts = Callable[[str], list[list[int]]]
FAMILIES = {"v1": V1_FAMILY, "v2": V2_FAMILY}


def close(ours: torch.Tensor, reference: torch.Tensor, tolerance: float = 1e-5) -> bool:
    ours, reference = ours.detach(), reference.detach()
    return bool((ours - reference).abs().max() <= tolerance * max(1.0, float(reference.abs().max())))


def left_padded(rows: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids = [[pad] * (width - len(r)) + r for r in rows]
    keep = [[0] * (width - len(r)) + [1] * len(r) for r in rows]
    return torch.tensor(ids), torch.tensor(keep)


def end_to_end(network: PreTrainedModel, family: Family, rows: list[list[int]], **kwargs: Any) -> torch.Tensor:
    """Logits of all rows, run as one packed row."""
    use_packed_attention(network)
    positions = [family.positions(network.config, r, 0, len(r)) for r in rows]
    prefix_lens = [family.prefix_len(network.config, r) for r in rows]
    out = network(
        input_ids=torch.tensor([[i for r in rows for i in r]]),
        position_ids=torch.cat(positions, dim=-1)[None],
        packed=PackedSequences.of([len(r) for r in rows], prefix_lens),
        use_cache=False,
        **kwargs,
    )
    network.set_attn_implementation("sdpa")
    return out.logits


# ---- positions and mask of v1


def test_positions_freeze_at_the_mask_token_and_count_from_sop(v1: ChatGLMForCausalLM) -> None:
    ids = [5, 6, 91, 92, 7, 8]
    both = [[0, 1, 2, 2, 2, 2], [0, 0, 0, 1, 2, 3]]
    assert glm_positions(v1.config, ids, 0, 6).tolist() == both
    assert glm_positions(v1.config, ids, 4, 6).tolist() == [[2, 2], [2, 3]]
    assert glm_prefix_len(v1.config, ids) == 3


def test_gmask_wins_over_mask_and_mask_alone_is_enough(v1: ChatGLMForCausalLM) -> None:
    assert glm_positions(v1.config, [5, 90, 6, 91, 92], 4, 5).tolist() == [[3], [1]]
    assert glm_positions(v1.config, [5, 90, 6, 92], 3, 4).tolist() == [[1], [1]]


def test_the_prompt_sees_itself_both_ways_and_the_answer_does_not(v1: ChatGLMForCausalLM) -> None:
    v1.set_attn_implementation("eager")
    ids = torch.tensor([[5, 6, 7, 91, 92, 8, 9]])
    weights = v1(ids, output_attentions=True).attentions[0][0]
    assert weights.shape == (4, 7, 7)
    assert (weights[:, :, :4] > 0).all()
    assert (weights[:, 4:, 4:].triu(1) == 0).all()
    assert (weights[:, :4, 4:] == 0).all()


def test_alpha_is_that_of_28_layers_whatever_the_depth() -> None:
    assert pytest.approx(7.483314773547883) == ALPHA


def test_rotary_frequencies_are_those_of_half_precision(v1: ChatGLMForCausalLM) -> None:
    positions = torch.tensor([[[700], [3]]])
    cos, _ = rotary_tables(v1.config, positions)
    frequency = torch.tensor(10000.0 ** (-1 / 2)).half().float()  # head size 8: two frequencies per half
    assert cos[0, 0, 0, 1] == torch.cos(700 * frequency)
    assert cos[0, 0, 1, 1] == torch.cos(3 * frequency)


# ---- ways of running that must agree


@BOTH
def test_padding_on_the_left_changes_nothing(network: PreTrainedModel, generation: str, prompts: Prompts) -> None:
    rows = prompts(generation)
    ids, keep = left_padded(rows, network.config.pad_token_id)
    batched = network(ids, attention_mask=keep).logits
    assert not torch.isnan(batched).any()
    for b, row in enumerate(rows):
        assert close(batched[b, -len(row) :], network(torch.tensor([row])).logits[0])


@BOTH
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_right_padding_changes_nothing(
    network: PreTrainedModel, generation: str, prompts: Prompts, implementation: str
) -> None:
    network.set_attn_implementation(implementation)
    rows = prompts(generation)
    width = max(map(len, rows))
    ids = torch.tensor([r + [3] * (width - len(r)) for r in rows])
    keep = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])
    batched = network(ids, attention_mask=keep).logits
    for b, row in enumerate(rows):
        assert close(batched[b, : len(row)], network(torch.tensor([row])).logits[0])


@BOTH
def test_eager_equals_sdpa(network: PreTrainedModel, generation: str, prompts: Prompts) -> None:
    ids, keep = left_padded(prompts(generation), network.config.pad_token_id)
    reference = network(ids, attention_mask=keep).logits
    network.set_attn_implementation("eager")
    assert close(network(ids, attention_mask=keep).logits[keep.bool()], reference[keep.bool()])


@BOTH
def test_packed_rows_equal_separate_ones(network: PreTrainedModel, generation: str, prompts: Prompts) -> None:
    rows = [[*r, 30, 31, 32 + i] for i, r in enumerate(prompts(generation))]
    separate = torch.cat([network(torch.tensor([r])).logits[0] for r in rows])
    assert close(end_to_end(network, FAMILIES[generation], rows)[0], separate)
    few = torch.tensor([2, 9])
    assert close(end_to_end(network, FAMILIES[generation], rows, logits_to_keep=few)[0], separate[few])


@BOTH
def test_packed_gradients_equal_padded_ones(network: PreTrainedModel, generation: str, prompts: Prompts) -> None:
    rows = [[*r, 30, 31, 32 + i] for i, r in enumerate(prompts(generation))]

    def gradients(logits: torch.Tensor) -> dict[str, torch.Tensor]:
        network.zero_grad()
        logits.pow(2).mean().backward()
        return {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}

    separate = gradients(torch.cat([network(torch.tensor([r])).logits[0] for r in rows]))
    packed = gradients(end_to_end(network, FAMILIES[generation], rows)[0])
    assert separate.keys() == packed.keys()
    assert len(separate) == sum(1 for _ in network.parameters())
    for name, reference in separate.items():
        assert (packed[name] - reference).abs().max() <= 1e-4 * reference.abs().max() + 1e-9, name


class StoredKeys:
    """The simplest engine: one sequence, its older keys and values in a list."""

    def __init__(self, prefix_len: int) -> None:
        self.prefix_len = prefix_len
        self.store: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def attend(self, layer_idx: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        if layer_idx in self.store:
            past_k, past_v = self.store[layer_idx]
            k, v = torch.cat((past_k, k), dim=2), torch.cat((past_v, v), dim=2)
        self.store[layer_idx] = (k, v)
        queries, keys = q.shape[2], k.shape[2]
        index = torch.arange(keys)
        mask = (index[None] <= index[keys - queries :, None]) | (index[None] < self.prefix_len)
        return sdpa(q, k, v, mask=mask, is_causal=False, **options).transpose(1, 2)


@BOTH
def test_packed_prefill_and_decoding_equal_the_whole(
    network: PreTrainedModel, generation: str, prompts: Prompts
) -> None:
    family = FAMILIES[generation]
    prompt = prompts(generation)[1]
    ids = [*prompt, 30, 31, 32]
    reference = network(torch.tensor([ids])).logits[0]
    use_packed_attention(network)
    keys = StoredKeys(family.prefix_len(network.config, ids))
    found = []
    for start, stop in ((0, len(prompt)), *((i, i + 1) for i in range(len(prompt), len(ids)))):
        out = network(
            input_ids=torch.tensor([ids[start:stop]]),
            position_ids=family.positions(network.config, ids[:stop], start, stop)[None],
            packed=keys,
            use_cache=False,
        )
        found.append(out.logits[0])
    assert close(torch.cat(found), reference)


@BOTH
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_of_a_padded_batch_equals_one_by_one(
    network: PreTrainedModel, generation: str, prompts: Prompts, beams: int
) -> None:
    rows = prompts(generation)
    ids, keep = left_padded(rows, network.config.pad_token_id)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams, "eos_token_id": -1}
    batched = network.generate(ids, attention_mask=keep, **options)
    for b, row in enumerate(rows):
        alone = network.generate(torch.tensor([row]), attention_mask=torch.ones(1, len(row)), **options)
        assert alone[0, len(row) :].tolist() == batched[b, ids.shape[1] :].tolist()


@BOTH
def test_generation_with_a_cache_equals_without(network: PreTrainedModel, generation: str, prompts: Prompts) -> None:
    ids = torch.tensor([prompts(generation)[1]])
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": -1}
    cached = network.generate(ids, use_cache=True, **options)
    assert torch.equal(cached, network.generate(ids, use_cache=False, **options))


@BOTH
def test_generation_with_a_cache_of_fixed_size_equals_without(
    network: PreTrainedModel, generation: str, prompts: Prompts
) -> None:
    ids, keep = left_padded(prompts(generation), network.config.pad_token_id)
    options: dict[str, Any] = {"attention_mask": keep, "max_new_tokens": 4, "do_sample": False, "eos_token_id": -1}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    growing = network.generate(ids, **options)
    fixed = network.generate(ids, cache_implementation="static", **options)
    assert all(close(f, g) for f, g in zip(fixed.logits, growing.logits, strict=True))


@BOTH
def test_gradient_checkpointing_changes_nothing(network: PreTrainedModel, generation: str, prompts: Prompts) -> None:
    ids = torch.tensor([[*prompts(generation)[1], 30, 31, 32]])

    def gradient() -> torch.Tensor:
        network.zero_grad()
        network(ids, labels=ids).loss.backward()
        return network.get_input_embeddings().weight.grad.clone()

    reference = gradient()
    network.train()
    network.gradient_checkpointing_enable()
    assert all(layer.gradient_checkpointing for layer in network.modules() if type(layer).__name__.endswith("Block"))
    assert close(gradient(), reference)


@BOTH
def test_the_loss_is_the_mean_over_shifted_targets(network: PreTrainedModel, generation: str, prompts: Prompts) -> None:
    ids = torch.tensor([[*prompts(generation)[1], 30, 31, 32]])
    labels = ids.clone()
    labels[:, :-3] = -100
    out = network(ids, labels=labels)
    log_p = out.logits[0].log_softmax(-1)
    by_hand = -torch.stack([log_p[i - 1, ids[0, i]] for i in range(ids.shape[1] - 3, ids.shape[1])]).mean()
    assert close(out.loss, by_hand)


@BOTH
def test_some_logits_are_those_of_all(network: PreTrainedModel, generation: str, prompts: Prompts) -> None:
    ids = torch.tensor([prompts(generation)[1]])
    everything = network(ids).logits
    assert close(network(ids, logits_to_keep=2).logits, everything[:, -2:])
    assert close(network(ids, logits_to_keep=torch.tensor([1, 4])).logits, everything[:, [1, 4]])


def test_embeddings_may_be_given_with_positions(v1: ChatGLMForCausalLM, prompts: Prompts) -> None:
    ids = torch.tensor([prompts("v1")[1]])
    positions = glm_positions(v1.config, ids[0].tolist(), 0, ids.shape[1])[None]
    embedded = v1.get_input_embeddings()(ids)
    assert close(v1(inputs_embeds=embedded, position_ids=positions).logits, v1(ids).logits)


def test_a_p_tuning_prefix_is_seen_by_all_and_moves_no_position(v1: ChatGLMForCausalLM, prompts: Prompts) -> None:
    ids = torch.tensor([prompts("v1")[1]])
    layers, size = v1.config.num_layers, v1.config.hidden_size
    prefix = torch.randn(5, 2 * layers * size, requires_grad=True)
    logits = v1(ids, past_key_values=prefix_cache(v1.config, prefix, 1)).logits
    assert not close(logits, v1(ids).logits, 1e-3)
    logits.sum().backward()
    assert prefix.grad is not None
    assert bool((prefix.grad.abs().amax(dim=1) > 0).all())
    masked = torch.cat((torch.zeros(1, 5), torch.ones_like(ids)), dim=1).long()
    unseen = v1(ids, attention_mask=masked, past_key_values=prefix_cache(v1.config, prefix, 1)).logits
    assert close(unseen, v1(ids).logits)


# ---- the Auto classes, saving, number formats


@BOTH
def test_a_saved_network_comes_back_bit_equal(
    network: PreTrainedModel, generation: str, prompts: Prompts, saved: Callable[..., Any]
) -> None:
    directory = saved(network)
    ids = torch.tensor([prompts(generation)[1]])
    again, info = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(again) is type(network)
    assert type(AutoConfig.from_pretrained(directory)) is type(network.config)
    assert torch.equal(again(ids).logits, network(ids).logits)
    body = AutoModel.from_pretrained(directory, dtype=torch.float32)
    assert type(body) is {"v1": ChatGLMModel, "v2": ChatGLM2Model}[generation]
    assert again.config.to_dict() == AutoConfig.from_pretrained(directory).to_dict() | {"dtype": "float32"}


@BOTH
@pytest.mark.parametrize("bits", [4, 8])
def test_a_packed_network_comes_back_bit_equal(
    network: PreTrainedModel, generation: str, prompts: Prompts, saved: Callable[..., Any], bits: int
) -> None:
    quantize_model(network, bits)
    ids = torch.tensor([prompts(generation)[1]])
    again = AutoModelForCausalLM.from_pretrained(saved(network), dtype=torch.float32)
    assert again.config.quantization_bit == bits
    assert torch.equal(again(ids).logits, network(ids).logits)


def test_the_head_of_v1_is_its_embedding_table(v1: ChatGLMForCausalLM, saved: Callable[..., Any]) -> None:
    assert v1.lm_head.weight is v1.transformer.word_embeddings.weight
    again = AutoModelForCausalLM.from_pretrained(saved(v1))
    assert again.lm_head.weight is again.transformer.word_embeddings.weight


@BOTH
def test_half_precision_stays_near(network: PreTrainedModel, generation: str, prompts: Prompts) -> None:
    ids = torch.tensor([prompts(generation)[1]])
    reference = network(ids).logits
    for dtype in (torch.float16, torch.bfloat16):
        logits = network.to(dtype)(ids).logits
        assert logits.dtype == network.dtype == dtype
        assert close(logits.float(), reference, 0.1)


@BOTH
def test_layers_may_lie_on_different_devices(
    network: PreTrainedModel, generation: str, prompts: Prompts, saved: Callable[..., Any], tmp_path: Any
) -> None:
    layers = "transformer.layers" if generation == "v1" else "transformer.encoder.layers"
    rest = (
        {"transformer.word_embeddings": "cpu", "transformer.final_layernorm": "cpu", "lm_head": "cpu"}
        if generation == "v1"
        else {
            "transformer.embedding": "cpu",
            "transformer.encoder.final_layernorm": "cpu",
            "transformer.output_layer": "cpu",
        }
    )
    devices = rest | {f"{layers}.0": "cpu", f"{layers}.1": "disk", f"{layers}.2": "cpu"}
    ids = torch.tensor([prompts(generation)[1]])
    reference = network(ids).logits
    split = AutoModelForCausalLM.from_pretrained(
        saved(network), dtype=torch.float32, device_map=devices, offload_folder=tmp_path / "offload"
    )
    assert any(p.is_meta for p in split.parameters())
    assert close(split(ids).logits, reference)


# ---- adapters


def real_size(kind: str) -> PreTrainedModel:
    with torch.device("meta"):
        return ChatGLMForCausalLM(ChatGLMConfig()) if kind == "v1" else ChatGLM2ForCausalLM(ChatGLM2Config())


def test_lora_at_the_real_size_trains_7_340_032_numbers() -> None:
    model = get_peft_model(real_size("v1"), LoraConfig(r=16, target_modules=["query_key_value"]))
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == 7_340_032
    assert total - trainable == 6_173_286_400  # 6.2 B; the tied head counted once
    assert round(100 * trainable / total, 2) == 0.12


@pytest.mark.parametrize("kind", ["v1", "v2"])
@pytest.mark.parametrize(("group", "count"), [("attention", 56), ("ffn", 56), ("embedding", 1)])
def test_lora_groups_name_every_such_module_of_the_network(kind: str, group: str, count: int) -> None:
    endings = FAMILIES[kind].lora_groups[group]
    names = [n for n, _ in real_size(kind).named_modules()]
    assert sum(any(n == e or n.endswith(f".{e}") for e in endings) for n in names) == count


@BOTH
@pytest.mark.parametrize("bits", [None, 4, 8])
def test_adapters_train_save_load_and_over_floats_merge(
    network: PreTrainedModel, generation: str, prompts: Prompts, bits: int | None, tmp_path: Any
) -> None:
    if bits:
        quantize_model(network, bits)
    ids = torch.tensor([[*prompts(generation)[1], 30, 31, 32]])
    before = network(ids).logits.detach()
    targets = [*FAMILIES[generation].lora_groups["attention"], *FAMILIES[generation].lora_groups["ffn"]]
    model = get_peft_model(network, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    assert close(model(ids).logits, before)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(ids, labels=ids).loss
        loss.backward()
        assert all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    model.eval()
    trained = model(ids).logits.detach()
    model.save_pretrained(tmp_path / "adapter")
    base = model.unload()
    assert close(base(ids).logits, before)
    again = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert close(again(ids).logits, trained)
    if bits is None:
        assert close(again.merge_and_unload()(ids).logits, trained, 1e-4)


# ---- refusals


@pytest.mark.parametrize("ids", [[5, 6, 7], [5, 91, 6], [5, 92, 6]])
def test_a_prompt_without_its_special_tokens_is_refused_in_one_line(v1: ChatGLMForCausalLM, ids: list[int]) -> None:
    with pytest.raises(ModelError, match=r"\[gMASK\] \(91\).*<sop> \(92\)") as refused:
        v1(torch.tensor([ids]))
    assert "\n" not in str(refused.value)
    with pytest.raises(ModelError, match="render prompts with the tokenizer"):
        v1.generate(torch.tensor([ids]), max_new_tokens=1)


def test_what_would_not_be_honoured_is_refused(v1: ChatGLMForCausalLM, prompts: Prompts) -> None:
    ids = torch.tensor([prompts("v1")[0]])
    positions = glm_positions(v1.config, ids[0].tolist(), 0, ids.shape[1])[None]
    with pytest.raises(ModelError, match="leave position_ids out"):
        v1.generate(ids, position_ids=positions, max_new_tokens=1)
    with pytest.raises(ModelError, match="give position_ids too"):
        v1(inputs_embeds=v1.get_input_embeddings()(ids))


def test_continuing_from_a_cache_needs_positions(v1: ChatGLMForCausalLM, prompts: Prompts) -> None:
    past = v1(torch.tensor([prompts("v1")[0]]), use_cache=True).past_key_values
    with pytest.raises(ModelError, match="a ChatGLM-6B prompt must hold"):
        v1(torch.tensor([[30]]), past_key_values=past)
