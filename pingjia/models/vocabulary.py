"""A model directory with more rows in its embedding and its head. Streams: needs the memory of the new rows only.

A new row is the mean of the rows of the tokens that spelt it so far. Published safetensors are copied byte by byte with
the new rows put in; other checkpoints (GGUF, pickles) are loaded and saved anew. Everything else of the model stays as
it is. Not here: which tokens (data/bpe.py), the tokenizer's files (chat/), training the rows (tune/).
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pingjia.errors import ModelError, StorageError
from pingjia.locate import locate_model
from pingjia.models.checkpoint import StoredTensor, read_tensors, shard_files, survey
from pingjia.models.loader import load_model, quiet, read_config
from pingjia.models.registry import require_supported

ADDED = "added_vocabulary"
"""Key of config.json: {"first", "count", "sha256"} of the rows that were added."""
_CHUNK = 2**24
_COPIED = ("generation_config.json", "LICENSE*", "NOTICE*")


@dataclass(frozen=True, slots=True)
class AddedRows:
    """The new tokens: `pieces[k]` are the base's ids that spell token `first + k`; `sha256` names them all."""

    first: int
    pieces: Sequence[Sequence[int]]
    sha256: str

    @property
    def stop(self) -> int:
        return self.first + len(self.pieces)

    def as_config(self) -> dict[str, Any]:
        return {"first": self.first, "count": len(self.pieces), "sha256": self.sha256}


@dataclass(frozen=True, slots=True)
class Grown:
    """What became of the weights."""

    num_rows_before: int
    num_rows: int
    is_tied: bool
    stored_bytes: int


def added_tokens(config: Any) -> list[int]:
    """Ids of the tokens that were added to this model's vocabulary; empty for a model as it was published."""
    added = getattr(config, ADDED, None)
    return list(range(added["first"], added["first"] + added["count"])) if added else []


def extend_model(base: str | Path, out: Path, rows: AddedRows) -> Grown:
    """Write `base` with the new rows into the existing directory `out`: config.json and safetensors.

    Rows that the base keeps in reserve behind its vocabulary are used first. Raises ModelError for a base whose weights
    cannot be extended; OSError when the disk refuses.
    """
    location = locate_model(base)
    if location.is_dir():
        model_type = read_config(location)["model_type"]
        require_supported(model_type)
        if model_type == "chatglm":
            raise ModelError(f"{location}: the vocabulary of chatglm is not extended: new tokens have no place in it")
        if all(file.suffix == ".safetensors" for file in shard_files(location)):
            return _extend_files(location, out, rows)
    return _extend_loaded(location, out, rows)


def mean_rows(table_VH: torch.Tensor, pieces: Sequence[Sequence[int]]) -> torch.Tensor:
    """[len(pieces), H] in the table's dtype: for each new token the mean of its pieces' rows, taken in float32."""
    means = [table_VH[list(ids)].float().mean(0) for ids in pieces]
    return torch.stack(means).to(table_VH.dtype)


def _require_room(base: Path, num_rows: int, rows: AddedRows) -> None:
    if num_rows < rows.first:
        raise ModelError(
            f"{base}: its embedding has {num_rows:,} rows, but its tokenizer counts {rows.first:,} tokens; these files "
            "do not belong together"
        )


# ---- checkpoints that are loaded


def _extend_loaded(location: Path, out: Path, rows: AddedRows) -> Grown:
    model = load_model(location, dtype=_stored_dtype(location))
    before = _tables(model)[0].shape[0]
    _require_room(location, before, rows)
    means = [mean_rows(table_VH, rows.pieces) for table_VH in _tables(model)]
    model.resize_token_embeddings(max(before, rows.stop), mean_resizing=False)
    for table_VH, mean in zip(_tables(model), means, strict=True):
        table_VH[rows.first : rows.stop] = mean
    setattr(model.config, ADDED, rows.as_config())
    _save(model, out)
    return Grown(before, max(before, rows.stop), len(means) == 1, _size(out))


def _save(model: PreTrainedModel, out: Path) -> None:
    try:
        with quiet():
            model.save_pretrained(out)
    except SafetensorError as e:  # what the library makes of a disk that refuses
        raise StorageError(f"the model could not be written: {e}; make room and run the same command again") from None


def _stored_dtype(location: Path) -> torch.dtype:
    """What is stored, so that saving neither rounds nor inflates; GGUF is dequantised to float32."""
    stored = None if location.is_file() else AutoConfig.from_pretrained(location, local_files_only=True).dtype
    return stored if isinstance(stored, torch.dtype) else torch.float32


