"""What stands beside a learnt vocabulary: a record of every new token, a note for people, and a recipe."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from pingjia.chat.extend import Extension
from pingjia.data.bpe import Fit
from pingjia.errors import DataError, StorageError

RECORD_FILE, README_FILE, RECIPE_FILE = "vocabulary.json", "README.md", "recipe.yaml"

_README = """# {name}

`{base}` with {count:,} Chinese tokens more ({first:,} to {last:,}), learnt by `pingjia data tokenizer` from {files}.

| | characters | tokens before | tokens after | characters per token |
|---|---|---|---|---|
{table}

The new tokens are BPE merges behind those of the base: a text in which none of them occurs has the ids it had. The row
of each in the embedding{head} is the mean of the rows of the tokens that spelt it. **These rows are a start, not a
result: they must be trained.** `pingjia train {recipe}` does (`train_new_tokens: true`).

Everything else, and the licence, is the base's. `{record}` lists every new token and its pieces.
"""

_RECIPE_HEAD = """# Trains the new tokens of {name} together with a LoRA adapter: pingjia train {file}
# Their rows in the embedding begin as means of the pieces that spelt them and must learn what the tokens mean.
# Much text helps more than many epochs: put all the Chinese question-answer files you have into dataset.

"""


@dataclass(frozen=True, slots=True)
class Account:
    """How a base was extended. `held_out` names the files or the share that `unseen` was measured on."""

    base: str
    files: tuple[str, ...]
    eval_files: tuple[str, ...]
    min_frequency: int
    num_rows: int
    num_bad_rows: int
    corpus: Fit
    unseen: Fit

    @property
    def fits(self) -> tuple[tuple[str, Fit], ...]:
        return ("corpus", self.corpus), ("held out", self.unseen)


@contextmanager
def whole_directory(out: Path) -> Iterator[Path]:
    """A directory that gets the name `out` only when the block ends well; on any error nothing is left of it.

    Raises DataError when `out` exists, StorageError when the disk refuses.
    """
    if out.exists():
        raise DataError(f"{out} exists; choose a new directory, nothing is overwritten")
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        os.replace(partial, out)
    except OSError as e:
        raise StorageError(f"{out}: not written: {e.strerror or e}; make room and run the same command again") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_notes(folder: Path, out: Path, extension: Extension, account: Account, *, is_tied: bool) -> None:
    """vocabulary.json, README.md and recipe.yaml into `folder`, which will be called `out`."""
    (folder / RECORD_FILE).write_text(_record(extension, account), encoding="utf-8")
    (folder / README_FILE).write_text(_readme(out, extension, account, is_tied), encoding="utf-8")
    (folder / RECIPE_FILE).write_text(recipe_text(out, account.files, account.eval_files), encoding="utf-8")


def _record(extension: Extension, account: Account) -> str:
    tokens = [{"id": t.id, "text": t.text, "pieces": t.pieces} for t in extension.tokens]
    head = json.dumps({"format": 1, **asdict(account), "sha256": extension.digest}, ensure_ascii=False, indent=1)
    lines = ",\n".join("  " + json.dumps(token, ensure_ascii=False) for token in tokens)
    return f'{head[:-2]},\n "tokens": [\n{lines}\n ]\n}}\n'


def _readme(out: Path, extension: Extension, account: Account, is_tied: bool) -> str:
    tokens = extension.tokens
    return _README.format(
        name=out.name,
        base=account.base,
        count=len(tokens),
        first=tokens[0].id,
        last=tokens[-1].id,
        files=", ".join(f"`{file}`" for file in account.files),
        table="\n".join(_row(name, fit) for name, fit in account.fits if fit.num_texts),
        head="" if is_tied else " and in the head",
        recipe=out / RECIPE_FILE,
        record=RECORD_FILE,
    )


def _row(name: str, fit: Fit) -> str:
    ratio = f"{fit.before:.2f} -> {fit.after:.2f}" if fit.before and fit.after else "-"
    return f"| {name} | {fit.num_characters:,} | {fit.num_before:,} | {fit.num_after:,} | {ratio} |"


def recipe_text(model: Path, files: Sequence[str], eval_files: Sequence[str]) -> str:
    """A complete recipe that trains the new tokens of `model` on the files they were learnt from."""
    keys: dict[str, Any] = {
        "model_name_or_path": str(model),
        "dtype": "auto",
        "dataset": list(files),
        "eval_dataset": list(eval_files),
        "cutoff_len": 1024,
        "output_dir": f"runs/{model.name}",
        "train_new_tokens": True,
        "lora_rank": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.0,
        "lora_target": "all",
        "learning_rate": 1e-3,
        "lr_scheduler_type": "linear",
        "warmup_ratio": 0.03,
        "num_train_epochs": 3,
        "per_device_train_batch_size": 8,
        "save_steps": 50,
        "seed": 42,
    }
    body = yaml.safe_dump(keys, allow_unicode=True, sort_keys=False)
    return _RECIPE_HEAD.format(name=model.name, file=model / RECIPE_FILE) + body
