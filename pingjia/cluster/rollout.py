"""One replica after the other: a change, proof that it answers again, and the way back when it does not.

What a change is (a command that restarts the replica, another adapter) is handed in; so are the clock and the eyes.
Not here: command lines and what is printed.
"""

from __future__ import annotations

import shlex
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import httpx

from pingjia.cluster.consul import Consul, ConsulLost
from pingjia.cluster.orders import Order, WantedAdapter, give
from pingjia.cluster.replica import Replica, State, read_replicas
from pingjia.errors import PingjiaError, UserError

Say = Callable[[str], None]
_LOOK_S = 0.25


class StepFailed(PingjiaError):
    """A replica did not become what it should."""


class Change(Protocol):
    """Something done to one replica and undone again. Both return when it answers, and raise StepFailed."""

    def apply(self, replica: Replica) -> None: ...

    def undo(self, replica: Replica) -> None: ...


@dataclass(frozen=True, slots=True)
class Pool:
    """A pool as an operator sees it: through Consul, and through the replicas' own /health."""

    consul: Consul
    service: str
    timeout_s: float = 300.0
    look_s: float = _LOOK_S

    def replicas(self) -> list[Replica]:
        """All of them. Consul may be away for a moment; raises ConsulLost when it stays away."""
        return read_replicas(self.consul.health(self.service).body)

    def named(self, name: str) -> Replica:
        """Raises UserError when there is none."""
        replicas = self.replicas()
        found = next((r for r in replicas if r.name == name), None)
        if found is None:
            there = ", ".join(r.name for r in replicas) or "nobody"
            raise UserError(f"no replica {name!r} in the pool {self.service!r}; there is {there}")
        return found

    def wait(self, what: str, is_so: Callable[[Replica | None], bool], name: str) -> Replica | None:
        """Look at a replica until something is so. Raises StepFailed after `timeout_s`."""
        end = time.monotonic() + self.timeout_s
        while True:
            found = self._look(name)
            if found is not _UNKNOWN and is_so(found):
                return found
            if time.monotonic() > end:
                raise StepFailed(f"{name} {what}: not within {self.timeout_s:g} s{_state_of(found)}")
            time.sleep(self.look_s)

    def _look(self, name: str) -> Replica | None:
        try:
            return next((r for r in self.replicas() if r.name == name), None)
        except ConsulLost:
            return _UNKNOWN

    def order(self, replica: Replica, order: Order) -> Replica:
        """Give an order and wait until the replica has taken it. Raises StepFailed with its own complaint."""
        give(self.consul, self.service, replica.name, order)
        found = self.wait("takes its order", lambda r: r is not None and r.obeyed == order.id, replica.name)
        assert found is not None
        if found.complaint:
            raise StepFailed(f"{replica.name}: {found.complaint}")
        return found

    def drain(self, replica: Replica, settle_s: float) -> None:
        """Take a replica out of the pool and wait until it has nothing in work."""
        self.order(replica, Order(replica.instance, drain=True))
        time.sleep(settle_s)  # balancers need a moment to notice
        end = time.monotonic() + self.timeout_s
        while (running := num_in_work(replica)) != 0:
            if time.monotonic() > end:
                raise StepFailed(
                    f"{replica.name} is drained but has {running} answers in work after {self.timeout_s:g} s"
                )
            time.sleep(self.look_s)


_UNKNOWN = Replica("?", "", 0, 0)


def _state_of(found: Replica | None) -> str:
    if found is None:
        return " (Consul does not know it)"
    return (
        ""
        if found is _UNKNOWN
        else f" (it is {found.state.value}: {found.said[:200] or found.complaint or 'no more is known'})"
    )


