"""What a plan reports: the batch is that of a run, the bytes are those of the arrays, and if it does not fit, settings that do."""

import json
import re
from types import SimpleNamespace

import jax
import pytest
import tiny
from jax.experimental import topologies
from rich.console import Console

import jaxtune.train  # noqa: F401
from jaxtune import costs, data, parallel, plan_targets, startup
from jaxtune.config import MeshConfig, load_config
from jaxtune.config.policy import POLICY
from jaxtune.convert.bitsandbytes import packed_as
from jaxtune.convert.heads import head_of, headed
from jaxtune.convert.load import open_config, open_tokenizer
from jaxtune.errors import ConfigError
from jaxtune.objectives import OBJECTIVES
from jaxtune.plan import AUTO, _candidates, _needs, compare, errors_bytes, plan
from jaxtune.plan_report import show, side_by_side
from jaxtune.shapes import abstract_batch, abstract_params, abstract_step
from jaxtune.train import train

OWN = {"compilation_cache": False}  # programs compiled here are not shared with other tests
PAIR = {"prompt": "one two", "chosen": " three", "rejected": " four"}
ROWS = {
    "sft": {"prompt": "one", "completion": " two"}, "kto": {"prompt": "one", "completion": " two", "label": True},
    "stepwise_reward": {"prompt": "one", "completions": ["two"], "labels": [True]}, "classification": {"text": "one", "label": [0.5, 1.5]},
}  # fmt: skip
KEYS = {"classification": {"num_labels": 2, "problem_type": "regression"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan") / "model"
    tiny.write_chat_model(folder, tiny.LLAMA | {"num_hidden_layers": 1})
    return folder


# the answers of POLICY: tests/test_rollout.py; distill's are the rows of sft
@pytest.mark.parametrize("objective", sorted(OBJECTIVES.keys() - {*POLICY, "distill"}))
def test_the_planned_batch_is_that_of_a_run(folder, tmp_path, objective):
    rows = [ROWS.get(objective, PAIR) | {"id": n} for n in range(2 if objective == "kto" else 1)]
    tiny.write_rows(tmp_path, rows)
    settings = {"train": str(tmp_path / "rows.jsonl"), "max_length": 16, "cache_dir": str(tmp_path / "cache"), "packing": False}
    config = load_config({"model": str(folder), "objective": objective, "data": settings} | KEYS.get(objective, {}))
    mesh = parallel.make_mesh(MeshConfig(data=1), jax.devices()[:1])
    real = data.load(config, open_tokenizer(folder)).train.batch_at(0).replace(capacity=None)
    planned = abstract_batch(config.replace(per_device_train_batch_size=real.tokens.shape[1]), mesh)
    assert jax.tree.structure(planned) == jax.tree.structure(real)
    T = real.tokens.shape[2]
    for one, other in zip(jax.tree.leaves(planned), jax.tree.leaves(real), strict=True):
        assert one.dtype == other.dtype and [16 if n == T else n for n in other.shape] == list(one.shape)


def test_a_reward_model_and_a_preference_run_are_planned(folder):
    def planned(**keys):
        data = {"train": "none", "max_length": 32}
        config = load_config({"model": str(folder), "data": data, "mesh": {"data": 1, "fsdp": -1}} | OWN | keys)
        model = headed(open_config(folder), head_of(config))
        _, (state, base, batch), model = abstract_step(config, model, parallel.make_mesh(config.mesh))
        return costs.by_cause(config, model, state, base, batch, 2**30)["logits"], costs.flops(config, model, 32)

    (no_logits, reward), (logits, sft), (_, dpo) = planned(objective="reward"), planned(), planned(objective="dpo")
    assert no_logits == 0 < logits
    assert reward < sft < dpo


@pytest.mark.parametrize(
    ("keys", "said"),
    [({"attention": "splash"}, "for TPUs"), ({"method": "lor"}, "method 'lor' is not"), ({"objective": "sf"}, "objective 'sf' is not")],
)
def test_what_is_not_known_here_is_refused(folder, keys, said):
    with pytest.raises(ConfigError, match=said):
        plan({"model": str(folder), "data": {"train": "none"}} | keys)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A model's config.json and nothing else."""
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps(tiny.LLAMA | {"num_hidden_layers": 1}))
    return path


def run(folder, **keys):
    own = {"model": str(folder), "data": {"train": "x.jsonl", "max_length": 32}, "output_dir": "x", "per_device_train_batch_size": 4} | OWN
    return load_config(own | keys)


def small(memory, devices=()):
    """A machine with that much memory."""
    return lambda name: plan_targets.Target("small", list(devices), plan_targets.Chip(memory, 1e9, 1.0), "as the test says")


def test_what_does_not_fit_is_answered_by_what_does(model_folder, monkeypatch):
    config = run(model_folder, method="qlora", gradient_checkpointing=True, per_device_train_batch_size=1)
    alone, known = jax.devices()[:1], {}

    def once(config, *args):
        known[config] = known.get(config) or _needs(config, *args)
        return known[config]

    monkeypatch.setattr("jaxtune.plan._needs", once)
    monkeypatch.setattr("jaxtune.plan.find_target", small(None, alone))
    needed = plan(config, target="small").peak_bytes
    monkeypatch.setattr("jaxtune.plan.find_target", small(needed - 1, alone))
    result = plan(config, target="small")
    assert result.fits is False and [row["change"] for row in result.instead][-1] == "shorter rows"
    (row,) = (row for row in result.instead if row["change"] == "shorter rows")
    again = plan(config, [f"{key}={json.dumps(value)}" for key, value in row["keys"].items()], target="small", alternatives=False)
    assert again.fits and again.peak_bytes == row["peak_bytes"] < needed


def needs(config, model_config, mesh, rows):
    """Replaces the compiler: bytes by a formula."""
    each = {True: 1, "full": 1, "offload": 0.5}.get(config.gradient_checkpointing, 4)
    weights = {"full": 8000, "lora": 4000, "qlora": 1000}[config.method] // mesh.shape["fsdp"]
    causes = dict.fromkeys(("weights", "scales", "trainable", "optimizer", "activations"), 1)
    flops = config.gradient_accumulation_steps * (2.0 if config.gradient_checkpointing else 1.0)
    return int(weights + 10 * each * config.per_device_train_batch_size * config.data.max_length), causes, flops


def test_every_kind_of_change_is_tried_the_mildest_first(model_folder, monkeypatch):
    monkeypatch.setattr("jaxtune.plan._needs", needs)

    def instead(memory, devices=1, **keys):
        monkeypatch.setattr("jaxtune.plan.find_target", small(memory, jax.devices()[:devices]))
        keys = {"method": "lora", "gradient_checkpointing": False, "data": {"train": "x.jsonl", "max_length": 64}} | keys
        return {row["change"]: row["keys"] for row in plan(run(model_folder, **keys), target="small").instead}

    micro, steps = "per_device_train_batch_size", "gradient_accumulation_steps"
    found = instead(7000)  # 14240 are needed, 6560 with what is computed again
    assert found["recompute activations"] == {"gradient_checkpointing": True}
    assert found["a smaller micro-batch"] == {micro: 2, steps: 2, "gradient_checkpointing": True}
    assert found["shorter rows"]["data.max_length"] == 32 and "a 4-bit base" not in found  # 11240
    drawn = instead(7000, objective="grpo", num_generations=2)["a smaller micro-batch"]
    assert drawn == {micro: 2, steps: 2, "gradient_checkpointing": True, "steps_per_generation": 2}  # as many answers at a time
    assert list(instead(12_000))[-1] == "a smaller micro-batch"  # the slowest last
    assert "a 4-bit base" in instead(12_000)
    found = instead(4700)
    assert found["a smaller micro-batch"] == {micro: 1, steps: 4, "gradient_checkpointing": True} and "recompute activations" not in found
    assert found["shorter rows"]["data.max_length"] == 16
    assert instead(16_000, 8, method="full", mesh={"data": 8})["weights over the devices"] == {"mesh.data": 1, "mesh.fsdp": -1}
    assert {"LoRA", "LoRA over a 4-bit base"} <= instead(15_000, method="full").keys()
    assert instead(100) == {}
    offload = "each layer's input in host memory"
    assert offload not in instead(12_000)  # a CPU's memory is the host's
    assert offload in dict(_candidates(run(model_folder, method="lora"), [SimpleNamespace(platform="tpu")]))


BATCH = "per_device_train_batch_size"
GROUPS = {"objective": "grpo", "num_generations": 12, "per_device_train_batch_size": 6, "gradient_accumulation_steps": 2}
PARTS = {"objective": "ppo", "num_mini_batches": 6, "per_device_train_batch_size": 6, "gradient_accumulation_steps": 2}


@pytest.mark.parametrize(
    ("key", "value", "keys"),
    [(BATCH, 37, {}), (BATCH, 36, GROUPS), (BATCH, 36, PARTS), ("data.max_length", 256, {})],
    ids=["batch", "whole groups", "whole parts", "length"],
)
def test_the_largest_setting_that_fits(model_folder, monkeypatch, key, value, keys):
    config = run(model_folder, method="lora", **keys)
    monkeypatch.setattr("jaxtune.plan._needs", needs)
    monkeypatch.setattr("jaxtune.plan.find_target", small(None, jax.devices()[:1]))
    with pytest.raises(ConfigError, match="memory of target small is not known"):
        plan(config, target="small", auto=key)
    room = 4000 + 40 * (37 * 32 if key != "data.max_length" else 4 * 300)
    monkeypatch.setattr("jaxtune.plan.find_target", small(room, jax.devices()[:1]))
    result = plan(config, target="small", auto=key)
    assert result.fits and result.settings[key.rpartition(".")[2]] == value and key in AUTO


def test_what_computes_the_least_again_and_fits(model_folder, monkeypatch):
    def found(room, **keys):
        monkeypatch.setattr("jaxtune.plan.find_target", small(room, jax.devices()[:1]))
        result = plan(run(model_folder, **{"method": "lora"} | keys), target="small", auto="gradient_checkpointing")
        return result.fits, result.settings["gradient_checkpointing"]

    monkeypatch.setattr("jaxtune.plan._needs", needs)  # 9120 where products are kept, 5280 where layers are computed again, 4640 offloaded
    assert found(10_000) == (True, False) and found(5_300) == (True, "full") and found(5_000) == (True, "offload")
    assert found(100) == (False, "auto")
    full = {"method": "full", "optimizer_in_bwd": True, "max_grad_norm": 0.0}
    assert found(20_000, **full) == (True, "full")


def test_room_that_is_left_is_told(model_folder, monkeypatch):
    def told(room, **keys):
        monkeypatch.setattr("jaxtune.plan.find_target", small(room, jax.devices()[:1]))
        return costs.ROOM in plan(run(model_folder, method="lora", **keys), target="small").notes

    monkeypatch.setattr("jaxtune.plan._needs", needs)
    assert told(20_000, gradient_checkpointing=True)
    assert not told(6_000, gradient_checkpointing=True) and not told(20_000, gradient_checkpointing="dots") and not told(20_000)


def test_the_products_that_are_kept(tmp_path):
    """What a step needs in addition if it keeps them, as counted and as compiled."""
    (tmp_path / "config.json").write_text(json.dumps(tiny.LLAMA | {"num_hidden_layers": 12}))
    data = {"train": "x.jsonl", "max_length": 256}
    kept, again = (plan(run(tmp_path, method="lora", lora={"r": 1}, data=data, gradient_checkpointing=remat)) for remat in ("dots", True))
    more = kept.bytes["activations"] - again.bytes["activations"]
    assert more == pytest.approx(kept.peak_bytes - again.peak_bytes, rel=0.1)


def test_methods_side_by_side(model_folder, monkeypatch, capsys):
    """One does not fit and the others do; an unusable one says why, in its row."""
    config = run(model_folder, method="lora", learning_rate=1e-3)
    alone = jax.devices()[:1]
    monkeypatch.setattr("jaxtune.plan.find_target", small(1, alone))
    plans = compare(config, "small")
    assert list(plans) == ["full", "lora", "qlora"] and not any(one.fits for one in plans.values())
    assert plans["qlora"].bytes["weights"] < plans["lora"].bytes["weights"]
    assert plans["full"].bytes["optimizer"] > plans["lora"].bytes["optimizer"]
    mesh = parallel.make_mesh(MeshConfig(), alone)
    _, (state, base, _), _ = abstract_step(run(model_folder, method="qlora"), open_config(model_folder), mesh)
    held, adapter = (sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) for tree in (base, state.trainable))
    found = plans["qlora"].bytes  # of arguments: the content of the trees' shapes
    assert found["weights"] + found["scales"] == held and found["trainable"] == adapter
    assert 2 * adapter <= found["optimizer"] <= 2 * adapter + 64
    side_by_side(plans, Console())
    shown = capsys.readouterr().out
    assert shown.count("does not fit") == 3 and "method=qlora" in shown and "steps and hours are not known" in shown
    side_by_side(plans | {"full": "no"}, Console())
    assert "full: no" in capsys.readouterr().out
    show(plans["lora"], Console())
    assert "no single change" in capsys.readouterr().out


