"""Published ChatGLM checkpoints, as they are published -> networks.

Here: finding the shards, naming what is missing, left over or mis-shaped before anything is loaded, and filling a
network tensor by tensor, packing float weights on the way when asked to, so that memory stays near the size of the
result. Not here: choosing the loader for a directory (`loader.py`), the networks (`chatglm.py`, `chatglm2.py`).

Files are read as plain tensors only: safetensors, or pickles by torch's `weights_only` reader, which runs no code.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from pingjia.errors import ModelError
from pingjia.models.chatglm import ChatGLMForCausalLM
from pingjia.models.chatglm2 import ChatGLM2ForCausalLM
from pingjia.models.chatglm_config import ChatGLM2Config, ChatGLMConfig
from pingjia.models.device import pick_dtype
from pingjia.quant.bnb import BnbFormat, is_packed_by_bnb, replace_linears
from pingjia.quant.convert import pack_tables
from pingjia.quant.formats import PackedLinear
from pingjia.quant.rows import dequantize_rows, quantize_rows, row_blocks, stored_columns

_NETWORKS: dict[type, type[PreTrainedModel]] = {
    ChatGLMConfig: ChatGLMForCausalLM,
    ChatGLM2Config: ChatGLM2ForCausalLM,
}
_COMPUTED = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq")  # stored, but the published code never uses them
_OPEN_BYTES = 2**26  # a shard is mapped anew after this much, so that its pages do not add up to a second copy


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies and what it is, known without reading it."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


def load_chatglm(
    directory: Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    bits: int | BnbFormat | None = None,
) -> PreTrainedModel:
    """Load any ChatGLM generation from `directory`, eval mode.

    dtype: what it computes in; "auto" is float32 on a CPU, else the checkpoint's own. bits: None leaves the linears as
    they are stored (a published INT4 or INT8 checkpoint stays packed); 4 or 8 packs float ones while reading, a
    BnbFormat has bitsandbytes do it. With packed linears and float32, embeddings and head keep their stored half
    precision and are widened row by row.

    Raises ModelError, one line, for a checkpoint that is incomplete, too large, mis-shaped, truncated, of an unknown
    generation, or that holds code.
    """
    device = torch.device(device)
    config = read_chatglm_config(directory)
    stored = survey(shard_files(directory))
    _check(directory, config, stored)
    dtype = pick_dtype(dtype, device, config.dtype if isinstance(config.dtype, torch.dtype) else None)
    form = bits if isinstance(bits, BnbFormat) else None
    model = _empty_network(config, _wanted_bits(directory, config, bits))
    _Filler(model, config, dtype, device, form).fill(directory, stored)
    return model.eval()


def read_chatglm_config(directory: Path) -> ChatGLMConfig | ChatGLM2Config:
    """The checked config of a directory, of whichever generation it is. Raises ModelError."""
    file = directory / "config.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ModelError(f"{file}: cannot be read: {e}") from None
    model_type = raw.get("model_type") if isinstance(raw, dict) else None
    if model_type != "chatglm":
        raise ModelError(f"{file}: model_type is {model_type!r}, not 'chatglm'")
    try:
        return ChatGLMConfig.from_dict(raw)
    except ModelError as e:
        raise ModelError(f"{directory}: {e}") from None
    except (TypeError, ValueError) as e:  # transformers' own checks
        raise ModelError(f"{file}: {_first_line(e)}") from None


# ---- files


def shard_files(directory: Path) -> list[Path]:
    """The files that hold the weights: safetensors before pickles, one file or those of an index. Raises ModelError."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = directory / f"{name}.index.json"
        if index.is_file():
            return _indexed(index)
        if (directory / name).is_file():
            return [directory / name]
    raise ModelError(
        f"{directory}: no weights: neither model.safetensors nor pytorch_model.bin, nor an index of shards"
    )


