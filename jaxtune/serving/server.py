"""HTTP: authorisation, routing and replies. One thread per connection; none of them computes."""

import contextlib
import errno
import hmac
import json
import logging
import socket
import socketserver
import sys
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from jaxtune.errors import ConfigError
from jaxtune.serving.replies import Reply
from jaxtune.serving.requests import Refusal, parse, read
from jaxtune.serving.worker import Job, Worker

MOST_BYTES = 4 * 2**20  # of a request's body
GRACE = 10.0  # seconds for answers to reach their clients once the server stops
CHATS = {"/v1/chat/completions": True, "/v1/completions": False}
log = logging.getLogger("jaxtune")


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: "Server"  # type: ignore[assignment]
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds that a client may keep it waiting
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        """`/health`, `/v1/models`, `/v1/models/NAME`."""
        self._answer(self._get)

    def do_POST(self) -> None:
        """`/v1/completions`, `/v1/chat/completions`."""
        self._answer(self._post)

    def _answer(self, how: Any) -> None:
        began, self.said, self.begun = time.monotonic(), "", False
        path = self.path.partition("?")[0]
        with self.server.busy():
            try:
                how(path, self._body())
            except Refusal as refusal:
                self._refuse(refusal)
            except (ConnectionError, TimeoutError):
                self.close_connection, self.said = True, "the client has left"
            except Exception:  # a bug of ours
                log.exception("a request failed")
                self.close_connection = True
                self._refuse(Refusal(500, "the server failed; see its log"))
        known = path in CHATS or path.startswith("/v1/models") or path == "/health"
        log.info("%s %s: %s, %.1f s", self.command, path if known else "(no such path)", self.said, time.monotonic() - began)

    def _get(self, path: str, body: bytes) -> None:
        worker = self.server.worker
        if path == "/health":
            return self._json(200, {"status": "ok"}) if worker.thread.is_alive() else self._refuse(Refusal(503, "the server is stopping"))
        self._check_key()
        models = [
            {"id": name, "object": "model", "created": self.server.started, "owned_by": "jaxtune", "root": worker.models[name].source,
             "max_model_len": worker.models[name].config.max_position_embeddings - virtual}
            for name, virtual in worker.names.items()
        ]  # fmt: skip
        if path == "/v1/models":
            return self._json(200, {"object": "list", "data": models})
        for model in models:
            if path == f"/v1/models/{model['id']}":
                return self._json(200, model)
        self._no_such(path, CHATS)

    def _post(self, path: str, body: bytes) -> None:
        self._check_key()
        if path not in CHATS:
            self._no_such(path, ("/v1/models", "/health"))
        server, worker = self.server, self.server.worker
        request = read(parsed := parse(body), CHATS[path], worker.names, worker.models, server.max_new_tokens, worker.encode)
        if server.log_requests:
            log.info("asked: %s", json.dumps(parsed, ensure_ascii=False))
        job = worker.submit(request)
        reply = Reply(job)
        try:
            self._stream(job, reply) if request.stream else self._whole(job, reply)
        finally:
            job.cancel()
        if server.log_requests:
            log.info("answered: %s", json.dumps([answer.text for answer in job.answers], ensure_ascii=False))
        usage = reply.usage()
        self.said += f", {request.model}, {usage['prompt_tokens']} tokens read, {usage['completion_tokens']} written"

    def _whole(self, job: Job, reply: Reply) -> None:
        for _ in job.pieces(self._gone):
            pass
        self._json(200, reply.whole())

    def _stream(self, job: Job, reply: Reply) -> None:
        for piece in job.pieces(self._gone):
            if not self.begun:
                self._head(200, {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "Connection": "close"})
                self._events(reply.first())
            self._events(reply.piece(piece))
        self._events(reply.last())
        self.wfile.write(b"data: [DONE]\n\n")

    def _events(self, events: list[dict]) -> None:
        for event in events:
            self.wfile.write(b"data: " + _encoded(event) + b"\n\n")

    # ---- what comes in ----

    def _body(self) -> bytes:
        """The request's body. If it is refused unread, the connection is closed."""
        given = self.headers.get("Content-Length", "0")
        if "Transfer-Encoding" in self.headers:
            self.close_connection = True
            raise Refusal(411, "the body's length is missing; send Content-Length, not Transfer-Encoding")
        if not (given.isascii() and given.isdigit()):
            self.close_connection = True
            raise Refusal(400, f"Content-Length is {given[:80]!r}; it has to be a number of bytes")
        if int(given) > MOST_BYTES:
            self.close_connection = True
            self.rfile.read(min(int(given), 4 * MOST_BYTES))  # otherwise the client would see a broken pipe instead of the reply
            raise Refusal(413, f"the body has {given} bytes, and {MOST_BYTES} at most are read; send a shorter request")
        body = self.rfile.read(int(given))
        if len(body) < int(given):
            raise ConnectionAbortedError
        return body

    def _check_key(self) -> None:
        wanted, given = self.server.api_key, self.headers.get("Authorization", "")  # bytes as Latin-1
        if wanted is not None and not hmac.compare_digest(given.encode("latin-1"), f"Bearer {wanted}".encode()):
            wanted = "send the server's --api-key in a header, Authorization: Bearer KEY"
            raise Refusal(401, f"the API key is missing or wrong; {wanted}", code="invalid_api_key")

    def _no_such(self, path: str, of_other_method: Any) -> None:
        if path in of_other_method:
            raise Refusal(405, f"{path} is not for {self.command}; use {'POST' if self.command == 'GET' else 'GET'}")
        there = ", ".join(["/health", "/v1/models", *CHATS])
        raise Refusal(404, f"there is no {path[:80]}; this server has {there}")

    def _gone(self) -> bool:
        """Whether the client has closed the connection."""
        self.connection.settimeout(0)
        try:
            return not self.connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        finally:
            self.connection.settimeout(self.timeout)

    # ---- what goes out ----

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.begun, self.said = True, str(status)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)  # send_header reacts to "Connection: close"
        self.end_headers()

    def _json(self, status: int, body: dict) -> None:
        found = _encoded(body)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(found))}
        self._head(status, headers | ({"Connection": "close"} if self.close_connection else {}))
        self.wfile.write(found)

    def _refuse(self, refusal: Refusal) -> None:
        """Send an error as the reply, or as the last event of a stream that has begun."""
        with contextlib.suppress(ConnectionError, TimeoutError):
            if self.begun:
                self._events([refusal.body()])
            else:
                self._json(refusal.status, refusal.body())
        self.said = f"{refusal.status}" if refusal.status < 500 else f"{refusal.status} ({refusal})"

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Errors from http.server itself, in the same form."""
        self.begun, self.close_connection = False, True
        self._refuse(Refusal(code, message or HTTPStatus(code).phrase))

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: `_answer` logs requests, without what clients have written."""


