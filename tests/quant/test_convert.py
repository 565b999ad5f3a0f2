"""Packing a whole network in place."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from pingjia.errors import ModelError
from pingjia.quant import Int4Linear, Int8Linear, count_weights, quantize_model


def llama(**changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    size = {
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 40,
    }
    return LlamaForCausalLM(LlamaConfig(**(size | changes))).eval()


@pytest.mark.parametrize(("bits", "kind", "tolerance"), [(4, Int4Linear, 0.2), (8, Int8Linear, 0.02)])
@pytest.mark.parametrize("tied", [True, False])
def test_every_linear_but_the_head_is_packed(bits: int, kind: type, tolerance: float, tied: bool) -> None:
    model = llama(tie_word_embeddings=tied)
    ids = torch.tensor([[1, 2, 3, 4]])
    before, weights = model(ids).logits.detach(), count_weights(model)
    assert quantize_model(model, bits) is model
    assert sum(isinstance(m, kind) for m in model.modules()) == 7 * 2
    assert type(model.get_output_embeddings()) is torch.nn.Linear
    assert model.config.quantization_bit == bits
    assert count_weights(model) == weights
    after = model(ids).logits.detach()
    assert not torch.equal(after, before)
    assert (after - before).abs().max() < tolerance * before.abs().max()


def test_packing_twice_is_refused() -> None:
    model = quantize_model(llama(), 8)
    with pytest.raises(ModelError, match="already packed to 8 bits"):
        quantize_model(model, 4)


@pytest.mark.parametrize("bits", [2, 16])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(ModelError, match=f"bits={bits}: choose 4 or 8"):
        quantize_model(llama(), bits)


def test_an_odd_number_of_columns_is_refused_by_name() -> None:
    model = llama(intermediate_size=21)
    with pytest.raises(ModelError, match=r"down_proj: INT4 packs columns in pairs and it has 21"):
        quantize_model(model, 4)
    assert not any(isinstance(m, Int4Linear) for m in model.modules())
    assert quantize_model(model, 8).config.quantization_bit == 8
