"""A network that was trained itself, as a directory that stands alone: weights, config, tokenizer, chat template.

Nothing appears in the output_dir unless the files, loaded again, are what was trained and no longer what it began as.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from pingjia import chat
from pingjia.errors import TrainingError
from pingjia.models import load_model, use_packed_attention
from pingjia.models.family import Family
from pingjia.models.fingerprint import TUNED
from pingjia.models.loader import quiet
from pingjia.tune.checkpoint import move_up, new_directory, refused, write_about
from pingjia.tune.step import build_batch
from pingjia.types import Encoded

TOLERANCE = 1e-3  # of logits of equal weights: on an accelerator even those are not added up in the same order twice
_SHARD = "5GB"


class Proof:
    """What the network answered before the run, against which the finished files are held.

    `prompts`: token ids. Of each only the logits after its last token are kept and compared.
    """

    def __init__(self, model: PreTrainedModel, family: Family, prompts: Sequence[Sequence[int]]) -> None:
        self._family, self._prompts = family, prompts
        self._base = self._answers(model)

    def check(self, folder: Path, model: PreTrainedModel, *, is_whole: bool) -> dict[str, Any]:
        """Load `folder` and compare it with what is in memory; TrainingError where they differ, or nothing changed.

        `is_whole`: whether the network in memory can be asked; shared out among processes, only its weights are read.
        """
        if not is_whole:
            unset_hf_deepspeed_config()  # else transformers would share out what it loads, and wait for the others
        saved = load_model(folder, dtype=model.dtype, device=model.device)
        use_packed_attention(saved)
        _require_equal(saved, model)
        answers = self._answers(saved)
        apart = _difference(answers, self._answers(model)) if is_whole else 0.0
        if apart > TOLERANCE:
            raise TrainingError(
                f"the saved model does not answer as the trained one: logits differ by {apart:.3g}, allowed "
                f"{TOLERANCE:g}; nothing is kept. The last checkpoint is still good; please report it"
            )
        moved = _difference(answers, self._base)
        if moved <= apart:
            raise TrainingError(
                "the trained model answers exactly as the one it began as: nothing was learnt, so nothing is kept; is "
                "learning_rate too small?"
            )
        return {"num_prompts": len(self._prompts), "max_logit_diff": apart, "max_change_from_base": moved}

    @torch.no_grad()
    def _answers(self, model: PreTrainedModel) -> list[torch.Tensor]:
        was_training = model.training
        model.eval()
        try:
            return [self._answer(model, ids) for ids in self._prompts]
        finally:
            model.train(was_training)

    def _answer(self, model: PreTrainedModel, ids: Sequence[int]) -> torch.Tensor:
        row = Encoded(tuple(ids), tuple(True for _ in ids))
        batch = build_batch([row], self._family, model.config, model.device)
        logits_11V = model(
            input_ids=batch.input_ids_1T,
            position_ids=batch.position_ids,
            packed=batch.packed,
            logits_to_keep=torch.tensor([len(ids) - 1], device=model.device),
            use_cache=False,
        ).logits
        answer: torch.Tensor = logits_11V[0, -1].float().cpu()
        return answer


def save_directory(
    output_dir: Path, model: PreTrainedModel, tokenizer: chat.Tokenizer, about: Mapping[str, Any], check: Any
) -> int:
    """Write the network and its pingjia.json into output_dir; return the bytes written.

    `check(folder)` looks at the files and returns what pingjia.json says of it, or raises. The files are written whole
    in a directory of their own before they get their final place, pingjia.json last.
    """
    folder = output_dir / ".model"
    setattr(model.config, TUNED, about["run_fingerprint"])
    with new_directory(folder, sum(p.nbytes for p in model.parameters())) as partial:
        save_network(partial, model)
        tokenizer.save(partial)
        files = sorted(path.name for path in partial.iterdir())
        write_about(partial, {**about, "proof": check(partial), "files": files})
    return move_up(folder, output_dir)


def save_network(folder: Path, model: PreTrainedModel) -> None:
    """Weights and config, as any transformers tool reads them. OSError when the disk refuses.

    On the way there accelerate loads DeepSpeed, where that is installed, which greets on stdout.
    """
    try:
        with quiet(), contextlib.redirect_stdout(io.StringIO()):
            model.save_pretrained(folder, max_shard_size=_SHARD)
    except safetensors.SafetensorError as e:
        raise refused(e, folder) from None


def _require_equal(saved: torch.nn.Module, model: torch.nn.Module) -> None:
    read = dict(saved.named_parameters())
    odd = [n for n, p in model.named_parameters() if n not in read or not torch.equal(read[n].to(p.device), p)]
    if odd:
        raise TrainingError(
            f"the saved model is not the trained one: {len(odd)} tensors differ, the first: {odd[0]}; nothing is kept"
        )


def _difference(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(left, right, strict=True))
