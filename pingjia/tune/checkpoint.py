"""What a run leaves on disk: checkpoints to go on from, and the finished adapter. Every write is all or nothing.

checkpoint-000050/ holds what the run trains (an adapter in PEFT's format, or the network's own weights: trained.py),
`trainer_state.pt` (optimizer, random state, step; read with weights_only) and the log of the updates made so far. A
checkpoint appears under its name only when it is whole, so a kill -9 leaves none half-written.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

from pingjia.errors import StorageError, TrainingError
from pingjia.models.device import set_rng_state
from pingjia.tune.guards import require_nonzero_adapter
from pingjia.tune.pissa import as_lora

if TYPE_CHECKING:
    from pingjia.tune.trained import Trained

ADAPTER_FILE = "adapter_model.safetensors"
STATE_FILE = "trainer_state.pt"
LOG_FILE = "trainer_log.jsonl"
ABOUT_FILE = "pingjia.json"
_ADAPTER_FILES = (ABOUT_FILE, "adapter_config.json", ADAPTER_FILE)
_NAME = re.compile(r"checkpoint-(\d{6,})$")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A whole checkpoint on disk; `step` updates had been made when it was written."""

    path: Path
    step: int


def checkpoints(output_dir: Path) -> list[Checkpoint]:
    """Whole checkpoints, oldest first."""
    found = []
    for path in output_dir.glob("checkpoint-*"):
        match = _NAME.search(path.name)
        if match and (path / STATE_FILE).is_file():
            found.append(Checkpoint(path, int(match[1])))
    return sorted(found, key=lambda c: c.step)


