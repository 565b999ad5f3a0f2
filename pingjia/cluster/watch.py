"""Consul -> pool -> nginx, until told to stop. What is in force stays in force while Consul cannot be asked."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pingjia.cluster.consul import Consul, ConsulLost, ConsulRefused, NotRegistered
from pingjia.cluster.nginx import NginxSettings, read_members, render
from pingjia.cluster.nginx_file import NginxFile, NginxRefused, NotReloaded
from pingjia.cluster.pool import HOLD_S, Selection, has_forgotten, select
from pingjia.cluster.replica import Replica, read_replicas
from pingjia.errors import UserError

log = logging.getLogger("pingjia.cluster")

_WAIT_S = 30.0
_MAX_PAUSE_S = 10.0
_RELOAD_AGAIN_S = 2.0
_AGAIN_S = 30.0  # until a text that nginx has refused is tried again: what was wrong may lie outside our file


@dataclass(frozen=True, slots=True)
class Pace:
    """How long after a reload the next may come. Every reload leaves old workers behind until their answers end."""

    members_s: float = 1.0
    jumps_s: float = 3.0
    """When only weights change, one by more than a fifth."""
    weights_s: float = 10.0
    """When only weights change, and little."""

    def due(self, members: Sequence[Replica], in_force: Sequence[Replica], reloaded_at: float) -> float:
        """The earliest time at which these may replace those in force."""
        before = {m.authority: m.weight for m in in_force}
        if before.keys() != {m.authority for m in members}:
            return reloaded_at + self.members_s
        has_jumped = any(abs(m.weight - before[m.authority]) > 0.2 * before[m.authority] for m in members)
        return reloaded_at + (self.jumps_s if has_jumped else self.weights_s)


class Watch:
    """Keeps one file up to date. `run` blocks; `stop` comes from another thread."""

    def __init__(
        self,
        consul: Consul,
        service: str,
        file: NginxFile,
        settings: NginxSettings,
        *,
        template: str | None = None,
        pace: Pace | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._consul, self._service, self._file = consul, service, file
        self._settings, self._template, self._pace = settings, template, pace or Pace()
        self._clock = clock
        self._index = 0
        self._hold_until = float("-inf")
        self._reloaded_at = float("-inf")
        self._in_force: tuple[Replica, ...] = tuple(read_members(file.read() or ""))
        self._refused = ""
        self._last_seen: list[Replica] = list(self._in_force)
        self._complaint = ""
        self._again_at = float("-inf")
        self._remarks: tuple[str, ...] = ()
        self._num_failures = 0
        self._stopping = threading.Event()
        self._applying = threading.Lock()

    def stop(self) -> None:
        """End, also while `run` waits for Consul in another thread; a file that is being changed is finished first."""
        self._stopping.set()
        self._applying.acquire(timeout=60.0)

    def once(self) -> Selection:
        """Ask and write once. Raises UserError when Consul cannot be asked, NginxRefused."""
        try:
            seen = read_replicas(self._consul.health(self._service).body)
        except (ConsulLost, NotRegistered) as e:
            raise UserError(str(e)) from None
        selection = select(seen, self._in_force)
        self._say(selection.remarks)
        self._apply(selection)
        return selection

    def run(self) -> None:
        """Follow Consul until `stop`. A file that nginx refuses and a Consul that is away are logged and outlived."""
        seen: list[Replica] | None = None
        while not self._stopping.is_set():
            seen = self._ask(seen)
            if seen is not None:
                self._follow(seen)

    def _ask(self, seen: list[Replica] | None) -> list[Replica] | None:
        try:
            answer = self._consul.health(self._service, index=self._index, wait_s=self._wait_s(seen))
        except (ConsulLost, ConsulRefused, NotRegistered) as e:
            self._pause(str(e))
            return seen
        if self._num_failures:
            log.info("Consul answers again")
        self._num_failures = 0
        now = read_replicas(answer.body)
        if has_forgotten(now, self._last_seen, answer.index, self._index):
            log.warning("Consul has lost its memory; the pool is held for %g s", HOLD_S)
            self._hold_until = self._clock() + HOLD_S
        self._index, self._last_seen = max(answer.index, 1), now
        return now

    def _wait_s(self, seen: list[Replica] | None) -> float:
        """Shorter while something waits for its time: a reload that is not due, a pool that is held."""
        waits = [_WAIT_S]
        now = self._clock()
        if now < self._hold_until:
            waits.append(self._hold_until - now)
        if seen is not None and self._selected(seen).members != self._in_force:
            waits.append(1.0)
        return max(1.0, min(waits))

    def _selected(self, seen: Sequence[Replica]) -> Selection:
        return select(seen, self._in_force, is_holding=self._clock() < self._hold_until)

    def _follow(self, seen: Sequence[Replica]) -> None:
        selection = self._selected(seen)
        self._say(selection.remarks)
        due = self._pace.due(selection.members, self._in_force, self._reloaded_at)
        if due - self._clock() > 1.0:
            return  # asked again within a second or so, perhaps with more to tell
        if self._stopping.wait(max(0.0, due - self._clock())):
            return
        try:
            self._apply(selection)
        except (UserError, NginxRefused, NotReloaded, OSError) as e:
            if str(e) != self._complaint:
                log.error("%s; nginx goes on with what it had", e)
            self._complaint = str(e)
            self._again_at = self._clock() + (_RELOAD_AGAIN_S if isinstance(e, NotReloaded) else _AGAIN_S)

    def _apply(self, selection: Selection) -> None:
        with self._applying:
            self._put(selection)

    def _put(self, selection: Selection) -> None:
        text = render(self._service, selection.members, self._settings, self._template)
        if text == self._refused and self._clock() < self._again_at:
            return
        self._refused = text
        if self._file.put(text):
            self._reloaded_at = self._clock()
            log.info("in force: %s", ", ".join(f"{m.name}={m.weight}" for m in selection.members) or "nobody")
        self._in_force, self._refused, self._complaint = selection.members, "", ""

    def _say(self, remarks: tuple[str, ...]) -> None:
        for remark in remarks:
            if remark not in self._remarks:
                log.warning("%s", remark)
        self._remarks = remarks

    def _pause(self, why: str) -> None:
        if not self._num_failures:
            log.warning("%s; the pool stays as it is", why)
        self._num_failures += 1
        longest = min(_MAX_PAUSE_S, 0.25 * 2.0 ** min(self._num_failures, 6))
        self._stopping.wait(random.uniform(0.5, 1.0) * longest)  # noqa: S311