def _indexed(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise ModelError(f"{index}: not an index of shards: {type(e).__name__}: {e}") from None
    outside = [n for n in names if not isinstance(n, str) or Path(n).name != n]
    if outside:
        raise ModelError(f"{index}: names a file outside its directory: {outside[0]!r}")
    files = [index.parent / n for n in names]
    absent = [f.name for f in files if not f.is_file()]
    if absent:
        raise ModelError(f"{index}: {len(absent)} of {len(files)} shards are not there: {', '.join(absent[:3])}")
    return files


def survey(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Name -> shape, dtype and file of every tensor, without reading any. Raises ModelError for a broken file."""
    found: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in _headers(file):
            if name in found:
                raise ModelError(f"{file}: {name} lies here and again in {found[name].file.name}")
            found[name] = tensor
    return found


def _headers(file: Path) -> Iterator[tuple[str, StoredTensor]]:
    with _open(file) as shard:
        for name, tensor in shard.items():
            yield name, StoredTensor(file, tuple(tensor.shape), tensor.dtype)


def read_tensors(stored: Mapping[str, StoredTensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every named tensor, file by file, as views on mapped files: copy what you keep before asking for the next."""
    for file, names in _batches(stored):
        with _open(file) as shard:
            for name in names:
                yield name, shard[name]


def _batches(stored: Mapping[str, StoredTensor]) -> Iterator[tuple[Path, list[str]]]:
    """Names file by file, a large file in several lots of about `_OPEN_BYTES`."""
    for file in sorted({tensor.file for tensor in stored.values()}):
        names, size, limit = list[str](), 0, _OPEN_BYTES if _can_be_mapped(file) else float("inf")
        for name in (n for n, tensor in stored.items() if tensor.file == file):
            names.append(name)
            size += stored[name].num_bytes
            if size >= limit:
                yield file, names
                names, size = [], 0
        if names:
            yield file, names


@contextlib.contextmanager
def _open(file: Path) -> Iterator[Mapping[str, torch.Tensor]]:
    """The tensors of one shard, mapped, not read. What cannot be read is a ModelError."""
    try:
        if _starts(file, b"version https://git-lfs"):
            raise OSError("this is a Git LFS pointer, not the weights; run: git lfs pull")
        shard = _Safetensors(file) if file.suffix == ".safetensors" else _unpickle(file)
        yield shard
    except pickle.UnpicklingError as e:
        raise ModelError(f"{file}: holds more than tensors; refused, and none of it was run: {_reason(e)}") from None
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError, KeyError) as e:
        raise ModelError(
            f"{file}: cannot be read, perhaps truncated ({file.stat().st_size} bytes): {_reason(e)}"
        ) from None


class _Safetensors(Mapping[str, torch.Tensor]):
    def __init__(self, file: Path) -> None:
        self._file = safe_open(file, framework="pt")

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.keys())

    def __len__(self) -> int:
        return len(self._file.keys())


def _unpickle(file: Path) -> dict[str, torch.Tensor]:
    zipped = _can_be_mapped(file)
    if not zipped and _starts(file, b"PK\x03\x04"):
        raise EOFError("the end of the archive is missing")
    tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise pickle.UnpicklingError("not a dict of tensors")
    return tensors


def _can_be_mapped(file: Path) -> bool:
    """Whether opening it costs nothing; pickles of before torch 1.6 are read as a whole."""
    return file.suffix == ".safetensors" or zipfile.is_zipfile(file)


def _starts(file: Path, magic: bytes) -> bool:
    with file.open("rb") as f:
        return f.read(len(magic)) == magic


def _reason(error: BaseException) -> str:
    return _first_line(error).removeprefix("Weights only load failed. ")[:160]


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


# ---- what must be there