@pytest.mark.parametrize(("method", "remat"), [("lora", False), ("lora", True), ("full", True)])
def test_operations_are_about_those_that_xla_counts(tmp_path, method, remat):
    """XLA counts the loops over layers once, as if there were one layer; with more layers only the optimiser grows, not the products."""

    def step_of(layers: int):
        wide = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 128, "vocab_size": 1024, "num_key_value_heads": 4}
        (tmp_path / "config.json").write_text(json.dumps(tiny.LLAMA | wide | {"num_hidden_layers": layers}))
        return abstract_step(config, open_config(tmp_path), parallel.make_mesh(MeshConfig(), jax.devices()[:1]))

    def counted(layers: int) -> float:
        step, arguments, _ = step_of(layers)
        return step.lower(*arguments).compile().cost_analysis()["flops"]

    data = {"train": "x.jsonl", "max_length": 16}  # short: a tile of scores is computed whole, and counted here by half
    config = run(tmp_path, method=method, gradient_checkpointing=remat, lora={"r": 1}, data=data, per_device_train_batch_size=8)
    two, three = counted(2), counted(3)
    assert costs.flops(config, step_of(1)[2], 16) == pytest.approx(two - 2 * (three - two), rel=0.03)


class Seen(Exception):
    """The step that a run starts with."""


