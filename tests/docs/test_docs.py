"""What README and docs show is what there is: links, command lines, recipe keys and defaults, sample rows, recipes."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from pingjia import recipe as recipes
from pingjia.cli.main import app
from pingjia.cli.schema import FLAT, AskSettings, Recipe
from pingjia.cost.settings import CostSettings
from pingjia.data.layouts import parse_row
from pingjia.data.settings import DataSettings, PrepareSettings
from pingjia.engine.settings import EngineSettings
from pingjia.evaluate.settings import EvalSettings
from pingjia.gateway.settings import GatewaySettings
from pingjia.models.settings import ModelSettings
from pingjia.tune.settings import TuneSettings
from pingjia.worker.settings import WorkerSettings

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
READMES = ("README.md", "README.zh-CN.md")
SECTIONS: dict[str, type[recipes.Section]] = {
    "Model": ModelSettings,
    "Data": DataSettings,
    "Tuning": TuneSettings,
    "prepare": PrepareSettings,
    "eval": EvalSettings,
    "serve": GatewaySettings,
    "engine": EngineSettings,
    "worker": WorkerSettings,
    "cost": CostSettings,
    "ask": AskSettings,
}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
COMMAND = typer.main.get_command(app)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> list[str]:
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [body for language, body in found if not languages or language in languages]


# ---- links


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    prose = BLOCK.sub("", page.read_text(encoding="utf-8"))
    targets = re.findall(r"\]\(([^)\s]+)\)", prose) + re.findall(r'(?:src|href)="([^"]+)"', prose)
    broken = [t for t in targets if not leads_somewhere(page, t)]
    assert broken == []


def leads_somewhere(page: Path, target: str) -> bool:
    if re.match(r"[a-z]+:", target):  # another site
        return True
    path, _, anchor = target.partition("#")
    file = page.parent / path if path else page
    return file.exists() and (not anchor or anchor in anchors(file))


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


# ---- command lines


def shown_lines(page: Path) -> Iterator[list[str]]:
    """The words after `pingjia` of every command line in a block of code."""
    for body in blocks(page):
        for line in body.replace("\\\n", " ").splitlines():
            match = re.match(r"\s*(?:\$ )?(?:\w+=\S+ )*(?:\.venv/bin/)?pingjia (.*)", line)
            if match:
                yield shlex.split(match[1], comments=True)


def shown_mentions(page: Path) -> list[list[str]]:
    """The words of every `pingjia ...` in running text, where arguments may be left out."""
    prose = BLOCK.sub("", page.read_text(encoding="utf-8"))
    return [text.split() for text in re.findall(r"`pingjia ([^`]*)`", prose)]


def resolve(words: list[str]) -> tuple[Any, list[str]]:
    """The command that words name, and what is left of them. AssertionError for an unknown verb."""
    command = COMMAND
    while words and hasattr(command, "commands") and not words[0].startswith("-"):
        assert words[0] in command.commands, f"no such verb: {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    return command, words


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_command_lines_parse(page: Path) -> None:
    for words in shown_lines(page):
        command, rest = resolve(words)
        assert not hasattr(command, "commands"), f"a verb is missing: {words}"
        try:
            command.make_context("pingjia", rest)
        except Exception as e:
            pytest.fail(f"pingjia {shlex.join(words)}: {e}")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_mentioned_verbs_and_options_exist(page: Path) -> None:
    for words in shown_mentions(page):
        command, rest = resolve(words)
        known = {option for parameter in command.params for option in parameter.opts} | {"--help", "-h", "--debug"}
        unknown = {word.strip("[]") for word in rest if word.strip("[]").startswith("-")} - known
        assert not unknown, f"pingjia {' '.join(words)}: no such option {unknown}"


@pytest.mark.parametrize("page", READMES)
def test_every_verb_is_in_the_readme(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert [verb for verb in verbs(COMMAND) if f"`pingjia {verb}" not in text] == []


def verbs(command: Any, before: str = "") -> Iterator[str]:
    for name, child in command.commands.items():
        if hasattr(child, "commands"):
            yield from verbs(child, f"{before}{name} ")
        else:
            yield before + name


def test_a_wrong_line_is_found() -> None:
    with pytest.raises(AssertionError, match="no such verb"):
        resolve(["tarin", "recipe.yaml"])
    command, rest = resolve(["serve", "smollm2", "--prot", "8000"])
    with pytest.raises(Exception, match="prot"):
        command.make_context("pingjia", rest)


# ---- recipe.md


def table(title: str) -> list[list[str]]:
    """The cells of the table under a heading of docs/recipe.md, without its head."""
    page = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    section = page.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]


def default_of(shown: str) -> Any:
    """A cell of the column `default` as a value. `none` is null, `'none'` the word."""
    if shown == "empty":
        return ""
    value = yaml.load(shown.strip("`"), recipes._StrictLoader)
    return None if shown.strip("`") == "none" else value


def test_every_section_of_the_recipe_has_a_table() -> None:
    flat = {"model": "Model", "data": "Data", "tune": "Tuning"}
    assert {flat.get(name, name) for name in Recipe.model_fields} == set(SECTIONS)
    assert set(flat) == set(FLAT)


def fields_of(model: type[recipes.Section], before: str = "") -> Iterator[tuple[str, Any]]:
    """(key, field) of a section; of one inside it as outer.inner."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, recipes.Section):
            yield from fields_of(field.annotation, f"{before}{name}.")
        else:
            yield before + name, field


