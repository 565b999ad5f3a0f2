"""What a run takes from earlier ones: their adapter, their rows, their probes, and what it adds to the loss for them.

How its result is judged and kept is in keep.py. Every run has a course; the plainest takes nothing from anyone.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel

from pingjia import data
from pingjia.chat import Tokenizer
from pingjia.data.settings import DataSettings
from pingjia.errors import DataError, TrainingError
from pingjia.models.family import Family
from pingjia.tune import ewc, grow
from pingjia.tune.checkpoint import load_tensors, new_directory
from pingjia.tune.gate import Probe
from pingjia.tune.groups import module_of
from pingjia.tune.lineage import Ancestor, Rows, free_name, held_out, read_ancestor
from pingjia.tune.lora import Targets, add_adapter
from pingjia.tune.phases import Phase
from pingjia.tune.replay import num_replayed, with_replay
from pingjia.tune.settings import TuneSettings
from pingjia.tune.step import Penalty
from pingjia.types import Encoded, Example

SPRINGS = "springs"  # what holds the weights of a run that is not finished
_SHAPE = ("lora_rank", "lora_alpha", "use_rslora", "use_dora")


@dataclass(frozen=True, slots=True)
class Reader:
    """Rows as this run reads them."""

    tokenizer: Tokenizer
    cutoff_len: int

    def examples(self, rows: Rows, what: str) -> list[Example]:
        """Raises DataError, with what the rows were wanted for."""
        problems: list[str] = []
        domains = list(rows.domains) if rows.domains is not None else None
        try:
            found = list(
                data.read_examples(
                    list(rows.files),
                    domains=domains,
                    max_samples=rows.max_samples,
                    on_problem=lambda p: problems.append(str(p)),
                )
            )
        except DataError as e:
            raise DataError(f"{what}: {e}") from None
        if problems:
            raise DataError(f"{what}: {len(problems)} rows cannot be used, the first: {problems[0]}")
        return found

    def encoded(self, examples: Sequence[Example]) -> list[Encoded]:
        return data.encode_examples(examples, self.tokenizer, self.cutoff_len)[0] if examples else []


@dataclass(frozen=True, slots=True)
class Course:
    """What a run takes from the runs before it. `settings`: the run's own, in the shape of what it continues.

    `old_rows`: of earlier tasks, without any that is asked in a probe. `sources`: the files of the probes. `name`: what
    the lineage calls this run.
    """

    settings: TuneSettings
    ancestor: Ancestor | None
    old_rows: tuple[Encoded, ...]
    probes: tuple[Probe, ...]
    sources: Mapping[str, Rows]
    name: str

    @property
    def replay(self) -> tuple[Encoded, ...]:
        """What goes behind the run's own rows."""
        return self.old_rows if self.settings.continual.replay_ratio else ()

    @property
    def inputs(self) -> dict[str, Any]:
        """What decides the weights besides rows and settings: nothing, where nothing is continued."""
        if self.ancestor is None:
            return {}
        s = self.settings.continual
        keys = {
            "method",
            "replay_ratio",
            "max_rank",
            *(("orthogonality",) if self.is_grown else ("ewc", "fisher_rows")),
        }
        return {"ancestor": self.ancestor.digest, "continual": s.model_dump(include=keys)}

    @property
    def is_grown(self) -> bool:
        return self.ancestor is not None and self.settings.continual.method == "grow"

    @property
    def is_plain(self) -> bool:
        """Whether the result is kept as it is, without a word on other runs."""
        return self.ancestor is None and not self.probes and not self.settings.continual.keep_fisher

    def rows_per_epoch(self, num_new: int) -> int:
        return num_new + num_replayed(num_new, len(self.replay), self.settings.continual.replay_ratio)

    def phases(self, phases: Sequence[Phase], num_new: int) -> list[Phase]:
        """Phases that count `rows_per_epoch` rows, with the replayed ones in their places."""
        return with_replay(phases, num_new, len(self.replay)) if self.replay else list(phases)

    def targets(self, targets: Targets) -> Targets:
        """What the run adapts: with ewc, what its ancestor adapted. TrainingError when the recipe names others."""
        if self.ancestor is None or self.is_grown:
            return targets
        modules = tuple(dict.fromkeys(module_of(name) for name in self.ancestor.tensors if ".lora_" in name))
        s = self.settings
        if (s.lora_target or s.lora_layers or s.phases) and set(targets.modules) != set(modules):
            raise TrainingError(
                f"lora_target: continual.method=ewc trains the {len(modules)} modules that {self.ancestor.path} "
                f"adapts, and the recipe names {len(targets.modules)}; leave it out, or use continual.method=grow"
            )
        return Targets(tuple(dict.fromkeys(m.rpartition(".")[2] for m in modules)), None, modules)

    def adapt(self, model: PreTrainedModel, targets: Targets) -> PeftModel:
        """The adapter that is trained: fresh, fresh beside the ancestor's, or the ancestor's own."""
        if self.ancestor is None:
            return add_adapter(model, targets, self.settings)
        if self.is_grown:
            adapted = add_adapter(model, targets, self.settings)
            grow.grow_beside(adapted, self.ancestor.tensors, self.ancestor.config)
            return adapted
        return _go_on(model, self.ancestor, targets, self.settings)

    def terms(self, model: PeftModel, family: Family, output_dir: Path, fingerprint: str) -> dict[str, Penalty]:
        """What is added to the loss for the sake of earlier tasks; taken before any checkpoint is read."""
        s = self.settings.continual
        if self.is_grown:
            wanted = s.orthogonality and grow.has_pairs(model)
            return {"orthogonality": partial(grow.orthogonality, model, s.orthogonality)} if wanted else {}
        if self.ancestor is None or not s.ewc:
            return {}
        parameters = ewc.adapter_parameters(model)
        rest = {name: p.detach().clone() for name, p in parameters.items()}
        springs = self._springs(model, family, output_dir / SPRINGS, fingerprint)
        if {n: t.shape for n, t in springs.items()} != {n: t.shape for n, t in rest.items()}:
            raise TrainingError(f"{self.ancestor.path / ewc.FISHER_FILE} belongs to another adapter; delete it")
        springs = {name: tensor.to(model.device) for name, tensor in springs.items()}
        return {"ewc": partial(ewc.ewc_penalty, parameters, springs, rest, s.ewc)}

    def _springs(self, model: PeftModel, family: Family, kept: Path, key: str) -> Mapping[str, torch.Tensor]:
        """The ancestor's, or computed from earlier rows: once, so that a run that goes on has the very same."""
        assert self.ancestor is not None
        found = self.ancestor.fisher or ewc.read_fisher(kept, key)
        if found is None:
            found = ewc.fisher(model, family, ewc.spread(self.old_rows, self.settings.continual.fisher_rows))
            with new_directory(kept) as folder:
                ewc.write_fisher(folder, found, key)
        return found