@pytest.mark.parametrize(
    "keys",
    [
        {"method": "full", "optim": "adamw_8bit", "trainable_parameters": "[layers.0.mlp., model.norm]", "dtype": "bfloat16"},
        {"objective": "dpo", "method": "lora", "zero_stage": 1}, {"objective": "reward", "method": "full", "mesh.fsdp": 2},
        {"objective": "distill", "teacher_quantization": "nf4-dq", "method": "qlora", "gradient_accumulation_steps": 2,
         "data.packing": False},
    ],
    ids=lambda keys: keys.get("objective", "sft"),
)  # fmt: skip
def test_the_program_planned_is_the_program_run(folder, tmp_path, monkeypatch, keys):
    """Exactly equal, so that its bytes are those of the run and one compilation serves both."""
    row = PAIR if keys.get("objective") in ("dpo", "reward") else {"prompt": "one", "completion": " two three"}
    keys = keys | ({"teacher": str(folder)} if keys.get("objective") == "distill" else {})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row | {"prompt": f"one {n}"}) + "\n" for n in range(20)))
    data = {"train": str(tmp_path / "rows.jsonl"), "max_length": 64, "cache_dir": str(tmp_path / "cache")}
    config = load_config({"model": str(folder), "data": data, "output_dir": str(tmp_path / "run"), "report_to": []} | OWN,
                         [f"{key}={value}" for key, value in keys.items()])  # fmt: skip
    texts = []

    def lowered(config, model, mesh, rows):
        step, arguments, _ = abstract_step(config, model, mesh, rows)
        texts.append(step.lower(*arguments).as_text())
        return needs(config, model, mesh, rows)

    def programs(*args):
        step, eval_step = jitted(*args)

        def first(*arguments):
            texts.append(step.lower(*arguments).as_text())
            raise Seen

        return first, eval_step

    jitted = startup.programs
    monkeypatch.setattr("jaxtune.plan._needs", lowered)
    monkeypatch.setattr(startup, "programs", programs)
    monkeypatch.setattr(startup, "compile_ahead", lambda *_: None)  # which also has shapes, but not the run's arrays
    plan(config)
    with pytest.raises(Seen):
        train(config)
    assert texts[0] == texts[1]


