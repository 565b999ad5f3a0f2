"""A directory becomes exactly the network it holds, or one line that says what is wrong with it."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from pingjia.errors import ModelError
from pingjia.models import base_fingerprint, family_of, load_model
from pingjia.models.device import pick_device, pick_dtype
from pingjia.models.loader import read_config
from pingjia.models.registry import SUPPORTED, require_supported

CPU = torch.device("cpu")
IDS = torch.tensor([[1, 50, 60, 70]])


@pytest.fixture
def copy(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "copy"))


def change_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = safetensors.torch.load_file(directory / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def change_config(directory: Path, **values: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | values))


def one_line(directory: Path, *words: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_model(directory)
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    assert str(directory) in message
    for word in words:
        assert word in message


def test_it_is_the_network_transformers_loads(tiny_llama: Path) -> None:
    ours = load_model(tiny_llama)
    theirs = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    assert isinstance(ours, LlamaForCausalLM)
    assert not ours.training
    assert ours.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits)


def test_it_says_nothing_by_itself(tiny_llama: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_model(str(tiny_llama))
    assert capfd.readouterr() == ("", "")


def test_a_missing_tensor(copy: Path) -> None:
    change_tensors(copy, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    one_line(copy, "1 tensors are missing", "model.layers.1.mlp.up_proj.weight")


def test_a_tensor_left_over(copy: Path) -> None:
    change_tensors(copy, lambda t: t.update({"model.layers.9.mlp.up_proj.weight": torch.zeros(2, 2)}))
    one_line(copy, "left over", "model.layers.9.mlp.up_proj.weight")


def test_a_tensor_of_another_shape(copy: Path) -> None:
    change_tensors(copy, lambda t: t.update({"model.norm.weight": torch.ones(63)}))
    one_line(copy)


def test_a_config_of_another_network(copy: Path) -> None:
    change_config(copy, num_hidden_layers=5)
    one_line(copy, "18 tensors are missing", "and 15 more")


@pytest.mark.parametrize("keep", [0, 100, 1_000_000])
def test_torn_weights(copy: Path, keep: int) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    one_line(copy)


def test_no_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    one_line(copy)


def test_no_config(copy: Path) -> None:
    (copy / "config.json").unlink()
    one_line(copy, "not a model directory: no config.json", "model.safetensors")


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "cannot be read"), ("[]", "no model_type"), ("{}", "no model_type"), ('{"model_type": 3}', "no model_type")],
)
def test_a_broken_config(copy: Path, text: str, words: str) -> None:
    (copy / "config.json").write_text(text)
    one_line(copy, words)
    with pytest.raises(ModelError, match=words):
        read_config(copy)


def test_a_family_that_is_not_supported(copy: Path) -> None:
    change_config(copy, model_type="gpt2")
    with pytest.raises(ModelError, match=r"'gpt2' is not supported; supported: .*llama.*qwen3"):
        load_model(copy)


def test_code_of_a_checkpoint_is_not_run(copy: Path, tmp_path: Path) -> None:
    """A directory that brings its own code: refused or ignored, but the code does not run."""
    proof = tmp_path / "ran"
    (copy / "modeling_x.py").write_text(f"open({str(proof)!r}, 'w')\nclass X: pass\n")
    change_config(copy, auto_map={"AutoConfig": "modeling_x.X", "AutoModelForCausalLM": "modeling_x.X"})
    with contextlib.suppress(ModelError):
        load_model(copy)
    assert not proof.exists()


def test_a_pickle_that_would_run_code_is_refused(copy: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (open, (str(tmp_path / "ran"), "w"))

    (copy / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Evil()}, copy / "pytorch_model.bin")
    one_line(copy)
    assert not (tmp_path / "ran").exists()


def test_a_torn_gguf(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(40))
    one_line(tmp_path / "m.gguf", "cannot be loaded as GGUF")


@pytest.mark.parametrize("bits", [0, 2, 16, 32])
def test_numbers_of_bits_that_do_not_exist(tiny_llama: Path, bits: int) -> None:
    with pytest.raises(ModelError, match=f"bits={bits}"):
        load_model(tiny_llama, bits=bits)


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_number_formats(tiny_llama: Path, name: str, dtype: torch.dtype) -> None:
    assert load_model(tiny_llama, dtype=name).dtype == dtype
    assert load_model(tiny_llama, dtype=dtype).dtype == dtype


def test_auto_is_float32_on_a_cpu_whatever_is_stored(copy: Path) -> None:
    load_model(copy, dtype="bfloat16").save_pretrained(copy)
    assert load_model(copy).dtype == torch.float32
    assert pick_dtype("auto", torch.device("cuda"), torch.bfloat16) == torch.bfloat16
    assert pick_dtype("auto", torch.device("cuda")) == torch.float32


def test_formats_and_devices_that_do_not_exist(tiny_llama: Path) -> None:
    with pytest.raises(ModelError, match=r"dtype 'float8' is unknown; choose auto, float32"):
        pick_dtype("float8", CPU)
    with pytest.raises(ModelError, match=r"device 'nonsense' cannot be used here: .*; try device=cpu"):
        pick_device("nonsense")
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="device 'cuda' cannot be used here"):
            load_model(tiny_llama, device="cuda")
        assert pick_device("auto").type in ("cpu", "mps", "npu")
    assert pick_device("cpu") == CPU


def test_the_fingerprint_is_that_of_the_weights(make_llama: Callable[..., Path], tiny_llama: Path, copy: Path) -> None:
    base = base_fingerprint(load_model(tiny_llama))
    assert base_fingerprint(load_model(copy)) == base
    assert base_fingerprint(load_model(copy, dtype="bfloat16")) == base, "the number format does not matter"
    assert base_fingerprint(load_model(make_llama(8))) != base
    change_tensors(copy, lambda t: t["model.layers.2.input_layernorm.weight"].mul_(1.1))
    assert base_fingerprint(load_model(copy)) != base


def test_the_fingerprint_survives_packing(tiny_llama: Path) -> None:
    assert base_fingerprint(load_model(tiny_llama, bits=4)) == base_fingerprint(load_model(tiny_llama))


def test_families_by_model_type(tiny_llama: Path) -> None:
    assert family_of(load_model(tiny_llama)).name == "llama-like"
    for name in SUPPORTED:
        require_supported(name)
    with pytest.raises(ModelError, match="'bert' is not supported"):
        require_supported("bert")