def begin(settings: TuneSettings, data_settings: DataSettings, reader: Reader, base: str) -> Course:
    """Read and check all that a run takes from earlier ones, before anything is trained.

    `base`: fingerprint of the model. Raises TrainingError (another base or template, settings that do not fit) and
    DataError (earlier rows that are not there).
    """
    s, ancestor = settings.continual, None
    if settings.continue_from is not None:
        ancestor = read_ancestor(Path(settings.continue_from), base, reader.tokenizer.template_digest)
        settings = _fitted(settings, ancestor)
    own = held_out(data_settings.model_dump())
    sources = _sources(settings, ancestor, own)
    examples = {name: reader.examples(rows, f"probe {name}") for name, rows in sources.items()}
    asked = {_question(e) for found in examples.values() for e in found}
    own_name = _own_name(settings, ancestor)
    probes = [_probe(name, found, reader, name != own_name, s.max_probe_rows) for name, found in examples.items()]
    old = _old_rows(settings, ancestor, reader, asked) if ancestor else ()
    return Course(settings, ancestor, old, tuple(probes), sources, own_name)


def _sources(settings: TuneSettings, ancestor: Ancestor | None, own: Rows | None) -> dict[str, Rows]:
    """Recorded probes, given ones, and the run's own held-out rows: only where there is anything to compare with."""
    given = {name: Rows((file,)) for name, file in settings.continual.probes.items()}
    found = {**(ancestor.probes if ancestor else {}), **given}
    if own is not None and (found or ancestor):
        found.setdefault(_own_name(settings, ancestor), own)
    return found