def test_steps_and_shapes_are_those_of_the_rows_where_they_are_here(folder, tmp_path, monkeypatch):
    batches = []
    monkeypatch.setattr("jaxtune.plan._needs", lambda config, model, mesh, rows: batches.append(rows) or needs(config, model, mesh, rows))
    monkeypatch.setattr("jaxtune.plan.find_target", small(2**30, jax.devices()[:2]))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"one {n}", "completion": " two" * n}) + "\n" for n in range(1, 12)))
    settings = {"train": str(tmp_path / "rows.jsonl"), "max_length": 500, "cache_dir": str(tmp_path / "cache"), "packing": False}
    config = run(folder, data=settings, per_device_train_batch_size=2, num_train_epochs=2, mesh={"data": 2})
    found = plan(config, target="small")
    real = data.load(config, open_tokenizer(folder), 2)
    assert found.steps == data.total_steps(config, real.train) == 6  # 11 rows, 4 per step, twice
    assert found.rows == found.rows | {"documents": 11, "rows": 11, "length": 64, "steps_per_epoch": 3}
    assert found.hours_at_least == pytest.approx(6 * found.seconds_at_least / 3600)
    mesh = parallel.make_mesh(config.mesh, jax.devices()[:2])
    planned, first = abstract_batch(config, mesh, batches[0]), real.train.batch_at(0)
    assert [x.shape for x in jax.tree.leaves(planned)] == [x.shape for x in jax.tree.leaves(first)] and planned.capacity == first.capacity
    assert plan(config, ["max_steps=50"], target="small").steps == 50

    for changes, said in (
        ({"data.train": "org/set"}, "not known without the rows .org/set."), ({"data.eval": "org/other"}, "without the rows .org/other."),
        ({"data.train": "gone.jsonl"}, "gone.jsonl: no such file"),
        ({"data.max_length": 4}, "train would stop: .* the row has"), ({"model": "pypi:gone==1.0/model.gguf"}, "has not been fetched"),
    ):  # fmt: skip
        monkeypatch.setattr("jaxtune.plan._model", lambda config: open_config(folder))
        found = plan(config, [f"{key}={value}" for key, value in changes.items()], target="small")
        assert found.steps is None and found.rows is None and found.hours_at_least is None
        assert re.search(said, found.notes[-1]), found.notes


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"load_in_8bit": True}, "int8"), ({"load_in_4bit": True}, "fp4"), ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, "nf4-dq"),
    ],
)  # fmt: skip
def test_a_packed_checkpoint_is_planned_as_it_is(tmp_path, settings, kind):
    """Whatever the run's config says, as `train` reads it."""
    hf = tiny.LLAMA | {"quantization_config": {"quant_method": "bitsandbytes"} | settings}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "config.json").write_text(json.dumps(tiny.LLAMA))
    packed = abstract_params(open_config(tmp_path), "float32", None)
    assert packed == abstract_params(open_config(tmp_path / "plain"), "float32", kind)
    assert packed_as({"text_config": hf}) == kind  # where transformers looks too
    with pytest.raises(ConfigError, match="those of .* are packed; write method: qlora"):
        plan(run(tmp_path, method="full"))


