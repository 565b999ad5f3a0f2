"""`pingjia chat MODEL`: a conversation in the terminal, streaming."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pingjia.cli.console import console, errors
from pingjia.cli.serve import ADAPTER_HELP, BITS_HELP, DEVICE_HELP, DTYPE_HELP, MODEL_HELP, parse_adapters

if TYPE_CHECKING:
    from pingjia import Engine
    from pingjia.types import Message, Sampling

HELP = "/system TEXT  set the system prompt    /reset  start over    /save FILE  write the chat as JSONL    /quit"


def chat(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    adapter: Annotated[str | None, typer.Option("--adapter", help=ADAPTER_HELP)] = None,
    system: Annotated[str | None, typer.Option("--system", help="System prompt.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="For temperatures above 0.")] = None,
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP)] = "auto",
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "auto",
    bits: Annotated[int | None, typer.Option(help=BITS_HELP)] = None,
) -> None:
    """Talk to a model. Reads questions from the terminal, or one a line from a pipe."""
    from pingjia import Engine, Sampling

    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, seed=seed)
    adapters = parse_adapters([adapter] if adapter else [])
    errors.print(f"loading {model} ...", markup=False)
    engine = Engine(model, dtype=dtype, device=device, bits=bits)
    for name, path in adapters.items():
        engine.load_adapter(name, path)
    errors.print(HELP, markup=False)
    _Conversation(engine, next(iter(adapters), None), sampling, system).run()


class _Conversation:
    """The turns so far, and what a line typed by the user does to them."""

    def __init__(self, engine: Engine, adapter: str | None, sampling: Sampling, system: str | None) -> None:
        self._engine, self._adapter, self._sampling = engine, adapter, sampling
        self._system = system
        self._turns: list[Message] = []

    def run(self) -> None:
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "").strip()
            except EOFError:
                return
            if line in ("/quit", "/exit"):
                return
            if line.startswith("/"):
                self._command(line)
            elif line:
                self._answer(line)

    def _command(self, line: str) -> None:
        verb, _, rest = line.partition(" ")
        if verb == "/reset":
            self._turns = []
        elif verb == "/system":
            self._system, self._turns = rest or None, []
        elif verb == "/save" and rest:
            self._save(Path(rest.strip()))
        else:
            errors.print(f"unknown command {line!r}\n{HELP}", markup=False)

    def _answer(self, question: str) -> None:
        """Stream one answer. Ctrl-C stops it and keeps what was said; an error keeps the conversation as it was."""
        from pingjia.errors import PingjiaError
        from pingjia.types import Message

        asked = [*self._turns, Message("user", question)]
        system = [Message("system", self._system)] if self._system else []
        pieces: list[str] = []
        try:
            for chunk in self._engine.stream([*system, *asked], self._sampling, adapter=self._adapter):
                pieces.append(chunk.text)
                print(chunk.text, end="", flush=True)
                if chunk.error:
                    errors.print(f"\nerror: {chunk.error}", markup=False)
        except KeyboardInterrupt:
            errors.print(" (stopped)")
        except PingjiaError as e:
            errors.print(f"error: {e}", markup=False)
            return
        print()
        self._turns = [*asked, Message("assistant", "".join(pieces))]

    def _save(self, file: Path) -> None:
        """One row that `pingjia data check` and training read. Nothing is overwritten."""
        import json

        from pingjia.chat.tools import as_row

        system = [{"role": "system", "content": self._system}] if self._system else []
        row = {"messages": system + [as_row(turn) for turn in self._turns]}
        try:
            with open(file, "a", encoding="utf-8") as out:
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
            console.print(f"added to {file}", markup=False)
        except OSError as e:
            errors.print(f"error: {file}: {e.strerror}", markup=False)
