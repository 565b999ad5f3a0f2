"""One after the other, and back again."""

from __future__ import annotations

import pytest

from pingjia.cluster.replica import State
from pingjia.cluster.rollout import StepFailed, refuse_gap, roll, run_command
from pingjia.errors import UserError


class Script:
    """A change that fails where it is told to."""

    def __init__(self, fails_at: str = "", cannot_undo: str = "") -> None:
        self.fails_at, self.cannot_undo, self.did = fails_at, cannot_undo, []

    def apply(self, replica):
        self.did.append(f"+{replica.name}")
        if replica.name == self.fails_at:
            raise StepFailed(f"{replica.name} came back wrong")

    def undo(self, replica):
        self.did.append(f"-{replica.name}")
        if replica.name == self.cannot_undo:
            raise StepFailed("no")


def test_all_in_order(replica):
    script, said = Script(), []
    roll([replica("a"), replica("b"), replica("c")], script, said.append)
    assert script.did == ["+a", "+b", "+c"]
    assert said[-1] == "c: ready"


def test_the_first_failure_stops_and_what_was_done_is_undone_the_last_first(replica):
    script = Script(fails_at="b")
    with pytest.raises(UserError, match=r"stopped at b: b came back wrong; put back: b, a$"):
        roll([replica("a"), replica("b"), replica("c")], script, lambda line: None)
    assert script.did == ["+a", "+b", "-b", "-a"]


def test_one_that_cannot_be_put_back_is_named_and_the_others_are(replica):
    script = Script(fails_at="c", cannot_undo="b")
    with pytest.raises(UserError, match="put back: c, a; look after b, which could not be"):
        roll([replica("a"), replica("b"), replica("c")], script, lambda line: None)


def test_nobody_is_left_without_an_answer(replica):
    with pytest.raises(UserError, match="only one replica is passing"):
        refuse_gap([replica("a"), replica("b", state=State.DRAINING)])
    with pytest.raises(UserError, match="b cannot answer now; repair or stop it first"):
        refuse_gap([replica("a"), replica("b", state=State.FAILED), replica("c")])
    refuse_gap([replica("a"), replica("b")])


def test_commands(replica, tmp_path):
    one = replica("a", address="10.0.0.7", port=81)
    run_command(f"touch {tmp_path}/{{name}}-{{host}}-{{port}}", one)
    assert (tmp_path / "a-10.0.0.7-81").exists()
    with pytest.raises(StepFailed, match="a: sh -c 'echo no >&2; exit 3' ended with 3: no"):
        run_command("sh -c 'echo no >&2; exit 3'", one)
    with pytest.raises(StepFailed, match="No such file"):
        run_command("/no/such/command", one)
    for bad in ("ssh {hots} x", "echo 'x", "echo {"):
        with pytest.raises(UserError, match=r"it may use \{name\}, \{host\} and \{port\}"):
            run_command(bad, one)
