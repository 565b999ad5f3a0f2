"""What nginx gets, and how it gets it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pingjia.cluster.nginx import NginxSettings, read_members, render
from pingjia.cluster.nginx_file import Commands, NginxFile, NginxRefused, NotReloaded
from pingjia.cluster.replica import Replica
from pingjia.errors import UserError

A, B = Replica("a", "10.0.0.1", 8000, 400), Replica("b", "fd00::2", 8001, 93)


def test_the_upstream():
    text = render("shop", [A, B], NginxSettings(listen="8080", longest_answer_s=600))
    assert "server 10.0.0.1:8000 weight=400 max_fails=2 fail_timeout=2s; # a" in text
    assert "server [fd00::2]:8001 weight=93" in text
    for line in (
        "keepalive 64;",
        "proxy_buffering off;",
        "proxy_read_timeout 630s;",
        "proxy_next_upstream error timeout;",
    ):
        assert line in text
    assert "non_idempotent" not in text
    assert "worker_shutdown_timeout" not in text  # belongs into nginx.conf itself
    assert "worker_shutdown_timeout 660s;" in render("shop", [A], NginxSettings(scope="main"))


def test_nobody_is_an_answer_too():
    text = render("shop", [], NginxSettings(listen="8080"))
    assert "server 127.0.0.1:9 down;" in text
    assert "return 503" in text
    assert '"code": "not_ready"' in text


@given(st.lists(st.builds(Replica, name=st.from_regex(r"[a-z0-9][a-z0-9.-]{0,20}", fullmatch=True),
                          address=st.sampled_from(["10.0.0.1", "::1", "h.example"]), port=st.integers(1, 65535),
                          weight=st.integers(1, 65535)), max_size=5))  # fmt: skip
def test_what_was_written_can_be_read(members):
    text = render("pingjia", members, NginxSettings(scope="main", listen="8080"))
    read = read_members(text)
    assert [(r.name, r.authority, r.weight) for r in read] == [(m.name, m.authority, m.weight) for m in members]


@pytest.mark.parametrize(
    "member",
    [
        Replica("a", "10.0.0.1; include /etc/passwd", 1, 1),
        Replica("a\n}", "10.0.0.1", 1, 1),
        Replica("a", "", 1, 1),
        Replica("a", "10.0.0.1", 0, 1),
        Replica("a", "10.0.0.1", 1, 0),
    ],
)
def test_nothing_of_a_registry_becomes_a_directive(member):
    with pytest.raises(UserError, match="replica 'a"):
        render("pingjia", [member], NginxSettings())


@pytest.mark.parametrize("field", ["listen", "server_name", "run_dir"])
def test_settings_are_single_words(field):
    with pytest.raises(pydantic.ValidationError, match="a sign that nginx would read"):
        NginxSettings(**{field: "8080; include /x"})


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in members %}", "the template for nginx is broken: Unexpected end of template.*line 1"),
        ("\n{{ nothing }}", "'nothing' is undefined; it has service, members, settings"),
        ("{{ service.__class__.__mro__ }}", "broken"),
    ],
)
def test_a_broken_template_is_named(template, words):
    with pytest.raises(UserError, match=words):
        render("pingjia", [A], NginxSettings(), template)


@pytest.fixture
def commands(tmp_path: Path):
    """commands(test, reload): shell words that note that they were called."""

    def make(test: str = "true", reload: str = "true") -> Commands:
        log = tmp_path / "calls"
        return Commands(["sh", "-c", f"echo test >> {log}; {test}"], ["sh", "-c", f"echo reload >> {log}; {reload}"])

    return make


def calls(tmp_path: Path) -> list[str]:
    return (tmp_path / "calls").read_text().split() if (tmp_path / "calls").exists() else []


def test_reload_only_on_change(tmp_path, commands):
    file = NginxFile(tmp_path / "pool.conf", commands())
    assert file.put("a\n")
    assert not file.put("a\n")
    assert calls(tmp_path) == ["test", "reload"]
    assert file.put("b\n")
    assert calls(tmp_path) == ["test", "reload"] * 2


def test_what_nginx_refuses_is_put_back(tmp_path, commands):
    path = tmp_path / "pool.conf"
    file = NginxFile(path, commands(f"if grep -q bad {path}; then echo 'unknown directive' >&2; exit 1; fi"))
    with pytest.raises(NginxRefused, match="unknown directive"):
        file.put("bad\n")
    assert not path.exists()
    file.put("good\n")
    with pytest.raises(NginxRefused, match=r"unknown directive.*ended with 1"):
        file.put("bad again\n")
    assert path.read_text() == "good\n"
    assert (tmp_path / "pool.conf.refused").read_text() == "bad again\n"
    assert calls(tmp_path).count("reload") == 1
    assert {p.name for p in tmp_path.iterdir()} == {"pool.conf", "pool.conf.refused", "calls"}  # nothing half-written


def test_a_reload_that_failed_is_tried_again(tmp_path, commands):
    path, flag = tmp_path / "pool.conf", tmp_path / "runs"
    file = NginxFile(path, commands(reload=f"test -e {flag}"))
    with pytest.raises(NotReloaded, match="ended with 1"):
        file.put("a\n")
    assert path.read_text() == "a\n"
    flag.touch()
    assert file.put("a\n")
    assert not file.put("a\n")


def test_no_nginx_at_all(tmp_path):
    with pytest.raises(NginxRefused, match="no command 'no-such-nginx' here; install nginx"):
        NginxFile(tmp_path / "x", Commands(["no-such-nginx", "-t"], [])).put("a\n")


@pytest.mark.parametrize("members", [[], [A], [A, B]])
@pytest.mark.parametrize("listen", ["", "127.0.0.1:18080"])
def test_the_real_nginx_takes_it(tmp_path, members, listen, need):
    need("nginx")
    whole = tmp_path / "nginx.conf"
    whole.write_text(render("pingjia", members, NginxSettings(scope="main", listen=listen, run_dir=str(tmp_path))))
    done = subprocess.run(["/usr/sbin/nginx", "-t", "-c", whole], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    part = tmp_path / "part.conf"
    part.write_text(render("pingjia", members, NginxSettings(listen=listen)))
    whole.write_text(f"pid {tmp_path}/nginx.pid; events {{}} http {{ include {part}; }}")
    done = subprocess.run(["/usr/sbin/nginx", "-t", "-c", whole], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
