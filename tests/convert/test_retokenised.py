"""A run's own chat template and EOS token: trained with, written beside the result, and used with it from then on."""

import json
import shutil

import jax
import numpy as np
import pytest
import tiny
from chat import CHATML

import jaxtune as jt
from jaxtune.config import load_config
from jaxtune.convert.load import open_model, read_model
from jaxtune.convert.more_tokens import with_tokens
from jaxtune.convert.retokenised import beside, for_run, tokenizer_of, with_adapter
from jaxtune.convert.tokenizer import load_tokenizer, save_tokenizer
from jaxtune.errors import DataError, ModelError
from jaxtune.export import export
from jaxtune.generation.prompts import stop_tokens, token_ids
from jaxtune.serve import open_server
from jaxtune.train import save_result, train

ASKED = [{"role": "user", "content": "hello there"}]
ROWS = [{"messages": [*ASKED, {"role": "assistant", "content": word}]} for word in "one two three fox dog lazy".split()]
END, TURN = "<|endoftext|>", "<|im_end|>"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base model without a template whose answers end with <|endoftext|>, and two runs over it that chat."""
    folder = tmp_path_factory.mktemp("retokenised")
    tokenizer = tiny.write_chat_model(folder / "base")
    tokenizer.chat_template, tokenizer.eos_token = None, END
    shutil.rmtree(folder / "base")
    tiny.write(folder / "base", tiny.LLAMA | {"vocab_size": len(tokenizer), "eos_token_id": 0})
    tokenizer.save_pretrained(folder / "base")
    (folder / "chatml.jinja").write_text(CHATML)
    tiny.write_rows(folder, ROWS)
    for method in ("lora", "full"):
        train({
            "model": str(folder / "base"), "method": method, "output_dir": str(folder / method), "max_steps": 1, "lora": {"r": 2},
            "data": {"train": str(folder / "rows.jsonl"), "max_length": 128},
            "chat_template_path": str(folder / "chatml.jinja"), "eos_token": TURN, "compilation_cache": False,
        })  # fmt: skip
    return folder


def ids(tokenizer, *tokens):
    return [tokenizer.convert_tokens_to_ids(token) for token in tokens]


def test_the_base_has_neither(made):
    base = jt.load(made / "base")
    assert not base.tokenizer.chat_template and stop_tokens(base) == set(ids(base.tokenizer, END))


def test_a_tuned_model_has_both_and_lends_them_to_its_base(made):
    model = jt.load(made / "full" / "model")
    end, turn = ids(model.tokenizer, END, TURN)
    assert (model.tokenizer.chat_template, model.tokenizer.eos_token) == (CHATML, TURN)
    assert model.hf_config["eos_token_id"] == turn and model.generation_config["eos_token_id"] == [turn, end]
    report = jt.evaluate(made / "base", made / "rows.jsonl", tuned=made / "full" / "model", metric="exact_match", max_new_tokens=2, limit=1)
    assert report.tuned is not None and report.tuned["loss"] < report.base["loss"]


def test_an_adapter_brings_them(made, caplog):
    caplog.set_level("INFO", "jaxtune")
    base, adapter = jt.load(made / "base"), made / "lora" / "adapter"
    model = beside([adapter], base)
    assert f"tokenizer: that of {adapter}" in caplog.text and model.params is base.params
    assert token_ids(model, ASKED, "prompt") == model.tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, return_dict=False)
    assert stop_tokens(model) == set(ids(model.tokenizer, END, TURN))
    assert len(jt.generate(base, [ASKED], adapter=adapter, max_new_tokens=2)) == 1
    with pytest.raises(ModelError, match="has no chat template"):
        jt.generate(base, [ASKED], max_new_tokens=2)
    report = jt.evaluate(base, made / "rows.jsonl", adapter=adapter, metric="exact_match", max_new_tokens=2, limit=1)
    assert report.tuned is not None and report.tuned["loss"] < report.base["loss"]
    server = open_server(base, {"tuned": adapter}, port=0)
    try:
        assert server.worker.encode("tuned", ASKED, "messages") == token_ids(model, ASKED, "prompt")
        assert server.worker.stops == {"base": stop_tokens(base), "tuned": stop_tokens(model)}
        with pytest.raises(ModelError, match="has no chat template"):
            server.worker.encode("base", ASKED, "messages")
    finally:
        server.server_close()


@pytest.mark.parametrize("format", ["hf", "gguf"])
def test_a_merged_model_has_both(made, tmp_path, format):
    export(made / "lora", tmp_path / "out", merge=True, format=format)
    merged = jt.load(tmp_path / "out")
    end, turn = ids(merged.tokenizer, END, TURN)
    assert (merged.tokenizer.chat_template, merged.tokenizer.eos_token) == (CHATML, TURN)
    assert merged.hf_config["eos_token_id"] in (turn, [turn, end]) and stop_tokens(merged) == {turn, end}
    if format == "gguf":
        assert f'stop "{TURN}"' in (tmp_path / "out" / "Modelfile").read_text()


def test_the_models_own_tokenizer_stays_itself(made, tmp_path):
    """Beside an adapter that has none, or the same one."""
    opened = open_model(made / "full" / "model")
    assert beside([made / "lora" / "adapter", made / "full" / "model"], opened) is opened
    (tmp_path / "none").mkdir()
    assert beside([tmp_path / "none"], opened) is opened


def test_adapters_that_differ_and_a_damaged_one(made, tmp_path, caplog):
    base = open_model(made / "base")
    assert beside([made / "lora" / "adapter", made / "full" / "model"], base).tokenizer.eos_token == TURN  # which are alike
    other = load_tokenizer(made / "base")
    other.chat_template = "{{ messages }}"
    save_tokenizer(other, tmp_path / "other")
    assert beside([made / "lora" / "adapter", tmp_path / "other"], base) is base and "written by the model's own" in caplog.text
    (tmp_path / "other" / "tokenizer.json").write_text("{")
    assert beside([tmp_path / "other"], base) is base and "the tokenizer beside the adapter is not used" in caplog.text


def test_ends_of_answers_that_the_models_own_files_leave_out(made, tmp_path):
    """A base with a template, whose config names the end of a document alone: its run's result ends answers where `generate` does."""
    shutil.copytree(made / "base", tmp_path / "base")
    tokenizer = load_tokenizer(made / "base")
    tokenizer.chat_template = CHATML
    save_tokenizer(tokenizer, tmp_path / "base")
    model, run = open_model(tmp_path / "base"), load_config({"model": str(tmp_path / "base"), "data": {"train": "rows.jsonl"}})
    end, turn = ids(tokenizer, END, TURN)
    for found in (beside([tmp_path / "base"], model), beside([tmp_path], model)):
        assert found.generation_config == {"eos_token_id": [end, turn]} and found.config == model.config
    assert model.generation_config == {} and for_run(run, model) is model
    loaded = read_model(model)
    found = jt.load(save_result(run.replace(method="full"), loaded, loaded.params, tmp_path))
    assert found.generation_config == {"eos_token_id": [end, turn]}


