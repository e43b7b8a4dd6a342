"""Whole runs of methods other than LoRA: over a quantised base and a mesh, resumed, merged from disk to disk, and their errors."""

import json
import shutil

import jax
import numpy as np
import pytest
import tiny
from methods import CASES, stir

import jaxtune as jt
from jaxtune import data, eva, parallel, startup
from jaxtune.config import MeshConfig, load_config
from jaxtune.convert.load import open_model
from jaxtune.convert.tensors import Safetensors
from jaxtune.costs import by_cause
from jaxtune.errors import ConfigError, ModelError
from jaxtune.export import export, find
from jaxtune.model.quant import quantize
from jaxtune.peft import lora_init
from jaxtune.peft.sites import adaptable, find_sites
from jaxtune.runfolder import base_of
from jaxtune.shapes import abstract_step
from jaxtune.train import train

ROWS = [{"prompt": f"Say {word}.", "completion": f" {word} {word}"} for word in "one two three hello there fox dog quick".split()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    tiny.write_chat_model(folder / "model")
    tiny.write_rows(folder, ROWS)
    return folder


def config(folder, out, **changes):
    return {
        "model": str(folder / "model"), "output_dir": str(out), "data": {"train": str(folder / "rows.jsonl"), "max_length": 32},
        "max_steps": 4, "per_device_train_batch_size": 1, "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 2,
        "compilation_cache": False,
    } | changes  # fmt: skip


def tensors(folder):
    files = Safetensors(folder, stem="adapter_model")
    return {name: files.read(name) for name in files.entries}


def test_ranks_are_allocated_on_a_mesh_and_resumed_bit_for_bit(folder, tmp_path, steps_compiled):
    """AdaLoRA has the most state: the importance of each number, which values are live, and a step that it starts from."""
    ranks = {"init_r": 4, "target_r": 2, "tfinal": 1, "target_modules": ["q_proj"]}
    run = config(folder, tmp_path / "run", method="adalora", adalora=ranks,
                 quantization="int8",
                 mesh={"data": 2, "fsdp": 2, "tensor": 2}, zero_stage=1)  # fmt: skip
    train(run)
    assert steps_compiled() == 1
    wanted = tensors(tmp_path / "run" / "adapter")
    described = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert sum(map(sum, described["rank_pattern"].values())) == 2 * len(described["rank_pattern"])
    shutil.rmtree(tmp_path / "run" / "adapter")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    train(run | {"resume": True})
    again = tensors(tmp_path / "run" / "adapter")
    assert wanted.keys() == again.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(again[name], value)


@pytest.mark.parametrize("name", ["ia3", "boft of some layers"])
def test_merged_from_disk_to_disk(folder, tmp_path, name):
    """The merged folder is compared with base and adapter before it gets its name."""
    model = jt.load(folder / "model")
    adapter = stir(jt.init_adapter(jax.random.key(0), model, CASES[name].config()), model)
    jt.save_adapter(adapter, model, tmp_path / "adapter")
    export(tmp_path / "adapter", tmp_path / "merged", merge=True)
    assert np.abs(jt.load(tmp_path / "merged").params["layers"]["0"]["o_bias"] - model.params["layers"]["0"]["o_bias"]).max() >= 0


def test_an_adapter_of_another_method_is_not_gone_on_from(folder, tmp_path):
    model = jt.load(folder / "model")
    jt.save_adapter(jt.init_adapter(jax.random.key(0), model, jt.IA3Config()), model, tmp_path / "ia3")
    with pytest.raises(ConfigError, match="holds an adapter of method ia3, and the method is vera; write method: ia3"):
        train(config(folder, tmp_path / "run", method="vera", init_adapter=str(tmp_path / "ia3")))


@pytest.mark.parametrize(("keys", "message"), [
    ({"method": "lora", "ia3": {"target_modules": ["q_proj"]}}, "ia3 is given, and the method is lora; write method: ia3"),
    ({"method": "vera", "loraplus_lr_ratio": 4}, "method vera has none"),
    ({"method": "oft", "oft": {"r": 4}}, "one of them has to be above 0, the other 0"),
    ({"method": "boft", "boft": {"boft_n_butterfly_factor": 2}}, "without its CUDA kernel"),
    ({"method": "adalora", "adalora": {"target_r": 20}}, "from 1 to adalora.init_r, 12"),
    ({"method": "vera", "vera": {"d_initail": 1}}, "did you mean vera.d_initial"),
    ({"method": "lora", "lora": {"init_lora_weights": "loftq"}}, "makes up for what packing takes from the base; write method: qlora"),
    ({"method": "qlora", "lora": {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 8}}}, "nf4-dq has 4; write .*loftq_bits: 4"),
    ({"method": "lora", "lora": {"eva_config": {"rho": 3}}}, "is of another beginning; write lora.init_lora_weights: eva"),
])  # fmt: skip
def test_keys_that_do_not_go_together(keys, message):
    with pytest.raises(ConfigError, match=message):
        load_config({"model": "m"} | keys)


