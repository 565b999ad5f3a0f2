"""What BERTScore tells apart with an encoder, and how fast: where a threshold for made questions should lie.

    python benchmarks/bert_score.py [--encoder minilm] [--layer N] [--out FILE]

Chinese: the questions of the packaged samples; two wordings of one topic were written by hand. English: hand-written
pairs below. Each is compared with
  same      another wording by a person          synonyms  what the synonym maker makes of it
  shuffled  its words in another order           swapped   a third of its words exchanged for words of other questions
  other     another question of the same set
The figure per kind is F1: 5 %, median, 95 %, and the share below each threshold. `auc`: how often a score of `same` is
above one of `other`. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import subprocess
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jieba
import numpy as np

HERE = Path(__file__).parent
SAMPLES = HERE.parent / "pingjia" / "data" / "samples"
THRESHOLDS = (0.6, 0.7, 0.8)
MANY = 200
Pairs = list[tuple[str, str]]

ENGLISH = """
How long is the warranty? | How long does the warranty last?
Can I return it? | Am I able to send it back?
Where is your shop? | What is the address of your store?
When do you open on Sunday? | What are your opening hours on Sundays?
How do I reset my password? | I forgot my password, how can I set a new one?
Do you ship abroad? | Is international delivery possible?
What does the kettle cost? | How much is the kettle?
Give three tips for staying healthy. | List three ways to keep in good health.
Explain how photosynthesis works. | Describe the process of photosynthesis.
Write a short poem about rain. | Compose a brief poem on the rain.
Which colours can I choose? | What colours is it available in?
My order has not arrived yet. | I still have not received my order.
How can I pay? | Which payment methods do you accept?
Is the battery replaceable? | Can the battery be changed?
What is the capital of France? | Name the capital city of France.
How many planets are in the solar system? | What is the number of planets in our solar system?
Put this sentence into French. | Translate the following sentence into French.
Summarise the article in two sentences. | Give a two-sentence summary of the article.
Who wrote Hamlet? | Who is the author of Hamlet?
Why is the sky blue? | What makes the sky look blue?
Please cancel my subscription. | I would like to end my subscription.
Does the price include installation? | Is installation part of the price?
How do I clean the filter? | What is the right way to clean the filter?
Suggest a name for a coffee shop. | Come up with a name for a café.
Is there a discount for students? | Do students pay less?
How large is the memory of this phone? | How much storage does this phone have?
I want to speak to a person. | Please connect me to a human.
Convert 5 miles to kilometres. | How many kilometres are 5 miles?
What should I eat before a race? | Which food is good before running a race?
Can my dog come along? | Are dogs allowed?
Tell me a joke about programmers. | Do you know a funny story about programmers?
How is paper made? | Describe how paper is produced.
What time is breakfast served? | When can we have breakfast?
Does it work without the internet? | Can I use it offline?
The screen stays black, what can I do? | What should I try if the display shows nothing?
Recommend a book on the history of China. | Which book about Chinese history do you suggest?
How do plants drink? | In what way do plants take up water?
Find the area of a circle of radius 3 cm. | A circle has a radius of 3 cm; what is its area?
Are the cups safe in the dishwasher? | Can I put the cups in the dishwasher?
What is a good way to learn vocabulary? | How can I learn new words well?
"""


def english() -> tuple[list[str], Pairs]:
    same = [tuple(side.strip() for side in line.split("|")) for line in ENGLISH.strip().splitlines()]
    return [text for pair in same for text in pair], same  # type: ignore[return-value]


def chinese() -> tuple[list[str], Pairs]:
    topics: dict[str, list[str]] = {}
    for name in ("customer_service", "tutoring"):
        for line in (SAMPLES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row["lang"] == "zh" and not row.get("history"):
                topics.setdefault(row["topic"], []).append(row["prompt"])
    same = [pair for texts in topics.values() for pair in itertools.combinations(texts, 2)]
    return [text for texts in topics.values() for text in texts], same


def kinds(texts: Sequence[str], same: Pairs, rng: random.Random) -> dict[str, Pairs]:
    """The pairs (changed, text) of each kind."""
    from pingjia.data.augment import Task
    from pingjia.data.synonyms import Synonyms

    words = {text: jieba.lcut(text) for text in texts}
    pool = [word for text in texts for word in words[text] if word.strip()]
    made = Synonyms().make([Task(text, (), text) for text in texts])
    others = zip(rng.sample(texts, len(texts)), texts, strict=True)
    return {
        "same": rng.sample(same, min(MANY, len(same))),
        "synonyms": [(new, text) for new, text in zip(made, texts, strict=True) if isinstance(new, str)][:MANY],
        "shuffled": [("".join(rng.sample(words[t], len(words[t]))), t) for t in texts][:MANY],
        "swapped": [(swapped(words[t], pool, rng), t) for t in texts][:MANY],
        "other": [(other, text) for other, text in others if other != text][:MANY],
    }


def swapped(words: Sequence[str], pool: Sequence[str], rng: random.Random) -> str:
    changed = list(words)
    for i in rng.sample(range(len(words)), max(1, len(words) // 3)):
        changed[i] = rng.choice(pool)
    return "".join(changed)


def summary(f1: np.ndarray) -> dict[str, Any]:
    low, median, high = np.quantile(f1, [0.05, 0.5, 0.95]).round(3).tolist()
    below = {str(t): round(float((f1 < t).mean()), 3) for t in THRESHOLDS}
    return {"num": len(f1), "p5": low, "p50": median, "p95": high, "below": below}


def measure(encoder: Any, texts: Sequence[str], same: Pairs) -> dict[str, Any]:
    from pingjia.similarity import bert_scores

    pairs = kinds(texts, same, random.Random(1))
    started = time.perf_counter()
    f1 = {kind: np.array([score.f1 for score in bert_scores(some, encoder)]) for kind, some in pairs.items()}
    seconds = time.perf_counter() - started
    found: dict[str, Any] = {kind: summary(scores) for kind, scores in f1.items()}
    found["auc"] = round(float((f1["same"][:, None] > f1["other"][None]).mean()), 3)
    found["unknown"] = round(encoder.unknown_share(texts), 3)
    found["pairs_per_s"] = round(sum(map(len, pairs.values())) / seconds, 1)
    return found


def machine() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE)
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return {
        "cpu": next((line.split(":")[1].strip() for line in info if line.startswith("model name")), "?"),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def main() -> None:
    from pingjia.models import load_encoder

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="minilm")
    parser.add_argument("--layer", type=int)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "bert_score.json")
    options = parser.parse_args()
    jieba.setLogLevel(60)
    result: dict[str, Any] = {"machine": machine(), "encoder": options.encoder, "layer": options.layer}
    encoder = load_encoder(options.encoder, layer=options.layer)
    for name, (texts, same) in {"zh": chinese(), "en": english()}.items():
        result[name] = measure(encoder, texts, same)
        for kind, found in result[name].items():
            print(f"{name} {kind:12} {found}", flush=True)
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
