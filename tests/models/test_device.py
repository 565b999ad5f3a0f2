"""Where tensors live is decided in one place. An Ascend card, simulated: what it cannot do is refused."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pingjia.errors import ModelError
from pingjia.models import device as devices
from pingjia.models import family_of, load_model, use_packed_attention
from pingjia.models.device import pick_device, pick_dtype, rng_state, set_rng_state
from pingjia.tune.frozen import FrozenLayers
from pingjia.tune.lora import add_adapter, resolve_targets
from pingjia.tune.settings import TuneSettings
from pingjia.tune.step import build_batch, summed_loss
from pingjia.types import Encoded

PACKAGE = Path(devices.__file__).parents[1]
FAKE_NPU = Path(__file__).with_name("fake_npu")
META = torch.device("meta")


# ---- one place


def test_no_other_file_names_a_kind_of_device_to_torch() -> None:
    """`.cuda()`, torch.cuda and the like stand in models/device.py only."""
    pattern = re.compile(r"\.cuda\(|\.npu\(|torch\.(cuda|npu|mps|xpu)\b|torch_npu|device(_map)?=['\"](cuda|npu|mps)")
    found = [
        f"{file.relative_to(PACKAGE)}:{number}: {line.strip()}"
        for file in PACKAGE.rglob("*.py")
        if file != Path(devices.__file__)
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line) and not line.lstrip().startswith("#")
    ]
    assert found == []
    assert pattern.search("x = torch.cuda.device_count()")
    assert pattern.search("model.cuda()")


@pytest.mark.parametrize("layers", [None, "3"])
def test_every_tensor_of_an_update_is_where_the_model_is(tiny_llama: Path, layers: str | None) -> None:
    """On the meta device an operation with a tensor left on the CPU is an error, as it is on a real accelerator."""
    model = load_model(tiny_llama)
    settings = TuneSettings(output_dir="x", lora_target="all", lora_layers=layers, lora_dropout=0.1)
    family = family_of(model)
    adapted = add_adapter(model, resolve_targets(model, family, settings), settings)
    use_packed_attention(model)
    adapted.to(META).train()
    rows = [
        Encoded(tuple(range(3, 12)), (False,) * 4 + (True,) * 5, weight=0.5),
        Encoded((5, 6, 7, 8), (False, True) * 2),
    ]
    batch = build_batch(rows, family, model.config, META)
    if layers:
        frozen = FrozenLayers(adapted, family, 2, budget_bytes=0)
        batch = replace(batch, entering=frozen.entering([0, 1], rows))
    loss = summed_loss(adapted, batch)
    loss.backward()
    assert loss.device == META
    assert all(p.grad is not None and p.grad.device == META for p in adapted.parameters() if p.requires_grad)


def test_a_tensor_on_the_cpu_would_be_noticed(tiny_llama: Path) -> None:
    """The test above can fail."""
    model = load_model(tiny_llama).to(META)
    use_packed_attention(model)
    rows = [Encoded(tuple(range(3, 12)), (False,) * 4 + (True,) * 5)]
    batch = build_batch(rows, family_of(model), model.config, META)
    astray = replace(batch, keep_K=torch.arange(5), target_K=torch.arange(5), input_ids_1T=batch.input_ids_1T)
    with pytest.raises(RuntimeError, match=r"device|meta"):
        summed_loss(model, replace(astray, position_ids=torch.arange(9)[None]))


# ---- CPU


def test_a_device_that_is_not_here_is_named() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one here")
    with pytest.raises(ModelError, match=r"device 'cuda' cannot be used here: .*try device=cpu"):
        pick_device("cuda")
    with pytest.raises(ModelError, match="device=npu needs torch_npu"):
        pick_device("npu")
    assert "torch_npu" not in sys.modules


def test_the_cpu_computes_in_float32() -> None:
    cpu = torch.device("cpu")
    assert pick_device("cpu", index=3) == cpu
    assert pick_dtype("auto", cpu, torch.bfloat16) == torch.float32
    assert pick_dtype("bfloat16", cpu) == torch.bfloat16
    with pytest.raises(ModelError, match="dtype 'bf16' is unknown"):
        pick_dtype("bf16", cpu)


def test_random_state_comes_back() -> None:
    before = rng_state()
    first = torch.rand(3)
    set_rng_state(before)
    assert torch.equal(torch.rand(3), first)
    set_rng_state(before | {"npu": ["a card that is not here"]})
    assert torch.equal(torch.rand(3), first)


# ---- Ascend


@pytest.fixture
def on_npu() -> Callable[[str, str], None]:
    """on_npu(card, code): run code in a process of its own where torch_npu is our simulation."""

    def run(card: str, code: str) -> None:
        lines = "import sys, torch\nfrom pingjia.models.device import *\nfrom pingjia.errors import ModelError\n"
        path = os.pathsep.join([str(FAKE_NPU), str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"PYTHONPATH": path, "FAKE_NPU": card}
        done = subprocess.run(
            [sys.executable, "-c", lines + code], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr

    return run


def test_torch_npu_is_imported_only_when_asked(on_npu: Callable[[str, str], None]) -> None:
    on_npu(
        "Ascend910B2",
        """
assert pick_device("cpu").type == "cpu" and "torch_npu" not in sys.modules
device = pick_device("auto")
assert device.type == "npu" and "torch_npu" in sys.modules, device
assert pick_device("npu:0") == torch.device("npu", 0) == pick_device("npu", index=0)
""",
    )


def test_910a_has_no_bfloat16_and_910b_has(on_npu: Callable[[str, str], None]) -> None:
    on_npu(
        "Ascend910A",
        """
npu = pick_device("npu")
assert pick_dtype("auto", npu, torch.bfloat16) == torch.float16
assert pick_dtype("auto", npu, torch.float32) == torch.float32
try:
    pick_dtype("bfloat16", npu)
except ModelError as e:
    assert str(e) == "dtype=bfloat16: npu (Ascend910A) has no bfloat16; use dtype=float16 or float32", e
else:
    raise AssertionError
""",
    )
    on_npu(
        "Ascend910B2",
        """
npu = pick_device("npu")
assert pick_dtype("auto", npu, torch.bfloat16) == pick_dtype("bfloat16", npu) == torch.bfloat16
""",
    )


def test_what_has_not_been_run_on_ascend_is_refused(on_npu: Callable[[str, str], None], tiny_llama: Path) -> None:
    on_npu(
        "Ascend910B2",
        f"""
from pingjia.models import load_model
try:
    load_model({str(tiny_llama)!r}, device="npu", bits=4)
except ModelError as e:
    assert "quantization_bit=4" in str(e) and "npu (Ascend910B2)" in str(e), e
else:
    raise AssertionError
assert not has_fused_optimizer(torch.device("npu")) and has_fused_optimizer(torch.device("cpu"))
assert collective_backend(torch.device("npu")) == "hccl"
""",
    )


def test_memory_and_random_state_are_asked_of_the_card(on_npu: Callable[[str, str], None]) -> None:
    on_npu(
        "Ascend910B2",
        """
npu = pick_device("npu")
assert free_bytes(npu) == 20 * 10**9
limit_device_memory(npu, 16e9)
assert torch.npu.asked == {"share": 0.5}
torch.accelerator.is_available = lambda: True
torch.accelerator.current_accelerator = lambda: torch.device("npu")
before = rng_state()
assert set(before) == {"cpu", "npu"}
torch.npu.set_rng_state_all([torch.zeros(3)])
set_rng_state(before)
assert torch.equal(torch.npu.get_rng_state_all()[0], before["npu"][0])
""",
    )
