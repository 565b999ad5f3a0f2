"""Adapters that come and go over HTTP: what is asked of the engine, and who may ask."""

from __future__ import annotations

from concurrent.futures import Future

import pytest
from gateway_fakes import FakeBackend

from pingjia.errors import ModelError, ModelNotFound
from pingjia.gateway.keys import KeyFile
from pingjia.types import ModelCard

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


class Host(FakeBackend):
    """Serves what it is told; a path that ends with `bad` is no adapter."""

    def load_adapter(self, name: str, path: str) -> Future[None]:
        future: Future[None] = Future()
        if path.endswith("bad"):
            future.set_exception(ModelError(f"{path} is no adapter"))
            return future
        self.unload(name)
        self.cards = [*self.cards, ModelCard(name, path, "base", 4096, 1_700_000_002)]
        future.set_result(None)
        return future

    def unload_adapter(self, name: str) -> Future[None]:
        future: Future[None] = Future()
        if self.unload(name):
            future.set_result(None)
        else:
            future.set_exception(ModelNotFound(f"no adapter {name!r}"))
        return future

    def unload(self, name: str) -> bool:
        before = len(self.cards)
        self.cards = [card for card in self.cards if card.id != name]
        return len(self.cards) < before


@pytest.fixture
def host():
    return Host()


@pytest.fixture
def server(start, host):
    return start(backend=host, adapters=host)


def test_an_adapter_is_served_from_its_loading_to_its_unloading(server):
    body = {"lora_name": "new", "lora_path": "/adapters/new"}
    loaded = server.http.post(LOAD, json=body)
    assert (loaded.status_code, loaded.json()["parent"], loaded.json()["root"]) == (200, "base", "/adapters/new")
    assert server.http.post(LOAD, json=body).status_code == 200  # again changes nothing
    listed = server.openai().models.list().data
    assert {m.id: m.parent for m in listed} == {"base": None, "shop": "base", "new": "base"}
    assert server.chat(model="new").json()["model"] == "new"
    assert server.backend.requests[-1].adapter == "new"
    assert server.http.post(UNLOAD, json={"lora_name": "new"}).json() == {
        "id": "new", "object": "model", "deleted": True,
    }  # fmt: skip
    assert server.chat(model="new").json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        (LOAD, {"lora_name": "new"}, 400, "lora_path"),
        (LOAD, {"lora_name": "", "lora_path": "x"}, 400, "lora_name"),
        (LOAD, {"lora_name": "a b", "lora_path": "x"}, 400, "lora_name"),
        (LOAD, {"lora_name": "base", "lora_path": "x"}, 400, "lora_name"),
        (LOAD, {"lora_name": "new", "lora_path": "/bad"}, 400, "lora_path"),
        (LOAD, {"lora_name": "new", "lora_path": "a\0b"}, 400, "lora_path"),
        (UNLOAD, {"lora_name": "base"}, 400, "lora_name"),
        (UNLOAD, {"lora_name": "nobody"}, 404, "model"),
        (UNLOAD, {}, 400, "lora_name"),
    ],
)
def test_refused_naming_the_field(server, path, body, status, param):
    response = server.http.post(path, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)


def test_only_an_admin_key_may(start, host, tmp_path):
    file = KeyFile(tmp_path / "keys.json")
    plain, admin = file.create("plain").secret, file.create("boss", admin=True).secret
    server = start(backend=host, adapters=host, keys_file=str(file.path))

    def load(key):
        body = {"lora_name": "new", "lora_path": "/adapters/new"}
        return server.http.post(LOAD, json=body, headers={"authorization": f"Bearer {key}"}).status_code

    assert (load("nobody"), load(plain), load(admin)) == (401, 403, 200)


def test_a_gateway_without_an_engine_says_where_to_ask(gateway):
    response = gateway.http.post(LOAD, json={"lora_name": "new", "lora_path": "x"})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "unsupported_here")
    assert "pingjia worker" in response.json()["error"]["message"]
