"""The heartbeat, beat by beat, with a Consul from a script."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest

from pingjia.cluster.consul import ConsulLost, NotRegistered
from pingjia.cluster.member import About, Member, refuse_strangers
from pingjia.cluster.orders import _ORDER, Order, WantedAdapter
from pingjia.cluster.replica import State
from pingjia.cluster.settings import ConsulSettings, MemberSettings
from pingjia.cluster.speed import Rate, Speed
from pingjia.errors import ModelError, UserError
from pingjia.types import EngineStats, ModelCard

SETTINGS = MemberSettings(name="a", address="10.0.0.1", port=8000, beat_s=1.0)


class ScriptedConsul:
    """Keeps what it is told; `fails` is raised by the next calls, one each."""

    def __init__(self) -> None:
        self.there: dict[str, Any] | None = None
        self.num_registered, self.checks = 0, []
        self.order: bytes | None = None
        self.fails: list[Exception] = []

    def _fail(self) -> None:
        if self.fails:
            raise self.fails.pop(0)

    def register(self, definition: dict[str, Any]) -> None:
        self._fail()
        self.there, self.num_registered = definition, self.num_registered + 1

    def own(self, service_id: str) -> dict[str, Any] | None:
        self._fail()
        return self.there

    def set_check(self, check_id: str, status: str, output: str) -> None:
        if self.there is None:
            raise NotRegistered("Unknown check")
        assert check_id == f"service:{self.there['ID']}"
        self.checks.append((status, output))

    def read(self, key: str) -> bytes | None:
        self._fail()
        assert key == "pingjia/pingjia/orders/a"
        return self.order


class Engine:
    """Adapters that load or not."""

    def __init__(self) -> None:
        self.adapters: dict[str, ModelCard] = {}
        self.stats_now = EngineStats()

    def models(self) -> list[ModelCard]:
        return [ModelCard("base", "/m", None, 1, 1, "d" * 64), *self.adapters.values()]

    def stats(self) -> EngineStats:
        return self.stats_now

    def load_adapter(self, name: str, path: str) -> Future[None]:
        future: Future[None] = Future()
        if path == "/bad":
            future.set_exception(ModelError("/bad: not a PEFT adapter"))
        else:
            self.adapters[name] = ModelCard(name, path, "base", 1, 1, path.strip("/") * 32)
            future.set_result(None)
        return future

    def unload_adapter(self, name: str) -> Future[None]:
        del self.adapters[name]
        future: Future[None] = Future()
        future.set_result(None)
        return future


class Scene:
    def __init__(self, **about: Any) -> None:
        self.consul, self.engine, self.complaint = ScriptedConsul(), Engine(), None
        self.speed = Speed([Rate(1, 20.0)])
        self.member = Member(
            SETTINGS, ConsulSettings(), self.engine, About("1", 4, **about), self.speed,
            adapt=self.engine, complaint_of=lambda: self.complaint,
        )  # fmt: skip
        self.member._consul = self.consul  # type: ignore[assignment]

    def beat(self) -> float:
        return self.member._beat()

    def order(self, **what: Any) -> Order:
        order = Order(self.member.instance, **what)
        self.consul.order = _ORDER.dump_json(order)
        return order


@pytest.fixture
def scene():
    return Scene()


def test_written_down_once_and_told_on_every_beat(scene):
    assert [scene.beat() for _ in range(4)] == [1.0] * 4
    assert scene.consul.num_registered == 1
    assert scene.consul.checks == [("passing", "tokens come out")] * 4
    assert scene.consul.there["Weights"]["Passing"] == 200
    scene.complaint = "stuck"
    scene.beat()
    assert scene.consul.checks[-1] == ("critical", "stuck")
    assert scene.consul.num_registered == 2  # the words go with the service: those of a check come late
    assert scene.consul.there["Meta"]["said"] == "stuck"


def test_forgotten_means_written_down_again_at_once(scene):
    scene.beat()
    scene.consul.there = None
    assert scene.beat() == 1.0
    assert scene.consul.num_registered == 2


def test_pauses_grow_are_drawn_and_end(scene):
    scene.beat()
    pauses = []
    for _ in range(12):
        scene.consul.fails = [ConsulLost("refused")]
        pauses.append(scene.beat())
    longest = [min(10.0, 2.0**n) for n in range(12)]
    assert all(high / 2 <= pause <= high for pause, high in zip(pauses, longest, strict=True))
    assert len(set(pauses)) == 12
    assert scene.beat() == 1.0


def test_who_finds_another_under_its_name_leaves_it_alone(scene, caplog):
    scene.beat()
    scene.consul.there = {**scene.consul.there, "Address": "10.0.0.2", "Meta": {"instance": "other"}}
    scene.beat()
    assert scene.consul.num_registered == 1
    assert len(scene.consul.checks) == 1
    assert "another process has taken the name 'a' (10.0.0.2:8000)" in caplog.text


def test_only_news_is_told(scene):
    scene.beat()
    for ratio, num in ((1.03, 1), (0.97, 1), (0.5, 2)):
        scene.speed._ratio = scene.speed._quick = ratio
        scene.beat()
        assert scene.consul.num_registered == num
    assert scene.consul.there["Weights"]["Passing"] == 100
    fixed = Scene(weight=7)
    fixed.beat()
    assert fixed.consul.there["Weights"] == {"Passing": 7, "Warning": 1}


def test_an_order_to_drain_and_back(scene):
    scene.beat()
    order = scene.order(drain=True)
    scene.beat()
    meta = scene.consul.there["Meta"]
    assert (meta["state"], meta["obeyed"], meta["complaint"]) == ("draining", order.id, "")
    assert scene.consul.checks[-1] == ("critical", "drained")
    scene.order()
    scene.beat()
    assert "state" not in scene.consul.there["Meta"]
    assert scene.consul.checks[-1][0] == "passing"
    scene.consul.order = _ORDER.dump_json(Order("another", drain=True))
    scene.beat()
    assert scene.consul.checks[-1][0] == "passing"
    scene.consul.order = b"{"
    assert scene.beat() == 1.0


def test_orders_of_adapters_are_obeyed_once_and_failures_are_said(scene):
    scene.order(adapters={"shop": WantedAdapter("/a1", "a1" * 32)})
    scene.beat()
    scene.beat()
    assert scene.engine.adapters["shop"].root == "/a1"
    order = scene.order(adapters={"shop": WantedAdapter("/b2", "ff" * 32)})  # not what lies there
    scene.beat()
    assert scene.engine.adapters["shop"].root == "/a1"
    meta = scene.consul.there["Meta"]
    assert meta["obeyed"] == order.id
    assert meta["complaint"].startswith("/b2 holds another adapter (b2b2b2b2b2b2) than ordered (ffffffffffff)")
    scene.order(adapters={"shop": WantedAdapter("/bad")})
    scene.beat()
    assert scene.consul.there["Meta"]["complaint"] == "/bad: not a PEFT adapter"
    scene.order(adapters={"shop": None, "never": None})
    scene.beat()
    assert scene.engine.adapters == {}
    assert scene.consul.there["Meta"]["complaint"] == ""


def test_names_and_models(replica):
    base = ModelCard("base", "/m", None, 1, 1, "x" * 64)
    refuse_strangers(SETTINGS, base, [])
    refuse_strangers(SETTINGS, base, [replica("a", state=State.FAILED), replica("b", digest="x" * 64)])
    here = replica("a", address="10.0.0.1", port=8000, digest="y" * 64)
    refuse_strangers(SETTINGS, base, [here])  # the one before us on this port: it is dead
    with pytest.raises(UserError, match=r"a replica called 'a' is in the pool 'pingjia' already, at 10.0.0.9:1"):
        refuse_strangers(SETTINGS, base, [replica("a", address="10.0.0.9", port=1)])
    with pytest.raises(
        UserError, match=r"digest yyyyyyyyyyyy \(at 10.0.0.1:8098\); this one, 'base', has xxxxxxxxxxxx"
    ):
        refuse_strangers(SETTINGS, base, [replica("b", digest="y" * 64)])