def test_a_config_keeps_the_group_of_its_method():
    run = load_config({"model": "m", "method": "vera", "vera": {"r": 8}})
    assert load_config(run.to_dict()) == run and "ia3" not in run.to_dict() and run.to_dict()["vera"]["r"] == 8


@pytest.mark.parametrize("name", ["prompt tuning", "prefix tuning"])
def test_generation_goes_on_from_the_virtual_tokens(folder, name):
    """Each token is the most likely one after the text so far, computed again without a cache; rows of different lengths share a batch."""
    model = jt.load(folder / "model")
    adapter = stir(jt.init_adapter(jax.random.key(0), model, CASES[name].config()), model)
    prompts = [[15, 9, 33], [12, 71, 18, 40, 12, 13, 77]]
    answers = jt.generate_tokens(model, prompts, adapter, max_new_tokens=4)
    params = jt.compose(model.params, adapter)
    for prompt, answer in zip(prompts, answers, strict=True):
        text = np.asarray([prompt + answer.tokens], np.int32)
        likeliest = np.asarray(jt.forward(model.config, params, text))[0].argmax(-1)
        assert answer.tokens == likeliest[len(prompt) - 1 : -1].tolist()
    plain = jt.generate_tokens(model, prompts, None, max_new_tokens=4)
    assert [one.tokens for one in plain] != [one.tokens for one in answers]


def test_adapters_that_are_no_sums_are_not_mixed(folder):
    model = jt.load(folder / "model")
    adapter = jt.init_adapter(jax.random.key(0), model, jt.OFTConfig())
    with pytest.raises(ConfigError, match="method oft is no sum of low-rank products"):
        jt.mix({"a": adapter}, ["a"])


def test_a_run_that_begins_with_singular_vectors(folder, tmp_path, steps_compiled):
    """The base is changed for the run only: the adapter on disk, of twice the rank, applies to the original base, which DPO compares with.
    """
    pairs = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": " no"} for row in ROWS]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    run = config(folder, tmp_path / "run", objective="dpo", data={"train": str(tmp_path / "pairs.jsonl"), "max_length": 32}, max_steps=2,
                 lora={"r": 3, "init_lora_weights": "pissa_niter_4", "target_modules": ["q_proj", "down_proj"]}, quantization="int8",
                 save_strategy="no", mesh={"data": 1, "fsdp": 8})  # fmt: skip
    result = train(run)
    assert steps_compiled() == 1
    model = jt.load(folder / "model", quantization="int8")
    adapter = jt.load_adapter(tmp_path / "run" / "adapter", model)
    assert {rank for site in adapter.sites for rank in site.ranks} == {6}
    tokens = np.asarray([[15, 6, 27, 18]], np.int32)
    found = [jt.forward(model.config, jt.compose(model.params, one), tokens) for one in (adapter, result.trainable, None)]
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)
    assert np.abs(found[0] - found[2]).max() > 1e-3
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first = next(row for row in rows if row.get("step") == 1)
    assert abs(first["loss"] - np.log(2)) < 1e-3  # policy and reference are the same model before the first step
    with pytest.raises(ConfigError, match="moves the base beside the adapter, which jt.train does for a run"):
        jt.init_adapter(jax.random.key(0), model, jt.LoraConfig(init_lora_weights="pissa"))


