"""The files in deploy/ are what their servers take, and say the same as our own template."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from pingjia.cluster.nginx import NginxSettings, render
from pingjia.cluster.replica import Replica
from pingjia.gateway.settings import GatewaySettings

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
FILES = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
VERSIONS = ("1.31", "1.35")


def documents(file: Path) -> list[Any]:
    return list(yaml.safe_load_all(file.read_text(encoding="utf-8")))


def kinds() -> dict[str, Any]:
    return {document["kind"]: document for document in documents(DEPLOY / "kubernetes" / "pingjia.yaml")}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_manifests_keep_to_kubernetes_schemas(file, version):
    judge = pytest.importorskip("kubernetes_validate")
    for document in documents(file):
        judge.validate(document, version, strict=True)


def test_the_judge_sees_mistakes():
    judge = pytest.importorskip("kubernetes_validate")
    document = kinds()["Deployment"]
    document["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(judge.ValidationError):
        judge.validate(document, VERSIONS[-1], strict=True)


def test_manifests_fit_each_other_and_the_server():
    found = kinds()
    assert set(found) == {"Deployment", "Service", "HorizontalPodAutoscaler", "PodDisruptionBudget",
                          "PersistentVolumeClaim"}  # fmt: skip
    spec = found["Deployment"]["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
    for selector in (
        found["Deployment"]["spec"]["selector"]["matchLabels"],
        found["Service"]["spec"]["selector"],
        found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
    ):
        assert selector.items() <= labels.items()
    assert found["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"] == found["Deployment"]["metadata"]["name"]
    assert container["readinessProbe"]["httpGet"]["path"] == "/health/ready"
    assert container["livenessProbe"]["httpGet"]["path"] == "/health/live"
    pause_s = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert spec["terminationGracePeriodSeconds"] > pause_s + GatewaySettings().drain_s
    claims = [v["persistentVolumeClaim"]["claimName"] for v in spec["volumes"] if "persistentVolumeClaim" in v]
    assert claims == [found["PersistentVolumeClaim"]["metadata"]["name"]]
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in spec["volumes"]}


def test_the_autoscaler_asks_for_a_metric_that_there_is():
    from pingjia.engine_metrics import EngineCollector
    from pingjia.types import EngineStats

    (metric,) = kinds()["HorizontalPodAutoscaler"]["spec"]["metrics"]
    name = metric["pods"]["metric"]["name"]
    collector = EngineCollector(EngineStats, lambda: True)
    assert name in [found.name for found in collector.collect()]
    assert name in documents(DEPLOY / "kubernetes" / "prometheus-adapter.yaml")[0]["data"]["config.yaml"]


def directives(text: str) -> list[str]:
    lines = (re.sub(r"\s*#.*$", "", line).strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("server ")]


def test_the_template_for_consul_template_says_the_same_as_ours():
    source = (DEPLOY / "consul-template" / "pingjia.conf.ctmpl").read_text(encoding="utf-8")
    assert [word for word in re.findall(r"\{\{-? (\w+|/\*)", source)] == ["/*", "range", "else", "end"]
    row = re.search(r"^    (server \{\{.*)$", source, re.MULTILINE)
    assert row is not None
    filled = re.sub(r"\{\{ \.(\S+) \}\}", lambda m: {"Address": "10.0.0.1", "Port": "8000", "Weights.Passing": "40",
                                                     "ServiceMeta.name": "a"}[m[1]], row[1])  # fmt: skip
    three = [Replica(n, "10.0.0.1", 8000 + i, 40) for i, n in enumerate("abc")]
    ours = render("pingjia", three, NginxSettings(listen="8080"))
    assert filled in ours
    bare = re.sub(r"\{\{.*?\}\}", "", source, flags=re.DOTALL)
    assert directives(bare) == directives(ours)


def test_nginx_takes_the_whole_configuration(need, tmp_path):
    need("nginx")
    source = (DEPLOY / "nginx" / "nginx.conf").read_text(encoding="utf-8")
    (tmp_path / "pool.conf").write_text(
        render("pingjia", [Replica("a", "10.0.0.1", 80, 1)], NginxSettings(listen="8080"))
    )
    source = source.replace("/etc/nginx/conf.d/*.conf", f"{tmp_path}/pool.conf").replace(
        "/var/log/nginx", str(tmp_path)
    )
    (tmp_path / "nginx.conf").write_text(source.replace("/run/nginx.pid", f"{tmp_path}/nginx.pid"))
    nginx = shutil.which("nginx", path="/usr/sbin:/usr/bin")
    done = subprocess.run([nginx, "-t", "-c", tmp_path / "nginx.conf"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    longest_s = int(re.search(r"worker_shutdown_timeout (\d+)s", source)[1])
    assert longest_s > GatewaySettings().deadline_s


def test_units_and_scripts_name_options_that_there_are():
    import shlex

    import typer

    from pingjia.cli.main import app

    for unit in (DEPLOY / "nginx").glob("*.service"):
        words = shlex.split(re.search(r"^ExecStart=\S+/pingjia (.*)$", unit.read_text(), re.MULTILINE)[1])
        command = typer.main.get_command(app)
        while hasattr(command, "commands"):
            command, words = command.commands[words[0]], words[1:]
        command.make_context("pingjia", words)