def test_the_machine_at_hand_says_how_much_memory_it_has():
    here = plan_targets.find_target("here")
    assert 2**28 < here.chip.memory * len(here.devices) < 2**50 and here.chip.flops is None and "not known" in here.figures


class Card:
    """A device that may not report its memory."""

    platform = "gpu"

    def __init__(self, kind, memory=None):
        self.device_kind, self.memory_stats = kind, lambda: {"bytes_limit": memory} if memory else None


@pytest.mark.parametrize(
    ("card", "memory", "rates_of", "said"),
    [
        (Card("NVIDIA H100 80GB HBM3", 70 * 2**30), 70 * 2**30, "h100", "reports; rates are the pub"),
        (Card("NVIDIA A100-SXM4-40GB"), 36 * 2**30, "a100-40", "does not report its memory.* published one; rates are the pub"),
        (Card("TPU v5 lite"), int(15.75 * 2**30), "v5e", "published"), (Card("TPU v5"), 95 * 2**30, "v5p", "published"),
        (Card("NVIDIA L40", 48 * 2**30), 48 * 2**30, None, "rates are not known"), (Card("NVIDIA GB200"), None, None, "are not known"),
    ],
)  # fmt: skip
def test_a_card_is_asked_and_what_it_does_not_tell_is_said(monkeypatch, card, memory, rates_of, said):
    monkeypatch.setattr(jax, "devices", lambda: [card])
    here = plan_targets.find_target("here")
    known = (plan_targets.TPUS | plan_targets.GPUS)[rates_of][0] if rates_of else plan_targets.Chip(None)
    assert here.chip == known._replace(memory=memory) and re.search(said, here.figures)