def step_of(checkpoint: Path | None) -> int:
    """Updates that a checkpoint holds, by its name; 0 for none."""
    match = _NAME.search(checkpoint.name) if checkpoint else None
    return int(match[1]) if match else 0


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint in memory. `progress`: where the run stood, as `loop.Progress` wrote it."""

    path: Path
    progress: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, Any] | None
    rng: Sequence[Mapping[str, Any]]


def save_checkpoint(
    output_dir: Path,
    progress: Mapping[str, Any],
    trained: Trained,
    optimizer: Mapping[str, Any] | None,
    rng: Sequence[Mapping[str, Any]],
    *,
    fingerprint: str,
    log: str,
    keep: int,
) -> Checkpoint:
    """Write checkpoint-<step>, then delete all but the newest `keep`. StorageError leaves the earlier ones alone.

    `optimizer`: its state, or None between two phases: the next one begins with its own. `rng`: the random state of
    every process.
    """
    step = progress["step"]
    target = output_dir / f"checkpoint-{step:06d}"
    state = {"progress": dict(progress), "fingerprint": fingerprint, "optimizer": optimizer, "rng": list(rng)}
    with new_directory(target, trained.checkpoint_bytes if optimizer else trained.weight_bytes) as folder:
        trained.write(folder)
        write_bytes(folder / LOG_FILE, log.encode())
        write_state(folder / STATE_FILE, state)
    for old in checkpoints(output_dir)[:-keep]:
        shutil.rmtree(old.path)
    return Checkpoint(target, step)


def read_checkpoint(checkpoint: Path, weights_file: str, *, fingerprint: str) -> Saved:
    """Read a checkpoint whole. TrainingError when it is damaged, or of a run with other data, base or settings."""
    try:
        state = torch.load(checkpoint / STATE_FILE, map_location="cpu", weights_only=True)
        same = state.get("fingerprint") == fingerprint and "progress" in state
        tensors = safetensors.torch.load_file(checkpoint / weights_file) if same else {}
    except FileNotFoundError as e:
        raise TrainingError(f"{checkpoint}: not a checkpoint: {Path(str(e.filename or '')).name} is missing") from None
    except Exception as e:  # pickle, zip and safetensors each have their own error types
        raise TrainingError(
            f"{checkpoint}: damaged: {str(e).splitlines()[0]}; delete it to go on from the one before"
        ) from None
    if not same:
        raise TrainingError(
            f"{checkpoint} belongs to a run with other data, base model or settings, so going on would mix two runs; "
            "choose another output_dir, or resume_from_checkpoint=false to start over here"
        )
    return Saved(checkpoint, state["progress"], tensors, state["optimizer"], state["rng"])


def load_tensors(model: PeftModel, tensors: Mapping[str, torch.Tensor], where: Path) -> None:
    """Put the tensors of a saved adapter into the model. TrainingError when they are not all its own."""
    result = set_peft_model_state_dict(model, dict(tensors))
    if result.unexpected_keys:
        raise TrainingError(
            f"{where}: adapter tensors of another shape of run, for example {result.unexpected_keys[0]}"
        )


def restore_optimizer(saved: Saved, optimizer: torch.optim.Optimizer, rank: int = 0) -> None:
    """Optimizer and random state of a checkpoint. The random state last: building things draws from it.

    A process that was not there when it was written goes on with the state it was given by its seed.
    """
    if saved.optimizer is not None:
        optimizer.load_state_dict(dict(saved.optimizer))
    if rank < len(saved.rng):
        set_rng_state(saved.rng[rank])


# ---- the best weights so far, where a run watches for them


def save_best(output_dir: Path, step: int, trained: Trained) -> None:
    """Write best-<step>. Older ones stay until `prune_best`: a checkpoint may still point at them."""
    with new_directory(best_directory(output_dir, step), trained.weight_bytes) as folder:
        trained.write(folder)


def load_best(output_dir: Path, step: int, weights_file: str) -> dict[str, torch.Tensor]:
    """What was trained, after update `step`. TrainingError when it is not there any more."""
    file = best_directory(output_dir, step) / weights_file
    try:
        return safetensors.torch.load_file(file)
    except Exception as e:
        raise TrainingError(f"{file}: the best weights so far cannot be read ({e}); start over") from None


def prune_best(output_dir: Path, current: int | None) -> None:
    """Delete best-<step> directories that neither the run (`current`) nor a checkpoint can go back to.

    A checkpoint goes back to the newest that is not younger than itself.
    """
    steps = sorted(int(folder.name.removeprefix("best-")) for folder in output_dir.glob("best-*"))
    needed = {current} | {max((s for s in steps if s <= c.step), default=None) for c in checkpoints(output_dir)}
    for step in steps:
        if step not in needed:
            shutil.rmtree(best_directory(output_dir, step), ignore_errors=True)


def best_directory(output_dir: Path, step: int) -> Path:
    return output_dir / f"best-{step:06d}"


def save_adapter(
    output_dir: Path, model: PeftModel, about: Mapping[str, Any], first: Mapping[str, torch.Tensor] | None = None
) -> int:
    """Put the finished adapter and its pingjia.json into output_dir; return the bytes written.

    The files are first written whole beside their final names; pingjia.json, which marks the adapter as finished,
    is moved last.
    """
    with new_directory(output_dir / ".adapter") as folder:
        write_adapter(folder, model, first)
        write_about(folder, {**about, "sha256": file_digests(folder)})
    return move_up(output_dir / ".adapter", output_dir)


def file_digests(folder: Path) -> dict[str, str]:
    """sha256 hex of the adapter's files: what is changed, mixed up or replaced later is seen (export/merge.py)."""
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in _ADAPTER_FILES[1:]}


def write_about(folder: Path, about: Mapping[str, Any]) -> None:
    """pingjia.json, which marks a result as finished."""
    write_bytes(folder / ABOUT_FILE, (json.dumps(about, ensure_ascii=False, indent=2) + "\n").encode())


def move_up(folder: Path, output_dir: Path) -> int:
    """Move a finished result's files to output_dir, pingjia.json last; return their bytes."""
    names = sorted((p.name for p in folder.iterdir()), key=lambda name: name == ABOUT_FILE)
    size = sum((folder / name).stat().st_size for name in names)
    for name in names:
        os.replace(folder / name, output_dir / name)
    folder.rmdir()
    return size