def _encoded(body: dict) -> bytes:
    return json.dumps(body, ensure_ascii=False, allow_nan=False).encode()


class Server(ThreadingHTTPServer):
    """Serves a worker's models at an address: `start`, `url`, `stop`."""

    daemon_threads, block_on_close = True, False  # idle connections do not keep the process alive
    request_queue_size = 128

    def __init__(
        self, worker: Worker, host: str = "127.0.0.1", port: int = 8000, *, api_key: str | None = None, max_new_tokens: int = 1024,
        log_requests: bool = False,
    ):  # fmt: skip
        self.worker, self.api_key, self.max_new_tokens, self.log_requests = worker, api_key, max_new_tokens, log_requests
        self.started = int(time.time())
        self._working, self._changed = 0, threading.Condition()
        try:
            self.address_family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            super().__init__((host, port), Handler)
        except (OSError, OverflowError, UnicodeError) as error:
            taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
            reason = "another program listens there" if taken else str(error)
            raise ConfigError(f"{host}, port {port}: {reason}; choose another --host or --port (0: any that is free)") from None

    def server_bind(self) -> None:
        """As for any TCP server; HTTPServer would query a name server for its own name."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    @property
    def url(self) -> str:
        """The base URL for clients."""
        host = f"[{self.server_name}]" if ":" in self.server_name else self.server_name
        return f"http://{host}:{self.server_port}/v1"

    def start(self) -> None:
        """Start serving, in threads."""
        self.worker.thread.start()
        threading.Thread(target=self.serve_forever, args=(0.1,), name="jaxtune-http", daemon=True).start()

    def stop(self) -> None:
        """Accept no more requests, refuse those that wait, finish the others."""
        self.shutdown()
        self.worker.stop()
        with self._changed:
            self._changed.wait_for(lambda: not self._working, GRACE)
        self.server_close()

    @contextlib.contextmanager
    def busy(self) -> Any:
        """Marks an answer in progress, which `stop` waits for."""
        with self._changed:
            self._working += 1
        try:
            yield
        finally:
            with self._changed:
                self._working -= 1
                self._changed.notify_all()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A broken connection is the client's problem; anything else is a bug of ours."""
        if not isinstance(error := sys.exception(), (ConnectionError, TimeoutError)):
            log.error("a connection failed", exc_info=error)
