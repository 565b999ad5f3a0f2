"""`pingjia run RECIPE`: the whole road. Check (or prepare) data -> tune -> compare -> serve -> ask -> bill.

A stage whose inputs are unchanged is not done again. Serving and asking always are: they show that the result answers.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pingjia.cli import cost as cost_verb
from pingjia.cli import data as data_verb
from pingjia.cli import eval as eval_verb
from pingjia.cli import train as train_verb
from pingjia.cli.console import console, duration
from pingjia.cli.prepare import with_prepared_data
from pingjia.cli.schema import Recipe, ledger_path, load_recipe
from pingjia.cli.stages import Stages, digest
from pingjia.cli.train import Overrides, RecipePath
from pingjia.errors import DataError, EngineError, UserError

CHECK_ROOMS = ("chat", "data")
TRAIN_ROOMS = ("chat", "data", "models", "tune")
EVAL_ROOMS = ("chat", "models", "engine", "evaluate")
START_TIMEOUT_S = 300.0
TUNED_NAME = "tuned"
OWN_DATA = ("dataset", "eval_dataset", "eval.questions", "output_dir", "max_steps")


def run(recipe: RecipePath, overrides: Overrides = None) -> int:
    """Check data, tune, compare before and after, serve, ask, and print the bill."""
    from pingjia import gateway

    loaded = load_recipe(recipe, overrides or [])
    gateway.preflight(loaded.serve)  # a port in use is better known now than after the training
    return Road(recipe, loaded, overrides or []).walk()


class Road:
    """One walk along a recipe."""

    def __init__(self, file: Path, recipe: Recipe, overrides: Sequence[str] = ()) -> None:
        self._file, self._recipe = file, recipe
        self._kept = [o for o in overrides if o.partition("=")[0] not in OWN_DATA]
        self._output_dir = Path(recipe.tune.output_dir)
        self._stages = Stages(self._output_dir)

    def walk(self) -> int:
        started = time.perf_counter()
        if self._recipe.prepare is not None:
            console.rule("1 prepare data")
            self._recipe = with_prepared_data(self._recipe)
        else:
            console.rule("1 check data")
            self._check()
        console.rule("2 tune")
        if not self._train():
            return 130
        if self._recipe.eval is not None:
            console.rule("3 compare before and after")
            self._compare()
        console.rule("4 serve and ask")
        self._serve_and_ask()
        console.rule("5 the bill: everything spent in this output_dir so far")
        cost_verb.print_bill(self._recipe, ledger_path(self._recipe))
        self._print_next(time.perf_counter() - started)
        return 0

    def _check(self) -> None:
        from pingjia import chat, data
        from pingjia.data.check import CheckReport
        from pingjia.ledger import Fact, Ledger
        from pingjia.meter import Meter

        settings = self._recipe.data
        files = [*settings.dataset, *settings.eval_dataset]
        inputs = digest(
            CHECK_ROOMS, data.fingerprint(files), settings.model_dump(), self._recipe.model.model_name_or_path
        )
        if (done := self._stages.result("check", inputs)) is not None:
            console.print(f"  unchanged since the last run: {done['num_examples']} rows, no problem; not checked again")
            return
        with Meter() as meter:
            tokenizer = chat.load_tokenizer(self._recipe.model.model_name_or_path)
            report: CheckReport = data.check_files(files, tokenizer, settings.cutoff_len, domains=settings.domains)
        data_verb.print_report(report, indent="  ")
        if not report.ok:
            raise DataError(
                f"{report.num_problems} problems; correct them, or let `pingjia data prepare` set those rows aside"
            )
        Ledger(ledger_path(self._recipe)).append(
            Fact(
                kind="data.check",
                run=self._output_dir.name,
                seconds=round(meter.seconds, 3),
                peak_bytes=meter.peak_bytes,
            )
        )
        self._stages.finish("check", inputs, {"num_examples": report.num_examples})

    def _train(self) -> bool:
        """True when the run is finished. What other code, data or settings made is trained anew."""
        from pingjia import data

        recipe = self._recipe
        files = data.fingerprint([*recipe.data.dataset, *recipe.data.eval_dataset])
        parts = [files, recipe.data.model_dump(), recipe.model.model_dump(), recipe.tune.model_dump()]
        inputs = digest(TRAIN_ROOMS, *parts)
        if (done := self._stages.result("train", inputs)) is not None and (self._output_dir / "pingjia.json").is_file():
            console.print(f"  unchanged since the last run: tuned to loss {done['last_loss']:.3f}; not trained again")
            return True
        self._start_over_if_stale(inputs)
        # Not before: a run killed while it loads has not made room for itself yet, and must start over again.
        result = train_verb.train_recipe(self._recipe, lambda: self._stages.finish("train-started", inputs, {}))
        if result.finished:
            self._stages.finish("train", inputs, {"last_loss": result.last_loss})
        return result.finished

    def _start_over_if_stale(self, inputs: str) -> None:
        """An unfinished run goes on only if this very code, data and recipe started it."""
        started = self._stages.result("train-started", inputs) is not None
        if started or not (self._output_dir / "trainer_log.jsonl").exists():
            return
        console.print("  inputs have changed since the last run: training anew")
        tune = self._recipe.tune.model_copy(update={"resume_from_checkpoint": False})
        self._recipe = self._recipe.model_copy(update={"tune": tune})

    def _compare(self) -> None:
        from pingjia import data

        recipe, folder = self._recipe, eval_verb.report_dir(self._recipe)
        assert recipe.eval is not None
        weights = "adapter_model.safetensors" if self._is_adapter else "pingjia.json"  # which names the run
        inputs = digest(
            EVAL_ROOMS,
            data.fingerprint([*recipe.eval.questions, self._output_dir / weights]),
            recipe.eval.model_dump(),
            recipe.model.model_dump(),
        )
        if self._stages.result("compare", inputs) is not None and (folder / "after.json").is_file():
            from pingjia.evaluate import EvalReport, compare

            console.print("  unchanged since the last run; not asked again")
            comparison = compare(EvalReport.load(folder / "before.json"), EvalReport.load(folder / "after.json"))
        else:
            comparison = eval_verb.compare_recipe(recipe)
            self._stages.finish("compare", inputs, {})
        eval_verb.print_comparison(comparison, folder)
        for before, after in list(comparison.pairs())[:3]:
            console.print(f"  问 {before.prompt[-1].content}", markup=False)
            console.print(f"    before: {_one_line(before.answer)}", markup=False)
            console.print(f"    after:  {_one_line(after.answer)}", markup=False)

    def _serve_and_ask(self) -> None:
        with self._server() as url:
            for question in self._recipe.ask.questions:
                _ask(url, self._name, question, self._recipe.ask.max_tokens)
        console.print("  server stopped")

    @contextmanager
    def _server(self) -> Iterator[str]:
        """`pingjia serve` as a user would start it, in its own process; stopped by SIGTERM, exit code checked."""
        log = self._output_dir / "serve.log"
        command = self._serve_command()
        console.print(f"  $ pingjia {shlex.join(command[3:])}", markup=False)
        with open(log, "w+", encoding="utf-8") as out:
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)  # noqa: S603  our own verb
            try:
                yield _wait_until_serving(process, out, log)
            finally:
                code = _stop(process)
        if code != 0:
            raise EngineError(f"the server ended with exit code {code}; its last words are in {log}")

    def _serve_command(self) -> list[str]:
        model, serve = self._recipe.model, self._recipe.serve
        command = [sys.executable, "-m", "pingjia.cli.main", "serve", *self._served("--served-model-name", self._name)]
        command += ["--host", serve.host, "--port", str(serve.port)]
        command += ["--dtype", model.dtype, "--device", model.device, "--ledger", str(ledger_path(self._recipe))]
        if model.quantization_bit is not None:
            command += ["--bits", str(model.quantization_bit)]
        sections = {"serve": serve, "engine": self._recipe.engine, "worker": self._recipe.worker}
        for name, section in sections.items():
            given = section.model_dump(mode="json", include=section.model_fields_set - {"host", "port"})
            for key, value in given.items():
                command += ["--set", f"{name}.{key}={json.dumps(value)}"]
        return command

    @property
    def _is_adapter(self) -> bool:
        return self._recipe.tune.finetuning_type == "lora"

    @property
    def _name(self) -> str:
        """What the tuned model is called where it is served; a model of its own is called what the recipe says."""
        return TUNED_NAME if self._is_adapter else self._recipe.serve.served_model_name or TUNED_NAME

    def _served(self, *name: str) -> list[str]:
        """What stands for the tuned model behind `pingjia serve`. `name`: how a model of its own is given a name."""
        if self._is_adapter:
            return [self._recipe.model.model_name_or_path, "--adapter", f"{self._name}={self._output_dir}"]
        return [str(self._output_dir), *name]

    def _print_next(self, seconds: float) -> None:
        base, out = self._recipe.model.model_name_or_path, self._output_dir
        mine = "dataset=MINE.jsonl eval_dataset=HELDOUT.jsonl eval.questions=HELDOUT.jsonl output_dir=runs/mine"
        again = shlex.join(["pingjia", "run", str(self._file), *self._kept])
        console.rule(f"done in {duration(seconds)}")
        console.print("next:")
        for command, why in (
            (f"pingjia chat {base} --adapter {out}" if self._is_adapter else f"pingjia chat {out}", "talk to it"),
            (f"{shlex.join(['pingjia', 'serve', *self._served()])} --port 8000", "serve it to your programs"),
            (f"{again} {mine}", "tune it on your own data"),
        ):
            console.print(f"  {command:<60}  # {why}", markup=False)


def _wait_until_serving(process: subprocess.Popen[Any], out: IO[str], log: Path) -> str:
    """The URL the server printed. Raises UserError with its last line when it ends before that."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        text = log.read_text(encoding="utf-8")
        for line in text.splitlines():
            if line.startswith("serving at "):
                console.print(f"  {line}", markup=False)
                return line.removeprefix("serving at ").strip()
        if process.poll() is not None:
            raise UserError(f"the server did not start: {(text.strip().splitlines() or ['no output'])[-1]}")
        time.sleep(0.1)
    raise UserError(f"the server did not start within {START_TIMEOUT_S:.0f} s; its output is in {log}")


def _stop(process: subprocess.Popen[Any]) -> int:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        return process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _ask(url: str, model: str, question: str, max_tokens: int) -> None:
    """One question through the official client, streaming."""
    import openai

    # The client insists on a key; on loopback the server asks for none unless one was configured.
    key = os.environ.get("PINGJIA_API_KEYS", "none").replace(",", " ").split()[0]
    client = openai.OpenAI(base_url=url, api_key=key, timeout=120, max_retries=0)
    console.print(f"  > {question}", markup=False)
    started, first, count = time.perf_counter(), None, 0
    console.print("    ", end="")
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    for event in stream:
        if event.choices and event.choices[0].delta.content:
            first = first or time.perf_counter() - started
            console.print(event.choices[0].delta.content, end="", markup=False)
        if event.usage:
            count = event.usage.completion_tokens
    seconds = time.perf_counter() - started
    console.print(f"\n    ({count} tokens in {seconds:.2f} s, the first after {first or seconds:.2f} s)")


def _one_line(text: str, limit: int = 100) -> str:
    flat = json.dumps(text, ensure_ascii=False)[1:-1]
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"
