"""`python -m pingjia.cli.compare_start RECIPE`: the held-out loss of a network before it is trained, as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    from pingjia.cli.schema import load_recipe
    from pingjia.models import use_packed_attention
    from pingjia.models.device import pick_device
    from pingjia.tune.run import read_inputs
    from pingjia.tune.step import build_batch, mean_loss

    recipe = load_recipe(Path(sys.argv[1]), ["output_dir=unused"])
    device = pick_device(recipe.model.device)
    found = read_inputs(recipe.model, recipe.data, recipe.tune, device)
    use_packed_attention(found.model)
    size = recipe.tune.per_device_train_batch_size
    parts = [found.eval_rows[i : i + size] for i in range(0, len(found.eval_rows), size)]
    batches = [build_batch(part, found.family, found.model.config, device) for part in parts]
    print(json.dumps({"loss": mean_loss(found.model, batches)}))


if __name__ == "__main__":
    main()