def test_a_run_goes_on_with_the_tokenizer_of_its_adapter(made):
    run = load_config({"model": str(made / "base"), "init_adapter": str(made / "lora" / "adapter"), "data": {"train": "rows.jsonl"}})
    for tokenizer in (for_run(run, open_model(made / "base")).tokenizer, tokenizer_of(run)):
        assert (tokenizer.chat_template, tokenizer.eos_token) == (CHATML, TURN)


def test_an_adapter_with_a_larger_vocabulary(made, tmp_path, caplog):
    """As PEFT saves it after resize_token_embeddings: embedding and head whole."""
    caplog.set_level("INFO", "jaxtune")
    base = jt.load(made / "base")
    config, params = with_tokens(base.config, base.params, base.config.vocab_size + 5)
    larger = jt.Model(config, params, base.tokenizer, source=base.source)
    adapter = jt.init_adapter(jax.random.key(0), larger, jt.LoraConfig(r=2, modules_to_save=("embed_tokens", "lm_head")))
    adapter = adapter.replace(saved={path: value + 1 for path, value in adapter.saved.items()})
    jt.save_adapter(adapter, larger, tmp_path / "adapter")
    found, opened = with_adapter(tmp_path / "adapter", base)
    assert found.config.vocab_size == found.hf_config["vocab_size"] == config.vocab_size and "vocabulary: resized from" in caplog.text
    assert all(np.array_equal(opened.saved[path], value) for path, value in adapter.saved.items())
    with pytest.raises(ModelError, match="resized for the adapter"):
        jt.load_adapter(tmp_path / "adapter", base)
    export(tmp_path / "adapter", tmp_path / "out", merge=True)
    merged = jt.load(tmp_path / "out")
    assert all(np.array_equal(merged.params[path], value) for path, value in adapter.saved.items())
    read = read_model(beside([tmp_path / "adapter"], open_model(made / "base"))).params
    assert all(np.array_equal(read[path], params[path]) for path in ("embed", "head"))


def test_templates_with_names_are_exported_too(made, tmp_path):
    shutil.copytree(made / "lora" / "adapter", tmp_path / "adapter")
    tokenizer = load_tokenizer(tmp_path / "adapter")
    tokenizer.chat_template = {"default": CHATML, "tool_use": "{{ tools }}"}
    save_tokenizer(tokenizer, tmp_path / "adapter")
    export(tmp_path / "adapter", tmp_path / "out")
    assert load_tokenizer(tmp_path / "out").chat_template == tokenizer.chat_template


def test_a_model_that_names_an_end_in_a_list_keeps_its_own(made):
    base = open_model(made / "base")
    base.config = base.config.__class__(**{**vars(base.config), "hf_json": json.dumps({"eos_token_id": [5, 2], "pad_token_id": 0})})
    found = beside([made / "lora" / "adapter"], base)
    assert ids(found.tokenizer, TURN) == [2] and json.loads(found.config.hf_json)["eos_token_id"] == [5, 2]
    assert found.generation_config == {}  # transformers takes those of config.json


def test_an_end_that_the_tokenizer_lacks(made):
    with pytest.raises(DataError, match=r"eos_token '<\|im_ende\|>' is no token of the model's tokenizer.* such as <\|im_end\|>"):
        train({
            "model": str(made / "base"), "max_steps": 1, "output_dir": str(made / "none"), "compilation_cache": False,
            "data": {"train": str(made / "rows.jsonl"), "eos_token": "<|im_ende|>"},
        })  # fmt: skip
