import dataclasses
import http.client
import json
import threading
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny

import jaxtune as jt
from jaxtune import serve
from jaxtune.config import LoraConfig
from jaxtune.generation import batches
from jaxtune.serving import worker

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A tiny chat model whose random text does not end by itself."""
    folder = tmp_path_factory.mktemp("serving") / "model"
    tiny.write_chat_model(folder)
    return dataclasses.replace(jt.load(folder), generation_config={}, hf_config={})


@pytest.fixture(scope="session")
def adapter(model):
    fresh = jt.init_adapter(jax.random.key(0), model, LoraConfig(r=2, target_modules=("q_proj",)))
    return jax.tree.map(lambda leaf: np.asarray(leaf) + np.float32(0.3), fresh)


class Client:
    """One connection per request, as simple as possible."""

    def __init__(self, server):
        self.server = server

    def open(self, method, path, body=None, headers=()):
        connection = http.client.HTTPConnection(*self.server.server_address[:2], timeout=60)
        raw = json.dumps(body).encode() if isinstance(body, (dict, list)) else body
        connection.request(method, path, raw, dict(headers))
        return connection, connection.getresponse()

    def __call__(self, method, path, body=None, headers=()):
        connection, answer = self.open(method, path, body, headers)
        try:
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def chat(self, name, **settings):
        """The reply to `HELLO`."""
        status, found = self("POST", "/v1/chat/completions", {"model": name, "messages": HELLO, **settings})
        assert status == 200, found
        return found

    def stream(self, path, body):
        """The events of a stream."""
        connection, answer = self.open("POST", path, body | {"stream": True})
        assert answer.status == 200 and answer.headers["Content-Type"].startswith("text/event-stream")
        *events, done, end = answer.read().decode().split("\n\n")
        connection.close()
        assert (done, end) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]


@pytest.fixture
def start(model, adapter, monkeypatch):
    """Starts a server of `base` and `tuned`; token buffers are short."""
    monkeypatch.setattr(worker, "LEAST_NEW", 16)
    servers = []

    def start(**settings):
        servers.append(serve.open_server(model, {"tuned": adapter}, port=0, **settings))
        servers[-1].start()
        return Client(servers[-1])

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def ask(start):
    return start()


@pytest.fixture
def gate(monkeypatch):
    """Holds what is being decoded after its first token: `gate.opened.set()` lets it continue, `gate.reached` tells that it has arrived."""
    gate = SimpleNamespace(opened=threading.Event(), reached=threading.Event())
    decode = batches.decode

    def held(*args):
        gate.reached.set()
        assert gate.opened.wait(60)
        return decode(*args)

    monkeypatch.setattr(batches, "decode", held)
    yield gate
    gate.opened.set()
