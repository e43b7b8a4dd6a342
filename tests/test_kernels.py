"""Which form of attention a run uses, and that a kernel which is wrong on a chip is never used."""

import dataclasses

import jax
import pytest
import tiny

from jaxtune import kernels
from jaxtune.config import load_config
from jaxtune.errors import ConfigError
from jaxtune.model import flash
from jaxtune.model.families import from_hf
from jaxtune.step import how_to_compute

MODEL = from_hf(tiny.LLAMA)
SHAPE = kernels.Shape(rows=2, tokens=48, heads=4, kv_heads=2, head_dim=16, scale=0.3, cap=1.5, dtype="float32")


def run(**keys):
    return load_config({"model": "x", "data": {"train": "x.jsonl"}} | keys)


@pytest.mark.parametrize(
    "form, platform, change, words",
    [
        ("flash", "cpu", {}, "for GPUs, and this run is on cpu"),
        ("splash", "cuda", {}, "for TPUs, and this run is on cuda"),
        ("splash", "tpu", {"head_dim": 512}, "heads of up to 256"),
        ("flash", "cuda", {"num_kv_heads": 3}, "does not divide"),
    ],
)
def test_a_kernel_that_cannot_do_the_run(form, platform, change, words):
    """It is refused if requested, and `auto` uses plain XLA."""
    model, mesh = dataclasses.replace(MODEL, **change), tiny.mesh_on(platform, tensor=2)
    with pytest.raises(ConfigError, match=words):
        kernels.check_attention(run(attention=form), model, mesh)
    if change:
        assert how_to_compute(run(), model, mesh).attention == "xla"


def test_auto_is_the_platforms_kernel():
    forms = {platform: how_to_compute(run(), MODEL, tiny.mesh_on(platform)).attention for platform in ("cpu", "cuda", "gpu", "tpu")}
    assert forms == {"cpu": "xla", "cuda": "flash", "gpu": "flash", "tpu": "splash"}
    assert how_to_compute(run(method="prefix_tuning"), MODEL, tiny.mesh_on("tpu")).attention == "xla"  # virtual tokens
    assert how_to_compute(run(attention="xla"), MODEL, tiny.mesh_on("tpu")).attention == "xla"


def test_a_kernel_is_compared_on_the_device(monkeypatch, caplog):
    monkeypatch.setattr(kernels, "KERNELS", {"flash": ("cpu",)})
    monkeypatch.setattr(flash, "BLOCK", 16)
    monkeypatch.setattr(flash, "SIZES", {128: (flash._Size(16, 8, 4, 1), flash._Size(8, 16, 4, 1))})
    mesh, config = tiny.mesh_on("cpu"), run(per_device_train_batch_size=1, dtype="float32")
    config = config.replace(data=dataclasses.replace(config.data, max_length=48))
    mesh.devices[0] = jax.devices()[0]
    kernels.works.cache_clear()
    with caplog.at_level("INFO"):
        assert how_to_compute(config, MODEL, mesh).attention == "xla"  # no Triton for CPUs
        assert "does not work on this device" in caplog.text
        monkeypatch.setattr(flash, "INTERPRET", True)
        kernels.works.cache_clear()
        assert how_to_compute(config, MODEL, mesh).attention == "flash"
        assert "agrees with plain XLA" in caplog.text
        right = flash.backward
        monkeypatch.setattr(flash, "backward", lambda *given: (right(*given)[0], *right(*given)[:0:-1]))  # dv for dk
        kernels.works.cache_clear()
        assert how_to_compute(config, MODEL, mesh).attention == "xla"
        assert "is wrong on this device" in caplog.text
    kernels.works.cache_clear()
