"""What `pingjia doctor RECIPE` does with a recipe: the whole road in small, each step with what to do when it fails.

Check rows -> look at the longest one -> tokens of training and of serving -> rehearse the training (predictions) -> two
real updates -> merge -> pack -> answer over HTTP. Nothing is left behind. Not here: the machine (`doctor.py`).
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pingjia.cli.console import duration, megabytes
from pingjia.cli.schema import Recipe
from pingjia.cli.trial_server import trial_server
from pingjia.errors import DataError, EngineError, ModelError, StorageError, TrainingError

_SHOWN = 160  # characters of the longest row that are shown
_QUESTION = "你好，请问退货需要几天？"


class Skipped(Exception):
    """A step that this recipe does not take, and why."""


@dataclass(frozen=True, slots=True)
class Step:
    """`fix`: what to do when it fails, besides what the error says."""

    name: str
    check: Callable[[], str]
    fix: str


class Road:
    """The steps of one recipe, in order; each may use what the ones before it made."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._stack = ExitStack()
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="pingjia-doctor-")))
        self._tuned: Path | None = None
        self._merged: Path | None = None
        self._packed: Path | None = None
        self._tokenizer: Any = None

    def __enter__(self) -> Road:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def steps(self) -> Iterator[Step]:
        """Every step; what they need of each other is made on the way."""
        yield Step("output", self._output, "choose another output_dir, or make room there")
        yield Step(
            "data", self._data, "pingjia data check FILE names every row; pingjia data prepare writes sound ones"
        )
        yield Step("longest row", self._longest, "raise cutoff_len, or shorten the rows")
        yield Step("train-serve identity", self._identity, "serve with the tokenizer files of the training")
        yield Step("training", self._training, "the message names the key of the recipe; see docs/train.md")
        yield Step("short run", self._short_run, "run it by itself: pingjia train RECIPE max_steps=2")
        yield Step("merge", self._merge, "serve the adapter beside its base instead: pingjia serve BASE --adapter DIR")
        yield Step("quantise", self._quantise, "serve the merged model in floats, or with --bits 8")
        yield Step("answering", self._answer, "try the model by itself: pingjia chat MODEL")
        yield Step("port", self._port, "set serve.host and serve.port, or end the program that has the port")

    # ---- before anything is computed

    def _output(self) -> str:
        """Whether output_dir can be written, is not the model, and has room for checkpoints."""
        out = Path(self._recipe.tune.output_dir).absolute()
        model = Path(self._recipe.model.model_name_or_path)
        if out.is_dir() and model.is_dir() and out.samefile(model):
            raise TrainingError(f"output_dir {out} is the model that is trained; its files would be overwritten")
        folder = next(place for place in (out, *out.parents) if place.exists())
        if not folder.is_dir():
            raise StorageError(f"output_dir {out}: {folder} is a file, not a directory")
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as e:
            raise StorageError(f"output_dir {out} cannot be written: {e.strerror}") from None
        return f"{out} can be written; {megabytes(shutil.disk_usage(folder).free)} free"

    def _data(self) -> str:
        from pingjia import chat, data

        recipe = self._recipe
        self._tokenizer = chat.load_tokenizer(recipe.model.model_name_or_path)
        files = [*recipe.data.dataset, *recipe.data.eval_dataset]
        report = data.check_files(files, self._tokenizer, recipe.data.cutoff_len, domains=recipe.data.domains)
        if not report.ok:
            raise DataError(f"{report.num_problems} problems, the first: {report.problems[0]}")
        longest = f"longest {report.lengths.longest} of {recipe.data.cutoff_len} tokens" if report.lengths else ""
        return f"{report.num_examples} rows, no problem; {longest}"

    def _longest(self) -> str:
        """The longest row as the network reads it; [[ ]] around what it learns."""
        from pingjia.data.rendered import render_example
        from pingjia.tune.rows import encode_rows

        recipe = self._recipe
        rows = encode_rows(recipe.data.dataset, recipe.data, self._tokenizer, recipe.data.cutoff_len).encoded
        row = max(rows, key=lambda row: len(row.ids))
        if not row.num_learnt:
            raise DataError(f"{row.where}: nothing of it is learnt")
        text = _marked(render_example(row, self._tokenizer))
        return f"{row.where}: {len(row.ids)} tokens, {row.num_learnt} of them learnt, in [[ ]]: {text}"

    def _identity(self) -> str:
        from pingjia import chat

        golden = chat.golden_chats(self._tokenizer)
        chat.check_golden(chat.load_tokenizer(self._recipe.model.model_name_or_path), golden)
        return f"{len(golden)} chats become the same tokens in training and in serving"

    # ---- training

    def _training(self) -> str:
        from pingjia.cost import resolve
        from pingjia.tune.rehearse import rehearse

        recipe = self._recipe
        prices = resolve(recipe.cost)
        found = rehearse(recipe.model, recipe.data, recipe.tune)
        planned = f" ({megabytes(found.memory.total)} planned)" if found.memory is not None else ""
        less = f"; {found.event}" if found.event is not None else ""
        money = float(prices.per_hour) * found.seconds_estimated / 3600
        return (
            f"longest batch {found.batch_tokens} tokens: {found.seconds:.2f} s, peak "
            f"{megabytes(found.peak_bytes)}{planned}{less}; what it trains saved and read back bit by bit; "
            f"whole run ({found.num_steps} updates) about {duration(found.seconds_estimated)} at "
            f"{found.tokens_per_s:.0f} tokens/s, {money:.4f} {prices.currency} ({prices.source})"
        )

    def _short_run(self) -> str:
        from pingjia.tune.rehearse import short_run

        recipe = self._recipe
        self._tuned = self._stack.enter_context(short_run(recipe.model, recipe.data, recipe.tune))
        kind = "an adapter" if recipe.tune.finetuning_type == "lora" else "a model"
        return f"two updates left {kind}, with its proof"

    # ---- what becomes of it

    def _merge(self) -> str:
        from pingjia.export import merge_adapter

        assert self._tuned is not None
        if self._recipe.tune.finetuning_type != "lora":
            self._merged = self._tuned
            raise Skipped("the run leaves a whole model")
        base, out = self._recipe.model.model_name_or_path, self._folder / "merged"
        try:
            report = merge_adapter(self._tuned, out, base=base, save_tokenizer=self._tokenizer.save)
        except ModelError as e:
            if "is packed to" not in str(e):
                raise
            raise Skipped(f"{base} is packed: its adapter is served beside it") from None
        self._merged = out
        return (
            f"{report.num_merged_modules} modules, logits within {report.max_logit_diff:.2g} of base plus adapter, "
            f"{report.max_change_from_base:.2g} away from the base; {megabytes(report.stored_bytes)}"
        )

    def _quantise(self) -> str:
        from pingjia.export.quantize import QuantizeJob, quantize
        from pingjia.quant.settings import QuantizeSettings

        if self._merged is None:
            raise Skipped("the base is packed already")
        out = self._folder / "packed"
        job = QuantizeJob(str(self._merged), out, QuantizeSettings(bits=8, method="rtn"))
        report = quantize(job, save_tokenizer=self._tokenizer.save, on_step=lambda *a, **k: None)
        self._packed = out
        return f"INT8, {report.bits_per_weight:.1f} bits a weight, {megabytes(report.stored_bytes)}"

    def _answer(self) -> str:
        """One question over HTTP, of the packed model where there is one; its prompt must be that of the training."""
        import httpx

        from pingjia.types import Message

        expected = len(self._tokenizer.render([Message("user", _QUESTION)]))
        url = self._stack.enter_context(trial_server(self._engine()))
        body = {"messages": [{"role": "user", "content": _QUESTION}], "max_tokens": 8, "temperature": 0}
        response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=600)
        if response.status_code != 200:
            raise EngineError(f"HTTP {response.status_code}: {response.text[:200]}")
        usage = response.json()["usage"]
        if usage["prompt_tokens"] != expected:
            raise ModelError(
                f"the server read {usage['prompt_tokens']} tokens where training had {expected}: another template"
            )
        return (
            f"the engine answers over HTTP: {usage['completion_tokens']} tokens to a prompt of {expected}, as trained"
        )

    def _engine(self) -> Any:
        from pingjia import Engine

        recipe = self._recipe
        same: dict[str, Any] = {"settings": recipe.engine, "device": recipe.model.device, "dtype": recipe.model.dtype}
        if self._packed is not None:
            return Engine(self._packed, settings=recipe.engine, device=recipe.model.device)
        if self._merged is not None:
            return Engine(self._merged, **same)
        bits = recipe.model.quantization_bit
        return Engine(recipe.model.model_name_or_path, adapter=self._tuned, bits=bits, **same)

    def _port(self) -> str:
        from pingjia import gateway

        gateway.preflight(self._recipe.serve)
        return f"port {self._recipe.serve.port} on {self._recipe.serve.host} is free"


def _marked(pieces: Any) -> str:
    """The beginning and the end of a row on one line."""
    text, learning = "", False
    for piece in pieces:
        if piece.learnt != learning:
            text, learning = text + ("[[" if piece.learnt else "]]"), piece.learnt
        text += piece.text
    text = (text + ("]]" if learning else "")).replace("\n", "\\n")
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} ... {text[-_SHOWN // 2 :]}"
