"""Dashboard and alerts: every name and label they use is one that our processes really tell."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import yaml

from pingjia.gateway.settings import GatewaySettings
from pingjia.queue.job import Claim, End, Job
from pingjia.types import Request, Sampling
from pingjia.worker.health import Health, served

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
ALERTS = yaml.safe_load((DEPLOY / "prometheus-alerts.yml").read_text())
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
# What Prometheus itself adds.
ADDED = {"instance", "job", "le"}
METRIC = re.compile(r"\b(pingjia_\w+)(?:\{([^}]*)\})?")
LABEL = re.compile(r'(\w+)\s*(?:=~|!=|!~|=)\s*"')
GROUPED = re.compile(r"\bby\s*\(([^)]*)\)")


def expressions() -> list[str]:
    panels = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    return panels + [rule["expr"] for rule in RULES]


@pytest.fixture(scope="module")
def scraped():
    """Names of series -> labels, of a gateway and a worker that have done something."""
    gateway_tests = sys.modules["conftest_of_gateway"]
    with gateway_tests.running(GatewaySettings(port=0, access_log=False, language={"detect": True})) as gateway:
        gateway.chat("hi")
        gateway.chat("hi")
        gateway.chat("hi", temperature=-1)
        job = gateway.http.post(
            "/v1/chat/completions",
            json={"model": "base", "messages": [{"role": "user", "content": "x"}]},
            headers={"prefer": "respond-async"},
        ).headers["location"]
        gateway_tests.wait_until(lambda: gateway.http.get(job).json()["status"] == "completed", "the job ends")
        told = lambda: gateway.http.get("/metrics").text  # noqa: E731
        gateway_tests.wait_until(lambda: 'queue_ended_total{how="done"}' in told(), "the gateway looked at its queue")
        texts = [told()]
    texts.append(worker_metrics(gateway.backend))
    found: dict[str, set[str]] = {}
    for line in "\n".join(texts).splitlines():
        match = re.match(r"(\w+)(?:\{(.*)\})? ", line)
        if match and not line.startswith("#"):
            found.setdefault(match[1], set()).update(re.findall(r'(\w+)="', match[2] or ""))
    return found


def worker_metrics(backend) -> str:
    health = Health()
    health.loaded(backend)
    health.on_claim(Claim(Job(Request("r", (1,), Sampling())), 1, 1.0))
    health.on_end(End("done"))
    with served(health, "127.0.0.1", 0) as url:
        return httpx.get(f"{url}/metrics").text


@pytest.mark.parametrize("expression", expressions())
def test_names_and_labels_are_told(scraped, expression):
    used = METRIC.findall(expression)
    assert used or "up{" in expression
    for name, selectors in used:
        assert name in scraped, f"{name} is told by nobody"
        for label in LABEL.findall(selectors):
            assert label in scraped[name] | ADDED, f"{name} has no label {label}"
    names = [name for name, _ in used]
    for group in GROUPED.findall(expression):
        for label in filter(None, re.split(r"[\s,]+", group)):
            assert any(label in scraped[name] | ADDED for name in names), label


def promtool(*words: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("promtool") is None:
        pytest.skip("NOT TESTED: there is no promtool here; see tests/debian-packages.txt")
    return subprocess.run(["promtool", *words], capture_output=True, text=True, cwd=DEPLOY, timeout=60)


@pytest.mark.parametrize(
    "words",
    [
        ("check", "rules", "prometheus-alerts.yml"),
        ("check", "config", "--syntax-only", "prometheus.yml"),
        ("test", "rules", "prometheus-alerts-test.yml"),
    ],
)
def test_promtool_says_yes(words):
    done = promtool(*words)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_would_say_no(tmp_path):
    (tmp_path / "rules.yml").write_text((DEPLOY / "prometheus-alerts.yml").read_text().replace("> 60", "> 6000"))
    cases = (DEPLOY / "prometheus-alerts-test.yml").read_text().replace("prometheus-alerts.yml", "rules.yml")
    (tmp_path / "cases.yml").write_text(cases)
    done = promtool("test", "rules", str(tmp_path / "cases.yml"))
    assert done.returncode == 1
    assert "PingjiaQueueOld" in done.stdout + done.stderr


def test_every_alert_is_tried_and_says_what_is_wrong():
    cases = (DEPLOY / "prometheus-alerts-test.yml").read_text()
    names = [rule["alert"] for rule in RULES]
    assert len(names) == len(set(names)) >= 10
    for rule in RULES:
        assert rule["alert"] in cases
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert len(rule["annotations"]["summary"]) > 20


def test_the_dashboard_is_whole():
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        columns, rows = (range(place[a], place[a] + place[b]) for a, b in (("x", "w"), ("y", "h")))
        cells = {(x, y) for x in columns for y in rows}
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
        assert panel["datasource"]["uid"] == "${datasource}", "no data source of one installation"
        references = [target["refId"] for target in panel["targets"]]
        assert len(references) == len(set(references)) > 0
        for target in panel["targets"]:
            used = set(re.findall(r"\$(\w+)", target["expr"])) - {"__rate_interval"}
            assert used <= variables
