"""`python -m pingjia.models.vectors ENCODER`: sentence vectors for another process, which must not load torch itself.

A line of JSON (a list of texts) on stdin, a line of JSON on stdout: {"vectors": base64 of float32 [N, H], "size": H,
"unknown": [share of the tokens that the encoder does not know, per text]}. The first line says {"ready": true}, or
{"error": ...} after which it ends. It ends with its stdin.
"""

from __future__ import annotations

import base64
import json
import os
import sys
from typing import Any, TextIO

from pingjia.errors import PingjiaError


def main(name: str, asked: TextIO, told: TextIO) -> int:
    """Answer until `asked` ends; return the exit code."""
    try:
        from pingjia.models.encoder import load_encoder

        encoder = load_encoder(name)
    except (PingjiaError, ImportError) as e:
        _say(told, {"error": str(e)})
        return 2
    _say(told, {"ready": True})
    for line in asked:
        texts = json.loads(line)
        vectors = encoder.sentence_vectors(texts)
        unknown = [round(encoder.unknown_share([text]), 4) for text in texts]
        packed = base64.b64encode(vectors.tobytes()).decode()
        _say(told, {"vectors": packed, "size": vectors.shape[1], "unknown": unknown})
    return 0


def _say(told: TextIO, document: dict[str, Any]) -> None:
    told.write(json.dumps(document) + "\n")
    told.flush()


if __name__ == "__main__":
    # Libraries print to stdout now and then, where only answers may stand.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.exit(main(sys.argv[1], sys.stdin, answers))
