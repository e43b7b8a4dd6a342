import dataclasses
import json
import os
import signal
import sys
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest
import tiny

import jaxtune as jt
from jaxtune import errors, serve
from jaxtune.config import LoraConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("serve") / "model"
    tiny.write_chat_model(path)
    return path


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command(monkeypatch, capsys, folder, tmp_path, number):
    """It prints its address, serves base and adapter under their names, and exits when told to."""
    model = jt.load(folder)
    jt.save_adapter(jt.init_adapter(jax.random.key(0), model, LoraConfig(r=2, target_modules=("q_proj",))), model, tmp_path / "adapter")
    asked, opened = [], serve.open_server

    def watch(*args, **settings):
        server = opened(*args, **settings)

        def ask():
            with urllib.request.urlopen(f"{server.url}/models") as answer:
                asked.append(json.load(answer))
            os.kill(os.getpid(), number)

        threading.Timer(0.5, ask).start()
        return server

    monkeypatch.setattr(serve, "open_server", watch)
    monkeypatch.setattr(sys, "argv", ["jaxtune serve", str(folder), "--adapter", f"mine={tmp_path / 'adapter'}", "--port", "0"])
    with pytest.raises(SystemExit) as ended:
        errors.run(serve.main)
    out, err = capsys.readouterr()
    assert ended.value.code == 0 and out.startswith("serving base, mine at http://127.0.0.1:") and "stopping" in err
    assert [one["id"] for one in asked[0]["data"]] == ["base", "mine"]
    assert signal.getsignal(number) is not None and "Traceback" not in err


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--adapter", "base=somewhere"], "base is the model without an adapter"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--port", "-1"], "port -1"),
        (["--host", "no such host"], "no such host, port 8000"),
    ],
)
def test_mistakes_are_one_clear_line(monkeypatch, capsys, folder, arguments, said):
    monkeypatch.setattr(sys, "argv", ["jaxtune serve", str(folder), *arguments])
    with pytest.raises(SystemExit) as ended:
        errors.run(serve.main)
    err = capsys.readouterr().err
    assert ended.value.code == 2 and said in err and "Traceback" not in err


def test_another_thread_is_told_what_to_call(folder):
    with ThreadPoolExecutor() as threads, pytest.raises(errors.ConfigError, match="jt.serve.open_server"):
        threads.submit(jt.serve, jt.load(folder), port=0).result()


def test_models_that_write_no_text(folder):
    model = jt.load(folder)
    with pytest.raises(errors.ModelError, match="has no tokenizer"):
        serve.open_server(dataclasses.replace(model, tokenizer=None))
    with pytest.raises(errors.ModelError, match="use jaxtune score"):
        serve.open_server(dataclasses.replace(model, config=dataclasses.replace(model.config, num_labels=1)))
    with pytest.raises(errors.ConfigError, match="base is the model without an adapter"):
        serve.open_server(model, {"base": "somewhere"})
