"""Serve a model through an OpenAI-compatible API, to try it before passing it on. Not a production server: for that, export the result and
serve it with vLLM or llama.cpp.

    jaxtune serve MODEL --adapter runs/first/adapter
    curl http://127.0.0.1:8000/v1/chat/completions -d '{"model": "adapter", "messages": [{"role": "user", "content": "..."}]}'

The model alone is named base, an adapter as given (--adapter NAME=DIR; by default adapter); the `model` of a request selects one of them.
Waiting requests are answered together. docs/serving.md lists the supported fields.
"""

import argparse
import ipaddress
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from jaxtune import cli, errors
from jaxtune.convert.load import Model
from jaxtune.convert.retokenised import with_adapter
from jaxtune.errors import ConfigError, ModelError, check_argument
from jaxtune.generate import BASE, adapter_folders
from jaxtune.generation.prompts import require_tokenizer
from jaxtune.serving.server import Server
from jaxtune.serving.worker import Worker

log = logging.getLogger("jaxtune")


def serve(model: Any, adapters: Mapping[str, Any] | None = None, **settings: Any) -> None:
    """Serve requests as `open_server` does, until SIGTERM or Ctrl-C: running answers are finished, waiting requests are refused. A second
    signal exits immediately."""
    with _interrupted() as stopped:
        server = open_server(model, adapters, **settings)
        server.start()
        print(f"serving {', '.join(server.worker.names)} at {server.url}", flush=True)
        while not stopped:
            time.sleep(0.1)
        log.info("stopping; running answers are finished (a second signal quits immediately)")
        server.stop()


def open_server(
    model: Any, adapters: Mapping[str, Any] | None = None, *, host: str = "127.0.0.1", port: int = 8000, api_key: str | None = None,
    max_new_tokens: int = 1024, batch_size: int | None = None, log_requests: bool = False,
) -> Server:  # fmt: skip
    """A server bound to its address, with `server.start()` and `server.stop()`.

    adapters        by name: adapters from `jt.load_adapter` or training, or their folders; `base` is the model without one
    port            0: any free port; `server.url` tells which
    api_key         the key that clients must send (Authorization: Bearer KEY); None: no key
    max_new_tokens  for requests that do not say; fewer if the context has no room
    batch_size      answers at a time; by default as many as fit in a cache of 1 GiB, at most 64
    log_requests    log prompts and answers; otherwise they are not written anywhere

    Raises ConfigError for an unavailable address or a setting out of range, ModelError for a model that generates no text.
    """
    check_argument("model", model, Model, "give a model: jt.serve(jt.load(folder))")
    require_tokenizer(model)
    if model.config.num_labels:
        raise ModelError("the model scores texts and does not generate any; use jaxtune score")
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be 1 or more")
    if api_key == "":
        raise ConfigError("the API key is empty; leave --api-key out, or give it a text")
    served: dict[str, Any] = {BASE: None}
    models = {BASE: model}
    for name, given in (adapters or {}).items():
        if name == BASE:
            raise ConfigError(f"{BASE} is the model without an adapter; give the adapter another name")
        folder = given if isinstance(given, (str, os.PathLike)) else None
        served[name], models[name] = (given, model) if folder is None else with_adapter(folder, model)[::-1]
    worker = Worker(models, served, batch_size)
    server = Server(worker, host, port, api_key=api_key, max_new_tokens=max_new_tokens, log_requests=log_requests)
    if api_key is None and not ipaddress.ip_address(server.server_name).is_loopback:
        log.warning("anyone who can reach %s can use this server; --api-key restricts it", server.url)
    return server


@contextmanager
def _interrupted() -> Iterator[list[int]]:
    """A list to which SIGTERM or Ctrl-C appends its number; a second one raises KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():
        raise ConfigError(
            "jt.serve ends by Ctrl-C, which the main thread alone hears; in another: server = jt.serve.open_server(...), server.start(), "
            "and server.stop() to end it"
        )
    found: list[int] = []

    def hear(number: int, frame: Any) -> None:
        if found:
            raise KeyboardInterrupt
        found.append(number)

    before = {number: signal.signal(number, hear) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _arguments() -> argparse.Namespace:
    parser = cli.parser("serve", __doc__)
    parser.add_argument("model", metavar="MODEL", help="hub id, local folder, .gguf file or pypi:PACKAGE==VERSION/PATH")
    parser.add_argument("--adapter", metavar="[NAME=]DIR", action="append", default=[], help="a PEFT adapter folder; several have names")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on; 0.0.0.0: all of this machine's")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    parser.add_argument("--api-key", metavar="KEY", help="the key that clients must send; or in the environment, as JAXTUNE_API_KEY")
    parser.add_argument("--max-new-tokens", type=int, default=1024, help="for requests that do not set it")
    parser.add_argument("--batch-size", type=int, help="answers at a time")
    parser.add_argument("--log-requests", action="store_true", help="log prompts and answers, which are otherwise not written anywhere")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")
    parser.add_argument("--quantization", help="nf4, nf4-dq or int8")
    return cli.parse(parser)


def main() -> None:
    """`python -m jaxtune.serve`."""
    from jaxtune.convert.load import load

    arguments = _arguments()
    cli.log_to_terminal()
    model = load(arguments.model, dtype=arguments.dtype, quantization=arguments.quantization)
    serve(
        model, adapter_folders(arguments.adapter), host=arguments.host, port=arguments.port,
        api_key=arguments.api_key or os.environ.get("JAXTUNE_API_KEY"), max_new_tokens=arguments.max_new_tokens,
        batch_size=arguments.batch_size, log_requests=arguments.log_requests,
    )  # fmt: skip


cli.callable_module(__name__, serve)

if __name__ == "__main__":
    errors.run(main)
