"""Recipes are read strictly: nothing unknown, nothing twice, every complaint by key."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from pingjia import recipe
from pingjia.errors import RecipeError
from pingjia.recipe import Section


class Tune(Section):
    output_dir: str
    learning_rate: float = Field(1e-4, ge=0)
    lora_rank: int = 16
    kind: Literal["linear", "cosine"] = "cosine"


class Serve(Section):
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)


class Whole(Section):
    tune: Tune
    serve: Serve = Field(default_factory=Serve)
    eval: Serve | None = None


Load = Callable[..., Whole]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """load(text, *overrides): the recipe in a file of that text."""

    def read(text: str | bytes, *overrides: str) -> Whole:
        file = tmp_path / "r.yaml"
        file.write_bytes(text.encode() if isinstance(text, str) else text)
        return recipe.load(file, overrides, Whole, flat=("tune",))

    return read


def problems(load: Load, text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(text, *overrides)
    return [line.partition("r.yaml: ")[2] for line in str(caught.value).splitlines()]


def test_flat_and_nested_keys(load: Load) -> None:
    found = load("output_dir: out\nlora_rank: 4\nserve:\n  port: 1\n")
    assert (found.tune.output_dir, found.tune.lora_rank, found.tune.kind) == ("out", 4, "cosine")
    assert (found.serve.host, found.serve.port, found.eval) == ("127.0.0.1", 1, None)


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "1.0e-5", "0.00001", ".1e-4", "1.e-5", "+1e-5", "1e-05"])
def test_every_way_to_write_a_small_number(load: Load, text: str) -> None:
    assert load(f"output_dir: o\nlearning_rate: {text}").tune.learning_rate == 1e-5
    assert load("output_dir: o", f"learning_rate={text}").tune.learning_rate == 1e-5


@pytest.mark.parametrize("text", ["1e5x", "v1e-5", "e5", "1e", "2e-3-checkpoint"])
def test_words_that_only_look_like_numbers(load: Load, text: str) -> None:
    assert load(f"output_dir: {text}").tune.output_dir == text


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.floats(min_value=0, allow_infinity=False, allow_nan=False))
def test_numbers_as_python_writes_them(value: float) -> None:
    assert recipe.split_override(f"x={value!r}") == ("x", value)


def test_a_key_given_twice(load: Load) -> None:
    text = "output_dir: a\nlora_rank: 1\nlora_rank: 2\n"
    assert problems(load, text) == ["line 3: lora_rank: given twice (first in line 2); keep one of them"]
    text = "output_dir: a\nserve:\n  port: 1\n  host: x\n  port: 1\n"
    assert problems(load, text) == ["line 5: port: given twice (first in line 3); keep one of them"]


def test_unknown_keys_name_their_near_miss(load: Load) -> None:
    assert problems(load, "output_dir: a\nlora_ranks: 4") == ["lora_ranks: unknown key; did you mean lora_rank?"]
    assert problems(load, "output_dir: a\nsevre: {}") == ["sevre: unknown key; did you mean serve?"]
    assert problems(load, "output_dir: a\nserve: {prot: 1}") == ["serve.prot: unknown key; did you mean port?"]
    assert problems(load, "output_dir: a\neval: {hots: x}") == ["eval.hots: unknown key; did you mean host?"]
    assert problems(load, "output_dir: a\nzzzzzz: 1") == ["zzzzzz: unknown key"]


def test_a_flat_section_may_not_be_written_nested(load: Load) -> None:
    assert problems(load, "output_dir: a\ntune: {lora_rank: 4}")[0].startswith("tune: unknown key")


def test_every_problem_is_told(load: Load) -> None:
    found = problems(load, "learning_rate: -1\nlora_rank: many\nkind: cosin\nlora_ranks: 1\nserve: {port: 70000}")
    assert sorted(line.split(":")[0] for line in found) == sorted(
        ["learning_rate", "lora_rank", "kind", "lora_ranks", "serve.port", "output_dir"]
    )
    told = "\n".join(found)
    assert "output_dir: missing; this key has no default" in told
    assert "learning_rate: input should be greater than or equal to 0 (found -1)" in told
    assert "(found 'many')" in told
    assert "'linear' or 'cosine'" in told


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a\n- b\n", "a recipe is a mapping of keys to values, not a list"),
        ("just words", "not a str"),
        ("a: [1\nb: 2\n", "line 2: not valid YAML"),
        ("a: b: c\n", "line 1: not valid YAML"),
        ("output_dir: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
        ("serve: 3\noutput_dir: a", "serve: "),
        ("serve: [1]\noutput_dir: a", "serve: "),
        ("output_dir: [a]", "output_dir: "),
        ("output_dir:", "output_dir: "),
        ("1: 2\noutput_dir: a", "1: unknown key"),
        ("[a]: 2\n", "line 1: a key is one word, not ['a']"),
    ],
)
def test_what_is_no_recipe(load: Load, text: str, words: str) -> None:
    with pytest.raises(RecipeError, match=r"r\.yaml"):
        load(text)
    assert words in "\n".join(problems(load, text))


def test_an_empty_recipe_is_only_incomplete(load: Load) -> None:
    assert problems(load, "") == ["output_dir: missing; this key has no default"]
    assert load("output_dir: a\nserve:\n").serve == Serve()


def test_files_that_cannot_be_read(load: Load, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.yaml: no such recipe"):
        recipe.read_yaml(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="is a directory"):
        recipe.read_yaml(tmp_path)
    with pytest.raises(RecipeError, match="cannot be read"):
        load("output_dir: 输出".encode("gbk"))
    assert load("output_dir: 输出".encode("utf-8-sig")).tune.output_dir == "输出"


def test_overrides(load: Load) -> None:
    found = load("output_dir: a\n", "lora_rank=4", "serve.port=9", "eval.host=h", "output_dir=b=c", "kind=linear")
    assert (found.tune.lora_rank, found.tune.output_dir, found.tune.kind) == (4, "b=c", "linear")
    assert (found.serve.port, found.eval) == (9, Serve(host="h"))


def test_the_last_override_wins(load: Load) -> None:
    assert load("output_dir: a\nlora_rank: 1", "lora_rank=2", "lora_rank=3").tune.lora_rank == 3


def test_bad_overrides(load: Load) -> None:
    for text in ("lora_rank", "=3", " =3", ""):
        with pytest.raises(RecipeError, match="write key=value"):
            load("output_dir: a", text)
    with pytest.raises(RecipeError, match="output_dir is not a section"):
        load("output_dir: a", "output_dir.x=1")
    assert problems(load, "output_dir: a", "serve.prot=1") == ["serve.prot: unknown key; did you mean port?"]
    assert problems(load, "output_dir: a", "lora_rnak=1") == ["lora_rnak: unknown key; did you mean lora_rank?"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("x=3", 3),
        ("x=true", True),
        ("x=[a, b]", ["a", "b"]),
        ("x=null", None),
        ("x=", None),
        ("x=a: [", "a: ["),
        ("x=你好", "你好"),
    ],
)
def test_override_values_are_yaml(text: str, value: object) -> None:
    assert recipe.split_override(text) == ("x", value)


def test_sections_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Serve().port = 1  # type: ignore[misc]


def test_near_miss() -> None:
    assert recipe.near_miss("prot", ["port", "host"]) == "; did you mean port?"
    assert recipe.near_miss("zzz", ["port", "host"]) == ""
    assert recipe.near_miss("port", []) == ""


@pytest.mark.parametrize(("text", "expected"), [("off", "off"), ("no", "no"), ("true", True), ("FALSE", False)])
def test_off_is_a_word_and_true_is_not(tmp_path: Path, text: str, expected: object) -> None:
    """YAML 1.1 would read off and no as false: `action: off` would not be what it says."""
    from pingjia.recipe import read_yaml

    file = tmp_path / "a.yaml"
    file.write_text(f"key: {text}\n")
    assert read_yaml(file) == {"key": expected}