def _own_name(settings: TuneSettings, ancestor: Ancestor | None) -> str:
    return free_name(Path(settings.output_dir).name, [stage.name for stage in ancestor.stages] if ancestor else [])


def _probe(name: str, examples: Sequence[Example], reader: Reader, is_earlier: bool, limit: int) -> Probe:
    chosen = [examples[i * len(examples) // limit] for i in range(limit)] if len(examples) > limit else list(examples)
    return Probe(name, tuple(chosen), tuple(reader.encoded(chosen)), is_earlier)


def _old_rows(
    settings: TuneSettings, ancestor: Ancestor, reader: Reader, asked: set[tuple[str, ...]]
) -> tuple[Encoded, ...]:
    """Rows of earlier tasks, if any are needed. None of them asks what a probe asks."""
    s = settings.continual
    needs_fisher = s.method == "ewc" and s.ewc > 0 and ancestor.fisher is None
    if not s.replay_ratio and not needs_fisher:
        return ()
    sources = [Rows(tuple(s.replay))] if s.replay else [stage.data for stage in ancestor.stages]
    what = "earlier rows (name their files in continual.replay if they have moved)"
    examples = [e for rows in dict.fromkeys(sources) for e in reader.examples(rows, what)]
    encoded = reader.encoded([e for e in examples if _question(e) not in asked])
    if not encoded:
        raise TrainingError(
            f"0 of {len(examples)} earlier rows can be used: all of them are asked in probes. Name other files in "
            "continual.replay, or set continual.replay_ratio=0"
        )
    return tuple(encoded)


def _question(example: Example) -> tuple[str, ...]:
    return tuple(f"{message.role}:{message.text.strip()}" for message in example.prompt)


def _fitted(settings: TuneSettings, ancestor: Ancestor) -> TuneSettings:
    """The settings, for ewc in the ancestor's shape. TrainingError where they ask for another one."""
    config, path = ancestor.config, ancestor.path
    if settings.continual.method == "grow":
        if config.use_dora or config.trainable_token_indices:
            raise TrainingError(
                f"{path}: an adapter with use_dora or trained tokens cannot have new ranks beside it; use "
                "continual.method=ewc, or merge it (pingjia export) and continue from the merged model"
            )
        return settings
    shape = dict(zip(_SHAPE, (config.r, config.lora_alpha, config.use_rslora, config.use_dora), strict=True))
    for key, value in shape.items():
        if key in settings.model_fields_set and getattr(settings, key) != value:
            raise TrainingError(
                f"{key} is {getattr(settings, key)}, but continual.method=ewc trains the matrices of {path}, which "
                f"have {value}; leave {key} out, or use continual.method=grow"
            )
    if bool(config.trainable_token_indices) != settings.train_new_tokens:
        raise TrainingError(f"train_new_tokens must be as in {path}: {not settings.train_new_tokens}".lower())
    return settings.model_copy(update=shape)


def _go_on(model: PreTrainedModel, ancestor: Ancestor, targets: Targets, settings: TuneSettings) -> PeftModel:
    """The ancestor's own adapter, trainable."""
    config = copy.deepcopy(ancestor.config)
    config.lora_dropout, config.inference_mode, config.init_lora_weights = settings.lora_dropout, False, True
    torch.manual_seed(settings.seed)
    adapted = get_peft_model(model, config)
    load_tensors(adapted, ancestor.tensors, ancestor.path)
    return adapted
