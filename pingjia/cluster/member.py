"""A replica's place in a pool: written down in Consul, kept alive by a heartbeat, given up before the process ends.

A thread of its own asks the replica's own /health/ready on every beat, over HTTP as a client would, so that a stuck
event loop, a dead engine and a frozen process all end in silence, and Consul counts silence as failure. Consul may be
restarted, lose its memory or be away for hours: the replica goes on serving and writes itself down again.
"""

from __future__ import annotations

import logging
import random
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, Protocol

import httpx

from pingjia.cluster.consul import Consul, ConsulLost, ConsulRefused, NotRegistered
from pingjia.cluster.orders import Order, WantedAdapter, key_of, read_order
from pingjia.cluster.replica import Replica, State, meta_of, read_replicas, weight_of
from pingjia.cluster.settings import ConsulSettings, MemberSettings
from pingjia.cluster.speed import Speed, is_news
from pingjia.errors import PingjiaError, UserError
from pingjia.types import EngineStats, ModelCard

log = logging.getLogger("pingjia.cluster")

_MAX_PAUSE_S = 10.0
_ADAPT_S = 300.0  # the longest an adapter may take to load


class Subject(Protocol):
    """What is kept in the pool: a worker in this process."""

    def models(self) -> list[ModelCard]: ...

    def stats(self) -> EngineStats: ...


class Adaptable(Protocol):
    """What can be told to serve other adapters while it runs."""

    def load_adapter(self, name: str, path: str) -> Future[None]: ...

    def unload_adapter(self, name: str) -> Future[None]: ...


@dataclass(frozen=True, slots=True)
class About:
    """What does not change while the process lives. weight: fixed by hand, instead of the measured one.

    is_balanced: requests come through the pool. False for a worker that takes them from a queue by itself.
    """

    version: str
    seats: int
    weight: int | None = None
    is_balanced: bool = True


