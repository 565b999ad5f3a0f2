"""The recipe keys of this room; flat, at the top level of the file, under the names LLaMA-Factory users know."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from pingjia.recipe import Section


def _names(value: object) -> object:
    return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value


def _one_layer(value: object) -> object:
    return f"{value}-{value}" if isinstance(value, int) and not isinstance(value, bool) else value


def _keys_as_text(value: object) -> object:
    return {str(k): v for k, v in value.items()} if isinstance(value, dict) else value


Names = Annotated[list[str], BeforeValidator(_names)]
Layers = Annotated[str | None, BeforeValidator(_one_layer)]
Rate = Annotated[float, Field(ge=0)]
Tracker = Literal["none", "tensorboard", "swanlab", "wandb", "mlflow"]
Trackers = Annotated[list[Tracker] | None, BeforeValidator(_names)]


class PhaseSettings(Section):
    """One phase of progressive training. What it leaves out is as in the rest of the recipe."""

    target: Names = Field(min_length=1)  # as lora_target
    layers: Layers = None  # as lora_layers
    num_train_epochs: float | None = Field(None, gt=0)
    max_steps: int | None = Field(None, ge=1)
    learning_rate: Rate | None = None


class DistributedSettings(Section):
    """One run in several processes, on this machine or on several. The recipe's updates stay what they are."""

    strategy: Literal["none", "ddp", "fsdp2", "zero3"] = "none"  # how processes share the network
    processes: int = Field(1, ge=1)  # on this machine
    hostfile: str | None = None  # several machines: lines of `host slots=4`; wins over processes and master_addr
    node_rank: int = Field(0, ge=0)  # which line of the hostfile this machine is
    master_addr: str = "127.0.0.1"  # where the first process listens
    master_port: int = Field(0, ge=0, le=65535)  # 0: a free one; several machines need the same one
    timeout_s: float = Field(1800, gt=0)  # longest wait for another process
    deepspeed_config: str | None = None  # a JSON file for zero3; null: pingjia's own


class ContinualSettings(Section):
    """How a run continues from an earlier adapter (`continue_from`), and what it must not forget."""

    method: Literal["grow", "ewc"] = "grow"  # new ranks beside frozen old ones, or springs on the old ones
    orthogonality: float = Field(0.5, ge=0)  # grow: lambda of the overlap of old and new A
    ewc: float = Field(100.0, ge=0)  # ewc: lambda of the springs; 1 weighs earlier tokens like new ones
    keep_fisher: bool = False  # write fisher.safetensors beside the adapter, for a later ewc
    fisher_rows: int = Field(256, ge=1)  # at most so many rows for it
    replay_ratio: float = Field(0.0, ge=0, le=10)  # rows of earlier tasks for each new one
    replay: Names = Field(default_factory=list)  # their files; empty: those the lineage names
    max_rank: int | None = Field(None, ge=1, le=4096)  # rank budget; what is over it is merged by SVD at the end
    probes: dict[str, str] = Field(default_factory=dict)  # name: file of questions, besides those of the lineage
    min_retention: float = Field(0.9, ge=0)  # least share of its score that an earlier probe must keep
    max_probe_rows: int = Field(64, ge=1)  # at most so many rows of each probe
    max_tokens: int = Field(96, ge=1)  # longest answer to a probe's question


_LORA_ONLY = (
    "lora_rank", "lora_alpha", "lora_dropout", "lora_target", "lora_layers", "lora_rank_pattern", "use_rslora",
    "use_dora", "init_lora_weights", "loraplus_lr_ratio", "lora_l2", "train_new_tokens", "shrink_lora_rank_to",
    "continue_from", "continual",
)  # fmt: skip
FREEZE_KEYS = frozenset({"freeze_trainable_layers", "freeze_trainable_modules", "freeze_extra_modules"})
_NEEDS_ANCESTOR = ("method", "orthogonality", "ewc", "replay_ratio", "replay", "max_rank")


