"""nginx's file on the disk: written whole or not at all, tested, put back when nginx refuses it, then reloaded.

Not here: what stands in it (`nginx.py`), when it changes (`watch.py`).
"""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pingjia.errors import PingjiaError

_COMMAND_S = 30.0


class NginxRefused(PingjiaError):
    """nginx does not take the new file; the one before is in place and in force."""


class NotReloaded(PingjiaError):
    """The new file is in place and sound, but nginx goes on with the old one, or does not run yet."""


@dataclass(frozen=True, slots=True)
class Commands:
    """How nginx is asked. Empty: not at all."""

    test: Sequence[str]
    reload: Sequence[str]

    @classmethod
    def of(cls, scope: str, file: Path) -> Commands:
        """Those of an nginx on this machine."""
        of_file = ["-c", str(file.absolute())] if scope == "main" else []
        return cls(["nginx", "-t", "-q", *of_file], ["nginx", "-s", "reload", *of_file])

    @classmethod
    def parse(cls, test: str, reload: str) -> Commands:
        """From command lines, without a shell."""
        return cls(shlex.split(test), shlex.split(reload))


class NginxFile:
    """One file that nginx reads."""

    def __init__(self, path: Path, commands: Commands) -> None:
        self.path = path
        self._commands = commands
        self._must_reload = False

    def read(self) -> str | None:
        """What is there now."""
        try:
            return self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    def put(self, text: str) -> bool:
        """Make `text` the file that is in force; False when it is already.

        Raises NginxRefused with nginx's own words, after putting back what was there; NotReloaded, and the next call
        tries to reload again; OSError when the disk refuses.
        """
        before = self.read()
        if text == before and not self._must_reload:
            return False
        if text != before:
            write_whole(self.path, text)
        complaint = _ask(self._commands.test)
        if complaint:
            self._put_back(before, text)
            raise NginxRefused(f"nginx refuses the new configuration: {complaint}")
        self._must_reload = True
        complaint = _ask(self._commands.reload)
        if complaint:
            raise NotReloaded(f"nginx has not reloaded: {complaint}")
        self._must_reload = False
        return True

    def _put_back(self, before: str | None, refused: str) -> None:
        write_whole(self.path.with_name(self.path.name + ".refused"), refused)
        if before is None:
            self.path.unlink()
        elif before != refused:
            write_whole(self.path, before)


def _ask(command: Sequence[str]) -> str:
    """What a command complains of; nothing when it went well or there is none."""
    if not command:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_S, check=False)  # noqa: S603
    except FileNotFoundError:
        return f"there is no command {command[0]!r} here; install nginx, or give its path"
    except subprocess.TimeoutExpired:
        return f"{shlex.join(command)} has not ended within {_COMMAND_S:g} s"
    if done.returncode == 0:
        return ""
    words = " ".join((done.stderr or done.stdout).split())[-500:]
    return f"{words} ({shlex.join(command)} ended with {done.returncode})"


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new one, also after the power fails."""
    number, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(number, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, path.stat().st_mode & 0o777 if path.exists() else 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