def expected_tensors(config: ChatGLMConfig | ChatGLM2Config) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Name -> (shape, is int8) of every tensor a checkpoint with this config must hold."""
    model = _empty_network(config, config.quantization_bit or 0)
    wanted = {n: (tuple(t.shape), t.dtype == torch.int8) for n, t in model.state_dict().items()}
    if config.quantization_embeddings:
        for name in _table_names(model):
            (rows, columns), _ = wanted[name]
            wanted[name] = ((rows, stored_columns(columns, config.quantization_bit or 8)), True)
            wanted[f"{name}_scale"] = ((rows,), False)
    return wanted


def _check(directory: Path, config: ChatGLMConfig | ChatGLM2Config, stored: dict[str, StoredTensor]) -> None:
    """Refuse by name what is missing, left over, mis-shaped or of the wrong kind; drop what is never used."""
    for name in [n for n in stored if n.endswith(_COMPUTED)]:
        del stored[name]
    wanted = expected_tensors(config)
    heads = ("lm_head.", "transformer.output_layer.")
    optional = {n for n in wanted if config.tie_word_embeddings and n.startswith(heads)}
    _refuse(directory, config, "missing", [n for n in wanted if n not in stored and n not in optional])
    _refuse(directory, config, "left over", [n for n in stored if n not in wanted])
    shapes = [
        f"{n} {list(stored[n].shape)} instead of {list(wanted[n][0])}"
        for n in stored
        if stored[n].shape != wanted[n][0]
    ]
    _refuse(directory, config, "mis-shaped", shapes)
    kinds = [
        f"{n} {str(stored[n].dtype).removeprefix('torch.')}"
        for n in stored
        if (stored[n].dtype == torch.int8) != wanted[n][1] or not (wanted[n][1] or stored[n].dtype.is_floating_point)
    ]
    _refuse(directory, config, f"not of the kind quantization_bit {config.quantization_bit or 0} means", kinds)


def _refuse(directory: Path, config: ChatGLMConfig | ChatGLM2Config, what: str, names: list[str]) -> None:
    if not names:
        return
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    raise ModelError(
        f"{directory}: {len(names)} tensors are {what} for a {type(config).__name__.removesuffix('Config')} of "
        f"{config.num_layers} layers, hidden size {config.hidden_size}: {', '.join(sorted(names)[:3])}{more}"
    )


def _wanted_bits(directory: Path, config: ChatGLMConfig | ChatGLM2Config, bits: int | BnbFormat | None) -> int:
    """Bits of our own formats; 0: linears begin as floats."""
    stored = config.quantization_bit or 0
    if isinstance(bits, BnbFormat):
        if stored:
            raise ModelError(
                f"{directory}: stored in {stored} bits; bitsandbytes packs floats: use the float checkpoint"
            )
        return 0
    if bits not in (None, 4, 8):
        raise ModelError(f"bits={bits}: choose 4 or 8, or leave it out")
    if stored and bits not in (None, stored):
        raise ModelError(f"{directory}: stored in {stored} bits; it cannot become {bits}: use the float checkpoint")
    return bits or stored


# ---- filling


def _empty_network(config: ChatGLMConfig | ChatGLM2Config, bits: int) -> PreTrainedModel:
    """The network without any weight in memory."""
    own = type(config).from_dict(config.to_dict())
    own.quantization_bit, own.quantization_embeddings = bits, False
    with torch.device("meta"):
        return _NETWORKS[type(own)](own)


def _table_names(model: PreTrainedModel) -> tuple[str, str]:
    """Names of the embedding table and of the head's, which may be one tensor."""
    names = {id(m): n for n, m in model.named_modules(remove_duplicate=False)}
    tables = model.get_input_embeddings(), model.get_output_embeddings()
    return f"{names[id(tables[0])]}.weight", f"{names[id(tables[1])]}.weight"