@pytest.mark.parametrize(("title", "model"), SECTIONS.items(), ids=SECTIONS)
def test_recipe_table_is_the_model(title: str, model: type[recipes.Section]) -> None:
    rows, fields = table(title), dict(fields_of(model))
    assert [row[0].strip("`") for row in rows] == list(fields)
    for key, kind, default, meaning in rows:
        field = fields[key.strip("`")]
        assert kind, key
        assert meaning, key
        if field.is_required():
            assert default == "required", key
            continue
        actual = field.get_default(call_default_factory=True)
        actual = list(actual) if isinstance(actual, tuple) else actual
        assert (type(default_of(default)), default_of(default)) == (type(actual), actual) or (
            isinstance(actual, int | float) and not isinstance(actual, bool) and default_of(default) == actual
        ), key


# ---- recipes and rows


@pytest.mark.parametrize("file", sorted((ROOT / "recipes").rglob("*.yaml")), ids=name_of)
def test_shipped_recipes_load(file: Path) -> None:
    recipes.load(file, [], Recipe, flat=FLAT)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_shown_recipes_load(page: Path) -> None:
    for body in blocks(page, "yaml"):
        raw = yaml.load(body, recipes._StrictLoader)
        if "model_name_or_path" in raw:
            recipes.build(raw, Recipe, flat=FLAT, name=name_of(page))


@pytest.mark.parametrize("page", READMES)
def test_readme_shows_a_whole_recipe(page: str) -> None:
    assert any("model_name_or_path" in body for body in blocks(ROOT / page, "yaml"))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_shown_rows_are_sound(page: Path) -> None:
    for body in blocks(page, "jsonl"):
        for number, line in enumerate(body.splitlines(), start=1):
            parsed = parse_row(json.loads(line), f"{name_of(page)}:{number}")
            assert parsed.faults == []
            assert parsed.unread == ()


@pytest.mark.parametrize("page", READMES)
def test_readme_shows_five_rows(page: str) -> None:
    assert [len(body.splitlines()) for body in blocks(ROOT / page, "jsonl")] == [5]


def test_both_readmes_have_the_same_parts() -> None:
    first, second = ((ROOT / page).read_text(encoding="utf-8") for page in READMES)
    for pattern in (r"^(#+) ", r"^```(\w*)$", r"\]\((docs/[^)]*|LICENSE|C[A-Z]+\.md)\)", r"<!-- .* -->"):
        assert re.findall(pattern, first, re.MULTILINE) == re.findall(pattern, second, re.MULTILINE), pattern


# ---- tour.md


def steps() -> list[str]:
    page = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8").split("\n## The rooms\n")[0]
    return re.split(r"^\d+\. ", page, flags=re.MULTILINE)[1:]


@pytest.mark.parametrize("step", steps(), ids=lambda step: re.sub(r"\W.*", "", step.lstrip("["), flags=re.DOTALL))
def test_tour_names_functions_of_its_files(step: str) -> None:
    step = step.split("\n## ")[0]
    sources = "".join((ROOT / "docs" / file).read_text() for file in re.findall(r"\]\((\.\./[\w/]+\.py)\)", step))
    names = re.findall(r"`(_?[A-Za-z]\w+)`", step)
    assert [name for name in names if not re.search(rf"\b{name}\b", sources)] == []
    assert [n for n in names if n.islower() and not re.search(rf"def {n}\b|^{n} =", sources, re.MULTILINE)] == []


def test_tour_has_every_room() -> None:
    page = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
    rooms = {file.parent.name for file in (ROOT / "pingjia").glob("*/__init__.py")}
    assert set(re.findall(r"^\*\*\[(\w+)/\]", page, re.MULTILINE)) == rooms
