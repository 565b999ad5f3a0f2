"""Replicas and a real Consul: coming, going, being refused; a Consul that restarts, forgets, or asks for a token."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import time
from pathlib import Path

import httpx
import pytest
from servers import ConsulServer, Replicas, free_ports, until

from pingjia.cluster import Consul, ConsulSettings, check_consul, from_environment, read_replicas
from pingjia.cluster.consul import ConsulLost, ConsulRefused, NotRegistered
from pingjia.cluster.orders import Order, WantedAdapter, give
from pingjia.cluster.replica import State
from pingjia.cluster.rollout import Pool
from pingjia.errors import UserError


@pytest.fixture
def client(consul: ConsulServer):
    made = Consul(ConsulSettings(url=consul.url))
    yield made
    made.close()


@pytest.fixture
def pool(client):
    """pool("name") -> its replicas as Consul shows them."""
    return lambda service: read_replicas(client.health(service).body)


def test_a_replica_comes_tells_what_it_is_and_goes(start, pool):
    process = start("a", service="one", tokens_per_s=120.0, seats=6, leave_s=5.0)
    (replica,) = until(lambda: pool("one"), "a replica in the pool")
    assert replica.state is State.PASSING
    assert 10 < replica.tokens_per_s < 500  # measured on a machine that others use
    assert replica.weight == pytest.approx(replica.tokens_per_s * 10, rel=0.01)
    assert (replica.model, replica.model_digest, replica.seats, replica.version) == ("stub", "d" * 64, 6, "1")
    process.send_signal(signal.SIGTERM)
    until(lambda: not pool("one"), "its leaving", 10.0)
    assert process.poll() is None  # still answers: balancers have not noticed yet
    assert httpx.get(f"{replica.url}/health", trust_env=False).status_code == 200
    assert process.wait(30) == 0


def test_a_killed_one_fails_and_a_name_is_free_again_then(start, pool):
    process = start("a", service="two", ttl_s=1.0, beat_s=0.25)
    until(lambda: pool("two"), "a replica in the pool")
    process.send_signal(signal.SIGKILL)
    until(lambda: pool("two")[0].state is State.FAILED, "its failing", 5.0)
    start("a", service="two", port=free_ports(1)[0], ttl_s=1.0, beat_s=0.25)
    until(lambda: pool("two")[0].state is State.PASSING, "its return")


def test_doubles_and_strangers_are_refused(start, pool, processes, consul):
    start("a", service="three")
    until(lambda: pool("three"), "a replica in the pool")
    others = Replicas(processes, consul.url, leave_s=0.5)
    twin = others.start("a", service="three", wait=False)
    stranger = others.start("b", service="three", digest="e" * 64, wait=False)
    assert twin.wait(30) != 0
    assert stranger.wait(30) != 0
    assert "a replica called 'a' is in the pool 'three' already" in processes.log("a").read_text()
    said = processes.log("b").read_text()
    assert "digest dddddddddddd" in said
    assert "has eeeeeeeeeeee. Replicas of one pool answer alike" in said


def test_orders_drain_and_adapters(start, client, pool, tmp_path):
    start("a", service="four")
    (before,) = until(lambda: pool("four"), "a replica in the pool")
    operator = Pool(client, "four", timeout_s=10.0, look_s=0.05)
    operator.drain(before, settle_s=0.0)
    (drained,) = pool("four")
    assert drained.state is State.DRAINING
    assert operator.order(drained, Order(drained.instance)).state is State.PASSING
    (tmp_path / "digest").write_text("f" * 64)
    wanted = {"shop": WantedAdapter(str(tmp_path), "f" * 64)}
    (adapter,) = operator.order(drained, Order(drained.instance, adapters=wanted)).adapters
    assert (adapter.name, adapter.digest, adapter.path) == ("shop", "f" * 64, str(tmp_path))
    with pytest.raises(Exception, match=r"holds another adapter \(ffffffffffff\) than ordered \(000000000000\)"):
        operator.order(drained, Order(drained.instance, adapters={"new": WantedAdapter(str(tmp_path), "0" * 64)}))
    assert [a.name for a in pool("four")[0].adapters] == ["shop"]  # what was not as ordered is not served
    give(client, "four", "a", Order("another process", drain=True))
    time.sleep(1.5)
    assert pool("four")[0].state is State.PASSING  # an order is for one process
    operator.order(drained, Order(drained.instance, adapters={"shop": None}))
    assert pool("four")[0].adapters == ()


def test_one_that_cannot_answer_is_not_passing(start, pool):
    start("a", service="five", fails=True)
    (replica,) = until(lambda: pool("five"), "a replica in the pool")
    assert replica.state is State.FAILED
    until(lambda: "/health/ready" in pool("five")[0].said, "why")


def test_consul_restarts_and_forgets_and_the_replicas_come_back(need, processes, tmp_path):
    need("consul")
    server = ConsulServer(processes)
    server.start()
    Replicas(processes, server.url).start("a", beat_s=0.3)
    client = Consul(ConsulSettings(url=server.url))

    def is_there() -> bool:
        try:
            return [r.state for r in read_replicas(client.health("pingjia").body)] == [State.PASSING]
        except ConsulLost:
            return False

    until(is_there, "a replica in the pool")
    for forgets in (False, True):
        server.stop()
        time.sleep(1.0)
        if forgets:
            server.forget()
        server.start()
        until(is_there, "its return", 15.0)
    client.close()
    assert "goes on serving and tries again" in processes.log("a").read_text()


def test_a_token_is_needed_where_consul_wants_one(need, processes):
    need("consul")
    secret = "11111111-2222-3333-4444-555555555555"
    server = ConsulServer(
        processes,
        more=f'acl {{ enabled = true default_policy = "deny" tokens {{ master = "{secret}" agent = "{secret}" }} }}\n',
    )
    server.start()
    nobody, somebody = Consul(ConsulSettings(url=server.url)), Consul(ConsulSettings(url=server.url, token=secret))
    definition = {"ID": "x", "Name": "x", "Port": 1}
    with pytest.raises(ConsulRefused, match="give a token that may: CONSUL_HTTP_TOKEN or CONSUL_HTTP_TOKEN_FILE"):
        nobody.register(definition)

    def registers() -> bool:
        try:
            somebody.register(definition)
        except (ConsulLost, ConsulRefused):  # the token itself is made some moments after the leader
            return False
        return True

    until(registers, "the token to work")
    assert somebody.own("x") is not None
    assert nobody.health("x").body == []  # Consul shows nothing to those who may not see
    # A replica with no more rights than deploy/consul/policy.hcl gives it.
    admin = httpx.Client(base_url=server.url, headers={"X-Consul-Token": secret}, trust_env=False)
    rules = (Path(__file__).resolve().parents[2] / "deploy" / "consul" / "policy.hcl").read_text()
    admin.put("/v1/acl/policy", json={"Name": "replica", "Rules": rules}).raise_for_status()
    made = admin.put("/v1/acl/token", json={"Policies": [{"Name": "replica"}]}).raise_for_status().json()
    process = Replicas(processes, server.url, leave_s=0.1).start("a", token=made["SecretID"])
    until(lambda: [r.state for r in read_replicas(somebody.health("pingjia").body)] == [State.PASSING], "a replica")
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    assert somebody.health("pingjia").body == []
    assert "Permission denied" not in processes.log("a").read_text()
    admin.close()
    nobody.close()
    somebody.close()


def test_tls_both_ways(need, processes, tmp_path):
    need("consul")
    for words in (["ca", "create"], ["cert", "create", "-server"], ["cert", "create", "-client"]):
        subprocess.run(["consul", "tls", *words], cwd=tmp_path, check=True, capture_output=True)
    files = {name: str(tmp_path / f"{name}.pem") for name in ("consul-agent-ca", "dc1-server-consul-0",
             "dc1-server-consul-0-key", "dc1-client-consul-0", "dc1-client-consul-0-key")}  # fmt: skip
    server = ConsulServer(
        processes,
        more=f'verify_incoming_https = true\nca_file = "{files["consul-agent-ca"]}"\n'
        f'cert_file = "{files["dc1-server-consul-0"]}"\nkey_file = "{files["dc1-server-consul-0-key"]}"\n',
    )
    server.start()
    environ = {"CONSUL_HTTP_ADDR": f"127.0.0.1:{server.https}", "CONSUL_HTTP_SSL": "true",
               "CONSUL_CACERT": files["consul-agent-ca"], "CONSUL_CLIENT_CERT": files["dc1-client-consul-0"],
               "CONSUL_CLIENT_KEY": files["dc1-client-consul-0-key"]}  # fmt: skip
    check_consul(from_environment(None, environ))
    without_ca = {name: value for name, value in environ.items() if name != "CONSUL_CACERT"}
    with pytest.raises(UserError, match="CERTIFICATE_VERIFY_FAILED"):
        check_consul(from_environment(None, without_ca))
    check_consul(from_environment(None, {**without_ca, "CONSUL_HTTP_SSL_VERIFY": "false"}))
    without_own = {name: value for name, value in environ.items() if "CLIENT" not in name}
    with pytest.raises(UserError, match="start it, or give its address"):
        check_consul(from_environment(None, without_own))


# ---- without a server


def test_nobody_there():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(
        UserError, match=rf"Consul at http://127.0.0.1:{port}: .*refused.*start it, or give its address"
    ):
        check_consul(ConsulSettings(url=f"http://127.0.0.1:{port}"))
    with pytest.raises(UserError, match="is not an http"):
        check_consul(ConsulSettings(url="ftp://x"))
    with pytest.raises(UserError, match="TLS to Consul: "):
        check_consul(ConsulSettings(url="https://127.0.0.1:1", ca_file="/nowhere.pem"))


def test_settings_from_consuls_own_variables(tmp_path):
    file = tmp_path / "token"
    file.write_text("abc\n")
    settings = from_environment(None, {"CONSUL_HTTP_ADDR": "10.0.0.5:8501", "CONSUL_HTTP_SSL": "true",
                                       "CONSUL_HTTP_TOKEN_FILE": str(file), "CONSUL_CACERT": "/ca.pem",
                                       "CONSUL_HTTP_SSL_VERIFY": "false"})  # fmt: skip
    assert (settings.url, settings.token, settings.ca_file) == ("https://10.0.0.5:8501", "abc", "/ca.pem")
    assert not settings.verify
    assert "abc" not in repr(settings)
    assert from_environment("http://h:1/", {"CONSUL_HTTP_ADDR": "x"}).url == "http://h:1"
    with pytest.raises(UserError, match="it holds the ACL token"):
        from_environment(None, {"CONSUL_HTTP_TOKEN_FILE": "/nowhere"})


@pytest.mark.parametrize(
    ("status", "text", "kind"),
    [
        (404, "Unknown check ID", NotRegistered),
        (500, 'CheckID "service:a" does not have associated TTL', NotRegistered),
        (403, "Permission denied", ConsulRefused),
        (500, "rpc error making call: Permission denied", ConsulRefused),
        (400, "Invalid service address", ConsulRefused),
        (500, "No cluster leader", ConsulLost),
        (503, "", ConsulLost),
    ],
)
def test_what_consul_means(status, text, kind):
    consul = Consul(ConsulSettings())
    consul._client = httpx.Client(
        base_url="http://x", transport=httpx.MockTransport(lambda request: httpx.Response(status, text=text))
    )
    with pytest.raises(kind):
        consul.set_check("service:a", "passing", "")


def test_what_is_no_consul_at_all():
    consul = Consul(ConsulSettings())
    page = httpx.Response(200, text="<html>", headers={"content-type": "application/json"})
    consul._client = httpx.Client(base_url="http://x", transport=httpx.MockTransport(lambda request: page))
    with pytest.raises(ConsulLost, match="is this Consul"):
        consul.health("x")


def test_an_order_that_nobody_wrote_is_none(client):
    client.write("pingjia/x/orders/y", json.dumps({"no": "order"}).encode())
    from pingjia.cluster.orders import read_order

    assert read_order(client, "x", "y", "z") is None
    client.delete("pingjia/x/orders/y")
    assert client.read("pingjia/x/orders/y") is None