def result_files(output_dir: Path) -> list[Path]:
    """The files of the finished result that is in output_dir, pingjia.json included, as far as they are there.

    A model directory names its own in pingjia.json ("files"); an adapter has the same ones always.
    """
    try:
        named = json.loads((output_dir / ABOUT_FILE).read_text(encoding="utf-8")).get("files", ())
    except (OSError, ValueError):
        named = ()
    names = dict.fromkeys((*_ADAPTER_FILES, *(Path(name).name for name in named)))
    return [output_dir / name for name in names if (output_dir / name).is_file()]


def set_aside(output_dir: Path) -> None:
    """Make room for a run that starts over: what an earlier one made goes to previous/, checkpoints are deleted.

    Left where they are, they would be taken for the new run's as soon as that is interrupted.
    """
    for old in checkpoints(output_dir):
        shutil.rmtree(old.path)
    prune_best(output_dir, None)
    found = result_files(output_dir)
    if (output_dir / ABOUT_FILE) not in found:
        return
    previous = output_dir / "previous"
    shutil.rmtree(previous, ignore_errors=True)
    previous.mkdir()
    for path in found:
        os.replace(path, previous / path.name)


def write_adapter(folder: Path, model: PeftModel, first: Mapping[str, torch.Tensor] | None = None) -> None:
    """adapter_config.json and adapter_model.safetensors as PEFT reads them. Refuses an adapter that changes nothing.

    `first`: the matrices that a PiSSA began with, when it is finished; it is then written as the LoRA it comes to.
    """
    tensors = {
        k: v.detach().cpu().contiguous()
        for k, v in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    require_nonzero_adapter(tensors)
    config = model.peft_config[model.active_adapter]
    if first:
        tensors, config = as_lora(tensors, first, config)
    config.save_pretrained(folder)
    write_bytes(folder / ADAPTER_FILE, safetensors.torch.save(tensors, metadata={"format": "pt"}))


@contextlib.contextmanager
def new_directory(target: Path, num_bytes: int = 0) -> Iterator[Path]:
    """A directory that gets the name `target` only when the block ends well; on any error nothing is left of it.

    `num_bytes`: about what will be in it; a disk without so much room is refused before anything is written.
    """
    temporary = target.with_name(f".{target.name}.partial")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        if shutil.disk_usage(temporary).free < num_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        yield temporary
        for path in temporary.iterdir():
            _sync(path)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
        _sync(target.parent)
    except OSError as e:
        raise StorageError(disk_message(target, e)) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_room(output_dir: Path, num_bytes: int) -> None:
    """Refuse a run whose files will not fit, before it begins. What it has written already counts as there."""
    folders = (*output_dir.glob("checkpoint-*"), *output_dir.glob("best-*"))
    there = sum(file.stat().st_size for folder in folders for file in folder.iterdir())
    free = shutil.disk_usage(output_dir).free
    if num_bytes - there > free:
        raise StorageError(
            f"{output_dir}: the checkpoints and the model of this run take up to {num_bytes / 1e9:.1f} GB, and "
            f"{(free + there) / 1e9:.1f} GB are there for them; make room, lower save_total_limit, or choose another "
            "output_dir"
        )


def write_bytes(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """By torch, straight into the file: an optimizer can be twice as large as the weights."""
    with open(path, "wb") as file:
        torch.save(dict(state), file)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def refused(error: safetensors.SafetensorError, path: Path) -> OSError:
    """What safetensors says of a disk that refuses, as the error that it is."""
    is_full = "No space" in str(error) or "os error 28" in str(error)
    return OSError(errno.ENOSPC if is_full else errno.EIO, str(error), str(path))


def disk_message(target: Path, error: OSError) -> str:
    """Why `target` was not written, and what there is to go on from."""
    reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else (error.strerror or str(error))
    before = checkpoints(target.parent)
    last = f"the last good one is {before[-1].path}" if before else "no earlier one exists"
    return f"{target} could not be saved: {reason}; {last}. Make room and run the same command to go on"


def run_fingerprint(parts: Mapping[str, Any]) -> str:
    """sha256 of everything that decides the weights; two runs with the same one may share a checkpoint."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str).encode()).hexdigest()