def num_in_work(replica: Replica) -> int | None:
    """Answers that it computes or lets wait, by its own word; None when it cannot be asked from here."""
    try:
        body = httpx.get(f"{replica.url}/health", timeout=2.0, verify=False).json()  # noqa: S501  a number, no secret
        return int(body["num_running"]) + int(body["num_waiting"])
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True, slots=True)
class Restart:
    """Drain, run a command, wait for a new process under the same name. `{name}`, `{host}`, `{port}` are filled in.

    expect: what the new process must say of itself (version, model_digest).
    """

    pool: Pool
    command: str
    back: str
    expect: Mapping[str, str] = field(default_factory=dict)
    settle_s: float = 3.0

    def apply(self, replica: Replica) -> None:
        self.pool.drain(replica, self.settle_s)
        self._restart(replica, self.command, self.expect)

    def undo(self, replica: Replica) -> None:
        self._restart(replica, self.back or self.command, {})

    def _restart(self, replica: Replica, command: str, expect: Mapping[str, str]) -> None:
        before = self.pool.wait("is looked up", lambda r: True, replica.name)
        run_command(command, replica)
        instance = before.instance if before is not None else ""

        def is_back(now: Replica | None) -> bool:
            return now is not None and now.instance != instance and now.state is State.PASSING

        now = self.pool.wait("answers again", is_back, replica.name)
        for key, value in expect.items():
            found = str(getattr(now, key))
            if found != value:
                raise StepFailed(f"{replica.name} came back with {key} {found!r} instead of {value!r}")


@dataclass(frozen=True, slots=True)
class SwapAdapters:
    """Serve other adapters, between two steps of the engine; requests go on."""

    pool: Pool
    wanted: Mapping[str, WantedAdapter | None]
    copy: str = ""

    def apply(self, replica: Replica) -> None:
        if self.copy:
            run_command(self.copy, replica)
        self.pool.order(replica, Order(replica.instance, adapters=self.wanted))

    def undo(self, replica: Replica) -> None:
        """`replica` as it was before: its adapters lie where they lay."""
        there = {a.name: WantedAdapter(a.path, a.digest) for a in replica.adapters}
        self.pool.order(replica, Order(replica.instance, adapters={name: there.get(name) for name in self.wanted}))


def run_command(template: str, replica: Replica) -> None:
    """Run a command for one replica, without a shell. Raises StepFailed, UserError for a bad template."""
    values = {"name": replica.name, "host": replica.address, "port": str(replica.port)}
    try:
        words = [word.format(**values) for word in shlex.split(template)]
    except (KeyError, ValueError, IndexError) as e:
        raise UserError(f"command {template!r}: {e}; it may use {{name}}, {{host}} and {{port}}") from None
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)  # noqa: S603
    except OSError as e:
        raise StepFailed(f"{replica.name}: {words[0]}: {e.strerror}") from None
    if done.returncode != 0:
        said = " ".join((done.stderr or done.stdout).split())[-300:]
        raise StepFailed(f"{replica.name}: {shlex.join(words)} ended with {done.returncode}: {said}")


def roll(replicas: Sequence[Replica], change: Change, say: Say) -> None:
    """Change one replica after the other. On the first failure undo what was done, the last first; raises UserError."""
    done: list[Replica] = []
    for replica in replicas:
        say(f"{replica.name}: changing ({len(done) + 1} of {len(replicas)})")
        done.append(replica)
        try:
            change.apply(replica)
        except (PingjiaError, KeyboardInterrupt) as e:
            say(f"{replica.name}: failed: {e or 'interrupted'}")
            back, lost = _undo(done, change, say)
            raise UserError(_verdict(replica, e, back, lost)) from None
        say(f"{replica.name}: ready")


def _undo(done: Sequence[Replica], change: Change, say: Say) -> tuple[list[str], list[str]]:
    back, lost = [], []
    for replica in reversed(done):
        try:
            change.undo(replica)
            back.append(replica.name)
            say(f"{replica.name}: as it was")
        except PingjiaError as e:
            lost.append(replica.name)
            say(f"{replica.name}: could not be put back: {e}")
    return back, lost


def _verdict(replica: Replica, error: BaseException, back: list[str], lost: list[str]) -> str:
    put_back = f"put back: {', '.join(back) or 'nobody'}"
    left = f"; look after {', '.join(lost)}, which could not be" if lost else ""
    return f"stopped at {replica.name}: {error or 'interrupted'}; {put_back}{left}"


def refuse_gap(replicas: Sequence[Replica]) -> None:
    """Raises UserError when nobody would answer while one is changed, or one has failed already."""
    failed = [r.name for r in replicas if r.state is State.FAILED]
    if failed:
        raise UserError(
            f"{', '.join(failed)} cannot answer now; repair or stop it first: a rollout needs all to be ready"
        )
    if sum(r.state is State.PASSING for r in replicas) < 2:
        raise UserError(
            "only one replica is passing: nobody would answer while it restarts; start another, or --allow-gap"
        )