BEGINNINGS = {
    "loftq": {"quantization": "nf4", "lora": {"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 3}, "r": 8}},
    "eva": {"lora": {"init_lora_weights": "eva", "r": 2, "eva_config": {"rho": 2}}},
}


@pytest.mark.parametrize("way", BEGINNINGS)
def test_what_begins_with_files_or_rows_is_kept(folder, tmp_path, monkeypatch, caplog, way):
    """An ordinary adapter, with its base beside it if that differs; a resume uses both (whole runs: tests/test_train.py)."""
    keys = config(folder, tmp_path / "run", per_device_train_batch_size=8, **BEGINNINGS[way])
    keys["lora"] = {"target_modules": ["q_proj", "down_proj"]} | keys["lora"]
    run, out, mesh = load_config(keys | {"dtype": "float32"}), tmp_path / "run", parallel.make_mesh(MeshConfig(), jax.devices()[:1])
    out.mkdir()
    (out / "config.yaml").write_text(json.dumps(run.to_dict()))
    rows = data.load(run, open_model(run.model).tokenizer).train

    def begun(run):
        opened = open_model(base_of(out, run) if run.resume else run.model)
        return startup.init_trainable(run, opened, startup.read_weights(run, opened, mesh), rows, mesh)

    monkeypatch.setattr(eva, "SILENCE", 0.0)
    with caplog.at_level("INFO", "jaxtune"):
        model, adapter = begun(run)
    assert ("inputs not yet converged" in caplog.text) == (way == "eva")
    startup.save_initial(run, model, adapter, out)
    resumed, again = begun(run.replace(resume=True))
    for one, other in zip(jax.tree.leaves(resumed.params), jax.tree.leaves(model.params), strict=True):
        np.testing.assert_array_equal(one, other)
    assert [site for site in adapter.sites if any(site.ranks)] == list(again.sites)
    for one, other in zip(jax.tree.leaves(adapter.params), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_array_equal(one, other)
    jt.save_adapter(adapter, model, out / "adapter")
    described = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert described["init_lora_weights"] is True and described["eva_config"] is None
    plain = jt.load(folder / "model")
    if way == "eva":
        ranks = [rank for site in adapter.sites for rank in site.ranks]
        assert sum(ranks) == 2 * 6 and len(set(ranks)) > 1 and max(ranks) <= 4
        assert not any(np.any(adapter.params[site.path]["b"]) for site in adapter.sites)
        jt.load_adapter(out / "adapter", plain)
        shares = {site.path: [0, *site.ranks[1:]] for site in adapter.sites}  # a layer without rank is no longer a target
        sites = find_sites(model.config, eva.redistributed(adapter, shares, adaptable(model.config)))
        assert {site.path: list(site.ranks) for site in sites} == shares
        return
    assert described["base_model_name_or_path"] == find(out).base == str(out / "base")
    dense, found = plain.params["layers"]["0"]["down"], jt.compose(model.params, adapter)["layers"]["0"]["down"]
    packed, found = quantize(dense[0], "nf4").dense("float32"), jax.tree.map(lambda x: x[0], found).dense("float32")
    assert np.square(found - dense[0]).sum() < 0.7 * np.square(packed - dense[0]).sum()
    with pytest.raises(ModelError, match="begun with LoftQ: .* open the base with quantization: nf4-dq or nf4"):
        jt.load_adapter(out / "adapter", plain)


def test_a_plan_counts_what_moves_the_base(folder, tmp_path):
    def weights(**start):
        run = load_config(config(folder, tmp_path / "run", quantization="nf4", lora={"r": 2, "target_modules": ["q_proj"]} | start))
        mesh = parallel.make_mesh(run.mesh)
        _, (state, base, batch), model_config = abstract_step(run, open_model(run.model).config, mesh)
        return by_cause(run, model_config, state, base, batch, 2**30)["weights"]

    pairs = 3 * 4 * 2 * (32 + 64)  # float32, of three layers, each with a scale
    assert weights(init_lora_weights="pissa") - weights() == pairs + 3 * 4
    assert lora_init.with_widest_ranks(load_config({"model": "m", "lora": {"init_lora_weights": "eva", "r": 3}})).lora.r == 6


def test_virtual_tokens_are_exported_as_they_are(folder, tmp_path):
    model = jt.load(folder / "model")
    adapter = jt.init_adapter(jax.random.key(0), model, jt.PrefixTuningConfig(num_virtual_tokens=3))
    jt.save_adapter(adapter, model, tmp_path / "prefix")
    with pytest.raises(ModelError, match="method prefix_tuning: tokens before a text.*export it as it is"):
        export(tmp_path / "prefix", tmp_path / "merged", merge=True)
    assert not (tmp_path / "merged").exists()
    again = jt.load_adapter(export(tmp_path / "prefix", tmp_path / "copy"), model)
    np.testing.assert_array_equal(again.params["prompt"]["embeddings"], adapter.params["prompt"]["embeddings"])
