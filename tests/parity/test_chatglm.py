"""Our ChatGLM networks against outputs of the published code: the figures of benchmarks/parity.py, all of them."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED = REPOSITORY / ".." / "shared" / "fixtures" / "chatglm"


@pytest.fixture(scope="module")
def parity() -> ModuleType:
    if not SHARED.is_dir():
        pytest.skip(f"no reference outputs beside the repository: {SHARED}")
    spec = importlib.util.spec_from_file_location("pingjia_benchmarks_parity", REPOSITORY / "benchmarks" / "parity.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def test_every_figure_is_within_its_tolerance(parity: ModuleType) -> None:
    figures = list(parity.figures(SHARED))
    beyond = [f"{f.fixture} {f.what}: {f.difference:.2e} > {f.tolerance:.0e}" for f in figures if not f.passes]
    assert beyond == []
    assert {f.fixture for f in figures} == {"tiny_v1_chat", "tiny_v1_chat_int8", "tiny_v1_chat_int4", "tiny_v2"}
    assert len(figures) >= 65


def test_a_wrong_network_does_not_pass(parity: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traps of this family, each planted: the depth's own alpha, the exact GELU, frequencies not rounded to fp16."""
    import torch.nn.functional as F

    from pingjia.models import chatglm

    def failing(section: str) -> list[str]:
        found = getattr(parity, section)(SHARED / "tiny_v1_chat")
        return [what for what, difference, scale in found if difference > parity.FLOAT * scale]

    assert failing("v1_forward") == []
    with monkeypatch.context() as planted:
        planted.setattr(chatglm, "ALPHA", (2 * 4) ** 0.5)
        assert "a.logits" in failing("v1_forward")
    with monkeypatch.context() as planted:
        exact = F.gelu
        planted.setattr(chatglm.F, "gelu", lambda x, approximate: exact(x))
        assert "a.logits" in failing("v1_forward")
    with monkeypatch.context() as planted:
        planted.setattr(chatglm.torch.Tensor, "half", lambda self: self)
        assert "g.logits, last 4 of 702" in failing("v1_long")
