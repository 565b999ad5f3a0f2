"""The recipe keys of this room; flat, at the top level of the file, under the names LLaMA-Factory users know."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from pingjia.recipe import Section


class TuneSettings(Section):
    """What is trained, how, and where it is kept."""

    output_dir: str
    finetuning_type: Literal["lora"] = "lora"
    lora_rank: int = Field(16, ge=1, le=1024)
    lora_alpha: float = Field(32, gt=0)
    lora_dropout: float = Field(0.1, ge=0, lt=1)
    lora_target: list[str] = Field(default_factory=list)  # names, or groups attention | ffn | all; empty: the family's
    lora_layers: str | None = None  # "13-28": only these layers, counted from 1, both ends included
    learning_rate: float = Field(1e-4, ge=0)
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "cosine"
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    num_train_epochs: float = Field(3.0, gt=0)
    max_steps: int | None = Field(None, ge=1)  # updates; wins over num_train_epochs
    per_device_train_batch_size: int = Field(8, ge=1)  # rows laid end to end in one forward pass
    gradient_accumulation_steps: int = Field(1, ge=1)
    gradient_checkpointing: bool = False
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    seed: int = Field(42, ge=0)
    save_steps: int = Field(50, ge=1)
    save_total_limit: int = Field(2, ge=1)
    resume_from_checkpoint: bool | str = True  # true: the newest in output_dir; false: start over; or a directory

    @field_validator("lora_target", mode="before")
    @classmethod
    def _names(cls, value: object) -> object:
        return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value

    @field_validator("lora_layers", mode="before")
    @classmethod
    def _one_layer(cls, value: object) -> object:
        return f"{value}-{value}" if isinstance(value, int) and not isinstance(value, bool) else value
