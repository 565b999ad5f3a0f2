"""A model -> a directory of it in few bits, with what it lost measured on the files before they get their name.

Work goes into `OUT.partial`, where an interrupted run's finished shards wait for the next one. `OUT` appears when all
is written and proven; a model that lost too much is left as `OUT.refused`. Not here: the arithmetic (`quant/`), the
walk over the blocks (`models/compress.py`, `models/compare.py`), reading text (`data/`).
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pingjia.errors import ModelError, StorageError
from pingjia.locate import locate_model
from pingjia.models.compare import Comparison, Tally, Text, compare
from pingjia.models.compress import Compressor, MatrixError, OnStep, estimated_bytes, matrix_errors
from pingjia.models.fingerprint import source_fingerprint
from pingjia.models.original import open_original
from pingjia.models.packed import PackedSource
from pingjia.models.source import Source
from pingjia.quant.settings import QUANT_METHOD, QuantizeSettings
from pingjia.quant.shards import ShardWriter
from pingjia.tune.products import fast_products

RECORD = "quantization.json"
_INPUTS = "inputs.json"
_COPIED = ("generation_config.json", "LICENSE*", "NOTICE*")


@dataclass(frozen=True, slots=True)
class QuantizeJob:
    """rows: calibration text as ids; held_out: text to measure the loss on, None: not measured.

    max_perplexity_loss: 0.02 refuses a model whose perplexity is over 2 % above the original's. notes: what else the
    record shall say (where model and text came from).
    """

    model: str
    out: Path
    settings: QuantizeSettings
    rows: Sequence[Sequence[int]] = ()
    held_out: Sequence[Text] | None = None
    max_perplexity_loss: float = 0.05
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class QuantizeReport:
    """`bits_per_weight` counts scales and everything that stayed in floats."""

    stored_bytes: int
    bits_per_weight: float
    errors: list[MatrixError]
    comparison: Comparison | None
    num_reused: int

    def as_dict(self) -> dict[str, Any]:
        report = {
            "stored_bytes": self.stored_bytes,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "matrices": [asdict(e) for e in self.errors],
        }
        return report | ({} if self.comparison is None else {"held_out": comparison_dict(self.comparison)})


def quantize(job: QuantizeJob, *, save_tokenizer: Callable[[Path], None], on_step: OnStep) -> QuantizeReport:
    """Write `job.out`. The same call again goes on where an interrupted one stopped.

    Raises ModelError for a source that cannot be packed, an `out` that exists, or a loss over the limit; StorageError
    when the disk refuses.
    """
    job.settings.check()
    if job.out.exists():
        raise ModelError(f"{job.out} exists; choose a new directory, nothing is overwritten")
    source = open_original(job.model)
    compressor = Compressor(source, job.settings, job.rows)
    try:
        folder = _partial_folder(job, source)
        shards = ShardWriter(folder, compressor.num_shards)
        num_reused = sum(shards.is_done(n) for n in range(1, shards.num_shards + 1))
        with fast_products():
            compressor.run(shards, on_step)
        stored_bytes = shards.finish()
        _write_around(folder, job, source, save_tokenizer)
        comparison = _proof(job, source, folder, on_step)
        report = QuantizeReport(
            stored_bytes, _bits_per_weight(source, stored_bytes), matrix_errors(shards), comparison, num_reused
        )
        _write_record(folder, job, source, report)
        _give_name(job, shards, report)
    except OSError as e:
        raise StorageError(_disk_message(job.out, e)) from None
    return report


# ---- the folder while it is being written


def partial_of(out: Path) -> Path:
    """Where the work of an unfinished run lies."""
    return out.with_name(f"{out.name}.partial")


def _partial_folder(job: QuantizeJob, source: Source) -> Path:
    """Made anew, unless it was begun with the same inputs."""
    folder, inputs = partial_of(job.out), _inputs(job, source)
    if (folder / _INPUTS).is_file() and (folder / _INPUTS).read_text(encoding="utf-8") == inputs:
        return folder
    if folder.exists() and not (folder / _INPUTS).is_file() and any(folder.iterdir()):
        raise ModelError(f"{folder} is in the way and is not of an unfinished run; move it or choose another --out")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _require_room(folder, estimated_bytes(source, job.settings))
    (folder / _INPUTS).write_text(inputs, encoding="utf-8")
    return folder


def _require_room(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        folder.rmdir()
        raise StorageError(
            f"{folder}: the packed model takes about {num_bytes / 1e9:.2f} GB and {free / 1e9:.2f} GB are free; "
            "make room"
        )


def _inputs(job: QuantizeJob, source: Source) -> str:
    """Everything that decides the bytes of a shard."""
    rows = hashlib.sha256(json.dumps([list(r) for r in job.rows]).encode()).hexdigest()
    parts = {
        "settings": job.settings.as_dict(),
        "rows": rows if job.settings.method == "gptq" else None,
        "config": source.raw_config,
        "fingerprint": source_fingerprint(source),
    }
    return json.dumps(parts, sort_keys=True, default=str)


def _write_around(folder: Path, job: QuantizeJob, source: Source, save_tokenizer: Callable[[Path], None]) -> None:
    """config.json, tokenizer, licences."""
    save_tokenizer(folder)
    config = {k: v for k, v in source.raw_config.items() if k != "quantization_config"}
    if job.settings.layout == "published":
        config["quantization_bit"] = job.settings.bits
    else:
        config["quantization_config"] = {"quant_method": QUANT_METHOD, "version": 1} | job.settings.as_dict()
    _write_json(folder / "config.json", config)
    location = locate_model(job.model)
    if location.is_dir():
        for file in (f for pattern in _COPIED for f in location.glob(pattern) if f.is_file()):
            shutil.copyfile(file, folder / file.name)


def _write_record(folder: Path, job: QuantizeJob, source: Source, report: QuantizeReport) -> None:
    notes = {"source": {"model": str(job.model)}} | dict(job.notes)
    notes["source"] |= {"fingerprint": source_fingerprint(source)}
    record = notes | {"settings": job.settings.as_dict()} | report.as_dict()
    _write_json(folder / RECORD, record)


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, ensure_ascii=False, indent=1, default=str) + "\n", encoding="utf-8")


# ---- proof


def _proof(job: QuantizeJob, source: Source, folder: Path, on_step: OnStep) -> Comparison | None:
    if job.held_out is None:
        return None
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return compare(source, PackedSource(folder, config), job.held_out, on_step)


def _give_name(job: QuantizeJob, shards: ShardWriter, report: QuantizeReport) -> None:
    folder = shards.folder
    total = report.comparison.total if report.comparison else None
    refused = total is not None and not total.perplexity_loss <= job.max_perplexity_loss
    shards.clean()
    (folder / _INPUTS).unlink()
    if not refused or total is None:
        os.replace(folder, job.out)
        return
    aside = job.out.with_name(f"{job.out.name}.refused")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(folder, aside)
    raise ModelError(
        f"perplexity {total.perplexity_original:.3f} became {total.perplexity_packed:.3f}: "
        f"{total.perplexity_loss:+.2%}, over the {job.max_perplexity_loss:.2%} allowed; left in {aside}. Try a smaller "
        "--group-size, more calibration text, or --bits 8; --max-perplexity-loss moves the limit"
    )


def comparison_dict(comparison: Comparison) -> dict[str, Any]:
    """The figures of a comparison, for a record or a program."""
    labels = {label: _figures(tally) for label, tally in comparison.by_label.items()}
    blocks = [{"block": path, "relative_error": round(error, 6)} for path, error in comparison.blocks]
    return _figures(comparison.total) | {"by_language": labels, "blocks": blocks}


def _figures(tally: Tally) -> dict[str, float]:
    return {
        "num_tokens": tally.num_tokens,
        "perplexity_original": round(tally.perplexity_original, 5),
        "perplexity_packed": round(tally.perplexity_packed, 5),
        "perplexity_loss": round(tally.perplexity_loss, 6),
        "mean_kl": round(tally.mean_kl, 6),
        "top1_agreement": round(tally.top1_agreement, 5),
    }


def _bits_per_weight(source: Source, stored_bytes: int) -> float:
    shapes = dict(source.shapes)
    if getattr(source.config, "tie_word_embeddings", False):
        shapes = {n: s for n, s in shapes.items() if not n.startswith(("lm_head.", "transformer.output_layer."))}
    return 8 * stored_bytes / sum(map(math.prod, shapes.values()))


def _disk_message(out: Path, error: OSError) -> str:
    reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else (error.strerror or str(error))
    return (
        f"{out} was not written: {reason}. Finished shards wait in {partial_of(out)}: make room, run the same command"
    )
