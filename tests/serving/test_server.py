import json
import logging
import socket
import threading
import time

import pytest

from jaxtune import errors, serve
from jaxtune.serving import server, worker

HELLO = [{"role": "user", "content": "hello"}]
CHAT = {"model": "base", "messages": HELLO, "max_tokens": 6, "temperature": 0}


def test_what_is_served(ask):
    assert ask("GET", "/health") == (200, {"status": "ok"})
    status, found = ask("GET", "/v1/models")
    assert status == 200 and [(one["id"], one["max_model_len"]) for one in found["data"]] == [("base", 256), ("tuned", 256)]
    assert ask("GET", "/v1/models/tuned") == (200, found["data"][1])


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_stream_is_the_whole_in_pieces(ask, path):
    body = CHAT if "chat" in path else {"model": "base", "prompt": "hello" * 40, "max_tokens": 6, "temperature": 0}
    body = body | {"logprobs": True if "chat" in path else 0}
    _, whole = ask("POST", path, body)
    *events, last = ask.stream(path, body | {"stream_options": {"include_usage": True}})
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    choices = [event["choices"][0] for event in events]
    ends = [choice["finish_reason"] for choice in choices]
    assert ends[-1] == whole["choices"][0]["finish_reason"] == "length" and not any(ends[:-1]) and len(events) >= 6
    told = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    if "chat" in path:
        assert choices[0]["delta"] == {"role": "assistant", "content": ""} and choices[-1]["delta"] == {}
        assert "".join(choice["delta"].get("content", "") for choice in choices) == whole["choices"][0]["message"]["content"]
        assert sum((one["content"] for one in told), []) == whole["choices"][0]["logprobs"]["content"]
    else:
        assert "".join(choice["text"] for choice in choices) == whole["choices"][0]["text"]
        assert {key: sum((one[key] for one in told), []) for key in ("tokens", "token_logprobs", "text_offset")}.items() <= (
            whole["choices"][0]["logprobs"].items()
        )


def test_requests_that_are_refused(ask):
    for method, path, body, headers, status, said in [
        ("POST", "/v1/chat/completions", b"{", {}, 400, "the body is no JSON"),
        ("POST", "/v1/chat/completions", CHAT | {"max_tokens": 999}, {}, 400, "use max_tokens=165 or less"),
        ("POST", "/v1/embeddings", {}, {}, 404, "there is no /v1/embeddings; this server has /health"),
        ("GET", "/v1/models/none", None, {}, 404, "there is no /v1/models/none"),
        ("GET", "/v1/completions", None, {}, 405, "use POST"),
        ("POST", "/v1/models", {}, {}, 405, "use GET"),
        ("PUT", "/v1/models", {}, {}, 501, "Unsupported method"),
        ("POST", "/v1/completions", b"x" * (server.MOST_BYTES + 1), {}, 413, "send a shorter request"),
        ("POST", "/v1/completions", iter([b"{}"]), {"Transfer-Encoding": "chunked"}, 411, "send Content-Length"),
        ("POST", "/v1/completions", b"", {"Content-Length": "-1"}, 400, "has to be a number of bytes"),
    ]:
        found = ask(method, path, body, headers)
        assert found[0] == status and said in found[1]["error"]["message"], found
        assert found[1]["error"]["type"] == ("invalid_request_error" if status < 500 else "server_error")


def test_a_bug_is_an_answer_too(ask, monkeypatch, caplog):
    with monkeypatch.context() as broken:
        broken.setattr(worker.Worker, "submit", lambda *args: 1 / 0)
        status, found = ask("POST", "/v1/chat/completions", CHAT)
    assert status == 500 and "see its log" in found["error"]["message"] and "ZeroDivisionError" in caplog.text
    assert ask("GET", "/health")[0] == 200


def test_only_those_with_the_key_are_answered(start):
    ask = start(api_key="secret ü")
    for headers in ({}, {"Authorization": "Bearer secret"}, {"Authorization": "secret ü".encode()}):
        status, found = ask("GET", "/v1/models", headers=headers)
        assert status == 401 and found["error"]["code"] == "invalid_api_key"
    assert ask("GET", "/v1/models", headers={"Authorization": "Bearer secret ü".encode()})[0] == 200
    assert ask("GET", "/health")[0] == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_takes_no_more_time(ask, gate, monkeypatch, stream):
    jobs, submit = [], worker.Worker.submit
    monkeypatch.setattr(worker.Worker, "submit", lambda *args: jobs.append(submit(*args)) or jobs[-1])
    body = CHAT | {"stream": stream, "max_tokens": 16}
    connection = socket.create_connection(ask.server.server_address[:2])
    raw = json.dumps(body).encode()
    connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(raw) + raw)
    assert gate.reached.wait(60)
    connection.close()
    until = time.monotonic() + 30
    while jobs[0].answers[0].finish_reason is None and time.monotonic() < until:
        time.sleep(0.02)
    gate.opened.set()
    assert jobs[0].answers[0].finish_reason == "cancelled"
    assert ask.chat("base", max_tokens=6, temperature=0)["usage"]["completion_tokens"] == 6
    assert len(jobs[0].answers[0].tokens) < 16


def test_the_end_finishes_what_is_answered_and_refuses_what_waits(ask, gate):
    found = {}

    def chat(name):
        found[name] = ask("POST", "/v1/chat/completions", CHAT | {"model": name})

    threads = [threading.Thread(target=chat, args=(name,)) for name in ("base", "tuned")]
    threads[0].start()
    assert gate.reached.wait(60)
    threads[1].start()
    while not ask.server.worker._waiting:
        time.sleep(0.01)
    ending = threading.Thread(target=ask.server.stop)
    ending.start()
    threads[1].join(60)
    assert found["tuned"][0] == 503 and "was still waiting" in found["tuned"][1]["error"]["message"]
    assert ending.is_alive()
    gate.opened.set()
    ending.join(60)
    threads[0].join(60)
    assert found["base"][0] == 200 and found["base"][1]["usage"]["completion_tokens"] == 6
    with pytest.raises(ConnectionError):
        ask("GET", "/health")


@pytest.mark.parametrize("log_requests", [False, True])
def test_prompts_are_logged_if_that_is_asked_for_only(start, caplog, log_requests):
    caplog.set_level(logging.INFO, "jaxtune")
    ask = start(log_requests=log_requests)
    ask("POST", "/v1/chat/completions", CHAT)
    ask("POST", "/v1/hello?hello", {"hello": 1})
    ask.server.stop()
    assert "POST /v1/chat/completions: 200, base, 91 tokens read, 6 written" in caplog.text
    assert ("hello" in caplog.text) == log_requests


def test_an_address_that_is_taken(ask, model):
    with pytest.raises(errors.ConfigError, match="another program listens there; choose another --host or --port"):
        serve.open_server(model, port=ask.server.server_port)
    with pytest.raises(errors.ConfigError, match="port 99999: .*choose another --host or --port"):
        serve.open_server(model, port=99999)