class TuneSettings(Section):
    """What is trained, how, and where it is kept."""

    output_dir: str
    continue_from: str | None = None  # the output_dir of a finished run: go on from its adapter
    continual: ContinualSettings = Field(default_factory=ContinualSettings)
    finetuning_type: Literal["lora", "full", "freeze"] = "lora"  # an adapter; every weight; some weights
    freeze_trainable_layers: int = 2  # freeze: the last n layers learn, or with -n the first n
    freeze_trainable_modules: Names = Field(default_factory=lambda: ["all"])  # in them; names, or attention | ffn | all
    freeze_extra_modules: Names = Field(default_factory=list)  # outside of layers: embedding, head, norms, or names
    lora_rank: int = Field(16, ge=1, le=1024)
    lora_alpha: float = Field(32, gt=0)
    lora_dropout: float = Field(0.1, ge=0, lt=1)
    lora_target: Names = Field(default_factory=list)  # names, or attention | ffn | embedding | all; empty: the family's
    lora_layers: Layers = None  # "13-28": only these layers, counted from 1, both ends included; or shares, "0.5-1"
    lora_rank_pattern: Annotated[dict[str, Annotated[int, Field(ge=1, le=1024)]], BeforeValidator(_keys_as_text)] = (
        Field(default_factory=dict)  # layer range -> rank, where it is not lora_rank
    )
    use_rslora: bool = False  # alpha / sqrt(rank) instead of alpha / rank
    use_dora: bool = False  # direction and size of a weight apart
    init_lora_weights: Literal["default", "gaussian", "pissa", "pissa_niter_16"] = "default"
    loraplus_lr_ratio: float = Field(1.0, ge=1)  # LoRA+: how many times faster B learns than A
    lora_l2: float = Field(0.0, ge=0)  # lambda of the L2 term over all A and B; the plan's figure is 0.01
    train_new_tokens: bool = False  # also the embedding rows of tokens that `pingjia data tokenizer --base` added
    learning_rate: Rate = 1e-4
    layer_learning_rates: Annotated[dict[str, Rate], BeforeValidator(_keys_as_text)] = Field(default_factory=dict)
    phases: list[PhaseSettings] = Field(default_factory=list)  # one after the other, into one adapter
    phase_mode: Literal["exclusive", "cumulative"] = "exclusive"  # cumulative: what earlier phases trained goes on
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "cosine"
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    num_train_epochs: float = Field(3.0, gt=0)
    max_steps: int | None = Field(None, ge=1)  # updates; wins over num_train_epochs
    per_device_train_batch_size: int = Field(8, ge=1)  # rows laid end to end in one forward pass
    gradient_accumulation_steps: int = Field(1, ge=1)
    gradient_checkpointing: bool = False
    memory: Literal["auto", "off"] = "auto"  # auto: plan, try the longest batch first, use less when it runs out
    memory_limit_gb: float | None = Field(None, gt=0)  # what the run may use; null: what is free when it starts
    activation_cache_gb: float = Field(1.0, ge=0)  # for what comes out of frozen lower layers; 0: compute it anew
    fp16: bool = False  # products in float16 and a scaled loss; what learns stays in float32
    bf16: bool = False  # products in bfloat16; what learns stays in float32
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    eval_steps: int | None = Field(None, ge=1)  # updates between looks at eval_dataset; null: every epoch
    early_stopping_patience: int | None = Field(None, ge=1)  # looks without a better loss; the plan's figure is 3
    shrink_lora_rank_to: int | None = Field(None, ge=1)  # when over-fitting shows, once; the plan's figure is 8
    seed: int = Field(42, ge=0)
    save_steps: int = Field(50, ge=1)
    save_total_limit: int = Field(2, ge=1)
    resume_from_checkpoint: bool | str = True  # true: the newest in output_dir; false: start over; or a directory
    report_to: Trackers = None  # null: tensorboard where it is installed
    distributed: DistributedSettings = Field(default_factory=DistributedSettings)

    @model_validator(mode="after")
    def _fits_together(self) -> TuneSettings:
        if self.shrink_lora_rank_to is not None and self.shrink_lora_rank_to >= self.lora_rank:
            raise ValueError(f"shrink_lora_rank_to must be below lora_rank {self.lora_rank}")
        if self.shrink_lora_rank_to is not None and (self.use_dora or self.lora_rank_pattern):
            raise ValueError("shrink_lora_rank_to works with one rank for all layers and without use_dora")
        if self.shrink_lora_rank_to is not None and self.init_lora_weights.startswith("pissa"):
            raise ValueError("shrink_lora_rank_to does not work with init_lora_weights=pissa; choose one")
        return self

    @model_validator(mode="after")
    def _suits_its_type(self) -> TuneSettings:
        wrong = _foreign_keys(self)
        if wrong is not None:
            raise ValueError(wrong)
        return self

    @model_validator(mode="after")
    def _one_half_format(self) -> TuneSettings:
        if self.fp16 and self.bf16:
            raise ValueError("fp16 and bf16 are two formats for the same products; choose one (bf16 where it exists)")
        return self

    @model_validator(mode="after")
    def _continues_soundly(self) -> TuneSettings:
        wrong = _idle_keys(self) if self.continue_from is None else _conflict(self)
        if wrong is None and _looks_back(self):
            wrong = _unlike_base(self)
        if wrong is not None:
            raise ValueError(wrong)
        return self


