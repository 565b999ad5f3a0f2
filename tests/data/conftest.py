"""Writing small data files and reading them back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from pingjia.chat import load_tokenizer
from pingjia.chat.tokenizer import Tokenizer
from pingjia.data import Problem, read_examples
from pingjia.errors import ModelError
from pingjia.types import Example

settings.register_profile("data", deadline=None, derandomize=True, max_examples=200)
settings.load_profile("data")

Read = Callable[..., tuple[list[Example], list[Problem], list[Problem]]]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """write(rows or text or bytes, name="data.jsonl"): rows become JSON Lines."""

    def write(content: list[Any] | str | bytes, name: str = "data.jsonl") -> Path:
        if isinstance(content, list):
            content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


@pytest.fixture
def read() -> Read:
    """read(files...) -> examples, problems, notes."""

    def read(*files: Path | str, **options: Any) -> tuple[list[Example], list[Problem], list[Problem]]:
        problems: list[Problem] = []
        notes: list[Problem] = []
        examples = list(read_examples(files, on_problem=problems.append, on_note=notes.append, **options))
        return examples, problems, notes

    return read


@pytest.fixture(scope="session")
def smollm2() -> Tokenizer:
    try:
        return load_tokenizer("smollm2")
    except ModelError as e:
        pytest.skip(f"the packaged model is needed: {e}")


@pytest.fixture(scope="session")
def shared() -> Path:
    folder = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"public data files are needed in {folder}")
    return folder