def _tables(model: PreTrainedModel) -> list[torch.Tensor]:
    """The weights [V, H] of the embedding, and of the head unless it is the same table."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return [embedding.data] if head is embedding else [embedding.data, head.data]


# ---- safetensors, byte by byte


def _extend_files(directory: Path, out: Path, rows: AddedRows) -> Grown:
    files = shard_files(directory)
    stored = survey(files)
    is_tied, tables = _stored_tables(directory, stored)
    before = min(stored[name].shape[0] for name in tables)
    _require_room(directory, before, rows)
    added_bytes = sum(_num_new_bytes(stored[name], rows) for name in tables)
    _require_space(out, sum(file.stat().st_size for file in files) + added_bytes)
    new = {name: mean_rows(table, rows.pieces) for name, table in read_tensors({n: stored[n] for n in tables})}
    for file in files:
        here = {name: row for name, row in new.items() if stored[name].file == file}
        _copy_grown(file, out / file.name, here, rows.first) if here else shutil.copyfile(file, out / file.name)
    _write_index(directory, out, added_bytes)
    _write_config(directory, out, max(before, rows.stop), rows)
    for pattern in _COPIED:
        for file in directory.glob(pattern):
            shutil.copyfile(file, out / file.name)
    return Grown(before, max(before, rows.stop), is_tied, _size(out))


def _stored_tables(directory: Path, stored: Mapping[str, StoredTensor]) -> tuple[bool, list[str]]:
    """Whether head and embedding are one table, and the names of those that are stored."""
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    modules = {module: f"{name}.weight" for name, module in model.named_modules()}
    embedding, head = modules[model.get_input_embeddings()], modules[model.get_output_embeddings()]
    absent = [n for n in (embedding, head) if n not in stored and not (n == head and config.tie_word_embeddings)]
    if absent:
        raise ModelError(f"{directory}: {absent[0]} is missing; without it the vocabulary cannot be extended")
    tables = [name for name in dict.fromkeys((embedding, head)) if name in stored]
    packed = next((n for n in tables if not stored[n].dtype.is_floating_point or stored[n].dtype.itemsize < 2), None)
    if packed:
        raise ModelError(f"{directory}: {packed} is stored as {stored[packed].dtype}; extend the float checkpoint")
    return bool(config.tie_word_embeddings), tables


def _require_space(out: Path, num_bytes: int) -> None:
    """Better known now than after an hour of copying."""
    free = shutil.disk_usage(out).free
    if num_bytes > free:
        raise StorageError(
            f"the extended model takes {num_bytes / 1e9:.1f} GB and {free / 1e9:.1f} GB are free where it would be "
            "written; make room or choose another --out"
        )


def _copy_grown(source: Path, target: Path, new: Mapping[str, torch.Tensor], first: int) -> None:
    """Copy a safetensors file; `new` rows of the named tensors go to `first` and on, over what stands there."""
    with open(source, "rb") as src, open(target, "wb") as dst:
        header, start = _read_header(src)
        tensors = {k: v for k, v in header.items() if k != "__metadata__"}
        order = sorted(tensors, key=lambda name: tensors[name]["data_offsets"][0])
        plans = {name: _Plan.of(tensors[name], new.get(name), first) for name in order}
        _write_header(dst, header, order, plans)
        for name in order:
            src.seek(start + tensors[name]["data_offsets"][0])
            _write_tensor(src, dst, plans[name])


@dataclass(frozen=True, slots=True)
class _Plan:
    """A tensor in the copy: `head` bytes as they were, `new` bytes in place of `skip` old ones, `tail` bytes."""

    shape: list[int]
    head: int
    new: bytes
    skip: int
    tail: int

    @classmethod
    def of(cls, entry: Mapping[str, Any], new_NH: torch.Tensor | None, first: int) -> _Plan:
        begin, end = entry["data_offsets"]
        if new_NH is None:
            return cls(entry["shape"], end - begin, b"", 0, 0)
        num_rows, width = entry["shape"]
        row_bytes = (end - begin) // num_rows
        stop = first + new_NH.shape[0]
        head, skip = first * row_bytes, (min(stop, num_rows) - first) * row_bytes
        data = new_NH.contiguous().view(torch.uint8).numpy().tobytes()
        return cls([max(stop, num_rows), width], head, data, skip, end - begin - head - skip)

    @property
    def num_bytes(self) -> int:
        return self.head + len(self.new) + self.tail


def _read_header(file: BinaryIO) -> tuple[dict[str, Any], int]:
    (size,) = struct.unpack("<Q", file.read(8))
    return json.loads(file.read(size)), 8 + size


def _write_header(file: BinaryIO, old: Mapping[str, Any], order: Sequence[str], plans: Mapping[str, _Plan]) -> None:
    header, at = {k: v for k, v in old.items() if k == "__metadata__"}, 0
    for name in order:
        end = at + plans[name].num_bytes
        header[name] = {"dtype": old[name]["dtype"], "shape": plans[name].shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8, as the format asks
    file.write(struct.pack("<Q", len(text)) + text)


def _write_tensor(src: BinaryIO, dst: BinaryIO, plan: _Plan) -> None:
    _copy(src, dst, plan.head)
    dst.write(plan.new)
    src.seek(plan.skip, 1)
    _copy(src, dst, plan.tail)


def _copy(src: BinaryIO, dst: BinaryIO, count: int) -> None:
    while count:
        chunk = src.read(min(count, _CHUNK))
        if not chunk:
            raise ModelError(f"{src.name}: ends {count} bytes too early; fetch it again")
        dst.write(chunk)
        count -= len(chunk)


def _num_new_bytes(table: StoredTensor, rows: AddedRows) -> int:
    return max(0, rows.stop - table.shape[0]) * table.shape[1] * table.dtype.itemsize


def _write_index(directory: Path, out: Path, num_new_bytes: int) -> None:
    file = directory / "model.safetensors.index.json"
    if file.is_file():
        index = json.loads(file.read_text(encoding="utf-8"))
        if "total_size" in index.get("metadata", {}):
            index["metadata"]["total_size"] += num_new_bytes
        (out / file.name).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_config(directory: Path, out: Path, num_rows: int, rows: AddedRows) -> None:
    config = {**read_config(directory), "vocab_size": num_rows, ADDED: rows.as_config()}
    (out / "config.json").write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _size(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.iterdir())
