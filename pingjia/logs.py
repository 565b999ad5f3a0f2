"""How a server logs: one line each, and of an exception where it happened and its kind, but not its message.

Messages of exceptions nobody foresaw may quote what was being worked on, and prompts, answers and keys do not belong in
logs. `--debug` (or PINGJIA_DEBUG) shows them. Not here: the access log, which is JSON (`gateway/access_log.py`).
"""

from __future__ import annotations

import logging
import traceback
from types import TracebackType

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_Caught = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


class QuietFormatter(logging.Formatter):
    """Formats tracebacks without the messages in them."""

    def format(self, record: logging.LogRecord) -> str:
        """The line. What another handler has made of the exception is not taken over."""
        kept, record.exc_text = record.exc_text, None
        try:
            return super().format(record)
        finally:
            record.exc_text = kept

    def formatException(self, ei: _Caught) -> str:
        """Frames and kinds, of the whole chain, the first cause first."""
        parts, error, seen = [], ei[1], set()
        while error is not None and id(error) not in seen:
            seen.add(id(error))
            frames = "".join(traceback.format_tb(error.__traceback__))
            kind = f"{type(error).__name__} (--debug shows its message)"
            parts.append(f"Traceback (most recent call last):\n{frames}{kind}")
            error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        return "\n\nbecause of it, or while it was handled:\n\n".join(reversed(parts))


def set_up_logs(*, debug: bool = False) -> None:
    """Log to stderr from level INFO on. debug: with the messages of exceptions. Does nothing where logs are set up."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(FORMAT) if debug else QuietFormatter(FORMAT))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