def _foreign_keys(s: TuneSettings) -> str | None:
    """Keys that were given and have no meaning for the finetuning_type: obeyed by nobody, they would mislead."""
    kind = s.finetuning_type
    foreign = () if kind == "lora" else tuple(key for key in _LORA_ONLY if key in s.model_fields_set)
    if foreign:
        to_go_on = "; to go on from a full run, give its directory as model_name_or_path" * ("continue_from" in foreign)
        return (
            f"{', '.join(foreign)}: only with finetuning_type=lora. finetuning_type={kind} trains the weights "
            f"themselves, without an adapter: leave {'it' if len(foreign) == 1 else 'them'} out{to_go_on}"
        )
    foreign = () if kind == "freeze" else tuple(sorted(FREEZE_KEYS & s.model_fields_set))
    if foreign:
        return f"{', '.join(foreign)}: only with finetuning_type=freeze, and this is {kind}"
    if kind == "freeze" and s.phases:
        return "phases name what learns, and so do freeze_trainable_layers; use phases with finetuning_type=full"
    if s.freeze_trainable_layers == 0 and not s.freeze_extra_modules:
        return "freeze_trainable_layers is 0 and freeze_extra_modules is empty: nothing would learn"
    return None


def _looks_back(s: TuneSettings) -> bool:
    return s.continue_from is not None or bool(s.continual.probes) or s.continual.keep_fisher


def _unlike_base(s: TuneSettings) -> str | None:
    keys = "continue_from, continual.probes and continual.keep_fisher"
    if s.init_lora_weights.startswith("pissa"):
        return f"{keys} need the base as it is, and PiSSA changes it: leave out init_lora_weights"
    if s.distributed.strategy != "none":
        return f"{keys} work in one process: leave out distributed.strategy"
    return None


def _idle_keys(s: TuneSettings) -> str | None:
    idle = [f"continual.{key}" for key in _NEEDS_ANCESTOR if key in s.continual.model_fields_set]
    return f"{', '.join(idle)}: only with continue_from" if idle else None


def _conflict(s: TuneSettings) -> str | None:
    """Why a run cannot continue as asked."""
    c = s.continual
    if c.method == "ewc":
        return "continual.method=ewc keeps the rank: leave out shrink_lora_rank_to" if s.shrink_lora_rank_to else None
    if s.use_dora or s.train_new_tokens:
        return "continual.method=grow adds plain LoRA ranks: leave out use_dora and train_new_tokens"
    if c.max_rank is not None and c.max_rank < s.lora_rank:
        return f"continual.max_rank {c.max_rank} is below lora_rank {s.lora_rank}, the ranks that are added"
    return None
