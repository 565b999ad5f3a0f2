"""A word on the command line -> something that answers: a server, a model here, a model with an adapter, a recipe.

http://127.0.0.1:8000/v1#tuned               an OpenAI-compatible server; the key is in OPENAI_API_KEY
https://host/v1#name?key=OTHER_KEY           the key is in the environment variable OTHER_KEY
models/chatglm-6b                            a model's directory, a .gguf file or a packaged name
models/chatglm-6b+out/adapter                with an adapter's directory beside it
recipes/demo.yaml                            what the recipe has tuned
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from pingjia.errors import RecipeError, UserError

if TYPE_CHECKING:
    from pingjia.evaluate import Endpoint
    from pingjia.types import Generator

FORMS = "URL#MODEL, a model directory, MODEL+ADAPTER, or a recipe"


def generator_of(side: str) -> Generator:
    """Whatever `side` names. Raises UserError, of which ModelError is one, for what cannot be used."""
    if side.startswith(("http://", "https://")):
        return endpoint_of(side)
    if side.endswith((".yaml", ".yml")):
        return _tuned(side)
    from pingjia import Engine

    model, _, adapter = side.partition("+")
    return Engine(model, adapter=adapter or None)


def endpoint_of(side: str) -> Endpoint:
    """The server of "URL#MODEL" or "URL#MODEL?key=VARIABLE". Raises UserError for a missing model or variable."""
    from pingjia.evaluate import Endpoint

    url, _, rest = side.partition("#")
    model, _, options = rest.partition("?")
    if not model:
        raise UserError(f"{side}: which model? write {url}#MODEL, with a name that its /v1/models lists")
    if not options:
        return Endpoint(url, model, api_key=os.environ.get("OPENAI_API_KEY"))
    name, _, variable = options.partition("=")
    if name != "key" or not variable:
        raise UserError(f"{side}: after ? only key=VARIABLE is known, the environment variable that holds the API key")
    if variable not in os.environ:
        raise UserError(f"{side}: the environment variable {variable} is not set; it should hold the API key")
    return Endpoint(url, model, api_key=os.environ[variable])


def _tuned(file: str) -> Generator:
    from pingjia.cli.eval import recipe_engine
    from pingjia.cli.schema import load_recipe

    recipe = load_recipe(Path(file), [])
    if recipe.tune.finetuning_type == "lora":
        return recipe_engine(recipe, recipe.model.model_name_or_path, adapter=recipe.tune.output_dir)
    return recipe_engine(recipe, recipe.tune.output_dir)


def check_side(side: str) -> None:
    """Refuse what can be seen to be wrong before anything is loaded. Raises UserError."""
    if not side.strip():
        raise RecipeError(f"an empty name; give {FORMS}")
    if side.startswith(("http://", "https://")):
        endpoint_of(side)