class _Filler:
    """Puts stored tensors into an empty network, each converted alone."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: ChatGLMConfig | ChatGLM2Config,
        dtype: torch.dtype,
        device: torch.device,
        form: BnbFormat | None = None,
    ) -> None:
        self.model, self.config, self.dtype, self.device, self.form = model, config, dtype, device, form
        self.embedding, self.head = _table_names(model)
        packed = bool(model.config.quantization_bit) or form is not None
        self.keep_half = packed and dtype == torch.float32

    def fill(self, directory: Path, stored: dict[str, StoredTensor]) -> None:
        """Tables first: copying one is the moment that needs most memory beside the network itself."""
        tables = {n: t for n, t in stored.items() if n.removesuffix("_scale") in (self.embedding, self.head)}
        if self.config.quantization_embeddings and self.model.config.tie_word_embeddings:
            self._pack_tables(directory, tables)
        else:
            self._put_tables(directory, tables)
        for name, tensor in read_tensors({n: t for n, t in stored.items() if n not in tables}):
            self._put(name, tensor)

    def _pack_tables(self, directory: Path, tables: Mapping[str, StoredTensor]) -> None:
        """Tables of a "-qe" checkpoint stay as they are stored."""
        parts = {n: t.to(self.device, copy=True) for n, t in read_tensors(tables)}
        weight, scale = parts[self.embedding], parts[f"{self.embedding}_scale"]
        head = {self.head: weight, f"{self.head}_scale": scale}
        if any(n in parts and not torch.equal(parts[n], tensor) for n, tensor in head.items()):
            raise self._untied(directory)
        pack_tables(self.model, weight, scale.float(), self.config.quantization_bit or 8)

    def _put_tables(self, directory: Path, tables: Mapping[str, StoredTensor]) -> None:
        self._put_table(self.embedding, self._table(self.embedding, tables))
        if not self.model.config.tie_word_embeddings:
            self._put_table(self.head, self._table(self.head, tables))
        else:
            self._tie(directory, tables)

    def _put(self, name: str, tensor: torch.Tensor) -> None:
        path, _, kind = name.rpartition(".")
        module = self.model.get_submodule(path)
        if isinstance(module, PackedLinear) and kind == "weight" and tensor.dtype != torch.int8:
            packed, scale = quantize_rows(tensor, module.bits)
            module.weight = nn.Parameter(packed.to(self.device), requires_grad=False)
            module.weight_scale = scale.to(self.device)
        elif kind == "weight_scale":
            module.weight_scale = tensor.to(self.device, torch.float32, copy=True)
        else:
            dtype = tensor.dtype if tensor.dtype == torch.int8 else self.dtype
            frozen = isinstance(module, PackedLinear) or is_packed_by_bnb(module)
            setattr(module, kind, nn.Parameter(tensor.to(self.device, dtype, copy=True), requires_grad=not frozen))
            if self.form is not None and kind == "weight" and isinstance(module, nn.Linear):
                replace_linears(self.model, [path], self.form, self.device)

    def _table(self, name: str, tables: Mapping[str, StoredTensor]) -> torch.Tensor:
        """A copy of an embedding table or head, in the dtype it is kept in."""
        own = {n: t for n, t in tables.items() if n.removesuffix("_scale") == name}
        if len(own) > 1:
            return self._dequantized(name, own).to(self.device)
        ((_, table),) = read_tensors(own)
        return table.to(self.device, self._table_dtype(table.dtype), copy=True)

    def _dequantized(self, name: str, own: Mapping[str, StoredTensor]) -> torch.Tensor:
        """A quantised table ("-qe" checkpoints) as fp16, or as what the network computes in."""
        parts = {n: t.clone() for n, t in read_tensors(own)}
        bits = self.config.quantization_bit or 8
        return dequantize_rows(parts[name], parts[f"{name}_scale"], bits, self._table_dtype(torch.float16))

    def _table_dtype(self, stored: torch.dtype) -> torch.dtype:
        return stored if self.keep_half and stored.itemsize == 2 else self.dtype

    def _put_table(self, name: str, table: torch.Tensor) -> None:
        parameter = nn.Parameter(table, requires_grad=table.dtype == self.dtype)
        self.model.get_submodule(name.removesuffix(".weight")).weight = parameter

    def _tie(self, directory: Path, tables: Mapping[str, StoredTensor]) -> None:
        if self.head in tables:
            self._check_tied(directory, tables)
        self.model.get_output_embeddings().weight = self.model.get_input_embeddings().weight

    def _check_tied(self, directory: Path, tables: Mapping[str, StoredTensor]) -> None:
        own = {n: t for n, t in tables.items() if n.removesuffix("_scale") == self.head}
        same = (
            self._equals_embedding(self._dequantized(self.head, own))
            if len(own) > 1
            else all(self._equals_embedding(view) for _, view in read_tensors(own))
        )
        if not same:
            raise self._untied(directory)

    def _untied(self, directory: Path) -> ModelError:
        return ModelError(
            f"{directory}: {self.head} differs from {self.embedding}, yet config.json ties them and the published "
            "code would drop it; say tie_word_embeddings: false to use the stored head"
        )

    def _equals_embedding(self, head: torch.Tensor) -> bool:
        table = self.model.get_input_embeddings().weight
        return all(torch.equal(table[rows], head[rows].to(table)) for rows in row_blocks(*head.shape))
