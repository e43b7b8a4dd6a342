"""`jaxtune export`: adapters as they are, merged and verified, and as GGUF."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
import yaml
from safetensors.numpy import load_file, save_file

from jaxtune import export as export_module
from jaxtune import peft
from jaxtune.config import LoraConfig
from jaxtune.convert import check, load, load_adapter, save_adapter
from jaxtune.convert.gguf_file import GGUFFile
from jaxtune.errors import ConfigError, ModelError
from jaxtune.export import export

LORA = LoraConfig(r=4, lora_alpha=8)


def make_run(folder: Path, lora=LORA, hf=tiny.LLAMA, **config) -> Path:
    """A model and a run folder with an adapter that has an effect, as left by `train`."""
    tiny.write_chat_model(folder / "model", hf)
    model = load(folder / "model")
    adapter = peft.init_adapter(jax.random.key(1), model, lora)
    adapter = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape) * (x == 0), adapter)
    run = folder / "run"
    run.mkdir()
    rows = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(3)]
    (folder / "eval.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"train": str(folder / "eval.jsonl"), "eval": str(folder / "eval.jsonl")}
    fields = {"model": str(folder / "model"), "method": "lora", "dtype": "float32", "data": data} | config
    (run / "config.yaml").write_text(yaml.safe_dump(fields))
    save_adapter(adapter, model, run / "adapter")
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


def logits(params, config):
    return check.logits(config, params, check.prompt_ids(None, config.vocab_size))


def test_an_adapter_is_copied_as_it_is(run, tmp_path):
    export(run, tmp_path / "out")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (run / "adapter" / name).read_bytes()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_damaged_adapter_is_not_copied(run, tmp_path, name):
    shutil.copytree(run / "adapter", tmp_path / "a")
    (tmp_path / "a" / name).write_bytes((run / "adapter" / name).read_bytes()[:-50])
    (tmp_path / "a" / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    with pytest.raises(ModelError, match=f"{name}.*(cut|not valid JSON)"):
        export(tmp_path / "a", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_without_numbers_is_not_copied(run, tmp_path):
    shutil.copytree(run / "adapter", tmp_path / "a")
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    save_file({name: np.full_like(x, np.inf) for name, x in tensors.items()}, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="lora_A.weight holds NaN or infinity"):
        export(tmp_path / "a", tmp_path / "out", format="peft")


def test_a_link_to_nowhere(run, tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "none" / "there")
    with pytest.raises(ModelError, match="out is a dangling link"):
        export(run, tmp_path / "out")


def test_a_base_that_is_no_name(run, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text('{"base_model_name_or_path": 5}')
    with pytest.raises(ModelError, match="has base_model_name_or_path=5, so its base is unknown"):
        export(tmp_path / "a", tmp_path / "out", merge=True)


def test_a_gguf_file_without_a_tokenizer_is_told(tmp_path, caplog):
    tiny.write(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "out", format="gguf")
    assert "has no tokenizer" in caplog.text and not (tmp_path / "out" / "Modelfile").exists()


@pytest.mark.parametrize("source", [".", "adapter"])
def test_merged_is_base_and_adapter(run, tmp_path, source, caplog):
    caplog.set_level("INFO", "jaxtune")
    export(run / source, tmp_path / "out", merge=True)
    base, merged = load(run.parent / "model"), load(tmp_path / "out")
    wanted = logits(peft.compose(base.params, load_adapter(run / "adapter", base)), base.config)
    compared = check.compare(wanted, logits(merged.params, merged.config))
    assert compared.difference < 1e-4 and compared.agreement == 1
    assert "merged beside base and adapter: largest logit difference" in caplog.text
    assert "built-in prompts" not in caplog.text  # the run's own rows were used
    assert check.compare(logits(base.params, base.config), wanted).difference > 0.1  # the adapter has an effect
    assert merged.tokenizer.chat_template == base.tokenizer.chat_template and merged.generation_config == base.generation_config


def test_an_adapter_on_one_use_of_a_tied_matrix_unties_it(tmp_path):
    run = make_run(tmp_path, LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]), tiny.LLAMA | {"tie_word_embeddings": True})
    export(run, tmp_path / "out", merge=True)
    merged = load(tmp_path / "out")
    assert merged.hf_config["tie_word_embeddings"] is False
    np.testing.assert_array_equal(merged.params["head"], load(tmp_path / "model").params["embed"])


WHOLE = LoraConfig(
    r=2, target_modules=["q_proj", "o_proj"], layers_to_transform=[0, 2], bias="lora_only", modules_to_save=["norm", "layers.1.mlp"],
    trainable_token_indices=[6, 7],
)  # fmt: skip
MOE = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}


@pytest.mark.parametrize(
    "lora, hf, format",
    [(WHOLE, {"tie_word_embeddings": True}, "hf"), (LoraConfig(r=2), MOE | {"attention_bias": False}, "gguf"),
     (LoraConfig(r=2, lora_bias=True, target_modules=["k_proj"], layers_to_transform=1), {}, "hf")],
    ids=["whole", "experts", "own biases"],
)  # fmt: skip
def test_more_than_pairs_is_merged_from_disk_to_disk(tmp_path, lora, hf, format):
    run = make_run(tmp_path, lora, tiny.LLAMA | hf, dtype="bfloat16")  # the dtype to which the run rounded its base, and not the result's
    export(run, tmp_path / "out", merge=True, format=format, type="f32", bound=1e-4)  # compares logits before it is finished
    merged = load(tmp_path / "out" / "out-f32.gguf" if format == "gguf" else tmp_path / "out")
    base = load(tmp_path / "model")
    wanted = peft.compose(base.params, load_adapter(run / "adapter", base))
    compared = check.compare(logits(wanted, base.config), logits(merged.params, merged.config))
    assert compared.difference < 1e-4 < check.compare(logits(base.params, base.config), logits(merged.params, merged.config)).difference
    assert merged.config.tie_word_embeddings == base.config.tie_word_embeddings


def test_a_bias_that_has_no_place_is_refused(tmp_path):
    run = make_run(tmp_path, LoraConfig(r=2, lora_bias=True, target_modules=["up_proj"]))
    with pytest.raises(ModelError, match="lora_bias.* but the model has no layers/0/up_bias to merge it into"):
        export(run, tmp_path / "out", merge=True)
    assert not (tmp_path / "out").exists()


def test_a_packed_base_is_merged_as_what_it_stands_for(tmp_path, caplog):
    caplog.set_level("INFO", "jaxtune")
    run = make_run(tmp_path, hf=tiny.LLAMA | {"hidden_size": 64}, method="qlora", quantization="nf4")
    export(run, tmp_path / "out", merge=True)
    assert "trained as nf4; it is merged as what that stands for, in bfloat16" in caplog.text
    base = load(tmp_path / "model", quantization="nf4")
    merged = peft.merge(base.params, load_adapter(run / "adapter", base), "bfloat16")
    np.testing.assert_array_equal(load(tmp_path / "out", "bfloat16").params["layers"]["0"]["q"], merged["layers"]["0"]["q"])


def test_a_merge_that_went_wrong_is_refused_and_leaves_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "composed", lambda config, adapter, base: export_module.abstract(config))  # forgets the adapter
    with pytest.raises(ModelError, match="the merged model is not the base with its adapter: largest logit difference"):
        export(run, tmp_path / "out", merge=True)
    monkeypatch.setattr(check, "logits", lambda *arguments: [np.full((2, 3), np.nan)])
    with pytest.raises(ModelError, match="gives logits that are not numbers"):
        export(run, tmp_path / "out", merge=True)
    assert list(tmp_path.iterdir()) == []


def test_rows_that_are_gone_are_no_obstacle(run, tmp_path, caplog):
    caplog.set_level("INFO", "jaxtune")
    config = yaml.safe_load((run / "config.yaml").read_text())
    other = tmp_path / "run"
    (other / "adapter").mkdir(parents=True)
    for file in (run / "adapter").iterdir():
        (other / "adapter" / file.name).write_bytes(file.read_bytes())
    (other / "config.yaml").write_text(yaml.safe_dump(config | {"data": {"train": "/gone.jsonl", "eval": "/gone.jsonl"}}))
    export(other, tmp_path / "out", merge=True)
    assert "the built-in prompts are used" in caplog.text


@pytest.mark.parametrize(("type", "bound"), [("f32", 1e-4), ("q8_0", 1.0)])
def test_gguf_with_a_modelfile(run, tmp_path, type, bound):
    export(run, tmp_path / "out", format="gguf", type=type)
    file = tmp_path / "out" / f"out-{type}.gguf"
    base, merged = load(run.parent / "model"), load(file)
    wanted = logits(peft.compose(base.params, load_adapter(run / "adapter", base)), base.config)
    assert check.compare(wanted, logits(merged.params, merged.config)).difference < bound
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert text.startswith(f"FROM ./{file.name}\nTEMPLATE") and 'PARAMETER stop "<|im_end|>"' in text


def test_an_adapter_for_llama_cpp(run, tmp_path):
    export(run, tmp_path / "out", format="gguf-lora", type="F16")
    file = GGUFFile(tmp_path / "out" / "out-lora-f16.gguf")
    assert file.metadata["general.type"] == "adapter" and file.metadata["adapter.lora.alpha"] == LORA.lora_alpha
    assert file.tensors["blk.2.ffn_down.weight.lora_a"].shape == (LORA.r, 48)
    assert file.tensors["blk.0.attn_q.weight.lora_b"].dtype == np.float16
    with pytest.raises(ConfigError, match="format gguf-lora is for an adapter as it is"):
        export(run.parent / "model", tmp_path / "not", format="gguf-lora")


def test_a_model_is_converted_without_a_run(run, tmp_path):
    export(run.parent / "model", tmp_path / "new" / "whole.gguf", format="gguf", type="f32")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["whole.gguf"]  # the file itself
    with pytest.raises(ModelError, match="nothing is overwritten"):
        export(run.parent / "model", tmp_path / "new" / "whole.gguf", format="gguf", type="f32")
    export(tmp_path / "new" / "whole.gguf", tmp_path / "hf")
    found, wanted = (load_file(folder / "model.safetensors") for folder in (tmp_path / "hf", run.parent / "model"))
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array)


def test_a_fully_tuned_run_is_its_model(run, tmp_path):
    full = tmp_path / "run"
    full.mkdir()
    (full / "config.yaml").write_text(yaml.safe_dump({"model": "org/base", "method": "full", "data": {"train": "x.jsonl"}}))
    with pytest.raises(ModelError, match="a run without a result"):
        export(full, tmp_path / "out")
    for fold in ("fold_0", "fold_1"):
        (full / fold).mkdir()
        (full / fold / "run.json").touch()
    with pytest.raises(ModelError, match="holds several runs; name one of them .there are fold_0, fold_1"):
        export(full, tmp_path / "out")
    (full / "run.json").touch()
    tiny.write(full / "model")
    export(full, tmp_path / "out", dtype="bfloat16")
    assert load(tmp_path / "out", "auto").config.dtype == "bfloat16"
    with pytest.raises(ConfigError, match="no adapter to merge"):
        export(full, tmp_path / "again", merge=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(format="onnx"), "format 'onnx' is not known; there are hf, text, peft, gguf"),
        (dict(format="gguf", type="q9"), "type 'q9' is not one that gguf is written in; there are f32, .* q4_k_m"),
        (dict(format="gguf-lora", type="q4_k_m"), "type 'q4_k_m' is not one that gguf-lora is written in; there are f32, f16, bf16"),
        (dict(merge=True, format="peft"), "format peft is for an adapter as it is"),
        (dict(merge=True, dtype="int8"), "dtype 'int8' is not one of"),
    ],
)
def test_arguments_that_make_no_sense(run, tmp_path, arguments, message):
    with pytest.raises(ConfigError, match=message):
        export(run, tmp_path / "out", **arguments)


def test_an_adapter_without_a_base(run, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "a/adapter_model.safetensors")
    with pytest.raises(ModelError, match="has no base_model_name_or_path"):
        export(tmp_path / "a", tmp_path / "out", merge=True)


def test_the_command_and_its_errors(run, tmp_path):
    command = [sys.executable, "-m", "jaxtune.export", str(run), str(tmp_path / "out")]
    done = subprocess.run([*command, "--merge"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "out") and "largest logit difference" in done.stderr
    again = subprocess.run([*command, "--merge"], capture_output=True, text=True)
    assert again.returncode == 2 and again.stderr.splitlines()[-1].startswith("error: ") and "not empty" in again.stderr
    assert "Traceback" not in again.stderr
