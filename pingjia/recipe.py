"""YAML -> one strict typed recipe.

Knows how to read, override and complain; not what the keys mean. Every room owns the model of its own section
(`<room>/settings.py`); `cli/schema.py` puts them together. Sections named in `flat` have their keys at the top level
of the file, under the names that LLaMA-Factory and Hugging Face users know; the others are one level down.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import pydantic
import yaml

from pingjia.errors import RecipeError

R = TypeVar("R", bound=pydantic.BaseModel)


class Section(pydantic.BaseModel):
    """Base of every section: unknown keys are errors, values do not change after loading."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice and reads 1e-5 as a number (YAML 1.1 wants 1.0e-5)."""


def _mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        line = key_node.start_mark.line + 1
        if not isinstance(key, Hashable):
            raise RecipeError(f"line {line}: a key is one word, not {key!r}")
        if key in seen:
            raise RecipeError(f"line {line}: {key}: given twice (first in line {seen[key]}); keep one of them")
        seen[key] = line
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_BOOL = "tag:yaml.org,2002:bool"
_StrictLoader.yaml_implicit_resolvers = {
    k: [one for one in v if one[0] != _BOOL] for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
# As YAML 1.2 has it: `action: off` is a word. Where a key takes true or false, pydantic reads yes, no, on and off too.
_StrictLoader.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load(path: str | Path, overrides: Iterable[str], schema: type[R], *, flat: Sequence[str]) -> R:
    """Read the recipe at `path`, apply `key=value` overrides, return a checked `schema`.

    Raises RecipeError with one line per problem: the key, what was found, the near miss or the allowed values.
    """
    raw = read_yaml(path)
    for override in overrides:
        key, value = split_override(override)
        assign(raw, key, value)
    return build(raw, schema, flat=flat, name=str(path))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; RecipeError for a missing file, bad syntax, or a file that is not a mapping."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe; see the recipes/ folder for complete examples") from None
    except IsADirectoryError:
        raise RecipeError(f"{path} is a directory; a recipe is one YAML file") from None
    except (OSError, UnicodeDecodeError) as e:
        raise RecipeError(f"{path}: cannot be read: {e}") from None
    try:
        raw = yaml.load(text, _StrictLoader)  # noqa: S506  a SafeLoader subclass
    except RecipeError as e:
        raise RecipeError(f"{path}: {e}") from None
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        raise RecipeError(f"{path}: {line}not valid YAML: {getattr(e, 'problem', None) or e}") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values, not a {type(raw).__name__}")
    return raw


def split_override(text: str) -> tuple[str, Any]:
    """`key=value` -> (key, value read as YAML)."""
    key, sep, value = text.partition("=")
    if not sep or not key.strip():
        raise RecipeError(f"override {text!r}: write key=value, for example learning_rate=1e-4")
    try:
        return key.strip(), yaml.load(value, _StrictLoader)  # noqa: S506
    except yaml.YAMLError:
        return key.strip(), value


def assign(raw: dict[str, Any], key: str, value: Any) -> None:
    """Set `key` ("serve.port" is one level down) in a raw recipe."""
    *parents, last = key.split(".")
    for parent in parents:
        child = raw.setdefault(parent, {})
        if not isinstance(child, dict):
            raise RecipeError(f"override {key}: {parent} is not a section")
        raw = child
    raw[last] = value


def build(raw: dict[str, Any], schema: type[R], *, flat: Sequence[str], name: str = "recipe") -> R:
    """Route top-level keys to their flat section, check everything, and return the recipe."""
    homes = {field: section for section in flat for field in _fields(schema, section)}
    nested: dict[str, Any] = {section: {} for section in flat}
    problems: list[str] = []
    for key, value in raw.items():
        if key in homes:
            nested[homes[key]][key] = value
        elif key in schema.model_fields and key not in flat:
            nested[key] = {} if value is None else value
        else:
            known = [*homes, *(k for k in schema.model_fields if k not in flat)]
            problems.append(f"{key}: unknown key{near_miss(str(key), known)}")
    try:
        recipe = schema.model_validate(nested)
    except pydantic.ValidationError as e:
        problems.extend(_explain(error, schema, flat) for error in e.errors(include_url=False))
        recipe = None
    if problems or recipe is None:
        raise RecipeError("\n".join(f"{name}: {p}" for p in problems))
    return recipe


def _fields(schema: type[pydantic.BaseModel], section: str) -> dict[str, Any]:
    annotation = schema.model_fields[section].annotation
    candidates = [annotation, *get_args(annotation)]
    model = next(c for c in candidates if isinstance(c, type) and issubclass(c, pydantic.BaseModel))
    return dict(model.model_fields)


def _explain(error: Any, schema: type[pydantic.BaseModel], flat: Sequence[str]) -> str:
    loc = [str(part) for part in error["loc"]]
    shown = ".".join(loc[1:] if loc and loc[0] in flat and len(loc) > 1 else loc)
    if error["type"] == "extra_forbidden":
        known = list(_fields(schema, loc[0])) if loc[0] in schema.model_fields and len(loc) == 2 else []
        return f"{shown}: unknown key{near_miss(loc[-1], known)}"
    if error["type"] == "missing":
        return f"{shown}: missing; this key has no default"
    message = error["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    return f"{shown}: {message} (found {error['input']!r})"


def near_miss(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?` or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""
