"""Float tensors of a model -> shards of packed ones, one block in memory at a time.

For every block: put its weights into an empty network, run the calibration text through it to see what its linears are
fed, round them, write them, run the text through the rounded block, drop it. What is in memory is one block, its Gram
matrices, and the text's hidden states, whatever the number of blocks.

Not here: reading tensors (`source.py`), the arithmetic (`quant/`), the directory around the shards (`export/`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import nn

from pingjia.errors import ModelError
from pingjia.models.skeleton import block_paths, empty_network, fill, free, is_tied, table_names, tensor_names
from pingjia.models.source import Source
from pingjia.models.walk import Walk
from pingjia.quant.encode import PackedMatrix, Root, pack_matrix
from pingjia.quant.gram import Gram, watch
from pingjia.quant.group import group_size_for
from pingjia.quant.settings import QuantizeSettings
from pingjia.quant.shards import ShardWriter, read_shard

OnStep = Callable[[int, int, str], None]
"""(steps done, steps in all, what is done now)"""


@dataclass(frozen=True, slots=True)
class MatrixError:
    """How much one matrix's outputs changed on the calibration text (its weights, without calibration)."""

    name: str
    bits: int
    relative_error: float


class Compressor:
    """One run over one source. `rows`: token ids of the calibration text; unused by `rtn`.

    Raises ModelError, when it is made, for a tensor that is missing or a matrix that cannot be grouped: before hours
    are spent.
    """

    def __init__(self, source: Source, settings: QuantizeSettings, rows: Sequence[Sequence[int]]) -> None:
        settings.check()
        self.source, self.settings, self.rows = source, settings, rows
        self.model = empty_network(source.config)
        self.blocks = block_paths(self.model)
        self.embedding, self.head = table_names(self.model)
        self._errors: list[MatrixError] = []  # of the shard that is being made
        self._check()

    @property
    def num_shards(self) -> int:
        """One per block, and one for everything else."""
        return len(self.blocks) + 1

    @torch.inference_mode()
    def run(self, shards: ShardWriter, on_step: OnStep) -> None:
        """Write every shard that is not there yet. OSError when the disk refuses."""
        walk = self._start() if self.settings.method == "gptq" else None
        for number, block in enumerate(self.blocks, start=1):
            on_step(number - 1, self.num_shards, block)
            if not shards.is_done(number):
                self._write(shards, number, self._pack_block(block, walk))
            elif walk is not None:
                fill(self.model, _as_floats(read_shard(shards.file(number))))
            if walk is not None:
                walk.through(self.model.get_submodule(block))
            free(self.model, block)
        on_step(self.num_shards - 1, self.num_shards, "embedding and head")
        if not shards.is_done(self.num_shards):
            self._write(shards, self.num_shards, self._pack_rest(walk))
        on_step(self.num_shards, self.num_shards, "")

    def _write(self, shards: ShardWriter, number: int, tensors: dict[str, torch.Tensor]) -> None:
        shards.write(number, tensors, [asdict(e) for e in self._errors])
        self._errors = []

    def _check(self) -> None:
        if self.settings.layout == "published" and self.source.raw_config["model_type"] != "chatglm":
            raise ModelError(f"{self.source.name}: only ChatGLM has a published layout; leave --layout out")
        self.source.require(tensor_names(self.model), optional=self._optional())
        if self.settings.bits == 4 and self.settings.layout == "group":
            for path, linear in self._linears(self.blocks[0]).items():
                group_size_for(linear.in_features, self.settings.group_size, path)
        if self.settings.head_bits == 4:
            group_size_for(self.model.get_input_embeddings().embedding_dim, self.settings.group_size, self.embedding)

    def _optional(self) -> set[str]:
        return {f"{self.head}.weight"} if is_tied(self.model) else set()

    def _linears(self, block: str) -> dict[str, nn.Linear]:
        """Path -> linear of one block."""
        found = self.model.get_submodule(block).named_modules()
        return {f"{block}.{n}": m for n, m in found if isinstance(m, nn.Linear)}

    def _start(self) -> Walk:
        table = f"{self.embedding}.weight"
        fill(self.model, self.source.read([table]), keep=[table])
        walk = Walk(self.model, self.rows)
        free(self.model, self.embedding)
        return walk

    # ---- one block

    def _pack_block(self, block: str, walk: Walk | None) -> dict[str, torch.Tensor]:
        """Its tensors as they are stored. With a walk, the block itself is left with what they stand for."""
        stored = self.source.read(tensor_names(self.model, block))
        fill(self.model, stored)
        linears = self._linears(block)
        grams = self._watched(block, linears, walk)
        last: tuple[Gram | None, Root | None] = (None, None)
        for path, linear in linears.items():
            gram = grams.pop(path, None)
            if gram is not last[0]:  # q, k and v have one between them
                last = (gram, None if gram is None else Root.of(gram, self.settings, path))
            packed = self._packed(path, linear.weight, self.settings.bits, last[1])
            stored |= packed.named(path)
            if walk is not None:
                linear.weight = nn.Parameter(packed.dequantize(), requires_grad=False)
        return stored

    def _watched(self, block: str, linears: Mapping[str, nn.Linear], walk: Walk | None) -> dict[str, Gram]:
        if walk is None:
            return {}
        with watch(linears) as grams:
            walk.observe(self.model.get_submodule(block))
        return grams

    def _packed(self, path: str, weight: torch.Tensor, bits: int, root: Root | None) -> PackedMatrix:
        packed = pack_matrix(weight, bits, self.settings, root, path)
        self._errors.append(MatrixError(path, bits, packed.relative_error))
        return packed

    # ---- embedding, last norm, head

    def _pack_rest(self, walk: Walk | None) -> dict[str, torch.Tensor]:
        inside = tuple(f"{block}." for block in self.blocks)
        tables = {f"{self.embedding}.weight", f"{self.head}.weight"}
        names = [n for n in tensor_names(self.model) if not n.startswith(inside) and n not in tables]
        stored = self.source.read(names)
        root = self._head_root(stored, walk)
        tied = is_tied(self.model)
        packed = self._table(self.embedding, root if tied else None)
        return stored | packed | ({} if tied else self._table(self.head, root))

    def _table(self, path: str, root: Root | None) -> dict[str, torch.Tensor]:
        name = f"{path}.weight"
        weight = self.source.read([name])[name]
        self._require_tied(weight)
        if self.settings.head_bits == 16:
            return {name: weight.half() if weight.dtype == torch.float32 else weight}
        return self._packed(path, weight, self.settings.head_bits, root).named(path)

    def _require_tied(self, table: torch.Tensor) -> None:
        """A tied head that is stored too must be the embedding."""
        name = f"{self.head}.weight"
        if (
            is_tied(self.model)
            and name in self.source.shapes
            and not torch.equal(self.source.read([name])[name], table)
        ):
            raise ModelError(
                f"{self.source.name}: {name} differs from {self.embedding}.weight, yet config.json ties them; say "
                "tie_word_embeddings: false to use the stored head"
            )

    def _head_root(self, norms: Mapping[str, torch.Tensor], walk: Walk | None) -> Root | None:
        if walk is None or self.settings.head_bits == 16:
            return None
        fill(self.model, norms)
        gram = Gram(self.model.get_input_embeddings().embedding_dim)
        for x in walk.before_head():
            gram.add(x)
        return Root.of(gram, self.settings, self.head)


def matrix_errors(shards: ShardWriter) -> list[MatrixError]:
    """Of all matrices of a run that is done, in order."""
    return [MatrixError(**e) for number in range(1, shards.num_shards + 1) for e in shards.note(number)]


def estimated_bytes(source: Source, settings: QuantizeSettings) -> int:
    """About what the shards will take."""
    matrices = {n: math.prod(shape) for n, shape in source.shapes.items() if len(shape) > 1}
    tables = sum(sorted(matrices.values())[-1:])
    linears = sum(matrices.values()) - tables
    scales = 16 / settings.group_size if settings.layout == "group" else 0
    return int((linears * (settings.bits + scales) + tables * (settings.head_bits + scales)) / 8)


def _as_floats(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A shard's tensors with every packed matrix as floats."""
    scale = "_scale"
    floats = {n: t for n, t in tensors.items() if not n.endswith(scale) and n + scale not in tensors}
    packed = [n for n in tensors if n + scale in tensors]
    return floats | {n: PackedMatrix(tensors[n], tensors[n + scale]).dequantize() for n in packed}
