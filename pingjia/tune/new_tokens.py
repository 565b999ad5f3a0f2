"""Which rows of the embedding (and of an untied head) are trained whole: those of tokens added to the vocabulary.

PEFT trains and stores them (`trainable_token_indices`) beside the LoRA, in the same adapter. A tied head follows the
embedding by itself.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from pingjia.errors import TrainingError
from pingjia.models.vocabulary import added_tokens
from pingjia.tune.settings import TuneSettings


def token_indices(
    model: PreTrainedModel, settings: TuneSettings, modules: tuple[str, ...]
) -> dict[str, list[int]] | None:
    """PEFT's `trainable_token_indices`: module name -> ids. None unless `train_new_tokens` asks for it.

    `modules` are those that get a LoRA. Raises TrainingError for a base without new tokens, and when the embedding
    would be trained in two ways at once.
    """
    if not settings.train_new_tokens:
        return None
    tokens = added_tokens(model.config)
    if not tokens:
        raise TrainingError(
            "train_new_tokens: no tokens were added to this model's vocabulary; `pingjia data tokenizer FILE... --base "
            "MODEL --out DIR` adds some, or leave the key out"
        )
    tables = [model.get_input_embeddings()]
    if not model.config.tie_word_embeddings:
        tables.append(model.get_output_embeddings())
    names = [next(name for name, module in model.named_modules() if module is table) for table in tables]
    twice = [name for name in names if name in modules]
    if twice:
        raise TrainingError(f"train_new_tokens trains rows of {twice[0]} whole; take it out of lora_target")
    return {name: tokens for name in names}