class Member:
    """One replica in one pool. `check` before serving, `start` when requests are taken, `stop` before they are not."""

    def __init__(
        self,
        settings: MemberSettings,
        consul: ConsulSettings,
        subject: Subject,
        about: About,
        speed: Speed,
        *,
        adapt: Adaptable | None = None,
        complaint_of: Callable[[], str | None] | None = None,
    ) -> None:
        self.settings = settings
        self.instance = uuid.uuid4().hex
        self._consul = Consul(consul)
        self._subject = subject
        self._about = about
        self._speed = speed
        self._adapt = adapt
        self._complaint_of = complaint_of
        self._order = Order(self.instance, id="")
        self._complaint = ""
        self._published: dict[str, Any] | None = None
        self._num_failures = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pingjia-member", daemon=True)

    def check(self) -> None:
        """Return if the pool would take this replica. Raises UserError: its name is taken, its model is another."""
        base = self._subject.models()[0]
        refuse_strangers(self.settings, base, self._pool())

    def start(self, url: str) -> None:
        """Begin to beat, now that `url` (where the server listens) takes requests. Returns at once."""
        self._complaint_of = self._complaint_of or HealthProbe(url, self.settings.ttl_s / 3)
        self._thread.start()

    def stop(self) -> None:
        """Leave Consul, and wait `leave_s` so that balancers send nothing more. Blocks."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(self.settings.beat_s + 2 * self._consul.settings.timeout_s)
            self._leave()
            if self._about.is_balanced:
                threading.Event().wait(self.settings.leave_s)
        self._consul.close()

    def _pool(self) -> list[Replica]:
        try:
            return read_replicas(self._consul.health(self.settings.service).body)
        except (ConsulLost, NotRegistered) as e:
            raise UserError(f"{e}; the pool {self.settings.service!r} must be known before joining it") from None

    # ---- in the thread

    def _run(self) -> None:
        while not self._stopping.wait(self._beat()):
            pass

    def _beat(self) -> float:
        """One beat; returns the seconds until the next."""
        try:
            self._speed.observe(self._subject.stats())
            self._obey()
            # Drained is failing, too: whoever reads only Consul's checks sends nothing more either.
            complaint = "drained" if self._order.drain else self._ask_health()
            self._write_down(complaint)
            self._tell(complaint)
        except NotRegistered:
            self._published = None  # written down again at once
            return 0.0 if self._fail("Consul has forgotten this replica") == 1 else self._pause_s()
        except (ConsulLost, ConsulRefused) as e:
            self._fail(str(e))
            return self._pause_s()
        except Exception:
            log.exception("a beat failed")
            self._fail("a beat failed")
            return self._pause_s()
        if self._num_failures:
            log.info("%s is in the pool %s again", self.settings.name, self.settings.service)
        self._num_failures = 0
        return self.settings.beat_s

    def _ask_health(self) -> str | None:
        return self._complaint_of() if self._complaint_of else None

    def _fail(self, why: str) -> int:
        if not self._num_failures:
            log.warning("%s; the replica goes on serving and tries again", why)
        self._num_failures += 1
        return self._num_failures

    def _pause_s(self) -> float:
        # Drawn, so that a hundred replicas do not come back to a restarted Consul in one moment.
        longest = min(_MAX_PAUSE_S, self.settings.beat_s * 2.0 ** min(self._num_failures - 1, 10))
        return random.uniform(0.5, 1.0) * longest  # noqa: S311

    def _obey(self) -> None:
        order = read_order(self._consul, self.settings.service, self.settings.name, self.instance)
        if order is None or order.id == self._order.id:
            return
        log.info("order %s: drain %s, adapters %s", order.id, order.drain, ", ".join(order.adapters) or "as they are")
        self._order, self._complaint = order, ""
        if order.drain and not self._about.is_balanced:
            self._order = replace(order, drain=False)
            self._complaint = "takes its requests from a queue: end it with SIGTERM, it finishes what it has begun"
        try:
            for name, wanted in order.adapters.items():
                self._serve_adapter(name, wanted)
        except Exception as e:
            self._complaint = f"{type(e).__name__}: {e}" if not isinstance(e, PingjiaError) else str(e)
            log.error("order %s could not be obeyed: %s", order.id, self._complaint)

    def _serve_adapter(self, name: str, wanted: WantedAdapter | None) -> None:
        if self._adapt is None:
            raise UserError("this replica cannot change its adapters while it runs")
        there = {card.id: card for card in self._subject.models() if card.parent is not None}
        if wanted is None:
            if name in there:
                self._adapt.unload_adapter(name).result(_ADAPT_S)
            return
        if wanted.digest and name in there and there[name].digest == wanted.digest:
            return
        self._adapt.load_adapter(name, wanted.path).result(_ADAPT_S)
        found = next(card.digest for card in self._subject.models() if card.id == name)
        if wanted.digest and found != wanted.digest:
            self._put_back(name, there.get(name))
            raise UserError(
                f"{wanted.path} holds another adapter ({found[:12]}) than ordered ({wanted.digest[:12]}); copy it again"
            )

    def _put_back(self, name: str, before: ModelCard | None) -> None:
        """Whatever was served under the name, as far as it still lies where it was."""
        assert self._adapt is not None
        if before is not None:
            self._adapt.load_adapter(name, before.root).result(_ADAPT_S)
        else:
            self._adapt.unload_adapter(name).result(_ADAPT_S)

    def _write_down(self, complaint: str | None) -> None:
        definition = self._definition(complaint)
        there = self._consul.own(self.settings.id) if self._published is not None else None
        if there is not None and (there.get("Meta") or {}).get("instance") != self.instance:
            raise ConsulRefused(
                f"another process has taken the name {self.settings.name!r} ({there.get('Address')}:{there.get('Port')}"
                "); start one of them with another --name"
            )
        if there is None or definition != self._published:
            self._consul.register({**definition, "Check": self._check(complaint)})
            self._published = definition

    def _tell(self, complaint: str | None) -> None:
        status = "critical" if complaint else "passing"
        self._consul.set_check(f"service:{self.settings.id}", status, complaint or "tokens come out")

    def _check(self, complaint: str | None) -> dict[str, Any]:
        return {
            "Name": "tokens come out",
            "TTL": f"{self.settings.ttl_s}s",
            "Status": "critical" if complaint else "passing",
            "DeregisterCriticalServiceAfter": f"{self.settings.forget_after_s}s",
        }

    def _definition(self, complaint: str | None) -> dict[str, Any]:
        weight = self._weight()
        more = {"name": self.settings.name, "instance": self.instance, "scheme": self.settings.scheme}
        # What a check says reaches Consul's other readers only with a new state, or after minutes.
        more |= {"obeyed": self._order.id, "complaint": self._complaint, "said": (complaint or "")[:200]}
        if self._order.drain:
            more["state"] = State.DRAINING.value
        # As it was when the weight was published: a rate in every beat would wake every watcher.
        rate = self._speed.tokens_per_s if self._about.weight else weight / 10
        return {
            "ID": self.settings.id,
            "Name": self.settings.service,
            "Address": self.settings.address,
            "Port": self.settings.port,
            "Tags": [],
            "Meta": meta_of(
                self._subject.models(),
                version=self._about.version,
                tokens_per_s=rate,
                seats=self._about.seats,
                more=more,
            ),
            "Weights": {"Passing": weight, "Warning": 1},
        }

    def _weight(self) -> int:
        if self._about.weight:
            return self._about.weight
        weight = weight_of(self._speed.tokens_per_s)
        if self._published is None:
            return weight
        there: int = self._published["Weights"]["Passing"]
        return weight if is_news(there, weight) else there

    def _leave(self) -> None:
        try:
            self._consul.deregister(self.settings.id)
            self._consul.delete(key_of(self.settings.service, self.settings.name))
        except PingjiaError as e:
            log.warning("%s; Consul will find out in %g s by itself", e, self.settings.ttl_s)


class HealthProbe:
    """Asks the replica's own /health/ready where it listens, as a client would."""

    def __init__(self, url: str, timeout_s: float) -> None:
        here = url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
        self._url = f"{here}/health/ready"
        self._client = httpx.Client(timeout=timeout_s, trust_env=False)

    def __call__(self) -> str | None:
        """None when a token could come out now; else what stands against it."""
        try:
            response = self._client.get(self._url)
        except httpx.HTTPError as e:
            return f"its own /health/ready cannot be asked: {type(e).__name__}"
        return None if response.status_code == 200 else f"/health/ready answers {response.status_code}"


def refuse_strangers(settings: MemberSettings, base: ModelCard, pool: list[Replica]) -> None:
    """Raises UserError for a name that another living replica has, or a model that the pool does not serve."""
    for other in (r for r in pool if r.state is not State.FAILED):
        is_here = (other.address, other.port) == (settings.address, settings.port)  # we hold the port: it is dead
        if other.name == settings.name and not is_here:
            raise UserError(
                f"a replica called {settings.name!r} is in the pool {settings.service!r} already, at "
                f"{other.authority}; give this one another --name"
            )
        if not is_here and base.digest and other.model_digest not in ("", base.digest):
            raise UserError(
                f"the pool {settings.service!r} serves the model {other.model!r} with digest "
                f"{other.model_digest[:12]} (at {other.authority}); this one, {base.id!r}, has {base.digest[:12]}. "
                "Replicas of one pool answer alike: use the same weights and bits, or another --service"
            )
