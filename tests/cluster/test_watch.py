"""Consul -> nginx's file, with a Consul that answers from a script and a clock that is turned by hand."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from pingjia.cluster.consul import Answer, ConsulLost
from pingjia.cluster.nginx import NginxSettings, read_members
from pingjia.cluster.nginx_file import Commands, NginxFile
from pingjia.cluster.pool import HOLD_S
from pingjia.cluster.watch import Pace, Watch
from pingjia.errors import UserError


@dataclass
class ScriptedConsul:
    """`answers`: what each query gets, an exception or (index, replicas); the last one stops the watch."""

    answers: list[Any] = field(default_factory=list)
    watch: Any = None
    asked: list[int] = field(default_factory=list)

    def health(self, service: str, *, index: int = 0, wait_s: float = 0.0) -> Answer:
        self.asked.append(index)
        answer = self.answers.pop(0)
        if not self.answers and self.watch is not None:
            self.watch._stopping.set()
        if isinstance(answer, Exception):
            raise answer
        number, names = answer
        return Answer([entry(name) for name in names], number)


def entry(name: str) -> dict[str, Any]:
    """`a`: passing; `a!`: failing; `a=50`: of that weight."""
    name, _, weight = name.partition("=")
    status = "critical" if name.endswith("!") else "passing"
    name = name.rstrip("!")
    service = {"ID": name, "Address": "10.0.0.1", "Port": 8000 + ord(name), "Weights": {"Passing": int(weight or 10)}}
    return {"Node": {"Address": "10.9.9.9"}, "Service": {**service, "Meta": {}}, "Checks": [{"Status": status}]}


class Scene:
    def __init__(self, path: Any) -> None:
        self.now, self.consul = 1000.0, ScriptedConsul()
        self.file = NginxFile(path, Commands([], []))
        self.watch = self.new_watch()

    def new_watch(self) -> Watch:
        made = Watch(self.consul, "pool", self.file, NginxSettings(), clock=lambda: self.now)  # type: ignore[arg-type]
        self.consul.watch = made
        return made

    def see(self, index: int | Exception, *names: str, after_s: float = 60.0) -> str:
        """Let the watch see this once; who is in the file then."""
        self.now += after_s
        self.consul.answers = [index if isinstance(index, Exception) else (index, names)]
        self.watch._stopping.clear()
        seen = self.watch._ask([])
        self.watch._stopping.clear()
        if seen:
            self.watch._follow(seen)
        elif not isinstance(index, Exception):
            self.watch._follow([])
        return self.members

    @property
    def members(self) -> str:
        return " ".join(member.name for member in read_members(self.file.read() or ""))


@pytest.fixture
def scene(tmp_path):
    return Scene(tmp_path / "pool.conf")


def test_it_follows(scene):
    assert scene.see(5, "a", "b") == "a b"
    assert scene.see(6, "a", "b!") == "a"
    assert scene.see(7, "a", "b", "c") == "a b c"
    assert scene.see(8) == "a b c"  # several at once: Consul forgot
    assert scene.see(9, after_s=HOLD_S + 1) == ""


def test_a_consul_that_is_away_changes_nothing(scene):
    assert scene.see(5, "a", "b") == "a b"
    assert scene.see(ConsulLost("no leader")) == "a b"
    assert scene.see(6, "a", "b") == "a b"


def test_a_consul_that_began_anew_is_given_time(scene):
    assert scene.see(500, "a", "b", "c") == "a b c"
    assert scene.see(12, "b") == "a b c"
    assert scene.see(13, "b", "c", after_s=2.0) == "a b c"
    assert scene.see(14, "b", "c", after_s=HOLD_S) == "b c"  # a has had its time


def test_a_new_watch_knows_who_was_in_force(scene):
    scene.see(5, "a", "b")
    scene.watch = scene.new_watch()
    assert scene.see(6, "a!", "b!") == "a b"  # nobody is heard of: as it was


def test_reloads_keep_their_pace(replica):
    pace, ab = Pace(), [replica("a", weight=100), replica("b", weight=100)]
    assert pace.due(ab[:1], ab, 50.0) == 51.0
    assert pace.due([ab[0], replace(ab[1], weight=50)], ab, 50.0) == 53.0
    assert pace.due([ab[0], replace(ab[1], weight=110)], ab, 50.0) == 60.0


def test_weights_wait_for_their_time_and_members_do_not(scene):
    scene.see(5, "a=100", "b=100")
    scene.see(6, "a=100", "b=110", after_s=1.0)
    assert [m.weight for m in read_members(scene.file.read())] == [100, 100]
    scene.see(7, "a=100", "b=110", after_s=10.0)
    assert [m.weight for m in read_members(scene.file.read())] == [100, 110]


def test_once_says_when_consul_cannot_be_asked(scene):
    scene.consul.answers = [ConsulLost("Consul at x: refused")]
    with pytest.raises(UserError, match="Consul at x: refused"):
        scene.watch.once()
