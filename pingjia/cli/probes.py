"""The retention gate on the terminal: asking the questions of probes, and the table of what became of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from pingjia.cli.console import console
from pingjia.cli.schema import Recipe

if TYPE_CHECKING:
    from pingjia import Engine
    from pingjia.tune.gate import Retention, Score
    from pingjia.tune.keep import Kept
    from pingjia.types import Example


Marks = list[list[bool]]


def examine(
    recipe: Recipe, network: Any, adapters: Sequence[Path | None], questions: Sequence[Example]
) -> Marks | None:
    """Ask an engine on the network that was trained; see `pingjia.tune.gate.Examine`."""
    from pingjia import Engine
    from pingjia.chat import load_tokenizer
    from pingjia.errors import ModelError

    try:
        engine = Engine(network, tokenizer=load_tokenizer(recipe.model.model_name_or_path), settings=recipe.engine)
        names = [_loaded(engine, number, folder) for number, folder in enumerate(adapters)]
    except ModelError as e:  # an adapter of a kind that the engine does not apply
        console.print(f"  probes are judged by their loss alone; their questions cannot be asked: {e}", markup=False)
        return None
    return [_marks(engine, name, questions, recipe.tune.continual.max_tokens) for name in names]


def _loaded(engine: Engine, number: int, folder: Path | None) -> str | None:
    if folder is None:
        return None
    engine.load_adapter(f"probe-{number}", folder)
    return f"probe-{number}"


def _marks(engine: Engine, adapter: str | None, questions: Sequence[Example], max_tokens: int) -> list[bool]:
    """Whether each answer states all the facts of its question."""
    from pingjia.evaluate.facts import missing_facts
    from pingjia.types import Sampling

    answers = engine.generate([q.prompt for q in questions], Sampling(max_tokens=max_tokens), adapter=adapter)
    return [not missing_facts(a.text, q.facts) for a, q in zip(answers, questions, strict=True)]


def print_retention(kept: Kept) -> None:
    """Every probe before and after, and whether the gate let the adapter pass."""
    if not kept.retention:
        return
    table = Table(box=None, pad_edge=False)
    for name in ("  probe", "loss before", "after", "exact facts before", "after", "kept"):
        table.add_column(name, justify="left" if name == "  probe" else "right")
    for r in kept.retention:
        share = f"{r.share:.1%} of {r.by}" if r.is_earlier else "new"
        table.add_row(f"  {r.probe}", f"{r.before.loss:.3f}", f"{r.after.loss:.3f}", *_facts(r), share)
    console.print(table)
    _print_matrix(kept)
    console.print("  not promoted" if kept.refused else "  the gate lets it pass", markup=False)


def _print_matrix(kept: Kept) -> None:
    """Stage by probe: exact facts, or the loss where none are asked. Two stages are in the table above already."""
    if len(kept.accuracy) < 3:
        return
    probes = list(dict.fromkeys(name for row in kept.accuracy for name in row["scores"]))
    table = Table(box=None, pad_edge=False)
    table.add_column("  after")
    for probe in probes:
        table.add_column(probe, justify="right")
    for row in kept.accuracy:
        table.add_row(f"  {row['stage']}", *(_cell(row["scores"].get(probe)) for probe in probes))
    console.print(table)


def _cell(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return "-"
    return f"loss {score['loss']:.3f}" if score["facts"] is None else f"{score['facts']:.1%}"


def _facts(r: Retention) -> tuple[str, str]:
    def shown(score: Score) -> str:
        return "-" if score.facts is None else f"{score.facts:.1%} of {score.num_questions}"

    return shown(r.before), shown(r.after)
