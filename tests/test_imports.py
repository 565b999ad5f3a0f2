"""The house keeps its order: who may import whom, who may load torch, and that asking for help stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "pingjia"
BASE = {
    "errors",
    "types",
    "recipe",
    "ledger",
    "locate",
    "meter",
    "remote",
    "similarity",
    "language",
    "script",
    "engine_metrics",
    "trace",
    "logs",
}
BASE_ALLOWED = {
    "errors": set(),
    "types": {"errors"},
    "recipe": {"errors"},
    "ledger": set(),
    "locate": {"errors"},
    "meter": set(),
    "remote": {"errors"},
    "similarity": set(),
    "script": set(),
    "engine_metrics": {"errors", "types"},
    "trace": {"errors", "types"},
    "logs": set(),
    "language": {"errors", "script"},
}
ALLOWED = {
    "chat": set(),
    "data": {"chat"},
    "models": {"quant"},
    "quant": set(),
    "tune": {"data", "chat", "models", "quant"},
    "engine": {"models", "quant", "chat"},
    "queue": set(),
    "cluster": set(),
    "worker": {"engine", "chat", "cluster", "queue"},
    "gateway": {"chat", "cluster", "queue"},
    "export": {"models", "quant", "tune"},
    "evaluate": {"chat"},
    "cost": set(),
}
HEAVY = {"torch", "transformers", "peft", "accelerate"}
HEAVY_ROOMS = {"models", "quant", "tune", "engine", "worker", "export"}
HEAVY_EXCEPTIONS = {("chat/load.py", "transformers")}  # converts a tokenizer kept only as a SentencePiece model, lazily

FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


def room_of(file: Path) -> str:
    """The folder, or the module's own name for a file at the top."""
    first = file.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported(file: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import in a file, also those inside functions and of `import_module("...")`."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(file)}:{node.lineno}: write the whole name instead of dots"
            assert node.module
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            yield node.lineno, _text(node.args[0])


def _text(node: ast.expr) -> str:
    """The string an `import_module` is given; the parts of an f-string that are not known read as `*`."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "*" for part in node.values)
    return "*"


def rooms_imported(file: Path) -> Iterator[tuple[int, str]]:
    for line, name in imported(file):
        parts = name.split(".")
        if parts[0] == "pingjia" and len(parts) > 1:
            if (PACKAGE / parts[1]).is_dir() or (PACKAGE / f"{parts[1]}.py").is_file():
                yield line, parts[1]
            else:
                assert parts[1] in {"Engine", "Message", "Sampling", "__version__"}, f"{name_of(file)}:{line}: {name}"
                yield line, {"Engine": "engine", "__version__": "__init__"}.get(parts[1], "types")


def test_the_search_finds_what_is_there() -> None:
    assert len(FILES) > 80
    assert {room_of(f) for f in FILES} >= BASE | set(ALLOWED) | {"cli", "__init__"}
    loop = {room for _, room in rooms_imported(PACKAGE / "tune" / "run.py")}
    assert {"chat", "data", "models", "tune", "errors", "ledger", "meter", "types"} <= loop
    lazy = {room for _, room in rooms_imported(PACKAGE / "cli" / "run.py")}
    assert {"gateway", "data", "chat", "ledger"} <= lazy


def test_every_folder_is_a_room_with_rules() -> None:
    folders = {p.parent.name for p in PACKAGE.glob("*/__init__.py")}
    assert folders == set(ALLOWED) | {"cli"}


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_point_down(file: Path) -> None:
    room = room_of(file)
    if room in ("cli", "__init__"):
        return
    allowed = BASE_ALLOWED[room] | {room} if room in BASE else BASE | ALLOWED[room] | {room, "__init__"}
    wrong = [f"{name_of(file)}:{line}: imports {other}" for line, other in rooms_imported(file) if other not in allowed]
    assert not wrong


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_torch_lives_in_its_rooms(file: Path) -> None:
    if room_of(file) in HEAVY_ROOMS:
        return
    wrong = [
        f"{name_of(file)}:{line}: imports {name}"
        for line, name in imported(file)
        if name.split(".")[0] in HEAVY and (name_of(file), name.split(".")[0]) not in HEAVY_EXCEPTIONS
    ]
    assert not wrong


def test_the_one_exception_is_lazy() -> None:
    for file, name in HEAVY_EXCEPTIONS:
        top = ast.parse((PACKAGE / file).read_text(encoding="utf-8")).body
        modules = [a.name for n in top if isinstance(n, ast.Import) for a in n.names]
        modules += [n.module or "" for n in top if isinstance(n, ast.ImportFrom)]
        assert not any(m.split(".")[0] == name for m in modules)
        assert any(found.split(".")[0] == name for _, found in imported(PACKAGE / file)), "an exception nobody needs"


def loaded_by(code: str) -> set[str]:
    """Names in sys.modules after `code` ran in a fresh interpreter."""
    code += "\nimport sys; print('MODULES', *sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("MODULES")[2].split())


SETTINGS = sorted(
    ".".join(("pingjia", *f.relative_to(PACKAGE).with_suffix("").parts)) for f in PACKAGE.glob("*/settings.py")
)


def test_settings_the_command_line_and_the_gateway_are_light() -> None:
    assert len(SETTINGS) >= 7
    statements = [f"import {name}" for name in [*SETTINGS, "pingjia", "pingjia.cli.main", "pingjia.cli.schema"]]
    assert not loaded_by("\n".join(statements)) & HEAVY


@pytest.mark.parametrize("name", ["gateway", "queue", "cluster", "evaluate", "cost", "data", "chat"])
def test_rooms_without_torch_stay_without_it(name: str) -> None:
    """Every module of the room loaded, every public name asked for."""
    modules = [f.relative_to(PACKAGE.parent).with_suffix("").as_posix() for f in (PACKAGE / name).glob("*.py")]
    code = "\n".join(f"import {m.replace('/', '.').removesuffix('.__init__')}" for m in sorted(modules))
    code += f"\nimport pingjia.{name} as room\nfor n in getattr(room, '__all__', []): getattr(room, n)"
    assert not loaded_by(code) & HEAVY


@pytest.mark.parametrize(
    "name", ["models", "tune", "engine", "worker", "export", "quant", "data", "chat", "gateway", "queue", "cluster"]
)
def test_every_public_name_is_there(name: str) -> None:
    from importlib import import_module

    room = import_module(f"pingjia.{name}")
    assert room.__all__
    assert all(getattr(room, public) is not None for public in room.__all__)
    assert not hasattr(room, "no_such_name")


def test_the_top_names() -> None:
    import pingjia

    assert all(getattr(pingjia, name) is not None for name in pingjia.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = pingjia.nothing