@pytest.mark.parametrize(
    ("message", "size"),
    [
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm.", 20.5),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 2.00GiB.", 2.0),
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO temporaries "
            "(17.25G) exceeds available HBM (15.75G). HLO module: jit_step.",
            17.25,
        ),
    ],
)
def test_a_compiler_that_refuses_says_how_much(message, size):
    assert errors_bytes(message) == int(size * 2**30)
    assert errors_bytes("INTERNAL: something else") is None


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("h1000", "not known. There are: here .this machine.; .*h100.*8xh100.*v5e-8"), ("v5e", "not known"), ("v9-8", "not known"),
        ("0xh100", "not known"), ("", "not known"), ("cpu", "for the local machine write here"), ("h100x8", "write 8xh100"),
        ("a100", "write a100-40 or a100-80"), ("v5e-3", "1, 2, 4, ... 256 chips; write v5e-2 or v5e-4"), ("v5e-0", "write v5e-1"),
        ("v5e-4096", "write v5e-256"), ("v5p-7", "named by cores, 2 a chip; write v5p-8"), ("v5p-12", "write v5p-8 or v5p-16"),
    ],
)  # fmt: skip
def test_a_target_that_is_none_says_what_to_write(name, said):
    with pytest.raises(ConfigError, match=said):
        plan_targets.find_target(name)


def test_the_compiler_to_install_is_that_of_jaxs_version(monkeypatch):
    monkeypatch.setattr(topologies, "get_topology_desc", None)  # as without a plugin, an error
    with pytest.raises(ConfigError, match="jax-cuda13-plugin=={0} jax-cuda13-pjrt=={0} ".format(re.escape(jax.__version__))):
        plan_targets.find_target("h100")


@pytest.mark.parametrize(("count", "hosts"), [(1, 1), (8, 1), (9, 3), (12, 2), (11, 11), (64, 8)])
def test_gpus_of_several_hosts_are_as_many_as_were_asked_for(monkeypatch, count, hosts):
    asked = {}
    monkeypatch.setattr(plan_targets, "_topology", lambda *args: asked.update(args[-1]) or SimpleNamespace(devices=range(count)))
    found = plan_targets.find_target(f"{count}xh100")
    assert asked["topology"] == f"1x{hosts}x{count // hosts}"
    with found.lowering():  # jax 0.12 lowers a kernel for the context's chip, and fails without one
        assert jax.sharding.get_abstract_mesh().abstract_device.device_kind == "NVIDIA H100"
